"""Every kind of source lists and reads the same way; what cannot work is refused with one sentence."""

import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.data import sources
from pipeline.data.scans import Picture, Scan

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


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([0.0, 2.0, float("nan")]), [0, 2, None]),
        (pa.array([0, 2, None], pa.float16()), [0, 2, None]),
        (pa.array([Decimal("0.00"), Decimal("2.00"), None]), [0, 2, None]),
        (pa.array([False, True, None]), [0, 1, None]),
        (pa.array([0, 200, -1], pa.int16()), [0, 200, -1]),
        (pa.array([0.0, 2.0, None]).dictionary_encode(), [0, 2, None]),
        (pa.array([[0], [2], []]), [0, 2, None]),
        (pa.array([["cat"], ["dog"], None], pa.large_list(pa.string())), ["cat", "dog", None]),
        (pa.array([[1], [2], [0]], pa.list_(pa.float32(), 1)), [1, 2, 0]),
        (pa.array([b"cat", b"d\xe9", b""]), ["cat", "d\\xe9", None]),
        (pa.array(["cat", "", None], pa.string_view()), ["cat", None, None]),
        (pa.array(["10", "2", "-1"]), ["10", "2", -1]),
        (pa.array([None, None, None]), [None, None, None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
@pytest.mark.parametrize("key", ["label", "class_name"])
def test_labels_of_every_kind_of_column_are_kept(
    tmp_path: Path, picture_bytes: Bytes, column: pa.Array, expected: list[Any], key: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=[picture_bytes(n) for n in range(3)], **{key: column})
    found, parts = opened(path)
    assert [picture.label for part in parts for picture in part] == expected
    numbers = {int(label) for label in expected if label is not None and str(label).isdecimal()}
    names = {label for label in expected if isinstance(label, str)}
    if key == "label" and names == {"10", "2"}:  # a text that is a number is an index, in the column of indices
        assert (found.names, set(found.indexed)) == (set(), {10, 2})
    else:
        assert (found.names, set(found.indexed)) == (names, set() if names else numbers - {-1})


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ([0.5, 1.0], r"0\.5"),
        ([[0, 1], [2]], r"\[0, 1\]"),
        ([100_000, 0], "100000"),
        (pa.array([-56, 0], pa.int8()), "-56"),
        ([float("inf"), 0.0], "inf"),
        (pa.array([1, 2], pa.timestamp("s")), "datetime"),
        ([{"a": 1}, {"a": 2}], r"\{'a': 1\}"),
    ],
)
def test_a_label_that_is_neither_index_nor_name_is_refused(
    tmp_path: Path, picture_bytes: Bytes, column: Any, value: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=[picture_bytes(0), picture_bytes(1)], label=column)
    with pytest.raises(BadInput, match=f"column 'label' of .*a.parquet' holds {value}.*; expected class indices below"):
        opened(path)
    assert [picture.label for picture in pictures_of(path, replace(DATA, label_column=""))] == [None, None]


def test_a_label_column_that_is_named_and_not_there_is_refused(tmp_path: Path, picture_bytes: Bytes) -> None:
    path = write_parquet(tmp_path / "a.parquet", image=[picture_bytes(0)], labels=[3])
    for key in ("label_column", "class_name_column"):
        with pytest.raises(
            BadInput, match=f"no column 'fine'; expected data.{key} to be one of image, labels, or data"
        ):
            sources.check_source("data.source", str(path), replace(DATA, **{key: "fine"}))
    (told,) = opened(path)[0].warnings
    assert told.endswith("expected data.label_column to name the one of labels that holds it, if one does")
    found, _ = opened(path, replace(DATA, label_column="labels"))
    assert (found.indexed, found.warnings) == ({3: ""}, [])


def test_labels_of_one_file_only_are_kept(tmp_path: Path, picture_bytes: Bytes) -> None:
    write_parquet(tmp_path / "set/a.parquet", image=[picture_bytes(0)], label=["7"])
    write_parquet(tmp_path / "set/b.parquet", image=[picture_bytes(1)])
    write_parquet(tmp_path / "set/c.parquet", image=[picture_bytes(2)], label=[2])
    assert [picture.label for picture in pictures_of(tmp_path / "set")] == ["7", None, 2]
    assert set(opened(tmp_path / "set")[0].indexed) == {2, 7}


@pytest.mark.parametrize(
    "kind",
    [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()),
     pa.struct({"path": pa.string(), "bytes": pa.large_binary()})],
    ids=str,
)  # fmt: skip
def test_pictures_in_any_kind_of_bytes_are_read(tmp_path: Path, picture_bytes: Bytes, kind: pa.DataType) -> None:
    images = [picture_bytes(0), None, picture_bytes(2)]
    values = [{"bytes": data} for data in images] if pa.types.is_struct(kind) else images
    path = write_parquet(tmp_path / "a.parquet", image=pa.array(values, kind))
    assert [picture.data for picture in pictures_of(path)] == [data or b"" for data in images]


def test_rows_with_a_path_and_no_bytes_are_named(tmp_path: Path, picture_bytes: Bytes) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": None, "path": "b/c.png"}, {"bytes": picture_bytes(1), "path": "d.png"}, None]
    pictures = pictures_of(write_parquet(tmp_path / "some.parquet", image=pa.array(rows, kind)))
    assert [picture.problem for picture in pictures] == ["the row holds the path 'b/c.png' and no bytes", "", ""]
    assert [picture.data for picture in pictures] == [b"", picture_bytes(1), b""]
    none = write_parquet(tmp_path / "none.parquet", image=pa.array([rows[0]] * 5, kind))
    with pytest.raises(BadInput, match=r"none.parquet' holds paths and no bytes; expected the bytes of the pictures"):
        sources.check_source("data.source", str(none), DATA)


def labelled(place: Path) -> dict[str, Any]:
    return {picture.id.partition("#")[2]: picture.label for picture in pictures_of(place)}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({f"{n}.{end}": n for end in ("png", "cls") for n in range(3)}, {"0": 0, "1": 1, "2": 2}),
        ({f"v1.{n}.{end}": n for n in range(3) for end in ("cls", "png")}, {"v1.0": 0, "v1.1": 1, "v1.2": 2}),
        ({"v1.0.png": 0, "v1.1.png": 0, "v1.cls": 5}, {"v1.0": 5, "v1.1": 5}),
        ({"0.left.png": 0, "0.cls": 5}, {"0": 5}),  # as always: the key is the name up to the first dot
        ({f"{n}.{end}": n for n in range(2) for end in ("PNG", "CLS")}, {"0": 0, "1": 1}),
        ({"0.png": 0, "._0.cls": 9, "0.cls": 3, "._0.png": 0, "__MACOSX/._0.cls": 9}, {"0": 3}),
        ({"./a.d/0.png": 0, "./a.d/0.cls": 3}, {"./a.d/0": 3}),
        ({"../a/0.png": 0, "../a/0.cls": b"02119789", "./.b/0.png": 1}, {"../a/0": "02119789"}),
        ({"0.cls": b"-1", "0.png": 0, "1.cls": b"-1.0", "1.png": 0}, {"0": -1, "1": -1}),
        ({"0.cls": b"\xef\xbb\xbf2\r\n", "0.png": 0, "1.cls": b"3.0", "1.png": 0}, {"0": 2, "1": 3}),
        ({"0.cls": b"caf\xe9", "0.png": 0}, {"0": "caf\\xe9"}),
        ({"0.cls": 2, "0.json": b'{"caption": "x"}', "0.png": 0}, {"0": 2}),
        ({"0.json": b'{"label": 1.0}', "0.png": 0, "1.json": b'{"label": [true]}', "1.png": 0}, {"0": 1, "1": 1}),
        ({"0.JSON": b'\xef\xbb\xbf{"label": "3"}', "0.png": 0}, {"0": 3}),
        ({"0.json": b'{"label": "\\ud800"}', "0.png": 0}, {"0": "\\ud800"}),
    ],
)  # fmt: skip
def test_labels_in_a_tar_are_kept_wherever_they_lie(
    tmp_path: Path, picture_bytes: Bytes, members: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Values: the label, or the bytes of a member."""
    contents = {
        name: content if isinstance(content, bytes) else
        picture_bytes(content) if name.lower().endswith("png") else str(content).encode()
        for name, content in members.items()
    }  # fmt: skip
    path = write_tar(tmp_path / "a.tar", contents)
    assert labelled(path) == expected
    assert opened(path)[0].left_out == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.png": b"x", "0.json": b'{"label": 99999999}'}, "'label' of 'a.tar#0.json' holds 99999999; expected class"),
        ({"0.png": b"x", "0.json": b'{"label": [1, 2]}'}, r"'label' of 'a.tar#0.json' holds \[1, 2\]; expected class"),
        ({"0.png": b"x", "0.cls": b"1", "0.json": b'{"label": 2}'}, "a.tar#0 has the label 1 in .cls and 2 in .json"),
    ],
)
def test_a_label_in_a_tar_that_says_nothing_clear_is_refused(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        opened(write_tar(tmp_path / "a.tar", members))


def test_of_several_pictures_of_a_tar_key_the_others_are_named(tmp_path: Path, picture_bytes: Bytes) -> None:
    images = [picture_bytes(number) for number in range(7)]
    members = {
        "0.png": images[0], "0.mask.png": images[1], "0.jpg": images[2], "0.cls": b"4",
        "1.a.png": images[3], "1.a.jpg": images[4], "1.b.png": images[5],
        "img": images[6], "x.heic": b"\0\0\0\x18ftypheic", "y.txt": b"text", "y.json": b"{}",
    }  # fmt: skip
    found, parts = opened(write_tar(tmp_path / "a.tar", members))
    taken = {picture.id: picture.data for part in parts for picture in part}
    assert taken == {"a.tar#0": images[0], "a.tar#1.a": images[3], "a.tar#1.b": images[5], "a.tar#img": images[6]}
    assert found.left_out == [
        ("a.tar#0.mask.png", "another picture has this key; expected one a key"),
        ("a.tar#0.jpg", "another picture has this key; expected one a key"),
        ("a.tar#1.a.jpg", "another picture has this key; expected one a key"),
        ("a.tar#x.heic", "its key has no picture, and this is neither picture nor text"),
    ]


def test_links_in_a_tar_are_followed_or_named(tmp_path: Path, picture_bytes: Bytes) -> None:
    def link(name: str, to: str, hard: bool = False) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.LNKTYPE if hard else tarfile.SYMTYPE, to
        return member

    images = [picture_bytes(0), picture_bytes(1)]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(link("a/0.png", "../b/1.png"))  # before what it means
        archive.addfile(link("c/6.png", "6.png"))
        for name, content in (("b/1.png", images[0]), ("b/1.cls", b"7"), ("b/2.png", images[1])):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        archive.addfile(link("a/3.png", "b/2.png", hard=True))
        archive.addfile(link("a/0.cls", "../b/1.cls"))
        archive.addfile(link("a/4.png", "../a/0.png"))
        archive.addfile(link("a/5.png", "/etc/5.png"))
    found, parts = opened(tmp_path / "a.tar")
    taken = {picture.id: (picture.data, picture.label) for part in parts for picture in part}
    assert taken == {
        "a.tar#b/1": (images[0], 7), "a.tar#b/2": (images[1], None), "a.tar#a/0": (images[0], 7),
        "a.tar#a/3": (images[1], None), "a.tar#a/4": (images[0], None),
    }  # fmt: skip
    assert found.left_out == [
        ("a.tar#c/6.png", "link to '6.png', which is no file of the archive"),
        ("a.tar#a/5.png", "link to '/etc/5.png', which is no file of the archive"),
    ]


def test_a_member_that_was_written_again_counts_once(tmp_path: Path, picture_bytes: Bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": picture_bytes(0), "0.cls": b"1", "1.png": picture_bytes(1)})
    with tarfile.open(path, "a") as archive:  # as `tar --update` does
        for name, content in (("0.png", picture_bytes(2)), ("0.cls", b"3")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found, parts = opened(path)
    assert [(picture.id, picture.data, picture.label) for part in parts for picture in part] == [
        ("a.tar#0", picture_bytes(2), 3), ("a.tar#1", picture_bytes(1), None)
    ]  # fmt: skip
    assert found.left_out == [("a.tar#0.png", "a later member of the archive has the same name")]


def test_a_json_member_that_is_none_is_told(tmp_path: Path, picture_bytes: Bytes) -> None:
    found, _ = opened(write_tar(tmp_path / "a.tar", {"0.png": picture_bytes(0), "0.json": b"{broken"}))
    assert found.warnings == ["'a.tar#0.json' is no JSON; its picture has no label from it"]


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


def test_the_kind_that_holds_the_most_pictures_is_used_and_the_others_are_named(
    class_folders: Path, picture_bytes: Bytes
) -> None:
    write_tar(class_folders / "a.tar", {"0.png": picture_bytes(0)})
    write_parquet(class_folders / "metadata.parquet", file_name=["cat/0.png"] * 50)
    (class_folders / "b.tar").write_bytes(b"no tar, but some bytes")
    found, parts = opened(class_folders)
    assert sum(found.rows) == 6
    named = dict(found.left_out)
    assert set(named) == {"a.tar", "b.tar", "metadata.parquet"}
    assert named["a.tar"].startswith("the 6 pictures in picture files are used; expected one kind")
    assert named["metadata.parquet"] == "a table without a column of pictures"
    assert "cannot be read as tar" in named["b.tar"]
    write_parquet(class_folders / "data/train.parquet", image=[picture_bytes(n) for n in range(20)])
    found, parts = opened(class_folders)
    assert [part[0].id for part in parts] == ["data/train.parquet#0"]
    assert sum(name.endswith(".png") for name, _ in found.left_out) == 6
    write_tar(class_folders / "a.tar", {f"{n}.png": picture_bytes(n) for n in range(21)})
    assert sum(opened(class_folders)[0].rows) == 21
    for wrong in ({"image_column": "img"}, {"label_column": "fine"}):  # no reason to take the others instead
        with pytest.raises(BadInput, match=f"has no column '{next(iter(wrong.values()))}'"):
            opened(class_folders, replace(DATA, **wrong))


def test_what_an_ending_does_not_say_the_first_bytes_say(tmp_path: Path, picture_bytes: Bytes) -> None:
    heic, archive = b"\0\0\0\x18ftypheic" + bytes(20), b"PK\3\4\0\0"
    files = {
        "a/0.png": picture_bytes(0), "a/1.jpg_large": picture_bytes(1, encoding="JPEG"), "a/img": picture_bytes(2),
        "a/2.heic": heic, "a/3.zip": archive, "a/4.svg": b"<svg/>", "a/5.txt": b"BM is no bitmap", "a/6.empty": b"",
        "a/.7.dat": heic,
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for place in (str(tmp_path), f"file://{tmp_path}"):
        found, parts = opened(place)
        assert [picture.id for part in parts for picture in part] == ["a/0.png", "a/1.jpg_large", "a/img"]
        assert [name for name, _ in found.left_out] == ["a/2.heic", "a/3.zip", "a/4.svg"]
        assert {reason for _, reason in found.left_out} == {
            "neither picture nor text; expected one of .png, .jpg, .webp, .parquet, .tar"
        }
    (tmp_path / "a/0.png").unlink()
    assert len(pictures_of(tmp_path)) == 2, "also where no ending says anything"
    with pytest.raises(BadInput, match="holds no picture; of 3 left out, 'a/2.heic': neither picture nor text"):
        (tmp_path / "a/img").unlink()
        (tmp_path / "a/1.jpg_large").unlink()
        opened(tmp_path)


def test_links_that_lead_round_or_nowhere_are_named_once(class_folders: Path, picture_bytes: Bytes) -> None:
    (class_folders / "cat/again").symlink_to(class_folders)
    (class_folders / "dog/me").symlink_to("me")
    (class_folders / "dog/9.png").symlink_to("gone.png")
    (class_folders / "puma").symlink_to("cat")  # a folder twice is no loop
    (class_folders / "dog/8.png").symlink_to("0.png")
    os.mkfifo(class_folders / "dog/7.png")
    found, parts = opened(class_folders)
    assert [picture.id for part in parts for picture in part] == [
        "cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png", "dog/8.png",
        "puma/0.png", "puma/1.png", "puma/2.png",
    ]  # fmt: skip
    assert found.left_out == [
        ("cat/again", "link to a folder that it lies in"),
        ("dog/7.png", "neither file nor folder"),
        ("dog/9.png", "link that leads nowhere (No such file or directory)"),
        ("dog/me", "link that leads nowhere (Too many levels of symbolic links)"),
        ("puma/again", "link to a folder that it lies in"),
    ]


def test_folders_that_link_to_one_another_are_listed_once_more_each(tmp_path: Path, picture_bytes: Bytes) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture_bytes(ord(name)))
        (tmp_path / name / other).symlink_to(tmp_path / other)
    assert [picture.id for picture in pictures_of(tmp_path)] == ["a/0.png", "a/b/0.png", "b/0.png", "b/a/0.png"]


def test_folders_in_a_tar_are_no_classes_which_is_told(tmp_path: Path, picture_bytes: Bytes) -> None:
    members = {f"{name}/0.png": picture_bytes(len(name)) for name in ("cat", "horse")}
    found, parts = opened(write_tar(tmp_path / "a.tar", members))
    assert [picture.label for part in parts for picture in part] == [None, None]
    (told,) = found.warnings
    assert "no .cls or .json; expected the tar files unpacked, if cat, horse, ... are the classes" in told


def test_two_names_of_one_index_are_refused(tmp_path: Path, picture_bytes: Bytes) -> None:
    images = [picture_bytes(0), picture_bytes(1)]
    path = write_parquet(tmp_path / "a.parquet", image=images, label=[0, 0], class_name=["cat", "dog"])
    with pytest.raises(BadInput, match="class 0 is '(cat|dog)' and '(cat|dog)'; expected one name, or data.class"):
        opened(path)
    assert [picture.label for picture in pictures_of(path, replace(DATA, class_name_column=""))] == [0, 0]


def test_what_jobs_wrote_is_no_picture_of_a_source(class_folders: Path, picture_bytes: Bytes) -> None:
    before = sources.open_source("data.source", str(class_folders), DATA).fingerprint()
    ours = ("config.yaml", "summary.json", "pictures/0.png")
    for name in (*(f"runs/a/{name}" for name in ours), "mlartifacts/1/artifacts/0.png", "mlflow.db"):
        (class_folders / name).parent.mkdir(parents=True, exist_ok=True)
        (class_folders / name).write_bytes(picture_bytes(0))
    write_parquet(class_folders / "runs/a/shards/train-00000.parquet", image=[picture_bytes(0)] * 50)
    source = sources.open_source("data.source", str(class_folders), DATA)
    assert source.fingerprint() == before
    assert source.left_out == tuple((name, "written by jobs") for name in ("mlartifacts", "mlflow.db", "runs/a"))
    assert len(pictures_of(class_folders / "runs/a")) == 50, "unless it is the source itself"


def test_names_that_are_not_utf8_are_read_and_written_out(tmp_path: Path, picture_bytes: Bytes) -> None:
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / "folder" / odd).mkdir(parents=True)
    (tmp_path / "folder" / odd / f"{odd}.png").write_bytes(picture_bytes(0))
    (picture,) = pictures_of(tmp_path / "folder")
    assert picture == Picture("caf\\udce9/caf\\udce9.png", picture_bytes(0), "caf\\udce9")
    (tmp_path / "tables").mkdir()
    write_parquet(tmp_path / "a.parquet", image=[picture_bytes(1)]).rename(tmp_path / "tables" / f"{odd}.parquet")
    assert [(p.id, p.data) for p in pictures_of(tmp_path / "tables")] == [("caf\\udce9.parquet#0", picture_bytes(1))]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / f"{odd}.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("th\xe9.png")
        member.size = len(picture_bytes(2))
        archive.addfile(member, io.BytesIO(picture_bytes(2)))
    found = [(picture.id, picture.data) for picture in pictures_of(tmp_path / "tars")]
    assert found == [("caf\\udce9.tar#th\\udce9", picture_bytes(2))]


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (("train/cat", "val/cat"), "holds train and val, .* data.source=ROOT/train data.heldout_source=ROOT/val"),
        (("Train", "TEST"), "holds Train and TEST, .* data.source=ROOT/Train data.heldout_source=ROOT/TEST"),
        (("train/cat", "test/cat", "valid/cat"), "data.source=ROOT/train data.heldout_source=ROOT/valid"),
        (("training/cat", "validation/cat", "cat"), "data.source=ROOT/training data.heldout_source=ROOT/validation"),
        (("train/cat", "train/dog"), "holds train, which is a split and no class; expected data.source=ROOT/train$"),
        (("train", "bus"), ""),  # a train is also a train
        (("test", "."), ""),
    ],
)  # fmt: skip
def test_folders_of_splits_are_no_classes(
    tmp_path: Path, picture_bytes: Bytes, folders: tuple[str, ...], advice: str
) -> None:
    for number, name in enumerate(folders):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / f"{number}.png").write_bytes(picture_bytes(number))
    if not advice:
        assert len(pictures_of(tmp_path)) == len(folders)
        return
    with pytest.raises(BadInput, match=advice.replace("ROOT", str(tmp_path))):
        sources.check_source("data.source", str(tmp_path), DATA)
    listed = sources.open_source("data.source", f"file://{tmp_path}", DATA)
    with pytest.raises(BadInput, match=advice.replace("ROOT", f"file://{tmp_path}")):
        sources.scan(listed, DATA)


def test_parquet_files_of_several_splits_are_told(tmp_path: Path, picture_bytes: Bytes) -> None:
    for name in ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"):
        write_parquet(tmp_path / name, image=[picture_bytes(len(name))])
    (told,) = opened(tmp_path)[0].warnings
    assert told.startswith("data.source: files of train and test are one source; expected a file or folder of each")


def test_a_folder_around_the_classes_is_told(class_folders: Path, tmp_path: Path) -> None:
    around = tmp_path / "data"
    around.mkdir()
    class_folders.rename(around / "images")
    (told,) = opened(around)[0].warnings
    assert told.startswith(
        "all pictures are of one class, 'images', the only folder; expected that folder as data.source"
    )
    assert opened(around / "images")[0].warnings == []


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


def test_a_folder_that_holds_only_what_jobs_left_holds_no_picture(tmp_path: Path, picture_bytes: Bytes) -> None:
    for name, data in {"summary.json": b"{}", "config.yaml": b"", "x.png": picture_bytes(1)}.items():
        (tmp_path / "runs" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "a" / name).write_bytes(data)
    with pytest.raises(BadInput, match="holds no picture"):
        sources.check_source("data.source", str(tmp_path), DATA)
