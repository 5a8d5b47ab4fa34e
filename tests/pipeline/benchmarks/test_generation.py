"""Speed of generation on networks too small to be fast: what is counted, compared and refused."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.benchmarks import generation_speed
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import sha256_file
from pipeline.core.presets import load_config
from tatok_model.config import GeneratorConfig, TokenizerConfig
from tatok_model.generation.generator import Generator
from tatok_model.tokenizer import TaTok

SHAPE = {"patch_size": 4, "global_tokens": 2, "quantizer": "fsq", "codebook_size": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An untrained tokenizer and an untrained generator of its tokens."""
    folder = tmp_path_factory.mktemp("benchmarking")
    torch.manual_seed(0)
    TaTok(TokenizerConfig(16, fsq_levels=(4, 4), codebook_dim=8, **SHAPE)).save_pretrained(folder / "tokenizer")
    sizes = {"size": "nano", "classes": 3, "global_tokens": 2, "grid_size": 4, "codebook_size": 16}
    sha256 = sha256_file(folder / "tokenizer" / "model.safetensors")
    config = GeneratorConfig(**sizes, max_patch_tokens=12, tokenizer_sha256=sha256)
    Generator(config).save_pretrained(folder / "generator")
    return folder


@pytest.fixture
def config_of(folders, tmp_path):
    def make(*more):
        shape = [f"tokenizer.{key}={value}" for key, value in SHAPE.items()]
        shape += ["tokenizer.fsq_levels=[4,4]", "data.image_size=16", f"run.output={tmp_path}", "tracking.uri="]
        places = [f"tokenizer.checkpoint={folders}/tokenizer", f"generator.checkpoint={folders}/generator"]
        sizes = ["benchmark.repeats=2", "benchmark.batch_size=4", "benchmark.batch_sizes=[2,8]", "benchmark.images=8"]
        return load_config("smoke", [*shape, *places, *sizes, *more])

    return make


def test_ours_and_the_control_are_timed_at_every_batch_and_compared(measure, config_of):
    run = measure(config_of())
    found = run.results
    assert run.folder.name == "smoke-benchmark-generation"
    assert found["patch_only_steps"] == found["patch_only_longest"] == 16
    assert 2 <= found["tatok_steps"] <= found["tatok_longest"] <= 14
    assert found["ratio_of_steps"] == pytest.approx(16 / found["tatok_steps"])
    for name in ("tatok", "patch_only"):
        assert found[f"{name}_best_batch_size"] in (2, 4, 8)
        low, middle, high = (found[f"{name}_images_per_second{end}"] for end in ("_low", "", "_high"))
        assert 0 < low <= middle <= high
        assert 0 < found[f"{name}_decoding_share"] < 1
    least = found["tatok_images_per_second_low"] / found["patch_only_images_per_second_high"]
    most = found["tatok_images_per_second_high"] / found["patch_only_images_per_second_low"]
    low, equal, high = (found[f"speedup_equal_batch{end}"] for end in ("_low", "", "_high"))
    assert least <= low <= equal <= high <= most
    assert found["speedup_sampling_equal_batch"] > 0
    best = found["speedup_best_batch"]
    report = Path(run.outputs["report"]).read_text()
    assert f"| speedup_best_batch | {best:.4g} |" in report
    assert f"{best:.2f} times at each one's best batch" in report
    assert report.count("| tatok |") == report.count("| patch_only |") == 3
    assert json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])["metrics"]["ratio_of_steps"]


def test_ratios_are_of_the_rates_of_a_round(measure, config_of):
    found = measure(config_of("benchmark.repeats=1")).results
    for kind, rate in (("equal", "images_per_second"), ("best", "best_images_per_second")):
        wanted = found[f"tatok_{rate}"] / found[f"patch_only_{rate}"]
        assert found[f"speedup_{kind}_batch"] == pytest.approx(wanted)
        assert found[f"share_of_steps_{kind}_batch"] == pytest.approx(wanted / found["ratio_of_steps"])


def test_the_cache_of_longer_sequences_and_of_guidance_is_larger(measure, config_of):
    found = measure(config_of("benchmark.batch_sizes=[4]", "benchmark.repeats=1")).results
    width_layers = 128 * (4 + 1)  # nano, and the layer of the code head
    assert found["tatok_kv_cache_bytes"] == 4 * 2 * width_layers * (1 + 2 + 12) * 4
    assert found["patch_only_kv_cache_bytes"] == 4 * 2 * width_layers * (1 + 16) * 4


def test_guidance_doubles_the_cache(measure, config_of):
    found = measure(config_of("benchmark.batch_sizes=[4]", "benchmark.repeats=1", "generate.guidance=2")).results
    assert found["patch_only_kv_cache_bytes"] == 2 * 4 * 2 * 128 * 5 * 17 * 4


def test_fresh_weights_write_as_many_tokens_as_a_trained_tokenizer_keeps(measure, config_of):
    more = "tokenizer.checkpoint=", "generator.checkpoint=", "benchmark.fresh=true", "benchmark.mean_tokens=6"
    run = measure(config_of(*more, "benchmark.images=20", "benchmark.batch_sizes=[4]", "generate.guidance=2"))
    assert run.results["tatok_steps"] == pytest.approx(6, abs=0.2)
    assert run.results["patch_only_steps"] == 16
    assert not run.inputs
    with pytest.raises(
        BadInput, match="benchmark.mean_tokens is 2; expected more than 2, the global tokens, and at most"
    ):
        generation_speed.check(config_of("benchmark.fresh=true", "benchmark.mean_tokens=2"))


def test_a_stop_ends_it(measure, config_of):
    with pytest.raises(Stopped, match="measures anew"):
        measure(config_of(), stop=True)


def test_a_tokenizer_without_patch_tokens_has_no_control(config_of):
    with pytest.raises(BadInput, match="expected patch tokens"):
        generation_speed.check(config_of("tokenizer.patch_tokens=false", "kept_sets.global_tail=0"))


@pytest.mark.parametrize(
    "text", ["benchmark.kind=speed", "benchmark.repeats=0", "benchmark.batch_sizes=[]", "benchmark.images=0"]
)
def test_a_benchmark_that_cannot_be_is_refused(text):
    with pytest.raises(BadInput, match=text.partition("=")[0]):
        load_config("smoke", [text])
