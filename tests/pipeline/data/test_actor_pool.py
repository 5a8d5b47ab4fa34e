"""How many Ray Data actors preprocess: by what is asked for, by the ranges, and by what a cluster may grow to."""

from types import SimpleNamespace

import pytest

from pipeline.core.presets import load_config
from pipeline.data import preprocess
from pipeline.data.preprocess import Work


@pytest.mark.parametrize(
    ("there", "most", "workers", "ranges", "expected"),
    [
        ({"CPU": 4.0}, {"CPU": 4.0}, 0, 100, (4, 4)),
        ({"CPU": 4.0}, {"CPU": 64.0}, 0, 100, (4, 64)),
        ({"memory": 1.0}, {"CPU": 16.0}, 0, 100, (1, 16)),  # a head node without CPUs, before workers came
        ({"CPU": 4.0}, {"CPU": 64.0}, 8, 100, (8, 8)),
        ({"CPU": 4.0}, {"CPU": 64.0}, 0, 3, (3, 3)),
    ],
)
def test_the_pool_begins_with_what_is_there_and_may_grow(monkeypatch, tmp_path, there, most, workers, ranges, expected):
    made = {}
    ray = SimpleNamespace(
        cluster_resources=lambda: there, data=SimpleNamespace(ActorPoolStrategy=lambda **sizes: made.update(sizes))
    )
    monkeypatch.setattr(preprocess, "most_resources", lambda ray: most)
    data = load_config("smoke", [f"data.num_workers={workers}"]).data
    preprocess._pool(ray, ranges, Work(tmp_path, "key", [], [], data))
    assert (made["min_size"], made["max_size"]) == expected
