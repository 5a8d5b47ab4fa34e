import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from tatok_model.metrics.extractors.small_networks import SHIPPED, CompactExtractor


@pytest.fixture(scope="module")
def network() -> CompactExtractor:
    return CompactExtractor.shipped()


@pytest.fixture(scope="module")
def weights(repository: Path) -> Path:
    return repository / "tatok_model" / "weights" / SHIPPED


def made_pictures(count: int, side: int = 32) -> Tensor:
    """Smooth colour fields: (count, 3, side, side) uint8."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (255 * F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)).to(torch.uint8)


def relative_distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_the_outputs_have_the_promised_shapes_and_types(network: CompactExtractor) -> None:
    features, logits = network(made_pictures(3))
    assert features.shape == (3, CompactExtractor.feature_dim)
    assert logits.shape == (3, network.classes)
    assert features.dtype == logits.dtype == torch.float32


def test_the_shipped_file_is_small_and_says_how_it_was_made(weights: Path) -> None:
    assert weights.stat().st_size <= 2_000_000
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata()
    assert "jobs/train_extractor.py extractor_cifar10" in metadata["command"]
    assert len(metadata["commit"]) == 40
    assert 0.85 < float(metadata["test_accuracy"]) < 1


def test_the_hash_is_that_of_the_weight_file(network: CompactExtractor, weights: Path) -> None:
    assert network.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_picture_has_the_same_features_in_any_batch(network: CompactExtractor) -> None:
    pictures = made_pictures(7)
    together, _ = network(pictures)
    alone = torch.cat([network(picture[None])[0] for picture in pictures])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert torch.equal(network(pictures)[0], together)


def test_the_memory_layout_does_not_matter(network: CompactExtractor) -> None:
    pictures = made_pictures(4)
    channels_last = pictures.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(channels_last)[0], network(pictures)[0])


def test_noise_moves_the_mean_feature_further_the_stronger_it_is(network: CompactExtractor) -> None:
    pictures = made_pictures(64)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    clean = network(pictures)[0].mean(0)
    noisy = [(pictures + level * noise).clamp(0, 255).to(torch.uint8) for level in (5, 20, 60)]
    distances = [relative_distance(network(images)[0].mean(0), clean) for images in noisy]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_a_larger_picture_is_resized_with_antialiasing(network: CompactExtractor) -> None:
    """A checkerboard of single pixels becomes grey; picking pixels would make it black or white."""
    fields = (torch.arange(96)[:, None] + torch.arange(96)) % 2
    checkerboard = (255 * fields).to(torch.uint8).expand(1, 3, 96, 96)
    grey, white = (network(torch.full((1, 3, 32, 32), value, dtype=torch.uint8))[0] for value in (127, 255))
    features, _ = network(checkerboard)
    assert relative_distance(features, grey) < 0.2 * relative_distance(white, grey)


def test_a_smooth_picture_keeps_its_features_at_twice_the_size(network: CompactExtractor) -> None:
    pictures = made_pictures(8)
    doubled = pictures.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert relative_distance(network(doubled)[0], network(pictures)[0]) < 0.15


def test_saved_weights_load_again_in_evaluation_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = CompactExtractor()
    network(made_pictures(8))  # moves the normalisation's running statistics
    network.save(tmp_path / "a.safetensors", {"note": "made"})
    loaded = CompactExtractor().load_file(tmp_path / "a.safetensors")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    pictures = made_pictures(4)
    assert relative_distance(loaded(pictures)[0], network.eval()(pictures)[0]) < 1e-2  # kernels are kept in float16


@pytest.mark.parametrize(
    "images",
    [torch.rand(2, 3, 32, 32), torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(2, 1, 32, 32, dtype=torch.uint8)],
    ids=["float", "no batch", "one channel"],
)
def test_other_inputs_than_uint8_pictures_are_refused(network: CompactExtractor, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) uint8"):
        network(images)


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        CompactExtractor().load_file(tmp_path / "absent.safetensors")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.safetensors' does not hold the weights of a CompactExtractor"):
        CompactExtractor().load_file(tmp_path / "text.safetensors")


def test_the_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors' does not hold the weights of a CompactExtractor"):
        CompactExtractor().load_file(tmp_path / "other.safetensors")
