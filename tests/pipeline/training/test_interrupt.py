"""Ctrl-C during Ray Train: every process of the terminal gets it, and the run still ends in good order."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray]
KEYS = ("run.name=one", "train.num_workers=2", "train.cpus_per_worker=0.5", "train.max_steps=100000", "tracking.uri=")


def test_ctrl_c_saves_and_stops_ray_workers(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "runs" / "one"
    command = [sys.executable, str(repository / "jobs" / "train.py"), "smoke", *KEYS]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
        )
    limit = time.monotonic() + 180
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None, "ended before it was interrupted"
        assert time.monotonic() < limit
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=90)
    summary = json.loads((folder / "summary.json").read_text())
    assert (process.returncode, summary["status"]) == (3, "stopped")
    assert out.endswith(f"RUN_FOLDER={folder}\n")
    assert list((folder / "checkpoints").glob("step-*"))
    assert "PlacementGroupCleaner" not in (tmp_path / "said").read_text(), (
        "it says every second that it has no dashboard"
    )
