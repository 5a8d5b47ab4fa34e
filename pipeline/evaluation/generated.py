"""Generated pictures against real ones: distances, scores, classes, lengths, neighbours.

Held-out pictures are what generated ones are compared with; training pictures are only looked for as neighbours.

Shapes: B pictures, F features.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pipeline.data.shards import ShardDataset
from pipeline.errors import BadInput
from pipeline.evaluation.extractors import Extractor, load_extractor, load_more
from pipeline.evaluation.generated_features import FeatureSet, measure_features
from pipeline.evaluation.generated_lengths import compare_lengths, real_lengths
from pipeline.evaluation.generated_plots import length_plot
from pipeline.evaluation.generated_results import (
    NEIGHBOURS,
    class_accuracies,
    distance_name,
    inception_score,
    manifold_names,
    score_splits,
)
from pipeline.evaluation.plan import SHUFFLE_SEED, Plan, make_plan
from pipeline.evaluation.reference import Reference, cache_path, describe, read_cached, read_given
from pipeline.generating.generated import Generated
from pipeline.grids import save_rows
from pipeline.paths import sha256_file
from pipeline.run import Run
from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.manifold import nearest, precision_recall

MANIFOLD_IMAGES = 10_000  # of each kind at most, for precision and recall
TRAIN_IMAGES = 50_000  # training pictures at most, evenly spread, among which neighbours are sought
SHOWN_NEIGHBOURS = 4  # training pictures beside a generated one


@dataclass
class Comparison:
    """One evaluation: what is compared with what, and what was found."""

    run: Run
    generated: Generated
    made: ShardDataset
    heldout: ShardDataset
    train: ShardDataset
    plan: Plan  # of the held-out pictures
    extractor: Extractor  # behind the main distance, scores, precision and recall, neighbours
    more: list[Extractor]  # behind further distances
    reference: Reference = field(init=False)  # of the main extractor; known once measured
    neighbours: tuple[np.ndarray, np.ndarray] | None = field(
        init=False, default=None
    )  # places: made (B,), train (B, 4)

    @classmethod
    def set_up(cls, run: Run, generated: Generated) -> "Comparison":
        """As `run.config` says; `data.shards` names existing shards.

        Raises:
            BadInput: too few pictures, unusable weights.
        """
        config = run.config
        made = ShardDataset(generated.folder, "heldout")
        heldout, train = (ShardDataset(config.data.shards, split) for split in ("heldout", "train"))
        extractor = load_extractor(config.evaluate)
        plan = make_plan(len(heldout), extractor.network.feature_dim, config.evaluate)
        for key, count in (
            (f"evaluate.generated {str(generated.folder)!r}", len(made)),
            ("the held-out split", plan.count),
        ):
            if count <= NEIGHBOURS:
                raise BadInput(f"{key} has {count} pictures; expected at least {NEIGHBOURS + 1}")
        return cls(run, generated, made, heldout, train, plan, extractor, load_more(config.evaluate))

    @property
    def compared_lengths(self) -> bool:
        """Whether there are real lengths to compare with."""
        return bool(self.run.config.tokens.path)

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
        pairs = [(extractor, *self._features(extractor)) for extractor in (self.extractor, *self.more)]
        for pair in pairs:
            results[distance_name(pair[0])] = self._distance(*pair)
        _, made, real = pairs[0]
        results |= self._scores(made, real)
        results |= self._manifold(made, real)
        for pair in pairs:
            results |= self._classes(*pair)
        results |= self._token_lengths()
        results |= self._memorised(made, real)
        return results | self.generated.speed

    def facts(self) -> dict[str, str]:
        """What the numbers depend on: tags of the MLflow run, and the end of the report."""
        meta = describe(self.heldout.manifest, self.plan, self.extractor)
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
            "comparable": str(self.extractor.comparable).lower(),
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
        """Of generated and of held-out pictures."""
        run, place, shards = self.run, str(self.generated.folder), self.run.config.data.shards
        name = f"{extractor.name}, mirrored" if mirrored else extractor.name
        own = run.folder / "features" / name.replace(", ", "-")
        made = measure_features(run, f"generated, {name}", self.made, len(self.made), place, extractor, own, mirrored)
        count = self.plan.count
        real = measure_features(run, f"held-out, {name}", self.heldout, count, shards, extractor, None, mirrored)
        return made, real

    def _distance(self, extractor: Extractor, made: FeatureSet, real: FeatureSet) -> float:
        reference = self._reference(extractor, real)
        if extractor is self.extractor:
            self.reference = reference
        ours = statistics(made.features)
        return frechet_distance(ours.mean(), ours.covariance(), reference.mu, reference.sigma)

    def _reference(self, extractor: Extractor, real: FeatureSet) -> Reference:
        """Statistics of the originals: given for the main extractor, kept by an earlier run, or new and kept."""
        meta, width = describe(self.heldout.manifest, self.plan, extractor), extractor.network.feature_dim
        main = extractor is self.extractor
        given = self.run.config.evaluate.reference if main else ""
        path = Path(given or cache_path(self.run.config.run.output, meta))
        name = "reference" if main else f"reference_{extractor.name}"
        found = read_given(str(path), meta, width) if given else read_cached(path, meta, width)
        if found is not None:
            self.run.inputs[name] = {"path": str(path), "sha256": sha256_file(path)}
            return found
        score = inception_score(real.logits) if main else None
        found = Reference.of(statistics(real.features), score, meta)
        found.save(path)
        self.run.outputs[name] = str(path)
        return found

    def _scores(self, made: FeatureSet, real: FeatureSet) -> dict[str, float]:
        name = self.extractor.score_name
        return {name: inception_score(made.logits), f"{name}_real": inception_score(real.logits)}

    def _manifold(self, made: FeatureSet, real: FeatureSet) -> dict[str, float]:
        count = min(len(made), len(real), MANIFOLD_IMAGES)  # as many of each: balls shrink as a set grows
        shares = precision_recall(drawn(real.features, count), drawn(made.features, count), NEIGHBOURS)
        return {**dict(zip(manifold_names(self.extractor), shares, strict=True)), "images_manifold": count}

    def _classes(self, extractor: Extractor, made: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Of an extractor that was trained on the classes that the data set has; nothing of another one."""
        ours = tuple(name.lower() for name in self.heldout.manifest.classes)
        if not ours or extractor.network.class_names != ours:
            return {}
        ending = "" if extractor is self.extractor else f"_{extractor.name}"
        found = class_accuracies(made.logits, made.labels, f"class_accuracy{ending}")
        return found | class_accuracies(real.logits, real.labels, f"class_accuracy_real{ending}")

    def _token_lengths(self) -> dict[str, float]:
        if self.compared_lengths:
            return compare_lengths(*self._lengths, *self._real_lengths)
        counts = self._lengths[0]
        return {"tokens_per_image": float(counts.mean()), "tokens_std": float(counts.std())}

    def _memorised(self, made: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """How near generated and held-out pictures, mirrored or not, are to training pictures; keeps the nearest."""
        count, shown = min(len(self.train), TRAIN_IMAGES), self.run.config.evaluate.nearest
        if not shown or count < SHOWN_NEIGHBOURS:
            return {}
        label, shards = f"training, {self.extractor.name}", self.run.config.data.shards
        train = measure_features(self.run, label, self.train, count, shards, self.extractor)
        made_mirrored, real_mirrored = self._features(self.extractor, mirrored=True)
        distances, indices = nearest_either_way(made, made_mirrored, train, SHOWN_NEIGHBOURS)
        closest = distances[:, 0].argsort(stable=True)[:shown]
        self.neighbours = made.places[closest.numpy()], train.places[indices[closest].numpy()]
        ours = float(distances[:, 0].median())
        theirs = float(nearest_either_way(real, real_mirrored, train)[0].median())
        found = {"nearest_train": ours, "nearest_train_real": theirs, "images_train": count}
        return found if theirs == 0 else {**found, "memorisation_ratio": ours / theirs}


def nearest_either_way(
    plain: FeatureSet, mirrored: FeatureSet, train: FeatureSet, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `nearest`, for each picture or its mirror image, whichever has the nearer neighbour."""
    ours, theirs = (nearest(made.features, train.features, k) for made in (plain, mirrored))
    nearer = theirs[0][:, :1] < ours[0][:, :1]
    return torch.where(nearer, theirs[0], ours[0]), torch.where(nearer, theirs[1], ours[1])


def statistics(features: torch.Tensor) -> FeatureStatistics:
    """Mean and covariance of (B, F)."""
    found = FeatureStatistics(features.shape[1])
    found.update(features)
    return found


def drawn(features: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of (B, F) rows, drawn at random: generated pictures go through the classes in turn."""
    return features[np.random.default_rng(SHUFFLE_SEED).permutation(len(features))[:count]]
