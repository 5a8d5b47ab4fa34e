"""Fixtures for every test: the shared folder, a local Ray session, a job in a process of its own.

A test that asks for `ray_session` gets the marker `ray` by itself.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Models in tests are tiny: a second thread only waits for the first, and two test processes for four threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, which is absent here")


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own settings must not decide a test."""
    for name in ("TATOK_ROOT", "TATOK_COMMIT", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets and weights beside the checkout; the test is skipped where there is none."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs data sets in ../shared/data, which is absent here")
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program; tests that need it are skipped where it is not."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium, which is absent here (on Debian and Ubuntu: apt install chromium chromium-driver)")
    return found


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., Path]:
    """`write_shards(folder, {"train": rows, "heldout": rows}, 32, ("red", "blue"))` makes shards of 32-pixel pictures.

    A row has the bytes of an `image` and, where it is not 0, a `label`.
    """
    from pipeline.data.shards import Manifest, ShardWriter, Split, fingerprint

    def write(folder: Path, rows: dict[str, list[dict[str, Any]]], size: int, classes: tuple[str, ...]) -> Path:
        (folder / "shards").mkdir(parents=True)
        splits = {}
        for split, those in rows.items():
            with ShardWriter(folder, f"shards/{split}-00000.parquet") as writer:
                for number, row in enumerate(those):
                    label = row.get("label", 0)
                    whole = {"id": str(number), "height": size, "width": size, "label": label, **row}
                    writer.add({**whole, "label_name": classes[label]})
            assert writer.shard is not None
            splits[split] = Split(len(those), (writer.shard,))
        manifest = Manifest(size, {}, "made", classes, splits, 0, fingerprint(splits))
        (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
        return folder

    return write


@pytest.fixture(scope="session")
def ray_session() -> Iterator[ModuleType]:
    """A local Ray with two CPUs that all tests of this session share; the value is the `ray` module."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # train.report waits for this poll
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as in pipeline/core/cluster.py
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
    yield ray
    ray.shutdown()


Finished = subprocess.CompletedProcess[str]


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., Finished]:
    """`run_python("print(1)")` runs code in a process of its own, in an empty folder, and returns what it said."""

    def run(code: str, timeout: float = 120, **environment: str) -> Finished:
        return _python("-c", code, cwd=tmp_path, timeout=timeout, **environment)

    return run


@pytest.fixture
def run_job(tmp_path: Path) -> Callable[..., Finished]:
    """`run_job("train", "smoke", "--dry-run")` runs jobs/train.py in an empty folder and returns what it said."""

    def run(job: str, *arguments: str, timeout: float = 120, **environment: str) -> Finished:
        file = str(REPOSITORY / "jobs" / f"{job}.py")
        return _python(file, *arguments, cwd=tmp_path, timeout=timeout, **environment)

    return run


def _python(*arguments: str, cwd: Path, timeout: float, **environment: str) -> Finished:
    surroundings = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def opened_runs() -> Callable[[], AbstractContextManager[Callable[..., Any]]]:
    """`with opened_runs() as open_run`: `open_run("evaluate", stage, config, "name")` checks and makes a run folder.

    What was opened is closed at the end, whatever became of it.
    """
    from pipeline.core.run import Run

    @contextmanager
    def opened() -> Iterator[Callable[..., Run]]:
        runs: list[Run] = []

        def open_run(kind: str, stage: Any, config: Any, name: str, resume: bool = False) -> Run:
            stage.check(config)
            runs.append(Run.open(kind, config, name, resume=resume))
            return runs[-1]

        try:
            yield open_run
        finally:
            for run in runs:
                run.close()

    return opened


@pytest.fixture(scope="session")
def carry_out(opened_runs: Any) -> Callable[..., Any]:
    """`carry_out("evaluate", stage, config, "name")` runs a stage in this process; returns the closed run."""

    def work(kind: str, stage: Any, config: Any, name: str, resume: bool = False, stop: bool = False) -> Any:
        with opened_runs() as open_run:
            run = open_run(kind, stage, config, name, resume)
            if stop:
                run.request_stop()
            stage.run(run)
            return run

    return work
