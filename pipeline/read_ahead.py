"""Batches that a thread reads while the one before is worked on."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

AHEAD = 4  # batches that wait ready
T = TypeVar("T")


def read_ahead(load: Callable[[int], T], start: int, stop: int) -> Iterator[T]:
    """`load(start)` to `load(stop - 1)`, loaded ahead by a thread; an error in there is raised here."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(AHEAD)
    ended = threading.Event()

    def read() -> None:
        try:
            for step in range(start, stop):
                _put(ready, load(step), ended)
            _put(ready, None, ended)
        except BaseException as error:  # noqa: BLE001 - raised again where the batch was wanted
            _put(ready, error, ended)

    threading.Thread(target=read, daemon=True, name="batches").start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()


def _put(
    ready: "queue.Queue[T | BaseException | None]", item: T | BaseException | None, ended: threading.Event
) -> None:
    while not ended.is_set():
        try:
            return ready.put(item, timeout=0.5)
        except queue.Full:
            continue
    return None
