"""The whole path with a tokenizer of 16 codes and pictures of 32 pixels: tokens, generated pictures, their numbers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.config import Config
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import sha256_file
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.evaluation import evaluate, generated_features
from pipeline.evaluation.generated import drawn, real_lengths
from pipeline.evaluation.generated_features import FeatureWork, FeatureWorker
from pipeline.generator import generate
from pipeline.tokens import tokenize as tokenizing
from pipeline.tokens.token_manifest import RowRange
from tatok_model.config import GeneratorConfig, TokenizerConfig
from tatok_model.generation.generator import Generator
from tatok_model.metrics.extractors.small_networks import CompactExtractor
from tatok_model.metrics.manifold import precision_recall
from tatok_model.tokenizer import TaTok

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data's own old settings

SIDE = 32
SHAPE = {"patch_size": 8, "global_tokens": 2, "quantizer": "fsq", "codebook_size": 16}
STAGES: dict[str, ModuleType] = {"tokenize_images": tokenizing, "generate": generate, "evaluate": evaluate}

Started = Callable[..., Run]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, classified_shards: Path) -> Path:
    """A folder with `shards`, `tokenizer` and `generator`."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "shards").symlink_to(classified_shards)
    torch.manual_seed(0)
    TaTok(TokenizerConfig(SIDE, fsq_levels=(4, 4), **SHAPE)).save_pretrained(folder / "tokenizer")  # type: ignore[arg-type]
    sha256 = sha256_file(folder / "tokenizer/model.safetensors")
    sizes = {"global_tokens": 2, "grid_size": 4, "codebook_size": 16, "max_patch_tokens": 16}
    shape = GeneratorConfig(size="nano", classes=10, tokenizer_sha256=sha256, **sizes)  # type: ignore[arg-type]
    Generator(shape).save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="module")
def configured(made: Path, configure: Callable[..., Config]) -> Callable[..., Config]:
    shape = [f"tokenizer.{key}={value}" for key, value in SHAPE.items()]
    shape += [f"data.image_size={SIDE}", f"run.output={made}/runs", f"data.shards={made}/shards"]
    shape += [f"tokenizer.checkpoint={made}/tokenizer", f"generator.checkpoint={made}/generator"]
    shape += ["filter.rule=relative", "filter.threshold=0.6", "evaluate.batch_size=8"]
    return lambda *more: configure(*shape, *more)


@pytest.fixture(scope="module")
def begin(opened_runs: Any, configured: Callable[..., Config]) -> Iterator[Started]:
    """`begin("evaluate", "name", "section.key=value")` makes a run, checked, that has not begun."""
    with opened_runs() as open_run:

        def begin(kind: str, name: str, *more: str) -> Run:
            return open_run(kind, STAGES[kind], configured(*more), name, resume=True)

        yield begin


@pytest.fixture(scope="module")
def finished(begin: Started) -> Started:
    """As `begin`; the run has ended."""

    def finish(kind: str, *arguments: str) -> Run:
        run = begin(kind, *arguments)
        STAGES[kind].run(run)
        run.close()
        return run

    return finish


@pytest.fixture(scope="module")
def tokens(finished: Started) -> Path:
    return finished("tokenize_images", "tokens").folder


@pytest.fixture(scope="module")
def generated(finished: Started, tokens: Path) -> Path:
    """Thirty pictures."""
    return finished("generate", "generated", "generate.images=30", "generate.images_per_shard=16").folder


@pytest.fixture(scope="module")
def evaluated(finished: Started, generated: Path, tokens: Path) -> Run:
    return finished("evaluate", "evaluated", f"evaluate.generated={generated}", f"tokens.path={tokens}")


def test_generated_pictures_are_measured(evaluated: Run) -> None:
    found = evaluated.results
    assert (found["images"], found["images_real"], found["images_train"]) == (30, 20, 24)
    assert found["gfd_compact_cifar10"] > 0
    assert 1 <= found["is_compact_cifar10"] <= 10
    assert 1 <= found["is_compact_cifar10_real"] <= 10
    for name in ("precision_compact_cifar10", "recall_compact_cifar10", "class_accuracy", "class_accuracy_real"):
        assert 0 <= found[name] <= 1
    assert found["class_accuracy_worst"] <= found["class_accuracy"]
    assert found["class_accuracy_worst_class"] in range(10)
    assert found["images_manifold"] == 20
    assert 0 < found["tokens_ks"] <= found["tokens_ks_worst"] <= 1
    assert found["memorisation_ratio"] == pytest.approx(found["nearest_train"] / found["nearest_train_real"])
    assert found["images_per_second"] > 0, "as generate has measured it"


def test_a_report_and_pictures_are_left(evaluated: Run, generated: Path) -> None:
    report = Path(evaluated.outputs["report"]).read_text()
    assert "smoke: 30 generated images" in report
    assert "| gfd_compact_cifar10 |" in report
    assert "Kolmogorov-Smirnov" in report
    assert "were not compared" not in report
    assert evaluated.inputs["generated"]["path"] == str(generated)
    with Image.open(evaluated.outputs["nearest_train"]) as picture:
        assert picture.size == (5 * 98 - 2, 8 * 98 - 2), "eight samples with four neighbours each"
    assert Path(evaluated.outputs["token_lengths"]).stat().st_size
    line = json.loads((evaluated.folder / "metrics.jsonl").read_text())
    assert line["metrics"] == evaluated.results


def test_statistics_with_nan_are_refused_before_any_feature_is_computed(
    begin: Started, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "nan.npz", mu=np.full(192, np.nan), sigma=np.eye(192))
    monkeypatch.setattr(FeatureWorker, "__init__", lambda *arguments: pytest.fail("measured"))
    run = begin("evaluate", "nan", f"evaluate.generated={generated}", f"evaluate.reference={tmp_path}/nan.npz")
    with pytest.raises(BadInput, match="nan.npz' hold NaN or infinity in mu; expected mean and covariance of features"):
        evaluate.run(run)


def test_what_was_computed_serves_the_next_run(
    finished: Started, evaluated: Run, generated: Path, tokens: Path
) -> None:
    again = finished("evaluate", "again", f"evaluate.generated={generated}", f"tokens.path={tokens}")
    assert again.results == evaluated.results
    assert "reference" in again.inputs
    assert "reference" in evaluated.outputs
    kept = sorted(path.name for path in (evaluated.folder.parent / "reference").iterdir())
    assert len(kept) == 4, "statistics and features of held-out pictures, mirrored too, features of training pictures"


def test_mirrored_features_are_those_of_the_mirrored_picture(made: Path, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    task = RowRange(0, "train", 0, 0, 4, 4, 24)
    work = FeatureWork(tmp_path, "key", str(made / "shards"), 4, mirrored=True)
    network = CompactExtractor().eval().requires_grad_(False)
    FeatureWorker(network, work, "cpu").make(task)
    images = ShardDataset(made / "shards", "train").images(task.places().tolist())[:, :, ::-1]
    with np.load(tmp_path / "features" / f"{task.name}.npz") as file:
        expected, _ = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        np.testing.assert_allclose(file["features"], expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_one_and_two_workers_find_the_same(
    ray_session: ModuleType, finished: Started, evaluated: Run, generated: Path, tokens: Path
) -> None:
    alone = f"evaluate.generated={generated}", f"tokens.path={tokens}"
    # Other batches are another key, so that nothing that was computed serves.
    first = finished("evaluate", "one", *alone, "evaluate.batch_size=5", "run.output=" + str(generated.parent / "one"))
    more = "evaluate.batch_size=5", "evaluate.num_workers=2", "run.output=" + str(generated.parent / "two")
    assert finished("evaluate", "two", *alone, *more).results == first.results


def test_without_tokens_lengths_are_not_compared(finished: Started, generated: Path) -> None:
    run = finished("evaluate", "lengthless", f"evaluate.generated={generated}", "evaluate.nearest=0")
    assert run.results["tokens_per_image"] > 2
    assert "tokens_ks" not in run.results
    assert "nearest_train" not in run.results
    assert "nearest_train" not in run.outputs
    assert "token lengths were not compared with real ones: tokens.path is empty" in (
        Path(run.outputs["report"]).read_text()
    )


def test_statistics_of_others_serve_as_reference(finished: Started, generated: Path, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.zeros(192), sigma=np.eye(192))
    more = f"evaluate.reference={path}", "evaluate.nearest=0"
    run = finished("evaluate", "given", f"evaluate.generated={generated}", *more)
    assert run.inputs["reference"]["path"] == str(path)
    assert "does not say how its images were cropped" in Path(run.outputs["report"]).read_text()


def test_real_lengths_are_those_of_pictures_and_not_of_their_views(
    finished: Started, configured: Callable[..., Config], tokens: Path
) -> None:
    plain, labels = real_lengths(configured(f"tokens.path={tokens}"))
    assert sorted(labels.tolist()) == sorted([*(i % 10 for i in range(24)), *(i % 10 for i in range(20))])
    more = finished("tokenize_images", "views", "tokens.flip=true")
    counts, _ = real_lengths(configured(f"tokens.path={more.folder}"))
    assert sorted(counts.tolist()) == sorted(plain.tolist())


def test_a_stopped_evaluation_keeps_what_it_computed(
    begin: Started, finished: Started, generated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_features, "RANGE_ROWS", 8)
    run = begin("evaluate", "stopped", f"evaluate.generated={generated}")
    run.request_stop()
    with pytest.raises(Stopped, match="1 of 4 files are made; --resume makes the others"):
        evaluate.run(run)
    run.close()
    file = run.folder / "features/compact_cifar10/features/heldout-00000.npz"
    before = file.stat().st_mtime_ns
    assert finished("evaluate", "stopped", f"evaluate.generated={generated}").results["images"] == 30
    assert file.stat().st_mtime_ns == before


def test_it_is_named_after_what_it_measures(configured: Callable[..., Config], generated: Path) -> None:
    assert evaluate.default_name(configured(f"evaluate.generated={generated}")) == "smoke-evaluate-generated"
    assert evaluate.default_name(configured()) == "smoke-evaluate"


def test_a_folder_that_generate_did_not_finish_is_refused(begin: Started, made: Path) -> None:
    with pytest.raises(BadInput, match="holds no generated.json; expected a folder written by jobs/generate.py"):
        begin("evaluate", "refused", f"evaluate.generated={made}/shards")


def test_pictures_of_another_size_or_of_other_classes_are_refused(begin: Started, generated: Path, made: Path) -> None:
    size = "data.image_size=16", "tokenizer.image_size=16", "data.shards=", "data.source=samples"
    with pytest.raises(BadInput, match="has pictures of 32 pixels; expected data.image_size, 16"):
        begin("evaluate", "refused", f"evaluate.generated={generated}", *size)
    shards = json.loads((made / "shards/manifest.json").read_text())
    other = made / "other"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps({**shards, "classes": ["a", "b"]}))
    with pytest.raises(BadInput, match="has 10 classes; expected 2, those of data.shards"):
        begin("evaluate", "refused", f"evaluate.generated={generated}", f"data.shards={other}")


def test_lengths_of_another_tokenizer_are_refused(
    begin: Started, generated: Path, tokens: Path, tmp_path: Path
) -> None:
    values = json.loads((generated / "generated.json").read_text())
    (tmp_path / "generated.json").write_text(json.dumps({**values, "tokenizer_sha256": "0" * 64}))
    (tmp_path / "manifest.json").write_bytes((generated / "manifest.json").read_bytes())
    with pytest.raises(BadInput, match="is of a tokenizer with sha256 .* expected that of evaluate.generated"):
        begin("evaluate", "refused", f"evaluate.generated={tmp_path}", f"tokens.path={tokens}")


def test_a_cut_that_global_tokens_cannot_have_is_refused(begin: Started, generated: Path) -> None:
    more = "tokenizer.patch_tokens=false", "filter.rule=relative", "filter.threshold=0.5"
    with pytest.raises(BadInput, match="filter.rule is 'relative' without patch tokens; expected count, of global"):
        begin("evaluate", "refused", f"evaluate.generated={generated}", *more)


def test_too_few_pictures_are_refused(finished: Started, generated: Path) -> None:
    few = finished("generate", "few", "generate.images=3").folder
    with pytest.raises(BadInput, match="evaluate.generated .* has 3 pictures; expected at least 4"):
        finished("evaluate", "refused", f"evaluate.generated={few}")
    with pytest.raises(BadInput, match="the held-out split has 2 pictures; expected at least 4"):
        finished("evaluate", "refused-too", f"evaluate.generated={generated}", "evaluate.max_images=2")


def test_features_are_drawn_once_and_for_all() -> None:
    features = torch.arange(20.0)[:, None]
    assert torch.equal(drawn(features, 5), drawn(features, 20)[:5])
    assert sorted(drawn(features, 20).ravel().tolist()) == features.ravel().tolist()
    assert precision_recall(drawn(features, 20), features) == (1, 1)
