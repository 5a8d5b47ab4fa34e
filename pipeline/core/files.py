"""Where paths and URLs point, files that appear whole or not at all, and what full storage or memory is reported as.

What is asked of another machine is asked for so long and no longer (`within`): a store that does not answer is bad
input.

Relative paths resolve against `TATOK_ROOT`, else the working directory. Inside a submitted Ray job the working
directory may be a temporary copy: a relative output would vanish with it, so it is refused.
"""

import errno
import hashlib
import json
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from pyarrow import fs

from pipeline.core.config import Config
from pipeline.core.errors import BadInput

INPUT_KEYS = (
    "data.source", "data.heldout_source", "tokenizer.checkpoint", "losses.perceptual_backbone",
    "losses.perceptual_heads", "evaluate.inception_weights", "evaluate.reference", "evaluate.lpips_backbone",
    "evaluate.lpips_heads", "evaluate.blind_checkpoint", "evaluate.more_extractors", "tokens.path",
    "extractor.train_source", "extractor.test_source", "generator.checkpoint", "evaluate.generated",
    "evaluate.extractor", "sweep.checkpoints", "sweep.control",
)  # fmt: skip
TOKENIZERS = ("tokenizer.checkpoint", "sweep.checkpoints", "evaluate.blind_checkpoint")
BOX = Path(str(resources.files("tatok_model"))) / "weights"
T = TypeVar("T")
OUTPUT_KEYS = ("run.output", "data.shards", "tracking.uri")
URL_KEYS = ("data.source", "data.heldout_source", "data.shards", "tokens.path", "evaluate.generated", "tracking.uri")


def in_the_box(name: str) -> bool:
    """Whether a tokenizer of this name comes with the package, and no folder here is called so."""
    return name in boxed() and not (_root() / name).exists()


def boxed() -> list[str]:
    """As `tatok_model.tokenizer.boxed`, which imports torch."""
    return sorted(path.parent.name for path in BOX.glob("*/config.json"))


def resolve_paths(config: Config) -> Config:
    """The configuration with absolute paths; URLs and hub ids stay as they are.

    Raises:
        BadInput: a relative output or tracking path in a temporary copy of the working directory, a URL where only a
            path can be used, a path not in UTF-8.
    """
    for key in INPUT_KEYS + OUTPUT_KEYS:
        section, name = key.split(".")
        config = config.with_values(section, **{name: resolve(key, config.value(key))})
    return config


def resolve(key: str, value: Any) -> Any:
    """The value of one key, as `resolve_paths`."""
    if isinstance(value, tuple):
        return tuple(resolve(key, item) for item in value)
    if key in TOKENIZERS and in_the_box(value):
        return value
    if value == "" or (value == "samples" and key.endswith("source")) or (key == "tracking.uri" and "//" not in value):
        return value
    if key == "evaluate.extractor" and not value.endswith(".safetensors"):
        return value  # a name
    if value.startswith("sqlite:///"):
        return "sqlite:///" + _absolute(key, value.removeprefix("sqlite:///"))
    if "://" in value and key not in URL_KEYS:
        raise BadInput(f"{key} is {masked(value)!r}; expected a path on a file system of this machine, not a URL")
    if "://" in value:
        return value
    if key == "tokenizer.checkpoint" and value.count("/") == 1 and not (_root() / value).parent.exists():
        return value  # a hub id
    return _absolute(key, value)


def _absolute(key: str, value: str) -> str:
    path = Path(value).expanduser()
    if printable(str(_root() / path)) != str(_root() / path):
        raise BadInput(f"{key} is {value!r}, a path that is not UTF-8; expected one that is, such as a link to it")
    if path.is_absolute():
        return str(path)
    if key in OUTPUT_KEYS and in_temporary_copy() and not os.environ.get("TATOK_ROOT"):
        raise BadInput(
            f"{key} is {value!r}, which would vanish with this job's temporary working directory; "
            "expected an absolute path or URL, or TATOK_ROOT set to a folder that lasts"
        )
    return os.path.normpath(_root() / path)


def _root() -> Path:
    return Path(os.environ.get("TATOK_ROOT") or Path.cwd()).absolute()


def in_temporary_copy() -> bool:
    """True inside a Ray job that was submitted with a working directory: Ray runs it in a copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "working_dir_files" in str(Path.cwd())


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside and rename: a reader sees the old bytes or the new ones, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Indented, sorted, atomic; NaN is written as null, which JSON has no other word for."""
    write_atomically(path, (json.dumps(finite(values), indent=2, sort_keys=True) + "\n").encode())


def finite(values: Any) -> Any:
    """The same nested values with null in place of infinite numbers and NaN."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    if isinstance(values, float) and (values != values or abs(values) == float("inf")):
        return None
    return values


def sha256_file(path: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_asking: set[threading.Thread] = set()  # that wait for an answer


def leave(code: int) -> NoReturn:
    """End this process: at once where a library still waits for an answer that nobody wants any more.

    pyarrow's last act in a process is to wait for it.
    """
    if _asking:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """What `call` returns or raises; Ctrl-C and SIGTERM end the wait at once, with KeyboardInterrupt.

    In a thread of its own: libraries in C++ hear no signal, and some ask a dead server for a quarter of an hour. A call
    that was given up ends with the process.

    Raises:
        TimeoutError: no answer after so many seconds.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as problem:  # noqa: BLE001 - raised where it was asked for
            answer.set_exception(problem)
        finally:
            _asking.discard(threading.current_thread())

    asking = threading.Thread(target=work, daemon=True, name="asking")
    _asking.add(asking)
    asking.start()
    with interruptible():
        try:
            return answer.result(seconds)
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"no answer within {seconds:g} s") from None


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals interrupt, as a job's do not otherwise: what waits for an answer has nothing to save."""
    if threading.current_thread() is not threading.main_thread():  # which alone may hear them
        yield
        return
    earlier = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


# Paths and URLs behind one interface: a local path or any file system pyarrow knows (s3://, gs://, file://, ...).


ANSWER_SECONDS = 25.0  # a store is asked twice before anything is read: for itself and for what is in it
_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]*@")


def masked(text: str) -> str:
    """`text` without the `user:password` part of the URLs in it."""
    return _CREDENTIALS.sub("***@", text)


@dataclass(frozen=True)
class Location:
    """A file or folder on a file system.

    Raises, from every method that looks at another machine's:
        FileNotFoundError: nothing is there.
        BadInput: the store refuses, or does not answer, with the key that named it and the reason.
    """

    filesystem: Any
    path: str
    said: str = ""  # the key and URL that named it, for messages

    def __truediv__(self, name: str) -> "Location":
        return replace(self, path=f"{self.path.rstrip('/')}/{name}" if name else self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> "Location":
        """The folder that holds this."""
        return replace(self, path=str(PurePosixPath(self.path).parent))

    @property
    def is_local(self) -> bool:
        """True on this machine's own file system."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def info(self) -> fs.FileInfo:
        """Type and size; the type says when nothing is there."""
        return self._ask(lambda: self.filesystem.get_file_info(self.path))

    def open(self) -> Any:
        """A seekable file object for reading bytes."""
        if self.is_local and printable(self.path) != self.path:  # not UTF-8, which pyarrow asks for
            return open(self.path, "rb")
        return self._ask(lambda: self.filesystem.open_input_file(self.path))

    def read(self) -> bytes:
        """All bytes of a file."""
        with self.open() as file:
            return self._ask(file.read, bounded=False)

    def walk(self, left_out: list[tuple[str, str]] | None = None) -> Iterator[tuple[str, int]]:
        """(path relative to this folder, size in bytes) of every file below, in no order.

        On this machine hidden ones are left out, and so are folders of runs and what cannot be followed; these are
        added to `left_out` with the reason.
        """
        if self.is_local:
            yield from _walk(self.path, "", [], [] if left_out is None else left_out)
            return
        selector = fs.FileSelector(self.path, recursive=True)
        prefix = len(self.path.rstrip("/")) + 1
        # A long listing may take what it takes, but not before the store has answered at all: `info` comes first.
        for info in self._ask(lambda: self.filesystem.get_file_info(selector), bounded=False):
            if info.type == fs.FileType.File:
                yield info.path[prefix:], info.size

    def _ask(self, call: Callable[[], T], bounded: bool = True) -> T:
        seconds = ANSWER_SECONDS if bounded else None
        return call() if self.is_local else _of_store(self.said, call, seconds, FileNotFoundError)


RUN_FILES = {"config.yaml", "summary.json"}  # a folder with both is a run's
TRACKED = ("mlartifacts", "mlflow.db", "mlruns")  # what MLflow writes where it is not told otherwise
OURS = "written by jobs"


def _walk(folder: str, prefix: str, above: list[tuple[int, int]], left_out: list[tuple[str, str]]) -> Iterator[Any]:
    """`Location.walk` on this machine; `above` are device and number of the folders on the way here."""
    try:
        status = os.stat(folder)
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        left_out.append((prefix.rstrip("/"), f"folder cannot be read ({error.strerror})"))
        return
    me = (status.st_dev, status.st_ino)
    names = {entry.name for entry in entries}
    if me in above:
        left_out.append((prefix.rstrip("/"), "link to a folder that it lies in"))
    elif prefix and names >= RUN_FILES:
        left_out.append((prefix.rstrip("/"), OURS))
    else:
        for entry in entries:
            name = prefix + entry.name
            if entry.name in TRACKED:
                left_out.append((name, OURS))
                continue
            try:
                found = entry.stat()
            except OSError as error:
                left_out.append((name, f"link that leads nowhere ({error.strerror})"))
                continue
            if stat.S_ISDIR(found.st_mode):
                yield from _walk(entry.path, f"{name}/", [*above, me], left_out)
            elif stat.S_ISREG(found.st_mode):
                yield name, found.st_size
            else:
                left_out.append((name, "neither file nor folder"))


def printable(name: str) -> str:
    """A name as UTF-8 can hold it: what stands for other bytes, or for half a character, is written out."""
    return re.sub("[\ud800-\udfff]", lambda half: ascii(half[0])[1:-1], name)


def locate(place: str, key: str = "") -> Location:
    """The location that a path or URL names; `key` is the one of the configuration that holds it.

    Raises:
        BadInput: a URL whose scheme pyarrow does not know, or that is malformed; the store does not answer, or lacks a
            library here.
    """
    if "://" not in place:
        return Location(fs.LocalFileSystem(), place)
    said = f"{key} {masked(place)!r}".strip()
    try:
        filesystem, path = _of_store(said, lambda: fs.FileSystem.from_uri(place), ANSWER_SECONDS, ValueError)
    except ValueError as error:
        raise BadInput(
            f"{said} is not understood ({_reason(error)}); expected a path or a URL such as s3://bucket/folder, "
            "gs://bucket/folder, abfs://container@account.dfs.core.windows.net/folder, hf://datasets/owner/name or "
            "file:///folder"
        ) from None
    return Location(filesystem, path, said)


def _of_store(said: str, call: Callable[[], T], seconds: float | None, but: type[Exception]) -> T:
    """What a store answers; what its library raises becomes a sentence, `but` what has a meaning of its own."""
    try:
        return within(seconds, call)
    except but:
        raise
    except Exception as error:  # noqa: BLE001 - each library of each store has its own
        raise BadInput(
            f"{said} cannot be read ({_reason(error)}); expected a store that answers and lets this machine read, or a "
            "path"
        ) from None


def _reason(error: Exception) -> str:
    return masked(" ".join(str(error).split()))[:300] or type(error).__name__


# What to say when storage or memory is full: one sentence, whatever library met it first.

STORAGE_CODES = (errno.ENOSPC, errno.EDQUOT)
STORAGE_TEXTS = ("No space left on device", "Disk quota exceeded")  # libraries that keep the text and not the code
MEMORY_TEXTS = ("CUDA out of memory", "can't allocate memory")  # of torch


class OutOfRoom(Exception):
    """Storage or memory is full: the sentence says what to do. Trying again at once would not help. Exit code 1."""


def storage_sentence(problem: BaseException) -> str:
    """What to say where `problem` came of storage that is full; '' where it did not."""
    for cause in _causes(problem):
        full = isinstance(cause, OSError) and cause.errno in STORAGE_CODES
        if full or any(text in str(cause) for text in STORAGE_TEXTS):
            name = getattr(cause, "filename", None)
            place = f" at {str(name)!r}" if name else ""
            return f"storage is full{place}; what was written before is whole: make space, then go on with --resume"
    return ""


def memory_sentence(problem: BaseException, config: Config, section: str) -> str:
    """What to say where a step of the training in `section` did not fit into memory; '' for other problems."""
    import torch

    for cause in _causes(problem):
        if isinstance(cause, torch.OutOfMemoryError) or any(text in str(cause) for text in MEMORY_TEXTS):
            return _smaller(config, section)
    return ""


def _smaller(config: Config, section: str) -> str:
    """The next smaller number of pictures at a time that divides the batch."""
    train = getattr(config, section)
    share = train.global_batch_size // max(train.num_workers, 1)  # of a worker
    now = train.accumulation  # parts of a share
    if section == "train_generator":  # cut by length too, into as many parts as the larger of the two says
        now = max(now, config.generator.length_groups)
    said = (
        f"memory is full with {-(-share // now)} images at a time ({section}.global_batch_size "
        f"{train.global_batch_size}, num_workers {train.num_workers}, a worker's share in {now} parts)"
    )
    smaller = [parts for parts in range(2 * now, share + 1) if share % parts == 0]
    if not smaller:
        return f"{said}; expected a smaller model or larger memory"
    parts = smaller[0]
    return f"{said}; expected fewer: try {section}.accumulation={parts}, {share // parts} at a time, in a new run"


def _causes(problem: BaseException) -> Iterator[BaseException]:
    """The problem and what it came of."""
    seen: set[int] = set()
    cause: BaseException | None = problem
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
