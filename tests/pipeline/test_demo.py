import json
import re
import sqlite3
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
    for shown in ("rfd_compact_cifar10", "make ui", *pictures):
        assert shown in finished.stderr
    assert Path(pictures[1]).is_file()
    assert "Traceback" not in finished.stderr
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = database.execute("select name, status from runs order by name").fetchall()
    stages = [re.sub(r"shards-[0-9a-f]{8}$", "shards", name.removeprefix("smoke-")) for name, _ in runs]
    assert stages == ["evaluate", "generate", "shards", "tokens", "train", "train-generator"]
    assert {status for _, status in runs} == {"FINISHED"}


def test_each_demo_gets_the_next_free_number(tmp_path):
    config = load_config("smoke", [f"run.output={tmp_path}"])
    assert demo.default_name(config) == "smoke-1"
    (tmp_path / "smoke-1").mkdir()
    assert demo.default_name(config) == "smoke-2"
