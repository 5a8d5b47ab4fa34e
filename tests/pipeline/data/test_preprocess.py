"""The stage as a whole: every good row, every bad row, the same bytes however it is run, resumed or killed."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.config import Config
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import resolve_paths
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.data import preprocess
from pipeline.data.preprocess import PicturePlan, PreprocessWork, make_or_load_plan, split_of
from pipeline.data.shards import Manifest, ShardDataset, read_manifest
from pipeline.tracking import Tracker

Bytes = Callable[..., bytes]


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    """`configured(source, "data.x=1")`: 16-pixel shards of four pictures, made in this process."""

    def configure(source: Path | str, *overrides: str) -> Config:
        common = ["data.image_size=16", "data.rows_per_shard=4", "data.num_workers=1", "data.heldout_fraction=0.3"]
        places = [f"run.output={tmp_path}/runs", f"data.source={source}", "tracking.uri="]
        return load_config("smoke", [*common, *places, *overrides])

    return configure


def made(config: Config, name: str, resume: bool = False, stop: bool = False) -> Run:
    """The finished run of the stage."""
    preprocess.check(config)
    with closing(Run.open("preprocess", config, name, resume)) as run:
        if stop:
            run.request_stop()
        preprocess.run(run)
    return run


def checksums(run: Run) -> tuple[bytes, bytes, list[bytes]]:
    """Manifest, rejected rows and every shard that the manifest lists."""
    manifest = read_manifest(run.folder)
    shards = [run.folder / shard.file for split in manifest.splits.values() for shard in split.shards]
    assert sorted((run.folder / "shards").iterdir()) == sorted(shards)
    results = (run.folder / name for name in ("manifest.json", "rejected.parquet"))
    return *(path.read_bytes() for path in results), [path.read_bytes() for path in shards]  # type: ignore[return-value]


def rows(run: Run) -> dict[str, tuple[str, bytes, int]]:
    """id -> (split, stored bytes, label)."""
    found = {}
    for split in ("train", "heldout"):
        dataset = ShardDataset(run.folder, split)
        every = range(len(dataset))
        for name, data, label in zip(dataset.ids(every), dataset.encoded(every), dataset.labels(every), strict=True):
            found[name] = (split, data, int(label))
    return found


def rejected(run: Run) -> dict[str, str]:
    table = pq.read_table(run.folder / "rejected.parquet").to_pylist()
    assert len(table) == read_manifest(run.folder).rejected
    return {row["path"]: row["reason"] for row in table}


@pytest.fixture
def broken_folder(tmp_path: Path, picture_bytes: Bytes) -> tuple[Path, set[str], set[str]]:
    """76 good pictures of two classes and 4 broken ones in between (5%): (folder, good ids, bad ids)."""
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    broken = {
        "cat/007.png": picture_bytes(7)[:-100],
        "cat/008.png": b"",
        "dog/011.jpg": b"this is a text",
        "dog/012.png": bomb.getvalue(),
    }
    good = {}
    for number in range(38):
        good |= {f"cat/{number:03d}-good.png": picture_bytes(number)}
        good |= {f"dog/{number:03d}-good.jpg": picture_bytes(100 + number, 20, "JPEG")}
    for name, data in (good | broken).items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "pictures", set(good), set(broken)


def test_every_good_picture_is_kept_and_every_bad_one_named(
    configured: Callable[..., Config], broken_folder: tuple[Path, set[str], set[str]]
) -> None:
    folder, good, bad = broken_folder
    run = made(configured(folder, "data.max_pixels=1000000"), "a")
    assert set(rows(run)) == good
    assert rejected(run) == {
        "cat/007.png": "image file is truncated",
        "cat/008.png": "empty file",
        "dog/011.jpg": "not a picture in a known format",
        "dog/012.png": "10000x10000 pixels, more than data.max_pixels 1000000",
    }
    assert set(rejected(run)) == bad
    for name, (_, data, label) in rows(run).items():
        assert label == ("cat", "dog").index(name.split("/")[0])
        assert (data == (folder / name).read_bytes()) == name.startswith("cat"), "dogs were resized"
    assert run.results["rows_train"] + run.results["rows_heldout"] == len(good)
    assert run.results["rejected"] == len(bad)
    assert json.loads((run.folder / "metrics.jsonl").read_text())["metrics"] == run.results
    assert run.outputs["shards"] == str(run.folder)
    assert set(run.inputs) == {"source"}


def test_a_run_is_tracked_with_its_source_and_its_manifest(
    configured: Callable[..., Config], class_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked: list[Any] = []
    monkeypatch.setattr(Tracker, "start", lambda run, tags: tracked.append(tags) or Tracker(run, None))
    monkeypatch.setattr(Tracker, "artifact", lambda tracker, path: tracked.append(path.name))
    run = made(configured(class_folders), "a")
    assert tracked == [{"source_fingerprint": read_manifest(run.folder).source_fingerprint}, "manifest.json"]


def test_a_file_that_vanishes_after_the_plan_is_rejected(
    configured: Callable[..., Config], class_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_and_lose(*arguments: Any, plan: Callable[..., PicturePlan] = make_or_load_plan) -> PicturePlan:
        made_plan = plan(*arguments)
        (class_folders / "cat/1.png").unlink()
        return made_plan

    monkeypatch.setattr(preprocess, "make_or_load_plan", plan_and_lose)
    run = made(configured(class_folders), "a")
    assert rejected(run) == {"cat/1.png": "file cannot be read (FileNotFoundError)"}
    assert len(rows(run)) == 5


def test_other_settings_give_other_bytes(configured: Callable[..., Config], class_folders: Path) -> None:
    fingerprints = set()
    for number, change in enumerate(("data.encoding=png", "data.encoding=jpeg", "data.heldout_fraction=0.9")):
        run = made(configured(class_folders, "data.image_size=8", change), str(number))
        fingerprints.add(read_manifest(run.folder).fingerprint)
    assert len(fingerprints) == 3


def test_equal_pictures_land_in_the_same_split(configured: Callable[..., Config], class_folders: Path) -> None:
    for path in list(class_folders.rglob("?.png")):
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    found = rows(made(configured(class_folders), "a"))
    assert len(found) == 12
    assert {split for split, _, _ in found.values()} == {"train", "heldout"}
    for name, (split, _, _) in found.items():
        assert split == found[name.replace("copy-", "")][0]


def test_the_split_has_the_configured_share_and_grows_with_it() -> None:
    draws = [number.to_bytes(4, "big") for number in range(4000)]
    held = [{data for data in draws if split_of(data, share) == "heldout"} for share in (0.1, 0.3)]
    assert abs(len(held[0]) / 4000 - 0.1) < 0.02
    assert held[0] < held[1]


def test_with_a_heldout_source_each_source_is_one_split(
    configured: Callable[..., Config], class_folders: Path, tmp_path: Path, picture_bytes: Bytes
) -> None:
    (tmp_path / "test/dog").mkdir(parents=True)
    (tmp_path / "test/dog/new.png").write_bytes(picture_bytes(99))
    run = made(configured(class_folders, f"data.heldout_source={tmp_path}/test"), "a")
    manifest = read_manifest(run.folder)
    assert (manifest.splits["train"].rows, manifest.splits["heldout"].rows) == (6, 1)
    assert rows(run)["dog/new.png"] == ("heldout", picture_bytes(99), 1)
    assert set(run.inputs) == {"source", "heldout_source"}


def test_the_same_pictures_from_a_folder_from_parquet_and_from_tar(
    configured: Callable[..., Config], class_folders: Path, tmp_path: Path
) -> None:
    files = sorted(class_folders.rglob("?.png"))
    images, names = [path.read_bytes() for path in files], [path.parent.name for path in files]
    pq.write_table(pa.table({"image": images, "class_name": names}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, (path, name) in enumerate(zip(files, names, strict=True)):
            archive.add(path, f"{number}.png")
            (tmp_path / "label").write_text(name)
            archive.add(tmp_path / "label", f"{number}.cls")
    stored = []
    for number, source in enumerate((class_folders, tmp_path / "a.parquet", tmp_path / "a.tar")):
        run = made(configured(source), str(number))
        assert read_manifest(run.folder).classes == ("cat", "dog")
        stored.append(sorted(rows(run).values()))
    assert stored[0] == stored[1] == stored[2]


def _lose_a_shard(folder: Path) -> None:
    next((folder / "shards").glob("train-*")).unlink()


def _damage_a_shard(folder: Path) -> None:
    path = next((folder / "shards").glob("train-*"))
    path.write_bytes(path.read_bytes()[:-1])


def _lose_half_of_the_parts(folder: Path) -> None:
    for path in sorted((folder / "parts").iterdir())[::2]:
        path.unlink()
    (folder / "manifest.json").unlink()
    (folder / "shards/.train-00000.parquet.1.tmp").write_bytes(b"half a shard")


@pytest.mark.parametrize("harm", [_lose_a_shard, _damage_a_shard, _lose_half_of_the_parts])
def test_resuming_makes_what_is_missing_or_damaged(
    configured: Callable[..., Config],
    broken_folder: tuple[Path, set[str], set[str]],
    harm: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured(broken_folder[0])
    run = made(config, "a")
    before = checksums(run)
    harm(run.folder)
    remade = []
    make = PreprocessWork.make
    monkeypatch.setattr(PreprocessWork, "make", lambda work, task: remade.append(task.number) or make(work, task))
    assert checksums(made(config, "a", resume=True)) == before
    assert 0 < len(remade) < 20  # of 20 ranges


def test_a_stop_keeps_what_is_done_and_resuming_ends_the_same(
    configured: Callable[..., Config], broken_folder: tuple[Path, set[str], set[str]]
) -> None:
    config = configured(broken_folder[0])
    with pytest.raises(Stopped, match="1 of 20 shards are made; --resume makes the others"):
        made(config, "a", stop=True)
    assert not (Path(config.run.output) / "a/manifest.json").exists()
    assert checksums(made(config, "a", resume=True)) == checksums(made(config, "b"))


def test_resuming_with_another_configuration_is_refused(configured: Callable[..., Config], class_folders: Path) -> None:
    made(configured(class_folders), "a")
    with pytest.raises(BadInput, match=r"data.quality is 50, but the run in .* was begun with 95; expected the same"):
        made(configured(class_folders, "data.quality=50"), "a", resume=True)


def test_resuming_with_another_source_is_refused(
    configured: Callable[..., Config], class_folders: Path, picture_bytes: Bytes
) -> None:
    made(configured(class_folders), "a")
    (class_folders / "cat/new.png").write_bytes(picture_bytes(99))
    with pytest.raises(BadInput, match=r"data.source .* has changed since the run in .* was begun; expected the same"):
        made(configured(class_folders), "a", resume=True)


def test_a_source_of_bad_pictures_only_is_refused(configured: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/0.jpg").write_bytes(b"text")
    with pytest.raises(BadInput, match=r"no picture .* 1 rejected \(0.jpg: not a picture .*\); expected some, see "):
        made(configured(tmp_path / "bad"), "a")


def test_an_empty_heldout_split_is_told(
    configured: Callable[..., Config], class_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(configured(class_folders, "data.heldout_fraction=0.0001"), "a")
    assert "warning: nothing is held out; expected a larger data.heldout_fraction" in capsys.readouterr().err


def test_checking_names_the_key_that_cannot_work(
    configured: Callable[..., Config], class_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess.check(configured(class_folders))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    cases = {
        "data.heldout_source=/nowhere": "data.heldout_source '/nowhere' does not exist",
        f"data.heldout_source={class_folders}": "data.heldout_source is data.source, .*; expected other pictures",
        "data.num_workers=3": "data.num_workers is 3, which needs 3 CPUs; expected at most 2",
    }
    for override, message in cases.items():
        with pytest.raises(BadInput, match=message):
            preprocess.check(configured(class_folders, override))


def test_checking_loads_neither_torch_nor_ray(repository: Path) -> None:
    code = (
        "import sys; from pipeline.core.presets import load_config; from pipeline.data import preprocess;"
        "preprocess.check(load_config('smoke')); print(sorted({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_default_name_tells_different_shards_apart(
    configured: Callable[..., Config], class_folders: Path, tmp_path: Path, picture_bytes: Callable[..., bytes]
) -> None:
    """Also of equal files elsewhere, and of the same folder once a file was added."""
    elsewhere = shutil.copytree(class_folders, tmp_path / "elsewhere")
    differing = [f"data.source={elsewhere}", f"data.heldout_source={elsewhere}", "data.image_size=8"]
    differing += ["data.num_workers=1"]
    names = [preprocess.default_name(configured(class_folders, change)) for change in differing]
    assert preprocess.default_name(configured(class_folders, "data.num_workers=2")) == names[-1]
    (class_folders / "cat" / "new.png").write_bytes(picture_bytes(99))
    names.append(preprocess.default_name(configured(class_folders)))
    assert len(set(names)) == 5
    assert all(re.fullmatch("smoke-shards-[0-9a-f]{8}", name) for name in names)


def test_folders_of_numbers_are_those_numbers_alone_and_beside_indices(
    configured: Callable[..., Config], tmp_path: Path, picture_bytes: Bytes
) -> None:
    for number in range(12):
        (tmp_path / f"in/{number}").mkdir(parents=True)
        (tmp_path / f"in/{number}/0.png").write_bytes(picture_bytes(number))
    pq.write_table(pa.table({"image": [picture_bytes(99)], "label": [11]}), tmp_path / "test.parquet")
    for name, more in (("alone", []), ("beside", [f"data.heldout_source={tmp_path}/test.parquet"])):
        run = made(configured(tmp_path / "in", *more), name)
        labels = {found: label for found, (_, _, label) in rows(run).items()}
        assert {found: label for found, label in labels.items() if "#" not in found} == {
            f"{number}/0.png": number for number in range(12)
        }
        assert read_manifest(run.folder).classes == tuple(map(str, range(12)))


def test_it_tells_how_many_pictures_have_labels_and_what_was_left_out(
    configured: Callable[..., Config], class_folders: Path, picture_bytes: Bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (class_folders / "loose.png").write_bytes(picture_bytes(50))
    (class_folders / "cat/3.png").write_bytes(b"no picture")
    for number in (4, 5):
        (class_folders / f"cat/{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    run = made(configured(class_folders), "a")
    told = capsys.readouterr().err
    assert "\nlabels: 6 of 7 images have one, in 2 classes: 0=cat, 1=dog\n" in told
    assert "\nwarning: no label for 1 of 7 images; expected one for all or for none\n" in told
    assert "\nrejected: 2, as cat/4.heic: neither picture nor text; expected" in told
    assert "\nrejected: 1, as cat/3.png: not a picture in a known format\n" in told
    assert {key: run.results[key] for key in ("rows_labelled", "classes", "rejected")} == {
        "rows_labelled": 6, "classes": 2, "rejected": 3
    }  # fmt: skip
    assert set(rejected(run)) == {"cat/3.png", "cat/4.heic", "cat/5.heic"}
    assert read_manifest(run.folder).rejected == 3
    made(configured(class_folders / "dog"), "b")
    assert "\nlabels: no image has one\n" in capsys.readouterr().err


def test_a_second_run_below_its_source_makes_the_same_shards(
    configured: Callable[..., Config], class_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(class_folders, f"run.output={class_folders}/runs")
    assert checksums(made(config, "first")) == checksums(made(config, "second"))
    assert "left out, as jobs wrote it: runs/first, runs/second\n" in capsys.readouterr().err


def test_names_that_are_not_utf8_become_ids_and_classes(
    configured: Callable[..., Config], class_folders: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    (class_folders / "cat").rename(class_folders / odd)
    run = made(configured(class_folders), "a")
    assert read_manifest(run.folder).classes == ("caf\\udce9", "dog")
    assert {name for name in rows(run) if "dog" not in name} == {f"caf\\udce9/{number}.png" for number in range(3)}
    class_folders.rename(tmp_path / odd)
    with pytest.raises(BadInput, match=r"data.source is '.*caf\\udce9', a path that is not UTF-8; expected"):
        resolve_paths(configured(tmp_path / odd))


def test_threads_that_share_the_only_range_give_the_same_bytes_as_one(
    configured: Callable[..., Config], broken_folder: tuple[Path, set[str], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    alone = made(configured(broken_folder[0], "data.rows_per_shard=100"), "alone")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(preprocess, "READ_AHEAD", 7)
    for number in ("0", "2"):
        options = ("data.rows_per_shard=100", f"data.num_workers={number}")
        assert checksums(made(configured(broken_folder[0], *options), f"threads-{number}")) == checksums(alone)
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == (limit, filters)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data reads its own old settings
def test_two_ray_workers_give_the_same_bytes_as_one(
    configured: Callable[..., Config], broken_folder: tuple[Path, set[str], set[str]], ray_session: ModuleType
) -> None:
    alone = made(configured(broken_folder[0]), "alone")
    together = made(configured(broken_folder[0], "data.num_workers=2"), "together")
    assert checksums(together) == checksums(alone)
    with pytest.raises(Stopped, match=r"\d+ of 20 shards are made"):
        made(configured(broken_folder[0], "data.num_workers=2"), "stopped", stop=True)


@pytest.mark.ray
def test_a_killed_run_resumes_to_the_same_bytes(
    configured: Callable[..., Config], repository: Path, tmp_path: Path
) -> None:
    """SIGKILL half way through two Ray workers; the rest is made by one."""
    arguments = ["smoke", "data.rows_per_shard=32", f"run.output={tmp_path}/runs", "run.name=killed", "tracking.uri="]
    command = [sys.executable, str(repository / "jobs/preprocess.py"), *arguments, "data.num_workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    parts = tmp_path / "runs/killed/parts"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None and len(list(parts.glob("*.json"))) < 5:
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "runs/killed/manifest.json").exists()
    done = len(list(parts.glob("*.json")))
    config = load_config("smoke", [*arguments[1:], "data.num_workers=1"])
    expected = made(config, "whole")
    assert 5 <= done < len(list((expected.folder / "parts").iterdir()))
    assert checksums(made(config, "killed", resume=True)) == checksums(expected)


def test_the_job_tells_where_the_shards_are(
    class_folders: Path, tmp_path: Path, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    options = ["smoke", f"data.source={class_folders}", "data.image_size=16", "data.heldout_fraction=0.3"]
    done = run_job("preprocess", *options, "run.name=a", "tracking.uri=")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1].removeprefix("RUN_FOLDER="))
    manifest: Manifest = read_manifest(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["results"]["rows_train"] == manifest.splits["train"].rows > 0
    assert summary["outputs"]["manifest"] == str(folder / "manifest.json")
    assert "training and" in done.stderr


@pytest.mark.parametrize("source", ["/nowhere", "."])
def test_the_job_refuses_a_source_without_pictures_at_once(
    source: str, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_job("preprocess", "smoke", f"data.source={source}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.source ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
