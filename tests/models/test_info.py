import dataclasses

import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.models.counting import Summary
from mnv2_jax.models.info import model_info
from mnv2_jax.models.published import published
from mnv2_jax.models.registry import list_models
from mnv2_jax.presets import native_resolution


@pytest.fixture
def uncounted(monkeypatch):
    """Replaces the count, which takes a second."""
    summary = Summary(6_108_776, 582_200_000, ())
    monkeypatch.setattr("mnv2_jax.models.info.count_layers", lambda model, resolution: summary)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("mobilenet_v4_conv_medium", (256, 9_715_512, 1_080_244_224)), ("resnet50", (224, 25_557_032, 4_089_184_256))],
)
def test_counts_are_those_of_the_native_resolution(name, counts):
    info = model_info(name)
    assert (info.resolution, info.params, info.madds) == counts
    assert (info.name, info.published) == (name, published(name))


def test_every_network_has_results_at_its_native_resolution():
    for name in (*list_models("mobilenet_*"), *list_models("resnet*")):  # other tests register networks of their own
        assert native_resolution(name) in {row["resolution"] for row in published(name)}, name


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (dict(width=0.35), {(0.35, 1.0)}),
        (dict(width=1.2), set()),  # published with a depth of 1.4 only
        (dict(width=1.2, depth=1.4), {(1.2, 1.4)}),
        (dict(depth=1.0), {(1.0, 1.0)}),
    ],
)
def test_results_are_those_of_the_width_and_the_depth_that_are_given(options, sizes, uncounted):
    rows = model_info("mobilenet_v2", **options).published
    assert {(row["width"], row.get("depth", 1.0)) for row in rows} == sizes


def test_results_are_all_where_neither_is_given(uncounted):
    assert model_info("mobilenet_v2", padding="symmetric").published == published("mobilenet_v2")


def test_prints_an_aligned_table(uncounted):
    lines = str(model_info("mobilenet_v2", width=1.4)).splitlines()
    assert lines[0] == "mobilenet_v2 width=1.4: 6,108,776 parameters, 582.2 M MAdds at 224 px"
    head, *rows = lines[2:]
    assert head.split() == ["width", "px", "top-1", "top-5", "source", "remarks"]  # no depth: it would be empty
    assert len(rows) == len([row for row in published("mobilenet_v2") if row["width"] == 1.4])
    ends = [head.index(key) + len(key) for key in ("width", "px", "top-1", "top-5")]
    for line in rows:
        assert all(line[end - 1] != " " for end in ends[:3])
        assert all(line[end : end + 2] == "  " for end in ends)
        assert line[head.index("source")] != " "
        assert line == line.rstrip()


def test_prints_that_nothing_was_published(uncounted):
    assert str(model_info("mobilenet_v2", width=0.6)).endswith("px\nno published results")


def test_is_read_only(uncounted):
    info = model_info("resnet50")
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.params = 0
    with pytest.raises(TypeError):
        info.options["width"] = 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="mobilnet_v2"), "'mobilnet_v2'.*'mobilenet_v2'"),
        (dict(name="mobilenet_v2", widht=0.5), "'widht'.*'width'"),
        (dict(name="resnet50", width=0.5), "model.width=0.5: resnet50 "),
    ],
)
def test_refuses_what_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        model_info(**arguments)
