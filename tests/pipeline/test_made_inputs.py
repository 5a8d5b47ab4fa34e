"""What a job lacks and nobody names: the run that is made of the same is taken, whatever its name, else one is made.

Through the real stages, with an untrained tokenizer of 16 codes.
"""

import fcntl
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.inputs import find_input, with_input
from pipeline.core.job import run_nested
from pipeline.core.presets import load_config
from pipeline.core.run import Run, read_summary
from pipeline.data import checks
from pipeline.data.shards import read_manifest
from pipeline.evaluation import evaluate
from pipeline.tokens.token_manifest import read_token_manifest
from tatok_model.config import TokenizerConfig
from tatok_model.filtering_rules import QualityLine, lines_json
from tatok_model.tokenizer import TaTok

SHAPE = {"patch_size": 4, "global_tokens": 2, "quantizer": "fsq", "codebook_size": 16}
Configure = Callable[..., Config]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 40 pictures of two classes."""
    add_pictures(tmp_path / "pictures", range(40))
    return tmp_path / "pictures"


def add_pictures(folder: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        file = io.BytesIO()
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16)).save(file, "PNG")
        path = folder / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())


@pytest.fixture
def configure(tmp_path: Path, pictures: Path) -> Configure:
    """`configure("section.key=value")`: of these pictures, with runs in `runs`."""
    shape = [f"tokenizer.{key}={value}" for key, value in SHAPE.items()]
    shape += ["tokenizer.codebook_dim=16", "tokenizer.fsq_levels=[4,4]", "data.image_size=16"]
    places = [f"run.output={tmp_path}/runs", f"data.source={pictures}", "tracking.uri=", "data.heldout_fraction=0.3"]
    workers = ["data.num_workers=1", "tokens.num_workers=1"]
    return lambda *more: load_config("smoke", [*shape, *places, *workers, *more])


@pytest.fixture
def save_tokenizer(tmp_path: Path) -> Callable[[int], Path]:
    def save(seed: int) -> Path:
        torch.manual_seed(seed)
        TaTok(TokenizerConfig(16, fsq_levels=(4, 4), **SHAPE)).save_pretrained(tmp_path / f"t{seed}")  # type: ignore[arg-type]
        return tmp_path / f"t{seed}"

    return save


def rows(shards: str) -> int:
    return sum(split.rows for split in read_manifest(shards).splits.values())


def shards_of(config: Config) -> str:
    return with_input(config, "data.shards").data.shards


def test_added_pictures_become_shards_beside_the_old_ones(configure: Configure, pictures: Path) -> None:
    first = shards_of(configure())
    before = (Path(first) / "manifest.json").read_bytes()
    assert shards_of(configure("data.num_workers=2")) == first
    add_pictures(pictures, range(40, 47))
    second = shards_of(configure())
    assert (rows(first), rows(second)) == (40, 47)
    assert (Path(first) / "manifest.json").read_bytes() == before
    assert shards_of(configure()) == second
    (pictures / "ant" / "46.png").unlink()
    add_pictures(pictures, [])
    for number in range(40, 46):
        (pictures / ("ant", "bee")[number % 2] / f"{number}.png").unlink()
    assert shards_of(configure()) == first  # the folder is as it was


@pytest.mark.parametrize("override", ["data.heldout_fraction=0.5", "data.quality=50", "data.rows_per_shard=8"])
def test_what_decides_bytes_decides_the_folder(configure: Configure, override: str) -> None:
    assert shards_of(configure()) != shards_of(configure(override))


def test_what_somebody_made_under_another_name_or_preset_is_taken(configure: Configure) -> None:
    made = run_nested("preprocess", configure(), "by-hand")
    assert shards_of(configure("tokens.flip=true")) == str(made.folder)
    assert [path.parent.name for path in made.folder.parent.glob("*/manifest.json")] == ["by-hand"]


def test_shards_outlive_their_source(configure: Configure, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure()
    shards_of(config)
    add_pictures(pictures, range(40, 44))
    newest = shards_of(config)
    shutil.rmtree(pictures)
    checks.check_pictures(config)
    capsys.readouterr()
    assert shards_of(config) == newest
    assert f"data.source {str(pictures)!r} cannot be read any more: taking {newest}" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"data.source .* does not exist"):
        checks.check_pictures(configure("data.quality=50"))
    for file in Path(newest).glob("shards/train-*"):
        file.unlink()
    assert rows(shards_of(config)) == 40  # those that are whole


def test_without_any_whole_shards_a_source_that_is_gone_is_refused(configure: Configure, pictures: Path) -> None:
    made = shards_of(configure())
    shutil.rmtree(pictures)
    (next(Path(made).glob("shards/heldout-*"))).unlink()
    with pytest.raises(BadInput, match=r"data.source .* does not exist"):
        checks.check_pictures(configure())


def test_a_resumed_run_keeps_the_shards_it_was_begun_with(configure: Configure, pictures: Path) -> None:
    begun = shards_of(configure())
    run = Run.open("train", configure(), "mine", resume=False)
    run.inputs["shards"] = {"path": begun, "sha256": read_manifest(begun).fingerprint}
    run.write_summary("stopped")
    run.close()
    add_pictures(pictures, range(40, 45))
    again = Run.open("train", configure("run.name=mine"), "mine", resume=True)
    again.close()
    assert shards_of(configure("run.name=mine")) == begun
    assert rows(shards_of(configure("run.name=other"))) == 45
    assert shards_of(configure("run.name=mine", "data.quality=50")) not in (begun, shards_of(configure()))


@pytest.mark.parametrize("killed", [False, True])
def test_what_another_process_is_making_is_waited_for(
    configure: Configure, capsys: pytest.CaptureFixture[str], tmp_path: Path, killed: bool
) -> None:
    """And made by whoever waited, where that process was killed meanwhile."""
    shutil.copytree(shards_of(configure()), tmp_path / "kept")
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "manifest.json").unlink()
    lock = open(folder / ".lock", "w")  # noqa: SIM115 - held by "the other process"
    fcntl.flock(lock, fcntl.LOCK_EX)

    def finish() -> None:
        time.sleep(0.5)
        if not killed:
            shutil.copy(tmp_path / "kept" / "manifest.json", folder)
        lock.close()

    threading.Thread(target=finish).start()
    started = time.monotonic()
    assert shards_of(configure()) == str(folder)
    assert time.monotonic() - started >= 0.4
    told = capsys.readouterr().err
    assert f"data.shards is empty: another process is making {folder}, waiting for it" in told
    assert ("preprocessing data.source first" in told.partition("waiting")[2]) == killed
    assert (folder / "manifest.json").read_bytes() == (tmp_path / "kept" / "manifest.json").read_bytes()


def test_each_tokenizer_has_tokens_of_its_own(configure: Configure, save_tokenizer: Callable[[int], Path]) -> None:
    found = {}
    for seed in (1, 2, 1):
        config = configure(f"tokenizer.checkpoint={save_tokenizer(seed)}")
        made = with_input(config, "tokens.path")
        assert found.setdefault(seed, made.tokens.path) == made.tokens.path
        assert find_input(config, "tokens.path").tokens.path == made.tokens.path
        stream = read_token_manifest(made.tokens.path).stream
        assert stream.tokenizer_sha256 == read_summary(made.tokens.path)["inputs"]["tokenizer"]["sha256"]
    assert found[1] != found[2]
    tokenizer, line = save_tokenizer(1), QualityLine("distortion", 1, 0.01, 0.1)
    (tokenizer / "quality.json").write_text(lines_json((line,)))  # as calibration does
    calibrated = with_input(configure(f"tokenizer.checkpoint={tokenizer}"), "tokens.path").tokens.path
    assert calibrated not in found.values()
    assert read_token_manifest(calibrated).stream.line == line


def save_training(config: Config, name: str, tokenizer: Path, status: str = "finished", **changes: Any) -> Path:
    """What a training on the configuration's shards leaves that nobody waits for here."""
    run = Run.open("train", config, name, resume=False)
    shutil.copytree(tokenizer, run.folder / "checkpoint")
    run.inputs["shards"] = {"path": config.data.shards, "sha256": read_manifest(config.data.shards).fingerprint}
    run.made_of = {**training_facts(config), **changes}
    run.write_summary(status)
    run.close()
    return run.folder


def training_facts(config: Config) -> dict[str, Any]:
    from pipeline.training import train

    return json.loads(json.dumps(train.made_of(config)))


def test_the_tokenizer_that_is_made_of_the_same_is_taken_before_one_of_the_plain_name(
    configure: Configure, save_tokenizer: Callable[[int], Path]
) -> None:
    config = with_input(configure(), "data.shards")
    plain = save_training(config, "smoke-train", save_tokenizer(1), **{"train.max_steps": 7})
    assert with_input(config, "tokenizer.checkpoint").tokenizer.checkpoint == f"{plain}/checkpoint"
    mine = save_training(config, "mine", save_tokenizer(2))
    save_training(config, "not-ended", save_tokenizer(2), "stopped")
    assert with_input(config, "tokenizer.checkpoint").tokenizer.checkpoint == f"{mine}/checkpoint"
    evaluate.check(configure())  # without shards in hand, too


def test_a_refusal_names_what_there_is_and_its_advice_works(
    configure: Configure, save_tokenizer: Callable[[int], Path], pictures: Path
) -> None:
    config = with_input(configure(), "data.shards")
    save_training(config, "smoke-train", save_tokenizer(1))
    other = save_training(config, "seed-5", save_tokenizer(2), **{"train.seed": 5})
    add_pictures(pictures, range(40, 44))
    new = with_input(configure(), "data.shards")
    with pytest.raises(BadInput) as refused:
        evaluate.check(configure())
    sentence = str(refused.value)
    assert "holds no tokenizer of this configuration (there: seed-5)" in sentence
    assert (
        f"smoke-train' was trained on other pictures, {config.data.shards!r} instead of {new.data.shards!r}" in sentence
    )
    advice = "expected tokenizer.checkpoint to name one (in the box: tatok64), or --make to train it first, 20 steps"
    assert advice in sentence
    evaluate.check(configure(f"tokenizer.checkpoint={other}"))
    evaluate.check(configure("run.make=true"))


@pytest.mark.parametrize("gone", [False, True])
def test_tokens_bring_the_tokenizer_that_wrote_them(
    configure: Configure, save_tokenizer: Callable[[int], Path], gone: bool
) -> None:
    tokenizer = save_tokenizer(1)
    made = with_input(configure(f"tokenizer.checkpoint={tokenizer}"), "tokens.path").tokens.path
    if gone:
        shutil.rmtree(tokenizer)
    found = find_input(configure(f"tokens.path={made}"), "tokens.path")
    assert found.tokenizer.checkpoint == ("" if gone else str(tokenizer))
    assert (
        find_input(configure(f"tokens.path={made}", "tokenizer.checkpoint=tatok64"), "tokens.path").tokens.path == made
    )
