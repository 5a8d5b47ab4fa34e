"""Where relative paths point, files that appear whole or not at all, and what full storage or memory is told as."""

import errno
import hashlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError

from pipeline.core.errors import BadInput
from pipeline.core.files import (
    Location,
    finite,
    in_temporary_copy,
    locate,
    memory_sentence,
    resolve_paths,
    sha256_file,
    storage_sentence,
    within,
    write_atomically,
    write_json,
)
from pipeline.core.presets import load_config
from pipeline.data.checks import check_pictures
from pipeline.tokens.token_manifest import read_token_manifest


def resolved(*overrides: str):
    return resolve_paths(load_config("smoke", list(overrides)))


@pytest.fixture
def temporary_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The surroundings of a job that Ray runs in a copy of the submitted working directory."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    return folder


def test_relative_paths_resolve_against_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolved("run.output=out", "data.source=../pictures", "data.shards=s/../t")
    assert config.run.output == str(tmp_path / "out")
    assert config.data.source == str(tmp_path.parent / "pictures")
    assert config.data.shards == str(tmp_path / "t")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_relative_paths_resolve_against_tatok_root_when_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("TATOK_ROOT", str(tmp_path / "root"))
    config = resolved("data.source=pictures")
    assert config.run.output == str(tmp_path / "root" / "runs")
    assert config.data.source == str(tmp_path / "root" / "pictures")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/root/mlflow.db"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "s3://bucket/x", "sqlite:////srv/mlflow.db", ""])
def test_urls_and_absolute_paths_stay_as_they_are(uri):
    assert resolved(f"tracking.uri={uri}").tracking.uri == uri


@pytest.mark.parametrize(
    "key",
    ["run.output", "tokenizer.checkpoint", "generator.checkpoint", "losses.perceptual_heads", "extractor.train_source",
     "evaluate.reference", "sweep.control"],
)  # fmt: skip
def test_a_url_is_refused_where_only_a_path_can_be_used(key):
    with pytest.raises(BadInput, match=rf"^{key} is 's3://\*\*\*@bucket/x'; expected a path .* not a URL"):
        resolved(f"{key}=s3://anna:secret@bucket/x")
    with pytest.raises(BadInput, match="sweep.checkpoints is 'gs://bucket/x'; expected a path"):
        resolved("sweep.checkpoints=[gs://bucket/x]")


def test_samples_is_a_word_only_where_a_source_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolved("data.source=samples", "run.output=samples")
    assert (config.data.source, config.run.output) == ("samples", str(tmp_path / "samples"))


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolved("data.source=~/pictures").data.source == str(tmp_path / "pictures")


def test_a_checkpoint_is_a_hub_id_unless_its_folder_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert resolved("tokenizer.checkpoint=owner/name").tokenizer.checkpoint == "owner/name"
    # A mistyped name beside existing runs is a path, so that nobody asks the network for it.
    assert resolved("tokenizer.checkpoint=runs/typo").tokenizer.checkpoint == str(tmp_path / "runs" / "typo")


@pytest.mark.parametrize("key", ["run.output", "data.shards", "tracking.uri"])
def test_a_relative_output_in_a_temporary_copy_is_refused(temporary_copy, key):
    overrides = {"run.output": "/out", "data.shards": "/shards", "tracking.uri": "http://127.0.0.1:5000"}
    overrides[key] = "sqlite:///mlflow.db" if key == "tracking.uri" else "here"
    with pytest.raises(BadInput, match=rf"{key} is .* would vanish .* or TATOK_ROOT set"):
        resolved(*(f"{name}={value}" for name, value in overrides.items()))


def test_a_temporary_copy_with_tatok_root_or_absolute_outputs_is_accepted(temporary_copy, monkeypatch):
    absolute = resolved("run.output=/out", "tracking.uri=sqlite:////out/mlflow.db", "data.source=pictures")
    assert absolute.data.source == str(temporary_copy / "pictures")
    monkeypatch.setenv("TATOK_ROOT", "/lasting")
    assert resolved().run.output == "/lasting/runs"


def test_a_ray_job_outside_a_copied_folder_is_no_temporary_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert not in_temporary_copy()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.core.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1.5, math.nan], "a": (math.inf, "text")})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [None, "text"], "b": [1.5, None]}
    assert text.index('"a"') < text.index('"b"')
    assert finite({"x": -math.inf, "y": 2}) == {"x": None, "y": 2}


def test_the_checksum_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"bytes")
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"bytes").hexdigest()


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


# Stores of other machines.


@pytest.fixture
def refusing_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The end of an s3:// URL whose store answers 403 to everything."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(403)
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815 - its name in http.server

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["pictures", "a.parquet", "a.tar"])
def test_a_store_that_refuses_is_named_with_its_key(refusing_store, name):
    config = load_config("smoke", [f"data.source=s3://bucket/{name}{refusing_store}"])
    with pytest.raises(BadInput) as caught:
        check_pictures(config)
    said = str(caught.value)
    assert said.startswith(f"data.source 's3://bucket/{name}?")
    assert "ACCESS_DENIED" in said
    with pytest.raises(BadInput, match=rf"^data.shards 's3://bucket/{name}\?.*ACCESS_DENIED"):
        check_pictures(load_config("smoke", [f"data.shards=s3://bucket/{name}{refusing_store}"]))
    with pytest.raises(BadInput, match=rf"^tokens.path 's3://bucket/{name}\?.*ACCESS_DENIED"):
        read_token_manifest(f"s3://bucket/{name}{refusing_store}")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.tar", "https://host/x", "az://container/x", "memory://x", "ftp://host/x", "S3://bucket/x", "s3:///x",
     "s4://bucket"],
)  # fmt: skip
def test_a_url_of_no_known_store_names_its_key_and_those_that_are(url):
    with pytest.raises(BadInput, match=rf"^data.source '{url}' is not understood .* such as s3://bucket/folder, gs://"):
        locate(url, "data.source")


@pytest.mark.parametrize("problem", [OSError("Unable to load libjvm"), ImportError("No module named 'hub'")])
def test_a_store_that_lacks_a_library_here_is_named_with_its_key(monkeypatch, problem):
    def fail(*about: object) -> None:
        raise problem

    monkeypatch.setattr("pyarrow.fs.FileSystem", SimpleNamespace(from_uri=fail))
    with pytest.raises(BadInput) as caught:
        locate("hdfs://host/x", "data.heldout_source")
    assert str(caught.value).startswith(f"data.heldout_source 'hdfs://host/x' cannot be read ({problem}); expected")


def hanging(*about: object) -> None:
    time.sleep(20)


@pytest.mark.parametrize(
    ("does", "reason"),
    [(hanging, "no answer within 0.2 s"), (lambda *about: 1 / 0, "division by zero")],
)
def test_a_store_that_does_not_answer_or_fails_in_its_library_is_one_sentence(monkeypatch, does, reason):
    monkeypatch.setattr("pipeline.core.files.ANSWER_SECONDS", 0.2)
    store = SimpleNamespace(get_file_info=does, open_input_file=does)
    place = Location(store, "bucket/x", "data.source 's3://bucket'")
    begun = time.monotonic()
    for ask in (place.info, place.open, (place / "file").read, place.parent.info):
        with pytest.raises(BadInput, match=rf"^data.source 's3://bucket' cannot be read \({reason}\); expected"):
            ask()
    assert time.monotonic() - begun < 5


def test_what_is_not_in_a_store_is_not_there():
    store = SimpleNamespace(open_input_file=lambda path: Path("/no/such/file").read_bytes())
    with pytest.raises(FileNotFoundError):
        Location(store, "bucket/x", "data.source 's3://bucket'").open()


def test_what_is_asked_within_a_time_answers_raises_or_is_given_up():
    assert within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        within(0.1, lambda: time.sleep(20))
    assert time.monotonic() - begun < 3


@pytest.mark.slow
def test_a_store_that_never_answers_ends_a_job_and_the_doctor_within_a_minute(run_job, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for source in (
            f"s3://bucket/x?region=us-east-1&scheme=http&endpoint_override={address}",
            f"gs://anonymous@bucket/x?scheme=http&endpoint_override={address}",
        ):
            for job in ("preprocess", "doctor"):
                begun = time.monotonic()
                said = run_job(job, "smoke", f"data.source={source}", "tracking.uri=", "--dry-run", timeout=100)
                assert time.monotonic() - begun < 60
                assert said.returncode == 2
                assert "cannot be read (no answer within 25 s)" in said.stderr + said.stdout
                assert "Traceback" not in said.stderr
