"""Functions of boxes: overlap, SSD's code and matching, hard negatives, suppression of overlapping boxes.

A box is (y0, x0, y1, x1), its corners in any unit; its area is 0 where y1 <= y0 or x1 <= x0. Results have the float
type of the boxes. Letters: a anchors, n boxes, k classes.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from mnv2_jax.types import Array

BACKGROUND = -1
"""Number in `match` of an anchor that has no box."""
NEITHER = -2
"""Number in `match` of an anchor in an ignored region, which is neither a box nor background."""

_PLACE, _SIZE = 10, 5
"""Factors of a code: of the distances of centres, and of the logarithms of sides."""
_LARGEST = math.log(1000 / 16)
"""The largest log ratio of a decoded side to its anchor's, as in torchvision."""
_SMALLEST = 1e-6
"""The smallest ratio of an encoded side to its anchor's."""


def areas(boxes: Float[Array, "... 4"]) -> Float[Array, ...]:
    """Computes the area of each box."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]


def intersections(a: Float[Array, "*b n 4"], b: Float[Array, "*b m 4"]) -> Float[Array, "*b n m"]:
    """Computes the area that each box of ``a`` has in common with each of ``b``."""

    def side(axis: int) -> Array:  # one at a time: whole boxes of all pairs would be an array with one more axis
        first = jnp.maximum(a[..., :, None, axis], b[..., None, :, axis])
        last = jnp.minimum(a[..., :, None, axis + 2], b[..., None, :, axis + 2])
        return jnp.maximum(last - first, 0)

    return side(0) * side(1)


def iou(a: Float[Array, "*b n 4"], b: Float[Array, "*b m 4"]) -> Float[Array, "*b n m"]:
    """Computes the intersection over union of each box of ``a`` with each of ``b``, from 0 to 1.

    It is 0 for a box without area, and for one with a coordinate that is NaN or whose area overflows.
    """
    common = intersections(a, b)
    union = areas(a)[..., :, None] + areas(b)[..., None, :] - common
    is_known = (common > 0) & (union < jnp.inf)
    return jnp.where(is_known, common / jnp.where(is_known, union, 1), 0)


def encode(boxes: Float[Array, "*b 4"], anchors: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """Computes SSD's code of each box for its anchor (Liu et al. 2016, eq. 2, with the variances 0.1 and 0.2).

    Args:
      boxes: boxes; a side counts as 1e-6 of its anchor's at least, so that a box without area has a finite code.
      anchors: their anchors, with area.

    Returns:
      10 times the distance of the centres (y, x) over the anchor's height and width, and 5 times the logarithm of
      height and width over the anchor's.
    """
    centre, size = _centre_and_size(boxes)
    own_centre, own_size = _centre_and_size(anchors)
    ratio = jnp.maximum(size / own_size, _SMALLEST)
    return jnp.concatenate([(centre - own_centre) / own_size * _PLACE, jnp.log(ratio) * _SIZE], -1)


def decode(codes: Float[Array, "*b 4"], anchors: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """Computes the box of each code, the inverse of `encode`; sides are at most 62.5 times the anchor's."""
    centre, size = _centre_and_size(anchors)
    centre = centre + codes[..., :2] / _PLACE * size
    half = jnp.exp(jnp.minimum(codes[..., 2:] / _SIZE, _LARGEST)) * size / 2
    return jnp.concatenate([centre - half, centre + half], -1)


def _centre_and_size(boxes: Array) -> tuple[Array, Array]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + size / 2, size


def match(
    anchors: Float[Array, "a 4"],
    boxes: Float[Array, "n 4"],
    classes: Int[Array, " n"],
    ignored: Bool[Array, " n"],
    threshold: float = 0.5,
) -> Int[Array, " a"]:
    """Finds the box that each anchor of an image learns, as TensorFlow's argmax matcher with forced matches does.

    An anchor has the box with which its IoU is largest if that is at least ``threshold``. Then each box gets the anchor
    with which its own IoU is largest, whatever that is above 0; a box that touches no anchor gets none. Among equals
    the lowest number wins: of an anchor's boxes, of a box's anchors, and of boxes with the same best anchor, the others
    of which may have none. (torchvision's SSDMatcher gives that anchor to the last of them.)

    Args:
      anchors: anchors in the unit of the boxes.
      boxes: the image's boxes, one at least, padded.
      classes: their classes, -1 for padding.
      ignored: True for a region that is no object but may hold some, as COCO's crowds.
      threshold: smallest IoU, and smallest share of an anchor within an ignored region, from 0 to 1.

    Returns:
      For each anchor the number of its box, `BACKGROUND`, or `NEITHER` where it would be background but ``threshold``
      of its area lies in an ignored region.
    """
    is_real = classes >= 0
    common = iou(boxes, anchors)
    quality = jnp.where((is_real & ~ignored)[:, None], common, -1)
    numbers = jnp.where(quality.max(0) >= threshold, quality.argmax(0), BACKGROUND)
    is_best = jnp.arange(len(anchors))[None] == quality.argmax(1)[:, None]
    is_forced = is_best & (quality > 0)
    numbers = jnp.where(is_forced.any(0), is_forced.argmax(0), numbers)
    within = intersections(boxes, anchors) >= threshold * areas(anchors)[None]
    is_covered = (within & (is_real & ignored)[:, None]).any(0)
    return jnp.where(is_covered & (numbers == BACKGROUND), NEITHER, numbers).astype(jnp.int32)


def hard_negatives(
    losses: Float[Array, "b a"], matches: Int[Array, "b a"], ratio: int = 3, least: int = 0
) -> Bool[Array, "b a"]:
    """Selects the background anchors with the largest losses of each image (Liu et al. 2016, section 2.2).

    Args:
      losses: losses of the anchors as background. Of equal ones the lowest number is taken first; NaN is the largest,
        so that it isn't hidden.
      matches: result of `match`; only `BACKGROUND` is taken.
      ratio: number of negatives for each anchor with a box.
      least: smallest number of negatives of an image (torchvision: 0, TensorFlow's min_negatives_per_image: 3).

    Returns:
      True for the selected anchors: all background ones where there aren't as many.
    """
    is_background = matches == BACKGROUND
    wanted = jnp.maximum(ratio * (matches >= 0).sum(1), least)
    known = jnp.where(jnp.isnan(losses), jnp.inf, jax.lax.stop_gradient(losses))
    hardness = jnp.where(is_background, known, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-hardness, axis=1), axis=1)
    return is_background & (rank < wanted[:, None])


def nms(
    boxes: Float[Array, "*b n 4"], scores: Float[Array, "*b n"], threshold: float, steps: int | None = None
) -> Bool[Array, "*b n"]:
    """Suppresses each box that overlaps a kept one of higher score: greedy non-maximum suppression.

    The kept boxes are the one fixed point of keep[j] = no i before j with keep[i] and IoU(i, j) > ``threshold``, found
    by products of a vector with a matrix, from keep = all. After s products a box is right if no chain that ends in it,
    of boxes each before the next and overlapping it, is longer than s boxes; so n products are enough for any boxes.

    Args:
      boxes: boxes; one without area is kept and suppresses none.
      scores: their scores; of equal ones the lowest number comes first.
      threshold: largest IoU of two kept boxes, from 0 to 1.
      steps: number of products, at least 1. None is as many as it takes, in a `while_loop`, and exact. A number leaves
        no loop, for files. If it was too small, an even number keeps all boxes that should be kept and some more, an
        odd one only boxes that should be kept, but not all. 100 to 300 boxes needed 11 at most (17,550 simulated sets:
        random boxes, and boxes around objects), so 16 is ample.

    Returns:
      True for kept boxes.
    """
    number = jnp.arange(scores.shape[-1]).reshape((1,) * (scores.ndim - 1) + (-1,))
    mine, other = scores[..., :, None], scores[..., None, :]
    is_before = (mine > other) | ((mine == other) & (number[..., :, None] < number[..., None, :]))
    return _fixed_point((iou(boxes, boxes) > threshold) & is_before, steps)


def _fixed_point(suppresses: Bool[Array, "*b n n"], steps: int | None) -> Bool[Array, "*b n"]:
    """Returns keep, where keep[j] = no i with keep[i] and suppresses[i, j], which has no cycles; see `nms`."""
    matrix = suppresses.astype(jnp.float32)  # sums of zeros and ones: exact enough to compare with one half in any type

    def step(keep: Array) -> Array:  # of a row, [..., 1, n]
        return jnp.matmul(keep.astype(matrix.dtype), matrix) < 0.5

    first = matrix.sum(-2, keepdims=True) < 0.5  # the step from keep = all
    if steps is not None:
        return functools.reduce(lambda keep, _: step(keep), range(1, steps), first)[..., 0, :]

    def is_open(state: tuple[Array, Array]) -> Array:
        return (state[0] != state[1]).any()

    every = jnp.ones_like(first)
    return jax.lax.while_loop(is_open, lambda state: (state[1], step(state[1])), (every, first))[1][..., 0, :]


def detections(
    boxes: Float[Array, "a 4"],
    scores: Float[Array, "a k"],
    score_threshold: float,
    iou_threshold: float,
    candidates: int,
    most: int,
    steps: int | None = None,
) -> tuple[Float[Array, "most 4"], Int[Array, " most"], Float[Array, " most"]]:
    """Selects the detections of an image, as torchvision's SSD.postprocess_detections does.

    Of each class the ``candidates`` boxes of highest score compete in `nms`; of what all classes keep, the ``most`` of
    highest score remain. torchvision's SSDLite has 0.001, 0.55, 300 and 300, TensorFlow's 1e-8, 0.6, 100 and 100.
    90 classes with 300 candidates take about 100 MB: `jax.lax.map` goes over images with less memory than `jax.vmap`.

    Args:
      boxes: the image's boxes, clipped to it.
      scores: probabilities of the classes, without background; NaN counts as 0.
      score_threshold: detections have a higher score, from 0 to 1.
      iou_threshold: largest IoU of two detections of a class, from 0 to 1.
      candidates: number of boxes of each class.
      most: number of places.
      steps: number of products of `nms`.

    Returns:
      Boxes, classes and scores, the highest score first; of equal ones the lowest class, then the lowest anchor. An
      empty place has score 0, class -1 and a box of zeros.
    """
    num_anchors, num_classes = scores.shape
    candidates = min(candidates, num_anchors)
    places = min(most, num_classes * candidates)
    best, anchors = jax.lax.top_k(jnp.where(scores > score_threshold, scores, 0).T, candidates)
    rivals = _rows(boxes, anchors)
    is_before = jnp.arange(candidates)[:, None] < jnp.arange(candidates)[None]
    keep = _fixed_point((iou(rivals, rivals) > iou_threshold) & is_before[None], steps)
    chosen, numbers = jax.lax.top_k(jnp.where(keep, best, 0).reshape(-1), places)
    is_there = chosen > 0
    found = jnp.where(is_there[:, None], _rows(rivals.reshape(-1, 4), numbers), 0)
    classes = jnp.where(is_there, jax.lax.div(numbers, jnp.asarray(candidates, numbers.dtype)), -1).astype(jnp.int32)
    if places == most:
        return found, classes, chosen
    empty = (0, most - places)
    return jnp.pad(found, (empty, (0, 0))), jnp.pad(classes, empty, constant_values=-1), jnp.pad(chosen, empty)


def _rows(array: Array, numbers: Array) -> Array:
    """Takes rows by their numbers, which must be right: without what wraps or clips others."""
    return array.at[numbers].get(mode="promise_in_bounds", wrap_negative_indices=False)
