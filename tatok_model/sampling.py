"""Sampling from a generator: one step per token, with a cache of keys and values, or without to check it.

What a sequence becomes is a function of the generator, its label, its number and the seed: every draw is an inverse
CDF of one uniform number keyed by them, so neither the batch nor the device's random state matters. Sequences that
ended leave the batch.

Shapes: B sequences, A of them still in the batch, M global tokens, T patch tokens, K codebook entries.
"""

import torch
from torch import Tensor

from tatok_model.generator import Generator, check_labels
from tatok_model.generator_config import SIZES, GeneratorConfig, SamplingConfig
from tatok_model.keyed import uniforms
from tatok_model.sequences import Sequences
from tatok_model.stepper import Stepper

LEAVE_SHARE = 1 / 8  # ended sequences leave once they are that share of the batch: leaving copies the cache


@torch.no_grad()
def sample(
    generator: Generator,
    labels: Tensor,
    numbers: Tensor,
    seed: int,
    config: SamplingConfig,
    use_cache: bool = True,
) -> Sequences:
    """Draw one sequence for each label.

    Args:
        generator: in evaluation mode.
        labels: (B,) int64 classes, -1 for no class.
        numbers: (B,) int64, which sample this is: it keys the draws.
        seed: keys the draws too.
        config: temperature, guidance, ...
        use_cache: False computes every step from the beginning: slow, the reference that the cache is tested against.

    Returns:
        B sequences in the order of the labels, on their device.

    Raises:
        ValueError: a class that does not exist.
    """
    check_labels(labels, generator.config.classes)
    m, most = generator.config.global_tokens, generator.config.max_patch_tokens
    draws = uniforms(seed, numbers, m + 2 * most)  # of each global token, then of each position and its code
    rows = Stepper(generator, labels, config, use_cache)
    global_indices = labels.new_zeros(len(labels), m)
    for number in range(m):
        found = draw(rows.global_logits(number), draws[:, number], config.temperature, config.top_k, config.top_p)
        global_indices[:, number] = found
        rows.take_global(found, number)
    codes, places = labels.new_full((len(labels), most), 0), labels.new_full((len(labels), most), -1)
    _draw_patches(rows, config, draws[:, m::2], draws[:, m + 1 :: 2], codes, places)
    counts = (places >= 0).sum(1)
    longest = int(counts.max()) if len(counts) else 0
    return Sequences(global_indices, codes[:, :longest], places[:, :longest].clamp(min=0), counts)


def _draw_patches(
    rows: Stepper, config: SamplingConfig, place_draws: Tensor, code_draws: Tensor, codes: Tensor, places: Tensor
) -> None:
    """Fill (B, T) codes and places; a place that stays -1 is beyond the end of its sequence."""
    active = torch.arange(len(codes), device=codes.device)  # (A,) sequences in the batch, ended ones before they leave
    last = torch.full_like(active, -1)
    for step in range(codes.shape[1]):
        if rows.derived:
            place, ended = torch.full_like(active, step), torch.zeros_like(active, dtype=torch.bool)
        else:
            place = draw(rows.place_logits(last), place_draws[active, step], config.position_temperature)
            ended = place == rows.end
            if ended.float().mean() >= LEAVE_SHARE:
                stay = (~ended).nonzero()[:, 0]
                rows.keep(stay)
                active, place, ended = active[stay], place[stay], ended[stay]
            if not len(active):
                return
        at = place.where(~ended, 0)
        code = draw(rows.code_logits(at), code_draws[active, step], config.temperature, config.top_k, config.top_p)
        # Not by a mask: how many go on is known on the device only, and the host would wait for it.
        codes[active, step], places[active, step] = code.where(~ended, 0), place.where(~ended, -1)
        rows.take_patch(code, at)
        last = place.where(~ended, rows.end - 1)  # nothing lies after it: who ended ends again


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(A,) int64, one choice of each row, by the inverse of its distribution function.

    Args:
        logits: (A, C); -inf is never drawn.
        uniform: (A,) float64 in [0, 1), multiples of 2^-32: a product with the total stays below it.
        temperature: 0 takes the likeliest.
        top_k: only the k likeliest, and what equals the last of them; 0: all.
        top_p: only the likeliest, until they make up this share.
    """
    if temperature == 0:
        return logits.argmax(1)
    scores = logits.double() / temperature
    if 0 < top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    shares = scores.softmax(1)
    if top_p < 1:
        sorted_, order = shares.sort(dim=1, descending=True, stable=True)
        beyond = sorted_.cumsum(1) - sorted_ >= top_p  # what comes before it is enough
        shares = shares.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0)
    below = shares.cumsum(1)
    return torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)[:, 0]


def kv_cache_bytes(config: GeneratorConfig, batch: int, dtype: torch.dtype, guided: bool) -> int:
    """Bytes of keys and values for a batch of sequences of the longest kind; guidance keeps a second set."""
    width, layers, _ = SIZES[config.size]
    return (2 if guided else 1) * batch * 2 * (layers + 1) * config.max_length * width * dtype.itemsize
