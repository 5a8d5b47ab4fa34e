import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tatok_model.metrics.extractors.small_networks import PREFIX, CifarResNet, ResNet20, ResNet56


def made_file(path: Path, network: CifarResNet) -> Path:
    """In the form of the published files."""
    torch.save({"state_dict": {PREFIX + name: value for name, value in network.state_dict().items()}}, path)
    return path


def made_pictures(count: int, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def network() -> ResNet20:
    torch.manual_seed(0)
    return ResNet20()


@pytest.mark.parametrize(("kind", "name"), [(ResNet20, "resnet20_cifar10"), (ResNet56, "resnet56_cifar10")])
def test_the_depth_is_worked_out_from_the_file(tmp_path, kind, name):
    path = made_file(tmp_path / "weights.th", kind())
    network = CifarResNet.from_file(path)
    assert type(network) is kind
    assert network.name == name
    assert network.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("kind", "layers", "parameters"), [(ResNet20, 20, 269_722), (ResNet56, 56, 853_018)])
def test_the_networks_are_as_deep_and_large_as_published(kind, layers, parameters):
    network = kind()
    weighted = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == layers
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_the_outputs_have_the_promised_shapes_and_types(network):
    features, logits = network(made_pictures(3))
    assert features.shape == (3, CifarResNet.feature_dim)
    assert logits.shape == (3, CifarResNet.classes)
    assert features.dtype == logits.dtype == torch.float32


def test_autocast_changes_nothing(network):
    pictures = made_pictures(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = network(pictures)[0]
    assert torch.equal(under, network(pictures)[0])


def test_a_picture_has_the_same_features_in_any_batch(network):
    pictures = made_pictures(5)
    alone = torch.cat([network(picture[None])[0] for picture in pictures])
    torch.testing.assert_close(alone, network(pictures)[0], rtol=1e-4, atol=1e-5)


def test_pictures_of_another_size_are_resized_with_antialiasing(network):
    """A checkerboard of single pixels becomes grey; picking pixels would make it black or white."""
    fields = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    checkerboard = (255 * fields).to(torch.uint8).expand(1, 3, 64, 64)
    grey = F.interpolate(checkerboard.float(), (32, 32), mode="bilinear", antialias=True).round().to(torch.uint8)
    torch.testing.assert_close(network(checkerboard)[0], network(grey)[0], rtol=0.05, atol=0.01)


def test_pictures_in_floats_are_refused(network):
    with pytest.raises(ValueError, match="uint8"):
        network(made_pictures(1).float())


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.th"):
        CifarResNet.from_file(tmp_path / "absent.th")


@pytest.mark.parametrize("data", [b"", b"no weights at all", b"PK\x03\x04 half an archive"])
def test_a_file_of_something_else_is_refused(tmp_path, data):
    (tmp_path / "weights.th").write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.th' is no file of PyTorch weights"):
        CifarResNet.from_file(tmp_path / "weights.th")


@pytest.mark.parametrize("stored", [{"weights": {}}, [1, 2], {"state_dict": 3}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, stored):
    torch.save(stored, tmp_path / "weights.th")
    with pytest.raises(ValueError, match="has no 'state_dict'"):
        CifarResNet.from_file(tmp_path / "weights.th")


def test_a_network_of_another_depth_is_refused(tmp_path):
    class ResNet32(CifarResNet):
        units = 5

    with pytest.raises(ValueError, match="has 5 units in layer1; expected a CIFAR ResNet-20 or ResNet-56"):
        CifarResNet.from_file(made_file(tmp_path / "weights.th", ResNet32()))


def test_tensors_of_another_network_are_refused(tmp_path, network):
    tensors = {PREFIX + name: value for name, value in network.state_dict().items() if "linear" not in name}
    torch.save({"state_dict": tensors}, tmp_path / "weights.th")
    with pytest.raises(ValueError, match="does not hold the weights of resnet20_cifar10"):
        CifarResNet.from_file(tmp_path / "weights.th")


@pytest.mark.parametrize(
    ("file", "name"), [("resnet20-12fca82f.th", ResNet20.name), ("resnet56-4bfd9763.th", ResNet56.name)]
)
def test_the_published_files_load(shared, file, name):
    network = CifarResNet.from_file(shared / "weights" / file)
    assert network.name == name
    assert network.weights_sha256.startswith(file[9:17])
