"""What doesn't depend on order, place and size of boxes doesn't change with them; numbers are those of plain NumPy."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnv2_jax.ops import boxes as ops
from mnv2_jax.ops.boxes import BACKGROUND, NEITHER

iou, encode, decode = jax.jit(ops.iou), jax.jit(ops.encode), jax.jit(ops.decode)
match = jax.jit(ops.match, static_argnames="threshold")
hard_negatives = jax.jit(ops.hard_negatives, static_argnames=("ratio", "least"))
nms = jax.jit(ops.nms, static_argnames=("threshold", "steps"))
LIMITS = dict(score_threshold=0.1, iou_threshold=0.5)
detections = jax.jit(
    ops.detections, static_argnums=(2, 3, 4, 5, 6), static_argnames=(*LIMITS, "candidates", "most", "steps")
)


def draw(seed, n, smallest=0.05):
    """Boxes in the unit square, float32 [n, 4]."""
    rng = np.random.default_rng(seed)
    first, size = rng.uniform(0, 0.6, (n, 2)), rng.uniform(smallest, 0.4, (n, 2))
    return np.concatenate([first, first + size], 1).astype(np.float32)


def plain_iou(a, b):
    """The IoU of two boxes, with Python's numbers."""
    height, width = (max(min(a[side + 2], b[side + 2]) - max(a[side], b[side]), 0.0) for side in (0, 1))
    each = [max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0) for box in (a, b)]
    union = sum(each) - height * width
    return height * width / union if union > 0 else 0.0


def plain_ious(a, b):
    return np.array([[plain_iou(x, y) for y in b.tolist()] for x in a.tolist()]).reshape(len(a), len(b))


def plain_nms(overlap, scores, threshold):
    """Greedy suppression, one box after the other."""
    keep = np.zeros(len(scores), bool)
    for place in np.argsort(-scores, kind="stable"):
        keep[place] = not (keep & (overlap[place] > threshold)).any()
    return keep


def chain(n):
    """Boxes along a line, each of which overlaps its neighbours alone, with IoU 0.6."""
    start = 0.25 * np.arange(n)
    return np.stack([np.zeros(n), start, np.ones(n), start + 1], 1).astype(np.float32)


@pytest.mark.parametrize("change", [lambda x: x + 3, lambda x: x * 40, lambda x: x[:, [1, 0, 3, 2]]])
def test_overlaps_dont_depend_on_place_size_and_axes(change):
    a, b = draw(0, 30), draw(1, 20)
    np.testing.assert_allclose(iou(change(a), change(b)), iou(a, b), rtol=1e-4, atol=2e-6)


def test_an_overlap_is_symmetric_and_1_for_the_box_itself():
    a, b = draw(0, 30), draw(1, 20)
    np.testing.assert_allclose(iou(a, b), iou(b, a).T, rtol=1e-6)
    np.testing.assert_allclose(jnp.diagonal(iou(a, a)), 1, rtol=1e-6)


def test_overlaps_are_those_of_a_plain_computation():
    a, b = draw(0, 30), draw(1, 20)
    np.testing.assert_allclose(iou(a, b), plain_ious(a, b), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(iou(np.stack([a, a]), np.stack([b, b]))[1], iou(a, b))


def test_what_has_no_area_overlaps_nothing():
    nan, huge = math.nan, 1e30
    odd = np.array(
        [[0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [nan, 0, 1, 1], [0, 0, huge, huge], [0, 0, math.inf, 1]], np.float32
    )
    for other in (odd, np.array([[0, 0, 1, 1]], np.float32)):
        np.testing.assert_array_equal(iou(odd, other), 0)


def test_the_float_type_stays(x64):
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        one = jnp.asarray(draw(0, 4), dtype)
        results = (
            *(jax.eval_shape(of_two, one, one) for of_two in (ops.iou, ops.encode, ops.decode)),
            *jax.eval_shape(lambda x: ops.detections(x, x, 0.1, 0.5, 3, 5), one),
        )
        assert {leaf.dtype for leaf in results} == {jnp.dtype(dtype), jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("change", [lambda x: x + 3, lambda x: x * 40])
def test_codes_dont_depend_on_place_and_size(change):
    a, b = draw(0, 30), draw(1, 30)
    np.testing.assert_allclose(encode(change(a), change(b)), encode(a, b), rtol=1e-3, atol=1e-3)


def test_a_code_is_undone():
    boxes, anchors = draw(0, 50), draw(1, 50)
    np.testing.assert_allclose(decode(encode(boxes, anchors), anchors), boxes, atol=1e-6)
    np.testing.assert_allclose(encode(anchors, anchors), 0, atol=1e-5)


def test_a_code_by_hand():
    anchor, box = jnp.asarray([[10.0, 20, 20, 40]]), jnp.asarray([[12.0, 20, 32, 60]])  # centres (15, 30), (22, 40)
    np.testing.assert_allclose(encode(box, anchor), [[7.0, 5.0, 5 * math.log(2), 5 * math.log(2)]], rtol=1e-6)


def test_a_box_without_area_has_a_finite_code_and_decoded_sides_have_a_limit():
    anchors = draw(0, 3)
    empty = np.concatenate([anchors[:, :2], anchors[:, :2] - [[0, 0], [0, 1], [1, 1]]], 1).astype(np.float32)
    codes = encode(empty, anchors)
    assert jnp.isfinite(codes).all()
    assert (iou(decode(codes, anchors), anchors) < 1e-3).all()
    far = decode(jnp.full((3, 4), 1e4).at[:, :2].set(0), anchors)
    np.testing.assert_allclose(far[:, 2:] - far[:, :2], 62.5 * (anchors[:, 2:] - anchors[:, :2]), rtol=1e-5)


def matched(anchors, boxes, classes=None, ignored=None, **options):
    n = len(boxes)
    classes = np.zeros(n, np.int32) if classes is None else np.asarray(classes, np.int32)
    ignored = np.zeros(n, bool) if ignored is None else np.asarray(ignored)
    anchors, boxes = (np.asarray(x, np.float32) for x in (anchors, boxes))
    return np.asarray(match(anchors, boxes, classes, ignored, **options))


def plain_match(anchors, boxes, threshold):
    overlap = plain_ious(boxes, anchors)
    numbers = np.where(overlap.max(0) >= threshold, overlap.argmax(0), BACKGROUND)
    for number in reversed(range(len(boxes))):  # the first box wins
        if overlap[number].max() > 0:
            numbers[overlap[number].argmax()] = number
    return numbers


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_matches_are_those_of_a_plain_computation(n, threshold):
    anchors, boxes = draw(2, 300), draw(n, n)
    numbers = matched(anchors, boxes, threshold=threshold)
    np.testing.assert_array_equal(numbers, plain_match(anchors, boxes, threshold))
    assert numbers.max() >= 0


def test_matches_follow_the_order_of_anchors_and_of_boxes_and_padding_has_none():
    anchors, boxes = draw(2, 200), draw(3, 12)
    numbers = matched(anchors, boxes)
    rng = np.random.default_rng(0)
    order = rng.permutation(200)
    np.testing.assert_array_equal(matched(anchors[order], boxes), numbers[order])
    order = rng.permutation(12)
    np.testing.assert_array_equal(
        matched(anchors, boxes[order]), np.where(numbers < 0, numbers, np.argsort(order)[numbers])
    )
    padded = np.concatenate([boxes, anchors[:5]])
    np.testing.assert_array_equal(matched(anchors, padded, [0] * 12 + [-1] * 5, [False] * 14 + [True] * 3), numbers)
    np.testing.assert_array_equal(matched(anchors * 300, boxes * 300), numbers)


GRID = [[0, 0, 10, 10], [0, 10, 10, 20], [0, 20, 10, 30]]


@pytest.mark.parametrize(
    ("boxes", "classes", "expected"),
    [
        ([[0, 0, 10, 10]], [3], [0, -1, -1]),
        ([[0, 0, 10, 10]], [-1], [-1, -1, -1]),  # no box
        ([[0, 0, 10, 5]], [0], [0, -1, -1]),  # exactly the threshold
        ([[0, 9, 2, 12]], [0], [-1, 0, -1]),  # below it: its best anchor
        ([[0, 9, 2, 11]], [0], [0, -1, -1]),  # two best anchors: the first
        ([[0, 12, 3, 15], [0, 11, 10, 20]], [0, 0], [-1, 0, -1]),  # one best anchor: the first box, though it fits less
        ([[0, 10, 10, 20], [0, 10, 10, 20]], [0, 1], [-1, 0, -1]),  # equal boxes: the first
        ([[50, 50, 60, 60], [0, 0, 9, 9]], [0, 0], [1, -1, -1]),  # one that touches no anchor
        ([[5, 5, 5, 5], [0, 0, 9, 9]], [0, 0], [1, -1, -1]),  # one without area
    ],
)
def test_matches_by_hand(boxes, classes, expected):
    assert matched(GRID, boxes, classes).tolist() == expected


@pytest.mark.parametrize(
    ("boxes", "ignored", "expected"),
    [
        ([[0, 0, 100, 100]], [True], [NEITHER] * 3),  # a region that is much larger than an anchor
        ([[0, 0, 10, 15]], [True], [NEITHER, NEITHER, BACKGROUND]),
        ([[0, 0, 10, 14]], [True], [NEITHER, BACKGROUND, BACKGROUND]),
        ([[0, 0, 10, 30], [0, 10, 10, 20]], [True, False], [NEITHER, 1, NEITHER]),  # an object in it is one
    ],
)
def test_anchors_in_an_ignored_region_are_neither(boxes, ignored, expected):
    assert matched(GRID, boxes, ignored=ignored).tolist() == expected


def plain_negatives(losses, matches, ratio, least):
    mask = np.zeros(losses.shape, bool)
    for row, (values, numbers) in enumerate(zip(losses, matches, strict=True)):
        order = [place for place in np.argsort(-values, kind="stable") if numbers[place] == BACKGROUND]
        mask[row, order[: max(ratio * int((numbers >= 0).sum()), least)]] = True
    return mask


@pytest.mark.parametrize(("ratio", "least"), [(3, 0), (3, 3), (1, 2)])
def test_the_hardest_negatives_of_each_image(ratio, least):
    rng = np.random.default_rng(0)
    losses = rng.integers(0, 9, (6, 50)).astype(np.float32)  # with ties
    matches = rng.choice([-2, -1, 0, 4], (6, 50), p=[0.1, 0.8, 0.05, 0.05]).astype(np.int32)
    matches[0] = BACKGROUND  # no box
    matches[1] = 0  # nothing but boxes
    matches[2] = NEITHER
    matches[3, :40] = 0  # fewer negatives than wanted
    found = np.asarray(hard_negatives(losses, matches, ratio=ratio, least=least))
    np.testing.assert_array_equal(found, plain_negatives(losses, matches, ratio, least))
    assert found.sum(1)[:4].tolist() == [least, 0, 0, (matches[3] == BACKGROUND).sum()]
    order = rng.permutation(6)
    np.testing.assert_array_equal(hard_negatives(losses[order], matches[order], ratio=ratio, least=least), found[order])


def test_negatives_follow_the_order_of_anchors_and_show_nan():
    rng = np.random.default_rng(0)
    losses, matches = rng.normal(size=(1, 40)).astype(np.float32), np.full((1, 40), BACKGROUND, np.int32)
    matches[0, :3] = 0
    losses[0, 20] = np.nan
    found, order = np.asarray(hard_negatives(losses, matches)), rng.permutation(40)
    np.testing.assert_array_equal(hard_negatives(losses[:, order], matches[:, order]), found[:, order])
    assert found.sum() == 9
    assert found[0, 20]
    gradient = jax.grad(lambda x: jnp.where(hard_negatives(x, matches), x, 0).sum())(jnp.nan_to_num(losses))
    assert gradient.sum() == 9


def of_nms(case):
    """Boxes and scores, of which the boxes overlap in a way that is hard for something."""
    rng, n = np.random.default_rng(0), 40
    scores = rng.random(n).astype(np.float32)
    match case:
        case "random":
            return draw(0, n), scores
        case "dense":
            return draw(1, n, 0.3), scores
        case "equal scores":
            return draw(2, n, 0.2), np.full(n, 0.5, np.float32)
        case "few scores":
            return draw(3, n, 0.2), rng.integers(0, 4, n).astype(np.float32)
        case "equal boxes":
            return np.repeat(draw(4, 8), 5, 0), scores
        case "all equal":
            return np.repeat(draw(4, 1), n, 0), np.full(n, 0.5, np.float32)
        case "chain":
            return chain(n), np.linspace(1, 0, n, dtype=np.float32)
        case "chain upwards":
            return chain(n), np.linspace(0, 1, n, dtype=np.float32)
        case "chain of equal scores":
            return chain(n), np.full(n, 0.5, np.float32)
        case "chain in random order":
            return chain(n), scores
        case "without area":
            return draw(5, n) * np.array([[1, 1, 0, 1]], np.float32), scores
        case "one over all":
            near = np.array([[0, 0, 1, 1]]) + rng.uniform(-0.05, 0.05, (n, 4))
            return np.concatenate([[[0, 0, 1, 1]], near])[:n].astype(np.float32), np.sort(scores)[::-1].copy()
    raise KeyError(case)


CASES = (
    *("random", "dense", "equal scores", "few scores", "equal boxes", "all equal", "chain", "chain upwards"),
    *("chain of equal scores", "chain in random order", "without area", "one over all"),
)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_suppression_is_greedy(case, threshold):
    boxes, scores = of_nms(case)
    expected = plain_nms(plain_ious(boxes, boxes), scores, threshold)
    np.testing.assert_array_equal(nms(boxes, scores, threshold), expected)
    np.testing.assert_array_equal(nms(boxes, scores, threshold, steps=len(boxes)), expected)
    link = 2 if threshold == 0.5 else 3  # a box of a chain overlaps the next but one by a third
    counts = {"all equal": 1, "without area": 40, "one over all": 1, "chain": -(-40 // link)}
    assert expected.sum() == counts.get(case, expected.sum())


@pytest.mark.parametrize("seed", range(20))
def test_suppression_is_greedy_on_random_boxes_whatever_their_order_place_and_size(seed):
    rng = np.random.default_rng(seed)
    boxes = rng.integers(0, 64, (60, 4)).astype(np.float32)  # exact sums, so that place and size change no rounding
    boxes[:, 2:] = boxes[:, :2] + rng.integers(0, 48, (60, 2))
    scores, order = rng.permutation(60).astype(np.float32), rng.permutation(60)
    keep = np.asarray(nms(boxes, scores, 0.45))
    np.testing.assert_array_equal(keep, plain_nms(plain_ious(boxes, boxes), scores, 0.45))
    np.testing.assert_array_equal(nms(boxes[order], scores[order], 0.45), keep[order])
    np.testing.assert_array_equal(nms(boxes * 4 + 16, scores / 3 - 7, 0.45), keep)


def test_too_few_products_keep_more_boxes_or_fewer_but_are_right_for_short_chains():
    boxes, scores = of_nms("chain")
    right = np.arange(40) % 2 == 0
    for steps in (1, 2, 7, 16):
        keep = np.asarray(nms(boxes, scores, 0.5, steps=steps))
        np.testing.assert_array_equal(keep[:steps], right[:steps])
        assert (keep[steps:] == (steps % 2 == 0)).all()
        assert (keep >= right).all() if steps % 2 == 0 else (keep <= right).all()


def test_suppression_of_several_sets_at_once():
    cases = [of_nms(case) for case in CASES]
    boxes, scores = (np.stack(values) for values in zip(*cases, strict=True))
    each = np.stack([nms(*case, 0.5) for case in cases])
    np.testing.assert_array_equal(nms(boxes, scores, 0.5), each)
    np.testing.assert_array_equal(jax.vmap(functools.partial(ops.nms, threshold=0.5))(boxes, scores), each)


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, True), (0.49, False)])
def test_an_overlap_of_the_threshold_is_allowed(threshold, expected):
    boxes = np.array([[0, 0, 2, 2], [0, 0, 2, 1]], np.float32)
    assert nms(boxes, np.array([0.4, 0.3], np.float32), threshold).tolist() == [True, expected]
    for steps in (None, 2):
        values = detections(boxes, np.array([[0.4], [0.3]], np.float32), 0.1, threshold, 2, 2, steps)[2]
        assert (values > 0).tolist() == [True, expected]


def test_a_score_that_is_nan_suppresses_nothing():
    keep = nms(np.repeat(draw(0, 1), 3, 0), np.array([np.nan, 0.5, 0.4], np.float32), 0.5)
    assert keep.tolist() == [True, True, False]


def plain_detections(boxes, scores, score_threshold, iou_threshold, candidates, most):
    """Lists (score, class, anchor), the best first."""
    found = []
    for number, column in enumerate(scores.T):
        order = np.argsort(-column, kind="stable")[:candidates]
        order = order[column[order] > score_threshold]
        keep = plain_nms(plain_ious(boxes[order], boxes[order]), column[order], iou_threshold)
        found += [(column[anchor], number, anchor) for anchor in order[keep]]
    return sorted(found, key=lambda row: -row[0])[:most]


def problem(seed, a=60, k=4, ties=False):
    rng = np.random.default_rng(seed)
    scores = rng.random((a, k)).astype(np.float32)
    return draw(seed, a, 0.2), np.round(scores, 1) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("candidates", "most"), [(20, 15), (300, 300), (5, 300), (60, 1)])
def test_detections_are_those_of_a_plain_computation(candidates, most, ties):
    boxes, scores = problem(candidates, ties=ties)
    expected = plain_detections(boxes, scores, *LIMITS.values(), candidates, most)
    for steps in (None, 16):
        places, classes, values = detections(boxes, scores, **LIMITS, candidates=candidates, most=most, steps=steps)
        assert (places.shape, classes.shape, values.shape) == ((most, 4), (most,), (most,))
        n = len(expected)
        assert values[:n].tolist() == [row[0] for row in expected]
        assert classes[:n].tolist() == [row[1] for row in expected]
        np.testing.assert_array_equal(places[:n], boxes[[row[2] for row in expected]])
        assert not values[n:].any()
        assert not places[n:].any()
        assert (classes[n:] == -1).all()


def test_detections_dont_depend_on_the_order_of_anchors_and_follow_that_of_classes():
    boxes, scores = problem(0)
    options = dict(**LIMITS, candidates=60, most=40)
    places, classes, values = detections(boxes, scores, **options)
    order = np.random.default_rng(0).permutation(60)
    for one, other in zip(detections(boxes[order], scores[order], **options), (places, classes, values), strict=True):
        np.testing.assert_array_equal(one, other)
    again = detections(boxes, scores[:, ::-1], **options)
    np.testing.assert_array_equal(again[0], places)
    np.testing.assert_array_equal(again[1], jnp.where(classes < 0, -1, 3 - classes))


@pytest.mark.parametrize("value", [0.0, 0.1, np.nan])
def test_no_score_above_the_threshold_is_no_detection(value):
    boxes, scores = problem(0)
    places, classes, values = detections(boxes, np.full_like(scores, value), **LIMITS, candidates=9, most=5)
    assert not places.any()
    assert not values.any()
    assert (classes == -1).all()


def test_a_score_that_is_nan_takes_no_place_from_others():
    boxes, scores = problem(0)
    scores[:30] = np.nan
    options = dict(**LIMITS, candidates=10, most=20)
    for found, expected in zip(
        detections(boxes, scores, **options), detections(boxes, np.nan_to_num(scores), **options), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


PLAIN = {
    *("add", "sub", "mul", "div", "max", "min", "gt", "lt", "and", "select_n", "convert_element_type", "iota", "pad"),
    *("broadcast_in_dim", "reshape", "squeeze", "slice", "concatenate", "transpose", "gather", "top_k", "dot_general"),
    "reduce_sum",
    "jit",
}


def operators_of(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from operators_of(inner)


def test_a_number_of_steps_leaves_plain_operators():
    boxes, scores = problem(0)

    def names(steps):
        return set(
            operators_of(jax.make_jaxpr(lambda b, s: ops.detections(b, s, 0.1, 0.5, 20, 300, steps))(boxes, scores))
        )

    assert names(16) <= PLAIN
    assert names(None) - PLAIN


@pytest.fixture
def theirs(operators):
    """torchvision's functions for detection."""
    return pytest.importorskip("torchvision.models.detection", reason="pip install .[parity]")


def turned(boxes):
    """Boxes with x before y, as torchvision has them, and back."""
    return np.ascontiguousarray(np.asarray(boxes)[..., [1, 0, 3, 2]])


@pytest.mark.parity
def test_codes_are_torchvisions(theirs):
    torch = pytest.importorskip("torch")
    coder = theirs._utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes, anchors = 300 * draw(0, 50), 300 * draw(1, 50)
    codes = encode(boxes, anchors)
    expected = coder.encode_single(torch.from_numpy(turned(boxes)), torch.from_numpy(turned(anchors)))
    np.testing.assert_allclose(turned(codes), expected.numpy(), rtol=1e-4, atol=1e-4)
    wild = np.random.default_rng(0).normal(0, 20, (50, 4)).astype(np.float32)
    expected = coder.decode_single(torch.from_numpy(turned(wild)), torch.from_numpy(turned(anchors)))
    np.testing.assert_allclose(turned(decode(wild, anchors)), expected.numpy(), rtol=1e-4, atol=1e-2)


@pytest.mark.parity
@pytest.mark.parametrize("n", [1, 5, 12])
def test_matches_are_torchvisions_where_no_two_boxes_share_their_best_anchor(n, theirs):
    torch = pytest.importorskip("torch")
    anchors, boxes = draw(9, 400), draw(n, n)
    overlap = np.asarray(iou(boxes, anchors))
    assert len(set(overlap.argmax(1))) == n
    expected = theirs._utils.SSDMatcher(0.5)(torch.from_numpy(overlap.copy())).numpy()
    np.testing.assert_array_equal(matched(anchors, boxes), expected)


def their_head(torch, seed, a=80, k=5):
    rng = np.random.default_rng(seed)
    codes = rng.normal(0, 2, (1, a, 4)).astype(np.float32)
    logits = rng.normal(0, 2, (1, a, k + 1)).astype(np.float32)
    return codes, logits, {"bbox_regression": torch.from_numpy(turned(codes)), "cls_logits": torch.from_numpy(logits)}


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
def test_detections_are_torchvisions(seed, theirs, monkeypatch):
    torch = pytest.importorskip("torch")
    codes, logits, head = their_head(torch, seed)
    anchors = 300 * draw(seed, 80, 0.2)

    def batched_nms(boxes, scores, labels, threshold):
        """Theirs is compiled, and may be missing."""
        keep = np.zeros(len(scores), bool)
        for label in np.unique(labels):
            own = np.flatnonzero(labels.numpy() == label)
            each = boxes.numpy()[own]
            keep[own] = plain_nms(plain_ious(each, each), scores.numpy()[own], threshold)
        order = np.argsort(-scores.numpy(), kind="stable")
        return torch.from_numpy(order[keep[order]])

    monkeypatch.setattr(theirs.ssd.box_ops, "batched_nms", batched_nms)
    coder = theirs._utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    owner = types.SimpleNamespace(
        box_coder=coder, score_thresh=0.05, nms_thresh=0.55, topk_candidates=30, detections_per_img=40
    )
    (expected,) = theirs.ssd.SSD.postprocess_detections(owner, head, [torch.from_numpy(turned(anchors))], [(250, 280)])
    boxes = jnp.clip(decode(codes[0], anchors), 0, np.array([[250, 280, 250, 280]]))
    places, classes, values = detections(
        boxes, jax.nn.softmax(logits[0])[:, 1:], 0.05, 0.55, candidates=30, most=40, steps=None
    )
    n = len(expected["scores"])
    assert (values > 0).sum() == n
    np.testing.assert_allclose(values[:n], expected["scores"].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(classes[:n] + 1, expected["labels"].numpy())
    np.testing.assert_allclose(turned(places[:n]), expected["boxes"].numpy(), atol=1e-3)


@pytest.mark.parity
def test_negatives_are_torchvisions(theirs):
    """By the sum of their losses."""
    torch = pytest.importorskip("torch")
    _, logits, head = their_head(torch, 0)
    anchors, boxes = 300 * draw(1, 80, 0.2), 300 * draw(2, 3)
    labels = np.array([1, 2, 5])
    numbers = matched(anchors, boxes)
    owner = types.SimpleNamespace(box_coder=theirs._utils.BoxCoder((10.0, 10.0, 5.0, 5.0)), neg_to_pos_ratio=3)
    target = {"boxes": torch.from_numpy(turned(boxes)), "labels": torch.from_numpy(labels)}
    tensors = [torch.from_numpy(turned(anchors))], [torch.tensor(numbers.tolist())]
    expected = theirs.ssd.SSD.compute_loss(owner, [target], head, *tensors)["classification"].item()
    losses = -np.array(jax.nn.log_softmax(logits[0]))
    losses = losses[np.arange(80), np.where(numbers >= 0, labels[numbers], 0)]
    mask = np.asarray(hard_negatives(losses[None], numbers[None]))[0] | (numbers >= 0)
    np.testing.assert_allclose(losses[mask].sum() / (numbers >= 0).sum(), expected, rtol=1e-5)
