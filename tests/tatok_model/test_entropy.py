"""The entropy model's short ways give what its plain pass over the whole sequence gives."""

import pytest
import torch

from tatok_model.entropy import EntropyModel

B, N, K = 3, 16, 20


def model_of(global_tokens, layers):
    torch.manual_seed(0)
    model = EntropyModel(4, global_tokens, N, K, 64, layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def logits_of(hidden, head):
    return head(hidden)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("global_tokens", [0, 5])
def test_before_any_code_is_given_the_shared_first_block_changes_nothing(global_tokens, layers):
    model = model_of(global_tokens, layers)
    global_codes, nothing = torch.randn(B, global_tokens, 4), torch.zeros(B, N, dtype=torch.bool)
    expected = model(global_codes, torch.randn(B, N, 4), nothing, ~nothing)
    found = model.before_any(global_codes, logits_of)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 1
    assert not found.requires_grad


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("global_tokens", [0, 5])
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_read_is_read_off_the_same_logits(global_tokens, layers, grad):
    model = model_of(global_tokens, layers)
    given = torch.rand(B, N) < 0.5
    at = ~given & (torch.rand(B, N) < 0.7)
    hidden = torch.tensor([True, False, False])
    asked = torch.randn(B, global_tokens, 4), torch.randn(B, N, 4), given, at, hidden if global_tokens else None
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(*asked, logits_of), model(*asked), atol=1e-4, rtol=1e-4)
