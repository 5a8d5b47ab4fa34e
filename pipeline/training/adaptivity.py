"""Validation of what makes the tokenizer adaptive: are global tokens used, and does the entropy model know anything?

Shapes: B images, N patch positions.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.evaluation.measurements import Totals
from tatok_model.coding_schedule import grid_schedule
from tatok_model.metrics.images import psnr, to_uint8
from tatok_model.metrics.information import partners
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

IMAGES = 256  # at most, of those that a validation looks at: the entropy model runs some twenty times on each
ROUNDS = 8  # in which the codes of an image are predicted from one another
SEED = 0  # of whose global tokens an image gets
LEAST_GAIN = 0.3  # dB; a loss of less by wrong global tokens means that they are ignored


def quarter(model: TaTok, tokens: Tokens) -> Tokens:
    """The quarter of the patch tokens that the filter keeps first."""
    return model.rank(tokens, "distortion").cut("count", model.config.patch_positions // 4)


def measure(model: TaTok, images: Tensor) -> Totals:
    """Sums over (B, 3, H, W) uint8 images, B at least 2, drawn at random; the tokenizer has an entropy model."""
    tokens = model.encode(images)
    some = quarter(model, tokens)
    everyone = torch.ones(len(images), dtype=torch.bool, device=images.device)
    schedule = grid_schedule(tokens.kept_mask, ROUNDS)
    found = Totals(
        images=len(images),
        psnr_quarter=_psnr(model, images, some),
        psnr_globals_only=_psnr(model, images, some.cut("count", 0)),
        psnr_quarter_shuffled=_psnr(model, images, exchanged(some)),
        bits_one_pass=float(model.code_lengths(tokens, torch.zeros_like(schedule)).sum()),
        bits_chain=float(model.code_lengths(tokens, schedule).sum()),
    )
    if model.config.global_tokens and model.config.entropy_globals:
        found.values["bits_blind"] = float(model.code_lengths(tokens, schedule, everyone).sum())
    return found


def exchanged(tokens: Tokens) -> Tokens:
    """The same patch tokens, each image with the global tokens of another one."""
    return replace(tokens, global_indices=tokens.global_indices[torch.from_numpy(partners(len(tokens), SEED))])


def metrics(totals: Totals, unigram_bits: float) -> dict[str, float]:
    """By their logged names.

    Args:
        totals: over all images.
        unigram_bits: of the patch codes of an image, if each is coded by how often its entry is used.
    """
    means = {name: value / totals.values["images"] for name, value in totals.values.items() if name != "images"}
    means["bits_unigram"] = unigram_bits
    means["bits_redundancy"] = means["bits_one_pass"] - means["bits_chain"]
    if "bits_blind" in means:
        means["bits_mutual"] = means.pop("bits_blind") - means["bits_chain"]
    return {f"validation/{name}": value for name, value in means.items()}


def warnings(found: dict[str, float], globals_exist: bool) -> list[str]:
    """What a reader of the log should look into, given logged metrics."""
    told = []
    quarter_psnr, shuffled = found["validation/psnr_quarter"], found["validation/psnr_quarter_shuffled"]
    if globals_exist and quarter_psnr - shuffled < LEAST_GAIN:
        told.append(
            f"global tokens are ignored: those of other images cost {quarter_psnr - shuffled:.2f} dB at a quarter of "
            f"the patch tokens; expected at least {LEAST_GAIN} dB"
        )
    one_pass, unigram = found["validation/bits_one_pass"], found["validation/bits_unigram"]
    if one_pass >= unigram:
        told.append(
            f"the entropy model is no better than counting codes: {one_pass:.0f} bits an image; expected fewer than "
            f"{unigram:.0f}"
        )
    return told


def distortion_maps(model: TaTok, tokens: Tokens) -> Tensor:
    """(B, 3, H, W) uint8: at each patch black where q expects just its code, white where it knows no better.

    White is the mean squared distance of the codebook's vectors from their own mean.
    """
    ranking, codes = model.rank(tokens, "distortion").ranking, model.code_vectors()[1]
    if ranking is None or codes is None:
        raise ValueError("the tokens were not ranked")
    values = torch.zeros_like(ranking.score_units).scatter(1, ranking.order, ranking.score_units) / ranking.resolution
    grey = (values / codes.var(dim=0, correction=0).sum()).clamp(0, 1) * 255
    side, patch = model.config.grid_size, model.config.patch_size
    maps = grey.view(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return maps.expand(-1, 3, -1, -1).to(torch.uint8)


def _psnr(model: TaTok, images: Tensor, tokens: Tokens) -> float:
    """Sum of the images' PSNR in dB."""
    return float(psnr(images.cpu(), to_uint8(model.decode(tokens)).cpu()).sum())
