"""The built wheel, installed outside the clone, runs a job: nothing it needs was left behind."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
COPIED = ("pyproject.toml", "README.md", "LICENSE", "pipeline", "tatok_model")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    finished = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Built from a copy: setuptools would otherwise leave its `build` folder in the clone."""
    source = tmp_path_factory.mktemp("source")
    for name in COPIED:
        copy = shutil.copytree if (repository / name).is_dir() else shutil.copy
        copy(repository / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_code_presets_and_weights_and_nothing_else(wheel, repository):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for pattern in ("*.py", "evaluation/page.html", "configs/*.yaml", "weights/*.safetensors", "weights/*/*.*"):
        for top in ("pipeline", "tatok_model"):
            expected |= {str(path.relative_to(repository)) for path in (repository / top).rglob(pattern)}
    assert names == expected


@pytest.mark.slow
def test_a_job_runs_from_the_wheel_outside_the_clone(site, tmp_path, repository):
    shutil.copy(repository / "jobs" / "preprocess.py", tmp_path)
    surroundings = {"PYTHONPATH": str(site)}
    where = run(sys.executable, "-c", "import pipeline; print(pipeline.__file__)", cwd=tmp_path, **surroundings)
    assert Path(where.strip()).is_relative_to(site)
    said = run(sys.executable, "preprocess.py", "smoke", "run.name=one", cwd=tmp_path, **surroundings)
    assert said.endswith(f"RUN_FOLDER={tmp_path / 'runs' / 'one'}\n")
    assert (tmp_path / "runs" / "one" / "manifest.json").exists()
