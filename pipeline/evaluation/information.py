"""Measures redundancy and mutual information of a frozen tokenizer's codes on held-out images, in this process.

Mutual information takes two entropy models that differ in nothing but what they see. Sizes are compared here; that both
were trained equally long, each on the frozen tokenizer (`train.parts=entropy`), is up to whoever trains them.

Shapes: B images, O orders, M global tokens, N patch positions.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.core.checkpoints import find
from pipeline.core.cluster import pick_device
from pipeline.core.console import progress
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import sha256_file
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.evaluation_checks import BLIND
from pipeline.evaluation.evaluator import EvaluationSetup
from tatok_model.metrics.scores import chain_orders, limit, mutual_information, partners, redundancy, unigram_bits
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

SEED = 0
MODEL = "entropy_model."  # beginning of an entropy model's weights' names


def load_blind(run: Run, tokenizer: TaTok) -> TaTok | None:
    """The second model, noted among the run's inputs; None where none is named.

    Raises:
        BadInput: there is none, or as `check_blind`.
    """
    path = run.config.evaluate.blind_checkpoint
    if not path:
        return None
    folder = find(path, BLIND)
    blind = TaTok.from_pretrained(folder)
    check_blind(tokenizer, blind)
    run.inputs["blind"] = {"path": path, "sha256": sha256_file(folder / "model.safetensors")}
    return blind


def check_blind(tokenizer: TaTok, blind: TaTok) -> None:
    """Refuse a second model that does not belong to the tokenizer.

    Raises:
        BadInput: it sees the global tokens, its entropy model has another size, or other weights than that model's
            differ.
    """
    if blind.entropy_model is None or blind.config.entropy_globals:
        raise BadInput(f"{BLIND} sees the global tokens; expected tokenizer.entropy_globals: false")
    for name in ("entropy_layers", "entropy_width"):
        wanted, given = getattr(tokenizer.config, name), getattr(blind.config, name)
        if given != wanted:
            raise BadInput(f"{BLIND} has {name} {given}; expected {wanted}, as tokenizer.checkpoint")
    ours, theirs = (
        {name: value for name, value in model.state_dict().items() if not name.startswith(MODEL)}
        for model in (tokenizer, blind)
    )
    same = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    if not same:
        raise BadInput(f"{BLIND} is another tokenizer; expected tokenizer.checkpoint, frozen")


def information_results(run: Run, setup: EvaluationSetup, tokenizer: TaTok, blind: TaTok | None) -> dict[str, float]:
    """Redundancy and mutual information, in this process: one position a round is slow however it is shared out."""
    device = pick_device("evaluate", run.config.evaluate.device)
    places = setup.plan.indices(np.arange(setup.plan.count))
    with progress("information", len(places), "images") as shown:

        def advance(count: int) -> None:
            shown.advance(count)
            if run.should_stop:
                raise Stopped("evaluation was asked to stop; --resume measures anew")

        size = setup.plan.batch_size
        return measure_information(tokenizer, blind, setup.pictures, places, size, advance, device)


@torch.inference_mode()
def measure_information(
    tokenizer: TaTok,
    blind: TaTok | None,
    source: ShardDataset,
    places: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Every quantity by its name in summary.json; see `tatok_model.metrics.scores` for what they mean.

    Args:
        tokenizer: with an entropy model that sees the global tokens; it is moved to `device`.
        blind: the same tokenizer with one that does not; None: mutual information is not measured.
        source: held-out images.
        places: (B,) which of them.
        batch_size: images at a time.
        advance: told how many images were measured.
        device: where both compute.

    Raises:
        BadInput: no entropy model that sees the global tokens.
    """
    if tokenizer.entropy_model is None:
        raise BadInput("tokenizer.checkpoint has no entropy model; expected one to measure information with")
    if tokenizer.config.global_tokens and not tokenizer.config.entropy_globals:
        raise BadInput("tokenizer.checkpoint has entropy_globals false; expected true: H(c | g) is asked for")
    tokenizer = tokenizer.to(device).eval()
    orders = torch.from_numpy(chain_orders(tokenizer.config.patch_positions, SEED)).to(device)
    starts = range(0, len(places), batch_size)
    batches = [_encode(tokenizer, source, places[at : at + batch_size], device) for at in starts]
    parts: dict[str, list[np.ndarray]] = defaultdict(list)  # code lengths in bits: (B, O) of a chain, (B,) of one pass
    if blind is not None:
        blind = blind.to(device).eval()
        exchanged = _exchanged(batches)
    for number, tokens in enumerate(batches):
        parts["chain"].append(_chain(tokenizer, tokens, orders))
        parts["one_pass"].append(_one_pass(tokenizer, tokens))
        if blind is not None:
            parts["blind"].append(_chain(blind, tokens, orders))
            parts["blind_one_pass"].append(_one_pass(blind, tokens))
            parts["null"].append(_chain(tokenizer, exchanged[number], orders))
        advance(len(tokens))
    lengths = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return _results(tokenizer, lengths, np.concatenate([tokens.patch_indices.cpu().numpy() for tokens in batches]))


def _encode(tokenizer: TaTok, source: ShardDataset, places: np.ndarray, device: torch.device | str) -> Tokens:
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


def _results(tokenizer: TaTok, lengths: dict[str, np.ndarray], indices: np.ndarray) -> dict[str, float]:
    chain, one_pass = lengths["chain"], lengths["one_pass"]
    results = {
        "images": float(len(chain)),
        "unigram_bits": unigram_bits(indices, tokenizer.config.codebook_size),
        "sum_h_ci_given_g_bits": float(one_pass.mean()),
        "h_c_given_g_bits": float(chain.mean()),
        "redundancy_given_g_bits": redundancy(one_pass, chain),
    }
    if "blind" in lengths:
        blind, blind_one_pass = lengths["blind"], lengths["blind_one_pass"]
        mutual, low, high = mutual_information(blind, chain, SEED)
        results |= {
            "sum_h_ci_bits": float(blind_one_pass.mean()),
            "h_c_bits": float(blind.mean()),
            "redundancy_bits": redundancy(blind_one_pass, blind),
            "mutual_bits": mutual,
            "mutual_low_bits": low,
            "mutual_high_bits": high,
            "mutual_null_bits": float(blind.mean() - lengths["null"].mean()),
            "mutual_limit_bits": limit(tokenizer.config.global_tokens, tokenizer.config.codebook_size),
        }
    return {f"information_{name}": value for name, value in results.items()}
