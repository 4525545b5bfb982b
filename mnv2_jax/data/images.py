"""From the bytes of an image file to uint8 RGB, and the crops that are made on the host.

Everything is NumPy and Pillow on uint8 [h, w, 3], and what is random takes its generator as an argument. Flips, shifts
and colour are not here: they run on the device, in `ops`.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from PIL import Image

from mnv2_jax.config import DataConfig
from mnv2_jax.errors import UserError

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_THINNEST = 100
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes for grey values above 255: 16-bit PNG, TIFF and PPM."""


def decode(content: bytes, name: str) -> np.ndarray:
    """Decodes an image file of any kind that Pillow reads.

    Transparency is dropped, of an animation the first frame is taken, 16-bit grey is scaled to 8 bits. An orientation
    written beside the pixels (EXIF) is not applied, as no published accuracy was measured with it.

    Args:
      content: the bytes of the file.
      name: what the file is called in an error.

    Returns:
      uint8 [h, w, 3], RGB.

    Raises:
      UserError: naming the file, if it is empty, cut off, no image, or unreasonably large.
    """
    if not content:
        raise UserError(f"{name}: the file is empty; restore or remove it")
    try:
        # Pillow warns of damaged metadata and of sizes below its limit, neither of which touches the pixels.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            return _to_rgb(image)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image in any format we read; replace or remove it") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(f"{name}: its header claims more than {limit:,} pixels; shrink or remove it") from error
    except Exception as error:  # Pillow's many readers raise whatever the damage leads them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: can't be decoded ({reason}); replace or remove it") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if max(image.size) > _THINNEST * min(image.size):
        # With the short side resized, the long one would take gigabytes before it is cropped.
        raise UserError(f"{image.width}×{image.height} pixels is thinner than {_THINNEST}:1; crop or remove it")
    if image.mode in _DEEP_GREY:
        # 257 = 65535 / 255. Pillow's own conversion would clip at 255, that is, turn nearly everything white.
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((deep + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise UserError("a floating-point image, whose range is not known; save it with 8 bits")
    return np.asarray(image.convert("RGB"))


def evaluation_view(image: np.ndarray, data: DataConfig) -> np.ndarray:
    """The deterministic view of an image: of evaluation, and of training without random-resized crop.

    Args:
      image: uint8 [h, w, 3].
      data: `eval_crop`, `eval_crop_fraction`, `resolution` and `interpolation` are read.

    Returns:
      uint8 [resolution, resolution, 3].
    """
    height, width = image.shape[:2]
    resolution, fraction = data.resolution, data.eval_crop_fraction
    if data.eval_crop == "central":
        # TF-slim's rounding: the margin is cut to whole pixels, the crop is what remains.
        top, left = int((height - height * fraction) / 2), int((width - width * fraction) / 2)
        return _resized_crop(image, top, left, height - 2 * top, width - 2 * left, data)
    # torchvision's Resize and CenterCrop: the long side is truncated, the centre rounded half to even.
    short = round(resolution / fraction)
    if height <= width:
        height, width = short, int(short * width / height)
    else:
        height, width = int(short * height / width), short
    image = _resize(image, height, width, data)
    top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    return np.ascontiguousarray(image[top : top + resolution, left : left + resolution])


def random_resized_view(image: np.ndarray, data: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """A random part of the image, stretched to the resolution ("Inception crop", Szegedy et al. 2014).

    torchvision's algorithm: the area is drawn uniformly, the ratio log-uniformly; after ten draws that don't fit, the
    largest centred part of an allowed ratio is taken.

    Args:
      image: uint8 [h, w, 3].
      data: `crop_area`, `crop_ratio`, `resolution` and `interpolation` are read.
      rng: what the draws come from.

    Returns:
      uint8 [resolution, resolution, 3].
    """
    return _resized_crop(image, *draw_crop(image.shape[0], image.shape[1], data, rng), data)


def draw_crop(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws the (top, left, height, width) of a random-resized crop, in pixels."""
    low, high = data.crop_ratio
    for _ in range(10):
        area = height * width * rng.uniform(*data.crop_area)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = max(1, min(height, round(width / low)))
    w = max(1, min(width, round(height * high)))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized_crop(image: np.ndarray, top: int, left: int, height: int, width: int, data: DataConfig) -> np.ndarray:
    # Cropped first: Pillow's resize(box=...) would let pixels from just outside the crop bleed into its edges.
    return _resize(image[top : top + height, left : left + width], data.resolution, data.resolution, data)


def _resize(image: np.ndarray, height: int, width: int, data: DataConfig) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), _FILTERS[data.interpolation]))
