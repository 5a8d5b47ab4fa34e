"""The stages, by the names of their jobs: the one place that knows where each of them lives.

A stage is a module with the three functions of `Stage`, imported when it is asked for, so that `--help` and bad input
answer at once and lower packages can ask for a stage of a higher one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pipeline.core.config import Config
    from pipeline.core.run import Run

STAGES = {
    "preprocess": "pipeline.data.preprocess",
    "train": "pipeline.training.train",
    "train_extractor": "pipeline.training.train_extractor",
    "tokenize_images": "pipeline.tokens.tokenize",
    "detokenize": "pipeline.tokens.detokenize",
    "train_generator": "pipeline.generator.train_generator",
    "generate": "pipeline.generator.generate",
    "evaluate": "pipeline.evaluation.evaluate",
    "calibrate": "pipeline.evaluation.calibrate",
    "sweep": "pipeline.sweeps.sweep",
    "benchmark": "pipeline.benchmarks.benchmark",
    "demo": "pipeline.demo",
}
MEASURES = ("evaluate", "calibrate", "benchmark")  # stages that measure anew, each time in a folder of its own
TRAINED = "data tokenizer losses kept_sets train"
READS = {  # the sections that decide what a stage does; what differs from the defaults there is said at its start
    "preprocess": "data",
    "train": TRAINED,
    "train_extractor": "data train extractor",
    "tokenize_images": "data tokenizer filter tokens",
    "detokenize": "data tokenizer filter tokens",
    "train_generator": "data tokenizer filter tokens generator train_generator",
    "generate": "tokenizer filter generator generate",
    "evaluate": "data tokenizer filter evaluate",
    "calibrate": "data tokenizer filter evaluate",
    "sweep": f"{TRAINED} filter evaluate sweep",
    "benchmark": f"{TRAINED} filter evaluate tokens generator generate benchmark",
    "demo": "data",  # its stages say the rest
}
MADE = {  # the key that takes what a stage made, and its name in `outputs` or `results`
    "preprocess": ("data.shards", "shards"),
    "train": ("tokenizer.checkpoint", "checkpoint"),
    "train_extractor": ("evaluate.extractor", "extractor"),
    "tokenize_images": ("tokens.path", "tokens"),
    "train_generator": ("generator.checkpoint", "checkpoint"),
    "generate": ("evaluate.generated", "shards"),
    "calibrate": ("filter.threshold", "threshold"),
}
NEXT = {  # what usually comes after a stage: its name, why, and the keys that go on besides that in `MADE`
    "preprocess": ("train", "train a tokenizer on them", ""),
    "train": ("evaluate", "measure it on held-out pictures", "data.shards"),
    "tokenize_images": ("train_generator", "train a generator on them", "data.shards tokenizer.checkpoint"),
    "train_extractor": ("train", "train a tokenizer, which evaluate can then measure with it", "data.shards"),
    "detokenize": ("evaluate", "measure what such a cut costs", "data.shards tokenizer.checkpoint"),
    "train_generator": ("generate", "generate pictures", "data.shards tokenizer.checkpoint tokens.path"),
    "generate": ("evaluate", "measure them", "data.shards tokenizer.checkpoint tokens.path"),
    "evaluate": ("tokenize_images", "write all pictures as tokens", "data.shards tokenizer.checkpoint"),
    "calibrate": ("evaluate", "measure at this threshold", "data.shards tokenizer.checkpoint"),
}
BENCHMARKS = {  # the kinds of the stage `benchmark`: modules with `check` and `run`
    "preprocess": "pipeline.benchmarks.preprocess_speed",
    "ingest": "pipeline.benchmarks.ingest_speed",
    "train_step": "pipeline.benchmarks.train_step",
    "encode": "pipeline.benchmarks.encode_speed",
    "generation": "pipeline.benchmarks.generation_speed",
    "evaluate": "pipeline.benchmarks.evaluate_speed",
    "scaling": "pipeline.benchmarks.scaling",
    "all": "pipeline.benchmarks.every_kind",
}


class Stage(Protocol):
    """What a stage's module has."""

    def check(self, config: "Config") -> None:
        """Raise BadInput where it cannot work before anything is made; reads no data, imports no ray.

        torch is imported only to look for a GPU that is asked for.
        """

    def default_name(self, config: "Config") -> str:
        """The run folder's name when `run.name` is empty."""

    def run(self, run: "Run") -> None:
        """Do the work; fills `run.results`, `run.outputs` and `run.inputs`."""


class Maker(Stage, Protocol):
    """A stage that makes what others read; `inputs.py` says which."""

    def made_of(self, config: "Config") -> dict[str, Any]:
        """Everything that decides what it makes, by key, of a configuration that names its inputs; plain values.

        Where nothing but this is equal, what is made is equal too: inputs are told by fingerprints, not by paths.
        """


def find_stage(name: str) -> Stage:
    """The stage of this name, imported now."""
    return cast(Stage, import_module(STAGES[name]))


def find_benchmark(kind: str) -> Any:
    """The module of one kind of benchmark, imported now."""
    return import_module(BENCHMARKS[kind])
