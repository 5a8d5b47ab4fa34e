"""MLflow killed for half a minute, several times, under a training that goes on: its speed, and the history afterwards.

A rate counts the seconds in which the training's thread computed or waited for something, and leaves out those in which
it waited for a processor, as the kernel tells them apart: what else the machine does would otherwise decide the test.
Prints what it measured (pytest -s).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import NamedTuple, Self

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SECONDS, TIMES = 30.0, 4  # of an outage, and how many
SLOWER = 0.05  # what an outage may cost


class Server:
    """An MLflow server on this machine that can be killed."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.address = f"http://127.0.0.1:{port}"
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts",
        ]  # fmt: skip

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet, start_new_session=True)
        end = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.address}/health", timeout=2).close()
                return
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.5)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Moment(NamedTuple):
    """How far a training was."""

    seconds: float  # unix time
    waited: float  # seconds its main thread has stood in line for a processor
    steps: int

    @classmethod
    def now(cls, training: "subprocess.Popen[bytes]", folder: Path) -> Self:
        waited = int(Path(f"/proc/{training.pid}/task/{training.pid}/schedstat").read_text().split()[1])
        return cls(time.time(), waited / 1e9, len(logged(folder)))


def rate(begun: Moment, ended: Moment, contended: bool = False) -> float:
    """Steps per second between two moments, those in line for a processor counted or not."""
    waited = 0.0 if contended else ended.waited - begun.waited
    return (ended.steps - begun.steps) / (ended.seconds - begun.seconds - waited)


def logged(folder: Path) -> list[int]:
    """The steps whose metrics are in the run folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line["metrics"]]


def wait_until(condition, what: str, seconds: float = 200) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.5)


def test_a_dead_mlflow_costs_a_training_less_than_a_twentieth_of_its_speed(configure, repository, tmp_path):
    server = Server(tmp_path)
    server.start()
    # Every step is logged, and sent at every fiftieth: much more often than in earnest.
    keys = {"max_steps": 10**6, "log_every": 1, "checkpoint_every": 50, "validate_every": 0, "num_workers": 0}
    tracking = {"uri": server.address, "flush_seconds": 1.0}
    (tmp_path / "run.yaml").write_text(configure(train=keys, tracking=tracking, run={"name": "run"}).to_yaml())
    command = [sys.executable, str(repository / "jobs" / "train.py"), str(tmp_path / "run.yaml")]
    folder, quiet = tmp_path / "run", subprocess.DEVNULL
    training = subprocess.Popen(command, cwd=tmp_path, stdout=quiet, stderr=quiet, start_new_session=True)

    def sent() -> int:
        path = folder / "tracking.json"
        return json.loads(path.read_text())["sent"].get("train/loss", 0) if path.exists() else 0

    windows = []
    try:
        wait_until(lambda: sent() > 0, "nothing is tracked")
        for _ in range(TIMES):
            time.sleep(5)  # what a start of the server costs is the server's
            begun = Moment.now(training, folder)
            time.sleep(SECONDS)
            killed = Moment.now(training, folder)
            server.kill()
            time.sleep(SECONDS)
            restarted = Moment.now(training, folder)
            before = sent()
            server.start()
            wait_until(lambda: sent() > before, "what was kept is not sent")  # noqa: B023 - called at once
            windows.append((begun, killed, restarted))
        training.send_signal(signal.SIGTERM)
        assert training.wait(timeout=120) == 3
        steps = logged(folder)
        assert history(server.address, folder) == steps
    finally:
        training.kill()
        training.wait()
        server.kill()
    for contended in (True, False):
        alive = [rate(begun, killed, contended) for begun, killed, _ in windows]
        dead = [rate(killed, restarted, contended) for _, killed, restarted in windows]
        ratios = [without / with_it for with_it, without in zip(alive, dead, strict=True)]
        print("\nby the clock:" if contended else "without waits for a processor:")
        print(f"steps/s with MLflow {rounded(alive)}, while it is dead {rounded(dead)}, ratios {rounded(ratios)}")
        print(f"median ratio {median(ratios):.3f}, {len(steps)} steps in all")
    assert median(ratios) > 1 - SLOWER


def history(address: str, folder: Path) -> list[int]:
    """The steps whose loss MLflow has, as it has them."""
    from mlflow import MlflowClient

    run_id = json.loads((folder / "summary.json").read_text())["mlflow_run_id"]
    return [metric.step for metric in MlflowClient(address).get_metric_history(run_id, "train/loss")]


def rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]
