"""Array and pytree types, and the legend of the letters that stand in shapes.

b  images in a batch            h, w   height and width in pixels (rows, columns)
c  channels                     k      classes
i, o  channels in and out       g, n   batch-norm groups, images in a group
r, s  rows and columns of a convolution kernel
p, q  rows and columns of what a convolution gives: h and w over its stride

Images are NHWC. ``uint8`` images run over 0..255, ``float`` images are normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Key: TypeAlias = jax.Array
"""A typed PRNG key, or an array of them."""

Batch: TypeAlias = Mapping[str, Array]
"""Arrays that one step reads, each with the batch as its first axis. Training batches are whole: they have no mask.

index: int32 [b], place of the image in its split
epoch: int32 [b], how often the split has been gone through before, times `augment.repeats`, plus the number of the
       repeat (training)
mask:  bool [b], False for the rows that only pad the last batch (evaluation)

The other keys are those of the task's view and columns: image: uint8 [b, h, w, 3], and of a classification
label: int32 [b] and teacher_logits: float32 [b, k], where a teacher's are stored.
"""

Variables: TypeAlias = Mapping[str, PyTree]
"""A model's ``{"params": ..., "batch_stats": ...}``."""
