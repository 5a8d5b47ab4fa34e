"""The stage behind `jobs/calibrate.py`: the threshold at which validation images keep a wanted mean number of tokens.

The held-out split of `data.shards` is the validation split: give the test split to `evaluate` in shards of its own.
"""

from typing import Any

import numpy as np
import yaml

from pipeline.checks import check_score
from pipeline.config import Config
from pipeline.data.manifest import read_manifest
from pipeline.devices import pick_device
from pipeline.errors import BadInput, Stopped
from pipeline.evaluation.inputs import check_inputs, with_tokenizer
from pipeline.paths import write_atomically
from pipeline.pretrained import load_tokenizer
from pipeline.progress import progress, say
from pipeline.run import Run
from pipeline.tracking import Tracker, check_tracking
from pipeline.training import stage as training
from tatok_model.filtering_rules import SCORES

FILE = "filter.yaml"


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: no patch tokens, a wanted mean outside their number, a score without bits, or as training's `check`
            where there is no tokenizer yet.
    """
    tokenizer, section = config.tokenizer, config.filter
    check_tracking(config)
    if not tokenizer.patch_tokens:
        raise BadInput("tokenizer.patch_tokens is false; expected patch tokens to calibrate a cut of")
    if not tokenizer.global_tokens <= section.mean_tokens <= tokenizer.max_tokens:
        raise BadInput(
            f"filter.mean_tokens is {section.mean_tokens:g}; expected {tokenizer.global_tokens} to "
            f"{tokenizer.max_tokens}, the tokens of an image with its global ones"
        )
    if not SCORES[section.score].in_bits:
        raise BadInput(f"filter.score is {section.score!r}; expected a score in bits, or a count of your own choice")
    check_score(config)
    check_inputs(config)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-calibrate-{config.filter.rule}-{config.filter.mean_tokens:g}"


def run(run: Run) -> None:
    """Find the threshold and leave it in `filter.yaml`, as a preset has it.

    Raises:
        BadInput: there is no validation image.
        Stopped: the run was asked to stop.
    """
    from tatok_model.filtering import calibrate, kept_counts

    run.config = config = with_tokenizer(training.with_shards(run.config))
    manifest = read_manifest(config.data.shards)
    run.inputs["shards"] = {"path": config.data.shards, "sha256": manifest.fingerprint}
    tokenizer, sha256 = load_tokenizer(config)
    run.inputs["tokenizer"] = {"path": config.tokenizer.checkpoint, "sha256": sha256}
    with Tracker.start(run, {"data_fingerprint": manifest.fingerprint, "tokenizer_sha256": sha256}):
        units = _score_units(run, tokenizer)
        section, m = config.filter, config.tokenizer.global_tokens
        threshold = calibrate(units, section.rule, section.mean_tokens - m)
        counts = kept_counts(units, section.rule, threshold).double() + m
        run.results = {
            "threshold": threshold,
            "images": len(units),
            "tokens_per_image": float(counts.mean()),
            "tokens_std": float(counts.std(correction=0)),
        }
        run.rewind_metrics(-1)  # a resumed run measures anew
        run.log(run.results, step=0)
        found = {"score": section.score, "rounds": section.rounds, "rule": section.rule, "threshold": threshold}
        found |= {"replay": section.replay}
        path = run.folder / FILE
        write_atomically(path, yaml.safe_dump({"filter": found}, sort_keys=False).encode())
        run.outputs["filter"] = str(path)
        say(
            f"{run.results['tokens_per_image']:.1f} tokens on average over {len(units)} validation images "
            f"(deviation {run.results['tokens_std']:.1f}): filter.rule={section.rule} filter.threshold={threshold!r}"
        )


def _score_units(run: Run, tokenizer: Any) -> Any:
    """(B, N) int64 scores of the validation images in the order of their rankings."""
    import torch

    from pipeline.data.shards import ShardDataset

    config = run.config
    pictures: ShardDataset = ShardDataset(config.data.shards, "heldout")
    count = min(config.evaluate.max_images or len(pictures), len(pictures))
    if not count:
        raise BadInput(f"data.shards {config.data.shards!r} hold out nothing; expected validation pictures")
    device = pick_device("evaluate", config.evaluate.device)
    tokenizer = tokenizer.to(device).eval()
    places = np.arange(count) * len(pictures) // count  # evenly spread: shards may be sorted by class
    found = []
    with progress("calibrate", count, "images") as shown:
        for start in range(0, count, config.evaluate.batch_size):
            batch = pictures.images(places[start : start + config.evaluate.batch_size].tolist())
            images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(device)
            ranked = tokenizer.rank(tokenizer.encode(images), config.filter.score, config.filter.rounds, images)
            found.append(ranked.ranking.score_units.cpu())
            shown.advance(len(batch))
            if run.should_stop:
                raise Stopped("calibration was asked to stop; --resume measures anew")
    return torch.cat(found)
