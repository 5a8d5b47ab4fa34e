from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tatok_model.metrics.extractors.extractor import TrainableExtractor
from tatok_model.metrics.extractors.small_networks import (
    ARCHITECTURES,
    SHIPPED,
    CompactExtractor,
    SmallResNet,
    load_trained,
)

BOTH = pytest.mark.parametrize("network", [CompactExtractor, SmallResNet])


def made_pictures(count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@BOTH
@pytest.mark.parametrize(("side", "places"), [(16, None), (32, 4), (64, 4), (128, 4)])
def test_larger_pictures_meet_a_longer_stem(network: type[TrainableExtractor], side: int, places: int | None) -> None:
    made = network(7, side).eval()
    features, logits = made(made_pictures(2, side))
    assert features.shape == (2, network.feature_dim)
    assert logits.shape == (2, 7)
    if places:
        assert made.layers(torch.zeros(1, 3, side, side)).shape[2:] == (places, places)


@BOTH
def test_a_file_gives_back_the_network_and_its_name(network: type[TrainableExtractor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = network(5, 64).eval()
    made.save(tmp_path / "a.safetensors", {"test_accuracy": "0.5"})
    loaded = load_trained(tmp_path / "a.safetensors")
    assert type(loaded) is network
    assert loaded.name == f"{network.architecture}_64px"
    assert (loaded.classes, loaded.image_size, loaded.training) == (5, 64, False)
    assert len(loaded.weights_sha256) == 64
    pictures = made_pictures(2, 64)
    torch.testing.assert_close(loaded(pictures)[0], made(pictures)[0], rtol=0.05, atol=0.02)  # kernels in float16


def test_the_shipped_weights_load_and_keep_their_name(repository: Path) -> None:
    assert CompactExtractor.shipped().name == "compact_cifar10"
    assert load_trained(repository / "tatok_model" / "weights" / SHIPPED).name == "compact_32px"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load_trained(tmp_path / "absent.safetensors")


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.safetensors' is no safetensors file"):
        load_trained(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "vgg.safetensors", {"architecture": "vgg"})
    with pytest.raises(ValueError, match=f"architecture 'vgg'; expected {' or '.join(ARCHITECTURES)}"):
        load_trained(tmp_path / "vgg.safetensors")


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
