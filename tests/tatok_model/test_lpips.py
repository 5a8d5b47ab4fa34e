"""LPIPS with a synthetic backbone, against torchmetrics' implementation and the heads that ship inside it."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tatok_model.losses import BACKBONES, LPIPS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchmetrics warns on import
    from torchmetrics.functional.image import lpips as oracle

HEADS = Path(oracle.__file__).parent / "lpips_models"
VGG, ALEX = (64, 3, 3, 3), (64, 3, 11, 11)
CASES = pytest.mark.parametrize(("kind", "net", "size"), [(VGG, "vgg", (32, 24)), (ALEX, "alex", (40, 64))])


def features_of(kind: tuple[int, ...]) -> nn.Sequential:
    """The whole stack with synthetic weights that keep the activations' size, and its biases off zero."""
    stack = nn.Sequential(*BACKBONES[kind]().layers)
    generator = torch.Generator().manual_seed(0)
    for name, value in stack.state_dict().items():
        fan_in = value[0].numel() if name.endswith("weight") else 100
        value.copy_(torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return stack


def torchvision_style(kind: tuple[int, ...]) -> dict[str, Tensor]:
    """A state dict as torchvision saves it, classifier included."""
    weights = {f"features.{name}": value for name, value in features_of(kind).state_dict().items()}
    return {**weights, "classifier.0.weight": torch.zeros(2, 2)}


def pictures(seed: int, *size: int) -> Tensor:
    return torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(torchvision_style(VGG), folder / "vgg16.pth")
    torch.save(torchvision_style(ALEX), folder / "alexnet.pth")
    return {"vgg": folder / "vgg16.pth", "alex": folder / "alexnet.pth"}


@CASES
def test_the_distance_is_torchmetrics_s(
    kind: tuple[int, ...], net: str, size: tuple[int, int], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "_get_tv_model_features", lambda *_: features_of(kind))  # needs torchvision otherwise
    theirs = oracle._LPIPS(net=net, model_path=str(HEADS / f"{net}.pth"))
    ours = LPIPS.from_files(files[net], HEADS / f"{net}.pth")
    x, y = pictures(1, *size), pictures(2, *size)
    expected = theirs(x, y, normalize=True).flatten()
    assert float(expected.min()) > 0.01
    torch.testing.assert_close(ours(x, y), expected, rtol=1e-5, atol=1e-7)


def test_equal_pictures_are_at_distance_zero_and_the_order_does_not_matter(files: dict[str, Path]) -> None:
    model = LPIPS.from_files(files["vgg"], HEADS / "vgg.pth")
    x, y = pictures(1, 16, 16), pictures(2, 16, 16)
    assert model(x, x).tolist() == [0, 0, 0]
    torch.testing.assert_close(model(x, y), model(y, x))


def test_gradients_reach_the_picture_and_no_weight(files: dict[str, Path]) -> None:
    model = LPIPS.from_files(files["vgg"], HEADS / "vgg.pth")
    x = pictures(1, 16, 16).requires_grad_()
    model(x, pictures(2, 16, 16)).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_where_all_channels_are_zero_the_gradient_is_finite(files: dict[str, Path]) -> None:
    model = LPIPS.from_files(files["vgg"], HEADS / "vgg.pth")
    model.features[0].bias.fill_(-1e4)  # a ReLU that lets nothing through
    x = pictures(1, 16, 16).requires_grad_()
    model(x, pictures(2, 16, 16)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_safetensors_files_give_the_same_distance(files: dict[str, Path], tmp_path: Path) -> None:
    save_file(torchvision_style(VGG), tmp_path / "vgg16.safetensors")
    save_file(torch.load(HEADS / "vgg.pth", map_location="cpu"), tmp_path / "heads.safetensors")
    x, y = pictures(1, 16, 16), pictures(2, 16, 16)
    expected = LPIPS.from_files(files["vgg"], HEADS / "vgg.pth")(x, y)
    got = LPIPS.from_files(tmp_path / "vgg16.safetensors", tmp_path / "heads.safetensors")(x, y)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_the_published_heads_are_those_of_the_tests(net: str, shared: Path) -> None:
    published = torch.load(shared / "weights" / f"lpips_v0.1_{net}.pth", map_location="cpu", weights_only=True)
    here = torch.load(HEADS / f"{net}.pth", map_location="cpu", weights_only=True)
    assert set(published) == set(here)
    assert all(torch.equal(value, here[name]) for name, value in published.items())


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ((1, 3, 32, 32), (1, 3, 32, 31), r"one \(B, 3, H, W\) shape, got \(1, 3, 32, 32\) and \(1, 3, 32, 31\)"),
        ((1, 1, 32, 32), (1, 1, 32, 32), "one .* shape, got"),
        ((3, 32, 32), (3, 32, 32), "one .* shape, got"),
        ((1, 3, 15, 32), (1, 3, 15, 32), r"VGG16 needs at least 16 pixels a side, got \(15, 32\)"),
    ],
)
def test_unlike_or_small_pictures_are_refused(
    x: tuple[int, ...], y: tuple[int, ...], words: str, files: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=words):
        LPIPS.from_files(files["vgg"], HEADS / "vgg.pth")(torch.zeros(x), torch.zeros(y))


@CASES
def test_the_smallest_size_named_is_the_smallest_that_works(
    kind: tuple[int, ...], net: str, size: tuple[int, int], files: dict[str, Path]
) -> None:
    model, side = LPIPS.from_files(files[net], HEADS / f"{net}.pth"), BACKBONES[kind]().smallest
    assert model(pictures(1, side, side), pictures(2, side, side)).shape == (3,)
    with pytest.raises(RuntimeError, match="too small"):
        model.features(pictures(1, side - 1, side - 1))


def test_a_missing_file_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*absent\.pth"):
        LPIPS.from_files(tmp_path / "absent.pth", HEADS / "vgg.pth")
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*absent\.pth"):
        LPIPS.from_files(files["vgg"], tmp_path / "absent.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"hello there", b"", (HEADS / "vgg.pth").read_bytes()[:1500]])
def test_a_file_that_is_no_weight_file_is_named(
    content: bytes, suffix: str, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / f"heads{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"heads{suffix} is not a readable .pth or .safetensors weight file"):
        LPIPS.from_files(files["vgg"], tmp_path / f"heads{suffix}")


def test_wrong_weights_are_told_apart_in_one_sentence(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"

    def refused(weights: object, words: str) -> None:
        torch.save(weights, path)
        with pytest.raises(ValueError, match=words):
            LPIPS.from_files(path, HEADS / "vgg.pth")

    good = torchvision_style(VGG)
    refused([1, 2], r"weights\.pth holds a list, expected a state dict")
    refused({"conv1.weight": torch.zeros(1)}, r"lacks features\.0\.weight: expected torchvision's VGG16 or AlexNet")
    refused({"features.0.weight": torch.zeros(16, 3, 3, 3)}, r"neither VGG16 nor AlexNet: .* is \(16, 3, 3, 3\)")
    lacking = {name: value for name, value in good.items() if name not in ("features.28.weight", "features.28.bias")}
    refused(lacking, r"lacks features\.28\.weight, features\.28\.bias$")
    refused({**good, "features.2.bias": torch.zeros(5)}, r"features\.2\.bias is \(5,\), expected \(64,\)")


def test_heads_of_another_backbone_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"alex\.pth: lin1\.model\.1\.weight is \(1, 192, 1, 1\), expected \(1, 128, 1, 1\)"
    ):
        LPIPS.from_files(files["vgg"], HEADS / "alex.pth")
