"""Speed of encode, rank and decode on a network too small to be fast."""

from pathlib import Path

import pytest
import torch

from pipeline.benchmarks.encode_speed import findings
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.presets import load_config
from tatok_model.config import TokenizerConfig
from tatok_model.tokenizer import TaTok

SHAPE = {"patch_size": 8, "global_tokens": 2, "codebook_size": 16, "codebook_dim": 8, "entropy_width": 32}


@pytest.fixture
def config_of(tmp_path):
    def make(*more):
        values = [f"tokenizer.{key}={value}" for key, value in SHAPE.items()]
        sizes = ["benchmark.repeats=2", "benchmark.batch_size=4", "benchmark.batch_sizes=[2]", "benchmark.images=4"]
        places = ["data.image_size=16", "tokenizer.size=nano", f"run.output={tmp_path}", "tracking.uri="]
        return load_config("smoke", ["benchmark.kind=encode", *values, *sizes, *places, *more])

    return make


def test_every_work_is_timed_at_every_batch(measure, config_of):
    run = measure(config_of())
    for work in ("encode", "rank_1", "rank_4", "rank_surprisal", "rank_error", "decode", "decode_half", "decode_few"):
        for size in (2, 4):
            assert run.results[f"{work}_images_per_second_batch{size}"] > 0
    assert "rank_8_images_per_second_batch4" not in run.results  # of 4 positions
    assert run.results["encode_rank_1_over_encode"] > 1
    for name in ("rank_1_over_rank_surprisal", "rank_error_over_rank_1", "decode_over_decode_few"):
        assert run.results[name] > 0
    shares = [run.results[f"{work}_share"] for work in ("encode", "rank_1", "decode")]
    assert sum(shares) == pytest.approx(1)
    assert "goal: at most 1.15" in Path(run.outputs["report"]).read_text()


def test_a_tokenizer_without_patch_tokens_has_nothing_to_rank(measure, config_of):
    found = measure(config_of("tokenizer.patch_tokens=false")).results
    assert not [name for name in found if "rank" in name]
    assert found["encode_share"] + found["decode_share"] == pytest.approx(1)


def test_a_checkpoint_is_what_is_timed(measure, config_of, tmp_path):
    TaTok(TokenizerConfig(16, size="nano", **SHAPE)).save_pretrained(tmp_path / "tokenizer")
    run = measure(config_of(f"tokenizer.checkpoint={tmp_path}/tokenizer"))
    assert len(run.inputs["tokenizer"]["sha256"]) == 64


def test_the_ratio_is_of_seconds_round_by_round():
    rates = {4: {"encode": [10.0, 20.0], "rank_1": [40.0, 100.0], "decode": [10.0, 20.0]}}
    found = findings(rates, 4, {})
    assert found.results()["encode_rank_1_over_encode_low"] == pytest.approx(1.2)
    assert found.results()["encode_rank_1_over_encode_high"] == pytest.approx(1.25)


def test_decoding_few_tokens_is_compared_with_decoding_all():
    rates = {4: {"encode": [10.0], "decode": [10.0], "decode_few": [25.0], "rank_1": [8.0], "rank_surprisal": [10.0]}}
    found = findings(rates, 4, {}).results()
    assert found["decode_over_decode_few"] == pytest.approx(2.5)
    assert found["rank_1_over_rank_surprisal"] == pytest.approx(1.25)


def test_a_stop_ends_it(measure, config_of):
    with pytest.raises(Stopped, match="measures anew"):
        measure(config_of(), stop=True)


def test_a_gpu_that_is_not_there_is_refused(measure, config_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="evaluate.device is 'cuda'"):
        measure(config_of("evaluate.device=cuda"))
