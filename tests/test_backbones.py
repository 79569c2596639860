"""Pretrained classifiers: EfficientNet-Lite0 against recorded outputs, ResNet-18 against torch with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import importers
from jaxad.importers import WeightsError
from jaxad.nn import convnorm, efficientnet, resnet
from jaxad.nn.conv import lowering_for
from jaxad.nn.init import init_flat


def close(found, expected, tolerance):
    """On the scale of the array: what comes after many layers has rounding of their largest values."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_efficientnet_gives_the_recorded_features(shared):
    weights = shared / "weights"
    variables = efficientnet.from_torch(importers.read(weights / "efficientnet_lite0_imagenet.npz"))
    seen = importers.read(weights / "efficientnet_lite0_reference.npz")
    network = efficientnet.EfficientNetLite0()

    @jax.jit
    def run(variables, pictures):
        x = efficientnet.normalise(pictures.astype(jnp.float32) / 255)
        stages = [network.apply(variables, x[:1], s, method="features") for s in (0, 1, 2, 3, 5, 7)]
        return stages, network.apply(variables, x), network.apply(variables, x, method="logits")

    stages, pooled, logits = run(variables, seen["input_uint8_nhwc"])
    for name, stage in zip(("stem", "block0", "block2", "block4", "block10", "block15"), stages, strict=True):
        close(stage, np.moveaxis(seen[name], 1, -1), 1e-5)
    np.testing.assert_allclose(pooled, seen["pooled"], atol=1e-3)
    np.testing.assert_allclose(logits, seen["logits"], atol=1e-3)
    assert list(np.argmax(logits, axis=1)) == [967, 285, 783, 898]


def torch_resnet18():
    """ResNet-18 with torchvision's layers and names."""
    torch = pytest.importorskip("torch")
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            projection = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            self.downsample = projection if inputs != width else None

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
            inputs = 64
            for number, width in enumerate((64, 128, 256, 512), 1):
                first = Block(inputs, width, 1 if number == 1 else 2)
                setattr(self, f"layer{number}", nn.Sequential(first, Block(width, width, 1)))
                inputs = width
            self.fc = nn.Linear(512, 1000)

        def forward(self, x):
            x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            stages = [x]
            for number in range(1, 5):
                stages.append(getattr(self, f"layer{number}")(stages[-1]))
            pooled = stages[-1].mean(dim=(2, 3))
            return [x.permute(0, 2, 3, 1) for x in stages], pooled, self.fc(pooled)

    torch.manual_seed(0)
    model = ResNet().eval()
    for layer in model.modules():  # statistics away from 0 and 1, so that a mistake in them shows
        if isinstance(layer, nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.1)
    return torch, model


def test_resnet_equals_torch(tmp_path):
    """Every stage, from a file that torch wrote, for odd sizes too: 65 pixels, the largest patch of a teacher."""
    torch, model = torch_resnet18()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    variables = resnet.from_torch(importers.read(tmp_path / "resnet18.pth"), origin="resnet18.pth")
    network, picture = resnet.ResNet18(), np.random.default_rng(0).normal(size=(2, 65, 70, 3)).astype("f")

    @jax.jit
    def run(variables, x):
        stages = [network.apply(variables, x, s, method="features") for s in range(5)]
        return stages, network.apply(variables, x), network.apply(variables, x, method="logits")

    with torch.no_grad():
        their_stages, their_pooled, their_logits = model(torch.from_numpy(np.moveaxis(picture, -1, 1).copy()))
    stages, pooled, logits = run(variables, picture)
    for ours, theirs in zip(stages, their_stages, strict=True):
        close(ours, theirs.numpy(), 2e-5)
    close(pooled, their_pooled.numpy(), 2e-5)
    close(logits, their_logits.numpy(), 2e-5)
    counted = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert counted == 11_689_512  # torchvision's number


@pytest.mark.parametrize(
    ("module", "network", "name", "shape"),
    [
        (resnet, "ResNet18", "layer2.0.downsample.1.running_var", "128,"),
        (efficientnet, "EfficientNetLite0", "_blocks.1._depthwise_conv.weight", "96, 1, 3, 3"),
    ],
)
def test_imported_variables_are_those_of_the_network(module, network, name, shape, monkeypatch):
    """The same names and shapes as a network drawn at random; an array that is missing or misshapen is named."""
    arrays = {}

    def note(given, wanted, size, *, origin):
        return arrays.setdefault(wanted, np.zeros(size, "f"))

    class Everything(dict):
        def __contains__(self, key):
            return True

    monkeypatch.setattr(convnorm, "take", note)
    imported = module.from_torch(Everything())
    monkeypatch.undo()
    picture = jnp.zeros((1, 33, 33, 3))
    model = getattr(module, network)()
    drawn = jax.eval_shape(lambda: init_flat(jax.random.key(0), model, picture, method="logits"))
    assert jax.tree.map(lambda leaf: leaf.shape, imported) == jax.tree.map(lambda leaf: leaf.shape, drawn)
    with pytest.raises(WeightsError, match=f"my file: has no array '{name}'; expected one of shape .{shape}"):
        module.from_torch({k: v for k, v in arrays.items() if k != name}, origin="my file")
    with pytest.raises(WeightsError, match=f"{name} has shape .7,.; expected .{shape}"):
        module.from_torch({**arrays, name: np.zeros(7)})


@pytest.mark.parametrize(("taps", "stride", "size"), [(3, 2, (9, 8)), (5, 1, (6, 7))])
def test_depthwise_forms_agree(taps, stride, size):
    """Shifted sums on CPU, a grouped convolution elsewhere; TensorFlow's padding against XLA's own."""
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, *size, 6), (taps, taps, 6)]))
    padding = tuple(convnorm.same_padding(n, taps=taps, stride=stride) for n in size)
    assert list(padding) == jax.lax.padtype_to_pads(size, (taps, taps), (stride, stride), "SAME")
    results = []
    for platform in ("cpu", "gpu"):
        with lowering_for(platform=platform):
            traced = jax.jit(lambda x, k: convnorm.depthwise(x, k, stride=stride, padding=padding)).trace(x, kernel)
            assert ("conv_general_dilated" in str(traced.jaxpr)) == (platform == "gpu")
            results.append(traced.lower().compile()(x, kernel))
    np.testing.assert_allclose(*results, atol=2e-6)
