"""Names, warnings and the table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.config import EvaluateConfig
from pipeline.core.console import format_value, markdown, terminal_table
from pipeline.core.errors import BadInput
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.evaluator import Evaluator, Instruments, measure_here, merged
from pipeline.evaluation.measurements import Measurements, Plan
from pipeline.evaluation.reference import Extractor, Reference, extractor_name, load_extractor, load_more
from pipeline.evaluation.results import Distance, baseline_results, rows, tokenizer_results, warnings
from tatok_model.metrics.extractors.inception import Inception2015
from tatok_model.metrics.extractors.small_networks import ResNet20, ResNet56
from tatok_model.tokenizer import TaTok

PLAN = Plan(count=30, total=30, batch_size=8, range_size=32, grid=2)


@pytest.fixture(scope="module")
def found(tokenizer: TaTok, instruments: Instruments, heldout: ShardDataset) -> Measurements:
    return merged(measure_here(Evaluator(tokenizer, instruments, PLAN, originals=True), heldout), 30)


@pytest.fixture(scope="module")
def reference(found: Measurements) -> Reference:
    return Reference.of(found["original_features"], found["original_score"].result(), {"images": 30})


@pytest.fixture(scope="module")
def results(found: Measurements, reference: Reference, extractor: Extractor) -> dict[str, float]:
    return tokenizer_results(found, distances(reference), reference, extractor, 16 * 16, PLAN)


def distances(reference: Reference) -> list[Distance]:
    return [Distance("", "rfd_compact_cifar10", reference)]


def inception() -> Extractor:
    network = Inception2015.__new__(Inception2015)  # its name counts, its 95 MB do not
    return Extractor(network, "6726825d")


def test_a_tokenizer_gets_every_number_under_its_name(results: dict[str, float]) -> None:
    assert list(results) == [
        "images", "batch_size", "psnr", "psnr_pooled", "psnr_p10", "ssim", "rfd_compact_cifar10",
        "tokens_per_image", "tokens_std", "tokens_p05", "tokens_p50", "tokens_p95", "generator_steps",
        "bits_fixed", "bits_coded", "bits_per_pixel", "bits_coded_per_pixel", "is_compact_cifar10",
        "is_compact_cifar10_originals", "codebook_usage_global", "codebook_perplexity_global", "codebook_usage_patch",
        "codebook_perplexity_patch",
        "encode_images_per_second", "decode_images_per_second", "images_per_second",
    ]  # fmt: skip
    assert (results["tokens_per_image"], results["bits_fixed"], results["bits_per_pixel"]) == (18, 72, 72 / 256)
    assert results["images_per_second"] < results["encode_images_per_second"]
    assert results["rfd_compact_cifar10"] > 0


def test_pictures_are_at_no_distance_from_themselves(found: Measurements, reference: Reference) -> None:
    same = Measurements(**{**found.states, "features": found["original_features"]})
    assert baseline_results(same, distances(reference))["baseline_kmeans_rfd_compact_cifar10"] < 1e-6


def test_codebooks_that_a_tokenizer_does_not_have_are_not_reported(
    tokenizer: TaTok, instruments: Instruments, reference: Reference, extractor: Extractor, heldout: ShardDataset
) -> None:
    for lacking, shape in (("patch", {"patch_tokens": False}), ("global", {"global_tokens": 0})):
        other = TaTok(replace(tokenizer.config, **shape))
        measured = merged(measure_here(Evaluator(other, instruments, PLAN, originals=False), heldout), 30)
        names = tokenizer_results(measured, distances(reference), reference, extractor, 256, PLAN)
        assert f"codebook_usage_{lacking}" not in names
        assert sum(name.startswith("codebook_usage") for name in names) == 1


def test_only_inception_gives_an_rfid(extractor: Extractor) -> None:
    assert (extractor.distance_name, extractor.score_name) == ("rfd_compact_cifar10", "is_compact_cifar10")
    assert not extractor.comparable
    assert (inception().distance_name, inception().score_name) == ("rfid", "inception_score")
    assert inception().comparable


def test_the_extractor_is_inception_when_its_weights_are_given() -> None:
    assert extractor_name(EvaluateConfig()) == "compact_cifar10"
    assert extractor_name(EvaluateConfig(inception_weights="/w.pth")) == "inception2015"
    assert extractor_name(EvaluateConfig(inception_weights="/w.pth", extractor="compact_cifar10")) == "compact_cifar10"


def test_the_shipped_extractor_loads_with_its_checksum() -> None:
    loaded = load_extractor(EvaluateConfig())
    assert loaded.name == "compact_cifar10"
    assert len(loaded.weights_sha256) == 64


def test_other_weights_than_inception_s_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("weights") / "other.pth"
    path.write_bytes(b"other")
    for file in (str(path), "/nowhere.pth"):
        with pytest.raises(BadInput, match="evaluate.inception_weights: .*6726825d"):
            load_extractor(EvaluateConfig(inception_weights=file))


def test_further_extractors_are_known_by_their_files(tmp_path: Path) -> None:
    for name, network in (("a.th", ResNet20()), ("b.th", ResNet56())):
        stored = {f"module.{key}": value for key, value in network.state_dict().items()}
        torch.save({"state_dict": stored}, tmp_path / name)
    paths = tuple(str(tmp_path / name) for name in ("a.th", "b.th"))
    more = load_more(EvaluateConfig(more_extractors=paths))
    assert [one.distance_name for one in more] == ["rfd_resnet20_cifar10", "rfd_resnet56_cifar10"]
    assert [one.comparable for one in more] == [False, False]
    assert {one.protocol for one in more} == {"bilinear antialiased to 32 pixels"}
    assert len({one.weights_sha256 for one in more}) == 2
    with pytest.raises(BadInput, match="a second resnet20_cifar10; expected different networks"):
        load_more(EvaluateConfig(more_extractors=(paths[0], paths[0])))
    (tmp_path / "c.th").write_bytes(b"other")
    with pytest.raises(BadInput, match="evaluate.more_extractors: .*is no file of PyTorch weights"):
        load_more(EvaluateConfig(more_extractors=(str(tmp_path / "c.th"),)))


def test_readers_are_warned_of_what_cannot_be_compared(
    results: dict[str, float], reference: Reference, extractor: Extractor
) -> None:
    few, foreign = warnings(results, reference, extractor)
    assert "over 30 images: below 2048" in few
    assert "is no FID" in foreign
    many = {**results, "images": 50_000}
    told = warnings(many, replace(reference, n=10_000, meta=None), inception())
    assert len(told) == 2
    assert "does not say how its images were cropped" in told[0]
    assert "compares 50000 images with statistics of 10000" in told[1]
    assert warnings(many, replace(reference, n=50_000), inception()) == []


def test_the_table_shows_every_number_and_every_warning(results: dict[str, float], extractor: Extractor) -> None:
    table = list(rows({**results, "baseline_kmeans_psnr": 24.17}, extractor, "cpu"))
    shown = terminal_table("smoke", table, ["few images"])
    page = markdown("smoke", table, ["few images"], {"device": "cpu"})
    for name in results:
        assert name in shown
        assert f"| {name} |" in page
    assert "baseline_kmeans_psnr" in shown
    assert "one worker on one CPU core, batch 8, after warm-up" in shown
    assert shown.endswith("warning: few images")
    assert "- **warning:** few images" in page
    assert "| device | cpu |" in page


def test_values_are_rounded_for_reading() -> None:
    assert [format_value(v) for v in (64.0, 0.33173, 12345.6, 1e-7)] == ["64", "0.3317", "12346", "1e-07"]
    assert format_value(float(np.float64(2.0))) == "2"
    assert torch.tensor(0.0).item() == float(format_value(0.0))
