"""Writes outputs.json: float64 outputs of torchvision's and timm's networks with the weights of `tests.models.golden`.

    python -m tests.golden.make_outputs

It needs the extra "parity" and torchvision. Run it after adding a network to the registry and to `NETWORKS`, or after
changing the rules in `tests/models/golden.py`.
"""

import json
import pathlib

import jax
import numpy as np
import torch

from mnv2_jax.bench import torch_rival
from mnv2_jax.models.counting import count_layers
from mnv2_jax.weights import by_name, names
from mnv2_jax.weights.file import flatten
from tests.models import golden
from tests.weights import torch_networks

timm = torch_rival.import_timm()
import torchvision  # noqa: E402  after timm, since `import_timm` may have to define its operators
from timm.models import mobilenetv3  # noqa: E402

DIGITS = 13
"""Decimal digits to keep. A float64 has 16, but the last ones depend on the order of sums."""


def timm_network(model):
    return torch_rival.build_network(model.options, model.norm, count_layers(model, 32).params)


def timm_tf_network(model):
    """Builds one of timm's tf_ networks, which pad as TensorFlow does."""
    options, norm = model.options, model.norm
    timm_options = dict(num_classes=model.num_classes, pad_type="same", bn_eps=norm.epsilon)
    return mobilenetv3._gen_mobilenet_v3(f"{torch_rival.NETWORKS[model.name]}_100", options.width, **timm_options)


def torchvision_network(model):
    """Builds torchvision's network, with torchvision's epsilon."""
    width, classes = model.options.width, {"num_classes": model.num_classes}
    if model.name == "resnet50":
        return torchvision.models.resnet50(**classes)
    if model.name == "mobilenet_v2":
        return torchvision.models.mobilenet_v2(width_mult=width, **classes)
    return torch_networks.torchvision_v3(torchvision.models, model.name.rpartition("_")[2], width, **classes)


LIBRARIES = {
    "timm": (timm_network, torch_networks.timm_modules),
    "timm_tf": (timm_tf_network, torch_networks.timm_modules),
    "torchvision": (torchvision_network, torch_networks.torchvision_modules),
}
SYMMETRIC = {"padding": "symmetric"}
NARROW = {"width": 0.25, **SYMMETRIC}
NARROWER = {"width": 0.125, **SYMMETRIC}
TORCHVISION_V3 = {**NARROW, "width_rule": "torchvision"}
MINIMALISTIC = {"width": 0.25, "width_rule": "fixed_stem_head"}
NETWORKS = {
    # Library of the reference, options of our network, epsilon of its norms.
    "mobilenet_v1": ("timm", NARROW, 1e-5),
    "mobilenet_v2": ("torchvision", NARROW, 1e-5),
    "mobilenet_v3_large": ("torchvision", TORCHVISION_V3, 1e-3),
    "mobilenet_v3_small": ("torchvision", TORCHVISION_V3, 1e-3),
    "mobilenet_v3_large_minimalistic": ("timm_tf", MINIMALISTIC, 1e-3),
    "mobilenet_v3_small_minimalistic": ("timm_tf", MINIMALISTIC, 1e-3),
    "mobilenet_v4_conv_small": ("timm", NARROW, 1e-5),
    "mobilenet_v4_conv_medium": ("timm", NARROWER, 1e-5),
    "mobilenet_v4_conv_large": ("timm", NARROWER, 1e-5),
    "mobilenet_v4_hybrid_medium": ("timm", NARROWER, 1e-5),
    "mobilenet_v4_hybrid_large": ("timm", NARROWER, 1e-5),
    "resnet50": ("torchvision", SYMMETRIC, 1e-5),
}


def fill(reference, library, model, variables):
    """Copies our values into the reference's tensors.

    The position of each value is found by converting tensors of tags, one tag for each value of the reference. Every
    tag must appear exactly once in the result.
    """
    tensors = {name: t for name, t in reference.state_dict().items() if not name.endswith("num_batches_tracked")}
    ends = np.cumsum([tensor.numel() for tensor in tensors.values()])
    tags = np.arange(ends[-1])
    state = {
        name: tag.reshape(tensor.shape)
        for (name, tensor), tag in zip(tensors.items(), np.split(tags, ends[:-1]), strict=True)
    }
    table = names.TABLES[library, names.family_of(model.name)](model.plan)
    places, _ = by_name.leaves_of(pathlib.Path(library), model, state, table)
    np.testing.assert_array_equal(np.sort(np.concatenate([place.ravel() for place in places.values()])), tags)
    our_values, values = flatten(variables), np.empty(len(tags))
    for path, place in places.items():
        values[place] = our_values[path]
    for tensor, part in zip(tensors.values(), np.split(values, ends[:-1]), strict=True):
        tensor.copy_(torch.from_numpy(part).reshape(tensor.shape))


def outputs(name):
    """Returns the options of our network and the reference's outputs for its weights; needs 64-bit JAX."""
    library, options, epsilon = NETWORKS[name]
    entry = {"library": library, "options": options, "epsilon": epsilon}
    make, modules_of = LIBRARIES[library]
    model = golden.create(name, entry)
    reference = make(model).double().eval()
    fill(reference, library, model, golden.weights(model))
    endpoints = torch_networks.endpoints(reference, golden.images(), modules_of(reference, names.family_of(name)))
    order = [*model.endpoint_strides, *(point for point in ("pooled", "hidden", "logits") if point in endpoints)]
    assert sorted(order) == sorted(endpoints)
    return entry | {
        "logits": [rounded(row) for row in endpoints["logits"]],
        "endpoints": {point: rounded(golden.checksums(endpoints[point])) for point in order},
    }


def rounded(values):
    return [float(f"{value:.{DIGITS - 1}e}") for value in values]


def main():
    jax.config.update("jax_enable_x64", True)
    about = (
        "Logits, and mean, deviation and projection of each endpoint, in float64, of"
        f" torchvision {torchvision.__version__}, timm {timm.__version__} and torch {torch.__version__}; written by"
        " tests/golden/make_outputs.py."
    )
    lines = [f"{json.dumps(name)}: {json.dumps(outputs(name))}" for name in NETWORKS]
    golden.PATH.write_text(f'{{"about": {json.dumps(about)}, "networks": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
