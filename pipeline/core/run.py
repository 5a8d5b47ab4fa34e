"""A run folder: what a stage leaves behind for people and programs to read, and its two files read again.

`summary.json` says how the run stands and ended, `metrics.jsonl` holds every logged metric with its time and
`config.yaml` what was asked for. docs/interface.md is the contract.
"""

import fcntl
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline.core.config import Config
from pipeline.core.errors import BadInput, did_you_mean
from pipeline.core.files import finite, write_atomically, write_json
from pipeline.core.manifest import INPUTS, check_unchanged

SCHEMA_VERSION = 1
CONFIG, SUMMARY, METRICS = "config.yaml", "summary.json", "metrics.jsonl"
PACKAGES = ("tatok", "torch", "ray", "mlflow", "pyarrow", "numpy", "pillow", "vector-quantize-pytorch", "scikit-image")


class Run:
    """One stage's run: its folder, its summary, its metrics, and whether it was asked to stop."""

    def __init__(self, stage: str, config: Config, folder: Path, command: list[str] | None = None) -> None:
        self.stage = stage
        self.config = config
        self.folder = folder
        self.inputs: dict[str, dict[str, str]] = {}
        self.outputs: dict[str, str] = {}
        self.results: dict[str, float] = {}
        self.mlflow_run_id: str | None = None
        self.made_of: dict[str, Any] = {}  # what decides its bytes, where other stages look for such a run
        self.earlier: dict[str, Any] = {}  # the summary of the attempt before this one
        self._stop = threading.Event()
        self.command = command or sys.argv
        self._started = time.time()
        self._config_sha256 = config.sha256()  # as asked for: stages fill in what they make
        self._commit = commit()  # now: the clone may move on while the run lasts
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._files: dict[str, bytes] = {}  # as the attempt before this one left them
        self._logged = 0  # bytes of metrics then

    @classmethod
    def open(cls, stage: str, config: Config, name: str, resume: bool, command: list[str] | None = None) -> "Run":
        """Make the folder `{run.output}/{name}`, or open the one that is there when `resume` is set.

        Raises:
            BadInput: the folder exists and `resume` is not set, another process works in it, it belongs to another
                stage, or it cannot be made.
        """
        folder = Path(config.run.output) / name
        check_folder(folder, resume)
        run = cls(stage, config, folder, command)
        try:
            run._take_folder()
            run._read_earlier()
        except BadInput:
            run.close()
            raise
        write_atomically(folder / CONFIG, config.to_yaml().encode())
        run.write_summary("running")
        return run

    def _take_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - held for as long as the run lives
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"run folder {str(self.folder)!r} is in use by another process; expected a run.name of its own"
            ) from None
        except OSError as error:
            raise BadInput(f"run folder {str(self.folder)!r} cannot be made: {error.strerror}") from None

    def _read_earlier(self) -> None:
        try:
            earlier = read_summary(self.folder)
        except FileNotFoundError:
            return
        if earlier["stage"] != self.stage:
            raise BadInput(
                f"run folder {str(self.folder)!r} holds a run of {earlier['stage']!r}; expected one of {self.stage!r}"
            )
        self.earlier, self.mlflow_run_id = earlier, earlier["mlflow_run_id"]
        there = [name for name in (CONFIG, SUMMARY) if (self.folder / name).exists()]
        self._files = {name: (self.folder / name).read_bytes() for name in there}
        self._logged = self._metric_bytes()

    @property
    def resumed(self) -> bool:
        """Whether there was an attempt before this one."""
        return bool(self.earlier)

    @property
    def kept_status(self) -> str | None:
        """How an earlier attempt stands that this one has not gone on with: it has logged nothing yet."""
        return self.earlier["status"] if self.resumed and self._metric_bytes() == self._logged else None

    def put_back(self) -> None:
        """After bad input that `kept_status` outlives: leave the run as if nobody had asked to go on with it."""
        for name, data in self._files.items():
            write_atomically(self.folder / name, data)

    def check_unchanged(self, begun: dict[str, Any], wanted: dict[str, Any], name_folder: bool = True) -> None:
        """Raises BadInput as `manifest.check_unchanged`, with the names of inputs instead of their fingerprints."""
        inputs = self.earlier.get("inputs", {})
        paths = {key: str(inputs.get(name, {}).get("path", "")) for key, name in INPUTS.items()}
        names = {key: (path, str(self.config.value(key))) for key, path in paths.items()}
        check_unchanged(begun, wanted, self.folder if name_folder else None, names)

    def check_inputs(self) -> None:
        """Refuse to measure something else under the name of a run that is finished.

        Raises:
            BadInput: naming the first of the `inputs` that is another one.
        """
        if self.earlier.get("status") == "finished":
            earlier = self.earlier["inputs"]
            both = {key: name for key, name in INPUTS.items() if name in earlier and name in self.inputs}
            begun, now = ({key: of[name]["sha256"] for key, name in both.items()} for of in (earlier, self.inputs))
            self.check_unchanged(begun, now)

    def _metric_bytes(self) -> int:
        path = self.folder / METRICS
        return path.stat().st_size if path.exists() else 0

    @property
    def should_stop(self) -> bool:
        """True once somebody asked for an early, resumable end."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Ask the stage to save its state and end."""
        self._stop.set()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line to `metrics.jsonl`."""
        if self._metrics is None:
            self._metrics = open(self.folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - closed at the end
        line = {"time": time.time(), "step": step, "metrics": finite(metrics)}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of `metrics.jsonl` after `step`, which a resumed run logs again, and a line torn by a kill."""
        path = self.folder / METRICS
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if any(logged.step <= step for logged in parse_metrics(line))]
        if len(kept) < len(lines):
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None
            write_atomically(path, b"".join(kept))

    def write_summary(self, status: str, error: str | None = None, exit_code: int | None = None) -> None:
        """Write `summary.json`; `status` is running, finished, stopped or failed."""
        summary = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "status": status,
            "error": error,
            "exit_code": exit_code,
            "command": shlex.join(self.command),
            "config_sha256": self._config_sha256,
            "seed": self.config.train.seed,
            **self._commit,
            "hardware": hardware(),
            "versions": versions(),
            "started": datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._started, 3),
            "inputs": self.inputs or self.earlier.get("inputs", {}),
            "made_of": self.made_of or self.earlier.get("made_of", {}),
            "outputs": self.outputs,
            "mlflow_run_id": self.mlflow_run_id,
            "results": self.results,
        }
        write_json(self.folder / SUMMARY, summary)

    def close(self) -> None:
        """Close the files and let others use the folder."""
        for file in (self._metrics, self._lock):
            if file is not None:
                with suppress(OSError):  # of a line that storage had no room for: `log` has raised it before
                    file.close()
        self._metrics = self._lock = None


def read_summary(folder: str | Path) -> dict[str, Any]:
    """What `summary.json` in a run folder says.

    Raises:
        OSError: there is none.
        ValueError: it is torn or foreign.
    """
    summary = json.loads((Path(folder) / SUMMARY).read_text())
    if not isinstance(summary, dict):
        raise ValueError(f"it holds a {type(summary).__name__}")
    return summary


class LoggedLine(NamedTuple):
    """One line of `metrics.jsonl`."""

    time: float  # seconds since 1970
    step: int
    metrics: dict[str, float]  # NaN where the file has null


def read_metrics(folder: str | Path, holding: str = "") -> list[LoggedLine]:
    """What a run has logged so far, oldest first; nothing where there is no file yet.

    Args:
        folder: of the run.
        holding: only lines that hold this metric, which spares parsing the others.
    """
    path = Path(folder) / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return parse_metrics(b"".join(line for line in lines if holding.encode() in line))


def parse_metrics(data: bytes) -> list[LoggedLine]:
    """Complete, valid lines of `metrics.jsonl`; others are skipped."""
    found = []
    for line in data[: data.rfind(b"\n") + 1].splitlines():  # without an unfinished last line
        try:
            entry = json.loads(line)
            # JSON has no NaN: it was written as null.
            values = {name: math.nan if value is None else float(value) for name, value in entry["metrics"].items()}
            found.append(LoggedLine(float(entry["time"]), int(entry["step"]), values))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse to write over an earlier run.

    Raises:
        BadInput: there is something at `folder` and `resume` is not set.
    """
    if not resume and not _is_free(folder):
        raise BadInput(f"run folder {str(folder)!r} exists; expected a new run.name, or --resume to go on with it")


def check_resumable(folder: Path) -> None:
    """Refuse to go on with a run that there is not.

    Raises:
        BadInput: naming the run whose name is nearest.
    """
    if _is_free(folder):
        runs = [path.parent.name for path in folder.parent.glob(f"*/{SUMMARY}")]
        raise BadInput(
            f"run folder {str(folder)!r} does not exist, so that --resume has nothing to go on with"
            f"{did_you_mean(folder.name, runs)}; expected the run.name of one that does, or no --resume"
        )


def numbered_name(output: Path, name: str, resume: bool) -> str:
    """`name`, `name-2`, `name-3`, ...: the first that is free, or, to go on with it, the last that is not."""
    number = 1
    while not _is_free(output / _numbered(name, number)):
        number += 1
    return _numbered(name, number - 1 if resume and number > 1 else number)


def _numbered(name: str, number: int) -> str:
    return f"{name}-{number}" if number > 1 else name


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def wait_while_held(folder: Path, seconds: float) -> bool:
    """Wait until no process works in a run folder, at most so long; whether one still does."""
    limit = time.monotonic() + seconds
    while True:
        try:
            with open(folder / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            if time.monotonic() >= limit:
                return True
            time.sleep(0.2)


def commit() -> dict[str, Any]:
    """The commit of the code and whether it was changed since; `unknown` outside a clone."""
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder)]
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode:
            return {"commit": os.environ.get("TATOK_COMMIT", "unknown"), "dirty": False}
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
        return {"commit": name.stdout.strip(), "dirty": bool(changes.stdout.strip())}
    except (OSError, subprocess.SubprocessError):
        return {"commit": os.environ.get("TATOK_COMMIT", "unknown"), "dirty": False}


def hardware() -> dict[str, Any]:
    """What the driver runs on. GPUs are named only where torch is loaded: it is not worth loading for this."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": gpus,
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
