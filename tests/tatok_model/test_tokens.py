import pytest
import torch

from tatok_model import Tokens


def tokens(b=3, m=2, n=4, kept=None):
    mask = torch.ones(b, n, dtype=torch.bool) if kept is None else kept
    return Tokens(torch.zeros(b, m, dtype=torch.int64), torch.zeros(b, n, dtype=torch.int64), mask)


def test_tokens_are_counted_per_image():
    kept = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    batch = tokens(kept=kept)
    assert batch.counts().tolist() == [6, 3, 2]
    assert batch.bits(bits_per_token=10.0).tolist() == [60.0, 30.0, 20.0]
    assert batch[1:].counts().tolist() == [3, 2]
    assert len(batch[[0]]) == 1


def test_shapes_that_do_not_belong_together_are_refused():
    indices = torch.zeros(3, 4, dtype=torch.int64)
    kept = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected \(B, M\) and \(B, N\)"):
        Tokens(indices[0], indices, kept)
    with pytest.raises(ValueError, match=r"kept_mask is torch\.int64"):
        Tokens(indices, indices, indices)
    with pytest.raises(ValueError, match="expected as many"):
        Tokens(indices[:2], indices, kept)
