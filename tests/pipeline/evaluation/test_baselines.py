"""k-means on patches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.core.errors import BadInput
from pipeline.evaluation.baselines import PatchVQ, codewords_for, fit_kmeans, sample_patches
from pipeline.evaluation.evaluator import Evaluator, Instruments, measure_here, merged
from pipeline.evaluation.measurements import Plan
from tatok_model.config import TokenizerConfig
from tatok_model.metrics.images import to_uint8

CONFIG = TokenizerConfig(16, 4, global_tokens=2, codebook_size=16)


class FewPatches:
    """Pictures of 4x4 patches that are each one of `count` made ones."""

    def __init__(self, count: int) -> None:
        self.patches = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)

    def images(self, indices: np.ndarray) -> np.ndarray:
        pictures = np.empty((len(indices), 16, 16, 3), np.uint8)
        for place, index in enumerate(indices):
            draw = np.random.default_rng(int(index)).integers(0, len(self.patches), (4, 4))
            pictures[place] = self.patches[draw].transpose(0, 2, 1, 3, 4).reshape(16, 16, 3)
        return pictures


def test_the_codebook_is_as_large_as_the_bits_allow() -> None:
    assert codewords_for(72 * math.log2(1000), 64) == 2371
    assert 64 * math.log2(2371) <= 72 * math.log2(1000) < 64 * math.log2(2372)
    assert [codewords_for(64 * math.log2(k), 64) for k in (3, 1000, 2187)] == [3, 1000, 2187]


def test_patches_that_repeat_are_found_exactly(instruments: Instruments) -> None:
    source = FewPatches(3)
    baseline = fit_kmeans(source, 20, CONFIG, bits=16 * 5)  # 32 codewords for 3 patches
    plan = Plan(count=8, total=8, batch_size=4, range_size=8, grid=0)
    found = merged(measure_here(Evaluator(baseline, instruments, plan, originals=False), source), 8)
    assert found["quality"].results()["psnr"] > 60
    assert found["lengths"]["bits_fixed"].sum() == 8 * 16 * 5


def test_each_patch_gets_its_nearest_codeword() -> None:
    codewords = torch.tensor([0.0, 0.5, 1.0])[:, None].expand(3, 48).contiguous()
    baseline = PatchVQ(replace(CONFIG, global_tokens=0, codebook_size=3), codewords)
    images = torch.full((1, 3, 16, 16), 20, dtype=torch.uint8)
    images[:, :, :4, 4:8] = 120
    images[:, :, 12:, 12:] = 250
    tokens = baseline.encode(images)
    assert tokens.patch_indices[0].tolist() == [0, 1] + [0] * 13 + [2]
    assert tokens.counts().tolist() == [16]
    assert to_uint8(baseline.decode(tokens))[0, 0, 0, :8].tolist() == [0] * 4 + [128] * 4


def test_patches_are_drawn_alike_every_time_and_none_twice() -> None:
    source = FewPatches(1000)
    drawn = sample_patches(source, images=300, used=280, each=16, patch_size=4)
    assert drawn.shape == (280 * 16, 48)
    assert np.array_equal(drawn, sample_patches(source, 300, 280, 16, 4))
    first = {patch.tobytes() for patch in (drawn[:16] * 255).round().astype(np.uint8)}
    picture = source.images(np.array([0]))[0].reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, 48)
    assert first == {patch.tobytes() for patch in picture}, "all 16 patches of a picture are those of the picture"


@pytest.mark.parametrize(("images", "bits"), [(20, 16 * 0.5), (2, 16 * 6.0), (0, 80.0)])
def test_codebooks_that_cannot_be_fitted_are_refused(images: int, bits: float) -> None:
    with pytest.raises(BadInput, match=r"needs \d+ codewords for .* expected 2 to \d+"):
        fit_kmeans(FewPatches(3), images, CONFIG, bits)
