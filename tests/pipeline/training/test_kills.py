"""SIGKILL at a random step, of a worker, of the driver, of a node: the resumed run ends with the same weights.

Floating-point sums are the same with as many workers and threads; with other numbers of workers the order of summation
differs, and the loss is compared within a tolerance.
"""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import Stopped

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
STEPS = {
    "max_steps": 60, "log_every": 1, "validate_every": 0, "checkpoint_every": 5, "validation_images": 8,
    "cpus_per_worker": 0.5,
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "train/loss" in line["metrics"]]


def losses(folder: Path) -> torch.Tensor:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [line["metrics"].get("train/l2") for line in map(json.loads, lines)]
    return torch.tensor([value for value in found if value is not None])


def wait_for_step(folder: Path, step: int, seconds: float = 400) -> None:
    limit = time.monotonic() + seconds
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("train/loss") < step:
        assert time.monotonic() < limit, "the run does not get so far"
        time.sleep(0.02)


def train_workers() -> list[psutil.Process]:
    """Ray Train's workers below this process, and no other's on this machine; Ray names processes by what they do."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_at_a_random_step_changes_no_weight(ray_session, configure, run_training, tmp_path, workers):
    train = {**STEPS, "num_workers": workers}
    run_training(configure(train=train), "whole")
    at = random.randrange(8, 40)
    before = {process.pid for process in train_workers()}

    def kill() -> None:
        wait_for_step(tmp_path / "killed", at)
        next(process for process in train_workers() if process.pid not in before).kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run_training(configure(train=train), "killed")
    killer.join(timeout=10)
    assert not killer.is_alive()
    assert steps(tmp_path / "killed") == list(range(1, 61))  # each step once, on the committed trajectory
    assert equal(tmp_path / "killed", tmp_path / "whole"), f"killed at step {at}"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_driver_killed_at_a_random_step_changes_no_weight(configure, repository, tmp_path, workers):
    for name in ("whole", "killed"):
        preset = configure(train={**STEPS, "num_workers": workers}, run={"name": name}).to_yaml()
        (tmp_path / f"{name}.yaml").write_text(preset)
    at = random.randrange(8, 40)
    start(repository, tmp_path, "whole").wait(timeout=400)
    killed = start(repository, tmp_path, "killed")
    wait_for_step(tmp_path / "killed", at)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=30)
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["status"] == "running"
    assert start(repository, tmp_path, "killed", "--resume").wait(timeout=400) == 0
    assert steps(tmp_path / "killed") == list(range(1, 61))
    assert equal(tmp_path / "killed", tmp_path / "whole"), f"killed at step {at}"


def start(repository: Path, folder: Path, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(repository / "jobs" / "train.py"), str(folder / f"{name}.yaml"), *arguments]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, stdout=quiet, stderr=quiet, start_new_session=True)


LOSE_A_NODE = """
import json, os, sys, threading, time, traceback  # reads FOLDER, AT, ADDED_BACK from the environment
from pathlib import Path
from ray.cluster_utils import Cluster
from pipeline.core.cluster import connect
from pipeline.core.presets import config_from_dict
from pipeline.core.run import Run
from pipeline.training import train

folder, at = Path(os.environ["FOLDER"]), int(os.environ["AT"])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address

config = config_from_dict(json.loads((folder.parent / "config.json").read_text()))
run = Run.open("train", config, folder.name, resume=False)
ray = connect()
ended = []

def work():
    try:
        train.run(run)
        ended.append(0)
    except BaseException:
        traceback.print_exc()
        ended.append(1)

worker = threading.Thread(target=work)
worker.start()
path = folder / "metrics.jsonl"
while not ended and (not path.exists() or path.read_text().count("train/loss") < at):
    time.sleep(0.02)
cluster.remove_node(second, allow_graceful=False)
if os.environ["ADDED_BACK"] == "yes":
    cluster.add_node(num_cpus=1)  # only the main thread may
worker.join()
ray.shutdown()  # a node that this driver is connected to would not be removed
cluster.shutdown()
sys.exit(ended[0])
"""


@pytest.mark.parametrize("added_back", [True, False], ids=["node added back", "fewer workers"])
def test_a_node_lost_at_a_random_step(run_python, configure, run_training, tmp_path, added_back):
    train = {**STEPS, "max_steps": 30, "num_workers": 2, "min_workers": 0 if added_back else 1, "cpus_per_worker": 1.0}
    fsq = {"quantizer": "fsq", "fsq_levels": (4, 4), "codebook_size": 16}  # no entries that are re-drawn
    config = configure(train=train, tokenizer=fsq)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    environment = {"FOLDER": str(tmp_path / "lost"), "AT": str(random.randrange(8, 25))}
    environment |= {"ADDED_BACK": "yes" if added_back else "no", "RAY_raylet_start_wait_time_s": "120"}
    environment |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_health_check_period_ms": "300"}
    said = run_python(LOSE_A_NODE, timeout=600, **environment)
    assert said.returncode == 0, said.stderr[-3000:]
    assert steps(tmp_path / "lost") == list(range(1, 31)), f"lost at step {environment['AT']}"
    whole = run_training(configure(train={**train, "num_workers": 0, "min_workers": 0}, tokenizer=fsq), "whole")
    # Against one process: the same batches and sums in another order, until a code falls on the other side of a border.
    found, expected = losses(tmp_path / "lost"), losses(whole.folder)
    torch.testing.assert_close(found[:10], expected[:10], rtol=1e-4, atol=0)
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0)


def test_other_numbers_of_workers_go_on_with_the_same_batches(ray_session, configure, run_training, tmp_path):
    fsq = {"quantizer": "fsq", "fsq_levels": (4, 4), "codebook_size": 16}
    ends = {}
    for name, counts in {"one": (1, 1), "two then one": (2, 1), "one then two": (1, 2)}.items():
        for number, workers in enumerate(counts):
            last = {"max_steps": 24} if number else {"max_steps": 24, "max_minutes": 1e-9}
            train = {**STEPS, **last, "num_workers": workers}
            with suppress(Stopped):
                run_training(configure(train=train, tokenizer=fsq), name, resume=bool(number))
        ends[name] = losses(tmp_path / name)
    torch.testing.assert_close(ends["two then one"], ends["one"], rtol=1e-3, atol=0)
    torch.testing.assert_close(ends["one then two"], ends["one"], rtol=1e-3, atol=0)
