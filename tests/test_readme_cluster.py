"""The README's commands for a cluster, as they stand there, on a cluster of two nodes on this machine."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]
HEADING = "## On a cluster"
SECONDS = 1500  # for a command, the demo's training among them


def answers(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(port: int, seconds: float = 200) -> None:
    limit = time.monotonic() + seconds
    while not answers(port):
        assert time.monotonic() < limit, f"nothing listens at {port}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def commands(repository: Path) -> list[str]:
    """Those of the section's block, without what is said about them."""
    section = (repository / "README.md").read_text().split(f"{HEADING}\n")[1].split("\n## ")[0]
    block = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    assert len(block) == 1
    return [line.split(" #")[0].strip() for line in block[0].splitlines()]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Short, because Ray's sockets lie in it; all that the cluster leaves goes with it, its processes first."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as made:
        yield Path(made)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == made:
                    process.kill()


@pytest.fixture(scope="module")
def run(repository: Path, folder: Path):
    """Runs a command in the checkout as somebody who has set the README's variables; returns what it said."""
    for port in (6379, 8265):
        assert not answers(port), (
            f"something listens at port {port}, which `ray start` takes: end it and run this again"
        )
    from ray.util import get_node_ip_address  # `ray start --head` prints it

    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),  # of the token
        "RAY_TMPDIR": str(folder),
        "RAY_raylet_start_wait_time_s": "120",
        "SHARED": str(folder / "shared"),
        "HEAD": get_node_ip_address(),
        "PRESET": "smoke",
    }

    def command(text: str) -> str:
        said = subprocess.run(
            ["bash", "-c", text], cwd=repository, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert said.returncode == 0, f"{text}\n{said.stdout[-3000:]}\n{said.stderr[-3000:]}"
        return said.stdout + said.stderr

    return command


def test_the_commands_run_as_they_stand_there(commands, run, folder):
    assert commands[0].startswith("export ")
    said = {}
    for command in commands[1:]:
        begun = time.monotonic()
        if " ray start " in command:
            # On one machine each node needs what is its own on two: the port of the agent that takes jobs, and a folder
            # for the copies of working directories, which nodes otherwise take away from each other's jobs.
            port = free_port()
            own = f"--dashboard-agent-listen-port={port}"
            if "--head" not in command:
                own += f" --temp-dir={folder}/second"
            said[command] = run(f"{commands[0]}\n{command} {own}")
            wait_for(port)  # it comes after `ray start` has returned
        else:
            said[command] = run(f"{commands[0]}\n{command}")
        print(f"{time.monotonic() - begun:.0f} s: {command}")
    doctor, train, evaluate, bare = (text for command, text in said.items() if command.startswith("ray job submit"))
    assert "nodes      2 nodes" in doctor
    for name, text in (("smoke-train", train), ("smoke-evaluate", evaluate), ("demo-train", bare)):
        run_folder = folder / "shared" / "runs" / name
        assert f"RUN_FOLDER={run_folder}" in text.splitlines()
        assert json.loads((run_folder / "summary.json").read_text())["status"] == "finished"
    summary = json.loads((folder / "shared" / "runs" / "demo-train" / "summary.json").read_text())
    assert summary["commit"] != "unknown"  # it ran in the checkout and not in a copy
