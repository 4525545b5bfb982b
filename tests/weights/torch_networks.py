"""Endpoints of the networks of PyTorch libraries, by our names."""

import functools
import itertools


def endpoints(model, x, modules):
    """Outputs of the modules, by our endpoint names; maps as [b, h, w, c]."""
    import torch

    found = {}

    def keep(point, module, inputs, output):
        found[point] = output.detach().clone()  # the next activation may be in place

    hooks = [module.register_forward_hook(functools.partial(keep, point)) for point, module in modules.items()]
    with torch.no_grad():
        outputs = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        found["logits"] = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs
    for hook in hooks:
        hook.remove()
    return {point: (y.permute(0, 2, 3, 1) if y.ndim == 4 else y).contiguous().numpy() for point, y in found.items()}


def numbered(blocks):
    return {f"block_{i}": block for i, block in enumerate(blocks, 1)}


def _resnet_modules(model, activation, pool):
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    modules = numbered(itertools.chain(*stages))
    return {"stem": activation, "pool": model.maxpool, **modules, "pooled": pool}


def torchvision_modules(model, family):
    """Modules of torchvision's network of a family, by our endpoint names."""
    if family == "resnet50":
        return _resnet_modules(model, model.relu, model.avgpool)
    stem, *blocks, head = model.features
    modules = {"stem": stem, **numbered(blocks), "head": head, "pooled": model.classifier[0]}
    if family.startswith("mobilenet_v3"):
        modules |= {"pooled": model.avgpool, "hidden": model.classifier[1]}
    return modules


def timm_modules(model, family):
    """Modules of timm's network of a family, by our endpoint names."""
    if family == "resnet50":
        return _resnet_modules(model, model.act1, model.global_pool)
    blocks = list(itertools.chain(*model.blocks))
    modules = {"stem": model.bn1, "pooled": model.global_pool}
    if family.startswith("mobilenet_v2"):
        modules["head"] = model.bn2
    elif family.startswith("mobilenet_v3"):
        modules["head"] = blocks.pop()
    if family.startswith(("mobilenet_v3", "mobilenet_v4")):
        modules["hidden"] = model.act2
    return modules | numbered(blocks)


def torchvision_v3(models, size, width, **options):
    """torchvision has a width multiplier for MobileNetV3, but no public name for it."""
    settings = models.mobilenetv3._mobilenet_v3_conf(f"mobilenet_v3_{size}", width_mult=width)
    return models.MobileNetV3(*settings, **options)
