"""What is read off q a few rows at a time is what whole logits give, gradients included."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tatok_model import vit
from tatok_model.entropy import (
    read_distortion,
    read_entropy,
    read_expected,
    read_surprisal,
    read_surprisal_and_expected,
)
from tatok_model.filtering import conditional_entropy, surprisal

N, WIDTH, CODES = 37, 12, 50


@pytest.fixture(params=[1, 7, 1000], ids=["a row at a time", "a few rows", "all rows"])
def rows(request, monkeypatch):
    monkeypatch.setattr(vit, "CPU_PRODUCT", request.param * CODES)


@pytest.fixture
def given():
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CODES)
    return torch.randn(N, WIDTH, requires_grad=True), head, torch.randint(0, CODES, (N,)), torch.randn(CODES, 3)


def gradients(bits, hidden, head):
    """Of a sum in which every row counts differently."""
    return torch.autograd.grad((bits * torch.linspace(-1, 2, N)).sum(), [hidden, head.weight, head.bias])


@pytest.mark.usefixtures("rows")
def test_surprisal_and_its_gradients_are_those_of_whole_logits(given):
    hidden, head, indices, _ = given
    expected, found = surprisal(head(hidden), indices), read_surprisal(hidden, head, indices)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, hidden, head), gradients(expected, hidden, head))


@pytest.mark.usefixtures("rows")
def test_expected_codes_are_those_of_whole_logits_and_carry_no_gradient(given):
    hidden, head, indices, codes = given
    bits, expected = read_surprisal_and_expected(hidden, head, indices, codes)
    torch.testing.assert_close(bits, surprisal(head(hidden), indices))
    torch.testing.assert_close(expected, head(hidden).softmax(-1).detach() @ codes)
    torch.testing.assert_close(read_expected(hidden, head, codes), expected)
    assert bits.requires_grad
    assert not expected.requires_grad
    bits.sum().backward()
    assert hidden.grad is not None


@pytest.mark.usefixtures("rows")
def test_distortion_is_that_of_whole_logits_and_carries_no_gradient(given):
    hidden, head, indices, codes = given
    found = read_distortion(hidden, head, indices, codes)
    q = head(hidden).detach().softmax(-1)
    expected = (codes[indices] - (q[..., None] * codes).sum(1)).square().sum(-1)
    torch.testing.assert_close(found, expected)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)


def test_distortion_is_small_where_the_entropy_model_is_right_and_sure():
    """Unit vectors: 0 where q is certain of the true code, 4 where it is certain of the opposite one."""
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    head = nn.Linear(3, 3)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3) * 100)
        head.bias.zero_()
    sure_of = torch.eye(3)[[0, 0, 0]]
    found = read_distortion(sure_of, head, torch.tensor([0, 1, 2]), codes)
    torch.testing.assert_close(found, torch.tensor([0.0, 4.0, 2.0]))
    unsure = read_distortion(torch.zeros(1, 3), head, torch.tensor([2]), codes)
    torch.testing.assert_close(unsure, torch.tensor([4 / 9]))  # E[c] = (0, 1/3)


@pytest.mark.usefixtures("rows")
def test_without_gradients_the_numbers_are_the_same(given):
    hidden, head, indices, _ = given
    with_gradients = read_surprisal(hidden, head, indices)
    with torch.no_grad():
        torch.testing.assert_close(read_surprisal(hidden, head, indices), with_gradients)
    torch.testing.assert_close(read_entropy(hidden, head), conditional_entropy(head(hidden)).detach())


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_asked_for_is_nothing_read(given, grad):
    _, head, indices, codes = given
    empty = torch.zeros(0, WIDTH, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        bits, expected = read_surprisal_and_expected(empty, head, indices[:0], codes)
        assert (bits.shape, expected.shape) == ((0,), (0, 3))
        assert read_surprisal(empty, head, indices[:0]).shape == (0,)
        assert read_entropy(empty, head).shape == (0,)
        assert read_distortion(empty, head, indices[:0], codes).shape == (0,)
        if grad:
            bits.sum().backward()
            assert not head.weight.grad.any()


def test_huge_logits_give_numbers():
    head = nn.Linear(1, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
        head.bias.zero_()
    found = read_surprisal(torch.tensor([[1e4], [-1e4]]), head, torch.tensor([0, 0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 2e4 / math.log(2)]))


def test_under_autocast_logits_are_made_as_a_linear_layer_makes_them(given):
    hidden, head, indices, codes = given
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(head(hidden).float(), indices, reduction="none") / math.log(2)
        found, _ = read_surprisal_and_expected(hidden, head, indices, codes)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        gradients(found, hidden, head), gradients(expected, hidden, head), atol=2e-2, rtol=2e-2
    )  # bfloat16 has 8 bits
