"""From a generator to pictures: what is asked for, the same bytes whoever does the work, whole after a stop."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.core.config import Config, GenerateConfig
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import sha256_file
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset, read_manifest
from pipeline.generator import generate
from pipeline.generator.generated_files import read_generated
from tatok_model.config import GeneratorConfig, SamplingConfig
from tatok_model.generation.generator import Generator
from tatok_model.generation.sampling import sample
from tatok_model.metrics.images import to_uint8
from tatok_model.tokenizer import TaTok

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data's own old settings

Started = Callable[..., Run]
SIZES = ("generate.images=10", "generate.batch_size=2", "generate.images_per_shard=4")  # three shards


@pytest.fixture(scope="session")
def new_generator(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`new_generator(key=value)`: the folder of an untrained one for the tiny tokenizer."""

    def make(**changes: object) -> Path:
        folder = tmp_path_factory.mktemp("generating") / "generator"
        sizes = {"size": "nano", "classes": 3, "global_tokens": 2, "grid_size": 4, "codebook_size": 16}
        sha256 = sha256_file(tokenizer_folder / "model.safetensors")
        facts = {**sizes, "max_patch_tokens": 12, "tokenizer_sha256": sha256, **changes}
        torch.manual_seed(0)
        Generator(GeneratorConfig(**facts)).save_pretrained(folder)  # type: ignore[arg-type]
        return folder

    return make


@pytest.fixture(scope="session")
def generator_folder(new_generator: Callable[..., Path]) -> Path:
    return new_generator()


@pytest.fixture
def finished(carry_out: Any, configure: Callable[..., Config], generator_folder: Path) -> Started:
    """`finished("name", "section.key=value")` checks and runs the stage; returns the closed run."""

    def finish(name: str, *more: str, **options: bool) -> Run:
        config = configure(f"generator.checkpoint={generator_folder}", *SIZES, *more)
        return carry_out("generate", generate, config, name, **options)

    return finish


def test_every_class_comes_in_turn_as_shards_of_pictures(finished: Started) -> None:
    run = finished("all")
    manifest = read_manifest(run.folder)
    assert manifest.classes == ("ant", "bee", "cow")
    assert [shard.rows for shard in manifest.splits["heldout"].shards] == [4, 4, 2]
    assert manifest.splits["train"].rows == manifest.rejected == 0
    made = ShardDataset(run.folder, "heldout")
    assert made.labels(range(10)).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert made.ids([0, 9]) == ["sample-00000000", "sample-00000009"]
    assert made.images(range(10)).shape == (10, 16, 16, 3)
    rows = pq.read_table(run.folder / "shards/heldout-00001.parquet").to_pylist()
    assert [row["label_name"] for row in rows] == ["bee", "cow", "ant", "bee"]
    assert run.results["images"] == 10
    for name in ("images_per_second", "sample_images_per_second", "decode_share", "batch_seconds_p99"):
        assert run.results[name] > 0
    assert 2 <= run.results["tokens_p05"] <= run.results["tokens_per_image"] <= 14
    assert 0 < run.results["row_occupancy"] <= 1
    assert Path(run.outputs["token_histogram"]).stat().st_size
    with Image.open(run.outputs["samples"]) as grid:
        assert grid.width == grid.height, "three of each class in three rows"


def test_a_picture_is_what_its_own_tokens_decode_to(
    finished: Started, generator_folder: Path, tokenizer_folder: Path
) -> None:
    """Sampled on their own, the tokens are the same; so a picture does not depend on what is sampled beside it."""
    run = finished("all", "generate.seed=5")
    generator = Generator.from_pretrained(generator_folder).eval()
    tokenizer = TaTok.from_pretrained(tokenizer_folder).eval()
    rows = [row for i in range(3) for row in pq.read_table(run.folder / f"tokens/part-{i:05d}.parquet").to_pylist()]
    assert [row["number"] for row in rows] == list(range(10))
    made = ShardDataset(run.folder, "heldout")
    for number in (0, 3, 7, 9):
        label, key = torch.tensor([number % 3]), torch.tensor([number])
        one = sample(generator, label, key, 5, SamplingConfig())
        assert rows[number]["label"] == number % 3
        assert rows[number]["global_indices"] == one.global_indices[0].tolist()
        assert rows[number]["codes"] == one.codes[0].tolist()
        assert rows[number]["places"] == one.places[0].tolist()
        picture = to_uint8(tokenizer.decode(one.to_tokens(16, 2)))[0].permute(1, 2, 0).numpy()
        assert np.abs(made.images([number])[0].astype(int) - picture).max() <= 1, "batches round floats differently"


def test_asking_for_classes_for_none_and_for_another_seed(finished: Started) -> None:
    some = finished("some", "generate.labels=[2,0]")
    assert ShardDataset(some.folder, "heldout").labels(range(4)).tolist() == [2, 0, 2, 0]
    free = finished("free", "generate.unconditional=true", "generate.encoding=webp")
    assert ShardDataset(free.folder, "heldout").labels(range(10)).tolist() == [-1] * 10
    assert ShardDataset(free.folder, "heldout").encoded([0])[0][8:12] == b"WEBP"
    other = finished("other", "generate.labels=[2,0]", "generate.seed=1", "generate.grid_images=0")
    assert read_manifest(other.folder).fingerprint != read_manifest(some.folder).fingerprint
    assert "samples" not in other.outputs


def test_pictures_are_files_too_where_that_is_asked_for(finished: Started) -> None:
    run = finished("files", "generate.files=true")
    made = ShardDataset(run.folder, "heldout")
    files = sorted(Path(run.outputs["images"]).iterdir())
    assert [file.name for file in files] == [f"sample-{number:08d}.png" for number in range(10)]
    assert [file.read_bytes() for file in files] == made.encoded(range(10))
    with Image.open(files[7]) as picture:
        assert np.array_equal(np.asarray(picture), made.images([7])[0])


def test_what_made_the_pictures_is_told(finished: Started, generator_folder: Path) -> None:
    run = finished("told", "generate.guidance=1.5", "generate.top_k=8")
    found = read_generated(run.folder)
    assert found.generator_sha256 == sha256_file(generator_folder / "model.safetensors")
    assert (found.sampling["guidance"], found.sampling["top_k"], found.seed, found.images) == (1.5, 8, 0, 10)
    counts, labels = found.lengths()
    assert found.tokens["mean"] == pytest.approx(counts.mean())
    assert labels.tolist() == [i % 3 for i in range(10)]
    assert found.speed["images_per_second"] > 0


def test_a_stopped_run_resumes_to_the_same_bytes(finished: Started, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="1 of 3 files are made"):
        finished("stopped", stop=True)
    folder = tmp_path / "runs/stopped"
    assert not (folder / "generated.json").exists()
    first = (folder / "shards/heldout-00000.parquet").stat().st_mtime_ns
    resumed, whole = finished("stopped", resume=True), finished("whole")
    assert (folder / "shards/heldout-00000.parquet").stat().st_mtime_ns == first, "it is not made again"
    assert_same_bytes(resumed.folder, whole.folder)
    (whole.folder / "tokens/part-00001.parquet").unlink()
    again = finished("whole", resume=True)
    assert_same_bytes(again.folder, resumed.folder)
    with pytest.raises(BadInput, match=r"generate.seed is 1, but the run in .* was begun with 0"):
        finished("whole", "generate.seed=1", resume=True)


@pytest.mark.slow
def test_one_and_two_workers_make_the_same_bytes(ray_session: ModuleType, finished: Started) -> None:
    alone, together = finished("alone"), finished("together", "generate.num_workers=2")
    assert_same_bytes(alone.folder, together.folder)


def assert_same_bytes(one: Path, other: Path) -> None:
    """Of everything but speeds."""
    files = [
        "manifest.json",
        *(f"shards/heldout-{i:05d}.parquet" for i in range(3)),
        *(f"tokens/part-{i:05d}.parquet" for i in range(3)),
    ]
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    told = [{**json.loads((folder / "generated.json").read_text()), "speed": None} for folder in (one, other)]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["generate.labels=[1,12]"], "generate.labels has 12; expected 0 to 2, the generator's classes"),
        (["generate.unconditional=true", "generate.guidance=2"], "generate.guidance is 2 without classes; expected 1"),
        (
            ["tokenizer.codebook_size=32", "tokenizer.fsq_levels=[4,8]"],
            "has codebook_size 16, fsq_levels .4, 4.; expected tokenizer.codebook_size, 32, tokenizer.fsq_levels",
        ),
        (["tokenizer.checkpoint="], "tokenizer.checkpoint is empty; expected the tokenizer whose tokens"),
        (["generator.checkpoint=/nowhere"], "generator.checkpoint: checkpoint '/nowhere' has no config.json"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    finished: Started, overrides: list[str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=sentence):
        finished("refused", *overrides)
    assert not (tmp_path / "runs/refused").exists()


def test_a_generator_of_another_tokenizer_or_other_classes_is_refused(
    finished: Started, new_generator: Callable[..., Path]
) -> None:
    with pytest.raises(BadInput, match="writes tokens of a tokenizer with sha256 0000.*; expected that of tokenizer"):
        finished("refused", f"generator.checkpoint={new_generator(tokenizer_sha256='0' * 64)}")
    with pytest.raises(BadInput, match="tokens.path has 3 classes; expected 4, the generator's"):
        finished("refused", f"generator.checkpoint={new_generator(classes=4)}")


def test_a_class_is_looked_for_in_the_generator_that_training_left_too(
    configure: Callable[..., Config], generator_folder: Path
) -> None:
    config = configure("generate.labels=[12]")
    shutil.copytree(generator_folder, Path(config.run.output) / "smoke-train-generator" / "checkpoint")
    with pytest.raises(BadInput, match="generate.labels has 12; expected 0 to 2, the generator's classes"):
        generate.check(config)


def test_a_generator_without_classes_writes_pictures_without(
    finished: Started, new_generator: Callable[..., Path]
) -> None:
    run = finished("plain", f"generator.checkpoint={new_generator(classes=0)}", "tokens.path=")
    assert read_manifest(run.folder).classes == ()
    assert ShardDataset(run.folder, "heldout").labels(range(10)).tolist() == [-1] * 10


def test_classes_without_names_are_numbered(finished: Started) -> None:
    assert read_manifest(finished("numbers", "tokens.path=").folder).classes == ("0", "1", "2")


def test_without_a_generator_one_is_trained_first(
    carry_out: Any, configure: Callable[..., Config], tmp_path: Path
) -> None:
    steps = "train_generator.max_steps=2", "train_generator.validate_every=0"
    run = carry_out("generate", generate, configure(*SIZES, *steps, "run.make=true"), "made")
    (trained,) = (tmp_path / "runs").glob("smoke-train-generator-????????")
    assert run.inputs["generator"]["path"] == str(trained / "checkpoint")
    assert json.loads((trained / "summary.json").read_text())["status"] == "finished"
    assert len(ShardDataset(run.folder, "heldout")) == 10
    again = carry_out("generate", generate, configure(*SIZES, *steps), "without --make")
    assert again.inputs["generator"] == run.inputs["generator"]
    with pytest.raises(BadInput, match="holds no generator of this configuration .there: smoke-train-generator-"):
        generate.check(configure(*SIZES, "train_generator.max_steps=3"))


def test_occupancy_counts_the_rows_that_wait_for_the_longest() -> None:
    config = GenerateConfig(batch_size=2, images_per_shard=3)
    counts = np.array([4, 2, 3, 5, 1])  # batches (4, 2), (3) of the first shard, (5, 1) of the second
    assert generate.occupancy(counts, config) == pytest.approx(15 / (8 + 3 + 10))


def test_the_job_refuses_bad_input_in_one_sentence(run_job: Callable, generator_folder: Path, tmp_path: Path) -> None:
    done = run_job("generate", "smoke", f"generator.checkpoint={generator_folder}", "tracking.uri=", "tokens.path=")
    assert done.returncode == 2
    assert "tokenizer.checkpoint is empty; expected the tokenizer whose tokens" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
