import json

import pytest
import torch

from pipeline.core import checkpoints
from pipeline.core.errors import BadInput
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
