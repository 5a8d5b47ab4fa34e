from types import ModuleType

import pytest
import torch

from pipeline.core.cluster import pick_device, pick_workers_device, uses_bf16
from pipeline.core.errors import BadInput


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("train", "auto").type == pick_device("train", "cpu").type == "cpu"
    with pytest.raises(BadInput, match=r"train\.device is 'cuda'; expected cpu or auto on a machine without"):
        pick_device("train", "cuda")


def test_a_gpu_is_taken_where_there_is_one_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [pick_device("train", wanted).type for wanted in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_more_workers_than_the_cluster_has_room_for_are_refused(ray_session: ModuleType) -> None:
    assert pick_workers_device("evaluate", "cpu", 2) == "cpu"
    with pytest.raises(BadInput, match=r"evaluate\.num_workers is 3, which needs 3 CPUs; expected at most .* has, 2"):
        pick_workers_device("evaluate", "auto", 3)
    if not ray_session.cluster_resources().get("GPU"):
        with pytest.raises(BadInput, match=r"tokens\.num_workers is 1, which needs 1 GPUs; expected at most .* has, 0"):
            pick_workers_device("tokens", "cuda", 1)


def test_precision_is_as_configured_and_single_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert [uses_bf16(precision, cpu) for precision in ("auto", "float32", "bf16")] == [False, False, True]
