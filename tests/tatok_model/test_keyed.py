import pytest
import torch

from tatok_model.generation.sampling import uniforms


def test_numbers_depend_on_their_key_alone() -> None:
    many = uniforms(3, torch.arange(50), 7)
    assert torch.equal(uniforms(3, torch.tensor([41, 2]), 7), many[[41, 2]])
    assert torch.equal(uniforms(3, torch.arange(50), 4), many[:, :4])


def test_another_seed_gives_other_numbers() -> None:
    assert not torch.equal(uniforms(0, torch.arange(5), 2), uniforms(1, torch.arange(5), 2))
    assert torch.equal(uniforms(-1, torch.arange(5), 2), uniforms(2**64 - 1, torch.arange(5), 2))


def test_numbers_are_uniform_and_below_one() -> None:
    found = uniforms(0, torch.arange(2000), 50)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1 - 2**-32
    counts = torch.histc(found.flatten(), bins=20, min=0, max=1)
    expected = found.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8  # chi-square, 19 degrees of freedom, 0.1%
    centred = found - 0.5
    assert abs(float((centred[:, 0] * centred[:, 1]).mean())) < 0.01
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 0.002


def test_numbers_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="expected int64"):
        uniforms(0, torch.zeros(2, 2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="expected int64"):
        uniforms(0, torch.zeros(2), 1)
