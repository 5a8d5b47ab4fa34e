"""The thread that talks to the tracking server, so that nothing else has to wait for it.

While the server is away, metrics wait in `metrics.jsonl` and everything else in a queue. `tracking.json` in the run
folder remembers the MLflow run, what it has got and what is queued, so that a resumed run sends the rest.
"""

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.console import say
from pipeline.core.files import masked, write_json
from pipeline.core.run import METRICS as METRICS_FILE
from pipeline.core.run import parse_metrics
from pipeline.tracking.mlflow_store import METRICS, MetricPoint, MlflowStore, in_words, is_final, is_of_run

SAMPLE_SECONDS = 5.0  # between samples of what the machine does
ENDING_PAUSE = 1.0  # seconds between attempts once the run has ended


class Unsent(NamedTuple):
    """Points to send and what is to be remembered once they are."""

    points: list[MetricPoint]
    file: int  # its inode: a rewound file is a new one
    position: int  # bytes of it read so far
    sent: dict[str, int]  # name: last step


class Feed:
    """What MLflow has not got yet of `metrics.jsonl`, read from where the last accepted points ended.

    Two marks decide. What lies beyond the last commit is held back: a resumed run repeats those steps. And a name is
    sent once for each step, in rising order of steps, so that a file that was rewound to an older checkpoint, by this
    process or another, never puts a point into MLflow twice.
    """

    def __init__(self, path: Path, sent: dict[str, int]) -> None:
        self.sent = sent  # name: last step that MLflow has
        self._path = path
        self._file = self._position = self._committed = 0

    def commit(self) -> None:
        """Everything in the file now may be sent."""
        self._committed = self._path.stat().st_size if self._path.exists() else 0

    def next(self, limit: float = METRICS) -> Unsent:
        """The next points, whole lines until there are `limit`; changes nothing.

        A line still being written ends them; one that is not understood is skipped.
        """
        points: list[MetricPoint] = []
        sent = dict(self.sent)
        if not self._committed:
            return Unsent(points, 0, 0, sent)
        with open(self._path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            position = self._position if inode == self._file else 0
            file.seek(position)
            while position < self._committed and len(points) < limit:
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                for logged in parse_metrics(line):
                    fresh = {n: v for n, v in logged.metrics.items() if logged.step > sent.get(n, -math.inf)}
                    points += [MetricPoint(n, v, int(logged.time * 1000), logged.step) for n, v in fresh.items()]
                    sent |= dict.fromkeys(fresh, logged.step)
        return Unsent(points, inode, position, sent)

    def accept(self, unsent: Unsent) -> None:
        """MLflow has these: the next ones lie behind them."""
        self._file, self._position, self.sent = unsent.file, unsent.position, unsent.sent


class Sender:
    """Sends what a run folder holds for the tracking server, in order, retrying until it succeeds.

    Args:
        folder: the run folder; its name becomes the MLflow run's.
        store: where to send; any method may raise or take long. `tracking.json` may know its earlier `run_id`.
        address: of the server, for messages; without credentials.
        parameters, tags: what the server learns about the run when it is opened.
        pause: seconds between rounds, and between attempts while the server is away.
    """

    def __init__(
        self,
        folder: Path,
        store: MlflowStore,
        address: str,
        parameters: dict[str, str],
        tags: dict[str, str],
        pause: float,
    ) -> None:
        self.opened = False  # there is an MLflow run, and store.run_id names it
        self._folder, self._store, self._address, self._pause = folder, store, address, pause
        self._parameters, self._tags = parameters, tags
        remembered = folder / "tracking.json"
        earlier = json.loads(remembered.read_text()) if remembered.exists() else {}
        store.run_id = store.run_id or earlier.get("run_id")
        self._started = earlier.get("started", time.time())
        self._queue: deque[list[Any]] = deque(earlier.get("queue", []))
        self._feed = Feed(folder / METRICS_FILE, earlier.get("sent", {}))
        self._sampled = time.monotonic()
        self._ending = self._reason = ""
        self.away = self.given_up = False  # the server does not answer now; nothing more is sent
        self._saving = threading.Lock()
        self._saved: dict[str, Any] = {}
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def commit(self) -> None:
        """Everything in `metrics.jsonl` may be sent."""
        self._feed.commit()
        self._wake.set()

    def put(self, *item: Any) -> None:
        """Queue one call of the store: the method's name and its arguments, plain values that JSON can hold."""
        self._queue.append(list(item))

    def close(self, ending: str, seconds: float) -> None:
        """Send what is left and mark the run; after `seconds` say what is missing and let it be."""
        self._ending = ending
        self._wake.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.given_up = True
            self._save()
            values, others = len(self._feed.next(limit=math.inf).points), len(self._queue)
            say(
                f"MLflow at {self._address} has not got all of this run: {values} metric values, {others} tags or "
                f"files and how it ended are kept in {self._folder} and sent when the run is resumed"
            )
        elif self.given_up:
            self._save()

    def _work(self) -> None:
        while True:
            self._wake.wait(min(self._pause, ENDING_PAUSE) if self._ending else self._pause)
            self._wake.clear()
            if self.given_up:
                return
            ending = self._ending  # before sending: what is written meanwhile belongs to the next round
            try:
                self._send(ending)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the run
                if not self.opened and is_final(error):
                    self._refuse(error)
                    return
                self._note_outage(error)
                continue
            if self.away:
                self.away = False
                say(f"MLflow at {self._address} answers again and has got what was kept for it")
            if ending:
                return

    def _refuse(self, error: Exception) -> None:
        """Nothing of this run will be taken: said once, and not tried again before it is resumed."""
        say(
            f"nothing is tracked: MLflow at {self._address} does not take this run, {in_words(error)}; what it logs is "
            f"kept in {self._folder} and sent when it is resumed and taken"
        )
        self.given_up = True

    def _note_outage(self, error: Exception) -> None:
        if self.away:
            return
        self.away = True
        reason = masked(" ".join(str(error).split()))[:300]
        say(
            f"MLflow at {self._address} cannot be written to; the run goes on, what it logs is kept and sent later. "
            f"The reason: {type(error).__name__}: {reason}"
        )

    def _send(self, ending: str) -> None:
        """One round. What fails stays first in line for the next one."""
        if not self.opened:
            self._open()
        while (unsent := self._feed.next()).points:
            self._unless_refused(self._store.metrics, unsent.points)
            self._feed.accept(unsent)
            self._save()
        self._feed.accept(unsent)
        while self._queue:
            kind, *arguments = self._queue[0]
            self._unless_refused(getattr(self._store, kind), *arguments)
            self._queue.popleft()
        if time.monotonic() - self._sampled >= SAMPLE_SECONDS:
            self._sample()
        if ending:
            self._unless_refused(self._store.end, ending)
        self._save()

    def _open(self) -> None:
        earlier = self._store.run_id
        self._store.open(self._folder.name, self._started, self._parameters, self._tags)
        if earlier and self._store.run_id != earlier:  # another server, or the run was deleted: it gets everything
            self._feed.sent.clear()
        self.opened = True
        self._save()

    def _unless_refused(self, send: Callable[..., None], *arguments: Any) -> None:
        """Send; what the server will never take is dropped with a warning, or it would hold up all that follows."""
        try:
            send(*arguments)
        except Exception as error:
            if not is_of_run(error):
                raise
            reason = masked(" ".join(str(error).split()))[:300]
            if reason != self._reason:  # what is refused because the run was deleted, is so again and again
                say(f"MLflow refuses something of this run, which stays in {self._folder} only: {reason}")
            self._reason = reason

    def _sample(self) -> None:
        self._sampled = time.monotonic()
        now = time.time()
        step = int(now - self._started)  # seconds since the run first started: goes on rising after a resume
        points = [MetricPoint(name, value, int(now * 1000), step) for name, value in self._store.sample().items()]
        if points:
            self._store.metrics(points)

    def _save(self) -> None:
        with self._saving:
            values = {
                "run_id": self._store.run_id,
                "started": self._started,
                "sent": dict(self._feed.sent),
                "queue": list(self._queue),
            }
            if values != self._saved:
                write_json(self._folder / "tracking.json", values)
                self._saved = values
