import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch import Tensor

from tatok_model.metrics import images
from tatok_model.metrics.images import UINT8_RULE, ImageQuality, psnr, squared_error, ssim, ssim_map, to_uint8


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def smooth_and_disturbed(size: tuple[int, int], strength: int) -> tuple[Tensor, Tensor]:
    """Two waves with flat parts, and the same with noise: (3, 3, H, W) each."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / 16
    waves = np.stack([[np.sin(x * k + c) * np.cos(y) * 120 + 128 for c in range(3)] for k in (0.5, 1.3, 3)])
    originals = torch.from_numpy(waves.clip(30, 220).astype(np.uint8))
    shift = noise(0, *originals.shape).int() % (2 * strength + 1) - strength
    return originals, (originals.int() + shift).clamp(0, 255).byte()


def test_quantising_rounds_half_to_even_and_clamps() -> None:
    assert UINT8_RULE == "round"
    values = torch.tensor([0.5, 1.5, 2.5, 254.6, 300.0, -7.0], dtype=torch.float64) / 255
    assert to_uint8(values).tolist() == [0, 2, 2, 255, 255, 0]


def test_quantising_undoes_division_by_255() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255), levels)


def test_what_is_no_picture_in_floats_is_not_quantised() -> None:
    with pytest.raises(ValueError, match=r"floating in \[0, 1\], got torch.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_uint8(torch.tensor([0.5, float("nan")]))


def test_psnr_is_20_log_255_over_the_rms_error() -> None:
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    grey = black.clone()
    grey[0] += 10
    grey[1] += 255
    assert psnr(black, grey).tolist() == pytest.approx([20 * math.log10(25.5), 0])
    assert squared_error(black, grey).tolist() == [48 * 100, 48 * 255**2]


def test_an_identical_image_has_the_best_psnr_a_different_one_can_reach() -> None:
    image = noise(1, 1, 3, 32, 32)
    nearest = image.clone()
    nearest[0, 0, 0, 0] ^= 1
    assert psnr(image, image).item() == psnr(image, nearest).item() == pytest.approx(83.0, abs=0.05)


@pytest.mark.parametrize(("size", "strength"), [((32, 32), 5), ((32, 32), 60), ((11, 40), 20), ((64, 48), 3)])
def test_ssim_is_torchmetrics_s(size: tuple[int, int], strength: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns on import
        from torchmetrics.functional.image import structural_similarity_index_measure

    originals, disturbed = smooth_and_disturbed(size, strength)
    expected = structural_similarity_index_measure(
        disturbed.double() / 255, originals.double() / 255, data_range=1.0, reduction="none"
    )
    assert ssim(originals, disturbed).tolist() == pytest.approx(expected.tolist(), abs=1e-9)


@pytest.mark.parametrize(("size", "strength"), [((32, 32), 5), ((32, 32), 60), ((11, 40), 20), ((64, 48), 3)])
def test_ssim_is_scikit_image_s_where_the_window_lies_wholly_inside(size: tuple[int, int], strength: int) -> None:
    originals, disturbed = smooth_and_disturbed(size, strength)
    inside = ssim_map(originals, disturbed)[:, :, 5:-5, 5:-5].mean((1, 2, 3))
    expected = [
        structural_similarity(
            x.double().numpy() / 255,
            y.double().numpy() / 255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
        )
        for x, y in zip(originals, disturbed, strict=True)
    ]
    assert inside.tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_an_image_with_itself_is_one() -> None:
    flat = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)
    both = torch.cat([flat, noise(2, 1, 3, 16, 16)])
    assert ssim(both, both).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_images_smaller_than_the_window_have_no_ssim() -> None:
    small = noise(3, 1, 3, 10, 32)
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, got \(10, 32\)"):
        ssim(small, small)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ImageQuality().update(small, small)


@pytest.mark.parametrize(
    "other", [torch.zeros(1, 3, 16, 16), noise(4, 2, 3, 16, 16), noise(4, 1, 1, 16, 16), noise(4, 3, 16, 16)]
)
def test_unlike_pictures_are_not_compared(other: Tensor) -> None:
    image = noise(4, 1, 3, 16, 16)
    for measure in (psnr, ssim, squared_error):
        with pytest.raises(ValueError, match=r"two uint8 batches of one \(B, C, H, W\) shape, got"):
            measure(image, other)


def test_pooled_psnr_is_that_of_the_mean_error_and_lies_below_the_mean_psnr() -> None:
    originals, close = smooth_and_disturbed((32, 32), 4)
    _, far = smooth_and_disturbed((32, 32), 80)
    quality = ImageQuality()
    quality.update(originals, close)
    quality.update(originals, far)
    results = quality.results()
    mse = torch.cat([close, far]).double().sub(torch.cat([originals, originals]).double()).div(255).square().mean()
    assert results["psnr_pooled"] == pytest.approx(-10 * math.log10(mse))
    each = torch.cat([psnr(originals, close), psnr(originals, far)])
    assert results["psnr"] == pytest.approx(each.mean().item())
    assert results["psnr_p10"] == pytest.approx(np.percentile(each, 10))
    assert results["ssim"] == pytest.approx(
        torch.cat([ssim(originals, close), ssim(originals, far)]).double().mean().item()
    )
    assert results["psnr_pooled"] < results["psnr"]


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 3))
def test_however_images_are_shared_out_the_results_are_the_same_to_the_bit(order: list[int], cut: int) -> None:
    originals, disturbed = noise(5, 4, 3, 12, 12), noise(6, 4, 3, 12, 12)
    whole = ImageQuality()
    for i in range(4):
        whole.update(originals[i : i + 1], disturbed[i : i + 1])
    parts = [ImageQuality(), ImageQuality()]
    for place, i in enumerate(order):
        parts[place >= cut].update(originals[i : i + 1], disturbed[i : i + 1])
    merged = ImageQuality.from_arrays(parts[1].to_arrays())
    merged.merge(parts[0])
    assert merged.results() == whole.results()


def test_a_measure_of_each_image_needs_a_line_in_the_table_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(images.OF_EACH_IMAGE, "first_value", lambda originals, _: originals[:, 0, 0, 0].double())
    originals, disturbed = noise(5, 4, 3, 12, 12), noise(6, 4, 3, 12, 12)
    parts = [ImageQuality(), ImageQuality()]
    parts[0].update(originals[:1], disturbed[:1])
    parts[1].update(originals[1:], disturbed[1:])
    parts[0].merge(ImageQuality.from_arrays(parts[1].to_arrays()))
    results = parts[0].results()
    assert list(results) == ["psnr", "psnr_pooled", "psnr_p10", "ssim", "first_value"]
    assert results["first_value"] == originals[:, 0, 0, 0].double().mean().item()


def test_without_images_there_is_no_result() -> None:
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        ImageQuality().results()
