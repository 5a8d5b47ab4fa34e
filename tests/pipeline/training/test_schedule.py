import pytest

from pipeline.core.config import TrainConfig
from pipeline.training.state import learning_rate

CONFIG = TrainConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, max_steps=110)


def test_warm_up_is_linear_and_starts_above_zero():
    assert [learning_rate(step, CONFIG) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]


def test_the_cosine_goes_from_peak_to_minimum():
    assert learning_rate(10, CONFIG) == 1.0
    assert learning_rate(60, CONFIG) == pytest.approx(0.55)
    assert learning_rate(110, CONFIG) == pytest.approx(0.1)
    assert learning_rate(500, CONFIG) == pytest.approx(0.1)
