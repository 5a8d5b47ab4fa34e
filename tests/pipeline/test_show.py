import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import BadInput
from pipeline.evaluation.page import SHARES
from pipeline.show import show
from tatok_model import TaTok, TokenizerConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder of a page of two small pictures, one of them of an odd shape."""
    folder = tmp_path_factory.mktemp("show")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (70, 100, 3), dtype=np.uint8)
    noise[:, :50] = 128
    Image.fromarray(noise).save(folder / "half <noise>.png")
    Image.fromarray(noise[:40, 30:60]).save(folder / "small.png")
    shown = show([str(folder / "half <noise>.png"), str(folder / "small.png")], "tatok64", folder / "out", longest=80)
    return folder / "out", shown


def pictures_of(folder: Path) -> list[dict]:
    text = (folder / "show.html").read_text()
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, flags=re.DOTALL)[1])


def test_the_page_holds_every_budget_of_every_picture(page):
    folder, shown = page
    pictures = pictures_of(folder)
    assert [(picture["name"], picture["width"], picture["height"]) for picture in pictures] == [
        ("half <noise>.png", 80, 56), ("small.png", 30, 40),
    ]  # fmt: skip
    for picture, made in zip(pictures, shown, strict=True):
        tokens = [cut["tokens"] for cut in picture["cuts"]]
        assert [cut["share"] for cut in picture["cuts"]] == list(SHARES)
        assert tokens == sorted(tokens)
        assert tokens[-1] == picture["all_tokens"] == 272 * (2 if picture["width"] > 64 else 1)  # tiles of 64 pixels
        assert all(cut["bytes"] * 8 >= cut["bits"] - 8 for cut in picture["cuts"])
        assert made.cuts[-1].psnr > made.cuts[0].psnr
        assert all(cut["picture"].startswith("data:image/jpeg;base64,") for cut in picture["cuts"])


def test_tokens_go_where_the_detail_is(page):
    kept = page[1][0].cuts[4].kept  # the left half is flat
    assert kept[:, 44:].mean() > 2 * kept[:, :36].mean()


def test_the_page_needs_nothing_else(page):
    text = (page[0] / "show.html").read_text()
    assert "__" not in re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"(src|href)=\"?http", text)
    with Image.open(page[0] / "show.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "picture 'none.png' does not exist; expected a file that Pillow reads"),
        (["--output", __file__], "--output '.*test_show.py' is a file; expected a folder"),
        (["--tokenizer", "."], "--tokenizer '.*' holds no config.json; expected a folder that training wrote"),
        (["--tokenizer", "/none/at/all"], "checkpoint '/none/at/all' does not exist; expected a folder"),
        (["."], "is a folder; expected one picture"),
        ([__file__], "is not a picture that Pillow reads"),
        (["--longest", "3"], "--longest is 3; expected a whole number, at least 16 pixels"),
        (["--longest", "1.65e1"], "--longest is 16.5; expected a whole number, at least 16 pixels"),
        (["--tokenizer", "tatok65"], "checkpoint 'tatok65' does not exist; expected a folder, a hub id"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_sentence(arguments, message, tmp_path):
    command = [sys.executable, ROOT / "jobs" / "show.py", *arguments]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert re.fullmatch(rf"error: .*{message}.*", finished.stderr.strip())


def test_a_tokenizer_without_patch_tokens_has_one_budget(tmp_path):
    config = TokenizerConfig(image_size=32, global_tokens=4, codebook_size=16, size="nano", patch_tokens=False)
    TaTok(config).save_pretrained(tmp_path / "globals")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    shown = show([str(tmp_path / "red.png")], str(tmp_path / "globals"), tmp_path / "out")
    assert [(cut.share, cut.tokens) for cut in shown[0].cuts] == [(1.0, 8)]
    assert (tmp_path / "out" / "show.png").exists()


def test_damaged_weights_are_said_in_a_sentence(tmp_path):
    shutil.copytree(ROOT / "tatok_model" / "weights" / "tatok64", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BadInput, match="--tokenizer .* cannot be loaded .*; expected weights that are whole"):
        show([], str(tmp_path / "torn"), tmp_path / "out")


def test_the_run_folder_of_a_training_is_a_tokenizer_too(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    shutil.copytree(ROOT / "tatok_model" / "weights" / "tatok64", tmp_path / "run" / "checkpoint")
    shown = show([str(tmp_path / "red.png")], str(tmp_path / "run"), tmp_path / "out")
    assert shown[0].cuts[-1].tokens == 272


@pytest.mark.browser
def test_moving_the_slider_changes_picture_and_numbers(page, chromium, tmp_path):
    text = (page[0] / "show.html").read_text()
    seen = []
    for place in (0, 8):
        move = f"<script>budget.value = {place}; budget.dispatchEvent(new Event('input'));</script></html>"
        (tmp_path / "page.html").write_text(text.replace("</html>", move))
        command = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            f"file://{tmp_path}/page.html",
        ]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        seen.append((
            re.findall(r'class="result"[^>]*src="([^"]*)"', dom), re.findall(r'class="numbers">(.+?)</div>', dom),
            re.findall(r'<output[^>]*>([^<]*)<', dom),
        ))  # fmt: skip
    assert seen[0][2] == ["8% of the tokens on average"]
    assert seen[1][2] == ["100% of the tokens on average"]
    for few, all_ in zip(seen[0][0] + seen[0][1], seen[1][0] + seen[1][1], strict=True):
        assert few
        assert few != all_
    assert all("dB" in line for line in seen[0][1] + seen[1][1])
