"""Generated pictures against real ones: distances, scores, classes, lengths, neighbours.

For `evaluate.generated` of `jobs/evaluate.py`. Generated pictures are compared with held-out ones; training pictures
serve only to find nearest neighbours.

Shapes: B pictures, R real pictures, F features, C classes.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from pipeline.core.collages import save_rows
from pipeline.core.config import Config
from pipeline.core.console import Row
from pipeline.core.errors import BadInput
from pipeline.core.plots import COLOURS, DPI, save_figure, style
from pipeline.core.run import Run
from pipeline.data.shards import SPLITS, ShardDataset, read_manifest
from pipeline.evaluation.evaluation_checks import check_classes
from pipeline.evaluation.generated_features import FeatureSet, measure_features
from pipeline.evaluation.measurements import SHUFFLE_SEED, make_plan, score_split_of, score_splits
from pipeline.evaluation.reference import (
    Distance,
    Extractor,
    Reference,
    describe,
    known_reference,
    load_extractors,
    new_reference,
)
from pipeline.evaluation.results import distance_warnings, report
from pipeline.generator.generated_files import Generated, read_generated
from pipeline.generator.token_data import TokenDataset
from pipeline.tracking import Tracker
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.manifold import nearest, precision_recall
from tatok_model.metrics.scores import InceptionScore

NEIGHBOURS = 3  # k of precision and recall
MANIFOLD_IMAGES = 10_000  # of each kind at most, for precision and recall
TRAIN_IMAGES = 50_000  # training pictures at most, evenly spread, among which neighbours are sought
SHOWN_NEIGHBOURS = 4  # training pictures beside a generated one
BARS = 60  # at most, of the plot of lengths
VIEW = re.compile(r"@(flip|crop\d+)$")  # ending of the id of a picture's mirror image or shifted copy


def evaluate_generated(run: Run) -> None:
    """Measure, and write a report and pictures to the run folder; `data.shards` names existing shards.

    Raises:
        BadInput: other classes than the shards have, too few pictures, unusable weights or reference statistics.
        Stopped: the run was asked to stop; features that were computed are kept.
    """
    config = run.config
    generated = read_generated(config.evaluate.generated)
    check_classes(config, generated)
    shards = read_manifest(config.data.shards)
    run.inputs["shards"] = {"path": config.data.shards, "sha256": shards.fingerprint}
    run.inputs["generated"] = {"path": config.evaluate.generated, "sha256": generated.manifest.fingerprint}
    run.check_inputs()
    comparison = GeneratedComparison(run, generated)
    facts = comparison.facts()
    with Tracker.start(run, facts) as tracker:
        run.results = comparison.measure()
        run.rewind_metrics(-1)  # a resumed run measures anew
        run.log(run.results, step=0)
        for name, path in comparison.draw().items():
            run.outputs[name] = str(path)
            tracker.picture(path, name, 0)
        title = f"{config.preset}: {generated.images} generated images"
        cautions = warnings(run.results, comparison.distance, comparison.compared_lengths)
        report(run, title, list(rows(run.results, comparison.main, generated)), cautions, facts, tracker)


class GeneratedComparison:
    """Measures generated pictures against real ones as configured in `run.config`, and keeps what `draw` shows.

    Raises:
        BadInput: too few pictures, unusable weights.
    """

    distance: Distance  # the main one; known once measured
    neighbours: tuple[np.ndarray, np.ndarray] | None = None  # places: made (B,), train (B, 4)

    def __init__(self, run: Run, generated: Generated) -> None:
        self.run, self.generated, config = run, generated, run.config
        self.made = ShardDataset(generated.folder, "heldout")
        self.heldout, self.train = (ShardDataset(config.data.shards, split) for split in ("heldout", "train"))
        self.extractors = load_extractors(config.evaluate)
        self.main = self.extractors[0]  # of the main distance, scores, precision and recall, neighbours
        self.plan = make_plan(len(self.heldout), self.main.network.feature_dim, config.evaluate)
        self.compared_lengths = bool(config.tokens.path)
        places = f"evaluate.generated {str(generated.folder)!r}", "the held-out split"
        for place, count in zip(places, (len(self.made), self.plan.count), strict=True):
            if count <= NEIGHBOURS:
                raise BadInput(f"{place} has {count} pictures; expected at least {NEIGHBOURS + 1}")

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return self.generated.lengths()

    @cached_property
    def _real_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return real_lengths(self.run.config)

    def measure(self) -> dict[str, float]:
        """Every metric by its name in summary.json.

        Raises:
            BadInput: kept or given statistics are of other images or another network, token files that cannot be read.
            Stopped: the run was asked to stop; features that were computed are kept.
        """
        results: dict[str, float] = {"images": len(self.made), "images_real": self.plan.count}
        known = [self._known(extractor) for extractor in self.extractors]  # what is refused is refused first
        pairs = [(extractor, *self._features(extractor)) for extractor in self.extractors]
        for (extractor, made, real), reference in zip(pairs, known, strict=True):
            distance = Distance(extractor, reference or self._new(extractor, real))
            results[distance_name(extractor)] = distance.of(statistics(made.features))
            if extractor is self.main:
                self.distance = distance
        _, made, real = pairs[0]
        results[self.main.score_name] = inception_score(made.logits)
        results[f"{self.main.score_name}_real"] = inception_score(real.logits)
        results |= self._manifold(made, real)
        for pair in pairs:
            results |= self._classes(*pair)
        counts = self._lengths[0]
        if self.compared_lengths:
            results |= compare_lengths(*self._lengths, *self._real_lengths)
        else:
            results |= {"tokens_per_image": float(counts.mean()), "tokens_std": float(counts.std())}
        results |= self._memorised(made, real)
        return results | self.generated.speed

    def facts(self) -> dict[str, str]:
        """What the numbers depend on: tags of the MLflow run, and the end of the report."""
        meta = describe(self.heldout.manifest, self.plan, self.main)
        config, generated = self.run.config, self.generated
        sampling = ", ".join(f"{name} {value}" for name, value in generated.sampling.items())
        return {
            "generated": str(generated.folder),
            "generated_fingerprint": generated.manifest.fingerprint,
            "generator_sha256": generated.generator_sha256,
            "tokenizer_sha256": generated.tokenizer_sha256,
            "sampling": f"seed {generated.seed}, {sampling}",
            "data_fingerprint": meta["data"],
            "reference": config.evaluate.reference or f"{meta['images']} held-out originals",
            "extractor": meta["extractor"],
            "extractor_sha256": meta["weights_sha256"],
            "extractor_resize": meta["extractor_resize"],
            "comparable": str(self.main.comparable).lower(),
            "score_splits": str(score_splits(len(self.made))),
            "manifold": f"k = {NEIGHBOURS}, at most {MANIFOLD_IMAGES} images of each kind",
            "crop": meta["crop"],
            "uint8": meta["uint8"],
            "real_lengths": config.tokens.path or "not compared",
            "cut": f"{config.filter.rule} {config.filter.threshold:g}",
            "workers": str(config.evaluate.num_workers),
        }

    def draw(self) -> dict[str, Path]:
        """Pictures by name: generated ones beside their nearest training pictures, and lengths where compared."""
        folder, found = self.run.folder / "pictures", {}
        if self.compared_lengths:
            found["token_lengths"] = folder / "token_lengths.png"
            title = f"Tokens of {len(self.made)} generated and {len(self._real_lengths[0])} real images"
            length_plot(found["token_lengths"], self._lengths[0], self._real_lengths[0], title)
        if self.neighbours is not None:
            samples, beside = (
                source.images(places.ravel().tolist())
                for source, places in zip((self.made, self.train), self.neighbours, strict=True)
            )
            rows = beside.reshape(len(samples), -1, *samples.shape[1:])
            found["nearest_train"] = folder / "nearest_train.png"
            save_rows(found["nearest_train"], list(np.concatenate([samples[:, None], rows], axis=1)))
        return found

    def _features(self, extractor: Extractor, mirrored: bool = False) -> tuple[FeatureSet, FeatureSet]:
        """Features of the generated and of the held-out pictures."""
        run, place, shards = self.run, str(self.generated.folder), self.run.config.data.shards
        name = f"{extractor.name}, mirrored" if mirrored else extractor.name
        own = run.folder / "features" / name.replace(", ", "-")
        made = measure_features(run, f"generated, {name}", self.made, len(self.made), place, extractor, own, mirrored)
        count = self.plan.count
        real = measure_features(run, f"held-out, {name}", self.heldout, count, shards, extractor, None, mirrored)
        return made, real

    def _known(self, extractor: Extractor) -> Reference | None:
        """Statistics of the originals: given for the main extractor, or kept by an earlier run."""
        meta = describe(self.heldout.manifest, self.plan, extractor)
        return known_reference(self.run, meta, extractor, extractor is self.main)

    def _new(self, extractor: Extractor, real: FeatureSet) -> Reference:
        """Those that were measured, kept."""
        meta, features = describe(self.heldout.manifest, self.plan, extractor), statistics(real.features)
        return new_reference(self.run, meta, extractor, extractor is self.main, features, inception_score(real.logits))

    def _manifold(self, made: FeatureSet, real: FeatureSet) -> dict[str, float]:
        count = min(len(made), len(real), MANIFOLD_IMAGES)  # as many of each: neighbour distances shrink as a set grows
        shares = precision_recall(drawn(real.features, count), drawn(made.features, count), NEIGHBOURS)
        return {**dict(zip(manifold_names(self.main), shares, strict=True)), "images_manifold": count}

    def _classes(self, extractor: Extractor, made: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Class accuracies, if the extractor was trained on the classes of the data set; else nothing."""
        ours = tuple(name.lower() for name in self.heldout.manifest.classes)
        if not ours or extractor.network.class_names != ours:
            return {}
        ending = "" if extractor is self.main else f"_{extractor.name}"
        found = class_accuracies(made.logits, made.labels, f"class_accuracy{ending}")
        return found | class_accuracies(real.logits, real.labels, f"class_accuracy_real{ending}")

    def _memorised(self, made: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Distances of generated and held-out pictures, mirrored or not, to their nearest training pictures."""
        count, shown = min(len(self.train), TRAIN_IMAGES), self.run.config.evaluate.nearest
        if not shown or count < SHOWN_NEIGHBOURS:
            return {}
        label, shards = f"training, {self.main.name}", self.run.config.data.shards
        train = measure_features(self.run, label, self.train, count, shards, self.main)
        made_mirrored, real_mirrored = self._features(self.main, mirrored=True)
        distances, indices = nearest_either_way(made, made_mirrored, train, SHOWN_NEIGHBOURS)
        closest = distances[:, 0].argsort(stable=True)[:shown]
        self.neighbours = made.places[closest.numpy()], train.places[indices[closest].numpy()]
        generated = float(distances[:, 0].median())
        heldout = float(nearest_either_way(real, real_mirrored, train)[0].median())
        found = {"nearest_train": generated, "nearest_train_real": heldout, "images_train": count}
        return found if heldout == 0 else {**found, "memorisation_ratio": generated / heldout}


def nearest_either_way(
    plain: FeatureSet, mirrored: FeatureSet, train: FeatureSet, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, k) distances and indices as `nearest`, of each picture or its mirror image, whichever is nearer."""
    distances, indices = nearest(plain.features, train.features, k)
    mirrored_distances, mirrored_indices = nearest(mirrored.features, train.features, k)
    nearer = mirrored_distances[:, :1] < distances[:, :1]
    return torch.where(nearer, mirrored_distances, distances), torch.where(nearer, mirrored_indices, indices)


def statistics(features: torch.Tensor) -> FeatureStatistics:
    """Mean and covariance of (B, F) features."""
    found = FeatureStatistics(features.shape[1])
    found.update(features)
    return found


def drawn(features: torch.Tensor, count: int) -> torch.Tensor:
    """`count` random rows of (B, F) features: the first ones would not have all classes alike."""
    return features[np.random.default_rng(SHUFFLE_SEED).permutation(len(features))[:count]]


# Names, scores and notes.


def distance_name(extractor: Extractor) -> str:
    """`gfid` for the FID Inception only, else `gfd_<extractor>`."""
    return "gfid" if extractor.comparable else f"gfd_{extractor.name}"


def manifold_names(extractor: Extractor) -> tuple[str, str]:
    """Names of precision and recall, with the extractor unless it is the FID Inception."""
    ending = "" if extractor.comparable else f"_{extractor.name}"
    return f"precision{ending}", f"recall{ending}"


def inception_score(logits: torch.Tensor) -> float:
    """Inception score of (B, C) logits, shuffled with seed 2020 into splits of 5,000, as for reconstructions."""
    score = InceptionScore(logits.shape[1], score_splits(len(logits)))
    score.update(logits, torch.from_numpy(score_split_of(len(logits))))
    return score.result()


def class_accuracies(logits: torch.Tensor, labels: np.ndarray, name: str) -> dict[str, float]:
    """Accuracy of a classifier over all pictures and over the class where it is lowest, keyed by `name`.

    Logits are (B, C), labels (B,) classes; pictures without a class, -1, do not count.
    """
    known = labels >= 0
    if not known.any():
        return {}
    hits = logits.argmax(1).numpy()[known] == labels[known]
    shares = {int(label): float(hits[labels[known] == label].mean()) for label in np.unique(labels[known])}
    worst = min(shares, key=lambda label: shares[label])
    return {name: float(hits.mean()), f"{name}_worst": shares[worst], f"{name}_worst_class": worst}


def warnings(results: dict[str, float], distance: Distance, compared_lengths: bool) -> list[str]:
    """Warnings for readers who compare the numbers with others."""
    found = distance_warnings(distance_name(distance.extractor), int(results["images"]), distance, "generators")
    if not compared_lengths:
        found.append("token lengths were not compared with real ones: tokens.path is empty")
    return found


def rows(results: dict[str, float], extractor: Extractor, generated: Generated) -> Iterator[Row]:
    """The table: every result with a note, in the order of `results`."""
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
    """Notes on metrics whose names contain the extractor or an ending."""
    if name.endswith("_worst"):
        return "of the worst class, numbered below"
    if name.startswith("gfd_"):
        return f"Frechet distance, {name.removeprefix('gfd_')}"
    if name.startswith("class_accuracy_") and not name.endswith("_worst_class"):
        return f"the same by {name.removeprefix('class_accuracy_').removeprefix('real_')}"
    return ""


# Are generated token sequences as long as real ones?


def real_lengths(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Token counts of the pictures in `tokens.path` at the configured cut, without mirrored and shifted copies.

    Returns:
        counts: (R,) int64, M + T of each picture of both splits.
        labels: (R,) int64, -1 for none.

    Raises:
        BadInput: a stream that cannot be read or cut; see `TokenDataset.load`.
    """
    counts, labels = [], []
    for split in SPLITS:
        rows = TokenDataset.load(config.tokens.path, split, config.filter)
        originals = np.array([VIEW.search(name) is None for name in rows.ids], dtype=bool)
        counts.append(rows.lengths()[originals])
        labels.append(rows.labels[originals])
    return np.concatenate(counts), np.concatenate(labels)


def compare_lengths(
    counts: np.ndarray, labels: np.ndarray, real_counts: np.ndarray, real_labels: np.ndarray
) -> dict[str, float]:
    """Metrics of generated against real lengths, by name: over all, and for the worst class that both have.

    Counts are (B,) and (R,) tokens of each picture, labels its class or the requested one, -1 for none.
    """
    found = {
        "tokens_per_image": float(counts.mean()),
        "tokens_per_image_real": float(real_counts.mean()),
        "tokens_std": float(counts.std()),
        "tokens_std_real": float(real_counts.std()),
        "tokens_mean_difference": float(counts.mean() / real_counts.mean() - 1),
        "tokens_ks": ks_distance(counts, real_counts),
    }
    classes = np.intersect1d(labels[labels >= 0], real_labels)
    if len(classes):
        pairs = [(counts[labels == label], real_counts[real_labels == label]) for label in classes]
        distances = [ks_distance(*pair) for pair in pairs]
        found["tokens_ks_worst"] = max(distances)
        found["tokens_ks_worst_class"] = int(classes[np.argmax(distances)])
        differences = [float(made.mean() / real.mean() - 1) for made, real in pairs]
        found["tokens_mean_difference_worst"] = max(differences, key=abs)
    return found


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of (B,) and (R,) values: largest gap of their distribution functions, 0 to 1."""
    points = np.union1d(first, second)
    below = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


def length_plot(path: Path, generated: np.ndarray, real: np.ndarray, title: str) -> None:
    """Write a PNG with the histograms of tokens per picture: (R,) real ones filled, (B,) generated ones as a line."""
    least, most = int(min(generated.min(), real.min())), int(max(generated.max(), real.max()))
    step = max(1, math.ceil((most - least + 1) / BARS))  # a bar covers whole tokens, the same number each
    edges = np.arange(least, most + 1 + step, step) - 0.5
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    style(axes, "tokens per image", "share of images", title)
    looks: list[tuple[np.ndarray, str, dict[str, Any]]] = [
        (real, "real", {"color": COLOURS[0], "alpha": 0.55, "linewidth": 0}),
        (generated, "generated", {"color": COLOURS[1], "histtype": "step", "linewidth": 2}),
    ]
    for values, name, look in looks:
        label = f"{name}: mean {values.mean():.1f}, standard deviation {values.std():.1f}"
        axes.hist(values, bins=edges.tolist(), weights=np.full(len(values), 1 / len(values)), label=label, **look)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)  # room for the legend
    save_figure(figure, path)
