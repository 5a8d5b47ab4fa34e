"""Generated against real lengths, in numbers and as a figure."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.evaluation.generated import VIEW, compare_lengths, ks_distance, length_plot

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=30).map(np.array)


def test_the_distance_of_known_distributions() -> None:
    assert ks_distance(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4])) == 0
    assert ks_distance(np.array([1, 2]), np.array([3, 4])) == 1
    assert ks_distance(np.array([1, 2, 3, 4]), np.array([3, 4])) == 0.5


@given(LENGTHS, LENGTHS)
def test_it_is_the_largest_gap_between_distribution_functions(first: np.ndarray, second: np.ndarray) -> None:
    by_hand = max(abs((first <= point).mean() - (second <= point).mean()) for point in range(21))
    assert ks_distance(first, second) == pytest.approx(by_hand)
    assert ks_distance(first, second) == ks_distance(second, first)
    assert ks_distance(first, np.concatenate([first, first])) == pytest.approx(0)


def test_the_worst_class_is_named() -> None:
    counts, labels = np.array([10, 10, 30, 30, 99]), np.array([0, 0, 1, 1, -1])
    real_counts, real_labels = np.array([10, 10, 20, 20, 50]), np.array([0, 0, 1, 1, 2])
    found = compare_lengths(counts, labels, real_counts, real_labels)
    assert found["tokens_per_image"] == pytest.approx(35.8)
    assert found["tokens_per_image_real"] == 22
    assert found["tokens_mean_difference"] == pytest.approx(35.8 / 22 - 1)
    assert (found["tokens_ks_worst"], found["tokens_ks_worst_class"]) == (1, 1)
    assert found["tokens_mean_difference_worst"] == pytest.approx(0.5)


def test_without_classes_only_everything_is_compared() -> None:
    none = np.full(3, -1)
    found = compare_lengths(np.array([1, 2, 3]), none, np.array([1, 2, 3]), none)
    assert found["tokens_ks"] == found["tokens_mean_difference"] == 0
    assert "tokens_ks_worst" not in found


def test_views_of_a_picture_are_known_by_their_ids() -> None:
    assert all(VIEW.search(name) for name in ("a/b.png@flip", "file.parquet#7@crop12"))
    assert not any(VIEW.search(name) for name in ("a/b.png", "flip", "a@flip.png", "a@crop"))


def test_both_lengths_stand_in_one_figure(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "lengths.png"
    length_plot(path, np.array([8, 9, 9]), np.array([8, 300]), "Tokens")
    with Image.open(path) as picture:
        assert min(picture.size) > 300
    length_plot(path, np.array([8]), np.array([8]), "All alike")


def test_no_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lengths are \(0,\) and \(2,\); expected"):
        length_plot(tmp_path / "lengths.png", np.array([], dtype=int), np.array([1, 2]), "None")
