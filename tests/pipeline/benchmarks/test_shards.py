from pathlib import Path

import pytest

from pipeline.benchmarks.benchmark_inputs import check_named, take_pictures
from pipeline.benchmarks.harness import emptied, scratch
from pipeline.core.errors import BadInput
from pipeline.core.run import Run
from pipeline.data.shards import read_manifest


@pytest.fixture
def begun(small, tmp_path):
    """`begun("benchmark.x=1")`: a run of the kind ingest."""

    def make(*more):
        folder = tmp_path / "run"
        folder.mkdir()
        return Run("benchmark", small("ingest", "data.num_workers=1", *more), folder)

    return make


def test_shards_are_made_of_photographs_without_a_word(begun, capsys):
    run = begun("data.source=", "benchmark.pictures=12")
    with scratch(run) as folder:
        take_pictures(run, folder, heldout_fraction=0.5)
        manifest = read_manifest(run.config.data.shards)
        assert sum(split.rows for split in manifest.splits.values()) == 12
        assert 0 < manifest.splits["heldout"].rows < 12
        assert manifest.image_size == 16
        assert Path(run.config.data.shards).parent == folder
        assert run.inputs["shards"] == {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    assert capsys.readouterr().err == ""
    assert list(run.folder.iterdir()) == []


def test_pictures_that_are_named_are_taken(begun, noise_shards):
    run = begun(f"data.shards={noise_shards}")
    with scratch(run) as folder:
        take_pictures(run, folder, heldout_fraction=0.5)
        assert not folder.exists()
    assert run.config.data.shards == str(noise_shards)
    assert run.inputs["shards"]["path"] == str(noise_shards)


def test_a_source_that_is_named_is_preprocessed(begun, tmp_path):
    run = begun("data.source=samples", "benchmark.pictures=12", f"run.output={tmp_path}")
    with scratch(run) as folder:
        take_pictures(run, folder, heldout_fraction=0.5)
        assert not folder.exists()
    assert read_manifest(run.config.data.shards).splits["train"].rows > 12


def test_what_a_killed_run_left_and_what_an_error_leaves_goes_away(begun):
    run = begun()
    (run.folder / "work" / "photographs").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), scratch(run) as folder:
        assert not folder.exists()
        emptied(folder, "shards", "parts")
        (folder / "old").touch()
        emptied(folder, "parts")
        assert [path.name for path in folder.iterdir()] == ["parts"]
        raise ZeroDivisionError
    assert not folder.exists()


def test_named_pictures_that_cannot_be_used_are_refused(small, tmp_path):
    with pytest.raises(BadInput, match="holds no manifest.json"):
        check_named(small("ingest", f"data.shards={tmp_path}"))
    with pytest.raises(BadInput, match=r"data\.source"):
        check_named(small("ingest", "data.source=nowhere"))
    check_named(small("ingest", "data.source="))
