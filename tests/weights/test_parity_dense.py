"""Dense networks of other libraries with random weights, through their files: logits and those of the whole image."""

import jax
import numpy as np
import pytest

from mnv2_jax.data.mask_classes import VOC
from mnv2_jax.nn.resize import resize_bilinear
from mnv2_jax.tasks.predictor import Predictor
from mnv2_jax.weights.file import read_weights, save_weights
from mnv2_jax.weights.load import load_weights
from tests.weights import parity
from tests.weights.test_parity_torch import corenet_conv, corenet_v2, randomised, saved, sequential, torch

pytestmark = pytest.mark.parity
SIZE = (139, 183)


@pytest.fixture
def segmentation(operators):
    return pytest.importorskip("torchvision", reason="pip install .[parity]").models.segmentation


def check(weights, model, whole, tmp_path):
    """Compares logits at the size of the image; `whole` computes theirs from [b, 3, h, w]."""
    save_weights(tmp_path / "ours.safetensors", *weights)
    read = read_weights(tmp_path / "ours.safetensors")
    assert (read.model, read.info) == (weights.model, weights.info)
    x = parity.images(SIZE)
    with torch.no_grad():
        theirs = whole(model, torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).permute(0, 2, 3, 1).numpy()
    align_corners = read.model.options.align_corners

    @jax.jit
    def ours(variables, x):
        outputs, _ = read.model.apply(variables, x)
        return resize_bilinear(outputs["logits"], SIZE, align_corners=align_corners)

    off = parity.difference(ours(read.variables, x), theirs)
    spread = np.abs(theirs[0] - theirs[1]).max() / np.abs(theirs).max()
    assert spread > 0.05
    print(f"{read.model.name} {read.model.options.head}: {off:.1e}")
    assert off < parity.TOLERANCE


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("head", ["lraspp", "deeplabv3"])
def test_torchvision(head, has_aux, segmentation, tmp_path):
    if head == "lraspp" and has_aux:
        pytest.skip("torchvision's LR-ASPP has no auxiliary head")
    aux = {"aux_loss": has_aux} if head == "deeplabv3" else {}
    make = getattr(segmentation, f"{head}_mobilenet_v3_large")
    model = randomised(make(weights=None, weights_backbone=None, **aux))
    weights = load_weights(saved(model, tmp_path / "model.pth"))
    options = weights.model.options
    assert (options.head, options.output_stride, options.padding) == (head, 16, "symmetric")
    assert options.head_channels == (128 if head == "lraspp" else 256)
    assert (weights.info.task, weights.info.labels, weights.info.source) == ("segmentation", VOC, "torchvision")
    assert any("auxiliary" in note for note in weights.info.notes) == has_aux
    check(weights, model, lambda model, x: model(x)["out"], tmp_path)


@pytest.mark.parametrize(("output_stride", "is_tf"), [(8, True), (16, True), (16, False)])
def test_transformers(output_stride, is_tf, operators, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    config = transformers.MobileNetV2Config(output_stride=output_stride, tf_padding=is_tf, num_labels=21)
    model = randomised(transformers.MobileNetV2ForSemanticSegmentation(config))
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    weights = load_weights(saved(model, tmp_path / "model.safetensors"))
    options = weights.model.options
    assert (options.output_stride, options.padding) == (output_stride, "same" if is_tf else "symmetric")
    assert (options.aspp_rates, options.head_channels, options.align_corners) == ((), 256, True)
    assert (weights.info.labels, weights.info.preprocessing.mean) == (VOC, (0.5, 0.5, 0.5))
    check(weights, model, lambda model, x: resized(model(x).logits), tmp_path)


def resized(logits):
    return torch.nn.functional.interpolate(logits, size=SIZE, mode="bilinear", align_corners=True)


class CoreNetAspp(torch.nn.Module):
    """corenet/modeling/modules/aspp_block.py."""

    def __init__(self, before, after, rates):
        super().__init__()
        act = torch.nn.ReLU()
        self.convs = torch.nn.ModuleList([corenet_conv(before, after, 1, act=act)])
        for rate in rates:
            self.convs.append(dilated(corenet_conv(before, after, 3, act=act), rate))
        pool = sequential(global_pool=torch.nn.AdaptiveAvgPool2d(1), conv_1x1=corenet_conv(before, after, 1, act=act))
        self.convs.append(sequential(aspp_pool=pool))
        self.project = corenet_conv(after * len(self.convs), after, 1, act=act)

    def forward(self, x):
        *maps, pooled = [conv(x) for conv in self.convs]
        return self.project(torch.cat([*maps, pooled.expand(maps[0].shape)], 1))


class CoreNetDeepLabv3(torch.nn.Module):
    """corenet/modeling/models/segmentation/enc_dec.py with heads/deeplabv3.py, on MobileNetV2 at output stride 8."""

    def __init__(self, classes, has_aux):
        super().__init__()
        layers = dict(corenet_v2().named_children())
        self.encoder = sequential(conv_1=layers["conv_1"], **{f"layer_{i}": layers[f"layer_{i}"] for i in range(1, 6)})
        for layer, before, after in (("layer_4", 1, 2), ("layer_5", 2, 4)):
            for place, block in enumerate(layers[layer]):
                depthwise = dilated(block.block.conv_3x3, after if place else before)
                depthwise.block.conv.stride = (1, 1)
        self.seg_head = sequential(
            aspp=sequential(aspp_layer=CoreNetAspp(320, 512, (12, 24, 36))), classifier=self.one_by_one(512, classes)
        )
        if has_aux:
            aux = corenet_conv(96, 128, 3, act=torch.nn.ReLU())
            self.seg_head.aux_head = torch.nn.Sequential(aux, torch.nn.Dropout2d(0.1), self.one_by_one(128, classes))

    @staticmethod
    def one_by_one(before, after):
        return sequential(block=sequential(conv=torch.nn.Conv2d(before, after, 1)))

    def forward(self, x):
        return self.seg_head.classifier(self.seg_head.aspp(self.encoder(x)))


def dilated(conv, rate):
    conv.block.conv.dilation = conv.block.conv.padding = (rate, rate)
    return conv


@pytest.mark.parametrize("has_aux", [True, False])
def test_corenet(has_aux, tmp_path):
    model = CoreNetDeepLabv3(150, has_aux)
    if not has_aux:
        assert sum(parameter.numel() for parameter in model.parameters()) == 7_956_886
    weights = load_weights(saved(randomised(model), tmp_path / "model.pt"))
    options = weights.model.options
    assert (options.head_channels, options.aspp_rates, options.output_stride) == (512, (12, 24, 36), 8)
    assert (options.align_corners, options.aux_head, weights.info.labels) == (True, has_aux, ())
    assert sum(leaf.size for leaf in jax.tree.leaves(weights.variables["params"])) == sum(
        parameter.numel() for parameter in model.parameters()
    )
    check(weights, model, lambda model, x: resized(model(x)), tmp_path)


def test_torchvision_ssdlite(segmentation, tmp_path, monkeypatch):
    """Raw outputs in torchvision's order, and the boxes after its post-processing with a plain suppression."""
    import torchvision

    def plain_nms(boxes, scores, labels, threshold):
        """Greedy suppression within each class."""
        order, kept = scores.argsort(descending=True, stable=True).tolist(), []
        shared = torchvision.ops.box_iou(boxes, boxes)
        for row in order:
            if all(labels[row] != labels[other] or shared[row, other] <= threshold for other in kept):
                kept.append(row)
        return torch.tensor(kept, dtype=torch.long)

    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", plain_nms)
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=6
    )

    def raw(x):
        return model.head(list(model.backbone(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).values()))

    randomised(model, lambda: raw(parity.images((320, 320))))
    weights = load_weights(saved(model, tmp_path / "model.pth"), labels=tuple("abcde"))
    options, info = weights.model.options, weights.info
    assert (options.head, options.anchors, options.reduced_tail, weights.model.num_classes) == (
        *("ssdlite", "torchvision", "torchvision"),
        5,
    )
    assert (info.task, info.preprocessing.resolution, info.preprocessing.mean) == ("detection", 320, (0.5, 0.5, 0.5))
    x = parity.images((320, 320))
    with torch.no_grad():
        theirs = raw(x)
    outputs, _ = jax.jit(weights.model.apply)(weights.variables, x)
    assert parity.difference(outputs["logits"], theirs["cls_logits"].numpy()) < parity.TOLERANCE
    codes = theirs["bbox_regression"].numpy()[..., [1, 0, 3, 2]]
    assert parity.difference(outputs["boxes"], codes) < parity.TOLERANCE
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (320, 320, 3), dtype=np.uint8) for _ in range(2)]  # nothing is resized
    with torch.no_grad():
        found = model([torch.from_numpy(picture.transpose(2, 0, 1) / np.float32(255)) for picture in pictures])
    for ours, its in zip(Predictor(weights).arrays(pictures), found, strict=True):
        count = len(its["scores"])
        assert count > 20
        np.testing.assert_allclose(ours["probability"][:count], its["scores"], atol=1e-4)
        assert (ours["probability"][count:] == 0).all()
        same = ours["class"][:count] + 1 == its["labels"].numpy()
        assert same.mean() > 0.98  # neighbours of nearly equal scores may change places
        np.testing.assert_allclose(ours["box"][:count][same][:, [1, 0, 3, 2]], its["boxes"].numpy()[same], atol=1.0)
