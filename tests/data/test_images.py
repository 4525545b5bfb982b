"""Decoding of every mode and kind of damage; the crops against torchvision's rules, written again here."""

import dataclasses
import io
import math
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mnv2_jax.config import DataConfig
from mnv2_jax.data import images
from mnv2_jax.data.images import (
    DamagedImageError,
    EncodedImage,
    decode,
    draw_crop,
    evaluation_view,
    random_resized_view,
)
from mnv2_jax.data.sampling import sample
from mnv2_jax.errors import UserError
from tests.data.conftest import smooth_image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(height: int, width: int) -> np.ndarray:
    """An image whose pixels say where they are: red is the row, green the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


# --- decoding -----------------------------------------------------------------------------------------------


def test_rgb_survives_a_lossless_format():
    image = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    decoded = decode(encode(Image.fromarray(image)), "x.png")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA", "RGB"])
def test_png_of_any_mode_becomes_rgb(mode):
    source = Image.fromarray(ramp(6, 8)).convert(mode)
    decoded = decode(encode(source), "x.png")
    np.testing.assert_array_equal(decoded, np.asarray(source.convert("RGB")))
    assert decoded.shape == (6, 8, 3)


def test_palette_with_transparency_gives_no_warning():
    source = Image.fromarray(ramp(6, 8)).convert("P")
    decoded = decode(encode(source, transparency=bytes(range(200))), "x.png")
    np.testing.assert_array_equal(decoded, np.asarray(source.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb():
    cmyk = Image.fromarray(ramp(16, 16)).convert("CMYK")
    decoded = decode(encode(cmyk, "JPEG", quality=100, subsampling=0), "x.jpg")
    assert np.abs(decoded.astype(int) - ramp(16, 16)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    deep = np.array([[0, 128, 257, 32768, 65278, 65535]], np.uint16)
    decoded = decode(encode(Image.fromarray(deep), kind), "x")
    assert decoded.shape == (1, 6, 3)
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 1, 128, 254, 255])
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


def test_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200)]
    decoded = decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x.gif")
    assert np.abs(decoded.astype(int) - 10).max() < 4


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG = encode(Image.fromarray(ramp(64, 64)), "JPEG")
PNG = encode(Image.fromarray(ramp(64, 64)))
DAMAGED = {
    "empty": (b"", "empty"),
    "cut JPEG": (JPEG[: len(JPEG) // 2], "decoded"),
    "cut PNG": (PNG[:-40], "decoded"),
    "flipped PNG": (PNG[:50] + bytes([PNG[50] ^ 255]) + PNG[51:], "decoded"),
    "text": (b"<html>404 not found</html>", "not an image"),
    "bomb": (png_header(30_000, 30_000), "178,956,970 pixels"),
    "large but empty": (png_header(10_000, 10_000), "decoded"),
    "float": (encode(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"), "8 bits"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_one_line_that_names_the_file_and_the_mend(damage):
    content, says = DAMAGED[damage]
    with pytest.raises(UserError, match=says) as caught:
        decode(content, "some/file.jpg")
    message = str(caught.value)
    assert message.startswith("some/file.jpg: ")
    assert "\n" not in message
    assert any(mend in message for mend in ("remove it", "save it"))


# --- the evaluation view ------------------------------------------------------------------------------------

SIZES = [(500, 375), (375, 500), (333, 500), (224, 224), (1, 1), (31, 97), (500, 1), (256, 256)]


@pytest.mark.parametrize("height_width", SIZES)
@pytest.mark.parametrize(("resolution", "fraction"), [(224, 0.875), (96, 0.875), (32, 1.0), (127, 0.9)])
def test_resize_crop_is_torchvisions(height_width, resolution, fraction):
    height, width = height_width
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    # Resize(size) on the short side, then CenterCrop(resolution), as their documentation and code state them.
    size = round(resolution / fraction)
    new_w, new_h = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    resized = Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BILINEAR)
    left, top = round((new_w - resolution) / 2.0), round((new_h - resolution) / 2.0)
    expected = np.asarray(resized.crop((left, top, left + resolution, top + resolution)))
    data = DataConfig(resolution=resolution, eval_crop_fraction=fraction)
    np.testing.assert_array_equal(evaluation_view(image, data), expected)


def test_central_crop_is_tf_slims():
    data = DataConfig(resolution=16, eval_crop="central", eval_crop_fraction=0.875)
    # tf.image.central_crop(0.875) of 100 × 61: offsets int(6.25) and int(3.8125), size 88 × 55.
    image = ramp(100, 61)
    expected = Image.fromarray(image[6:94, 3:58]).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(evaluation_view(image, data), np.asarray(expected))


@pytest.mark.parametrize("eval_crop", ["resize_crop", "central"])
def test_an_image_of_the_right_size_is_left_alone(eval_crop):
    image = ramp(32, 32)
    data = DataConfig(resolution=32, eval_crop=eval_crop, eval_crop_fraction=1.0)
    np.testing.assert_array_equal(evaluation_view(image, data), image)


def test_turned_images_have_turned_views():
    data = DataConfig(resolution=20, eval_crop_fraction=0.8)  # 25 px: the margin of 2.5 is rounded to even
    image = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    view = evaluation_view(image, data)
    turned = evaluation_view(np.ascontiguousarray(image.swapaxes(0, 1)), data).swapaxes(0, 1)
    assert np.abs(view.astype(int) - turned).max() <= 1  # Pillow rounds between its two passes


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_without_antialiasing_views_are_crops_that_are_sampled(interpolation):
    data = DataConfig(resolution=40, antialias=False, interpolation=interpolation)
    central = dataclasses.replace(data, eval_crop="central")
    content = encode(photo(400, 520), "JPEG", quality=95)  # with antialiasing it would be decoded smaller for a crop
    whole = decode(content, "x")
    top, left, height, width = draw_crop(400, 520, data, np.random.default_rng(3))
    assert min(height, width) > 2 * data.resolution
    crop = sample(whole[top : top + height, left : left + width], 40, 40, interpolation)
    for image in (whole, EncodedImage(content, "x")):
        # A short side of 46 px, and 3 or 9 px beside the 40.
        expected = sample(whole, 46, 59, interpolation)[3:43, 10:50]
        np.testing.assert_array_equal(evaluation_view(image, data), expected)
        np.testing.assert_array_equal(
            evaluation_view(image, central), sample(whole[25:-25, 32:-32], 40, 40, interpolation)
        )
        np.testing.assert_array_equal(random_resized_view(image, data, np.random.default_rng(3)), crop)
    assert (evaluation_view(whole, DataConfig(resolution=40, interpolation=interpolation)) != expected).any()
    assert images.resizer(data) == "NumPy"


def test_interpolation_is_read():
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    views = [evaluation_view(image, DataConfig(resolution=32, interpolation=kind)) for kind in ("bilinear", "bicubic")]
    assert (views[0] != views[1]).any()


# --- the random-resized crop --------------------------------------------------------------------------------


def test_crops_lie_within_the_image_and_their_area_and_ratio_in_range():
    data = DataConfig(crop_area=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3))
    rng = np.random.default_rng(0)
    top, left, height, width = np.array([draw_crop(375, 500, data, rng) for _ in range(4000)]).T
    for first, size, whole in ((top, height, 375), (left, width, 500)):
        part = size < whole
        assert first.min() == 0
        assert (first + size).max() == whole
        assert (first[part] == 0).any()
        assert ((first + size)[part] == whole).any()
    areas, ratios = height * width / (375 * 500), width / height
    assert 0.079 < areas.min() < 0.1
    assert areas.max() > 0.95
    assert 0.74 < ratios.min() < 0.76
    assert 1.32 < ratios.max() < 1.35


def test_distribution_is_torchvisions():
    """Its loop written out again, on the same size: means of area and log-ratio agree within sampling error."""

    def reference(height, width, rng):
        for _ in range(10):
            target = height * width * rng.uniform(0.08, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
        raise AssertionError("not reached often enough to matter")

    def means(draw):
        rng = np.random.default_rng(1)
        crops = np.array([draw(300, 300, rng) for _ in range(4000)], float)
        top, left, h, w = crops.T
        return np.array([(h * w).mean() / 90000, np.log(w / h).mean(), top.mean() / 300, left.mean() / 300])

    ours = means(lambda h, w, rng: draw_crop(h, w, DataConfig(), rng))
    np.testing.assert_allclose(ours, means(reference), atol=0.02)


@pytest.mark.parametrize(
    ("size", "expected"),
    # No draw fits an extreme strip, so the largest centred part of an allowed ratio is taken.
    [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13)), ((1, 1), (0, 0, 1, 1))],
)
def test_fallback_is_the_centre(size, expected):
    data = DataConfig(crop_area=(0.9, 1.0))
    assert draw_crop(*size, data, np.random.default_rng(0)) == expected


def test_pixels_outside_the_crop_do_not_bleed_in():
    data = DataConfig(resolution=8, crop_area=(0.2, 0.3))
    image = np.zeros((64, 64, 3), np.uint8)
    top, left, height, width = draw_crop(64, 64, data, np.random.default_rng(3))
    image[top : top + height, left : left + width] = 200
    np.testing.assert_array_equal(random_resized_view(image, data, np.random.default_rng(3)), np.full((8, 8, 3), 200))


def test_the_generator_decides_everything():
    data = DataConfig(resolution=24)
    image = ramp(60, 80)
    views = [random_resized_view(image, data, np.random.default_rng(seed)) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0] != views[2]).any()
    assert views[0].shape == (24, 24, 3)
    assert views[0].dtype == np.uint8


# --- decoding only what a crop needs ------------------------------------------------------------------------


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(smooth_image(np.random.default_rng(0), height, width))


FILES = {
    f"{mode} {subsampling} {'progressive' if progressive else 'baseline'}": encode(
        photo(83, 117).convert(mode), "JPEG", subsampling=subsampling, progressive=progressive
    )
    for mode in ("RGB", "L", "CMYK")
    for subsampling in ("4:4:4", "4:2:2", "4:2:0")
    for progressive in (False, True)
} | {
    "restart markers": encode(photo(83, 117), "JPEG", restart_marker_blocks=3),
    "PNG": encode(photo(83, 117)),
    "palette": encode(photo(83, 117).convert("P"), "GIF"),
    "16 bit": encode(Image.fromarray(np.arange(83 * 117, dtype=np.uint16).reshape(83, 117) * 6)),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_part_decodes_to_the_pixels_that_the_whole_has_there(kind):
    whole = decode(FILES[kind], "x")
    image = EncodedImage(FILES[kind], "x")
    assert image.shape == whole.shape == (83, 117, 3)
    for height in range(1, 84):  # every distance from the end of a block
        top, left, width = (83 - height) // 3, height % 50, 60
        part = np.asarray(image.crop(top, left, height, width))
        np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


def test_what_lies_below_a_crop_is_not_decoded():
    content = encode(photo(640, 640), "JPEG", quality=95)
    image = EncodedImage(content, "x")

    def seconds(height):
        begun = time.process_time()
        for _ in range(10):
            image.crop(0, 0, height, 640)
        return time.process_time() - begun

    assert min(seconds(64) for _ in range(3)) < 0.6 * min(seconds(640) for _ in range(3))  # a quarter


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_large_crop_is_decoded_smaller(scale):
    content = encode(photo(400, 520), "JPEG", quality=95)
    image = EncodedImage(content, "x")
    enough = 300 // scale
    part = image.crop(100, 220, 300, 300, enough=enough)
    assert min(part.size) == round(300 / scale) >= enough
    expected = image.crop(100, 220, 300, 300).resize(part.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(part, float) - np.asarray(expected)).mean() < 6  # of 256, with edges at a pixel's distance
    assert image.crop(100, 220, 300, 300, enough=300 // scale + 1).size > part.size
    assert EncodedImage(encode(photo(400, 520)), "x").crop(100, 220, 300, 300, enough=enough).size == (300, 300)


@pytest.mark.parametrize("crop_draw", ["torchvision", "tensorflow"])
def test_a_training_view_below_twice_the_resolution_is_that_of_the_decoded_image(crop_draw):
    content = encode(photo(83, 117), "JPEG")
    data = DataConfig(resolution=60, crop_draw=crop_draw)
    for seed in range(20):
        views = [
            random_resized_view(image, data, np.random.default_rng(seed))
            for image in (EncodedImage(content, "x"), decode(content, "x"))
        ]
        np.testing.assert_array_equal(views[0], views[1])


def test_the_training_view_is_pillows_within_a_level(monkeypatch):
    pictures = [smooth_image(np.random.default_rng(i), 50 + 9 * i, 140 - 11 * i) for i in range(10)]
    for size in (16, 57, 96):
        data = DataConfig(resolution=size)
        views = [random_resized_view(picture, data, np.random.default_rng(1)) for picture in pictures]
        with monkeypatch.context() as patch:
            patch.setattr(images, "simd", None)
            assert images.resizer(data) == "Pillow"
            expected = [random_resized_view(picture, data, np.random.default_rng(1)) for picture in pictures]
        for view, other in zip(views, expected, strict=True):
            assert np.abs(view.astype(int) - other).max() <= 1


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_within_a_crop_is_the_same_line(damage):
    content, says = DAMAGED[damage]

    def crop():
        image = EncodedImage(content, "some/file.jpg")
        image.crop(image.shape[0] // 2, 0, image.shape[0] // 2, 3)

    with pytest.raises(DamagedImageError, match=says):
        crop()


def test_too_little_memory_is_no_damage(monkeypatch):
    """A damaged image could be skipped, with data.skip_corrupt."""

    def load(image):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(UserError, match=r"x\.png: .*data\.num_workers") as error:
        decode(encode(photo(30, 30)), "x.png")
    assert not isinstance(error.value, DamagedImageError)


def test_a_jpeg_that_ends_too_early_serves_crops_above_its_end():
    content = encode(photo(300, 300), "JPEG", quality=95)
    cut = EncodedImage(content[: len(content) * 9 // 10], "x")
    np.testing.assert_array_equal(cut.crop(0, 0, 50, 50), EncodedImage(content, "x").crop(0, 0, 50, 50))
    for part in ((200, 0, 100, 50), (0, 0, 300, 300)):
        with pytest.raises(DamagedImageError, match="decoded"):
            cut.crop(*part)


def test_headers_are_read_over_padding_comments_and_thumbnails():
    exif = Image.Exif()
    exif[0x010E] = "a" * 300
    content = encode(photo(40, 70), "JPEG", exif=exif, comment=b"\xff\xc0 not a frame")
    padded = content[:2] + b"\xff\xff" + content[2:]
    for variant in (content, padded):
        np.testing.assert_array_equal(decode(variant, "x"), decode(encode(photo(40, 70), "JPEG"), "x"))


# --- TensorFlow's draw --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop_draw", "smallest"), [("tensorflow", 0.1), ("model_garden", 0.05)])
def test_tensorflows_crops_lie_within_the_image_and_their_area_and_ratio_in_range(crop_draw, smallest):
    data = DataConfig(crop_draw=crop_draw, crop_area=(0.05, 1.0), crop_ratio=(3 / 4, 4 / 3))
    rng = np.random.default_rng(0)
    crops = np.array([draw_crop(375, 500, data, rng) for _ in range(4000)])
    top, left, h, w = crops.T
    for first, size, whole in ((top, h, 375), (left, w, 500)):
        part = size < whole
        assert first.min() == 0
        assert (first + size)[part].max() == whole - 1  # as in the original
        assert (first[~part] == 0).all()
    area = h * w / (375 * 500)
    assert smallest <= area.min() < smallest + 0.005  # slim's covers a tenth of the image, whatever the area allows
    assert area.max() > 0.9
    assert 0.73 < (w / h).min() < (w / h).max() < 1.35
    # At a given ratio the height, not the area, is uniform: small crops are rarer than torchvision's.
    assert np.median(area) < np.median(
        [np.prod(draw_crop(375, 500, DataConfig(crop_area=(0.1, 1.0)), rng)[2:]) / (375 * 500) for _ in range(4000)]
    )


def test_tensorflows_fallback_is_the_whole_image():
    data = DataConfig(crop_draw="tensorflow", crop_area=(0.9, 1.0))
    assert draw_crop(1000, 10, data, np.random.default_rng(0)) == (0, 0, 1000, 10)
    assert draw_crop(1, 1, data, np.random.default_rng(0)) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 10), (495, 0, 8, 8)), ((10, 1001), (0, 496, 8, 8)), ((1, 1), (0, 0, 1, 1))]
)
def test_the_model_gardens_fallback_is_the_centre(size, expected):
    data = DataConfig(crop_draw="model_garden", crop_area=(0.9, 1.0))
    assert draw_crop(*size, data, np.random.default_rng(0)) == expected


# --- evaluation at a resolution of its own ------------------------------------------------------------------


@pytest.mark.parametrize("eval_crop", ["resize_crop", "central"])
def test_eval_resolution(eval_crop):
    image = smooth_image(np.random.default_rng(0), 60, 80)
    data = DataConfig(resolution=32, eval_resolution=40, eval_crop=eval_crop)
    plain = DataConfig(resolution=40, eval_crop=eval_crop)
    np.testing.assert_array_equal(evaluation_view(image, data), evaluation_view(image, plain))
    assert evaluation_view(image, data, data.resolution).shape == (32, 32, 3)
    assert random_resized_view(image, data, np.random.default_rng(0)).shape == (32, 32, 3)
