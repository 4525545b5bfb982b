"""Masks: what their values mean, whatever form they have, and a line for each mask that can't be used."""

import pickle

import numpy as np
import pytest
from PIL import Image

from mnv2_jax.data.images import DamagedImageError, EncodedImage
from mnv2_jax.data.masks import EncodedMask, meaning_of, value_table
from mnv2_jax.errors import UserError
from tests.data.masked import grey_png, mask, palette, write

NAMES = ("sky", "road", "car")
COLOURS = ((70, 130, 180), (128, 64, 128), (0, 0, 142))


def read(path, mask_values="index", names=NAMES, ignored=(), colours=COLOURS):
    return EncodedMask(EncodedImage(path.read_bytes(), str(path)), meaning_of(mask_values, names, ignored, colours))


def refused(path, says, **fields):
    with pytest.raises(UserError, match=says) as caught:
        np.asarray(read(path, **fields))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return caught.value


# --- values and classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask_values", "count", "ignored", "expected"),
    [
        ("index", 3, (), {0: 0, 1: 1, 2: 2, 255: 255}),
        ("index", 4, (1,), {0: 0, 1: 255, 2: 1, 3: 2, 255: 255}),
        ("index", 4, (0, 3), {0: 255, 1: 0, 2: 1, 3: 255, 255: 255}),
        ("binary", 2, (), {0: 0, 255: 1}),
        ("one_based", 3, (), {0: 255, 1: 0, 2: 1, 3: 2, 255: 255}),
        ("one_based", 3, (0,), {0: 255, 1: 255, 2: 0, 3: 1, 255: 255}),
    ],
)
def test_table(mask_values, count, ignored, expected):
    table = value_table(mask_values, count, ignored)
    assert (table.classes.dtype, table.is_known.dtype) == (np.uint8, bool)
    assert dict(zip(*np.stack([np.arange(256), table.classes])[:, table.is_known].tolist(), strict=True)) == expected
    assert (table.classes[~table.is_known] == 255).all()


def test_the_largest_number_of_classes_keeps_them_apart():
    for mask_values in ("index", "one_based"):
        table = value_table(mask_values, 254)
        kept = table.classes[table.is_known]
        assert sorted(kept[kept < 255].tolist()) == list(range(254))


def test_every_form_of_the_same_mask_reads_the_same(tmp_path):
    values = mask(0, 1, 2, 1)
    deep = Image.fromarray(values.astype(np.uint16))
    alpha = Image.merge("LA", (Image.fromarray(values), Image.new("L", values.shape[::-1], 7)))
    files = [
        write(tmp_path / "grey.png", values),
        write(tmp_path / "deep.png", deep),
        write(tmp_path / "palette.png", palette(values, COLOURS)),
        write(tmp_path / "alpha.png", alpha),
        write(tmp_path / "three.png", np.repeat(values[..., None], 3, -1)),
        write(tmp_path / "grey.tif", values),
        write(tmp_path / "grey.bmp", values),
        write(tmp_path / "palette.gif", palette(values, COLOURS)),
        grey_png(tmp_path / "two.png", values, 2),
        grey_png(tmp_path / "four.png", values, 4),
    ]
    for file in files:
        found = read(file)
        assert found.shape == values.shape
        classes = np.asarray(pickle.loads(pickle.dumps(found)))
        assert classes.dtype == np.uint8
        np.testing.assert_array_equal(classes, values, err_msg=file.name)
        np.testing.assert_array_equal(np.asarray(read(file, ignored=(1,))), np.array([0, 255, 1])[values])


def test_binary_masks_of_one_bit_and_of_eight(tmp_path):
    values = mask(0, 255)
    two = dict(mask_values="binary", names=("ground", "crack"))
    bit, whole = (write(tmp_path / f"{mode}.png", Image.fromarray(values).convert(mode)) for mode in ("1", "L"))
    for file in (bit, whole, grey_png(tmp_path / "two.png", values // 85, 2)):
        np.testing.assert_array_equal(np.asarray(read(file, **two)), values // 255)
    np.testing.assert_array_equal(np.asarray(read(bit, names=two["names"])), values // 255)
    assert "mask_values=index" in str(refused(write(tmp_path / "x.png", mask(0, 1)), "the value 1,", **two))
    assert "smoothed" in str(refused(write(tmp_path / "y.png", mask(0, 255, 127)), "the value 127,", **two))


def test_colours(tmp_path):
    indices = mask(0, 1, 2, 1)
    rgb = np.array(COLOURS, np.uint8)[indices]
    alpha = np.concatenate([rgb, np.full_like(rgb[..., :1], 9)], -1)
    for name, made in (("rgb", rgb), ("palette", palette(indices, COLOURS)), ("alpha", alpha)):
        file = write(tmp_path / f"{name}.png", made)
        np.testing.assert_array_equal(np.asarray(read(file, "palette")), indices)
        np.testing.assert_array_equal(np.asarray(read(file, "palette", ignored=(0,))), np.array([255, 0, 1])[indices])
    rgb[0, :3] = 1, 2, 3
    error = refused(
        write(tmp_path / "other.png", rgb), r"3 pixels have the colour \(1, 2, 3\), ", mask_values="palette"
    )
    assert "classes.txt" in str(error)
    assert "mask_values=palette" in str(refused(tmp_path / "rgb.png", "a mask in colour"))


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "mask_values", "says", "advice"),
    [
        ((0, 1, 3), "index", "16 pixels have the value 3, which none of the 3", "data.mask_values=one_based"),
        ((0, 9, 9), "index", "32 pixels have the value 9,", "add the missing classes"),
        ((3, 4, 5, 6, 7, 8, 9, 10), "index", "the values 3, 4, 5, 6, 7 …,", "add the missing classes"),
        ((0, 1, 4), "one_based", "the value 4,", "add the missing classes"),
    ],
)
def test_a_value_of_no_class_is_named_with_its_pixels(tmp_path, values, mask_values, says, advice):
    error = refused(write(tmp_path / "m.png", mask(*values)), says, mask_values=mask_values)
    assert advice in str(error)
    assert not isinstance(error, DamagedImageError)  # which skip_corrupt would skip


def test_values_beyond_a_byte_are_refused_and_not_cut_off(tmp_path):
    file = write(tmp_path / "deep.png", Image.fromarray(np.full((4, 5), 256 + 1, np.uint16)))
    refused(file, "20 pixels have the value 257,")


def test_jpeg_and_lossy_webp_are_refused_and_lossless_webp_is_not(tmp_path):
    flat = Image.fromarray(np.repeat(mask(1)[..., None], 3, -1))
    for name in ("m.jpg", "m.webp"):
        error = refused(write(tmp_path / name, flat), "changes the values of pixels; make it again as a PNG")
        assert not isinstance(error, DamagedImageError)
    flat.save(tmp_path / "same.webp", lossless=True)
    assert (np.asarray(read(tmp_path / "same.webp")) == 1).all()


def test_damage_is_named(tmp_path):
    whole = write(tmp_path / "m.png", np.random.default_rng(0).integers(0, 3, (40, 40), dtype=np.uint8)).read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (tmp_path / "m.png").write_bytes(content)
        assert isinstance(refused(tmp_path / "m.png", "."), DamagedImageError)
    floats = write(tmp_path / "m.tif", np.ones((4, 4), np.float32))
    assert isinstance(refused(floats, "floating-point"), DamagedImageError)
