"""Which images a reader could not replay: verified as `Codec` does when it writes streams, one image at a time.

A ranking made in a batch and its replay on one image may differ in the last bits of the entropy model. Such an image
has its positions sent instead, and is charged for them.

Shapes: B images.
"""

import time
from dataclasses import replace

import numpy as np
from torch import Tensor

from pipeline.evaluation.plan import Plan
from tatok_model.codec import Codec
from tatok_model.stream_header import unseal
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

OPERATING_SAMPLE, CURVE_SAMPLE = 1024, 64  # images, evenly spread, that are verified at a cut: each is replayed alone


class ReplayCheck:
    """Verifies replay on a sample of the plan's images.

    Args:
        tokenizer: where it will compute, in evaluation mode.
        plan: says how many images are measured.
    """

    def __init__(self, tokenizer: TaTok, plan: Plan) -> None:
        self._codec = Codec(tokenizer)
        self._operating, self._curve = (_spread(plan.count, most) for most in (OPERATING_SAMPLE, CURVE_SAMPLE))

    def states(self, tokens: Tokens, numbers: np.ndarray, operating: bool) -> tuple[np.ndarray, float]:
        """Of (B,) images by their numbers in the plan: (B,) int64, 1 replayed, 0 not, -1 not verified; and seconds.

        Args:
            tokens: one cut with replayed positions.
            numbers: (B,) of the images.
            operating: the cut is the operating point, of which more images are verified than of others.
        """
        wanted = np.isin(numbers, self._operating if operating else self._curve).nonzero()[0]
        states = np.full(len(numbers), -1, dtype=np.int64)
        if not len(wanted):
            return states, 0.0
        started = time.perf_counter()
        streams = self._codec.to_bytes(tokens[wanted.tolist()])
        seconds = time.perf_counter() - started
        states[wanted] = [unseal(stream)[0].side.positions == "replayed" for stream in streams]
        return states, seconds


def fallback_bits(tokens: Tokens) -> Tensor:
    """(B,) float64: how many bits more than replayed ones the positions of an image cost once they are sent."""
    sent, positions = replace(tokens.side, positions="sent"), tokens.patch_indices.shape[1]
    return sent.bits(tokens.patch_counts, positions) - tokens.side.bits(tokens.patch_counts, positions)


def charged(bits: np.ndarray, states: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """(B,) bits with fallbacks paid for: verified images as they are, others their share of what a fallback costs.

    Args:
        bits: (B,) as if every image were replayed.
        states: (B,) as `ReplayCheck.states`.
        extra: (B,) as `fallback_bits`.
    """
    return bits + np.where(states < 0, fallback_share(states), states == 0) * extra


def fallback_share(states: np.ndarray) -> float:
    """Of the verified images, how many were not replayed."""
    verified = states[states >= 0]
    return float((verified == 0).mean()) if len(verified) else 0.0


def _spread(count: int, most: int) -> np.ndarray:
    return np.arange(min(count, most)) * count // min(count, most)
