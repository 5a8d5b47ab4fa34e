"""Which generator samples: the named one, the one beside the run, or one that is trained first."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.inputs import with_input
from pipeline.generator.fit import check_generator, load_generator
from tatok_model.config import GeneratorConfig
from tatok_model.generation.generator import Generator

Configure = Callable[..., Config]
SHAPE = {"size": "nano", "classes": 3, "global_tokens": 2, "grid_size": 4, "codebook_size": 16, "max_patch_tokens": 9}


@pytest.fixture(scope="module")
def save_generator(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[..., Path]:
    """`save_generator(key=value)`: the checkpoint folder of an untrained one."""

    def save(folder: Path | None = None, **changes: object) -> Path:
        folder = folder or tmp_path_factory.mktemp("inputs") / "generator"
        sha256 = sha256_file(tokenizer_folder / "model.safetensors")
        torch.manual_seed(0)
        config = GeneratorConfig(**{"tokenizer_sha256": sha256, **SHAPE, **changes})  # type: ignore[arg-type]
        Generator(config).save_pretrained(folder)
        return folder

    return save


def test_the_named_generator_is_loaded_ready_to_sample(configure: Configure, save_generator: Callable) -> None:
    folder = save_generator()
    config = with_input(configure(f"generator.checkpoint={folder}"), "generator.checkpoint")
    generator, sha256 = load_generator(config)
    assert not generator.training
    assert sha256 == sha256_file(folder / "model.safetensors")
    assert generator.config.max_patch_tokens == 9
    check_generator(config)


def test_a_run_folder_stands_for_its_checkpoint(configure: Configure, save_generator: Callable, tmp_path: Path) -> None:
    save_generator(tmp_path / "run" / "checkpoint")
    generator, _ = load_generator(configure(f"generator.checkpoint={tmp_path}/run"))
    assert generator.config.classes == 3


def test_what_training_left_beside_the_run_is_taken(
    configure: Configure, save_generator: Callable, capsys: pytest.CaptureFixture
) -> None:
    config = configure()
    folder = save_generator(Path(config.run.output) / "smoke-train-generator" / "checkpoint")
    found = with_input(config, "generator.checkpoint")
    assert found.generator.checkpoint == str(folder)
    assert "generator.checkpoint is empty: taking" in capsys.readouterr().err
    check_generator(config)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "generator.size=tiny",
            "has size 'nano' instead of 'tiny'; expected generator.checkpoint to name one, or --make",
        ),
        ("filter.threshold=0.5", "has cut 'distortion, 1 rounds, relative 0.6' instead of '.* relative 0.5'; expected"),
    ],
)
def test_what_training_left_beside_the_run_is_not_taken_for_something_else(
    configure: Configure, save_generator: Callable, override: str, sentence: str
) -> None:
    config = configure(override)
    folder = Path(config.run.output) / "smoke-train-generator" / "checkpoint"
    save_generator(folder, cut="distortion, 1 rounds, relative 0.6")
    with pytest.raises(BadInput, match=sentence):
        with_input(config, "generator.checkpoint")
    with pytest.raises(BadInput, match=sentence):
        check_generator(config)
    named = configure(override, f"generator.checkpoint={folder}")
    assert with_input(named, "generator.checkpoint").generator.checkpoint == str(folder)


def test_damaged_weights_are_refused(configure: Configure, save_generator: Callable) -> None:
    folder = save_generator()
    weights = (folder / "model.safetensors").read_bytes()
    config = configure(f"generator.checkpoint={folder}")
    (folder / "model.safetensors").write_bytes(weights[:-4])
    with pytest.raises(BadInput, match="has damaged weights .*; expected those saved"):
        load_generator(config)
    (folder / "model.safetensors").write_bytes((save_generator(size="tiny") / "model.safetensors").read_bytes())
    with pytest.raises(BadInput, match="has damaged weights .*size mismatch.*; expected those saved"):
        load_generator(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="has no model.safetensors; expected a folder that Generator saved"):
        load_generator(config)


def test_what_training_left_brings_its_tokens_as_if_it_had_just_been_made(
    configure: Configure, save_generator: Callable, stream_folder: Path
) -> None:
    """Else classes would be called otherwise on resuming, which decides bytes."""
    config = configure("tokens.path=")
    folder = Path(config.run.output) / "smoke-train-generator"
    save_generator(folder / "checkpoint")
    for path, expected in ((stream_folder, str(stream_folder)), ("/gone", "")):
        (folder / "summary.json").write_text(json.dumps({"inputs": {"tokens": {"path": str(path), "sha256": ""}}}))
        assert with_input(config, "generator.checkpoint").tokens.path == expected
        assert check_generator(config).tokens.path == expected
    named = configure(f"tokens.path={stream_folder}")
    assert with_input(named, "generator.checkpoint").tokens.path == str(stream_folder)


def test_where_there_is_none_it_is_trained_first(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[tuple[str, str]] = []

    monkeypatch.setattr("pipeline.core.inputs.run_nested", lambda stage, _, name: asked.append((stage, name)))
    with pytest.raises(BadInput, match="or --make to train it first, 6 steps of 16 pictures"):
        check_generator(configure())
    config = configure("run.make=true")
    check_generator(config)
    found = with_input(config, "generator.checkpoint")
    ((stage, name),) = asked
    assert stage == "train_generator"
    assert re.fullmatch("smoke-train-generator-[0-9a-f]{8}", name)
    assert found.generator.checkpoint == str(Path(config.run.output) / name / "checkpoint")
    assert "generator.checkpoint is empty: training first, 6 steps of 16 pictures" in capsys.readouterr().err


def test_what_is_no_generator_of_this_tokenizer_is_refused(
    configure: Configure, save_generator: Callable, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    other = save_generator(tokenizer_sha256="0" * 64)
    cases = {
        "generator.checkpoint=/nowhere": "generator.checkpoint.*/nowhere",
        f"generator.checkpoint={tmp_path}/empty": "generator.checkpoint .* holds no config.json; expected a folder",
        f"generator.checkpoint={tokenizer_folder}": "generator.checkpoint: .* is not a generator's",
        f"generator.checkpoint={other}": "writes tokens of a tokenizer with sha256 000000000000",
    }
    for override, sentence in cases.items():
        with pytest.raises(BadInput, match=sentence):
            load_generator(configure(override))
        if "empty" not in override:
            with pytest.raises(BadInput, match=sentence):
                check_generator(configure(override))
    with pytest.raises(BadInput, match="tokenizer.checkpoint is empty; expected the tokenizer whose tokens"):
        load_generator(configure(f"generator.checkpoint={save_generator()}", "tokenizer.checkpoint="))
