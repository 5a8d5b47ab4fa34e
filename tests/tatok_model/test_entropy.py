"""The entropy model's short ways give what its plain pass over the whole sequence gives."""

import pytest
import torch

from tatok_model.entropy import EntropyModel, hidden_without_gradients

B, N, K = 3, 16, 20


def model_of(global_tokens, layers):
    torch.manual_seed(0)
    model = EntropyModel(4, global_tokens, N, K, 64, layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("global_tokens", [0, 5])
@pytest.mark.parametrize("case", ["first round", "later round", "hidden globals"])
def test_without_gradients_the_hidden_states_are_those_of_the_plain_pass(global_tokens, layers, case):
    model = model_of(global_tokens, layers)
    given, without_globals = torch.zeros(B, N, dtype=torch.bool), None
    at = ~given
    if case != "first round":
        given = torch.rand(B, N) < 0.5
        at = ~given & (torch.rand(B, N) < 0.7)
    if case == "hidden globals":
        without_globals = torch.tensor([True, False, False])
    asked = torch.randn(B, global_tokens, 4), torch.randn(B, N, 4), given, at, without_globals
    found, expected = hidden_without_gradients(model, *asked), model.hidden(*asked)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.to_logits(found), model(*asked), atol=1e-4, rtol=1e-4)
    assert model(*asked).std() > 1
    assert expected.requires_grad
    assert not found.requires_grad
