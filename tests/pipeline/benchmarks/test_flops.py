"""The formula agrees with torch's own count of what the model does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmarks.train_step import forward_flops, peak_flops, training_flops
from tatok_model.config import TokenizerConfig
from tatok_model.tokenizer import TaTok


@pytest.mark.parametrize(
    "changes",
    [{}, {"patch_tokens": False}, {"global_tokens": 0}, {"quantizer": "fsq"}, {"entropy_globals": False}],
    ids=["both", "global", "patch", "fsq", "blind"],
)
def test_operations_are_those_that_torch_counts(changes):
    config = TokenizerConfig(32, 4, "nano", **changes)
    model = TaTok(config).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        tokens = model.encode(torch.rand(1, 3, 32, 32))
        model.decode(tokens)
        if model.entropy_model is not None:
            model.patch_logits(tokens, torch.zeros_like(tokens.kept_mask), tokens.kept_mask)
    assert forward_flops(config) == pytest.approx(counted.get_total_flops(), rel=0.02)
    assert training_flops(config) == 3 * forward_flops(config)


def test_a_gpu_is_known_by_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("CPU") is None
