import pytest
from PIL import Image

from pipeline.sweeps.report import Point, sweep_plot


def test_many_trials_and_rules_fit_into_one_picture(tmp_path):
    points = [
        Point(f"trial-{t:02d}", t, 4, rule, 0.1 * i, 4.0 + t + 2 * i, 30.0 + 9 * i, 29.0, 20.0 + i, 9.0 - i, 50.0)
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
