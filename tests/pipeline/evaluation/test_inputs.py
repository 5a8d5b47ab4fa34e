"""Which tokenizer is evaluated, and what is refused before anything is read or after it was loaded."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.checkpoints import load_lpips, load_tokenizer
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.inputs import with_input
from pipeline.core.presets import load_config
from pipeline.data.shards import ShardDataset
from pipeline.evaluation import evaluate
from tatok_model.losses import BACKBONES
from tatok_model.tokenizer import TaTok


@pytest.fixture
def config(tmp_path: Path, configure: Callable[..., Config]) -> Config:
    return configure(f"run.output={tmp_path}")


def given(config: Config, section: str, **values: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def save_trained(config: Config, tokenizer: TaTok, fingerprint: str) -> Path:
    """What a training run with this configuration would leave."""
    folder = Path(config.run.output) / "smoke-train"
    tokenizer.save_pretrained(folder / "checkpoint")
    (folder / "summary.json").write_text(json.dumps({"inputs": {"shards": {"sha256": fingerprint}}}))
    return folder / "checkpoint"


def test_a_tokenizer_that_was_named_is_taken(config: Config) -> None:
    named = given(config, "tokenizer", checkpoint="/elsewhere")
    assert with_input(named, "tokenizer.checkpoint") is named


def test_the_tokenizer_that_training_left_is_taken(config: Config, tokenizer: TaTok, heldout: ShardDataset) -> None:
    folder = save_trained(config, tokenizer, heldout.manifest.fingerprint)
    evaluate.check(config)
    found = with_input(config, "tokenizer.checkpoint")
    assert found.tokenizer.checkpoint == str(folder)
    loaded, sha256 = load_tokenizer(found)
    assert len(sha256) == 64
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, tokenizer.state_dict()[name]), name


@pytest.mark.parametrize(
    ("fingerprint", "override", "reason"),
    [
        ("another", "train.seed=0", "smoke-train' was trained on other pictures, 'unknown' instead of '.*/shards'"),
        (None, "tokenizer.global_tokens=4", "smoke-train' has global_tokens 2 instead of 4"),
    ],
)
def test_a_tokenizer_of_other_pictures_or_another_architecture_is_not_taken(
    configure: Callable[..., Config],
    tmp_path: Path,
    tokenizer: TaTok,
    heldout: ShardDataset,
    fingerprint: str | None,
    override: str,
    reason: str,
) -> None:
    config = configure(f"run.output={tmp_path}", override)
    save_trained(config, tokenizer, fingerprint or heldout.manifest.fingerprint)
    sentence = f"holds no tokenizer of this configuration: .*{reason}; expected tokenizer.checkpoint .* or --make"
    for refuses in (evaluate.check, lambda config: with_input(config, "tokenizer.checkpoint")):
        with pytest.raises(BadInput, match=sentence):
            refuses(config)


def test_a_tokenizer_is_trained_first_only_where_that_is_asked_for(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("pipeline.core.inputs.run_nested", lambda stage, _, name: asked.append((stage, name)))
    for refuses in (evaluate.check, lambda config: with_input(config, "tokenizer.checkpoint")):
        with pytest.raises(BadInput, match="or --make to train it first, 20 steps of 16 pictures"):
            refuses(config)
    assert asked == []
    evaluate.check(given(config, "run", make=True))
    made = with_input(given(config, "run", make=True), "tokenizer.checkpoint").tokenizer.checkpoint
    ((stage, name),) = asked
    assert (stage, made) == ("train", f"{config.run.output}/{name}/checkpoint")
    assert re.fullmatch("smoke-train-[0-9a-f]{8}", name)
    assert f"training first, 20 steps of 16 pictures -> {config.run.output}/{name}" in capsys.readouterr().err


def test_a_hub_id_that_cannot_be_had_is_bad_input(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(hub: Any, name: str, **options: Any) -> str:
        raise ConnectionError(f"no way to {name}")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(BadInput, match=r"'owner/name' cannot be had from the hub \(no way to owner/name\)"):
        load_tokenizer(given(config, "tokenizer", checkpoint="owner/name"))


def test_a_hub_model_is_checked_and_loaded(
    config: Config, tokenizer: TaTok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "download")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *about, **options: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path / "download"))
    from_hub = given(config, "tokenizer", checkpoint="owner/name")
    assert load_tokenizer(from_hub)[0].config == tokenizer.config
    with pytest.raises(BadInput, match="has global_tokens 2; expected tokenizer.global_tokens, 4"):
        load_tokenizer(given(from_hub, "tokenizer", global_tokens=4))


def save_alexnet(folder: Path) -> dict[str, str]:
    """Weight files of LPIPS with AlexNet, all zeros."""
    backbone = BACKBONES[(64, 3, 11, 11)]()
    weights = {
        f"features.{name}": value * 0 for name, value in torch.nn.Sequential(*backbone.layers).state_dict().items()
    }
    heads = {f"lin{i}.model.1.weight": torch.zeros(1, c, 1, 1) for i, c in enumerate(backbone.channels)}
    torch.save(weights, folder / "alex.pth")
    torch.save(heads, folder / "heads.pth")
    return {"lpips_backbone": str(folder / "alex.pth"), "lpips_heads": str(folder / "heads.pth")}


def test_lpips_is_loaded_when_its_weights_are_given(tmp_path: Path) -> None:
    files = save_alexnet(tmp_path)
    assert load_lpips("evaluate.lpips", *files.values(), image_size=32).backbone.name == "AlexNet"
    with pytest.raises(BadInput, match="data.image_size is 16; expected at least 31 pixels for LPIPS with AlexNet"):
        load_lpips("evaluate.lpips", *files.values(), image_size=16)


def test_files_that_are_not_lpips_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"w")
    files = {"lpips_backbone": str(tmp_path / "w.pth"), "lpips_heads": str(tmp_path / "w.pth")}
    with pytest.raises(BadInput, match="evaluate.lpips_backbone and evaluate.lpips_heads: .*not a readable"):
        load_lpips("evaluate.lpips", *files.values(), image_size=32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.num_workers=4096"], "evaluate.num_workers is 4096, which needs 4096 CPUs"),
        (["tracking.uri=ftp://x"], "tracking.uri is 'ftp://x'"),
        (["data.image_size=8"], "data.image_size is 8; expected at least 11 pixels for SSIM"),
        (["evaluate.inception_weights=/no.pth"], "evaluate.inception_weights '/no.pth' does not exist"),
        (["evaluate.more_extractors=[/no.th]"], "evaluate.more_extractors has '/no.th', which does not exist"),
        (["evaluate.reference=/no.npz"], "evaluate.reference '/no.npz' does not exist"),
        (["evaluate.lpips_backbone=/no", "evaluate.lpips_heads=/no"], "evaluate.lpips_backbone '/no' does not exist"),
        (["tokenizer.checkpoint=/no"], "tokenizer.checkpoint '/no' does not exist"),
        (["data.source=/no"], "data.source '/no' does not exist"),
        (["data.shards=/no"], "'/no' holds no manifest.json"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    config = load_config("smoke", [f"run.output={tmp_path}", "tracking.uri=", *overrides])
    with pytest.raises(BadInput, match=message):
        evaluate.check(config)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_architecture_or_image_size_is_refused(
    config: Config, tokenizer: TaTok, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "made")
    named = given(config, "tokenizer", checkpoint=str(tmp_path / "made"))
    evaluate.check(named)
    with pytest.raises(BadInput, match="has global_tokens 2; expected tokenizer.global_tokens, 5"):
        evaluate.check(given(named, "tokenizer", global_tokens=5))
    other = load_config("smoke", [f"data.shards={config.data.shards}", "tracking.uri="])
    with pytest.raises(BadInput, match="were made for image size 16; expected data.image_size, 32"):
        evaluate.check(replace(other, run=config.run))


def test_checking_loads_neither_torch_nor_ray(run_python: Any, shards: Path) -> None:
    code = f"""
import sys
from pipeline.core.presets import load_config
from pipeline.evaluation import evaluate
places = ["run.output=/nowhere", "data.image_size=16", "data.shards={shards}", "run.make=true"]
evaluate.check(load_config("smoke", places))
assert evaluate.default_name(load_config("smoke")) == "smoke-evaluate"
assert not {{"torch", "ray", "mlflow", "sklearn"}} & set(sys.modules), sorted(sys.modules)
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr


def test_a_dry_run_of_the_job_checks_everything_and_writes_nothing(run_job: Any, tmp_path: Path) -> None:
    finished = run_job("evaluate", "smoke", "--dry-run", "--make")
    assert finished.returncode == 0, finished.stderr
    assert "preset: smoke" in finished.stdout
    assert list(tmp_path.iterdir()) == []
    unasked = run_job("evaluate", "smoke", "--dry-run")
    assert (unasked.returncode, unasked.stdout) == (2, "")
    assert "or --make to train it first, 20 steps of 16 pictures" in unasked.stderr
    refused = run_job("evaluate", "smoke", "--dry-run", "tokenizer.checkpoint=nowhere/to/be/found")
    assert refused.returncode == 2
    assert "tokenizer.checkpoint" in refused.stderr
    assert "Traceback" not in refused.stderr
