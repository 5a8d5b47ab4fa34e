"""The work of a range is done once."""

import hashlib
from pathlib import Path

import pytest
import torch

from pipeline.data.shards import Shard
from pipeline.tokens.parts import Part, Seconds, make_part, prepare_folder, rates
from pipeline.tokens.ranges import Range
from tatok_model.vit import one_thread

TASK = Range(0, "train", 0, 0, 2, 2, 2)


def test_a_finished_range_is_not_made_again_unless_its_file_or_the_plan_changed(tmp_path: Path) -> None:
    made = []

    def make(task: Range) -> tuple[Shard, Seconds]:
        made.append(task)
        (tmp_path / "file").write_bytes(b"tokens")
        return Shard("file", 2, hashlib.sha256(b"tokens").hexdigest()), {"total": 1.0}

    prepare_folder(tmp_path, "parts")
    assert make_part(tmp_path, "key", TASK, make).seconds == {"total": 1.0}
    assert make_part(tmp_path, "key", TASK, make).seconds == {}
    assert len(made) == 1
    (tmp_path / "file").write_bytes(b"other")
    assert make_part(tmp_path, "key", TASK, make).seconds
    (tmp_path / "file").unlink()
    assert make_part(tmp_path, "key", TASK, make).seconds
    assert make_part(tmp_path, "another", TASK, make).seconds
    assert len(made) == 4


def test_leftovers_of_a_killed_worker_are_removed(tmp_path: Path) -> None:
    prepare_folder(tmp_path, "tokens")
    (tmp_path / "tokens" / ".train-00000.parquet.7.tmp").touch()
    (tmp_path / "tokens" / "train-00001.parquet").touch()
    prepare_folder(tmp_path, "tokens")
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["train-00001.parquet"]


def test_one_thread_is_given_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_rates_are_of_what_was_made_now() -> None:
    seconds = {"total": 2.0, "encode": 1.0, "rank": 0.5}
    parts = [Part("", 0, Shard("a", 10, ""), {}), Part("", 1, Shard("b", 30, ""), seconds)]
    assert rates(parts, 4.0, ("encode", "rank")) == {
        "images_per_second": 15,
        "stage_images_per_second": 7.5,
        "encode_images_per_second": 30,
        "encode_share": 0.5,
        "rank_images_per_second": 60,
        "rank_share": 0.25,
    }
    assert rates(parts[:1], 4.0, ("encode", "rank")) == {}
