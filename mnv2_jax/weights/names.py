"""Names of our layers in PyTorch libraries: a function from a plan to a table, for each library."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mnv2_jax.models.network import Block, Plan
from mnv2_jax.nn import blocks
from mnv2_jax.weights.conventions import Source

Names = dict[str, str]
"""Ours, as ``block_1/expand_norm``, to theirs, as ``blocks.1.0.bn1``."""

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
"""Names of our leaves in PyTorch."""


class Anchor(NamedTuple):
    """How a network's state dict is known."""

    name: str
    """The end of the name of one tensor, which no other network has."""
    source: Source
    children: Mapping[str, str] = types.MappingProxyType({})
    """What the first parts of names were before the layers stood in an ``nn.Sequential``; others are no part of the
    network. Empty: they stand where the library has them."""


_FEATURES = {str(place): f"features.{place}" for place in range(19)}
_RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
ANCHORS = (
    Anchor("conv_stem.weight", "timm"),
    Anchor("features.0.0.weight", "torchvision"),
    Anchor("layer1.0.conv1.weight", "torchvision"),  # timm's ResNet has the same names
    Anchor("conv_1.block.conv.weight", "corenet"),
    # Backbones as people cut them out: `net.features`, `nn.Sequential(*list(net.children())[:-1])`
    Anchor("1.conv.0.0.weight", "torchvision", _FEATURES),
    Anchor("1.block.0.0.weight", "torchvision", _FEATURES),
    Anchor("4.0.conv1.weight", "torchvision", _RESNET),
)
"""Those whole first: the others are looked for where none of them is."""


def _numbered(plan: Plan) -> Iterator[tuple[str, Block, int, int]]:
    """Our name of each block, the block, its stage, and its place in the stage."""
    place, before = 0, None
    for index, block in enumerate(plan.blocks, 1):
        place = place + 1 if block.stage == before else 0
        before = block.stage
        yield f"block_{index}", block, block.stage, place


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
    """timm's MobileNets."""
    names = {"stem": "conv_stem", "stem_norm": "bn1", "classifier": "classifier"}
    if plan.hidden:
        names |= {"hidden": "conv_head", "hidden_norm": "norm_head"}
        if plan.head:  # V3's is the last stage of the blocks
            last = plan.blocks[-1].stage + 1
            names |= {"head": f"blocks.{last}.0.conv", "head_norm": f"blocks.{last}.0.bn1"}
    else:
        names |= {"head": "conv_head", "head_norm": "bn2"}
    for ours, block, stage, place in _numbered(plan):
        table = _TIMM_BLOCKS.get(block.module) or _TIMM_BLOCKS[block.module, bool(block.options["hidden"])]
        names |= {f"{ours}/{layer}": f"blocks.{stage}.{place}.{theirs}" for layer, theirs in table.items()}
    return names


# --- torchvision --------------------------------------------------------------------------------------------


def torchvision_v2(plan: Plan) -> Names:
    """torchvision's MobileNetV2: places in a Sequential, the last two layers of a block not in one of their own."""
    end = len(plan.blocks) + 1
    names = {"stem": "features.0.0", "stem_norm": "features.0.1", "classifier": "classifier.1"}
    names |= {"head": f"features.{end}.0", "head_norm": f"features.{end}.1"}
    for index, (ours, block, _, _) in enumerate(_numbered(plan), 1):
        at = f"features.{index}.conv"
        layers = [*(["expand"] if block.options["hidden"] else []), "depthwise"]
        for place, layer in enumerate(layers):
            names |= {f"{ours}/{layer}": f"{at}.{place}.0", f"{ours}/{layer}_norm": f"{at}.{place}.1"}
        names |= {f"{ours}/project": f"{at}.{len(layers)}", f"{ours}/project_norm": f"{at}.{len(layers) + 1}"}
    return names


def torchvision_v3(plan: Plan) -> Names:
    """torchvision's MobileNetV3: places in a Sequential."""
    end = len(plan.blocks) + 1
    names = {"stem": "features.0.0", "stem_norm": "features.0.1"}
    names |= {"hidden": "classifier.0", "classifier": "classifier.3"}
    names |= {"head": f"features.{end}.0", "head_norm": f"features.{end}.1"}
    for index, (ours, block, _, _) in enumerate(_numbered(plan), 1):
        layers = [*(["expand"] if block.options["hidden"] else []), "depthwise"]
        layers += [*(["squeeze_excite"] if block.options["squeezed"] else []), "project"]
        for place, layer in enumerate(layers):
            at = f"features.{index}.block.{place}"
            if layer == "squeeze_excite":
                names |= {f"{ours}/{layer}/reduce": f"{at}.fc1", f"{ours}/{layer}/expand": f"{at}.fc2"}
            else:
                names |= {f"{ours}/{layer}": f"{at}.0", f"{ours}/{layer}_norm": f"{at}.1"}
    return names


def resnet(plan: Plan) -> Names:
    """ResNet, of torchvision and of timm."""
    names = {"stem": "conv1", "stem_norm": "bn1", "classifier": "fc"}
    for ours, _, stage, place in _numbered(plan):
        at = f"layer{stage + 1}.{place}"
        for number, layer in enumerate(("reduce", "conv", "project"), 1):
            names |= {f"{ours}/{layer}": f"{at}.conv{number}", f"{ours}/{layer}_norm": f"{at}.bn{number}"}
        names |= {f"{ours}/shortcut": f"{at}.downsample.0", f"{ours}/shortcut_norm": f"{at}.downsample.1"}
    return names


# --- CoreNet ------------------------------------------------------------------------------------------------

_CORENET_BLOCKS: Mapping[Any, Names] = {
    blocks.DepthwiseSeparable: {"depthwise": "dw_conv", "pointwise": "pw_conv"},
    blocks.InvertedResidual: {"expand": "block.exp_1x1", "depthwise": "block.conv_3x3", "project": "block.red_1x1"},
}


def corenet(plan: Plan) -> Names:
    """CoreNet's V1 and V2; its ``layer_1`` to ``layer_5`` begin where the map is halved."""
    names = {"stem": "conv_1.block.conv", "stem_norm": "conv_1.block.norm"}
    names |= {"head": "conv_1x1_exp.block.conv", "head_norm": "conv_1x1_exp.block.norm"}
    names |= {"classifier": "classifier.classifier_fc"}
    layer, place = 1, -1
    for ours, block, _, _ in _numbered(plan):
        layer, place = (layer + 1, 0) if block.stride == 2 else (layer, place + 1)
        at = f"layer_{layer}.{place if block.module is blocks.DepthwiseSeparable else f'mv2_block_{place}'}"
        for mine, theirs in _CORENET_BLOCKS[block.module].items():
            names |= {f"{ours}/{mine}": f"{at}.{theirs}.block.conv", f"{ours}/{mine}_norm": f"{at}.{theirs}.block.norm"}
    return names


# --- which ---------------------------------------------------------------------------------------------------

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
"""Tables by source and family."""


def family_of(model: str) -> str:
    """``mobilenet_v3`` of ``mobilenet_v3_large``."""
    found = re.match(r"mobilenet_v\d", model)
    return found[0] if found else model
