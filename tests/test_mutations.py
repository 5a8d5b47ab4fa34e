"""A thousand damaged inputs: each is used, or answered with one sentence; nothing crashes, hangs or writes elsewhere.

Seeded: what fails is found again by its number. Twenty go through the commands. `tests/pipeline/` has the cases that a
person thought of.
"""

import dataclasses
import io
import random
import re
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.core import checkpoints
from pipeline.core.checkpoints import load_tokenizer
from pipeline.core.cluster import check_cluster
from pipeline.core.config import TrackingConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import locate
from pipeline.core.presets import load_config
from pipeline.data import sources
from pipeline.data.labels import class_names, label_of
from pipeline.data.pictures import BadPicture, prepare
from pipeline.data.shards import ShardDataset
from pipeline.tokens.stream import from_table, to_parquet, to_table
from pipeline.tokens.token_manifest import Stream
from pipeline.tracking import check_tracking
from pipeline.tracking.mlflow_store import refusal

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
SHAPE = ["data.image_size=16", "tokenizer.patch_size=4", "tokenizer.global_tokens=2", "tokenizer.size=nano",
         "tokenizer.quantizer=fsq", "tokenizer.fsq_levels=[4,4]", "tokenizer.codebook_size=16",
         "tokenizer.entropy_layers=1", "tokenizer.entropy_width=64"]  # fmt: skip
DATA = load_config("smoke", SHAPE).data


def mutated(data: bytes, number: int) -> bytes:
    """The same bytes with one to eight changes: flipped, cut, doubled, zeroed, filled, or a number made large."""
    draw, found = random.Random(number), bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        if not found:
            break
        # Headers and footers decide more than what is between.
        edge = draw.choice((len(found), min(len(found), 64), min(len(found), 512)))
        start = draw.randrange(edge) if draw.random() < 0.7 else len(found) - 1 - draw.randrange(edge)
        stop = min(len(found), start + draw.choice((1, 1, 2, 4, 8, 64)))
        change = draw.randrange(7)
        if change == 0:
            found[start] ^= 1 << draw.randrange(8)
        elif change == 1:
            del found[start:]
        elif change == 2:
            found[start:start] = found[start:stop] * draw.choice((1, 2, 50))
        elif change == 3:
            found[start:stop] = bytes(stop - start)
        elif change == 4:
            found[start:stop] = draw.randbytes(stop - start)
        elif change == 5:
            del found[start:stop]
        else:
            found[start:stop] = b"\xff" * (stop - start)
    return bytes(found)


def picture(number: int, encoding: str = "PNG") -> bytes:
    """Noise; a deep one is of 16-bit grey, a noted one has a long text and a transparent level."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    if encoding == "deep TIFF":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(file, "TIFF")
    elif encoding == "noted PNG":
        notes = PngInfo()
        notes.add_text("notes", "x" * 2**21, zip=True)
        Image.fromarray(pixels[..., 0]).save(file, "PNG", pnginfo=notes, transparency=7)
    else:
        Image.fromarray(pixels).save(file, encoding)
    return file.getvalue()


def tar_of_pictures() -> bytes:
    """One member would leave the folder if it were extracted."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in (("a.png", picture(1)), ("a.cls", b"1"), ("../../b.png", picture(2)), ("b.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def tar_of_every_habit() -> bytes:
    """Dots in keys, labels apart from their pictures, links, a Mac's shadows, a name that is not UTF-8."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for name, data in (
            ("v1.0.png", picture(1)), ("v1.1.png", picture(2)), ("._v1.0.png", b"\0\5"), ("caf\xe9.PNG", picture(3)),
            ("to", "caf\xe9.PNG"), ("v1.1.cls", b"\xef\xbb\xbf1"), ("v1.0.JSON", b'{"label": [2.0]}'),
            ("to.png", "v1.0.png"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def parquet_of_every_habit() -> bytes:
    """Paths in the place of bytes, labels in lists of floats."""
    file = io.BytesIO()
    images = [{"bytes": data, "path": path} for data, path in ((picture(1), "a"), (None, "b"), (picture(2), None))]
    rows = {"image": images, "label": [[1.0], [], [0.0]], "class_name": [b"ant", None, b"\xe9"]}
    pq.write_table(pa.table(rows), file)
    return file.getvalue()


def parquet_of_pictures() -> bytes:
    file = io.BytesIO()
    rows = {"image": [picture(1), picture(2)], "label": [0, 1], "class_name": ["ant", "bee"]}
    pq.write_table(pa.table(rows), file)
    return file.getvalue()


FOUR = {split: [{"image": picture(number)} for number in range(4)] for split in ("train", "heldout")}


def each(data: bytes, numbers: range, use: Callable[[bytes], None], *answers: type[Exception]) -> int:
    """Use every mutation; returns how many were refused. Only `answers` may be raised, each one line that tells why."""
    refused = []
    for number in numbers:
        changed = mutated(data, number)
        try:
            use(changed)
        except answers as error:
            refused.append((number, str(error)))
        except Exception as error:
            raise AssertionError(f"mutation {number} raised {type(error).__name__}: {error}") from error
    unclear = [(number, said) for number, said in refused if not 5 < len(said) < 2000 or "\n" in said]
    assert not unclear
    return len(refused)


@pytest.fixture
def place(tmp_path: Path):
    """A folder to work in; what lies beside it must stay as it is."""
    inside = tmp_path / "inside"
    inside.mkdir()
    yield inside
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize(
    ("encoding", "numbers"),
    [("PNG", range(120)), ("JPEG", range(120, 240)), ("WEBP", range(240, 320)), ("GIF", range(320, 360)),
     ("TIFF", range(360, 420)), ("BMP", range(420, 450)), ("deep TIFF", range(450, 490)),
     ("noted PNG", range(490, 530))],
)  # fmt: skip
def test_damaged_pictures(encoding: str, numbers: range) -> None:
    def use(data: bytes) -> None:
        with Image.open(io.BytesIO(prepare(data, DATA))) as made:
            assert made.size == (16, 16)

    assert each(picture(1, encoding), numbers, use, BadPicture) > len(numbers) / 10


def read_source(path: Path) -> None:
    data = dataclasses.replace(DATA, source=str(path))
    source = sources.open_source("data.source", str(path), data)
    found = sources.scan(source, data)
    indices = {name: index for index, name in enumerate(class_names(found.indexed.items(), found.names))}
    for units in found.ranges:
        for one in sources.read(source, units, data):
            assert not Path(one.id).is_absolute() or "#" in one.id
            assert one.id.encode()
            assert -1 <= label_of(one.label, indices) < max(len(indices), 1)
            try:
                prepare(one.data, data)
            except BadPicture:
                continue


@pytest.mark.parametrize(
    ("make", "numbers"), [(tar_of_pictures, range(1000, 1120)), (tar_of_every_habit, range(1200, 1260))]
)
def test_damaged_tars(place: Path, make: Callable[[], bytes], numbers: range) -> None:
    path = place / "source.tar"

    def use(data: bytes) -> None:
        path.write_bytes(data)
        read_source(path)

    assert each(make(), numbers, use, BadInput) > len(numbers) / 12


@pytest.mark.parametrize(
    ("make", "numbers"), [(parquet_of_pictures, range(2000, 2120)), (parquet_of_every_habit, range(2200, 2260))]
)
def test_damaged_parquet_sources(place: Path, make: Callable[[], bytes], numbers: range) -> None:
    path = place / "source.parquet"

    def use(data: bytes) -> None:
        path.write_bytes(data)
        read_source(path)

    assert each(make(), numbers, use, BadInput) > len(numbers) / 6


@pytest.mark.parametrize(("name", "numbers"), [("manifest.json", range(3000, 3060)), ("shard", range(3060, 3120))])
def test_damaged_shards(place: Path, write_shards, name: str, numbers: range) -> None:
    write_shards(place, FOUR, 16, ("ant",))
    path = place / ("manifest.json" if name == "manifest.json" else "shards/train-00000.parquet")

    def use(data: bytes) -> None:
        path.write_bytes(data)
        found = ShardDataset(place, "train")
        assert found.images(range(len(found))).shape[1:] == (16, 16, 3)
        found.ids(range(len(found)))
        found.labels(range(len(found)))

    assert each(path.read_bytes(), numbers, use, BadInput) > 10


@pytest.fixture(scope="module")
def tokenizer():
    import torch

    from tatok_model import TaTok

    torch.manual_seed(0)
    return TaTok(load_config("smoke", SHAPE).tokenizer.architecture()).eval()


@pytest.mark.parametrize(
    ("name", "numbers"), [("config.json", range(4000, 4040)), ("model.safetensors", range(4040, 4070))]
)
def test_damaged_tokenizers(place: Path, tokenizer, name: str, numbers: range) -> None:
    tokenizer.save_pretrained(place)
    config = load_config("smoke", [*SHAPE, f"tokenizer.checkpoint={place}"])

    def use(data: bytes) -> None:
        (place / name).write_bytes(data)
        load_tokenizer(config)

    assert each((place / name).read_bytes(), numbers, use, BadInput) > 10


def test_damaged_training_states(place: Path, tokenizer) -> None:
    import torch

    folder = checkpoints.save(place, 5, tokenizer, {"x": torch.zeros(4)}, keep=2, decides={})
    for name in ("training_state.json", "training_state.safetensors", "config.json"):
        whole = (folder / name).read_bytes()
        numbers = range(5000, 5040)

        def use(data: bytes, name: str = name, whole: bytes = whole) -> None:
            (folder / name).write_bytes(data)
            found = checkpoints.latest(place)
            assert found is None or data == whole or (name == "training_state.json" and found.step >= 0)

        assert each(whole, numbers, use) == 0
        (folder / name).write_bytes(whole)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    import torch

    return tokenizer.rank(tokenizer.encode(torch.rand(3, 3, 16, 16)))


def test_damaged_token_files(tokens) -> None:
    ranking = tokens.ranking
    stream = Stream(ranking.score, ranking.rounds, "0" * 64, 2, 16, 16, 16, 4)
    data = to_parquet(to_table(tokens, ["a", "b", "c"], np.zeros(3), stream))

    def use(changed: bytes) -> None:  # as `read_token_file` does once the checksum was forged
        try:
            table = pq.read_table(pa.BufferReader(changed))
        except (pa.ArrowException, OSError) as error:
            raise BadInput(" ".join(str(error).split())) from None
        from_table(table)

    assert each(data, range(6000, 6080), use, BadInput) > 10


@pytest.mark.parametrize("entropy_coded", [False, True])
def test_damaged_streams(tokenizer, tokens, entropy_coded: bool) -> None:
    from tatok_model import Codec

    codec = Codec(tokenizer)
    data = codec.to_bytes(tokens.cut("count", 5), entropy_coded)[0]

    def use(changed: bytes) -> None:
        found = codec.from_bytes([changed])
        assert int(found.patch_indices.max()) < 16

    assert each(data, range(7000, 7050), use, ValueError) > 10


def test_damaged_presets(place: Path, repository: Path) -> None:
    data = (repository / "pipeline" / "configs" / "cifar10.yaml").read_bytes()
    path = place / "preset.yaml"

    def use(changed: bytes) -> None:
        path.write_bytes(changed)
        load_config(str(path))

    assert each(data, range(8000, 8150), use, BadInput) > 30


def test_damaged_tracking_databases(place: Path) -> None:
    path = place / "mlflow.db"
    assert refusal(f"sqlite:///{path}", "tatok") == ""  # which sets what mlflow reads when it is imported
    from mlflow.store.db.utils import _get_latest_schema_revision

    with closing(sqlite3.connect(path)) as made, made:
        made.execute("CREATE TABLE alembic_version (version_num TEXT)")
        made.execute("CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT)")
        made.execute("INSERT INTO alembic_version VALUES (?)", (_get_latest_schema_revision(),))
        made.execute("INSERT INTO experiments VALUES (1, 'tatok', 'active')")
    data = path.read_bytes()
    assert refusal(f"sqlite:///{path}", "tatok") == ""

    def use(changed: bytes) -> None:
        path.write_bytes(changed)
        if said := refusal(f"sqlite:///{path}", "tatok"):
            raise BadInput(said)

    assert each(data, range(9000, 9060), use, BadInput) > 20


@pytest.mark.parametrize(
    ("address", "numbers"),
    [("head.example:6379", range(9100, 9160)), ("http://anna:secret@host:5000/ml", range(9200, 9260)),
     ("gs://bucket/folder?scheme=http", range(9300, 9330))],
)  # fmt: skip
def test_damaged_addresses(monkeypatch: pytest.MonkeyPatch, address: str, numbers: range) -> None:
    monkeypatch.setattr("pipeline.core.cluster._call", lambda address: None)  # what is there is not the question

    def use(changed: bytes) -> None:
        text = changed.replace(b"\0", b" ").decode("utf-8", errors="replace")[:500]
        if address.startswith("head"):
            monkeypatch.setenv("RAY_ADDRESS", text)
            check_cluster()
            assert not text or re.fullmatch(r"[\w.-]+:\d+", text)
        elif address.startswith("http"):
            check_tracking(replace(load_config("smoke"), tracking=TrackingConfig(uri=text)))
        elif text.startswith("gs://"):  # which asks nobody yet
            locate(text, "data.source")

    assert each(address.encode(), numbers, use, BadInput) > len(numbers) / 10


# What is damaged, the numbers of its mutations, the command that reads it, and what is damaged as a key.
COMMANDS = [
    ("pictures/a.png", (1, 5, 6), "preprocess", "data.source={}/pictures"),
    ("source.tar", (1000, 1003, 1005), "preprocess", "data.source={}/source.tar"),
    ("source.parquet", (2000, 2001, 2002), "preprocess", "data.source={}/source.parquet"),
    ("data/manifest.json", (3000, 3002), "train", "data.shards={}/data"),
    ("data/shards/train-00000.parquet", (3060, 3061), "train", "data.shards={}/data"),
    ("tokenizer/config.json", (4000,), "tokenize_images", "tokenizer.checkpoint={}/tokenizer"),
    ("tokenizer/model.safetensors", (4040,), "tokenize_images", "tokenizer.checkpoint={}/tokenizer"),
    ("trained/checkpoints/step-00000001/training_state.json", (5000,), "train", "run.name=trained"),
    ("trained/checkpoints/step-00000001/config.json", (5001,), "train", "run.name=trained"),
    ("tokens/tokens.json", (6000,), "detokenize", "tokens.path={}/tokens"),
    ("preset.yaml", (8000, 8001), "train", ""),
]
SMALL = [*SHAPE, "tracking.uri=", "data.num_workers=1", "train.global_batch_size=4", "train.checkpoint_every=1",
         "train.validation_images=4", "train.grid_images=2", "train.log_every=1"]  # fmt: skip


@pytest.fixture
def inputs(place: Path, tokenizer, write_shards, run_job, repository: Path) -> Path:
    """A folder with everything that `COMMANDS` damages, still whole."""
    folder = place / "whole"
    (folder / "pictures").mkdir(parents=True)
    for name, number in (("a", 1), ("b", 2)):
        (folder / "pictures" / f"{name}.png").write_bytes(picture(number))
    (folder / "source.tar").write_bytes(tar_of_pictures())
    (folder / "source.parquet").write_bytes(parquet_of_pictures())
    shutil.copy2(repository / "pipeline" / "configs" / "cifar10.yaml", folder / "preset.yaml")
    write_shards(folder / "data", FOUR, 16, ("ant",))
    tokenizer.save_pretrained(folder / "tokenizer")
    keys = [*SMALL, f"run.output={folder}", f"data.shards={folder}/data"]
    for job, name, more in (
        ("train", "trained", "train.max_steps=1"),
        ("tokenize_images", "tokens", f"tokenizer.checkpoint={folder}/tokenizer"),
    ):
        made = run_job(job, "smoke", *keys, f"run.name={name}", more)
        assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.slow
def test_twenty_damaged_inputs_through_the_commands(place: Path, inputs: Path, run_job) -> None:
    codes = []
    for file, numbers, job, key in COMMANDS:
        for number in numbers:
            folder = place / str(number)
            shutil.copytree(inputs, folder)
            (folder / file).write_bytes(mutated((folder / file).read_bytes(), number))
            keys = [*SMALL, f"run.output={folder}", "run.name=new", "train.max_steps=2"]
            if job != "preprocess":
                keys.append(f"data.shards={folder}/data")
            if job == "detokenize":
                keys.append(f"tokenizer.checkpoint={folder}/tokenizer")
            arguments = ["smoke", *keys, key.format(folder)] if key else [str(folder / file), "--dry-run"]
            said = run_job(job, *arguments, *["--resume"] * (key == "run.name=trained"))
            what = f"{file}, mutation {number}: exit code {said.returncode}\n{said.stderr}"
            assert said.returncode in (0, 2), what
            assert "Traceback" not in said.stderr, what
            if said.returncode == 2:
                assert re.fullmatch("error: .{15,2000}", said.stderr.splitlines()[-1]), what
            codes.append(said.returncode)
            shutil.rmtree(folder)
    assert len(codes) == 20
    assert codes.count(2) >= 8
