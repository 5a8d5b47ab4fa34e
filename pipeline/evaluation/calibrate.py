"""The stage behind `jobs/calibrate.py`: the threshold that gives validation images a wanted mean token count or PSNR.

Where the score is a squared error it also fits the line from the score a cut drops to PSNR, which the rule `quality`
uses, and saves it beside the tokenizer's weights. The held-out split of `data.shards` is the validation split: give
the test split to `evaluate` in shards of its own.

Shapes: B images, N patch positions.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from pipeline.core.checkpoints import find, load_tokenizer, tokenizer_folder
from pipeline.core.cluster import check_device, pick_device
from pipeline.core.config import Config
from pipeline.core.console import progress, say, short_path
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import write_atomically
from pipeline.core.inputs import check_tokenizer, with_input
from pipeline.core.run import Run
from pipeline.data.checks import check_pictures, check_score
from pipeline.data.shards import read_manifest
from pipeline.tracking import Tracker, check_tracking
from tatok_model.filtering_rules import QUALITY_FILE as LINES_FILE
from tatok_model.filtering_rules import SCORES, QualityLine, lines_json, with_line

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from tatok_model.tokenizer import TaTok
    from tatok_model.tokens import Ranking, Tokens

FILE = "filter.yaml"
DECODED = 512  # images, evenly spread, that are decoded, each at several cuts
DECODED_STEPS = 14  # of a bisection that decodes
SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # of the patch tokens, kept where the line is fitted
NEAR = 1.5  # dB; the share of images whose PSNR is this near to the line's prediction is reported


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: no patch tokens, a wanted mean outside their number, both a number and dB, a score without steps, or
            as training's `check` where there is no tokenizer yet.
    """
    tokenizer, section = config.tokenizer, config.filter
    check_device("evaluate", config.evaluate.device)
    check_tracking(config)
    if not tokenizer.patch_tokens:
        raise BadInput("tokenizer.patch_tokens is false; expected patch tokens to calibrate a cut of")
    if section.mean_psnr and section.mean_tokens:
        raise BadInput(
            f"filter.mean_psnr is {section.mean_psnr:g} and filter.mean_tokens {section.mean_tokens:g}; "
            "expected one of the two"
        )
    if not section.mean_psnr and not tokenizer.global_tokens <= section.mean_tokens <= tokenizer.max_tokens:
        raise BadInput(
            f"filter.mean_tokens is {section.mean_tokens:g}; expected {tokenizer.global_tokens} to "
            f"{tokenizer.max_tokens}, the tokens of an image with its global ones, or filter.mean_psnr"
        )
    if not SCORES[section.score].unit:
        raise BadInput(
            f"filter.score is {section.score!r}; expected one whose steps have scores, or a count you choose"
        )
    check_score(config)
    check_tokenizer(config)
    check_pictures(config)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    section = config.filter
    wanted = f"{section.mean_psnr:g}dB" if section.mean_psnr else f"{section.mean_tokens:g}"
    return f"{config.preset}-calibrate-{section.rule}-{wanted}"


def run(run: Run) -> None:
    """Find the threshold, write it to `filter.yaml` in the form of a preset, and the line beside the weights.

    Raises:
        BadInput: there is no validation image, or all tokens do not reach the wanted PSNR.
        Stopped: the run was asked to stop.
    """
    config = with_input(run.config, "data.shards")
    manifest = read_manifest(config.data.shards)
    run.inputs["shards"] = {"path": config.data.shards, "sha256": manifest.fingerprint}
    run.config = config = with_input(config, "tokenizer.checkpoint")
    tokenizer, sha256 = load_tokenizer(config)
    run.inputs["tokenizer"] = {"path": config.tokenizer.checkpoint, "sha256": sha256}
    run.check_inputs()
    with Tracker.start(run, {"data_fingerprint": manifest.fingerprint, "tokenizer_sha256": sha256}):
        pictures = _RankedImages(run, tokenizer)
        run.results = {}
        if SCORES[config.filter.score].in_signal:
            _fit_line(run, tokenizer, pictures)
        threshold = _threshold(config, pictures)
        counts = pictures.ranking.counts(config.filter.rule, threshold).double() + config.tokenizer.global_tokens
        run.results |= {
            "threshold": threshold,
            "images": len(counts),
            "tokens_per_image": float(counts.mean()),
            "tokens_std": float(counts.std(correction=0)),
        }
        quality = ""
        if config.filter.mean_psnr:
            found = pictures.decibels(config.filter.rule, threshold)
            run.results |= {"psnr": float(found.mean()), "psnr_std": float(found.std())}
            quality = f" and {run.results['psnr']:.2f} dB (deviation {run.results['psnr_std']:.2f})"
        run.rewind_metrics(-1)  # a resumed run measures anew
        run.log(run.results, step=0)
        section = config.filter
        kept = {name: getattr(section, name) for name in ("score", "rounds", "rule", "threshold", "replay")}
        path = run.folder / FILE
        write_atomically(path, yaml.safe_dump({"filter": kept | {"threshold": threshold}}, sort_keys=False).encode())
        run.outputs["filter"] = str(path)
        say(
            f"{run.results['tokens_per_image']:.1f} tokens (deviation {run.results['tokens_std']:.1f}){quality} on "
            f"average over {len(counts)} validation images: filter.rule={config.filter.rule} "
            f"filter.threshold={threshold!r}"
        )


def _threshold(config: Config, pictures: "_RankedImages") -> float:
    """Threshold of the configured rule at which the validation images have the wanted mean.

    Raises:
        BadInput: a PSNR that all tokens do not reach.
    """
    from tatok_model.filtering import bisect, calibrate

    section, positions = config.filter, config.tokenizer.patch_positions
    rule, highest = section.rule, pictures.highest(section.rule)

    def tokens(threshold: float) -> float:
        return float(pictures.ranking.counts(rule, threshold).double().mean())

    def decibels(threshold: float) -> float:
        return float(pictures.decibels(rule, round(threshold) if rule == "count" else threshold).mean())

    if not section.mean_psnr:
        wanted = section.mean_tokens - config.tokenizer.global_tokens
        if rule == "quality":
            return bisect(tokens, wanted, 0.1, highest, grows=True)
        return calibrate(pictures.ranking.score_units, rule, wanted, pictures.ranking.resolution)
    most = float(pictures.decibels("count", positions).mean())
    if section.mean_psnr > most:
        raise BadInput(
            f"filter.mean_psnr is {section.mean_psnr:g}; expected at most {most:.2f} dB, which this tokenizer reaches "
            "with all tokens"
        )
    if rule == "quality":
        return section.mean_psnr
    grows = rule in ("relative", "count")
    found = bisect(decibels, section.mean_psnr, 0.0, highest, grows, DECODED_STEPS)  # every step decodes
    return float(round(found)) if rule == "count" else found


def _fit_line(run: Run, tokenizer: "TaTok", pictures: "_RankedImages") -> None:
    """Fit the line of the rule `quality`, put it into the rankings, and save it beside the weights."""
    dropped, kept, errors = pictures.scores_and_errors()
    section = run.config.filter
    intercept, slope, kept_slope = fit(dropped, kept, errors)
    most = float(pictures.decibels("count", run.config.tokenizer.patch_positions).mean())
    line = QualityLine(section.score, section.rounds, intercept, slope, kept_slope, most)
    off = 10 * np.abs(np.log10((intercept + slope * dropped + kept_slope * kept) / errors))
    run.results |= {
        "line_intercept": intercept, "line_slope": slope, "line_kept_slope": kept_slope, "line_most": most,
        "line_near_share": float((off <= NEAR).mean()),
    }  # fmt: skip
    tokenizer.quality_lines = with_line(tokenizer.quality_lines, line)
    pictures.tokens = replace(pictures.tokens, ranking=replace(pictures.ranking, line=line))
    text = lines_json(tokenizer.quality_lines).encode()
    places, path = [run.folder / LINES_FILE], run.config.tokenizer.checkpoint
    if Path(path).is_absolute():
        places.append(find(path) / LINES_FILE)
    else:  # in the box or of the hub, where nothing is written: a copy that other jobs take by the run's name
        shutil.copytree(tokenizer_folder(run.config), run.folder / "checkpoint", dirs_exist_ok=True)
        places.append(run.folder / "checkpoint" / LINES_FILE)
    for place in places:
        try:
            write_atomically(place, text)
        except OSError as error:
            say(f"warning: {place} cannot be written ({error.strerror}); copy {places[0]} there for the rule quality")
    run.outputs["quality"] = str(places[0])
    say(
        f"quality: {100 * run.results['line_near_share']:.0f}% of cuts come within {NEAR} dB of what is asked for, at "
        f"most {most:.1f} dB can be; {short_path(places[-1])}"
    )


def fit(dropped: np.ndarray, kept: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """Fit error = intercept + slope x dropped + kept_slope x kept, by least squares in dB; returns the three.

    In dB, so that the mean PSNR of images with equal predictions is the predicted one. `dropped` and `kept` are (n,)
    summed scores of tokens, `errors` (n,) mean squared errors of the pictures, above 0.
    """
    from scipy.optimize import least_squares

    targets = np.log(errors)
    with np.errstate(divide="ignore"):
        terms = np.stack([np.zeros_like(targets), np.log(dropped), np.log(kept)])  # (3, n), -inf for log 0
    mean = targets.mean() - np.log(max(float((dropped + kept).mean()), 1e-12))
    start = [targets.min(), mean, mean - 3]
    # Logarithms of the three are fitted, which keeps them positive: log(sum of exp(parameter) x score) per image.
    found = least_squares(lambda line: np.logaddexp.reduce(line[:, None] + terms) - targets, start).x
    intercept, slope, kept_slope = np.exp(found).tolist()
    return intercept, slope, min(kept_slope, 0.99 * slope)  # `QualityLine` needs a token to cost less once it is kept


class _RankedImages:
    """The ranked tokens of n validation images; pixels are read again for those that are decoded.

    Args:
        run: its configuration has the images, the score and the device.
        tokenizer: moved to the device and put into evaluation mode.
    """

    def __init__(self, run: Run, tokenizer: "TaTok") -> None:
        from pipeline.data.shards import ShardDataset
        from tatok_model.tokens import joined

        config = run.config
        self._run, self._batch = run, config.evaluate.batch_size
        self._pictures: ShardDataset = ShardDataset(config.data.shards, "heldout")
        count = min(config.evaluate.max_images or len(self._pictures), len(self._pictures))
        if not count:
            raise BadInput(f"data.shards {config.data.shards!r} hold out nothing; expected validation pictures")
        self._device = pick_device("evaluate", config.evaluate.device)
        self._tokenizer = tokenizer.to(self._device).eval()
        places = np.arange(count) * len(self._pictures) // count  # evenly spread: shards may be sorted by class
        parts = []
        with progress("calibrate", count, "images") as shown:
            for images in self._images(places):
                ranked = tokenizer.rank(tokenizer.encode(images), config.filter.score, config.filter.rounds, images)
                parts.append(ranked.to("cpu"))
                shown.advance(len(images))
        self.tokens = joined(parts)
        self._rows = np.arange(min(count, DECODED)) * count // min(count, DECODED)  # of `tokens`, those to decode
        self._decoded_places = places[self._rows]  # theirs in the held-out split

    @property
    def ranking(self) -> "Ranking":
        """The ranking of all images."""
        if self.tokens.ranking is None:
            raise ValueError("the tokens were not ranked")
        return self.tokens.ranking

    def highest(self, rule: str) -> float:
        """A threshold of a rule at or beyond which nothing changes: the upper end of a bisection."""
        units = self.ranking.score_units
        if rule == "relative":
            return 1.0
        if rule == "count":
            return float(units.shape[1])
        if rule == "quality" and self.ranking.line is not None:
            return self.ranking.line.most
        return float(units.sum(dim=1).max() if rule == "residual" else units.max() + 1) / self.ranking.resolution

    def decibels(self, rule: str, threshold: float) -> np.ndarray:
        """(n,) PSNR in dB of the images that are decoded."""
        return -10 * np.log10(self._errors(self.tokens[self._rows.tolist()].cut(rule, threshold)))

    def scores_and_errors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of decoded images at several cuts: (n,) score sums of dropped, (n,) of kept tokens, (n,) mean squared errors.

        As `quality`, a cut drops score up to one limit for all images: the mean of what is left at a share of `SHARES`.
        """
        some = self.tokens[self._rows.tolist()]
        units = self.ranking.score_units[self._rows].double().numpy() / self.ranking.resolution
        first = np.pad(units.cumsum(1), ((0, 0), (1, 0)))  # (n, N + 1), score sum of the first t tokens
        rest = units.sum(1, keepdims=True) - first  # and of the tokens after them
        dropped, kept, errors = [], [], []
        for share in SHARES:
            cut = some.cut("residual", max(0.0, float(rest[:, round(share * units.shape[1])].mean())))
            left = np.take_along_axis(rest, cut.patch_counts.numpy()[:, None], 1)[:, 0].clip(min=0)
            dropped.append(left)
            kept.append((units.sum(1) - left).clip(min=0))
            errors.append(self._errors(cut))
        return np.concatenate(dropped), np.concatenate(kept), np.concatenate(errors)

    def _errors(self, cut: "Tokens") -> np.ndarray:
        """(n,) mean squared error of each decoded uint8 picture, on the scale [0, 1]; above 0, for the logarithm."""
        from tatok_model.metrics.images import squared_error, to_uint8

        errors, start = [], 0
        for images in self._images(self._decoded_places):
            tokens = cut[start : start + len(images)].to(self._device)
            start += len(images)
            error = squared_error(images, to_uint8(self._tokenizer.decode(tokens))).double().clamp(min=1)
            errors.append((error / (255**2 * images[0].numel())).cpu().numpy())
        return np.concatenate(errors)

    def _images(self, places: np.ndarray) -> Iterator[Any]:
        """(b, 3, H, W) uint8 batches of the held-out pictures at some places, on the device."""
        import torch

        for start in range(0, len(places), self._batch):
            if self._run.should_stop:
                raise Stopped("calibration was asked to stop; --resume measures anew")
            batch = self._pictures.images(places[start : start + self._batch].tolist())
            yield torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(self._device)
