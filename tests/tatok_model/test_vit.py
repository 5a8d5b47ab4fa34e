"""Attention is the same operation in every precision; bfloat16 on a CPU has a path of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tatok_model import vit
from tatok_model.vit import Attention, Block

B, HEADS, L, D = 3, 2, 17, 32
COARSE = 2**-8  # of bfloat16, relative


def given(scale=1.0):
    """Queries, keys, values, and weights of a sum; numbers that bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(B, HEADS, L, D, generator=generator) for _ in range(4)]
    drawn[0] *= scale
    return [tensor.bfloat16().float() for tensor in drawn]


def mask():
    """(B, 1, 1, L): everything, the first five, a single key."""
    return (torch.arange(L) < torch.tensor([L, 5, 1])[:, None])[:, None, None, :]


def with_gradients(attend, tensors, masked, dtype):
    q, k, v, weights = tensors
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
    out = attend(*inputs, mask() if masked else None)
    (out.float() * weights).sum().backward()
    return out, [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_attention_in_bfloat16_is_that_in_float32_up_to_rounding(masked, scale):
    expected, expected_gradients = with_gradients(F.scaled_dot_product_attention, given(scale), masked, torch.float32)
    found, gradients = with_gradients(vit.attend, given(scale), masked, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    for part, whole in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        off = (part.float() - whole).norm() / whole.norm()
        assert off < 4 * COARSE * max(1, scale), off
        torch.testing.assert_close(part.float(), whole, atol=0.03 * whole.abs().max().item(), rtol=0.03)


@pytest.mark.parametrize("masked", [False, True])
def test_in_bfloat16_it_is_as_exact_as_the_fused_kernel(masked):
    expected, expected_gradients = with_gradients(F.scaled_dot_product_attention, given(), masked, torch.float32)
    found, gradients = with_gradients(vit.attend, given(), masked, torch.bfloat16)
    fused, fused_gradients = with_gradients(F.scaled_dot_product_attention, given(), masked, torch.bfloat16)
    for ours, theirs, whole in zip(
        (found, *gradients), (fused, *fused_gradients), (expected, *expected_gradients), strict=True
    ):
        assert (ours.float() - whole).norm() < 2 * (theirs.float() - whole).norm() + 1e-3 * whole.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_key_is_not_looked_at(dtype):
    q, k, v, weights = given()
    there = mask().squeeze(1).squeeze(1)[:, None, :, None]  # (B, 1, L, 1)
    other = [q, k.where(there, k + 100), v.where(there, v - 100), weights]
    found, gradients = with_gradients(vit.attend, [q, k, v, weights], True, dtype)
    changed, other_gradients = with_gradients(vit.attend, other, True, dtype)
    assert torch.equal(found, changed)
    assert torch.equal(gradients[0], other_gradients[0])
    for gradient in gradients[1:]:
        assert not gradient.where(there, 0).sub(gradient).any()
    single = v[2, :, :1].to(dtype).expand(HEADS, L, D)  # the third looks at one key
    torch.testing.assert_close(found[2], single, atol=0, rtol=0)


def test_huge_scores_in_bfloat16_give_numbers():
    q, k, v, weights = given()
    found, gradients = with_gradients(vit.attend, [q * 1e4, k * 1e4, v, weights], True, torch.bfloat16)
    assert found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    best = (q[0] @ k[0].mT).argmax(-1)  # (H, L)
    assert torch.equal(found[0].float(), v[0].gather(1, best[..., None].expand(-1, -1, D)))


@pytest.mark.parametrize("masked", [False, True])
def test_in_float32_the_fused_kernel_is_used(masked):
    expected, _ = with_gradients(F.scaled_dot_product_attention, given(), masked, torch.float32)
    found, _ = with_gradients(vit.attend, given(), masked, torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_under_autocast_is_the_block_without(masked, monkeypatch):
    torch.manual_seed(0)
    block = Block(64, 2)
    nn.init.normal_(block.attention.to_qkv.weight, std=0.2)
    x, key_mask = torch.randn(B, L, 64), mask()[:, 0, 0] if masked else None
    expected = block(x, key_mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_: pytest.fail("bfloat16 has a path of its own"))
    with torch.autocast("cpu", torch.bfloat16):
        found = block(x, key_mask)
    assert found.dtype == torch.float32  # the residual stream keeps its precision
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


def test_attention_mixes_the_values_as_the_equation_says():
    """softmax(q k^T / sqrt(h)) v of every head, written out."""
    torch.manual_seed(0)
    attention = Attention(8, 2)
    x = torch.randn(1, 5, 8)
    q, k, v = attention.to_qkv(x).view(5, 3, 2, 4).unbind(1)  # (L, H, h) each
    heads = []
    for head in range(2):
        weights = (q[:, head] @ k[:, head].T / 4**0.5).softmax(-1)
        heads.append(weights @ v[:, head])
    torch.testing.assert_close(attention(x)[0], attention.to_out(torch.cat(heads, dim=-1)))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width is 10; expected a multiple of heads, 3"):
        Attention(10, 3)
