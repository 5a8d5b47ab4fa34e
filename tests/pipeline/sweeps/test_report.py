"""What trials are worth, which one is the best, and the picture of all."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.sweeps.report import TrialPoint, best_cut, best_trial, budget, leading, objective, sweep_plot

numbers = st.floats(0, 10, allow_nan=False).map(lambda x: round(x, 1))


def points(tokens, psnr, distance=None, rule="relative"):
    distance = distance or [9 - p / 10 for p in psnr]
    return [
        TrialPoint("trial-00", 0, 4, rule, i / 10, t, 10 * t, 9 * t, p, d, 50.0)
        for i, (t, p, d) in enumerate(zip(tokens, psnr, distance, strict=True))
    ]


@given(st.lists(st.tuples(numbers, numbers), max_size=20))
def test_the_front_is_what_no_other_point_beats(pairs):
    rate, worth = [r for r, _ in pairs], [w for _, w in pairs]
    front = leading(rate, worth)

    def beats(i, j):
        as_good = rate[i] <= rate[j] and worth[i] >= worth[j]
        return as_good and (rate[i] < rate[j] or worth[i] > worth[j] or i < j)

    assert set(front) == {j for j in range(len(pairs)) if not any(beats(i, j) for i in range(len(pairs)) if i != j)}
    assert [rate[i] for i in front] == sorted(rate[i] for i in front)


def test_psnr_at_a_budget_lies_on_the_line_between_points(configure):
    config = configure("sweep.budget_tokens=10")
    assert objective(points([4, 8, 12], [20, 22, 26]), config) == 24
    assert objective(points([4, 8, 12], [20, 22, 21]), config) == 22  # more tokens that buy nothing are not spent
    assert objective(points([4, 8], [20, 22]), config) == 22


def test_a_trial_that_spends_more_than_the_budget_has_no_objective(configure):
    assert objective(points([12, 16], [20, 22]), configure("sweep.budget_tokens=10")) is None


def test_distances_are_better_when_they_are_less(configure):
    config = configure("sweep.objective=distance_at_tokens", "sweep.budget_tokens=6")
    assert objective(points([4, 8], [20, 22], [5.0, 3.0]), config) == 4
    assert best_trial({0: 4.0, 1: 3.0, 2: None}, config) == 1
    assert best_cut(points([4, 5, 8], [20, 22, 23], [5.0, 6.0, 3.0]), config).tokens == 4


def test_psnr_is_better_when_it_is_more_and_of_equals_the_first_trial_wins(configure):
    assert best_trial({0: 20.0, 1: 21.0, 2: 21.0, 3: float("nan")}, configure()) == 1
    assert best_trial({0: None}, configure()) is None


def test_without_a_budget_it_is_half_of_an_images_tokens(configure):
    assert budget(configure("sweep.budget_tokens=0")) == (16 + 4) / 2


def test_the_cut_of_the_best_trial_is_the_best_that_the_budget_allows(configure):
    config = configure("sweep.budget_tokens=10")
    assert best_cut(points([4, 8, 12], [20, 22, 26]), config).tokens == 8
    assert best_cut(points([12], [26]), config) is None


def test_bd_rate_compares_with_the_control(configure, tmp_path):
    values = {"tokens_per_image": [4, 8, 16, 32], "bits_fixed": [40, 80, 160, 320], "bits_coded": [1, 2, 3, 4],
              "psnr": [20, 22, 24, 26], "rfd_x": [1, 1, 1, 1]}  # fmt: skip
    results = {f"curve{i:02d}_{name}": value for name, column in values.items() for i, value in enumerate(column)}
    summary = {"stage": "evaluate", "status": "finished", "results": results, "inputs": {}}
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "summary.json").write_text(json.dumps(summary))
    config = configure("sweep.objective=bd_rate", f"sweep.control={tmp_path / 'control'}")
    half = points([2, 4, 8, 16], [20, 22, 24, 26])
    assert objective(half, config) == pytest.approx(-50)
    assert objective([*half, *points([8, 16, 32, 64], [20, 22, 24, 26], rule="count")], config) == pytest.approx(-50)
    assert objective(half[:3], config) is None  # too few points in what both reach
    assert best_trial({0: -50.0, 1: 3.0}, config) == 0
    assert best_cut(half, config) is None


def test_many_trials_and_rules_fit_into_one_picture(tmp_path):
    points = [
        TrialPoint(f"trial-{t:02d}", t, 4, rule, 0.1 * i, 4.0 + t + 2 * i, 30.0 + 9 * i, 29.0, 20.0 + i, 9.0 - i, 50.0)
        for t in range(9)
        for rule in ("relative", "residual")
        for i in range(3)
    ]
    sweep_plot(tmp_path / "made" / "plot.png", points, "rfd_compact_cifar10", best="trial-03")
    with Image.open(tmp_path / "made" / "plot.png") as picture:
        width, height = picture.size
    assert width > 1500
    assert height > 600


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="points are 0; expected at least 1"):
        sweep_plot(tmp_path / "plot.png", [], "rfid")
