"""What to say when storage or memory is full: one sentence, whatever library met it first."""

import errno
from collections.abc import Iterator

from pipeline.config import Config

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
