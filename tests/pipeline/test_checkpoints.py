import json
from pathlib import Path

import pytest
import torch

import tatok_model
from pipeline.core import checkpoints
from pipeline.core.errors import BadInput
from pipeline.core.files import resolve_paths
from pipeline.core.presets import load_config
from tatok_model import TaTok, TokenizerConfig

CONFIG = TokenizerConfig(image_size=32, patch_size=8, global_tokens=2, codebook_size=16, codebook_dim=4)


@pytest.fixture(scope="module")
def model():
    return TaTok(CONFIG)


@pytest.fixture
def folder(model, tmp_path):
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, step, model, {"step": torch.tensor(step)}, keep=2, samples_seen=step * 4)
    return tmp_path


def test_the_newest_are_kept(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]
    newest = checkpoints.latest(folder)
    assert (newest.step, newest.record["samples_seen"], int(newest.tensors()["step"])) == (30, 120, 30)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoints.latest(tmp_path) is None


def test_a_checkpoint_loads_as_a_tokenizer(folder):
    assert TaTok.from_pretrained(folder / "step-00000030").config == CONFIG


@pytest.mark.parametrize("name", ["training_state.safetensors", "model.safetensors", "config.json"])
def test_a_torn_checkpoint_is_passed_over_and_named(folder, name, capsys):
    path = folder / "step-00000030" / name
    path.write_bytes(path.read_bytes()[:-10])
    assert checkpoints.latest(folder).step == 20
    assert "step-00000030 is not used" in capsys.readouterr().err


OURS = '{"format": "tatok-training-state", "version": 1'
FOREIGN = [
    "", "{}", '{"format": "other"}', "[]", OURS + "}", OURS + ', "step": 30, "sha256": []}',
    OURS + ', "step": null, "sha256": {}}', OURS + ', "step": 30, "sha256": {"../../secret": "0"}}',
]  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN)
def test_a_foreign_checkpoint_is_passed_over(folder, text):
    (folder / "step-00000030" / "training_state.json").write_text(text)
    assert checkpoints.latest(folder).step == 20


def test_without_a_usable_checkpoint_that_is_told(folder, capsys):
    for path in folder.iterdir():
        (path / "training_state.json").unlink()
    assert checkpoints.latest(folder) is None
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_checkpoint_half_written_is_not_seen(folder, model, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(folder, 40, model, {"step": torch.tensor(40)}, keep=2)
    assert checkpoints.latest(folder).step == 30
    assert not list(folder.glob(".*"))  # nor does it take room


def test_what_a_killed_process_left_is_removed(folder):
    (folder / ".step-00000040.123").mkdir()
    checkpoints.remove_leftovers(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]


def test_the_record_names_what_it_is(folder):
    record = json.loads((folder / "step-00000030" / "training_state.json").read_text())
    assert record["format"] == "tatok-training-state"
    assert set(record["sha256"]) >= {"config.json", "model.safetensors", "training_state.safetensors"}


def test_a_checkpoint_is_found_by_its_folder_or_its_run_folder(folder):
    (folder / "checkpoint").symlink_to(folder / "step-00000030")
    assert checkpoints.find(str(folder)) == folder / "checkpoint"
    assert checkpoints.find(str(folder / "step-00000020")) == folder / "step-00000020"


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist; expected a checkpoint folder"):
        checkpoints.find(str(tmp_path / "none"))
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        checkpoints.find(str(tmp_path))


def test_hub_ids_are_told_from_paths():
    assert checkpoints.is_hub_id("owner/name")
    assert not checkpoints.is_hub_id("/a/path")
    assert not checkpoints.is_hub_id("")


@pytest.fixture
def tokenizer_folder(tmp_path):
    """Of 32 pixels in patches of 8, and 3 global tokens: no preset is like it."""
    config = TokenizerConfig(32, 8, "nano", 3, codebook_size=20, codebook_dim=4, trunk_layers=1, commitment_weight=0.7)
    TaTok(config).save_pretrained(tmp_path / "made" / "checkpoint")
    return tmp_path / "made"


@pytest.mark.parametrize("preset", ["cifar10", "tiny64", "smoke", "global_only", "sweep_smoke"])
def test_a_checkpoint_brings_its_architecture_to_every_preset(preset, tokenizer_folder):
    config = load_config(
        preset, [f"tokenizer.checkpoint={tokenizer_folder}", "filter.rule=count", "filter.threshold=9"]
    )
    checkpoints.check_architecture(config)
    shape = config.tokenizer
    assert (config.data.image_size, shape.image_size, shape.patch_size, shape.trunk_layers) == (32, 32, 8, 1)
    assert (shape.size, shape.global_tokens, shape.patch_tokens, shape.codebook_size) == ("nano", 3, True, 20)
    assert shape.commitment_weight == load_config(preset).tokenizer.commitment_weight  # of training, not of shape


def test_a_name_in_the_box_is_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve_paths(load_config("cifar10", ["tokenizer.checkpoint=tatok64"]))
    assert (config.tokenizer.checkpoint, config.data.image_size, config.tokenizer.max_tokens) == ("tatok64", 64, 272)
    assert checkpoints.find("tatok64") == Path(tatok_model.__file__).parent / "weights" / "tatok64"
    assert not checkpoints.is_hub_id("tatok64")
    checkpoints.check_architecture(config)
    (tmp_path / "tatok64").mkdir()  # a folder of that name here comes first, as in TaTok.from_pretrained
    assert resolve_paths(config).tokenizer.checkpoint == str(tmp_path / "tatok64")
    with pytest.raises(
        BadInput, match=r"'.*/tatok46' does not exist \(did you mean 'tatok64'\?\); expected .* box: tatok64"
    ):
        checkpoints.check_architecture(resolve_paths(load_config("smoke", ["tokenizer.checkpoint=tatok46"])))


def test_typed_keys_that_disagree_are_refused_all_at_once(tokenizer_folder):
    typed = ["data.image_size=16", "tokenizer.patch_size=4", "tokenizer.size=nano", "tokenizer.global_tokens=2"]
    config = load_config("smoke", [f"tokenizer.checkpoint={tokenizer_folder}", *typed])
    with pytest.raises(BadInput) as refused:
        checkpoints.check_architecture(config)
    assert str(refused.value) == (
        f"tokenizer.checkpoint {str(tokenizer_folder)!r} has image_size 32, patch_size 8, global_tokens 3; expected "
        "tokenizer.image_size, 16, tokenizer.patch_size, 4, tokenizer.global_tokens, 2, or "
        f"tokenizer.checkpoint={tokenizer_folder} without such keys: it brings its architecture"
    )


def test_a_yaml_file_states_what_stands_beside_its_checkpoint_and_a_preset_does_not(tokenizer_folder, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"extends: tiny64\ntokenizer: {{checkpoint: {tokenizer_folder}, global_tokens: 2, patch_size: 4}}\n"
    )
    with pytest.raises(
        BadInput, match="has patch_size 8, global_tokens 3; expected tokenizer.patch_size, 4, tokenizer.gl"
    ):
        checkpoints.check_architecture(load_config(str(file)))
    other = load_config(str(file), ["tokenizer.checkpoint=tatok64"])  # not the one that it names
    assert (other.tokenizer.global_tokens, other.tokenizer.patch_size, other.data.image_size) == (16, 4, 64)
    file.write_text(f"extends: tiny64\ntokenizer: {{checkpoint: {tokenizer_folder}}}\n")
    assert load_config(str(file)).tokenizer.global_tokens == 3


def test_an_entropy_model_that_is_trained_anew_has_the_shape_that_is_configured(tokenizer_folder):
    preset = ["tokenizer.entropy_width=64", "train.parts=entropy"]
    config = load_config("smoke", [f"tokenizer.checkpoint={tokenizer_folder}", *preset])
    checkpoints.check_architecture(config)
    assert (config.tokenizer.entropy_width, config.tokenizer.entropy_layers) == (
        64,
        load_config("smoke").tokenizer.entropy_layers,
    )


@pytest.mark.parametrize("override", ["sweep.checkpoints=5", "sweep.checkpoints=x", "tokenizer.checkpoint=[1]"])
def test_what_is_no_checkpoint_at_all_stays_one_sentence(override):
    with pytest.raises(BadInput, match=f"{override.partition('=')[0]} "):
        checkpoints.check_architecture(resolve_paths(load_config("smoke", [override])))


def test_a_sweep_of_checkpoints_is_of_their_size(tokenizer_folder):
    assert load_config("tiny64", [f"sweep.checkpoints=[{tokenizer_folder}]"]).data.image_size == 32
