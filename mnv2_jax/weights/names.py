"""Names of our layers in PyTorch libraries: one function per library, from a plan to a table of names."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mnv2_jax.models.plan import Block, Plan
from mnv2_jax.nn import blocks
from mnv2_jax.weights.conventions import Source

Names = dict[str, str]
"""Table from our names of layers, such as ``block_1/expand_norm``, to a library's, such as ``blocks.1.0.bn1``."""

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
"""Names of our leaves in PyTorch."""


class Anchor(NamedTuple):
    """Tensor name by which a network in a library's state dict is recognised."""

    name: str
    """End of a tensor name that occurs in no other library's networks."""
    source: Source
    children: Mapping[str, str] = types.MappingProxyType({})
    """Library's names of a network's children by their index in a user's ``nn.Sequential``. A tensor whose name begins
    with another index isn't part of the network. Empty: the tensors have the library's own names."""
    head: str = "classifier"
    """What follows the features, as in `config.ModelConfig.head`."""
    inside: tuple[str, ...] = ()
    """Beginnings of names within the network that look like networks of their own."""


_FEATURES = {str(place): f"features.{place}" for place in range(19)}
_RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
ANCHORS = (
    Anchor(
        "head.classification_head.module_list.0.0.0.weight",
        "torchvision",
        head="ssdlite",
        inside=("backbone.features.0.", "backbone.features.1."),
    ),
    Anchor("classifier.cbr.0.weight", "torchvision", head="lraspp", inside=("backbone.",)),
    Anchor("classifier.0.convs.0.0.weight", "torchvision", head="deeplabv3", inside=("backbone.",)),
    Anchor("seg_head.aspp.aspp_layer.convs.0.block.conv.weight", "corenet", head="deeplabv3", inside=("encoder.",)),
    Anchor("segmentation_head.conv_aspp.convolution.weight", "transformers", head="deeplabv3"),
    Anchor("conv_stem.weight", "timm"),
    Anchor("features.0.0.weight", "torchvision", inside=("features.",)),
    Anchor("layer1.0.conv1.weight", "torchvision"),  # timm's ResNet has the same names
    Anchor("conv_1.block.conv.weight", "corenet"),
    # Backbones that users cut out by `net.features` or `nn.Sequential(*list(net.children())[:-1])`
    Anchor("1.conv.0.0.weight", "torchvision", _FEATURES),
    Anchor("1.block.0.0.weight", "torchvision", _FEATURES),
    Anchor("4.0.conv1.weight", "torchvision", _RESNET),
)
"""All anchors. Those of whole networks come first, and those of cut-out backbones are tried after them."""


def _numbered(plan: Plan) -> Iterator[tuple[str, Block, int, int]]:
    """Yields our name of each block, the block, its stage, and its index in the stage."""
    index_in_stage, before = 0, None
    for index, block in enumerate(plan.blocks, 1):
        index_in_stage = index_in_stage + 1 if block.stage == before else 0
        before = block.stage
        yield f"block_{index}", block, block.stage, index_in_stage


# --- timm ---------------------------------------------------------------------------------------------------

_SQUEEZE_EXCITE = {"squeeze_excite/reduce": "se.conv_reduce", "squeeze_excite/expand": "se.conv_expand"}
_TIMM_BLOCKS: Mapping[Any, Names] = {
    blocks.ConvBlock: {"conv": "conv", "conv_norm": "bn1"},
    blocks.DepthwiseSeparable: {
        "depthwise": "conv_dw", "depthwise_norm": "bn1", "pointwise": "conv_pw", "pointwise_norm": "bn2",
    },
    (blocks.InvertedResidual, False): {
        "depthwise": "conv_dw", "depthwise_norm": "bn1", "project": "conv_pw", "project_norm": "bn2", **_SQUEEZE_EXCITE,
    },
    (blocks.InvertedResidual, True): {
        "expand": "conv_pw", "expand_norm": "bn1", "depthwise": "conv_dw", "depthwise_norm": "bn2",
        "project": "conv_pwl", "project_norm": "bn3", **_SQUEEZE_EXCITE,
    },
    blocks.FusedInvertedResidual: {
        "expand": "conv_exp", "expand_norm": "bn1", "project": "conv_pwl", "project_norm": "bn2",
    },
    blocks.UniversalInvertedBottleneck: {
        "start_depthwise": "dw_start.conv", "start_depthwise_norm": "dw_start.bn",
        "expand": "pw_exp.conv", "expand_norm": "pw_exp.bn", "depthwise": "dw_mid.conv", "depthwise_norm": "dw_mid.bn",
        "project": "pw_proj.conv", "project_norm": "pw_proj.bn", "layer_scale": "layer_scale",
    },
    blocks.MobileAttention: {
        "input_norm": "norm", "query": "attn.query.proj",
        "key_depthwise": "attn.key.down_conv", "key_depthwise_norm": "attn.key.norm", "key": "attn.key.proj",
        "value_depthwise": "attn.value.down_conv", "value_depthwise_norm": "attn.value.norm",
        "value": "attn.value.proj", "output": "attn.output.proj", "layer_scale": "layer_scale",
    },
}  # fmt: skip


def timm(plan: Plan) -> Names:
    """Table of names for timm's MobileNets."""
    names = {"stem": "conv_stem", "stem_norm": "bn1", "classifier": "classifier"}
    if plan.hidden:
        names |= {"hidden": "conv_head", "hidden_norm": "norm_head"}
        if plan.head:  # in timm's V3 it is the last stage of the blocks
            last = plan.blocks[-1].stage + 1
            names |= {"head": f"blocks.{last}.0.conv", "head_norm": f"blocks.{last}.0.bn1"}
    else:
        names |= {"head": "conv_head", "head_norm": "bn2"}
    for name, block, stage, place in _numbered(plan):
        table = _TIMM_BLOCKS.get(block.module) or _TIMM_BLOCKS[block.module, bool(block.options["hidden"])]
        names |= {f"{name}/{layer}": f"blocks.{stage}.{place}.{child}" for layer, child in table.items()}
    return names


# --- torchvision --------------------------------------------------------------------------------------------


def torchvision_v2(plan: Plan) -> Names:
    """Table of names for torchvision's MobileNetV2.

    Names are indices in a Sequential. The last two layers of a block aren't in a Sequential of their own.
    """
    end = len(plan.blocks) + 1
    names = {"stem": "features.0.0", "stem_norm": "features.0.1", "classifier": "classifier.1"}
    names |= {"head": f"features.{end}.0", "head_norm": f"features.{end}.1"}
    for index, (name, block, _, _) in enumerate(_numbered(plan), 1):
        at = f"features.{index}.conv"
        layers = [*(["expand"] if block.options["hidden"] else []), "depthwise"]
        for place, layer in enumerate(layers):
            names |= {f"{name}/{layer}": f"{at}.{place}.0", f"{name}/{layer}_norm": f"{at}.{place}.1"}
        names |= {f"{name}/project": f"{at}.{len(layers)}", f"{name}/project_norm": f"{at}.{len(layers) + 1}"}
    return names


def torchvision_v3(plan: Plan) -> Names:
    """Table of names for torchvision's MobileNetV3; names are indices in a Sequential."""
    end = len(plan.blocks) + 1
    names = {"stem": "features.0.0", "stem_norm": "features.0.1"}
    names |= {"hidden": "classifier.0", "classifier": "classifier.3"}
    names |= {"head": f"features.{end}.0", "head_norm": f"features.{end}.1"}
    for index, (name, block, _, _) in enumerate(_numbered(plan), 1):
        layers = [*(["expand"] if block.options["hidden"] else []), "depthwise"]
        layers += [*(["squeeze_excite"] if block.options["squeezed"] else []), "project"]
        for place, layer in enumerate(layers):
            at = f"features.{index}.block.{place}"
            if layer == "squeeze_excite":
                names |= {f"{name}/{layer}/reduce": f"{at}.fc1", f"{name}/{layer}/expand": f"{at}.fc2"}
            else:
                names |= {f"{name}/{layer}": f"{at}.0", f"{name}/{layer}_norm": f"{at}.1"}
    return names


def resnet(plan: Plan) -> Names:
    """Table of names for the ResNet of torchvision and timm."""
    names = {"stem": "conv1", "stem_norm": "bn1", "classifier": "fc"}
    for name, _, stage, place in _numbered(plan):
        at = f"layer{stage + 1}.{place}"
        for number, layer in enumerate(("reduce", "conv", "project"), 1):
            names |= {f"{name}/{layer}": f"{at}.conv{number}", f"{name}/{layer}_norm": f"{at}.bn{number}"}
        names |= {f"{name}/shortcut": f"{at}.downsample.0", f"{name}/shortcut_norm": f"{at}.downsample.1"}
    return names


# --- CoreNet ------------------------------------------------------------------------------------------------

_CORENET_BLOCKS: Mapping[Any, Names] = {
    blocks.DepthwiseSeparable: {"depthwise": "dw_conv", "pointwise": "pw_conv"},
    blocks.InvertedResidual: {"expand": "block.exp_1x1", "depthwise": "block.conv_3x3", "project": "block.red_1x1"},
}


def corenet(plan: Plan) -> Names:
    """Table of names for CoreNet's V1 and V2. Each of its ``layer_1`` to ``layer_5`` begins where the map is halved."""
    names = {"stem": "conv_1.block.conv", "stem_norm": "conv_1.block.norm"}
    names |= {"head": "conv_1x1_exp.block.conv", "head_norm": "conv_1x1_exp.block.norm"}
    names |= {"classifier": "classifier.classifier_fc"}
    layer, place = 1, -1
    for name, block, _, _ in _numbered(plan):
        layer, place = (layer + 1, 0) if block.stride == 2 else (layer, place + 1)
        at = f"layer_{layer}.{place if block.module is blocks.DepthwiseSeparable else f'mv2_block_{place}'}"
        for part, child in _CORENET_BLOCKS[block.module].items():
            names |= {f"{name}/{part}": f"{at}.{child}.block.conv", f"{name}/{part}_norm": f"{at}.{child}.block.norm"}
    return names


# --- Hugging Face's transformers -----------------------------------------------------------------------------


def transformers_v2(plan: Plan) -> Names:
    """Table of names for the features of transformers' MobileNetV2, whose first block belongs to its stem."""
    parts = {"expand": "expand_1x1", "depthwise": "conv_3x3", "project": "reduce_1x1"}
    places = {"stem": "conv_stem.first_conv"}
    for number, (name, block, _, _) in enumerate(_numbered(plan), 1):
        at = "conv_stem" if number == 1 else f"layer.{number - 2}"
        held = [part for part in parts if part != "expand" or block.options["hidden"]]
        places |= {f"{name}/{part}": f"{at}.{parts[part]}" for part in held}
    names = {layer: f"mobilenet_v2.{place}.convolution" for layer, place in places.items()}
    return names | {f"{layer}_norm": f"mobilenet_v2.{place}.normalization" for layer, place in places.items()}


# --- all tables ----------------------------------------------------------------------------------------------

TABLES: Mapping[tuple[str, str], Callable[[Plan], Names]] = {
    ("torchvision", "mobilenet_v2"): torchvision_v2,
    ("torchvision", "mobilenet_v3"): torchvision_v3,
    ("torchvision", "resnet50"): resnet,
    ("timm", "mobilenet_v1"): timm,
    ("timm", "mobilenet_v2"): timm,
    ("timm", "mobilenet_v3"): timm,
    ("timm", "mobilenet_v4"): timm,
    ("timm", "resnet50"): resnet,
    ("timm_tf", "mobilenet_v3"): timm,
    ("corenet", "mobilenet_v1"): corenet,
    ("corenet", "mobilenet_v2"): corenet,
}
"""Functions that make the tables, by source and family."""


def family_of(model: str) -> str:
    """Family of a model: ``mobilenet_v3`` for ``mobilenet_v3_large``."""
    match = re.match(r"mobilenet_v\d", model)
    return match[0] if match else model
