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
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipeline.core.config import Config, load_config
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import OutOfRoom, resolve_paths, storage_sentence
from pipeline.core.run import Run, check_folder

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3


def main(stage: str, module: str, description: str | None) -> NoReturn:
    """Run `stage`, whose functions are in `module`, with the arguments of this process; exits."""
    arguments = _parse(description)
    stdout = _own_stdout()
    try:
        config = resolve_paths(load_config(arguments.preset, arguments.overrides))
        steps = import_module(module)
        steps.check(config)
        config = _named(config, config.run.name or steps.default_name(config))
        check_folder(Path(config.run.output) / config.run.name, arguments.resume)
        print(config.to_yaml(), file=stdout, flush=True)
        if arguments.dry_run:
            sys.exit(EXIT_DONE)
        run = Run.open(stage, config, config.run.name, resume=arguments.resume)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    code = execute(run, steps)
    print(f"RUN_FOLDER={run.folder.absolute()}", file=stdout, flush=True)
    sys.exit(code)


def diagnose(description: str | None) -> NoReturn:
    """Tell what is wrong for a preset before anything is run, a line on stdout for each thing; makes no run folder."""
    arguments = _parse(description)
    stdout = _own_stdout()
    problems = 0
    try:
        config = resolve_paths(load_config(arguments.preset, arguments.overrides))
        for finding in import_module("pipeline.doctor").examine(config, ray=not arguments.dry_run):
            problems += bool(finding.problem)
            said = finding.problem or finding.note
            line = f"{'wrong' if finding.problem else 'well '}  {finding.name:<10} {said}"
            print(line.rstrip(), file=stdout, flush=True)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    if problems:
        print(f"error: {problems} thing{'s' if problems > 1 else ''} would fail", file=sys.stderr)
    sys.exit((EXIT_BAD_INPUT if arguments.dry_run else EXIT_FAILED) if problems else EXIT_DONE)


def execute(run: Run, steps: Any) -> int:
    """Run one stage inside its folder and record how it ended; returns the exit code."""
    try:
        _work(run, steps)
    except (Exception, KeyboardInterrupt) as problem:  # noqa: BLE001 - whatever it was, it is reported and recorded
        status, error, code = _outcome(problem)
        if code == EXIT_FAILED:
            traceback.print_exc()
        print(f"{'error' if status == 'failed' else status}: {error}", file=sys.stderr)
        return code
    return EXIT_DONE


def run_nested(stage: str, module: str, config: Config) -> Run:
    """Make a missing input: run another stage in a run folder of its own, going on where an earlier attempt ended.

    Raises whatever that stage raises, and Stopped when a stop was asked for while it worked; its own `summary.json`
    records it too.
    """
    steps = import_module(module)
    steps.check(config)
    config = _named(config, steps.default_name(config))
    run = Run.open(stage, config, config.run.name, resume=True)
    _work(run, steps)
    if run.should_stop:
        raise Stopped(f"{stage} is done, what needs it has not begun")
    return run


def _work(run: Run, steps: Any) -> None:
    """Run the stage; `summary.json` says how it ended whatever it raises."""
    try:
        with _stop_on_signals(run):
            steps.run(run)
    except BaseException as problem:
        try:
            run.write_summary(*_outcome(problem))
        except OSError as error:  # on storage that is full: what ended the run is what is told
            print(f"summary.json still says 'running': {error}", file=sys.stderr)
        raise
    else:
        run.write_summary("finished", exit_code=EXIT_DONE)
    finally:
        run.close()


def _outcome(problem: BaseException) -> tuple[str, str, int]:
    """The status, error and exit code of a run that ended with `problem`."""
    if isinstance(problem, BadInput):
        return "failed", str(problem), EXIT_BAD_INPUT
    if isinstance(problem, Stopped):
        return "stopped", str(problem), EXIT_STOPPED
    if isinstance(problem, KeyboardInterrupt):
        return "stopped", "interrupted", EXIT_STOPPED
    full = str(problem) if isinstance(problem, OutOfRoom) else storage_sentence(problem)
    if full:
        return "failed", full, EXIT_FAILED
    return "failed", " ".join(f"{type(problem).__name__}: {problem}".split()), EXIT_FAILED


def _own_stdout() -> TextIO:
    """The real stdout, for what is promised on it; Ray and libraries print where they like, from now on to stderr."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stdout


def _named(config: Config, name: str) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))


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


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks for an orderly stop, the second one interrupts.

    Only the main thread may hear signals; a stage in another one, as in trials of a sweep, is told otherwise.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if run.should_stop:
            raise KeyboardInterrupt
        run.request_stop()
        # Not print: the signal may come while the interrupted code is inside one, which must not be entered twice.
        os.write(2, f"{signal.Signals(number).name}: saving and stopping (once more to interrupt)\n".encode())

    earlier = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
