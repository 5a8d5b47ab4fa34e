"""Every kind of source lists and reads the same way; what cannot work is refused with one sentence."""

import io
import json
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.data import sources
from pipeline.data.sources import Picture, Scan

DATA = DataConfig(image_size=16)
Bytes = Callable[..., bytes]


def opened(place: Path | str, data: DataConfig = DATA) -> tuple[Scan, list[list[Picture]]]:
    """What the scan found, and the pictures of every range."""
    sources.check_source("data.source", str(place), data)
    source = sources.open_source("data.source", str(place), data)
    found = sources.scan(source, data)
    return found, [list(sources.read(source, units, data)) for units in found.ranges]


def pictures_of(place: Path | str, data: DataConfig = DATA) -> list[Picture]:
    return [picture for part in opened(place, data)[1] for picture in part]


def write_parquet(path: Path, row_group_size: int = 2, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_class_folders_give_sorted_pictures_with_their_class(class_folders: Path, picture_bytes: Bytes) -> None:
    pictures = pictures_of(class_folders)
    assert [picture.id for picture in pictures] == [f"{name}/{n}.png" for name in ("cat", "dog") for n in range(3)]
    assert [picture.label for picture in pictures] == ["cat"] * 3 + ["dog"] * 3
    assert pictures[4].data == picture_bytes(11)
    assert opened(class_folders)[0].names == {"cat", "dog"}


def test_a_url_of_a_folder_gives_the_same(class_folders: Path) -> None:
    assert pictures_of(f"file://{class_folders}") == pictures_of(class_folders)
    assert pictures_of(f"{class_folders}/") == pictures_of(class_folders)


def test_a_flat_folder_has_no_labels(class_folders: Path) -> None:
    pictures = pictures_of(class_folders / "cat")
    assert [picture.id for picture in pictures] == ["0.png", "1.png", "2.png"]
    assert {picture.label for picture in pictures} == {None}


def test_ranges_hold_as_many_pictures_as_asked_for(class_folders: Path) -> None:
    found, parts = opened(class_folders, replace(DATA, rows_per_shard=4))
    assert found.rows == [4, 2] == [len(part) for part in parts]


def test_a_file_that_is_gone_is_a_problem_of_its_own(class_folders: Path) -> None:
    source = sources.open_source("data.source", str(class_folders), DATA)
    found = sources.scan(source, DATA)
    (class_folders / "cat/1.png").unlink()
    problems = {picture.id: picture.problem for picture in sources.read(source, found.ranges[0], DATA)}
    assert problems.pop("cat/1.png") == "file cannot be read (FileNotFoundError)"
    assert set(problems.values()) == {""}


@pytest.mark.parametrize("as_struct", [False, True])
@pytest.mark.parametrize("rows_per_shard", [3, 4, 100])
def test_parquet_rows_come_in_order_over_files_and_row_groups(
    tmp_path: Path, picture_bytes: Bytes, as_struct: bool, rows_per_shard: int
) -> None:
    files = [[picture_bytes(10 * part + row) for row in range(5)] for part in range(2)]
    for part, rows in enumerate(files):
        column = [{"bytes": data, "path": "x.png"} for data in rows] if as_struct else rows
        write_parquet(tmp_path / f"set/part-{part}.parquet", image=column, label=[7] * 5)
    found, parts = opened(tmp_path / "set", replace(DATA, rows_per_shard=rows_per_shard))
    assert found.rows == [len(part) for part in parts]
    assert max(found.rows) == min(rows_per_shard, 10)
    pictures = [picture for part in parts for picture in part]
    assert [picture.data for picture in pictures] == [data for rows in files for data in rows]
    assert [picture.id for picture in pictures] == [f"part-{part}.parquet#{row}" for part in (0, 1) for row in range(5)]


def test_of_a_parquet_file_the_configured_columns_are_used(tmp_path: Path, picture_bytes: Bytes) -> None:
    images = [picture_bytes(number) for number in range(3)]
    path = write_parquet(tmp_path / "a.parquet", jpg=images, y=[1, None, 0], what=["b", "b", "a"], label=[5, 5, 5])
    data = replace(DATA, image_column="jpg", label_column="y", class_name_column="what")
    assert [picture.label for picture in pictures_of(path, data)] == [1, None, 0]
    assert opened(path, data)[0].indexed == {1: "b", 0: "a"}


def test_class_names_alone_are_labels_too(tmp_path: Path, picture_bytes: Bytes) -> None:
    names = pa.array(["dog", None, "cat"]).dictionary_encode()
    path = write_parquet(tmp_path / "a.parquet", image=[picture_bytes(n) for n in range(3)], class_name=names)
    assert [picture.label for picture in pictures_of(path)] == ["dog", None, "cat"]
    assert opened(path)[0].names == {"cat", "dog"}


def test_parquet_without_labels_and_with_a_missing_picture(tmp_path: Path, picture_bytes: Bytes) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=[picture_bytes(0), None], label=[0.5, 0.5])  # no class index
    pictures = pictures_of(path)
    assert [picture.label for picture in pictures] == [None, None]
    assert pictures[1].data == b""


def test_tar_members_belong_together_by_key(tmp_path: Path, picture_bytes: Bytes) -> None:
    images = [picture_bytes(number) for number in range(6)]
    members = {
        "a/000.jpg": images[0], "a/000.cls": b"3\n",
        "a/001.cls": b"dog", "a/001.png": images[1], "a/001.txt": b"text",
        "a/002.png": images[2], "a/002.json": json.dumps({"label": 1, "class_name": "cat"}).encode(),
        "a/003.png": images[3], "a/003.json": json.dumps({"class_name": "cat"}).encode(),
        "a/004.png": images[4], "a/004.json": b"{broken",
        "a/005.txt": b"no picture",
        "a/006.PNG": images[5], "a/006.json": b"[1]",
    }  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    found, parts = opened(path, replace(DATA, rows_per_shard=4))
    pictures = [picture for part in parts for picture in part]
    assert [picture.id for picture in pictures] == [f"a.tar#a/00{number}" for number in (0, 1, 2, 3, 4, 6)]
    assert [picture.data for picture in pictures] == images
    assert [picture.label for picture in pictures] == [3, "dog", 1, "cat", None, None]
    assert found.names == {"dog", "cat"}
    assert found.indexed == {3: "", 1: "cat"}
    assert found.rows == [4, 2]


def test_a_class_index_in_a_tar_is_a_small_number(tmp_path: Path, picture_bytes: Bytes) -> None:
    image = picture_bytes(0)
    members = {"0.png": image, "0.cls": b"99999999", "1.png": image, "1.json": b'{"label": true}'}
    assert [picture.label for picture in pictures_of(write_tar(tmp_path / "a.tar", members))] == [None, None]


def test_a_folder_of_tar_files_is_read_in_order(tmp_path: Path, picture_bytes: Bytes) -> None:
    for name in ("b", "a"):
        write_tar(tmp_path / f"{name}.tar", {"0.png": picture_bytes(ord(name)), "1.png": b"x"})
    assert [picture.id for picture in pictures_of(tmp_path)] == ["a.tar#0", "a.tar#1", "b.tar#0", "b.tar#1"]
    assert pictures_of(tmp_path)[2].data == picture_bytes(ord("b"))


def test_the_samples_are_labelled_by_photograph() -> None:
    found, parts = opened("samples", replace(DATA, image_size=128, rows_per_shard=100))
    assert "cat" in found.names
    assert parts[0][0].id.startswith(f"{parts[0][0].label}/")
    assert sum(found.rows) == sum(len(part) for part in parts) > 100


def test_the_fingerprint_follows_names_and_sizes_but_not_times_or_places(
    class_folders: Path, picture_bytes: Bytes
) -> None:
    def fingerprint(place: Path) -> str:
        return sources.open_source("data.source", str(place), DATA).fingerprint()

    before = fingerprint(class_folders)
    path = class_folders / "cat/0.png"
    path.write_bytes(path.read_bytes())
    moved = class_folders.rename(class_folders.with_name("moved"))
    assert fingerprint(moved) == before
    (moved / "cat/0.png").write_bytes(b"other size")
    changed = fingerprint(moved)
    (moved / "cat/0.png").rename(moved / "cat/00.png")
    assert len({before, changed, fingerprint(moved)}) == 3


def test_the_fingerprint_of_parquet_follows_the_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=[b"1", b"2"])
    source = sources.open_source("data.source", str(path), DATA)
    assert source.rows == (2,)
    assert source.fingerprint() != replace(source, rows=(3,)).fingerprint()


def test_pictures_count_before_parquet_and_parquet_before_tar(class_folders: Path, picture_bytes: Bytes) -> None:
    write_tar(class_folders / "a.tar", {"0.png": picture_bytes(0)})
    write_parquet(class_folders / "a.parquet", image=[picture_bytes(0)])
    write_parquet(class_folders / "0.parquet", notes=["no pictures"])
    assert len(pictures_of(class_folders)) == 6
    (class_folders / "0.parquet").unlink()
    for name in ("cat", "dog"):
        for path in (class_folders / name).iterdir():
            path.unlink()
    assert sources.open_source("data.source", str(class_folders), DATA).kind == "parquet"


def _missing(folder: Path) -> Path:
    return folder / "missing"


def _empty(folder: Path) -> Path:
    (folder / "empty/below").mkdir(parents=True)
    (folder / "empty/below/notes.txt").write_text("no picture")
    return folder / "empty"


def _text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no picture")
    return folder / "notes.txt"


def _no_parquet(folder: Path) -> Path:
    (folder / "a.parquet").write_bytes(b"no Parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "", "data.source is empty; expected a folder with pictures"),
        (_missing, "data.source '.*missing' does not exist; expected a folder with pictures"),
        (lambda folder: f"file://{folder}/missing", "data.source 'file://.*missing' does not exist"),
        (lambda folder: "nowhere://x/y", "'nowhere://x/y' is not understood .*; expected a path or a URL"),
        (_empty, "data.source '.*empty' holds no picture"),
        (_text, "data.source '.*notes.txt' holds no picture"),
        (_no_parquet, "cannot be read as Parquet .*; expected a whole Parquet file"),
        (
            lambda folder: write_parquet(folder / "a.parquet", picture=[b""], y=[0]),
            "has no column 'image'; expected data.image_column to be one of picture, y",
        ),
        (
            lambda folder: write_parquet(folder / "set/a.parquet", image=[1]),
            r"column 'image' of .* holds int64; expected data.image_column to name bytes or \{bytes, path\}",
        ),
        (
            lambda folder: write_parquet(folder / "set/a.parquet", image=[{"path": "a"}]),
            r"column 'image' of .* holds struct.*; expected data.image_column to name bytes or \{bytes, path\}",
        ),
    ],
)
def test_a_source_that_cannot_work_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], Path | str], message: str
) -> None:
    place = str(make(tmp_path))
    for look in (sources.check_source, sources.open_source):
        started = time.monotonic()
        with pytest.raises(BadInput, match=message):
            look("data.source", place, DATA)
        assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: write_parquet(folder / "a.parquet", image=pa.array([], pa.binary())), "holds no picture"),
        (lambda folder: write_tar(folder / "a.tar", {"0.txt": b"x"}), "holds no picture"),
        (
            lambda folder: write_parquet(folder / "a.parquet", image=[b""], label=[100_000]),
            "column 'label' of .* holds 100000; expected class indices below 100000",
        ),
    ],
)
def test_a_source_that_shows_its_fault_when_scanned_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    source = sources.open_source("data.source", str(make(tmp_path)), DATA)
    with pytest.raises(BadInput, match=message):
        sources.scan(source, DATA)


@pytest.mark.parametrize("keep", [0, 700, 1536, 2000])
def test_a_tar_that_is_not_whole_is_refused(tmp_path: Path, picture_bytes: Bytes, keep: int) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{number}.png": picture_bytes(number) for number in range(4)})
    path.write_bytes(path.read_bytes()[:keep])
    source = sources.open_source("data.source", str(path), DATA)
    with pytest.raises(BadInput, match="cannot be read as tar .*; expected a whole, uncompressed tar file"):
        sources.scan(source, DATA)


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    source = sources.open_source("data.source", str(tmp_path / "a.tar"), DATA)
    with pytest.raises(BadInput, match="expected a whole, uncompressed tar file"):
        sources.scan(source, DATA)


def test_what_jobs_left_below_a_source_is_none_of_it(class_folders: Path, picture_bytes: Bytes) -> None:
    """Run folders and what lies in them, artifacts of MLflow, pages of jobs/show.py; folders called so stay."""
    before = sources.open_source("data.source", str(class_folders), DATA)
    made = [
        "runs/a/pictures/step-1.png",
        "runs/demo-1/demo-evaluate/pictures/x.png",
        "show/show.png",
        "runs/a/b.parquet",
    ]
    made += [f"mlruns/1/{'0f' * 16}/artifacts/pictures/x.png"]
    for name in made:
        (class_folders / name).parent.mkdir(parents=True, exist_ok=True)
        (class_folders / name).write_bytes(picture_bytes(1))
    for run in ("runs/a", "runs/demo-1"):
        (class_folders / run / "summary.json").write_text("{}")
        (class_folders / run / "config.yaml").write_text("")
    (class_folders / "show" / "show.html").write_text("")
    after = sources.open_source("data.source", str(class_folders), DATA)
    assert (after.files, after.fingerprint()) == (before.files, before.fingerprint())
    (class_folders / "artifacts").mkdir()
    (class_folders / "artifacts" / "show.png").write_bytes(picture_bytes(2))
    found = sources.open_source("data.source", str(class_folders), DATA)
    assert {name for name, _ in found.files} - {name for name, _ in before.files} == {"artifacts/show.png"}


def test_a_folder_that_holds_only_what_jobs_left_holds_no_picture(tmp_path: Path, picture_bytes: Bytes) -> None:
    for name, data in {"summary.json": b"{}", "config.yaml": b"", "x.png": picture_bytes(1)}.items():
        (tmp_path / "runs" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "a" / name).write_bytes(data)
    with pytest.raises(BadInput, match="holds no picture"):
        sources.check_source("data.source", str(tmp_path), DATA)
