"""Batches of several resolutions: their sizes, their split over devices, and restarts, which change nothing."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from mnv2_jax import config as configs
from mnv2_jax.bench.synthetic import abstract_batch, without_data
from mnv2_jax.config import Config, DataConfig, NormConfig, OptimConfig
from mnv2_jax.config.checks import batch_shapes, check, check_devices, spanning_groups
from mnv2_jax.errors import UserError
from mnv2_jax.training import mesh as meshes
from mnv2_jax.training.experiment import open_experiment
from mnv2_jax.training.feeds import train_batches
from tests import docs

ROOT = pathlib.Path(__file__).parents[2]
W0_25 = str(ROOT / "configs" / "w0_25.py")
SHRUNK = (
    "data.scales=(8, 16)",
    "data.resolution=16",
    "data.batch_size=32",
    "data.crop=random_resized",
    "norm.group_size=8",
    "model.strides=(2, 1, 2, 2, 1)",
    "model.depth=0.1",  # one block a stage
    "train.steps=6",
)
CORENET = (128, 192, 224, 288, 320)


def sized(batch_size, group_size=32, scales=CORENET, accumulate_steps=1):
    return Config(
        data=DataConfig(batch_size=batch_size, scales=scales),
        norm=NormConfig(group_size=group_size),
        optim=OptimConfig(accumulate_steps=accumulate_steps),
    )


def experiment(*overrides, devices=1):
    config = configs.load(f"{W0_25}:data=digits", [*SHRUNK, *overrides]).config
    return open_experiment(config, jax.devices()[:devices])


# --- sizes --------------------------------------------------------------------------------------------------


def test_sizes_of_corenets_recipes():
    # CoreNet's own, on four GPUs: 3136, 1392, 1024, 616 and 500 (image_batch_pairs of 256 images of 224 px).
    shapes = ((128, 3072), (192, 1408), (224, 1024), (288, 640), (320, 512))
    for group in (8, 16, 32):
        assert batch_shapes(sized(1024, group)) == shapes
        assert batch_shapes(sized(1024, group, accumulate_steps=2)) == shapes
        assert batch_shapes(sized(2048, group)) == tuple((scale, 2 * images) for scale, images in shapes)
    for devices in (1, 2, 4, 8, 16):
        for group in (8, 16, 32):
            check_devices(sized(1024, group), devices)


def test_without_scales_there_is_one_shape():
    assert batch_shapes(sized(96, scales=())) == ((224, 96),)
    assert batch_shapes(sized(96, scales=(224,))) == ((224, 96),)


@pytest.mark.parametrize("batch_size", [8, 24, 96, 256, 1000, 4096])
@pytest.mark.parametrize(("group", "accumulate"), [(1, 1), (4, 2), (8, 1)])
def test_groups_and_microbatches_stay_whole_and_pixels_level(batch_size, group, accumulate):
    config = sized(batch_size, group, accumulate_steps=accumulate)
    for scale, images in batch_shapes(config):
        assert images % (group * accumulate) == 0
        assert images > 0
        if scale == 224:
            assert images == batch_size
        off = abs(images - batch_size * 224**2 / scale**2)
        assert off <= max(batch_size / 16, group * accumulate / 2) or images == group * accumulate


@pytest.mark.parametrize(
    ("batch_size", "group", "devices", "mend"),
    [(48, 12, 8, "data.batch_size=192"), (144, 12, 8, "data.batch_size=192"), (96, 12, 8, "data.batch_size=192")],
)
def test_sizes_that_the_devices_do_not_divide(batch_size, group, devices, mend):
    config = sized(batch_size, group)
    with pytest.raises(UserError) as caught:
        check_devices(config, devices)
    assert str(caught.value).endswith(f" {mend}")
    assert "\n" not in str(caught.value)
    section, key = mend.split("=")[0].split(".")
    changed = dataclasses.replace(getattr(config, section), **{key: int(mend.split("=")[1])})
    check_devices(dataclasses.replace(config, **{section: changed}), devices)


@pytest.mark.parametrize("scales", [(4, 224), (224, 8192), (224, 128), (128, 128)])
def test_scales_that_are_refused(scales):
    with pytest.raises(UserError, match=r"data\.scales"):
        check(sized(96, scales=scales))


def finetuning(resolution, batch_size, group_size, scales, accumulate_steps=1):
    config = sized(batch_size, group_size, scales, accumulate_steps)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, resolution=resolution))


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (
            finetuning(128, 32, 32, CORENET),
            1,
            "norm.group_size=4, or set data.batch_size=160, or leave 192, 224, 288, 320 out",
        ),
        (
            finetuning(32, 32, 32, (128, 192)),
            1,
            "; leave 128, 192 out",
        ),
        (finetuning(128, 32, 8, (128, 320)), 1, "norm.group_size=4, or set data.batch_size=40, or leave 320 out"),
        (
            finetuning(128, 32, 8, (128, 320), 2),
            2,
            "norm.group_size=2, or set data.batch_size=80, or leave 320 out",
        ),
        (finetuning(64, 1024, 8, (64, 320)), 1, "128 images of 320 px have 3.12 times"),
    ],
)
def test_scales_that_are_not_level_in_pixels(config, devices, message):
    with pytest.raises(UserError) as caught:
        check_devices(config, devices)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    for mend in re.findall(r"set ([\w.]+)=(\d+)", str(caught.value)):
        section, key = mend[0].split(".")
        changed = dataclasses.replace(getattr(config, section), **{key: int(mend[1])})
        check_devices(dataclasses.replace(config, **{section: changed}), devices)
    left_out = tuple(int(scale) for scale in re.search(r"leave (.*) out", str(caught.value))[1].split(", "))
    remaining = tuple(scale for scale in config.data.scales if scale not in left_out)
    check_devices(dataclasses.replace(config, data=dataclasses.replace(config.data, scales=remaining)), devices)
    check(config)  # to be evaluated at such a resolution


@pytest.mark.parametrize("batch", ["", ",batch=512", ",batch=16"])
def test_corenets_recipe_is_level(batch):
    config = configs.load(f"{W0_25}:recipe=corenet_v2{batch}").config
    check_devices(config, 1)
    pixels = [images * scale**2 for scale, images in batch_shapes(config)]
    assert max(pixels) < 1.04 * config.data.batch_size * config.data.resolution**2


# --- devices ------------------------------------------------------------------------------------------------


def every_command():
    """Lists each config, and each training command of the documentation, with their overrides."""
    found = {(name, ()) for name in configs.config_files()}
    for words in (words for page in docs.PAGES for words in docs.commands(page) if words[:2] == ["mnv2", "train"]):
        flags = dict(word.partition("=")[::2] for word in words[2:])
        spec = flags.pop("--config", "")
        if spec.partition(":")[0] in configs.config_files() and "--mode" not in flags:
            overrides = (f"{flag}={value}" for flag, value in flags.items() if flag.startswith("--config."))
            found.add((spec, tuple(override.removeprefix("--config.") for override in overrides)))
    assert len(found) > len(configs.config_files()) + 5
    return sorted(found)


@pytest.mark.parametrize(("spec", "overrides"), every_command())
def test_every_command_trains_on_1_2_4_and_8_devices(spec, overrides):
    config = configs.load(spec, overrides).config
    for devices in (1, 2, 4, 8):
        check_devices(config, devices)
        free = re.search(r":batch=(\d+)", spanning_groups(config, devices))
        whole = devices * config.norm.group_size
        assert bool(free) == any(images % whole for _, images in batch_shapes(config))
        if free:
            section = dataclasses.replace(config.data, batch_size=int(free[1]))
            assert spanning_groups(dataclasses.replace(config, data=section), devices) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "overrides"), every_command())
def test_every_step_traces_on_8_devices(spec, overrides):
    config = configs.load(spec, overrides).config
    model = dataclasses.replace(config.model, num_classes=10)
    opened = without_data(dataclasses.replace(config, model=model))
    state = jax.eval_shape(opened.init_state)
    jax.eval_shape(opened.train_step(0), state, {}, abstract_batch(opened))


@pytest.mark.parametrize(
    ("overrides", "layer"),
    [
        (("data.resolution=32", "model.depth=0.5", "model.strides=(2,2,2,2,2)"), "block_"),
        (
            ("data.scales=()", "model.name=mobilenet_v4_conv_small", "model.depth=1"),
            "hidden_norm",
        ),
    ],
)
def test_a_norm_with_one_value_a_channel_is_refused(overrides, layer):
    small = ("norm.group_size=1", "data.batch_size=4", *overrides)
    with pytest.raises(UserError, match=f"norm.group_size=1.*{layer}"):
        experiment(*small)
    experiment(*small, "norm.group_size=2")
    experiment(*small, "finetune.train_from=classifier")  # no norm is trained


# --- training -----------------------------------------------------------------------------------------------


def test_epochs_count_images():
    opened = experiment("train.steps=none", "train.epochs=10")
    assert opened.plan.batch_shapes == ((8, 128), (16, 32))
    assert opened.plan.steps_per_epoch == len(opened.dataset.train) / 80
    assert opened.plan.total_steps == round(10 * len(opened.dataset.train) / 80)
    assert opened.optimizers[0].schedule(opened.plan.total_steps - 1) < 1e-3 * opened.config.peak_lr
    plain = experiment("train.steps=none", "train.epochs=10", "data.scales=()")
    assert plain.plan.steps_per_epoch == len(plain.dataset.train) / 32


def test_each_shape_is_compiled_once_and_a_restart_changes_no_bit():
    opened = experiment("augment.repeats=2")
    step = meshes.compile_train_step(opened.mesh, opened.train_step(0))
    initial = jax.device_get(meshes.compile_init(opened.mesh, opened.init_state)())
    shapes, nothing = [], {}

    def run(state, start, stop):
        # A copy: on a CPU the host array may become the device's buffer, which the step donates.
        state = meshes.put(opened.mesh, jax.tree.map(np.copy, state))
        batches = train_batches(experiment("augment.repeats=2"), start)
        for _ in range(start, stop):
            batch = next(batches)
            shapes.append(batch["image"].shape[:2])
            with jax.transfer_guard("disallow"):
                state, _ = step(state, nothing, batch)
        return jax.device_get(state)

    whole = run(initial, 0, 6)
    assert sorted(shapes) == 3 * [(32, 16)] + 3 * [(128, 8)]
    restarted = run(run(initial, 0, 3), 3, 6)  # in the middle of a block
    assert shapes[6:] == shapes[:6]
    jax.tree.map(np.testing.assert_array_equal, restarted, whole)
    assert step._cache_size() == 2
