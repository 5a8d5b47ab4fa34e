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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A cluster of one node with its dashboard; the value is what the environment of its users needs."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's sockets lie in it
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port()}
    programs = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"  # jobs say `python`
    environment = {**os.environ, "PATH": programs, "RAY_AUTH_MODE": "token"}
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", *(f"--{name}={port}" for name, port in ports.items())]
    log = open(folder / "log", "w")  # noqa: SIM115 - open for as long as the cluster writes to it
    process = subprocess.Popen([*command, f"--temp-dir={folder}/t"], env=environment, stdout=log, stderr=log)
    limit = time.monotonic() + 120
    while not answers(dashboard):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < limit, (folder / "log").read_text()
        time.sleep(0.5)
    yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    process.terminate()
    process.wait(timeout=60)
    log.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(head: dict[str, str], repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", *arguments]
        return subprocess.run(command, cwd=repository, env=head, capture_output=True, text=True, timeout=200)

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
