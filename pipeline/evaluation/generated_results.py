"""Numbers of generated pictures: how they are called, how they are had from logits, what stands beside them.

Shapes: B pictures, C classes.
"""

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.plan import SHUFFLE_SEED, SPLIT_IMAGES
from pipeline.evaluation.reference import Reference
from pipeline.evaluation.report import Row
from pipeline.evaluation.results import distance_warnings
from pipeline.generating.generated import Generated
from tatok_model.metrics.scores import InceptionScore

NEIGHBOURS = 3  # k of precision and recall


def distance_name(extractor: Extractor) -> str:
    """Only the real Inception gives a `gfid`."""
    return "gfid" if extractor.comparable else f"gfd_{extractor.name}"


def manifold_names(extractor: Extractor) -> tuple[str, str]:
    """Precision and recall belong to the features they are measured in."""
    ending = "" if extractor.comparable else f"_{extractor.name}"
    return f"precision{ending}", f"recall{ending}"


def inception_score(logits: torch.Tensor) -> float:
    """Of (B, C) logits, dealt by seed 2020 into splits of 5,000, as the evaluator of tokenizers does."""
    splits = score_splits(len(logits))
    score = InceptionScore(logits.shape[1], splits)
    shuffled = np.random.default_rng(SHUFFLE_SEED).permutation(len(logits))
    score.update(logits, torch.from_numpy(shuffled * splits // len(logits)))
    return score.result()


def score_splits(images: int) -> int:
    """Into how many equal splits the Inception score deals the pictures."""
    return max(1, images // SPLIT_IMAGES)


def class_accuracies(logits: torch.Tensor, labels: np.ndarray, name: str) -> dict[str, float]:
    """Share of pictures that a classifier puts into their class, and that of the class with the lowest share.

    Args:
        logits: (B, C).
        labels: (B,) classes, -1 for none; pictures without one do not count.
        name: what the share is called.
    """
    known = labels >= 0
    if not known.any():
        return {}
    hits = logits.argmax(1).numpy()[known] == labels[known]
    shares = {int(label): float(hits[labels[known] == label].mean()) for label in np.unique(labels[known])}
    worst = min(shares, key=lambda label: shares[label])
    return {name: float(hits.mean()), f"{name}_worst": shares[worst], f"{name}_worst_class": worst}


def warnings(
    results: dict[str, float], reference: Reference, extractor: Extractor, compared_lengths: bool
) -> list[str]:
    """What a reader must know before comparing the numbers with others."""
    n, told = int(results["images"]), (reference, extractor.comparable, "generators")
    found = distance_warnings(distance_name(extractor), n, *told)
    if not compared_lengths:
        found.append("token lengths were not compared with real ones: tokens.path is empty")
    return found


def rows(results: dict[str, float], extractor: Extractor, generated: Generated) -> Iterator[Row]:
    """The table: every result with a note, in the order they are in."""
    precision, recall = manifold_names(extractor)
    splits = score_splits(int(results["images"]))
    rate = f"one worker of jobs/generate.py, batch {generated.batch_size}, after warm-up"
    notes = {
        "images": "generated",
        "images_real": "held-out",
        distance_name(extractor): f"Frechet distance, {extractor.name}",
        extractor.score_name: f"of generated images, {extractor.name}, {splits} splits",
        f"{extractor.score_name}_real": f"of held-out originals, {score_splits(int(results['images_real']))} splits",
        precision: f"share of generated images inside the real manifold, k = {NEIGHBOURS}",
        recall: f"share of real images inside the generated manifold, k = {NEIGHBOURS}",
        "images_manifold": "of each kind at most, for precision and recall",
        "class_accuracy": f"share that {extractor.name} puts into the class asked for",
        "class_accuracy_real": "the same of held-out originals",
        "tokens_per_image": "mean, generated",
        "tokens_per_image_real": "mean of held-out and training pictures",
        "tokens_mean_difference": "of the means, relative to the real one",
        "tokens_ks": "Kolmogorov-Smirnov distance of generated and real lengths",
        "tokens_mean_difference_worst": "of the class where it is largest",
        "nearest_train": "median distance to the nearest training picture, mirrored or not, generated",
        "nearest_train_real": "the same of held-out originals",
        "memorisation_ratio": "of the two: far below 1 would mean copies of training pictures",
        "images_train": "among which neighbours were sought",
        "images_per_second": rate,
        "sample_images_per_second": f"tokens alone; {rate}",
        "decode_images_per_second": f"tokens to pictures alone; {rate}",
        "batch_seconds_p50": f"a whole batch; {rate}",
        "stage_images_per_second": "all workers by the clock, their start included",
    }
    for name, value in results.items():
        yield Row(name, value, notes.get(name) or _note_by_form(name))


def _note_by_form(name: str) -> str:
    """Beside names that are made of others."""
    if name.endswith("_worst"):
        return "of the worst class, numbered below"
    if name.startswith("gfd_"):
        return f"Frechet distance, {name.removeprefix('gfd_')}"
    if name.startswith("class_accuracy_") and not name.endswith("_worst_class"):
        return f"the same by {name.removeprefix('class_accuracy_').removeprefix('real_')}"
    return ""
