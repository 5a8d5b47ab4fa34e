"""What every entry point in `jobs/` does: parse, check, make the run folder, run one stage, report.

A stage is a module with three functions, imported after the arguments were understood so that `--help` and bad input
answer at once:

    check(config) -> None            raises BadInput; reads no data, imports neither torch nor ray
    default_name(config) -> str      the run folder's name when run.name is empty
    run(run) -> None                 does the work; fills run.results, run.outputs, run.inputs

Stdout is the resolved YAML, then `RUN_FOLDER=...`; everything else, workers' output too, goes to stderr.
Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped and resumable.
"""

import argparse
import dataclasses
import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

from pipeline.config import Config, load_config
from pipeline.errors import BadInput, Stopped
from pipeline.paths import resolve_paths
from pipeline.run import Run

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3


def main(stage: str, module: str, description: str | None) -> NoReturn:
    """Run `stage`, whose functions are in `module`, with the arguments of this process; exits."""
    arguments = _parse(description)
    # Ray and libraries print where they like: keep the real stdout for the two things that are promised on it.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        config = resolve_paths(load_config(arguments.preset, arguments.overrides))
        steps = import_module(module)
        steps.check(config)
        print(config.to_yaml(), file=stdout, flush=True)
        if arguments.dry_run:
            sys.exit(DONE)
        name = config.run.name or steps.default_name(config)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
        run = Run.open(stage, config, name, resume=arguments.resume)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    code = execute(run, steps)
    print(f"RUN_FOLDER={run.folder.absolute()}", file=stdout, flush=True)
    sys.exit(code)


def execute(run: Run, steps: Any) -> int:
    """Run one stage inside its folder and record how it ended; returns the exit code."""
    _stop_on_signals(run)
    status, error, code = "finished", None, DONE
    try:
        steps.run(run)
    except BadInput as problem:
        status, error, code = "failed", str(problem), BAD_INPUT
    except Stopped as reason:
        status, error, code = "stopped", str(reason), STOPPED
    except KeyboardInterrupt:
        status, error, code = "stopped", "interrupted", STOPPED
    except Exception as problem:
        traceback.print_exc()
        status, error, code = "failed", f"{type(problem).__name__}: {problem}", FAILED
    run.write_summary(status, error, code)
    run.close()
    if error:
        print(f"{'error' if status == 'failed' else status}: {error}", file=sys.stderr)
    return code


def run_nested(stage: str, module: str, config: Config) -> Run:
    """Make a missing input: run another stage in a run folder of its own, going on where an earlier attempt ended.

    Raises whatever that stage raises; its own `summary.json` records it too.
    """
    steps = import_module(module)
    steps.check(config)
    name = steps.default_name(config)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    run = Run.open(stage, config, name, resume=True)
    try:
        steps.run(run)
    except BaseException as problem:
        run.write_summary("stopped" if isinstance(problem, Stopped | KeyboardInterrupt) else "failed", str(problem))
        run.close()
        raise
    run.write_summary("finished", exit_code=DONE)
    run.close()
    return run


def _parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="demo", help="a name in pipeline/configs or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the preset")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the run of the same name")
    arguments = parser.parse_intermixed_args()
    if "=" in arguments.preset:  # the preset was left out
        arguments.overrides.insert(0, arguments.preset)
        arguments.preset = "demo"
    return arguments


def _stop_on_signals(run: Run) -> None:
    """The first SIGTERM or SIGINT asks for an orderly stop, the second one interrupts."""

    def handle(number: int, frame: Any) -> None:
        if run.should_stop:
            raise KeyboardInterrupt
        print(f"{signal.Signals(number).name}: saving and stopping (once more to interrupt)", file=sys.stderr)
        run.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
