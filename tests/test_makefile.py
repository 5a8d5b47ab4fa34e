"""The Makefile on machines that lack something, and on one where everything is installed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make, which is absent here")
INSTALLED = ".venv/.installed"


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(repository / name, tmp_path)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "PIP_ARGS", "PORT")  # of a `make test` around this one
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
    )


def python_that_fails_at(word: str, checkout: Path) -> str:
    """A stand-in for an interpreter: any program that mentions `word` fails."""
    script = checkout / "python"
    script.write_text(f'#!/bin/sh\ncase "$*" in *{word}*) exit 1;; --version) echo Python 3.8.1;; esac\n')
    script.chmod(0o755)
    return f"PYTHON={script}"


def test_bare_make_lists_every_command(checkout):
    targets = set(re.findall(r"^\.PHONY: (.*)$", (checkout / "Makefile").read_text(), flags=re.MULTILINE)[0].split())
    listed = {line.split()[1] for line in make(checkout).stdout.splitlines()}
    assert listed == targets
    assert {"demo", "test"} <= listed


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        ("version_info", r"error: Python 3\.8\.1 is too old; expected 3\.11 or newer"),
        ("ensurepip", r"error: .*python has no venv module; expected one"),
    ],
)
def test_an_unfit_python_is_answered_with_a_sentence(checkout, lacking, sentence):
    finished = make(checkout, "install", python_that_fails_at(lacking, checkout))
    assert finished.returncode == 2
    assert re.match(sentence, finished.stdout), finished
    assert not (checkout / ".venv").exists()


def test_a_missing_python_is_answered_with_a_sentence(checkout):
    finished = make(checkout, "demo", "PYTHON=no-such-python")
    assert finished.stdout.startswith("error: no-such-python is not installed; expected Python 3.11 or newer")


def test_what_is_installed_is_not_installed_again_until_its_list_changes(checkout):
    stamp = checkout / INSTALLED
    stamp.parent.mkdir()
    stamp.touch()
    assert "Nothing to be done" in make(checkout, "install").stdout
    later = stamp.stat().st_mtime + 10
    os.utime(checkout / "requirements.lock", (later, later))
    assert "pip install" in make(checkout, "install", "--dry-run").stdout


def test_the_mlflow_server_is_for_this_machine_only(checkout):
    (checkout / ".venv").mkdir()
    (checkout / INSTALLED).touch()
    said = make(checkout, "--dry-run", "ui", "PORT=1234").stdout
    assert "--host 127.0.0.1 --port 1234" in said
    assert "0.0.0.0" not in said
