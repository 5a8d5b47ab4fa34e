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
        """Raise BadInput where it cannot work before anything is made; reads no data, imports neither torch nor ray."""

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
