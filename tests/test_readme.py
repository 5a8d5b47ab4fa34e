"""Every command of the README in order, as it stands there, in a fresh folder, with models too small to be good."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SIZES = (
    "tokenizer.size=nano", "tokenizer.trunk_layers=0", "tokenizer.codebook_size=32", "tokenizer.codebook_dim=4",
    "tokenizer.entropy_width=32", "tokenizer.entropy_layers=1", "kept_sets.warmup_steps=1", "train.max_steps=4",
    "train.global_batch_size=16", "train.warmup_steps=1", "train.validate_every=0", "train.checkpoint_every=0",
    "train.validation_images=8", "train.ema_decay=0", "evaluate.batch_size=8", "tokens.batch_size=16",
    "generator.size=nano", "train_generator.max_steps=2", "train_generator.global_batch_size=8",
    "train_generator.warmup_steps=1", "train_generator.validate_every=0", "train_generator.checkpoint_every=0",
    "train_generator.validation_images=8", "generate.batch_size=8",
)  # fmt: skip
SMALLER = {"filter.threshold=T": "filter.threshold=0.5"}  # what calibration would have said
SECTIONS = ("The demo", "On a cluster")  # whose commands have tests of their own: test_makefile, test_readme_cluster


@pytest.fixture
def pictures(tmp_path):
    """PICTURES: a folder for each of three classes; and photo.jpg."""
    draw = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        (tmp_path / "PICTURES" / name).mkdir(parents=True)
        for number in range(40):
            noise = draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((48, 40), Image.Resampling.BICUBIC)
            picture.save(tmp_path / "PICTURES" / name / f"{number}.jpg")
    picture.resize((150, 90)).save(tmp_path / "photo.jpg")
    return tmp_path


def commands_of(readme: str) -> list[str]:
    """The lines of shell blocks that begin with `python jobs/`."""
    sections = re.split(r"^## ", readme, flags=re.MULTILINE)
    blocks = [
        block
        for section in sections
        if not section.startswith(SECTIONS)
        for block in re.findall(r"^```\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    ]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("python jobs/")]


def test_the_commands_of_the_readme_work_in_their_order(repository, pictures):
    found = commands_of((repository / "README.md").read_text())
    assert len(found) >= 7
    surroundings = {**os.environ, "PYTHONPATH": str(repository)}
    for command in found:
        line = command.replace("python jobs/", f"{sys.executable} {repository}/jobs/")
        for there, smaller in SMALLER.items():
            line = line.replace(there, smaller)
        if "show.py" not in line:
            line = " ".join((line, *SIZES))
        done = subprocess.run(
            ["bash", "-c", line], cwd=pictures, env=surroundings, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        if "show.py" not in line:
            assert "RUN_FOLDER=" in done.stdout, command


def test_the_lines_of_python_work(repository, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    block = re.search(r"```python\n(.*?)```", (repository / "README.md").read_text(), flags=re.DOTALL)
    said: dict = {}
    exec(block[1], said)
    assert said["picture"].shape == (3, 90, 150)
    assert Path("photo.tatok").stat().st_size > 100
