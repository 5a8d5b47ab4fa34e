from pathlib import Path

from pipeline.benchmarking.shards import with_shards
from pipeline.data.manifest import read_manifest


def test_shards_are_made_of_photographs_without_a_word(small, tmp_path, capsys):
    config = with_shards(small("ingest", "benchmark.pictures=12", "data.num_workers=1"), tmp_path / "work")
    manifest = read_manifest(config.data.shards)
    assert sum(split.rows for split in manifest.splits.values()) == 12
    assert manifest.image_size == 16
    assert Path(config.data.shards).parent == tmp_path / "work"
    assert capsys.readouterr().err == ""


def test_shards_that_are_named_are_taken(small, tmp_path):
    config = small("ingest", "data.shards=somewhere")
    assert with_shards(config, tmp_path / "work") is config
    assert not (tmp_path / "work").exists()
