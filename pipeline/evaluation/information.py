"""Measures redundancy and mutual information of a frozen tokenizer's codes on held-out images, in this process.

Mutual information takes two entropy models that differ in nothing but what they see. Sizes are compared here; that both
were trained equally long, each on the frozen tokenizer (`train.parts=entropy`), is up to whoever trains them.

Shapes: B images, O orders, M global tokens, N patch positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import BadInput
from pipeline.evaluation.evaluation_checks import check_blind
from pipeline.evaluation.evaluator import ImageSource
from tatok_model.metrics.scores import chain_orders, limit, mutual_information, partners, redundancy, unigram_bits
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

SEED = 0


@dataclass
class Lengths:
    """Code lengths in bits of the images so far."""

    chain: list[np.ndarray] = field(default_factory=list)  # (B, O) with the image's global tokens
    one_pass: list[np.ndarray] = field(default_factory=list)  # (B,)
    null: list[np.ndarray] = field(default_factory=list)  # (B, O) with another image's global tokens
    blind: list[np.ndarray] = field(default_factory=list)  # (B, O) under the model that does not see them
    blind_one_pass: list[np.ndarray] = field(default_factory=list)  # (B,)


@torch.inference_mode()
def measure_information(
    tokenizer: TaTok,
    blind: TaTok | None,
    source: ImageSource,
    places: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Every quantity by its name in summary.json; see `tatok_model.metrics.scores` for what they mean.

    Args:
        tokenizer: with an entropy model that sees the global tokens.
        blind: the same tokenizer with one that does not; None: mutual information is not measured.
        source: held-out images.
        places: (B,) which of them.
        batch_size: images at a time.
        advance: told how many images were measured.
        device: where both compute; they are moved there.

    Raises:
        BadInput: no entropy model that sees the global tokens, or `blind` does not belong to the tokenizer.
    """
    if tokenizer.entropy_model is None:
        raise BadInput("tokenizer.checkpoint has no entropy model; expected one to measure information with")
    if tokenizer.config.global_tokens and not tokenizer.config.entropy_globals:
        raise BadInput("tokenizer.checkpoint has entropy_globals false; expected true: H(c | g) is asked for")
    if blind is not None:
        check_blind(tokenizer, blind)
        blind = blind.to(device).eval()
    tokenizer = tokenizer.to(device).eval()
    orders = torch.from_numpy(chain_orders(tokenizer.config.patch_positions, SEED)).to(device)
    starts = range(0, len(places), batch_size)
    batches = [_encode(tokenizer, source, places[at : at + batch_size], device) for at in starts]
    exchanged = batches if blind is None else _exchanged(batches)
    found = Lengths()
    for tokens, others in zip(batches, exchanged, strict=True):
        found.chain.append(_chain(tokenizer, tokens, orders))
        found.one_pass.append(_one_pass(tokenizer, tokens))
        if blind is not None:
            found.blind.append(_chain(blind, tokens, orders))
            found.blind_one_pass.append(_one_pass(blind, tokens))
            found.null.append(_chain(tokenizer, others, orders))
        advance(len(tokens))
    return _results(tokenizer, found, np.concatenate([tokens.patch_indices.cpu().numpy() for tokens in batches]))


def _encode(tokenizer: TaTok, source: ImageSource, places: np.ndarray, device: torch.device | str) -> Tokens:
    pictures = source.images(places.tolist()).transpose(0, 3, 1, 2)
    return tokenizer.encode(torch.from_numpy(np.ascontiguousarray(pictures)).to(device))


def _exchanged(batches: list[Tokens]) -> list[Tokens]:
    """The same patch tokens, each image with another one's global tokens."""
    global_indices = torch.cat([tokens.global_indices for tokens in batches])  # (B, M)
    global_indices = global_indices[torch.from_numpy(partners(len(global_indices), SEED))]
    parts = global_indices.split([len(tokens) for tokens in batches])
    return [replace(tokens, global_indices=part) for tokens, part in zip(batches, parts, strict=True)]


def _chain(model: TaTok, tokens: Tokens, orders: Tensor) -> np.ndarray:
    """(B, O) code lengths, one position a round."""
    lengths = [model.code_lengths(tokens, order.argsort().expand_as(tokens.patch_indices)) for order in orders]
    return torch.stack(lengths, dim=1).cpu().numpy()


def _one_pass(model: TaTok, tokens: Tokens) -> np.ndarray:
    """(B,) code lengths, no code given."""
    return model.code_lengths(tokens, torch.zeros_like(tokens.patch_indices)).cpu().numpy()


def _results(tokenizer: TaTok, found: Lengths, indices: np.ndarray) -> dict[str, float]:
    chain, one_pass = np.concatenate(found.chain), np.concatenate(found.one_pass)
    results = {
        "images": float(len(chain)),
        "unigram_bits": unigram_bits(indices, tokenizer.config.codebook_size),
        "sum_h_ci_given_g_bits": float(one_pass.mean()),
        "h_c_given_g_bits": float(chain.mean()),
        "redundancy_given_g_bits": redundancy(one_pass, chain),
    }
    if found.blind:
        blind, blind_one_pass = np.concatenate(found.blind), np.concatenate(found.blind_one_pass)
        mutual, low, high = mutual_information(blind, chain, SEED)
        results |= {
            "sum_h_ci_bits": float(blind_one_pass.mean()),
            "h_c_bits": float(blind.mean()),
            "redundancy_bits": redundancy(blind_one_pass, blind),
            "mutual_bits": mutual,
            "mutual_low_bits": low,
            "mutual_high_bits": high,
            "mutual_null_bits": float(blind.mean() - np.concatenate(found.null).mean()),
            "mutual_limit_bits": limit(tokenizer.config.global_tokens, tokenizer.config.codebook_size),
        }
    return {f"information_{name}": value for name, value in results.items()}
