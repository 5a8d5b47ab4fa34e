"""The stage behind `make demo`: every stage on photographs that ship inside scikit-image, in minutes on two cores."""

import time
from pathlib import Path

from pipeline.core.config import Config
from pipeline.core.console import say, short_path
from pipeline.core.job import command_line, conclude, run_nested
from pipeline.core.run import Run
from pipeline.core.stages import find_stage

STAGES = ("train", "evaluate", "tokenize_images", "train_generator", "generate")  # each takes what those before it left


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; see the checks of evaluating and generating, the last stages."""
    inside = _inside(config, default_name(config))
    for stage in ("evaluate", "generate"):
        find_stage(stage).check(inside)


def default_name(config: Config) -> str:
    """`demo-1`, or the next number that is free: the demo can be run again and again."""
    output = Path(config.run.output)
    number = 1
    while (output / f"{config.preset}-{number}").exists():
        number += 1
    return f"{config.preset}-{number}"


def run(run: Run) -> None:
    """A tokenizer, its numbers, its tokens, a generator of them; the stages' runs lie inside this run's folder."""
    started = time.monotonic()
    config = _inside(run.config, run.folder.name)
    for stage in STAGES:
        say(f"\n== {stage} ==")
        done = run_nested(stage, config)
        conclude(done)
        run.results |= {f"{stage}_{name}": value for name, value in done.results.items()}
        run.outputs |= {f"{stage}_{name}": path for name, path in done.outputs.items()}
        if stage == "train":  # the preset names what training starts from, the others take what came of it
            config = config.with_values("tokenizer", checkpoint=done.outputs["checkpoint"])
    run.results["seconds"] = time.monotonic() - started
    shown = {
        "held-out pictures with a slider": "evaluate_page",
        "originals over reconstructions": "evaluate_reconstructions",
        "generated pictures": "generate_samples",
    }
    say(f"\nThe demo took {run.results['seconds']:.0f} s.")
    for what, name in shown.items():
        say(f"  {what:<31}  {short_path(run.outputs.get(name, 'none drawn'))}")
    say(f"your own pictures:\n  {command_line('train', 'demo', 'data.source=FOLDER', 'run.name=mine')}")


def _inside(config: Config, name: str) -> Config:
    """The configuration of the stages: their run folders lie inside the demo's."""
    return config.with_values("run", output=str(Path(config.run.output) / name), name="", make=True)
