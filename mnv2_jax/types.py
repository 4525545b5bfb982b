"""Types of arrays and pytrees, and the letters that stand for axes in shapes.

b  images in a batch            h, w   height and width in pixels (rows, columns)
c  channels                     k      classes
i, o  channels in and out       g, n   batch-norm groups, images in a group
r, s  rows and columns of a convolution kernel
p, q  rows and columns of a convolution's output: h and w over its stride

Images are NHWC. ``uint8`` images have values from 0 to 255, ``float`` images are normalised.
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
"""Arrays of one step, each with the batch as its first axis. Training batches are full, so they have no mask.

index: int32 [b], index of the image in its split
epoch: int32 [b], number of earlier passes over the split, times `augment.repeats`, plus the number of the repeat
       (training)
mask:  bool [b], False for the rows that only pad the last batch (evaluation)

The other keys come from the task's view and columns: image: uint8 [b, h, w, 3]; for classification also
label: int32 [b], and teacher_logits: float32 [b, k] where a teacher's logits are stored.
"""

Variables: TypeAlias = Mapping[str, PyTree]
"""Variables of a model, ``{"params": ..., "batch_stats": ...}``."""
