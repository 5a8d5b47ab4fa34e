"""What every entry point in `jobs/` does: parse, check, make the run folder, run one stage, report.

Stdout is `RUN_FOLDER=...`, or the resolved YAML of a dry run; everything else, workers' output too, goes to stderr.
Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped and resumable.
"""

import argparse
import itertools
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pipeline.core.config import Config
from pipeline.core.console import say, say_once, short_path
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import OutOfRoom, in_temporary_copy, leave, resolve_paths, storage_sentence
from pipeline.core.keys import changed, explain, help_page, told_sections
from pipeline.core.presets import load_config
from pipeline.core.run import Run, check_folder, check_resumable, numbered_name
from pipeline.core.stages import MADE, MEASURES, NEXT, READS, Stage, find_stage

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
        if arguments.dry_run:
            print(config.to_yaml(), file=stdout, flush=True)
            leave(EXIT_DONE)
        run = Run.open(name, config, config.run.name, resume=arguments.resume)
    except BadInput as error:
        refuse(error)
    except KeyboardInterrupt:  # nothing is begun yet
        print("stopped: interrupted", file=sys.stderr)
        leave(EXIT_STOPPED)
    introduce(run)
    code = execute(run, stage)
    conclude(run, code)
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
        label = "error" if status == "failed" else status
        print(error if error.startswith(label) else f"{label}: {error}", file=sys.stderr)
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
    introduce(run)
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


# What is said before and after.


def introduce(run: Run) -> None:
    """Say where the run is and what is not as by default, without what another stage of this process has said."""
    say(f"{run.stage}: preset {run.config.preset}, run folder {short_path(run.folder)}")
    for section in told_sections(changed(run.config, READS.get(run.stage, "").split())):
        say_once(section)
    say_once("  all else has its default: --dry-run shows it, --help SECTION explains")


def conclude(run: Run, code: int = EXIT_DONE) -> None:
    """Say what the run made, and the command that comes next."""
    preset, overrides = _typed()
    if code == EXIT_STOPPED:
        name = f"run.name={run.folder.relative_to(run.config.run.output)}"  # a demo would take the next number
        switches = [word for word in sys.argv[1:] if word.startswith("--") and word != "--resume"]
        command = command_line(run.stage, preset, *_without(overrides, "run.name"), name, *switches, "--resume")
        say(f"to go on with it:\n  {command}")
    elif code == EXIT_DONE:
        width = max(map(len, run.outputs), default=0)
        made = [f"  {name:<{width}}  {short_path(path)}" for name, path in run.outputs.items()]
        if made and run.stage != "demo":  # which has said so stage by stage
            say("\n".join([f"{run.stage} made:", *made]))
        with suppress(BadInput):  # what was typed is no longer there
            say(_what_comes_next(run, preset, overrides))


def _what_comes_next(run: Run, preset: str, overrides: list[str]) -> str:
    """What usually comes after a stage, and the command: as this one was typed, with what it made and was made of."""
    config, (job, why, keys) = run.config, NEXT.get(run.stage, ("", "", ""))
    if run.stage == "sweep" and "best" in run.outputs:
        job = "train" if config.sweep.kind == "architecture" else "evaluate"
        return f"next, the best one:\n  {command_line(job, short_path(run.outputs['best']))}"
    if not job or (run.stage == "evaluate" and config.evaluate.generated):
        server = command_line("", "-m", "mlflow", "server", "--backend-store-uri", config.tracking.uri)
        return f"next, curves and pictures of all runs in a browser:\n  {server}"
    values = {key: config.value(key) for key in keys.split() if config.value(key)}
    if run.stage in MADE:
        key, name = MADE[run.stage]
        values[key] = run.outputs[name] if name in run.outputs else run.results[name]
    overrides = _without(overrides, "run.name", *values)
    overrides += [f"{key}={short_path(it) if isinstance(it, str) else repr(it)}" for key, it in values.items()]
    following = resolve_paths(load_config(preset, overrides))
    name = free_name(Path(following.run.output), find_stage(job).default_name(following))
    if name != find_stage(job).default_name(following):
        overrides.append(f"run.name={name}")
    return f"next, {why}:\n  {command_line(job, preset, *overrides)}"


def free_name(folder: Path, name: str) -> str:
    """The name of a run that is not in `folder` yet: this one, or with the next number that is free."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if not (folder / each).exists())


def _typed() -> tuple[str, list[str]]:
    """Preset and overrides of this process's command."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    overrides = [word for word in words if "=" in word]
    return next((word for word in words if "=" not in word), "demo"), overrides


def _without(overrides: list[str], *keys: str) -> list[str]:
    return [text for text in overrides if text.partition("=")[0] not in keys]


def command_line(job: str, *arguments: str) -> str:
    """A command as this process's was typed, of another job; without a job, of the interpreter itself."""
    typed, script = sys.orig_argv, sys.argv[0]
    python = typed[: typed.index(script)] if script in typed else ["python"]
    submitted = ["ray", "job", "submit", "--working-dir", ".", "--"] if in_temporary_copy() and job else []
    return shlex.join([*submitted, *python, *([str(Path(script).with_name(f"{job}.py"))] if job else []), *arguments])


def own_stdout() -> TextIO:
    """The real stdout, for what is promised on it; Ray and libraries print where they like, from now on to stderr."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stdout


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Preset, overrides and the two switches; exits after `--help`."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    topics = "this page, or what a section (train), a key (train.max_steps) or a preset (smoke) is"
    parser.add_argument("-h", "--help", nargs="?", metavar="TOPIC", action=_Help, help=topics)
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


class _Parser(argparse.ArgumentParser):
    """Refuses in one sentence, as everything here does."""

    def error(self, message: str) -> NoReturn:
        refuse(BadInput(f"{message}; expected PRESET, section.key=value without dashes, --dry-run, --resume or --make"))


class _Help(argparse.Action):
    """Explains, at once, whatever else was typed."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        topic = arguments[1]
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
        try:
            print(explain(topic) if topic else f"{parser.format_help()}\n{help_page()}")
        except BadInput as error:
            refuse(error)
        sys.exit(EXIT_DONE)


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
