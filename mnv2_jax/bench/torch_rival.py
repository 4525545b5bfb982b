"""The same network, batch, precision and optimiser in PyTorch, with timm's networks: what a user would have instead.

It runs in a process of its own, which never loads JAX. Where PyTorch has a choice that costs nothing, the rival gets
the faster one: channels-last, cuDNN's search for algorithms, fused optimisers, zeros around the map instead of
TensorFlow's padding.
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
"""Names of our networks in timm, without the width."""
WARM_UP = 3
"""Steps before the clock: compilation, cuDNN's search, the optimiser's state."""


class Unavailable(Exception):  # noqa: N818  an answer, not a failure
    """Why the rival can't run, in one line."""


class Rival(NamedTuple):
    """A network on its device, ready to be timed."""

    turn: Callable[[int], float]
    """Computes so many batches back to back and returns the seconds for all of them, the device's work included."""
    peak_bytes: Callable[[], int | None]
    """Most device memory that was in use since `build` ended, weights and optimiser included; None on the CPU."""
    facts: dict[str, Any]
    """Facts about what ran, fit for JSON."""


def build(settings: Config, *, what: Literal["train", "infer"], compiled: bool, params: int) -> Rival:
    """Makes the rival and warms it up.

    Args:
      settings: of ours; ``model.num_classes`` is set.
      what: train: uint8 images and labels that stay on the device to new weights. infer: normalised float images that
        stay there to logits.
      compiled: the network goes through ``torch.compile``.
      params: trainable values of our network, which the rival's must equal.

    Raises:
      Unavailable: if PyTorch or timm has no such thing, or can't run or compile it here.
    """
    timm = import_timm()
    import torch

    check(settings, what)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(settings.seed)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else _nothing
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
    model = network(settings.model, settings.norm, params)
    begun = time.perf_counter()
    try:
        model = model.to(device, memory_format=torch.channels_last)
        if what == "train":
            step, told = train_step(settings, model, device, compiled)
            facts |= told
        else:
            step = infer_step(settings, model, device, compiled)
        for _ in range(WARM_UP):
            step()
        synchronise()
    except Unavailable:
        raise
    except Exception as error:
        # What is missing (a C++ compiler, Triton, memory) has as many exceptions as there are places that miss it; an
        # eager step that fails otherwise is a bug of this file.
        if not compiled and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        doing = "torch.compile failed" if compiled else "out of memory"
        raise Unavailable(f"{doing}: {type(error).__name__}: {_line(error)}") from error
    if compiled:
        facts["compile_seconds"] = time.perf_counter() - begun
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the search for algorithms needs more than what it finds

    def turn(steps: int) -> float:
        synchronise()
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise()
        return time.perf_counter() - begun

    def peak_bytes() -> int | None:
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    return Rival(turn, peak_bytes, facts)


_OPERATORS: list[Any] = []
"""Operators that `import_timm` defines; they last as long as the object."""


def import_timm() -> Any:
    """timm, which imports torchvision, of which the rival uses nothing.

    Raises:
      Unavailable: if it or PyTorch isn't installed, or they don't go together.
    """
    try:
        import torch

        try:
            import timm
        except RuntimeError as error:
            # Beside a CPU build of PyTorch pip has a torchvision for CUDA, whose operators can't be loaded and are
            # missed when it is imported.
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
    """The first line of what it says, or else its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check(settings: Config, what: Literal["train", "infer"]) -> None:
    """Raises `Unavailable` for what the rival has no counterpart of."""
    model = settings.model
    reasons = {
        f"timm has no {model.name}": model.name not in NETWORKS,
        "model.num_classes is not set": model.num_classes is None,
        "model.dtype=float64 is for tests, not for speed": model.dtype == "float64",
        f"model.output_stride={model.output_stride} is not built in timm's network": model.output_stride != 32,
        "timm's MobileNetV1 has no model.width_rule=corenet": model.name == "mobilenet_v1"
        and model.width_rule == "corenet",
    }
    if what == "train":
        reasons |= {
            "data.scales: its batches have one size": bool(settings.data.scales),
            "distill: it has no teacher": bool(settings.distill.teacher or settings.distill.logits),
            "finetune.train_from: it trains the whole network": settings.finetune.train_from != ("stem",),
        }
    for reason, holds in reasons.items():
        if holds:
            raise Unavailable(reason)


def timm_name(model: ModelConfig) -> str:
    """Name of the network in timm, with the width in percent: ``mobilenetv2_035``."""
    name = NETWORKS[model.name]
    is_whole = name == "resnet50" or (name.startswith("mobilenetv4") and model.width == 1)
    return name if is_whole else f"{name}_{round(100 * model.width):03d}"


# --- the network ---------------------------------------------------------------------------------------------


def network(model: ModelConfig, norm: Any, params: int) -> Any:
    """timm's network of our name, width, strides, dropout and norm.

    Args:
      model: of a name in `NETWORKS`.
      norm: `mnv2_jax.config.NormConfig`.
      params: as for `build`.

    Returns:
      A ``torch.nn.Module`` of random weights from images [b, 3, h, w] to logits [b, k].

    Raises:
      Unavailable: if timm rounds the channels otherwise.
    """
    import torch

    made = _made(model)
    theirs = sum(p.numel() for p in made.parameters())
    if theirs != params:
        raise Unavailable(
            f"{timm_name(model)} has {theirs:,} parameters and our {model.name} {params:,}: not the same network"
            f" (model.width={model.width:g}, model.width_rule={model.width_rule})"
        )
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.momentum, module.eps = 1 - norm.decay, norm.epsilon
    _set_strides(made, model)
    return made


def _made(model: ModelConfig) -> Any:
    import timm

    options: dict[str, Any] = dict(num_classes=model.num_classes, drop_rate=model.dropout)
    options |= dict(drop_path_rate=model.drop_path)
    if model.name == "resnet50":
        return timm.create_model("resnet50", **options)
    if model.activation:
        options["act_layer"] = model.activation
    # timm's entry points fix the width, and what they call is private; a variant without published weights would be
    # warned of, so all widths are built under the name of the whole network.
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
        raise Unavailable(f"this version of timm builds {model.name} otherwise: {error}") from error


def _set_strides(made: Any, model: ModelConfig) -> None:
    """Gives the five places where timm's network halves its map, in order, the strides of the config."""
    import torch

    halving: dict[str, list[Any]] = {}
    for name, module in made.named_modules():
        windowed = isinstance(module, torch.nn.Conv2d | torch.nn.MaxPool2d) and module.stride in (2, (2, 2))
        if windowed and ".attn." not in name:  # attention halves keys and values, not the map
            halving.setdefault(_block_of(name), []).append(module)
    if len(halving) != len(model.strides):
        raise Unavailable(
            f"timm's {timm_name(model)} halves its map at {len(halving)} places, not {len(model.strides)}"
        )
    for (name, modules), stride in zip(halving.items(), model.strides, strict=True):
        for module in modules:
            module.stride = (stride, stride) if isinstance(module, torch.nn.Conv2d) else stride
        # Where the map stays, ours adds the input of equal shape, which timm decides as it builds. Its V1 never does,
        # nor do plain convolutions.
        block = made.get_submodule(name)
        if stride == 1 and hasattr(block, "has_skip") and not hasattr(block, "conv") and model.name != "mobilenet_v1":
            convs = [of for at, of in block.named_modules() if isinstance(of, torch.nn.Conv2d) and "se." not in at]
            block.has_skip = convs[0].in_channels == convs[-1].out_channels


def _block_of(module: str) -> str:
    """``blocks.1.0`` of ``blocks.1.0.conv_dw``, ``layer2.0`` of ``layer2.0.downsample.0``."""
    parts = module.split(".")
    depth = {"blocks": 3}.get(parts[0], 2 if parts[0].startswith("layer") else 1)
    return ".".join(parts[:depth])


# --- steps ---------------------------------------------------------------------------------------------------


def train_step(settings: Config, model: Any, device: Any, compiled: bool) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A function that trains on one batch and returns its loss, a tensor; and facts.

    Normalised as in timm's loader, smoothed cross-entropy, clipping, the optimiser, the moving average; the batch isn't
    augmented.
    """
    import torch
    from timm.utils import ModelEmaV3

    optim, accumulate = settings.optim, settings.optim.accumulate_steps
    images, labels = _batch(settings, device)
    pieces = list(zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True))
    mean, std = _statistics(settings, device)
    model.train()
    # The schedule's first steps have less than the peak, too; a network that has diverged isn't what is to be timed.
    lr = settings.peak_lr / 100
    tx = optimizer(optim, model, lr)
    average = None if optim.ema_decay is None else ModelEmaV3(model, optim.ema_decay, use_warmup=optim.ema_warmup)
    weights = list(model.parameters())
    called = torch.compile(model) if compiled else model
    autocast = _autocast(settings.model, device.type)
    done = 0

    def step() -> Any:
        nonlocal done
        for uint8, targets in pieces:
            x = uint8.float().sub_(mean).div_(std)
            with autocast():
                loss = torch.nn.functional.cross_entropy(
                    called(x), targets, label_smoothing=settings.loss.label_smoothing
                )
            (loss / accumulate if accumulate > 1 else loss).backward()
        if optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, optim.clip_grad_norm)
        tx.step()
        tx.zero_grad(set_to_none=True)
        done += 1
        if average is not None and done % optim.ema_every_steps == 0:
            average.update(model, step=done)
        return loss.detach()

    facts = {
        "optimizer": f"{type(tx).__module__.partition('.')[0]} {type(tx).__name__}",
        "fused": bool(tx.defaults.get("fused")),
        "lr": lr,
        "left_out": left_out(settings),
    }
    return step, facts


def left_out(settings: Config) -> list[str]:
    """Work of our train step that the rival's doesn't do, to the rival's advantage."""
    data, augment = settings.data, settings.augment
    does = {
        "shift": data.crop == "shift",
        "flip": data.flip,
        "rotation": augment.rotation_degrees > 0 or augment.shift_fraction > 0,
        "color": augment.color != "none",
        "erasing": augment.erase_probability > 0,
        "mixing": augment.mixup_alpha > 0 or augment.cutmix_alpha > 0,
        "class weights": settings.loss.class_weights != "none",
    }
    return [name for name, asked in does.items() if asked]


def infer_step(settings: Config, model: Any, device: Any, compiled: bool) -> Callable[[], Any]:
    """A function that returns the logits [b, k] of one normalised batch."""
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
    """Random uint8 images [b, 3, h, w], channels-last, and labels [b]."""
    import torch

    data, classes = settings.data, settings.model.num_classes
    assert classes is not None
    images = torch.randint(256, (data.batch_size, 3, data.resolution, data.resolution), dtype=torch.uint8)
    labels = torch.randint(classes, (data.batch_size,))
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def _statistics(settings: Config, device: Any) -> tuple[Any, Any]:
    """Mean and deviation [1, 3, 1, 1] of pixels from 0 to 255."""
    import torch

    mean, std = (255 * torch.tensor(of).view(1, 3, 1, 1) for of in (settings.data.mean, settings.data.std))
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


def _nothing() -> None:
    """On the CPU a call has computed when it returns."""


# --- the optimiser -------------------------------------------------------------------------------------------


def optimizer(optim: OptimConfig, model: Any, lr: float) -> Any:
    """PyTorch's or timm's optimiser of the same sums as ours, by the fastest implementation that it has.

    Args:
      optim: as in `training.optim`; clipping is the caller's.
      model: whose parameters it gets, in two groups.
      lr: a constant.

    Raises:
      Unavailable: if neither has it.
    """
    import torch

    if optim.name not in _OPTIMIZERS:
        raise Unavailable(f"optim.name={optim.name}: the rival has {', '.join(_OPTIMIZERS)}")
    decayed = decayed_parameters(model, optim.weight_decay_on)
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    decay = optim.weight_decay
    if optim.l2:
        if optim.name != "adamw" or optim.weight_decay:
            raise Unavailable(f"optim.l2={optim.l2:g}: PyTorch has it in Adam only, without a decoupled weight decay")
        decay = optim.l2
    groups: list[dict[str, Any]] = [dict(params=decayed, weight_decay=decay), dict(params=rest, weight_decay=0.0)]
    made = _OPTIMIZERS[optim.name](optim, [group for group in groups if group["params"]], lr)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def decayed_parameters(model: Any, decayed: str) -> list[Any]:
    """Parameters with weight decay, as in `training.optim.decay_mask`: LayerScale is a vector, but no norm."""
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
    return list(filter(rules[decayed], model.parameters()))


_Groups = Iterable[dict[str, Any]]


def _sgd(optim: OptimConfig, groups: _Groups, lr: float) -> Any:
    import torch

    nesterov = optim.nesterov and optim.momentum > 0
    return torch.optim.SGD(groups, lr, optim.momentum, nesterov=nesterov, fused=True)


def _rmsprop(optim: OptimConfig, groups: _Groups, lr: float) -> Any:
    """RMSProp of the rival. The start of the mean square (`rms_init`) costs no time, so either library's will do."""
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
