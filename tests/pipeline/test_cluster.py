"""Whether what is asked for fits, where networks compute, and that Ray leaves the job's signals alone."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pipeline.core.cluster import (
    as_they_finish,
    check_cpus,
    connect,
    most_resources,
    pick_device,
    pick_workers_device,
    uses_bf16,
)
from pipeline.core.errors import BadInput


def test_more_workers_than_cpus_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    check_cpus("train.num_workers", 2)
    check_cpus("train.num_workers", 4, cpus_per_worker=0.5)
    with pytest.raises(BadInput, match="train.num_workers is 3, which needs 3 CPUs; expected at most 2 .* 2 CPUs"):
        check_cpus("train.num_workers", 3)
    with pytest.raises(BadInput, match="needs 4.5 CPUs; expected at most 1"):
        check_cpus("train.num_workers", 3, cpus_per_worker=1.5)


def test_a_cluster_is_not_measured_by_this_machine(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_cpus("train.num_workers", 10_000)
    monkeypatch.setenv("RAY_ADDRESS", "")  # names none, as `connect` has it
    with pytest.raises(BadInput):
        check_cpus("train.num_workers", 10_000)


@pytest.mark.usefixtures("ray_session")
def test_connecting_again_does_nothing():
    assert connect() is connect()


@pytest.mark.ray
@pytest.mark.slow
def test_connecting_leaves_sigterm_to_the_job(run_python):
    said = run_python(
        "import signal\n"
        "from pipeline.core.cluster import connect\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: print('orderly stop'))\n"
        "connect()\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    assert (said.returncode, said.stdout) == (0, "orderly stop\n"), said.stderr


def test_what_an_autoscaler_may_add_counts_as_there(monkeypatch):
    from ray._private.state import state

    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "memory": 9.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 64, "GPU": 8})
    assert most_resources(ray) == {"CPU": 64.0, "GPU": 8.0, "memory": 9.0}
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    assert most_resources(ray) == {"CPU": 4.0, "memory": 9.0}


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_that_died_is_not_waited_for(run_python):
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's sockets lie in it
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # as a killed head leaves it behind
    code = "from pipeline.core.cluster import connect\nprint(connect().is_initialized())"
    said = run_python(code, RAY_TMPDIR=str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    assert said.stdout.splitlines()[-1:] == ["True"], said.stderr


class WaitsForTheReader:
    """Its second row is not finished before the file is there, for which it waits a while."""

    def __init__(self, place: str) -> None:
        self.place, self.rows = Path(place), 0

    def __call__(self, row: dict) -> dict:
        self.rows += 1
        until = time.monotonic() + 20
        while self.rows == 2 and not self.place.exists() and time.monotonic() < until:
            time.sleep(0.05)
        return {"seen": self.place.exists()}


@pytest.mark.ray
def test_rows_come_when_they_are_finished_and_not_when_the_next_is(tmp_path, ray_session):
    ray = connect()
    items = ray.data.range(2, override_num_blocks=2)
    place = tmp_path / "read"
    pool = ray.data.ActorPoolStrategy(size=1)
    seen = []
    for row in as_they_finish(items.map(WaitsForTheReader, fn_constructor_args=(str(place),), compute=pool)):
        seen.append(row["seen"])
        place.touch()
    assert seen == [False, True]


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
