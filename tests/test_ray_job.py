"""The documented way onto a cluster: `ray job submit`, with Ray's token authentication as it is by default."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def head(repository: Path) -> Iterator[dict[str, str]]:
    """A cluster of one node with its dashboard; the value is what the environment of its users needs."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's sockets lie in it
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port()}
    programs = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"  # jobs say `python`
    environment = {
        **os.environ,
        "PATH": programs,
        "RAY_AUTH_MODE": "token",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "RAY_raylet_start_wait_time_s": "120",
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", *(f"--{name}={port}" for name, port in ports.items())]
    log = open(folder / "log", "w")  # noqa: SIM115 - open for as long as the cluster writes to it
    process = subprocess.Popen(
        [*command, f"--temp-dir={folder}/t"], cwd=repository, env=environment, stdout=log, stderr=log
    )
    limit = time.monotonic() + 300
    try:
        while not answers(dashboard):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < limit, (folder / "log").read_text()
            time.sleep(0.5)
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(head: dict[str, str], repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str, options: tuple[str, ...] = ("--working-dir", ".")) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", "submit", *options, "--", "python", *arguments]
        return subprocess.run(command, cwd=repository, env=head, capture_output=True, text=True, timeout=300)

    return run


def test_a_submitted_job_leaves_its_run_folder_where_it_says(submit, tmp_path):
    said = submit("jobs/preprocess.py", "smoke", f"run.output={tmp_path}", "run.name=one", "tracking.uri=")
    assert said.returncode == 0, said.stderr
    assert f"RUN_FOLDER={tmp_path / 'one'}" in said.stdout.splitlines()
    assert json.loads((tmp_path / "one" / "summary.json").read_text())["status"] == "finished"


def test_a_submitted_job_refuses_an_output_that_would_vanish(submit):
    said = submit("jobs/preprocess.py", "smoke")
    assert said.returncode == 1  # Ray's client knows no other failure
    assert "run.output is 'runs', which would vanish" in said.stdout + said.stderr


def test_without_a_working_directory_a_job_runs_in_the_folder_where_the_head_was_started(submit, tmp_path):
    said = submit("jobs/preprocess.py", "smoke", f"run.output={tmp_path}", "run.name=bare", "tracking.uri=", options=())
    assert said.returncode == 0, said.stdout + said.stderr
    summary = json.loads((tmp_path / "bare" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["commit"] != "unknown"  # it ran in the clone and not in a copy


def test_the_doctor_asks_the_cluster_it_was_submitted_to(submit, tmp_path):
    keys = ("smoke", f"run.output={tmp_path}/runs", "tracking.uri=", "data.num_workers=1")
    said = submit("jobs/doctor.py", *keys)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "resources  2 CPUs, 0 GPUs" in said.stdout
    assert "nodes      1 node" in said.stdout


def test_a_stopped_job_leaves_a_checkpoint_and_a_closed_run(submit, head, tmp_path):
    keys = ["smoke", f"run.output={tmp_path}", "run.name=one", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    keys += ["data.num_workers=1", "train.max_steps=100000", "train.validate_every=0", "train.checkpoint_every=0"]
    options = ("--no-wait", "--submission-id", "to-be-stopped", "--working-dir", ".")
    assert submit("jobs/train.py", *keys, options=options).returncode == 0
    folder, limit = tmp_path / "one", time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < limit, "the job does not get so far"
        time.sleep(0.5)
    stopped = subprocess.run(
        [RAY, "job", "stop", "to-be-stopped"], env=head, capture_output=True, text=True, timeout=120
    )
    assert stopped.returncode == 0, stopped.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("stopped", 3)
    assert list((folder / "checkpoints").glob("step-*"))
    from mlflow import MlflowClient

    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(summary["mlflow_run_id"])
    assert run.info.status != "RUNNING"
