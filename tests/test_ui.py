"""The MLflow pages as people see them, in headless Chromium."""

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.core.presets import config_from_dict
from pipeline.core.run import Run
from pipeline.tracking import Tracker

PORT = 50371


@pytest.fixture
def server(tmp_path: Path):
    """An MLflow server on a store with one run; its address."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = config_from_dict({"run": {"output": str(tmp_path)}, "tracking": {"uri": uri, "system_metrics": False}})
    run = Run.open("train", config, "shown", resume=False)
    with Tracker.start(run) as tracker:
        for step in range(5):
            run.log({"train/loss": 1 / (step + 1), "validation/psnr": 20.0 + step}, step)
        tracker.commit()
    run.close()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1"]
    process = subprocess.Popen([*command, "--backend-store-uri", uri], cwd=tmp_path, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{PORT}"
    try:
        _wait_for(address + "/health")
        yield f"{address}/#/experiments/1/runs/{run.mlflow_run_id}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(address: str) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"{address} did not answer within a minute")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_run_page_shows_metrics_and_parameters_by_name(chromium, server, tmp_path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += [
        "--disable-quic",
        "--disable-sync",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    page = subprocess.run(
        [chromium, *options, "--virtual-time-budget=30000", "--dump-dom", server],
        capture_output=True, text=True, timeout=150,
    ).stdout  # fmt: skip
    for name in ("train/loss", "validation/psnr", "tokenizer.global_tokens", "preset"):
        assert name in page
