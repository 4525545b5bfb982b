"""Decodes image files to uint8 RGB, and makes the crops that are made on the host.

    split.read(i) ──► Picture: its size is known ──► a crop is drawn ──► only what the crop needs is decoded ──► resized

Everything is NumPy and Pillow on uint8 [h, w, 3], and random functions take their generator as an argument. Flips,
shifts and colour changes run on the device, in `ops`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import simplejpeg
from PIL import Image, features

from mnv2_jax.config import DataConfig
from mnv2_jax.data.sampling import sample
from mnv2_jax.errors import UserError

try:
    import cykooz_resizer as simd
except ImportError:  # it has no wheel for Linux on ARM
    simd = None

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_THINNEST = 100
"""Largest ratio of an image's sides."""
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes for grey values above 255: 16-bit PNG, TIFF and PPM."""
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of the frames with Huffman codes: baseline, extended, progressive."""
_JPEG_END = b"\xff\xd9"
_JPEG_SKIPPED = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
"""Markers of the segments that may come before the frame: tables, the restart interval, metadata, comments."""


_ENDINGS: Mapping[str, tuple[str, ...]] = {
    "": (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".tga", ".pcx", ".sgi", ".ras", ".qoi", ".dds", ".psd"),
        *(".ico", ".icns"),
    ),
    "webp": (".webp",),
    "avif": (".avif", ".avifs"),
    "jpg_2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
"""Extensions of image files, by the codec that Pillow may lack. Pillow's own list isn't used, since it has documents,
videos and measurements too; with a fixed list, a folder holds the same images on every machine."""
EXTENSIONS = tuple(ending for endings in _ENDINGS.values() for ending in endings)


def is_image(name: str) -> bool:
    """Whether a file has the extension of an image that can be read, in lower or upper case."""
    return name.lower().endswith(EXTENSIONS)


def check_readable(names: Iterable[str]) -> None:
    """Checks that the Pillow of this machine has the codecs that some image files need.

    Raises:
      UserError: naming the first file that it can't read.
    """
    lacking = {codec: endings for codec, endings in _ENDINGS.items() if codec and not features.check(codec)}
    for codec, endings in lacking.items():
        if (name := next((name for name in names if name.lower().endswith(endings)), None)) is not None:
            raise UserError(
                f"{name}: the Pillow of this machine was built without {codec}; install another build (pip install -U"
                " pillow), or convert such images"
            )


class DamagedImageError(UserError):
    """An image file was read, but its bytes can't be decoded."""


MOST_NAMED = 20
"""Damaged images that an error names at most."""


def damaged_images(lines: Sequence[str], total: str) -> DamagedImageError:
    """Returns an error that names several damaged images at once, 20 of them at most.

    Args:
      lines: the error of each damaged image, at least one.
      total: how many images there are in all, as "9 images of val".
    """
    # The advice behind the last semicolon of each line is given once, at the end.
    named = [line.rpartition("; ")[0] or line for line in lines]
    more = [f"and {len(named) - MOST_NAMED:,} more"] if len(named) > MOST_NAMED else []
    return DamagedImageError(
        f"{len(named):,} of the {total} can't be decoded: {'; '.join(named[:MOST_NAMED] + more)}; replace or remove"
        f" {'it' if len(named) == 1 else 'them'}"
    )


class EncodedImage:
    """An image file of any format that Pillow reads. Its header is read at once; pixels are decoded when needed.

    Transparency is dropped, the first frame of an animation is used, and 16-bit grey is scaled to 8 bits. The EXIF
    orientation is not applied, since no published accuracy was measured with it.

    `np.asarray` decodes the whole image to uint8 [h, w, 3], RGB.
    """

    def __init__(self, content: bytes, name: str) -> None:
        """Reads the header.

        Args:
          content: the bytes of the file.
          name: the name of the file in errors.

        Raises:
          DamagedImageError: naming the file, if it is empty, isn't an image, or is unreasonably large or thin.
        """
        self.content, self.name = content, name
        self._jpeg = _jpeg_frame(content)
        with naming_file(name):
            if not content:
                raise DamagedImageError("the file is empty; restore or remove it")
            height, width = self._jpeg.size if self._jpeg else Image.open(io.BytesIO(content)).size[::-1]
            if max(height, width) > _THINNEST * min(height, width):
                # Once its short side is resized, its long side would take gigabytes before it is cropped.
                raise DamagedImageError(f"{width}×{height} pixels is thinner than {_THINNEST}:1; crop or remove it")
            if height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow's limit, whichever part is decoded
                raise Image.DecompressionBombError
        self.shape = (height, width, 3)

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        del copy  # always a new array
        return np.asarray(self.crop(0, 0, *self.shape[:2]), dtype)

    def crop(self, top: int, left: int, height: int, width: int, enough: int | None = None) -> Image.Image:
        """Decodes a part of the image, given in pixels.

        The rows of a JPEG below the part are not decoded. This doesn't change the part's pixels, but damage in those
        rows goes unnoticed.

        Args:
          top: first row.
          left: first column.
          height: rows.
          width: columns.
          enough: if set, the part may come 2, 4 or 8 times smaller as long as no side gets shorter than this. A JPEG's
            blocks are then decoded at that size (Pillow's `draft`), and the part begins at the nearest pixel there.

        Returns:
          The part as an RGB image.

        Raises:
          DamagedImageError: naming the file, if it is cut off or damaged.
        """
        with naming_file(self.name):
            scale = 1
            if self._jpeg and enough:
                scale = max((s for s in (8, 4, 2) if min(height, width) >= s * enough), default=1)
            # Colour is smoothed over one further row, which must be kept for the pixels to be the same.
            image: Image.Image = Image.open(io.BytesIO(self._cut_below(top + height + 2 * scale)))
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
                height, width = round(height / scale), round(width / scale)
                top = min(round(top / scale), image.height - height)
                left = min(round(left / scale), image.width - width)
            image.load()
            if (top, left, height, width) != (0, 0, image.height, image.width):
                image = image.crop((left, top, left + width, top + height))
            return rgb(image)

    def part(self, top: int, left: int, height: int, width: int, enough: int | None = None) -> np.ndarray:
        """Decodes a part as `crop` does, to uint8 [h, w, 3]; most JPEGs avoid the detour through Pillow's memory.

        The pixels are the same, since both ways use libjpeg-turbo.
        """
        needs_all = enough is None or min(height, width) < 2 * enough
        if self._jpeg and needs_all and self._jpeg.is_plain and self.content.endswith(_JPEG_END):
            with contextlib.suppress(ValueError):  # Pillow then tells what is wrong, or decodes it after all
                # Strict decoding would warn of the rows that were cut off.
                image = simplejpeg.decode_jpeg(self._cut_below(top + height + 2), "RGB", strict=False)
                return image[top : top + height, left : left + width]
        return np.asarray(self.crop(top, left, height, width, enough))

    def _cut_below(self, row: int) -> bytes | bytearray:
        """Returns the file without the rows from a given one on, where its format allows that."""
        if not self._jpeg or row >= self._jpeg.size[0]:
            return self.content
        # With a smaller height in the header, decoders take the last rows for unread bytes before the end marker.
        content, place = bytearray(self.content), self._jpeg.place
        content[place : place + 2] = row.to_bytes(2, "big")
        return content


Picture: TypeAlias = np.ndarray | EncodedImage
"""uint8 [h, w, 3], RGB, or an object of this shape that `np.asarray` turns into it."""


def decode(content: bytes, name: str) -> np.ndarray:
    """Decodes a whole image file; see `EncodedImage`.

    Args:
      content: the bytes of the file.
      name: the name of the file in errors.

    Returns:
      uint8 [h, w, 3], RGB.

    Raises:
      DamagedImageError: naming the file, if it is empty, cut off, isn't an image, or is unreasonably large.
    """
    return np.asarray(EncodedImage(content, name))


class _Frame(NamedTuple):
    """The frame header of a JPEG (ITU-T T.81, B.2.2)."""

    place: int
    """Offset of the height in the file."""
    size: tuple[int, int]
    """Height and width."""
    is_plain: bool
    """Whether it has one or three components: grey or colour, not CMYK."""


def _jpeg_frame(content: bytes) -> _Frame | None:
    """Reads the frame header of a JPEG; None for other formats and for kinds of JPEG that aren't handled here."""
    if content[:2] != b"\xff\xd8":
        return None
    place = 2
    while content[place : place + 1] == b"\xff" and place + 9 <= len(content):
        marker = content[place + 1]
        if marker in _JPEG_FRAMES:
            height, width = (int.from_bytes(content[place + at : place + at + 2], "big") for at in (5, 7))
            is_plain = content[place + 9 : place + 10] in (b"\x01", b"\x03")
            return _Frame(place + 5, (height, width), is_plain) if height and width else None
        if marker == 0xFF:  # padding
            place += 1
        elif marker in _JPEG_SKIPPED:
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        else:
            return None
    return None


@contextlib.contextmanager
def naming_file(name: str) -> Iterator[None]:
    """Turns any error that Pillow raises into one line that names the file, a `DamagedImageError` in most cases."""
    try:
        # Pillow warns of damaged metadata and of large sizes below its limit; neither affects the pixels.
        with warnings.catch_warnings(action="ignore"):
            yield
    except DamagedImageError as error:
        raise DamagedImageError(f"{name}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise DamagedImageError(f"{name}: not an image in a supported format; replace or remove it") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DamagedImageError(f"{name}: its header claims more than {limit:,} pixels; shrink or remove it") from error
    except MemoryError as error:  # the image isn't damaged, and must not be skipped
        raise UserError(f"{name}: not enough memory to decode it; lower data.num_workers or data.batch_size") from error
    except Exception as error:  # damage makes Pillow's readers raise many kinds of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedImageError(f"{name}: can't be decoded ({reason}); replace or remove it") from error


def rgb(image: Image.Image) -> Image.Image:
    """Converts a Pillow image of any mode to 8-bit RGB; transparency is dropped.

    Raises:
      DamagedImageError: for floating-point values, whose range is unknown.
    """
    if image.mode in _DEEP_GREY:
        # 257 = 65535 / 255. Pillow's own conversion clips at 255, which would turn nearly everything white.
        deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise DamagedImageError("a floating-point image, whose range of values is unknown; save it with 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


# --- the evaluation view ------------------------------------------------------------------------------------


def evaluation_view(image: Picture, data: DataConfig, resolution: int | None = None) -> np.ndarray:
    """Makes the deterministic view of an image, for evaluation and for training without a random-resized crop.

    Args:
      image: uint8 [h, w, 3].
      data: `eval_crop`, `eval_crop_fraction`, `interpolation` and `antialias` are read.
      resolution: height and width of the view; None: the resolution of evaluation.

    Returns:
      uint8 [resolution, resolution, 3].
    """
    height, width = image.shape[:2]
    resolution, fraction = resolution or data.seen_resolution, data.eval_crop_fraction
    if data.eval_crop == "central":
        # TF-slim's rounding: the margins are rounded down to whole pixels, and the crop is the remainder.
        top, left = int((height - height * fraction) / 2), int((width - width * fraction) / 2)
        part = _part(image, top, left, height - 2 * top, width - 2 * left)
        return _resized(part, resolution, resolution, data)
    # torchvision's Resize and CenterCrop: the long side is rounded down, the centre half to even.
    short = round(resolution / fraction)
    whole = _part(image, 0, 0, height, width)
    if height <= width:
        height, width = short, int(short * width / height)
    else:
        height, width = int(short * height / width), short
    top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    return _resized(whole, height, width, data)[top : top + resolution, left : left + resolution]


# --- the random-resized crop --------------------------------------------------------------------------------


def random_resized_view(image: Picture, data: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Stretches a random part of the image to the resolution ("Inception crop", Szegedy et al. 2014).

    Args:
      image: uint8 [h, w, 3].
      data: `crop_draw`, `crop_area`, `crop_ratio`, `resolution`, `interpolation` and `antialias` are read.
      rng: the generator for all draws.

    Returns:
      uint8 [resolution, resolution, 3].
    """
    top, left, height, width = draw_crop(image.shape[0], image.shape[1], data, rng)
    if isinstance(image, EncodedImage):
        # Decoding at a smaller size also antialiases, so it must not happen without `antialias`.
        enough = data.resolution if data.antialias else None
        return resized(image.part(top, left, height, width, enough), data.resolution, data.resolution, data)
    return resized(image[top : top + height, left : left + width], data.resolution, data.resolution, data)


def draw_crop(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws the (top, left, height, width) of a random-resized crop, in pixels.

    `data.crop_draw` selects the rule.

    torchvision: the area is uniform and the ratio log-uniform. After ten draws that don't fit, the crop is the largest
    centred part with an allowed ratio.

    tensorflow and model_garden: as TensorFlow's `sample_distorted_bounding_box` (sample_distorted_bounding_box_op.cc),
    with the whole image as its box; the ratio is uniform, and so is the height among those that ratio and area allow.
    TF-slim (tensorflow) requires that a crop covers at least 0.1 of the image, and takes the whole image after 100
    attempts. The TF model garden (model_garden) requires only what `crop_area` does and makes 10 attempts; where they
    give the whole image, it takes the centre, 0.875 of the short side.
    """
    return _DRAWS[data.crop_draw](height, width, data, rng)


def _draw_torchvision(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
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


def _draw_tensorflow(
    height: int, width: int, data: DataConfig, rng: np.random.Generator, covered: float = 0.1, attempts: int = 100
) -> tuple[int, int, int, int]:
    smallest, largest = (share * height * width for share in data.crop_area)
    for _ in range(attempts):
        ratio = rng.uniform(*data.crop_ratio)
        tallest = round(math.sqrt(largest / ratio))
        if round(tallest * ratio) > width:
            tallest = int((width + 0.5 - 1e-7) / ratio)
        tallest = min(tallest, height)
        shortest = min(round(math.sqrt(smallest / ratio)), tallest)
        h = int(rng.integers(shortest, tallest + 1))
        # Rounding may have led out of the range of areas by one row.
        if h * round(h * ratio) < smallest:
            h += 1
        if h * round(h * ratio) > largest:
            h -= 1
        w = round(h * ratio)
        if 0 < h <= height and 0 < w <= width and max(smallest, covered * height * width) <= h * w <= largest:
            # As in the original, a smaller crop never reaches the last row or column.
            return int(rng.integers(max(height - h, 1))), int(rng.integers(max(width - w, 1))), h, w
    return 0, 0, height, width


def _draw_model_garden(
    height: int, width: int, data: DataConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    # official/vision/ops/preprocess_ops.py and dataloaders/classification_input.py
    drawn = _draw_tensorflow(height, width, data, rng, covered=0.0, attempts=10)
    if drawn[2:] != (height, width):
        return drawn
    side = 0.875 * min(height, width)
    return int((height - side) / 2), int((width - side) / 2), max(int(side), 1), max(int(side), 1)


_DRAWS: Mapping[str, Callable[..., tuple[int, int, int, int]]] = {
    "torchvision": _draw_torchvision,
    "tensorflow": _draw_tensorflow,
    "model_garden": _draw_model_garden,
}


# --- parts and sizes ----------------------------------------------------------------------------------------


def _part(image: Picture, top: int, left: int, height: int, width: int) -> Image.Image:
    # The image is cropped first, as Pillow's resize(box=...) lets pixels just outside the crop bleed into its edges.
    if isinstance(image, EncodedImage):
        return image.crop(top, left, height, width)
    return Image.fromarray(image[top : top + height, left : left + width])


def resizer(data: DataConfig) -> str:
    """Returns the name of the library that resizes the random-resized crop."""
    if not data.antialias:
        return "NumPy"
    return "Pillow" if simd is None or data.interpolation != "bilinear" else "cykooz_resizer"


def resized(pixels: np.ndarray, height: int, width: int, data: DataConfig) -> np.ndarray:
    """Resizes uint8 [h, w, 3]; where `simd` is installed, 2.5 times as fast as Pillow and within one level of it.

    Only training crops use `simd`, and dense tasks. Evaluation of a classification gives Pillow's exact pixels, and so
    does bicubic interpolation, in which the two libraries differ by more than a level.
    """
    if not data.antialias:
        return sample(pixels, height, width, data.interpolation)
    if resizer(data) == "Pillow" or pixels.shape[:2] == (height, width):
        return _resized(Image.fromarray(pixels), height, width, data)
    source = simd.ImageData(*pixels.shape[1::-1], simd.PixelType.U8x3, pixels.tobytes())
    target = simd.ImageData(width, height, simd.PixelType.U8x3)
    resize, options = _simd_bilinear()
    resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(height, width, 3)


@functools.cache
def _simd_bilinear() -> tuple[Callable[..., None], simd.ResizeOptions]:
    """Returns the resizer of this process, which keeps its buffers."""
    return simd.Resizer().resize, simd.ResizeOptions(simd.ResizeAlg.convolution(simd.FilterType.bilinear))


def _resized(image: Image.Image, height: int, width: int, data: DataConfig) -> np.ndarray:
    if not data.antialias:
        return sample(np.asarray(image), height, width, data.interpolation)
    return np.asarray(image.resize((width, height), _FILTERS[data.interpolation]))
