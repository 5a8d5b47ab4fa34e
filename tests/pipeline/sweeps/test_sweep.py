"""Sweeps with real trainings on a real Ray: what ASHA stops, what a kill leaves, what the best one is worth."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.run import Run
from pipeline.sweeps import sweep
from pipeline.sweeps.trials import Trial

SMALL = ("train.max_steps=12", "train.validate_every=2", "train.validation_images=16", "evaluate.max_images=16")


def ledger(folder: Path) -> list[dict]:
    try:
        return json.loads((folder / "trials.json").read_text())["trials"]
    except FileNotFoundError:
        return []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_asha_stops_a_trial_that_is_behind_and_its_child_is_closed_with_the_reason(ray_session, configure, tmp_path):
    keys = ("sweep.space={train.learning_rate: [0.003, 1.0e-9, 1.0e-10]}", "sweep.scheduler=asha", "sweep.reduction=2",
            "sweep.grace_steps=2", "sweep.at_once=1", "sweep.cuts={relative: [0.5]}")  # fmt: skip
    run = Run.open("sweep", configure(*SMALL, *keys), "sweep", resume=False)
    try:
        sweep.run(run)
    finally:
        run.close()
    entries = ledger(tmp_path / "sweep")
    assert entries[0]["status"] == "finished"
    stopped = [entry for entry in entries if entry["status"] == "stopped"]
    assert stopped
    assert {entry["status"] for entry in entries} == {"finished", "stopped"}
    folder = tmp_path / "sweep" / Trial(stopped[0]["number"], stopped[0]["values"]).name
    found = json.loads((folder / "summary.json").read_text())
    assert found["status"] == "stopped"
    assert found["error"].startswith("ASHA: after step")
    assert not list((tmp_path / "sweep").glob(f"{folder.name}-relative-evaluate"))  # it was not measured any more


@pytest.fixture
def start(tmp_path: Path, repository: Path, shards: Path):
    """Starts jobs/sweep.py in an empty folder and returns the process."""

    def run(job: str, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(repository), "TATOK_COMMIT": "made"}
        return subprocess.Popen(
            [sys.executable, str(repository / "jobs" / f"{job}.py"), *arguments],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    return run


def statuses(tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Run id and status of every MLflow run by name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    return {run.info.run_name: (run.info.run_id, run.info.status) for run in client.search_runs(["1"])}


def wait_for_checkpoint(process: subprocess.Popen[str], training: Path) -> None:
    limit = time.monotonic() + 600
    while not list((training / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_asked_to_stop_lets_its_trial_save_and_begins_no_other(start, shards, tmp_path, how):
    folder = tmp_path / "runs" / "sweep_smoke-sweep"
    process = start("sweep", "sweep_smoke", f"data.shards={shards}", "sweep.at_once=1", "train.max_steps=5000",
                    "train.checkpoint_every=5", "tracking.uri=")  # fmt: skip
    wait_for_checkpoint(process, folder / "trial-00-global_tokens-2-train")
    process.send_signal(how)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 3, said
    assert [(trial["number"], trial["status"]) for trial in ledger(folder)] == [(0, "running")]
    for name in ("", "trial-00-global_tokens-2", "trial-00-global_tokens-2-train"):
        assert json.loads((folder / name / "summary.json").read_text())["status"] == "stopped"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_killed_sweep_finishes_the_missing_trials_in_the_same_parent_and_child(start, shards, tmp_path):
    keys = ["sweep_smoke", f"data.shards={shards}", "sweep.at_once=1", "train.max_steps=60", "train.checkpoint_every=5",
            "tracking.system_metrics=false"]  # fmt: skip
    folder = tmp_path / "runs" / "sweep_smoke-sweep"
    process = start("sweep", *keys)
    wait_for_checkpoint(process, folder / "trial-01-global_tokens-4-train")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = statuses(tmp_path)
    assert before["trial-01-global_tokens-4"][1] == "RUNNING"
    trained = (folder / "trial-00-global_tokens-2-train" / "summary.json").read_bytes()
    resumed = start("sweep", *keys, "--resume")
    _, said = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, said
    assert "1 of 3 trials have ended before and are not run again" in said
    assert (folder / "trial-00-global_tokens-2-train" / "summary.json").read_bytes() == trained
    assert "going on from step" in (folder / "trial-01-global_tokens-4" / "output.txt").read_text()
    after = statuses(tmp_path)
    assert len(after) == 4
    assert {status for _, status in after.values()} == {"FINISHED"}
    assert {name: run_id for name, (run_id, _) in before.items()}.items() <= {
        name: run_id for name, (run_id, _) in after.items()
    }.items()
    assert len((folder / "table.csv").read_text().splitlines()) == 1 + 18
    best_trains_to_the_same_numbers(start, folder, tmp_path)


def best_trains_to_the_same_numbers(start, folder: Path, tmp_path: Path) -> None:
    """Equal to the last bit where both compute on one thread; sums may be ordered otherwise elsewhere: 0.1 dB."""
    summary = json.loads((folder / "summary.json").read_text())
    (trained,) = folder.glob(f"trial-{summary['results']['best_trial']:02.0f}-*-train")
    process = start("train", summary["outputs"]["best"], "tokenizer.checkpoint=", "run.name=again", "tracking.uri=")
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    again = json.loads((tmp_path / "runs" / "again" / "summary.json").read_text())["results"]
    wanted = json.loads((trained / "summary.json").read_text())["results"]
    assert again["validation_psnr"] == pytest.approx(wanted["validation_psnr"], abs=0.1)
    assert again["steps"] == wanted["steps"]
