"""Random numbers that are a function of their key: the same on every device, in every batch, in every order.

Shapes: B keys, S numbers of each.
"""

import torch
from torch import Tensor


def uniforms(seed: int, numbers: Tensor, count: int) -> Tensor:
    """(B, S) float64 in [0, 1), `count` numbers for each (seed, number), multiples of 2^-32.

    Args:
        seed: any integer.
        numbers: (B,) int64.
        count: S.

    Source: the splitmix64 finaliser over the keys (Steele et al. 2014), in int64 arithmetic that wraps around.
    """
    if numbers.ndim != 1 or numbers.dtype != torch.int64:
        raise ValueError(f"numbers is {numbers.dtype} {tuple(numbers.shape)}; expected int64 (B,)")
    device = numbers.device
    key = _mix(torch.tensor([_signed(seed)], device=device))
    key = _mix(key ^ numbers)
    key = _mix(key[:, None] ^ _mix(torch.arange(1, count + 1, device=device)))
    return _shift(key, 32).double() / 2**32


def _mix(key: Tensor) -> Tensor:
    key = key + _signed(0x9E3779B97F4A7C15)
    key = (key ^ _shift(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ _shift(key, 27)) * _signed(0x94D049BB133111EB)
    return key ^ _shift(key, 31)


def _shift(key: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros; torch's own repeats the sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
