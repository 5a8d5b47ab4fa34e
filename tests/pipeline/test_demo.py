import json
import re
import shlex
import sqlite3
import subprocess
from pathlib import Path

import pytest

from pipeline import demo
from pipeline.core.presets import load_config


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_demo_walks_every_stage_and_says_where_to_look(run_job, tmp_path):
    finished = run_job("demo", "smoke", "train.max_steps=2", "evaluate.max_images=32",
                       "train_generator.max_steps=2", "generate.images=16", timeout=280)  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    folder = Path(finished.stdout.split("RUN_FOLDER=")[1].strip())
    assert folder == tmp_path / "runs" / "smoke-1"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["results"]["evaluate_psnr"] > 5
    assert Path(summary["outputs"]["evaluate_reconstructions"]).is_file()
    pictures = summary["outputs"]["evaluate_reconstructions"], summary["outputs"]["generate_samples"]
    for shown in (
        "rfd_compact_cifar10",
        "mlflow server",
        *(path.removeprefix(f"{tmp_path}/") for path in pictures),
    ):
        assert shown in finished.stderr
    assert Path(pictures[1]).is_file()
    assert "Traceback" not in finished.stderr
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("select name, status from runs order by name").fetchall()
    stages = [re.sub(r"shards-[0-9a-f]{8}$", "shards", name.removeprefix("smoke-")) for name, _ in runs]
    assert stages == ["evaluate", "generate", "shards", "tokens", "train", "train-generator"]
    assert {status for _, status in runs} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_job_ends_with_a_command_that_works_when_pasted(run_job, tmp_path):
    """From shards to measured generated pictures by nothing but what the jobs say; under a name with a blank."""
    few = "train.max_steps=4", "train_generator.max_steps=4", "evaluate.max_images=32", "data.num_workers=1"
    said = run_job("preprocess", "smoke", "run.output=my runs", *few)
    jobs = []
    while (command := said.stderr.splitlines()[-1]).find("mlflow") < 0:
        assert said.returncode == 0, said.stderr
        jobs.append(Path(shlex.split(command)[1]).stem)
        said = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert jobs == ["train", "evaluate", "tokenize_images", "train_generator", "generate", "evaluate"]
    assert not (tmp_path / "runs").exists()
    names = {path.name for path in (tmp_path / "my runs").iterdir()}
    assert names >= {"smoke-train", "smoke-evaluate", "smoke-tokens", "smoke-train-generator", "smoke-generate"}
    calibrated = run_job("calibrate", "smoke", "run.output=my runs", *few, "filter.mean_tokens=10",
                         "tokenizer.checkpoint=my runs/smoke-train", f"data.shards={shards_of(tmp_path)}")  # fmt: skip
    command = calibrated.stderr.splitlines()[-1]
    assert "filter.threshold=0." in command
    said = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert said.returncode == 0, said.stderr
    folder = said.stdout.strip().removeprefix("RUN_FOLDER=")
    found = json.loads((Path(folder) / "summary.json").read_text())["results"]
    assert found["tokens_per_image"] == pytest.approx(10, abs=4)


def shards_of(folder: Path) -> Path:
    return next((folder / "my runs").glob("smoke-shards-*"))


def test_each_demo_gets_the_next_free_number(tmp_path):
    config = load_config("smoke", [f"run.output={tmp_path}"])
    assert demo.default_name(config) == "smoke-1"
    (tmp_path / "smoke-1").mkdir()
    assert demo.default_name(config) == "smoke-2"
