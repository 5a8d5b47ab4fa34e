"""The feature network: what it is trained on, how, and what is refused."""

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.core.config import Config, DataConfig, EvaluateConfig
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.presets import load_config
from pipeline.core.run import Run, read_metrics, read_summary
from pipeline.data.shards import read_manifest
from pipeline.evaluation.reference import load_extractor, load_more
from pipeline.training import train_extractor
from pipeline.training.extractor_training import Labelled, augment, measure, one_cycle, read_labelled
from tatok_model.metrics.extractors.small_networks import SHIPPED, CompactExtractor, load_trained

TINY = ["extractor.epochs=3", "extractor.batch_size=16", "extractor.learning_rate=0.05",
        "train.precision=float32", "train.device=cpu"]  # fmt: skip
BOTH = ["extractor.train_source=TWO", "extractor.test_source=TWO"]


@pytest.fixture(scope="module")
def two_colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 noisy pictures: reddish ones are class 0, bluish ones class 1."""
    draws = np.random.default_rng(0)
    images, labels = [], np.arange(128) % 2
    for label in labels:
        pixels = draws.integers(0, 100, (32, 32, 3))
        pixels[..., 2 * label] += 100
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    path = tmp_path_factory.mktemp("two_colours") / "pictures.parquet"
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


@pytest.fixture(scope="module")
def shards(two_colours: Path, write_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the two colours, both splits."""
    rows = pq.read_table(two_colours).to_pylist()
    return write_shards(
        tmp_path_factory.mktemp("two") / "data", {"train": rows[:96], "heldout": rows[96:]}, 32, ("red", "blue")
    )


@pytest.fixture
def config(two_colours: Path, tmp_path: Path) -> Callable[..., Config]:
    """`config("train.seed=1")`: the shipped preset, cut to seconds, on the two colours."""
    sources = [f"extractor.train_source={two_colours}", f"extractor.test_source={two_colours}"]
    return lambda *more: load_config("extractor_cifar10", [f"run.output={tmp_path}", *sources, *TINY, *more])


@pytest.fixture
def open_run() -> Iterator[Callable[..., Run]]:
    """`open_run(config, name)` opens a run folder, `open_run(config, name, resume=True)` again after `close`."""
    opened = []

    def open_one(config: Config, name: str, resume: bool = False) -> Run:
        opened.append(Run.open("train_extractor", config, name, resume=resume))
        return opened[-1]

    yield open_one
    for run in opened:
        run.close()


@pytest.fixture
def train(open_run: Callable[..., Run]) -> Callable[[Config, str], Run]:
    """`train(config, name)` runs the stage in a run folder of that name."""

    def train_one(config: Config, name: str) -> Run:
        run = open_run(config, name)
        train_extractor.run(run)
        return run

    return train_one


@pytest.fixture
def stop_after_an_epoch(open_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, str], None]:
    """`stop_after_an_epoch(config, name)` leaves a run folder to go on from."""

    def stop(config: Config, name: str) -> None:
        run = open_run(config, name)
        monkeypatch.setattr(run, "log", lambda metrics, step: run.request_stop())
        with pytest.raises(Stopped, match="stopped in epoch 2 of 3; --resume goes on from its start"):
            train_extractor.run(run)
        run.close()

    return stop


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.outputs["extractor"])


def test_two_colours_are_learned(
    config: Callable[..., Config], train: Callable[[Config, str], Run], two_colours: Path
) -> None:
    run = train(config(), "run")
    assert run.results["test_accuracy"] >= 0.95
    assert run.results["images_per_second"] > 0
    assert run.results["parameters"] == sum(p.numel() for p in CompactExtractor(2, 32).parameters())
    assert run.inputs["train"]["path"] == str(two_colours)
    lines = read_metrics(run.folder)
    assert [line.step for line in lines] == [7, 14, 21, 21]  # 128 pictures, 5 of them for validation, batches of 16
    assert lines[2].metrics["train/loss"] < lines[0].metrics["train/loss"]
    assert lines[3].metrics == {"test/accuracy": run.results["test_accuracy"]}


def test_the_written_file_is_what_was_measured(
    config: Callable[..., Config], train: Callable[[Config, str], Run], two_colours: Path
) -> None:
    run = train(config(), "run")
    network = load_trained(run.outputs["extractor"])
    pictures = read_labelled(str(two_colours), DataConfig())
    assert measure(network, pictures)[0] == run.results["test_accuracy"]
    with safe_open(run.outputs["extractor"], framework="pt") as file:
        metadata = file.metadata()
    assert float(metadata["test_accuracy"]) == run.results["test_accuracy"]
    settings = json.loads(metadata["settings"])
    assert settings["train_sha256"] == metadata["test_sha256"] == hashlib.sha256(two_colours.read_bytes()).hexdigest()
    assert str(two_colours) not in metadata["settings"]  # weights are shipped: no path of this machine


def test_the_seed_decides_the_weights(config: Callable[..., Config], train: Callable[[Config, str], Run]) -> None:
    first, again, other = (
        weights(train(config("extractor.epochs=1", f"train.seed={seed}"), name))["head.weight"]
        for seed, name in ((1, "first"), (1, "again"), (2, "other"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_stopping_and_resuming_equals_not_stopping(
    config: Callable[..., Config],
    open_run: Callable[..., Run],
    train: Callable[[Config, str], Run],
    stop_after_an_epoch: Callable[[Config, str], None],
) -> None:
    stop_after_an_epoch(config(), "stopped")
    resumed = open_run(config(), "stopped", resume=True)
    train_extractor.run(resumed)
    whole = train(config(), "whole")
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert len(read_metrics(resumed.folder)) == 3  # two epochs and the test


def test_a_state_that_was_configured_differently_is_refused(
    config: Callable[..., Config],
    open_run: Callable[..., Run],
    stop_after_an_epoch: Callable[[Config, str], None],
) -> None:
    stop_after_an_epoch(config(), "stopped")
    with pytest.raises(BadInput, match=r"learning_rate is 0\.3; expected 0\.05, with which .*last_epoch\.safetensors"):
        train_extractor.run(open_run(config("extractor.learning_rate=0.3"), "stopped", resume=True))


def test_more_pictures_a_batch_than_there_are_is_refused(
    config: Callable[..., Config], train: Callable[[Config, str], Run]
) -> None:
    with pytest.raises(BadInput, match=r"extractor\.batch_size is 124; expected at most 123"):
        train(config("extractor.batch_size=124"), "run")


def test_the_learning_rate_rises_falls_and_ends_at_zero() -> None:
    rates = [one_cycle(done / 100) for done in range(101)]
    assert rates[0] == rates[-1] == 0
    assert max(rates) == rates[20] == 1
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["data.source=TWO"], r"extractor\.test_source, data\.shards and data\.heldout_source are empty"),
        ([], r"extractor\.train_source, data\.shards and data\.source are empty"),
        ([*BOTH, "extractor.test_source=absent"], r"extractor\.test_source is 'absent', which does not exist"),
        (
            [*BOTH, "data.image_size=15", "tokenizer.patch_size=5"],
            r"data\.image_size is 15; expected at least 16 pixels",
        ),
        (
            [*BOTH, "data.image_size=64", "extractor.test_source=SHARDS"],
            r"data\.image_size is 64; expected 32, as shards",
        ),
        ([*BOTH, "tracking.uri=mlflow.db"], r"tracking\.uri is 'mlflow\.db'"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(
    two_colours: Path, shards: Path, keys: list[str], sentence: str
) -> None:
    keys = [key.replace("TWO", str(two_colours)).replace("SHARDS", str(shards)) for key in keys]
    with pytest.raises(BadInput, match=sentence):
        train_extractor.check(load_config("extractor_cifar10", keys))


def test_sources_fall_back_to_those_of_the_data(two_colours: Path) -> None:
    sources = [f"data.source={two_colours}", f"data.heldout_source={two_colours}"]
    train_extractor.check(load_config("extractor_cifar10", sources))


@pytest.mark.parametrize("architecture", ["compact", "resnet"])
def test_shards_serve_both_architectures_and_decide_size_and_classes(
    shards: Path, tmp_path: Path, train: Callable[[Config, str], Run], architecture: str
) -> None:
    more = [f"data.shards={shards}", f"extractor.architecture={architecture}", f"run.output={tmp_path}"]
    run = train(load_config("extractor64", ["data.image_size=32", *TINY, "extractor.epochs=1", *more]), "run")
    with safe_open(run.outputs["extractor"], framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["architecture"], metadata["classes"], metadata["image_size"]) == (architecture, "2", "32")
    assert run.inputs["train"]["sha256"] == run.inputs["test"]["sha256"] == read_manifest(shards).fingerprint
    loaded = load_extractor(EvaluateConfig(extractor=run.outputs["extractor"]))
    assert loaded.distance_name == f"rfd_{architecture}_32px"
    assert loaded.protocol == "bilinear antialiased to 32 pixels"
    assert not loaded.comparable
    assert loaded.weights_sha256 == hashlib.sha256(Path(run.outputs["extractor"]).read_bytes()).hexdigest()
    more_extractors = load_more(EvaluateConfig(more_extractors=(run.outputs["extractor"],)))
    assert [one.name for one in more_extractors] == [loaded.name]


def test_checking_does_not_load_torch(two_colours: Path) -> None:
    code = (
        "import sys; from pipeline.training import train_extractor; from pipeline.core.presets import load_config; "
        "train_extractor.check(load_config('extractor_cifar10', sys.argv[1:])); sys.exit('torch' in sys.modules)"
    )
    sources = [f"data.source={two_colours}", f"data.heldout_source={two_colours}"]
    subprocess.run([sys.executable, "-c", code, *sources], cwd=Path(train_extractor.__file__).parents[2], check=True)


@pytest.mark.slow
def test_the_job_trains_and_says_where(
    run_job: Callable[..., subprocess.CompletedProcess[str]], two_colours: Path, tmp_path: Path
) -> None:
    sources = [f"extractor.train_source={two_colours}", f"extractor.test_source={two_colours}"]
    done = run_job("train_extractor", "extractor_cifar10", *sources, *TINY, "extractor.epochs=1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "extractor_cifar10-extractor"
    assert done.stdout.splitlines()[-1] == f"RUN_FOLDER={folder}"
    summary = read_summary(folder)
    assert summary["status"] == "finished"
    assert set(summary["results"]) == {"test_accuracy", "images_per_second", "classes", "parameters"}


def test_the_shipped_weights_reach_their_stated_accuracy(shared: Path, repository: Path) -> None:
    """On every 20th of the test pictures, 500 in all: five standard errors are about 7 percent."""
    with safe_open(repository / "tatok_model" / "weights" / SHIPPED, framework="pt") as file:
        stated = float(file.metadata()["test_accuracy"])
    pictures = read_labelled(str(shared / "data" / "cifar10_jpeg_test.parquet"), DataConfig())
    accuracy, _ = measure(CompactExtractor.shipped(), pictures.take(torch.arange(0, len(pictures), 20)))
    assert abs(accuracy - stated) < 0.07


def png(side: int = 32, colour: tuple[int, int, int] = (200, 30, 90)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def read(path: str) -> Labelled:
    return read_labelled(path, DataConfig(), classes=10)


def test_pictures_and_labels_keep_their_order(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    path = write_table(tmp_path / "a.parquet", image=[png(colour=c) for c in colours], label=[4, 0, 9])
    pictures = read(path)
    assert pictures.images.shape == (3, 32, 32, 3)
    assert pictures.images[:, 16, 16].tolist() == [list(c) for c in colours]
    assert pictures.labels.tolist() == [4, 0, 9]
    assert pictures.take(torch.tensor([2, 0])).labels.tolist() == [9, 4]


def test_a_struct_with_bytes_is_a_picture_too(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", image=[{"bytes": png(), "path": "x.png"}], label=[1])
    assert read(path).images[0, 0, 0].tolist() == [200, 30, 90]


def test_pictures_of_another_size_are_resized(tmp_path: Path) -> None:
    assert read(write_table(tmp_path / "a.parquet", image=[png(48)], label=[1])).images.shape == (1, 32, 32, 3)


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(BadInput, match=r"a\.parquet' cannot be read as Parquet"):
        read(str(tmp_path / "a.parquet"))


CLASSES = r"expected data\.label_column to hold classes from 0"


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"photo": [png()], "label": [1]}, r"no column 'image'; expected data\.image_column to be one of photo, label"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int32())}, "has no rows"),
        ({"image": [png()]}, r"row 0 of .* has the label None; expected data\.label_column to hold classes"),
        *(
            ({"image": [png(), png()], "label": [3, no]}, f"row 1 of .* label {no}; {CLASSES} to 9")
            for no in (10, -1, None)
        ),
        *(
            ({"image": [png(), no], "label": [3, 3]}, "row 1 of .* is not a usable picture")
            for no in (b"not a picture", None, png()[:60])
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        read(write_table(tmp_path / "a.parquet", **columns))


def test_without_a_number_of_classes_labels_tell_it(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", image=[png(), png()], label=[199, 3])
    assert read_labelled(path, DataConfig()).classes == 200
    with pytest.raises(BadInput, match=rf"has the label -1; {CLASSES}$"):
        read_labelled(write_table(tmp_path / "b.parquet", image=[png()], label=[-1]), DataConfig())


def test_augmentation_only_shifts_and_mirrors_with_reflected_borders() -> None:
    """Every pixel holds its own coordinates, so that the result tells where it came from."""
    rows, columns = np.mgrid[0:32, 0:32]
    coordinates = torch.from_numpy(np.stack([rows, columns, columns], axis=-1).astype(np.uint8))
    images = augment(coordinates.expand(200, 32, 32, 3), torch.Generator().manual_seed(0))
    padded = np.pad(np.arange(32), 4, mode="reflect")
    shifted = [padded[start : start + 32].tolist() for start in range(9)]
    mirrored = [line[::-1] for line in shifted]
    seen_rows = {tuple(image[:, 0, 0].tolist()) for image in images}
    seen_columns = {tuple(image[0, :, 1].tolist()) for image in images}
    assert seen_rows == set(map(tuple, shifted))
    assert seen_columns == set(map(tuple, shifted + mirrored))


def test_augmentation_depends_on_the_generator_alone() -> None:
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
