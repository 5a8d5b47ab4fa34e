import errno
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError

from pipeline.core.config import load_config
from pipeline.core.files import memory_sentence, storage_sentence


def by_python(path):
    with open(path, "wb") as file:
        file.write(b"x" * 100_000)


def by_parquet(path):
    pq.write_table(pa.table({"x": list(range(100_000))}), path)


def by_safetensors(path):  # its own words on a full file system; it would put a new file in place of the link
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [by_python, by_parquet, by_safetensors])
def test_full_storage_is_known_whatever_library_met_it(write, tmp_path):
    # Answers as full storage does; a library may remove or replace the link.
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(Exception, match="No space left") as caught:
        write(tmp_path / "full")
    assert storage_sentence(caught.value).startswith("storage is full")
    wrapped = RuntimeError("a task failed")
    wrapped.__cause__ = caught.value
    assert storage_sentence(wrapped)


def test_a_quota_is_full_storage_and_the_file_is_named():
    problem = OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/one/x")
    assert "storage is full at '/runs/one/x'" in storage_sentence(problem)


def test_other_problems_are_not_full_storage():
    problem = FileNotFoundError(errno.ENOENT, "No such file")
    problem.__cause__ = problem  # as some libraries have it
    assert storage_sentence(problem) == ""
    assert storage_sentence(json.JSONDecodeError("wrong", "x", 0)) == ""


def test_the_number_of_images_to_try_divides_a_workers_share():
    config = load_config("cifar10", ["train.global_batch_size=96", "train.num_workers=2", "train.accumulation=2"])
    said = memory_sentence(torch.OutOfMemoryError("CUDA out of memory"), config, "train")
    assert "full with 24 images at a time" in said
    assert "try train.accumulation=4, 12 at a time" in said
    assert memory_sentence(RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory"), config, "train")
    assert memory_sentence(RuntimeError("something else"), config, "train") == ""


def test_a_generators_batch_is_in_parts_by_length_already():
    keys = ["train_generator.global_batch_size=64", "generator.length_groups=8"]
    problem = torch.OutOfMemoryError("CUDA out of memory")
    said = memory_sentence(problem, load_config("cifar10", keys), "train_generator")
    assert "full with 8 images at a time" in said
    assert "try train_generator.accumulation=16, 4 at a time" in said
    more = load_config("cifar10", [*keys, "train_generator.accumulation=16"])
    assert "full with 4 images at a time" in memory_sentence(problem, more, "train_generator")
