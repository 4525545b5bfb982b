"""The rival in PyTorch: timm's version of the same network, with the same batch, precision and optimiser.

The rival runs in its own process, which never loads JAX. Where PyTorch offers a faster choice at no cost, the rival
gets it: channels-last, cuDNN's search for algorithms, fused optimisers, symmetric zero padding instead of TensorFlow's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from mnv2_jax.config import Config, ModelConfig, OptimConfig

NETWORKS: Mapping[str, str] = {
    "mobilenet_v1": "mobilenetv1",
    "mobilenet_v2": "mobilenetv2",
    "mobilenet_v3_large": "mobilenetv3_large",
    "mobilenet_v3_small": "mobilenetv3_small",
    "mobilenet_v3_large_minimalistic": "tf_mobilenetv3_large_minimal",
    "mobilenet_v3_small_minimalistic": "tf_mobilenetv3_small_minimal",
    "mobilenet_v4_conv_small": "mobilenetv4_conv_small",
    "mobilenet_v4_conv_medium": "mobilenetv4_conv_medium",
    "mobilenet_v4_conv_large": "mobilenetv4_conv_large",
    "mobilenet_v4_hybrid_medium": "mobilenetv4_hybrid_medium",
    "mobilenet_v4_hybrid_large": "mobilenetv4_hybrid_large",
    "resnet50": "resnet50",
}
"""timm's name, without the width, of each of our networks."""
WARM_UP = 3
"""Steps before timing starts; they include compilation, cuDNN's search and the creation of the optimiser's state."""


class Unavailable(Exception):  # noqa: N818  a result, not an error
    """Raised with the reason, in one line, if the rival can't run."""


class Rival(NamedTuple):
    """A network on its device, ready to be timed."""

    turn: Callable[[int], float]
    """Computes this many batches in a row, waits for the device, and returns the seconds that all of them took."""
    peak_bytes: Callable[[], int | None]
    """Returns the peak device memory in bytes since `build` ended, with weights and optimiser; None on the CPU."""
    facts: dict[str, Any]
    """Facts about network, device and versions, as JSON data."""


def build(settings: Config, *, mode: Literal["train", "infer"], compiled: bool, params: int) -> Rival:
    """Builds the rival and warms it up.

    Args:
      settings: config of our network, with ``model.num_classes`` set.
      mode: "train" computes new weights from uint8 images and labels that stay on the device; "infer" computes logits
        from normalised float images that stay there.
      compiled: whether the network goes through ``torch.compile``.
      params: number of our network's trainable values; the rival must have the same number.

    Raises:
      Unavailable: if PyTorch or timm lacks something that the config needs, or can't run or compile it here.
    """
    timm = import_timm()
    import torch

    check(settings, mode)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(settings.seed)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else _no_wait
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "model": timm_name(settings.model),
        "params": params,
        "precision": _precision(settings.model, device.type),
        "padding": "symmetric",
        "batch_norm": f"over all {settings.data.batch_size} images",
        "compile_seconds": None,
    }
    model = build_network(settings.model, settings.norm, params)
    start = time.perf_counter()
    try:
        model = model.to(device, memory_format=torch.channels_last)
        if mode == "train":
            step, training_facts = train_step(settings, model, device, compiled)
            facts |= training_facts
        else:
            step = infer_step(settings, model, device, compiled)
        for _ in range(WARM_UP):
            step()
        synchronise()
    except Unavailable:
        raise
    except Exception as error:
        # A missing C++ compiler, Triton or memory can raise many kinds of exceptions. An eager step that fails for any
        # reason but memory is a bug in this file.
        if not compiled and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        failure = "torch.compile failed" if compiled else "out of memory"
        raise Unavailable(f"{failure}: {type(error).__name__}: {_line(error)}") from error
    if compiled:
        facts["compile_seconds"] = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(
            device
        )  # cuDNN's search uses more memory than the algorithms that it selects

    def turn(steps: int) -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise()
        return time.perf_counter() - start

    def peak_bytes() -> int | None:
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    return Rival(turn, peak_bytes, facts)


_OPERATORS: list[Any] = []
"""Operators that `import_timm` defines. They exist as long as these objects do."""


def import_timm() -> Any:
    """Imports timm and returns the module. timm imports torchvision, which the rival doesn't use.

    Raises:
      Unavailable: if timm or PyTorch isn't installed, or if their versions don't fit together.
    """
    try:
        import torch

        try:
            import timm
        except RuntimeError as error:
            # pip may install a torchvision for CUDA beside a CPU build of PyTorch. Its operators then can't be loaded,
            # and its import fails without them, so two empty ones are declared.
            if "torchvision::" not in str(error):
                raise
            _OPERATORS.append(torch.library.Library("torchvision", "FRAGMENT"))
            for name in ("nms", "qnms"):
                _OPERATORS[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import timm
    except ImportError as error:
        raise Unavailable(f"{_line(error)}; pip install 'mnv2_jax[parity]'") from error
    except Exception as error:
        raise Unavailable(f"timm can't be imported: {_line(error)}") from error
    return timm


def _line(error: Exception) -> str:
    """Returns the first line of the error's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check(settings: Config, mode: Literal["train", "infer"]) -> None:
    """Raises `Unavailable` if the config has an option that the rival can't reproduce."""
    model = settings.model
    reasons = {
        f"timm has no {model.name}": model.name not in NETWORKS,
        "model.num_classes is not set": model.num_classes is None,
        "model.dtype=float64 is only for tests": model.dtype == "float64",
        **_HEAD_REASONS.get(model.head, _no_head)(settings),
        f"model.output_stride={model.output_stride}: timm's network is only built with 32": model.output_stride != 32
        and model.head == "classifier",
        "timm's MobileNetV1 has no model.width_rule=corenet": model.name == "mobilenet_v1"
        and model.width_rule == "corenet",
    }
    if mode == "train":
        reasons |= {
            "data.scales: the rival's batches have one size": bool(settings.data.scales),
            "distill: the rival has no teacher": bool(settings.distill.teacher or settings.distill.logits),
            "finetune.train_from: the rival trains the whole network": settings.finetune.train_from != ("stem",),
        }
    for reason, holds in reasons.items():
        if holds:
            raise Unavailable(reason)


def _no_head(settings: Config) -> dict[str, bool]:
    return {f"model.head={settings.model.head}: the rival has none": settings.model.head != "classifier"}


def _deeplabv3_reasons(settings: Config) -> dict[str, bool]:
    """Returns reasons against torchvision's DeepLabv3 on timm's features, and whether they hold."""
    model = settings.model
    return {
        "the rival is torchvision's DeepLabv3 on MobileNetV2 1.0 (model.aspp_conv=True, model.head_channels=256, three"
        " model.aspp_rates)": not model.aspp_conv
        or model.head_channels != 256
        or len(model.aspp_rates) != 3
        or (model.name, model.width, model.depth) != ("mobilenet_v2", 1.0, 1.0),
        "model.aux_head: the rival has none": model.aux_head,
        "norm.statistics=running: the rival's norms use those of the batch": settings.norm.statistics == "running",
    }


def _ssdlite_reasons(settings: Config) -> dict[str, bool]:
    """Returns reasons against torchvision's SSDLite, and whether they hold."""
    model = settings.model
    return {
        "the rival is torchvision's SSDLite on MobileNetV3-Large 1.0 (model.anchors=torchvision,"
        " model.box_scores=softmax, model.reduced_tail=torchvision)": (model.name, model.width, model.depth)
        != ("mobilenet_v3_large", 1.0, 1.0)
        or (model.anchors, model.box_scores, model.reduced_tail) != ("torchvision", "softmax", "torchvision"),
        "norm.statistics=running: the rival's norms use those of the batch": settings.norm.statistics == "running",
    }


_HEAD_REASONS = {"deeplabv3": _deeplabv3_reasons, "ssdlite": _ssdlite_reasons}
"""Functions that return the reasons against the rival of a head other than the classifier."""


def timm_name(model: ModelConfig) -> str:
    """Returns the network's name in timm, with the width in percent, e.g. ``mobilenetv2_035``."""
    name = NETWORKS[model.name]
    has_no_suffix = name == "resnet50" or (name.startswith("mobilenetv4") and model.width == 1)
    return name if has_no_suffix else f"{name}_{round(100 * model.width):03d}"


# --- the network ---------------------------------------------------------------------------------------------


def build_network(model: ModelConfig, norm: Any, params: int) -> Any:
    """Builds timm's network with the name, width, strides, dropout and norm of our config.

    Args:
      model: config of a network in `NETWORKS`.
      norm: `mnv2_jax.config.NormConfig`.
      params: as for `build`.

    Returns:
      A ``torch.nn.Module`` with random weights that maps images [b, 3, h, w] to logits [b, k].

    Raises:
      Unavailable: if timm rounds the numbers of channels differently.
    """
    import torch

    network = _create_network(model)
    timm_params = sum(p.numel() for p in network.parameters())
    if timm_params != params:
        raise Unavailable(
            f"timm's {timm_name(model)} has {timm_params:,} parameters and our {model.name} has {params:,}, so the"
            f" networks differ (model.width={model.width:g}, model.width_rule={model.width_rule})"
        )
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.momentum, module.eps = 1 - norm.decay, norm.epsilon
    if model.head == "classifier":
        _set_strides(network, model)
    return network


def _create_network(model: ModelConfig) -> Any:
    import timm

    if model.head in _CREATE_DENSE:
        return _CREATE_DENSE[model.head](model)
    options: dict[str, Any] = dict(num_classes=model.num_classes, drop_rate=model.dropout)
    options |= dict(drop_path_rate=model.drop_path)
    if model.name == "resnet50":
        return timm.create_model("resnet50", **options)
    if model.activation:
        options["act_layer"] = model.activation
    # timm's public entry points fix the width, so their private helpers are called. timm warns about a variant without
    # published weights, so every width is built under the name of width 1.0.
    try:
        from timm.models import efficientnet, mobilenetv3

        name = NETWORKS[model.name]
        if model.name == "mobilenet_v1":
            return efficientnet._gen_mobilenet_v1("mobilenetv1_100", model.width, **options)
        if model.name == "mobilenet_v2":
            return efficientnet._gen_mobilenet_v2(
                "mobilenetv2_100",
                model.width,
                model.depth,
                fix_stem_head=model.width_rule == "fixed_stem_head",
                **options,
            )
        if model.name.startswith("mobilenet_v3"):
            return mobilenetv3._gen_mobilenet_v3(f"{name}_100", model.width, **options)
        return mobilenetv3._gen_mobilenet_v4(name, model.width, **options)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"this version of timm builds {model.name} in another way: {error}") from error


def _create_deeplabv3(model: ModelConfig) -> Any:
    """Builds torchvision's DeepLabv3 head on timm's features, with logits [b, k, h, w] at the size of the image."""
    import timm
    import torch
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    options: dict[str, Any] = dict(features_only=True, out_indices=(4,), output_stride=model.output_stride)
    features: Any = timm.create_model("mobilenetv2_100", **options)

    class DeepLabV3(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = features
            self.head = DeepLabHead(features.feature_info.channels()[-1], model.num_classes, list(model.aspp_rates))

        def forward(self, images: Any) -> Any:
            logits = self.head(self.features(images)[-1])
            return torch.nn.functional.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)

    return DeepLabV3()


def _create_ssdlite(model: ModelConfig) -> Any:
    """Builds torchvision's SSDLite, which maps images to its outputs, or images and boxes to its loss."""
    import torch
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import box_iou

    assert model.num_classes is not None
    ssd: Any = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=model.num_classes + 1)

    class SsdLite(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = ssd.backbone, ssd.head

        def forward(self, images: Any, targets: Any = None) -> Any:
            features = list(self.backbone(images).values())
            outputs = self.head(features)
            if targets is None:
                return outputs
            size = tuple(images.shape[-2:])
            anchors = ssd.anchor_generator(ImageList(images, [size] * len(images)), features)
            objects = [{"boxes": each[:, :4], "labels": each[:, 4].long()} for each in targets]
            matches = [
                ssd.proposal_matcher(box_iou(each["boxes"], own)) for each, own in zip(objects, anchors, strict=True)
            ]
            return sum(ssd.compute_loss(objects, outputs, anchors, matches).values())

    return SsdLite()


_CREATE_DENSE = {"deeplabv3": _create_deeplabv3, "ssdlite": _create_ssdlite}
"""Functions that build torchvision's network with a head."""


def _set_strides(network: Any, model: ModelConfig) -> None:
    """Sets the strides of the config at the five places where timm's network halves its map, in order."""
    import torch

    halving: dict[str, list[Any]] = {}
    for name, module in network.named_modules():
        halves = isinstance(module, torch.nn.Conv2d | torch.nn.MaxPool2d) and module.stride in (2, (2, 2))
        if halves and ".attn." not in name:  # attention halves keys and values, not the map
            halving.setdefault(_block_of(name), []).append(module)
    if len(halving) != len(model.strides):
        raise Unavailable(
            f"timm's {timm_name(model)} halves its map at {len(halving)} places, not {len(model.strides)}"
        )
    for (name, modules), stride in zip(halving.items(), model.strides, strict=True):
        for module in modules:
            module.stride = (stride, stride) if isinstance(module, torch.nn.Conv2d) else stride
        # Our network adds the input if the block keeps its shape. timm decides that when it builds the block, so it is
        # decided again for the new stride. timm's V1 never adds the input, nor do plain convolutions.
        block = network.get_submodule(name)
        if stride == 1 and hasattr(block, "has_skip") and not hasattr(block, "conv") and model.name != "mobilenet_v1":
            convs = [m for path, m in block.named_modules() if isinstance(m, torch.nn.Conv2d) and "se." not in path]
            block.has_skip = convs[0].in_channels == convs[-1].out_channels


def _block_of(module: str) -> str:
    """Returns the block of a module: ``blocks.1.0`` for ``blocks.1.0.conv_dw``, ``layer2.0`` for ``layer2.0.conv1``."""
    parts = module.split(".")
    depth = {"blocks": 3}.get(parts[0], 2 if parts[0].startswith("layer") else 1)
    return ".".join(parts[:depth])


# --- steps ---------------------------------------------------------------------------------------------------


def train_step(settings: Config, model: Any, device: Any, compiled: bool) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns a function that trains on one batch and returns its loss, a tensor; and facts about the step.

    A step normalises the images as timm's loader does, computes the loss (the smoothed cross-entropy, or SSD's) and its
    gradient, clips it, and updates weights and moving average. The batch isn't augmented.
    """
    import torch
    from timm.utils import ModelEmaV3

    optim, accumulate = settings.optim, settings.optim.accumulate_steps
    images, labels = _batch(settings, device)
    pieces = list(zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True))
    mean, std = _statistics(settings, device)
    model.train()
    # A small learning rate, as in the schedule's first steps, keeps the network from diverging while it is timed.
    lr = settings.peak_lr / 100
    tx = optimizer(optim, model, lr)
    average = None if optim.ema_decay is None else ModelEmaV3(model, optim.ema_decay, use_warmup=optim.ema_warmup)
    weights = list(model.parameters())
    called = torch.compile(model) if compiled else model
    autocast = _autocast(settings.model, device.type)
    steps_done = 0

    def step() -> Any:
        nonlocal steps_done
        for uint8, targets in pieces:
            x = uint8.float().sub_(mean).div_(std)
            with autocast():
                loss = _loss(settings, called, x, targets)
            (loss / accumulate if accumulate > 1 else loss).backward()
        if optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, optim.clip_grad_norm)
        tx.step()
        tx.zero_grad(set_to_none=True)
        steps_done += 1
        if average is not None and steps_done % optim.ema_every_steps == 0:
            average.update(model, step=steps_done)
        return loss.detach()

    facts = {
        "optimizer": f"{type(tx).__module__.partition('.')[0]} {type(tx).__name__}",
        "fused": bool(tx.defaults.get("fused")),
        "lr": lr,
        "left_out": left_out(settings),
    }
    return step, facts


def _loss(settings: Config, called: Any, images: Any, targets: Any) -> Any:
    import torch

    if settings.model.head == "ssdlite":
        return called(images, targets)
    logits = called(images)
    return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=settings.loss.label_smoothing)


def left_out(settings: Config) -> list[str]:
    """Lists the work that our train step does and the rival's omits, to the rival's advantage."""
    data, augment = settings.data, settings.augment
    is_on = {
        "shift": data.crop == "shift",
        "flip": data.flip and settings.model.head == "classifier",
        "rotation": augment.rotation_degrees > 0 or augment.shift_fraction > 0,
        "color": augment.color != "none",
        "erasing": augment.erase_probability > 0,
        "mixing": augment.mixup_alpha > 0 or augment.cutmix_alpha > 0,
        "class weights": settings.loss.class_weights != "none",
    }
    return [name for name, on in is_on.items() if on]


def infer_step(settings: Config, model: Any, device: Any, compiled: bool) -> Callable[[], Any]:
    """Returns a function that computes the logits [b, k] of one normalised batch."""
    import torch

    mean, std = _statistics(settings, device)
    images = _batch(settings, device)[0].float().sub_(mean).div_(std)
    model.eval()
    called = torch.compile(model) if compiled else model
    autocast = _autocast(settings.model, device.type)

    def step() -> Any:
        with torch.inference_mode(), autocast():
            return called(images)

    return step


def _batch(settings: Config, device: Any) -> tuple[Any, Any]:
    """Returns random uint8 images [b, 3, h, w], channels-last, and their targets.

    These are labels [b]; for DeepLabv3 [b, h, w]; for SSDLite [b, n, 5], x0, y0, x1, y1 in pixels and the label, which
    counts from 1, for `DataConfig.max_boxes` boxes.
    """
    import torch

    data, classes = settings.data, settings.model.num_classes
    assert classes is not None
    size = data.train_size
    images = torch.randint(256, (data.batch_size, 3, *size), dtype=torch.uint8)
    if settings.model.head == "ssdlite":
        corners = torch.rand(data.batch_size, data.max_boxes, 2, 2).sort(dim=2).values
        boxes = (corners * torch.tensor(size[::-1])).flatten(2)
        numbers = torch.randint(1, classes + 1, (*boxes.shape[:2], 1))
        targets = torch.cat([boxes, numbers], 2)
    else:
        targets = torch.randint(classes, (data.batch_size, *(() if settings.model.head == "classifier" else size)))
    return images.to(device, memory_format=torch.channels_last), targets.to(device)


def _statistics(settings: Config, device: Any) -> tuple[Any, Any]:
    """Returns mean and standard deviation [1, 3, 1, 1] for pixels from 0 to 255."""
    import torch

    mean, std = (255 * torch.tensor(x).view(1, 3, 1, 1) for x in (settings.data.mean, settings.data.std))
    return mean.to(device), std.to(device)


def _autocast(model: ModelConfig, kind: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    import torch

    if model.dtype == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(kind, dtype=torch.bfloat16)


def _precision(model: ModelConfig, kind: str) -> str:
    import torch

    if model.dtype == "bfloat16":
        return "autocast to bfloat16, float32 weights"
    if kind != "cuda":
        return "float32"
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return f"float32; TF32 in convolutions: {convolutions}, in matrix products: {products} (PyTorch's defaults)"


def _no_wait() -> None:
    """Takes the place of `torch.cuda.synchronize` on the CPU, where each call has finished when it returns."""


# --- the optimiser -------------------------------------------------------------------------------------------


def optimizer(optim: OptimConfig, model: Any, lr: float) -> Any:
    """Builds PyTorch's or timm's optimiser that computes the same update as ours, in its fastest implementation.

    Args:
      optim: config of the optimiser, see `training.optim`; the caller clips the gradient.
      model: network whose parameters are optimised, in two groups: with and without weight decay.
      lr: learning rate, a constant.

    Raises:
      Unavailable: if neither PyTorch nor timm has such an optimiser.
    """
    import torch

    if optim.name not in _OPTIMIZERS:
        raise Unavailable(f"optim.name={optim.name}: the rival only has {', '.join(_OPTIMIZERS)}")
    decayed = decayed_parameters(model, optim.weight_decay_on)
    decayed_ids = {id(p) for p in decayed}
    undecayed = [p for p in model.parameters() if id(p) not in decayed_ids]
    decay = optim.weight_decay
    if optim.l2:
        if optim.name != "adamw" or optim.weight_decay:
            raise Unavailable(
                f"optim.l2={optim.l2:g}: PyTorch has it only in Adam, with optim.name=adamw and optim.weight_decay=0"
            )
        decay = optim.l2
    groups: list[dict[str, Any]] = [dict(params=decayed, weight_decay=decay), dict(params=undecayed, weight_decay=0.0)]
    tx = _OPTIMIZERS[optim.name](optim, [group for group in groups if group["params"]], lr)
    assert isinstance(tx, torch.optim.Optimizer)
    return tx


def decayed_parameters(model: Any, decay_on: str) -> list[Any]:
    """Returns the parameters with weight decay, by the rule ``decay_on`` of `training.optim.decay_mask`.

    LayerScale counts as a vector, but not as a norm.
    """
    import torch

    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d)
        for p in module.parameters()
    }
    depthwise = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d) and module.groups == module.in_channels > 1
    }
    rules: dict[str, Callable[[Any], bool]] = {
        "all": lambda p: True,
        "no_norm": lambda p: id(p) not in norms,
        "no_norm_bias": lambda p: p.ndim > 1,
        "no_depthwise": lambda p: p.ndim > 1 and id(p) not in depthwise,
    }
    return list(filter(rules[decay_on], model.parameters()))


_Groups = Iterable[dict[str, Any]]


def _sgd(optim: OptimConfig, groups: _Groups, lr: float) -> Any:
    import torch

    nesterov = optim.nesterov and optim.momentum > 0
    return torch.optim.SGD(groups, lr, optim.momentum, nesterov=nesterov, fused=True)


def _rmsprop(optim: OptimConfig, groups: _Groups, lr: float) -> Any:
    """Builds RMSProp. The initial mean square (`rms_init`) doesn't affect the time, so either library's will do."""
    import torch
    from timm.optim import RMSpropTF

    options: dict[str, Any] = dict(alpha=optim.rms_decay, eps=optim.epsilon, momentum=optim.momentum)
    if optim.epsilon_in_sqrt:
        return RMSpropTF(groups, lr, lr_in_momentum=optim.lr_in_momentum, **options)
    if optim.momentum and optim.lr_in_momentum:
        raise Unavailable("optim.epsilon_in_sqrt=False with optim.lr_in_momentum=True: neither PyTorch nor timm has it")
    return torch.optim.RMSprop(groups, lr, foreach=True, **options)


def _adamw(optim: OptimConfig, groups: _Groups, lr: float) -> Any:
    import torch

    kind = torch.optim.Adam if optim.l2 else torch.optim.AdamW
    return kind(groups, lr, (optim.b1, optim.b2), optim.epsilon, fused=True)


_OPTIMIZERS: Mapping[str, Callable[[OptimConfig, _Groups, float], Any]] = {
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adamw": _adamw,
}
