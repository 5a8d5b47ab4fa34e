import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def statistics_of(*batches: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    return frechet_distance(a.mean(), a.covariance(), b.mean(), b.covariance())


def test_the_golden_value_of_two_made_sets_is_met() -> None:
    mix = normal(777, (64, 64)) / 8
    x = torch.from_numpy(normal(1, (5000, 64)) @ mix + 0.4)
    y = torch.from_numpy(normal(2, (5000, 64)) @ mix * 1.1 + 0.5)
    assert distance(statistics_of(x), statistics_of(y)) == pytest.approx(1.6167408318532637, abs=1e-6)


def test_torchmetrics_finds_the_same_distance() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns on import
        from torchmetrics.image.fid import FrechetInceptionDistance

    class Pooled(nn.Module):
        num_features = 48

        def forward(self, images: Tensor) -> Tensor:
            return images.double().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).flatten(1)

    real = torch.from_numpy(normal(3, (200, 3, 8, 8)) * 40 + 128).clamp(0, 255).byte()
    fake = torch.from_numpy(normal(4, (150, 3, 8, 8)) * 60 + 100).clamp(0, 255).byte()
    oracle = FrechetInceptionDistance(feature=Pooled())
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    ours = distance(statistics_of(Pooled()(real)), statistics_of(Pooled()(fake)))
    assert ours == pytest.approx(float(oracle.compute()), rel=1e-9)


def test_two_normals_with_diagonal_covariance_have_the_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    expected = 3 * 0.5**2 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(3), np.diag(a), np.full(3, 0.5), np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_a_set_is_at_distance_zero_from_itself_also_below_full_rank() -> None:
    few = statistics_of(torch.from_numpy(normal(5, (20, 64))))
    assert distance(few, few) == pytest.approx(0, abs=1e-5)  # 44 zero eigenvalues of about 1e-16: their roots remain


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_merged_parts_equal_the_whole(seed: int, sizes: list[int]) -> None:
    parts = [torch.from_numpy(normal(seed + i, (size, 5)) * 3 + 1) for i, size in enumerate([*sizes, 2])]
    whole, merged = statistics_of(torch.cat(parts)), FeatureStatistics(5)
    for part in parts:
        merged.merge(statistics_of(part))
    assert merged.n == whole.n == sum(sizes) + 2
    torch.testing.assert_close(merged.mean(), whole.mean())
    torch.testing.assert_close(merged.covariance(), whole.covariance())


def test_mean_and_covariance_are_numpy_s() -> None:
    features = normal(6, (30, 4)) + 100
    statistics = statistics_of(torch.from_numpy(features[:10]), torch.from_numpy(features[10:]))
    np.testing.assert_allclose(statistics.mean(), features.mean(0))
    np.testing.assert_allclose(statistics.covariance(), np.cov(features.T), rtol=1e-9)


def test_float32_features_are_summed_in_float64() -> None:
    many = torch.full((1000, 1), 16777217 / 16777216 * 0.1)
    assert float(statistics_of(many).mean()) == pytest.approx(float(many[0].double()), rel=1e-13)


def test_the_state_survives_the_way_through_arrays() -> None:
    before = statistics_of(torch.from_numpy(normal(7, (10, 3))))
    arrays = before.to_arrays()
    after = FeatureStatistics.from_arrays(arrays)
    before.update(torch.ones(1, 3))  # must not reach the copy
    assert after.n == 10
    after.update(torch.ones(1, 3))
    assert torch.equal(after.covariance(), before.covariance())


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (torch.zeros(2, 4, 1, 1), r"2-D \(B, F\), got shape \(2, 4, 1, 1\)"),
        (torch.zeros(8), r"2-D \(B, F\), got shape \(8,\)"),
        (torch.zeros(2, 3), r"4 wide, got shape \(2, 3\)"),
        (torch.tensor([[0.0] * 4, [0.0, float("nan"), 0.0, 0.0]]), "NaN or infinity in 1 of 2 rows"),
        (torch.full((2, 4), float("inf")), "NaN or infinity in 2 of 2 rows"),
    ],
)
def test_bad_features_are_refused_and_leave_the_state_alone(features: Tensor, words: str) -> None:
    statistics = FeatureStatistics(4)
    with pytest.raises(ValueError, match=words):
        statistics.update(features)
    assert statistics.n == 0


def test_too_few_images_have_no_statistics() -> None:
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        FeatureStatistics(4).mean()
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        statistics_of(torch.zeros(1, 4)).covariance()


def test_statistics_of_other_widths_do_not_mix() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        FeatureStatistics(0)
    with pytest.raises(ValueError, match="features 3 wide into features 4 wide"):
        FeatureStatistics(4).merge(FeatureStatistics(3))
    with pytest.raises(ValueError, match=r"outer must be \(4, 4\)"):
        FeatureStatistics.from_arrays({"n": np.array(2), "sum": np.zeros(4), "outer": np.zeros((3, 3))})


def test_a_distance_of_unlike_or_broken_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of one width twice, got \[\(2,\), \(2, 2\), \(3,\), \(3, 3\)\]"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(np.zeros(2), np.eye(2), np.array([0, np.nan]), np.eye(2))
