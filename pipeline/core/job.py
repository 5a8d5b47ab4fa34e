"""What every entry point in `jobs/` does: parse, check, make the run folder, run one stage, report.

Stdout is the resolved YAML, then `RUN_FOLDER=...`; everything else, workers' output too, goes to stderr.
Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped and resumable.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipeline.core.config import Config
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import OutOfRoom, leave, resolve_paths, storage_sentence
from pipeline.core.presets import load_config
from pipeline.core.run import Run, check_folder, check_resumable, numbered_name
from pipeline.core.stages import MEASURES, Stage, find_stage

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3


def main(name: str, description: str | None) -> NoReturn:
    """Run the stage of this name with the arguments of this process; exits."""
    arguments = parse_arguments(description)
    stdout = own_stdout()
    try:
        config = resolve_paths(load_config(arguments.preset, arguments.overrides))
        config = config.with_values("run", make=config.run.make or arguments.make)
        stage = find_stage(name)
        stage.check(config)
        config = config.with_values("run", name=config.run.name or _default_name(name, config, arguments.resume))
        folder = Path(config.run.output) / config.run.name
        check_folder(folder, arguments.resume)
        if arguments.resume:
            check_resumable(folder)
        print(config.to_yaml(), file=stdout, flush=True)
        if arguments.dry_run:
            leave(EXIT_DONE)
        run = Run.open(name, config, config.run.name, resume=arguments.resume)
    except BadInput as error:
        refuse(error)
    except KeyboardInterrupt:  # nothing is begun yet
        print("stopped: interrupted", file=sys.stderr)
        leave(EXIT_STOPPED)
    code = execute(run, stage)
    print(f"RUN_FOLDER={run.folder.absolute()}", file=stdout, flush=True)
    leave(code)


def _default_name(name: str, config: Config, resume: bool) -> str:
    """The run folder's name when `run.name` is empty; what only measures gets a number where that is taken."""
    default = find_stage(name).default_name(config)
    return numbered_name(Path(config.run.output), default, resume) if name in MEASURES else default


def refuse(error: BadInput) -> NoReturn:
    """Say what is wrong with the input, and exit."""
    print(f"error: {error}", file=sys.stderr)
    leave(EXIT_BAD_INPUT)


def execute(run: Run, stage: Stage) -> int:
    """Run one stage inside its folder and record how it ended; returns the exit code."""
    try:
        _work(run, stage)
    except (Exception, KeyboardInterrupt) as problem:  # noqa: BLE001 - whatever it was, it is reported and recorded
        status, error, code = _outcome(problem)
        if code == EXIT_FAILED:
            traceback.print_exc()
        print(f"{'error' if status == 'failed' else status}: {error}", file=sys.stderr)
        return code
    return EXIT_DONE


def run_nested(name: str, config: Config, folder: str = "") -> Run:
    """Make a missing input: run another stage in a run folder of its own, going on where an earlier attempt ended.

    The folder's name is the stage's default where none is given.

    Raises whatever that stage raises, and Stopped when a stop was asked for while it worked; its own `summary.json`
    records it too.
    """
    stage = find_stage(name)
    stage.check(config)
    config = config.with_values("run", name=folder or stage.default_name(config))
    run = Run.open(name, config, config.run.name, resume=True)
    _work(run, stage)
    if run.should_stop:
        raise Stopped(f"{name} is done, what needs it has not begun")
    return run


def _work(run: Run, stage: Stage) -> None:
    """Run the stage; `summary.json` says how it ended whatever it raises."""
    try:
        with _stop_on_signals(run):
            stage.run(run)
    except BaseException as problem:
        try:
            if isinstance(problem, BadInput) and run.kept_status:  # a mistyped --resume changes nothing
                run.put_back()
            else:
                run.write_summary(*_outcome(problem))
        except OSError as error:  # on storage that is full: what ended the run is what is reported
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


def own_stdout() -> TextIO:
    """The real stdout, for what is promised on it; Ray and libraries print where they like, from now on to stderr."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stdout


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Preset, overrides and the two switches; exits after `--help`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="demo", help="a name in pipeline/configs or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a value of the preset")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the run of the same name")
    parser.add_argument("--make", action="store_true", help="train a model that is needed and that nobody named")
    arguments = parser.parse_intermixed_args()
    if "=" in arguments.preset:  # the preset was left out
        arguments.overrides.insert(0, arguments.preset)
        arguments.preset = "demo"
    return arguments


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks for an orderly stop, the second one interrupts.

    Only the main thread may hear signals; a stage in another thread, as in trials of a sweep, is stopped by the run.
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
