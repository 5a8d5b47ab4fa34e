"""What every feature network keeps to, and the files that the small ones are read from."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tatok_model.metrics.extractors.extractor import FeatureExtractor, TrainableExtractor
from tatok_model.metrics.extractors.small_networks import (
    ARCHITECTURES,
    PREFIX,
    SHIPPED,
    CifarResNet,
    CompactExtractor,
    ResNet20,
    ResNet56,
    SmallResNet,
    load_trained,
)

TRAINED = pytest.mark.parametrize("kind", [CompactExtractor, SmallResNet])


@pytest.fixture(scope="module", params=["compact, shipped", "resnet20"])
def network(request: pytest.FixtureRequest) -> FeatureExtractor:
    torch.manual_seed(0)
    return ResNet20() if request.param == "resnet20" else CompactExtractor.shipped()


@pytest.fixture(scope="module")
def shipped() -> CompactExtractor:
    return CompactExtractor.shipped()


def made_pictures(count: int, side: int = 32) -> Tensor:
    """Smooth colour fields: (count, 3, side, side) uint8."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (255 * F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)).to(torch.uint8)


def relative_distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_the_outputs_have_the_promised_shapes_and_types(network: FeatureExtractor) -> None:
    features, logits = network(made_pictures(3))
    assert features.shape == (3, network.feature_dim)
    assert logits.shape == (3, network.classes)
    assert features.dtype == logits.dtype == torch.float32


def test_a_picture_has_the_same_features_in_any_batch_and_memory_layout(network: FeatureExtractor) -> None:
    pictures = made_pictures(7)
    together, _ = network(pictures)
    alone = torch.cat([network(picture[None])[0] for picture in pictures])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert torch.equal(network(pictures)[0], together)
    channels_last = pictures.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(channels_last)[0], together)


def test_a_larger_picture_is_resized_with_antialiasing(network: FeatureExtractor) -> None:
    """A checkerboard of single pixels becomes grey; picking pixels would make it black or white."""
    fields = (torch.arange(96)[:, None] + torch.arange(96)) % 2
    checkerboard = (255 * fields).to(torch.uint8).expand(1, 3, 96, 96)
    grey, white = (network(torch.full((1, 3, 32, 32), value, dtype=torch.uint8))[0] for value in (127, 255))
    assert relative_distance(network(checkerboard)[0], grey) < 0.2 * relative_distance(white, grey)


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 3, 32, 32), torch.zeros(3, 32, 32).byte(), torch.zeros(2, 1, 32, 32).byte()],
    ids=["float", "no batch", "one channel"],
)
def test_other_inputs_than_uint8_pictures_are_refused(network: FeatureExtractor, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) uint8, got \("):
        network(images)


def test_an_extractor_without_forward_says_which_one() -> None:
    class Unfinished(FeatureExtractor):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished does not implement"):
        Unfinished()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_the_shipped_file_is_small_and_says_how_it_was_made(repository: Path, shipped: CompactExtractor) -> None:
    weights = repository / "tatok_model" / "weights" / SHIPPED
    assert weights.stat().st_size <= 2_000_000
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    assert "jobs/train_extractor.py extractor_cifar10" in metadata["command"]
    assert len(metadata["commit"]) == 40
    assert 0.85 < float(metadata["test_accuracy"]) < 1
    assert shipped.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (shipped.name, load_trained(weights).name) == ("compact_cifar10", "compact_32px")


def test_noise_moves_the_mean_feature_further_the_stronger_it_is(shipped: CompactExtractor) -> None:
    pictures = made_pictures(64)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    clean = shipped(pictures)[0].mean(0)
    noisy = [(pictures + level * noise).clamp(0, 255).to(torch.uint8) for level in (5, 20, 60)]
    distances = [relative_distance(shipped(images)[0].mean(0), clean) for images in noisy]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_a_smooth_picture_keeps_its_features_at_twice_the_size(shipped: CompactExtractor) -> None:
    pictures = made_pictures(8)
    doubled = pictures.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert relative_distance(shipped(doubled)[0], shipped(pictures)[0]) < 0.15


@TRAINED
@pytest.mark.parametrize(("side", "places"), [(16, None), (32, 4), (64, 4), (128, 4)])
def test_larger_pictures_meet_a_longer_stem(kind: type[TrainableExtractor], side: int, places: int | None) -> None:
    made = kind(7, side).eval()
    features, logits = made(made_pictures(2, side))
    assert features.shape == (2, kind.feature_dim)
    assert logits.shape == (2, 7)
    if places:
        assert made.layers(torch.zeros(1, 3, side, side)).shape[2:] == (places, places)


@TRAINED
def test_a_file_gives_back_the_network_and_its_name(kind: type[TrainableExtractor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = kind(5, 64)
    made(made_pictures(8))  # moves the normalisation's running statistics
    made.save(tmp_path / "a.safetensors", {"test_accuracy": "0.5"})
    loaded = load_trained(tmp_path / "a.safetensors")
    assert type(loaded) is kind
    assert loaded.name == f"{kind.architecture}_64px"
    assert (loaded.classes, loaded.image_size, loaded.training) == (5, 64, False)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert len(loaded.weights_sha256) == 64
    pictures = made_pictures(2, 64)
    assert relative_distance(loaded(pictures)[0], made.eval()(pictures)[0]) < 1e-2  # kernels are kept in float16


@pytest.mark.parametrize("load", [load_trained, CompactExtractor().load_file, CifarResNet.from_file])
def test_a_file_that_is_not_there_is_named(load, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load(tmp_path / "absent.safetensors")


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    text, other, vgg = (tmp_path / f"{name}.safetensors" for name in ("text", "other", "vgg"))
    text.write_text("no weights")
    save_file({"weight": torch.zeros(2)}, other)
    save_file({"x": torch.zeros(1)}, vgg, {"architecture": "vgg"})
    with pytest.raises(ValueError, match=r"text\.safetensors' is no safetensors file"):
        load_trained(text)
    with pytest.raises(ValueError, match=f"architecture 'vgg'; expected {' or '.join(ARCHITECTURES)}"):
        load_trained(vgg)
    for path in (text, other):
        with pytest.raises(ValueError, match=f"{path.name}' does not hold the weights of a CompactExtractor"):
            CompactExtractor().load_file(path)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"classes": "many", "image_size": "64"}, "does not say how many classes and pixels it is for"),
        ({"classes": "5", "image_size": "64"}, "does not hold the weights of a CompactExtractor"),
    ],
)
def test_weights_that_are_not_what_they_claim_are_refused(tmp_path: Path, sizes: dict[str, str], sentence: str) -> None:
    CompactExtractor(4, 64).save(tmp_path / "a.safetensors", {})
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", {"architecture": "compact", **sizes})
    with pytest.raises(ValueError, match=rf"b\.safetensors' {sentence}"):
        load_trained(tmp_path / "b.safetensors")


def published(path: Path, tensors: dict[str, Tensor]) -> Path:
    """In the form of the published files."""
    torch.save({"state_dict": {PREFIX + name: value for name, value in tensors.items()}}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "name", "layers", "parameters"),
    [(ResNet20, "resnet20_cifar10", 20, 269_722), (ResNet56, "resnet56_cifar10", 56, 853_018)],
)
def test_the_depth_is_worked_out_from_the_file_and_is_as_published(tmp_path, kind, name, layers, parameters):
    path = published(tmp_path / "weights.th", kind().state_dict())
    network = CifarResNet.from_file(path)
    assert (type(network), network.name, network.training) == (kind, name, False)
    assert network.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    weighted = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == layers
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_autocast_changes_nothing_of_a_published_network():
    network, pictures = ResNet20(), made_pictures(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = network(pictures)[0]
    assert torch.equal(under, network(pictures)[0])


@pytest.mark.parametrize("data", [b"", b"no weights at all", b"PK\x03\x04 half an archive"])
def test_a_file_that_is_no_pytorch_file_is_refused(tmp_path, data):
    (tmp_path / "weights.th").write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.th' is no file of PyTorch weights"):
        CifarResNet.from_file(tmp_path / "weights.th")


@pytest.mark.parametrize("stored", [{"weights": {}}, [1, 2], {"state_dict": 3}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, stored):
    torch.save(stored, tmp_path / "weights.th")
    with pytest.raises(ValueError, match="has no 'state_dict'"):
        CifarResNet.from_file(tmp_path / "weights.th")


def test_published_networks_of_another_depth_or_with_other_tensors_are_refused(tmp_path):
    class ResNet32(CifarResNet):
        units = 5

    with pytest.raises(ValueError, match="has 5 units in layer1; expected a CIFAR ResNet-20 or ResNet-56"):
        CifarResNet.from_file(published(tmp_path / "weights.th", ResNet32().state_dict()))
    tensors = {name: value for name, value in ResNet20().state_dict().items() if "linear" not in name}
    with pytest.raises(ValueError, match="does not hold the weights of resnet20_cifar10"):
        CifarResNet.from_file(published(tmp_path / "weights.th", tensors))


@pytest.mark.parametrize(
    ("file", "name"), [("resnet20-12fca82f.th", ResNet20.name), ("resnet56-4bfd9763.th", ResNet56.name)]
)
def test_the_published_files_load(shared, file, name):
    network = CifarResNet.from_file(shared / "weights" / file)
    assert network.name == name
    assert network.weights_sha256.startswith(file[9:17])
