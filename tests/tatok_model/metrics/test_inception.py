"""The network against golden values with synthetic weights: the real file is needed for nothing here."""

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tatok_model.metrics.extractors import inception
from tatok_model.metrics.extractors.inception import Inception2015, tf1_bilinear

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "inception_conformance.json").read_text())


def synthetic(name: str, shape: torch.Size) -> Tensor:
    """The golden file's `weights` recipe."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    generator = np.random.Generator(np.random.PCG64(seed))
    if name.endswith("bn.weight"):
        values = generator.uniform(0.8, 1.2, shape)
    elif name.endswith("running_var"):
        values = generator.uniform(0.5, 1.5, shape)
    else:
        spread = {"conv.weight": math.sqrt(2 / math.prod(shape[1:])), "fc.weight": math.sqrt(1 / 2048)}
        values = generator.standard_normal(shape) * spread.get(".".join(name.split(".")[-2:]), 0.1)
    return torch.from_numpy(values.astype(np.float32))


def made_images(count: int, size: int, seed: int) -> np.ndarray:
    """The golden file's `inputs` recipe: (count, size, size, 3) uint8."""
    g = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:size, 0:size] / size
    images = []
    for _ in range(count):
        f, p, noise = g.uniform(1, 6, (3, 2)), g.uniform(0, 6.28, 3), g.integers(-40, 41, (size, size, 3))
        waves = [np.floor(128 + 80 * np.sin(6.28 * (f[c, 0] * x + f[c, 1] * y) + p[c])) for c in range(3)]
        images.append(np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))
    return np.stack(images)


def channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def assert_conforms(got: Tensor, expected: list[float]) -> None:
    """Within 1e-4 relative L2: the smallest of the known mistakes, scaling by 2x - 1, is at .001 to .004."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert float((got.double() - wanted).norm() / wanted.norm()) < 1e-4


@pytest.fixture(scope="module")
def network() -> Inception2015:
    network = Inception2015()
    state = network.state_dict()
    network.load_state_dict(
        {name: synthetic(name, value.shape) if value.ndim else value for name, value in state.items()}
    )
    return network


def test_the_synthetic_weights_are_the_golden_ones(network: Inception2015) -> None:
    checks = {name: value for name, value in GOLDEN["weights_sum_and_check"].items() if name != "how"}
    assert len(checks) == 4
    for name, expected in checks.items():
        drawn = network.state_dict()[name].double()
        assert [float(drawn.sum()), float(drawn.square().sum())] == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("case", ["s32", "s64", "s256"])
def test_features_and_logits_of_made_images_are_the_golden_ones(network: Inception2015, case: str) -> None:
    golden = GOLDEN["cases"][case]
    images = made_images(golden["n"], golden["size"], golden["seed"])
    assert hashlib.sha256(images.tobytes()).hexdigest() == golden["uint8_sha256"]
    features, logits = network(channels_first(images))
    assert features.shape == (golden["n"], network.feature_dim)
    assert logits.shape == (golden["n"], network.classes)
    assert features.dtype == logits.dtype == torch.float32
    assert_conforms(features.norm(dim=1), golden["pool2048_row_l2"])
    assert_conforms(features[0, :16], golden["pool2048_row0_first16"])
    assert float(features.mean()) == pytest.approx(golden["pool2048_mean"], rel=1e-4)
    assert_conforms(logits.norm(dim=1), golden["logits_without_bias_row_l2"])
    assert_conforms(logits[0, :8], golden["logits_without_bias_row0_first8"])


def test_cifar_images_give_the_golden_values_at_every_depth(network: Inception2015, shared: Path) -> None:
    golden = json.loads((shared / "golden" / "inception_conformance.json").read_text())
    images = cifar_rows(shared, every=1250)
    assert hashlib.sha256(images.tobytes()).hexdigest() == golden["inputs_sha256"]
    seen: dict[str, Tensor] = {}
    hooks = [
        network.Conv2d_3b_1x1.register_forward_pre_hook(lambda _, inputs: seen.update({"64": inputs[0]})),
        network.Mixed_5b.register_forward_pre_hook(lambda _, inputs: seen.update({"192": inputs[0]})),
        network.Mixed_6e.register_forward_hook(lambda _, __, output: seen.update({"768": output})),
    ]
    features, logits = network(channels_first(images))
    for hook in hooks:
        hook.remove()
    pooled = {depth: maps.mean((2, 3)) for depth, maps in seen.items()}
    values = {**pooled, "2048": features, "logits_unbiased": logits, "logits": logits + network.fc.bias}
    checked = golden["cifar10_test_every1250"]
    assert_summary(values, checked["tf1_bilinear_f32"])
    assert_summary(values, checked["tf1_bilinear_f64"])


def cifar_rows(shared: Path, every: int) -> np.ndarray:
    import pyarrow.parquet as pq
    from PIL import Image

    encoded = pq.read_table(shared / "data" / "cifar10_jpeg_test.parquet")["image"].to_pylist()[::every]
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])


def assert_summary(values: dict[str, Tensor], golden: dict[str, Any]) -> None:
    assert len(golden) >= 3
    for name, summary in golden.items():
        value = values[name]
        assert list(value.shape) == summary["shape"], name
        assert_conforms(value.norm(dim=1), summary["row_l2"])
        assert_conforms(value[0, :8], summary["row0_first8"])
        assert_conforms(value[-1, -8:], summary["rowlast_last8"])
        assert float(value.std(correction=0)) == pytest.approx(summary["std"], rel=1e-4), name


def test_names_and_shapes_are_those_of_the_public_file(network: Inception2015, shared: Path) -> None:
    manifest = json.loads((shared / "weights" / "pt_inception_manifest.json").read_text())
    ours = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert ours == {name: entry["shape"] for name, entry in manifest.items()}


def test_the_network_has_the_public_file_s_number_of_tensors_and_values(network: Inception2015) -> None:
    state = network.state_dict()
    assert len(state) == 566
    assert sum(value.numel() for value in state.values()) == 23_885_486


def test_tf1_resize_reads_pixel_i_times_scale_without_antialiasing() -> None:
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert tf1_bilinear(row, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]  # the last pixel repeats
    assert tf1_bilinear(row, 2)[0, 0, 0].tolist() == [0, 20]  # skips, does not average
    assert torch.equal(tf1_bilinear(row, 4), row)
    assert tf1_bilinear(row.transpose(2, 3), 8)[0, 0, :, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]


def test_images_need_not_be_square(network: Inception2015) -> None:
    assert network(torch.zeros(1, 3, 20, 33, dtype=torch.uint8))[0].shape == (1, 2048)


def test_low_precision_settings_around_the_network_do_not_reach_it(network: Inception2015) -> None:
    image = channels_first(made_images(1, 32, seed=1))
    expected = network(image)
    allowed: list[bool] = []
    hook = network.Mixed_7c.register_forward_hook(lambda *_: allowed.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = network(image)
    hook.remove()
    assert torch.equal(features, expected[0])
    assert torch.equal(logits, expected[1])
    assert allowed == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_float_images_are_refused(network: Inception2015) -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\) uint8, got .* torch.float32"):
        network(torch.zeros(1, 3, 32, 32))


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*absent.pth"):
        Inception2015.from_file(tmp_path / "absent.pth")


def test_another_file_is_refused_by_its_checksum(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"other\.pth is not the FID Inception: its SHA-256 begins .*, not 6726825d"):
        Inception2015.from_file(tmp_path / "other.pth")


def test_a_file_with_the_right_checksum_is_loaded_for_inference(
    network: Inception2015, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(inception, "SHA256_PREFIX", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    loaded = Inception2015.from_file(path)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
