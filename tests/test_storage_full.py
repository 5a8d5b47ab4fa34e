"""Jobs on storage that is really full: a small file system in memory, filled up, and emptied before `--resume`.

Needs a mount namespace of its own, which not every machine allows.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MAY_MOUNT = (
    shutil.which("unshare") is not None
    and not subprocess.run(
        ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    ).returncode
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not MAY_MOUNT, reason="needs to mount a file system, which is not allowed here"),
]
SCRIPT = """
import json, pathlib, subprocess, sys
job, left, *arguments = sys.argv[1:]
full, kept = pathlib.Path("full"), pathlib.Path("kept")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(full)], check=True)
(full / "filler").write_bytes(bytes(200 * 2**20 - 65536 - int(left)))
(full / "earlier").mkdir()
(full / "earlier" / "result").write_text("of another run")
command = [sys.executable, job, *arguments, "run.output=" + str(full.absolute()), "run.name=one"]

def attempt(*more):
    said = subprocess.run([*command, *more], capture_output=True, text=True)
    summary = json.loads((full / "one" / "summary.json").read_text())
    return {"code": said.returncode, "said": said.stderr[-2000:], "summary": summary}

first = attempt()
leftovers = [str(path) for path in (full / "one").rglob(".*") if path.name != ".lock"]
(full / "filler").unlink()
second = attempt("--resume")
earlier = (full / "earlier" / "result").read_text()
kept.write_text(json.dumps({"first": first, "second": second, "earlier": earlier, "leftovers": leftovers}))
"""


@pytest.fixture
def fill(tmp_path: Path, repository: Path) -> Callable[..., dict[str, Any]]:
    """`fill("train", bytes_left, "smoke", ...)` runs a job on nearly full storage, then with room and --resume."""
    (tmp_path / "full").mkdir()

    def run(job: str, left: int, *arguments: str) -> dict[str, Any]:
        command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", SCRIPT]
        file = str(repository / "jobs" / f"{job}.py")
        said = subprocess.run([*command, file, str(left), *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        return json.loads((tmp_path / "kept").read_text())

    return run


def check(found: dict[str, Any]) -> None:
    first, second = found["first"], found["second"]
    assert first["code"] == 1, first["said"]
    assert "storage is full" in first["said"]
    assert "make space, then go on with --resume" in first["said"].splitlines()[-1]
    assert found["leftovers"] == []  # what is half written would keep others from their room
    assert first["summary"]["status"] in ("failed", "running")  # the latter where not even that could be written
    assert (second["code"], second["summary"]["status"]) == (0, "finished"), second["said"]
    assert found["earlier"] == "of another run"


def test_preprocess_tells_that_storage_is_full_and_goes_on(fill: Callable[..., dict[str, Any]]) -> None:
    check(fill("preprocess", 200_000, "smoke", "data.num_workers=1", "tracking.uri="))


@pytest.fixture
def shards(run_job: Callable[..., Any], tmp_path: Path) -> Path:
    said = run_job("preprocess", "smoke", "data.num_workers=1", "tracking.uri=", "run.name=shards", timeout=300)
    assert said.returncode == 0, said.stderr
    return tmp_path / "runs" / "shards"


def test_train_and_tokenize_images_tell_that_storage_is_full_and_go_on(
    fill: Callable[..., dict[str, Any]], run_job: Callable[..., Any], shards: Path, tmp_path: Path
) -> None:
    keys = ("smoke", f"data.shards={shards}", "tracking.uri=", "tokenizer.size=nano")
    check(fill("train", 500_000, *keys))
    said = run_job("train", *keys, "run.name=trained", timeout=300)
    assert said.returncode == 0, said.stderr
    check(fill("tokenize_images", 30_000, *keys, f"tokenizer.checkpoint={tmp_path}/runs/trained"))
