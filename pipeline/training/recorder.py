"""What a training leaves behind, written by its first worker: metrics, pictures, checkpoints, progress.

The driver follows it: `followed` reports new checkpoints and pictures to the tracker, and passes on a wish to stop.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import checkpoints
from pipeline.core.collages import save_rows
from pipeline.core.config import TrainConfig
from pipeline.core.console import Progress, say
from pipeline.core.files import write_json
from pipeline.core.run import Run
from pipeline.tracking import Tracker
from pipeline.training import distributed
from pipeline.training.state import TrainState

NOT_FINITE = "not_finite"  # folder in the run folder: ids of batches whose loss or gradient was NaN or infinite
HEADLINES = ("psnr", "psnr_quarter", "ssim", "bits_per_image", "bits_per_token")  # said; metrics.jsonl has the rest
STOP_FILE = "stop"  # in the run folder: the driver was told to end
SECONDS_BETWEEN_LOOKS = 0.5


class Recorder:
    """Writes what a training leaves behind; on other workers than the first it writes nothing.

    Args:
        run: the run folder.
        config: of the training.
        decides: what decides the weights of a step, by key; checkpoints keep it.
        state: where the run starts from.
        ids: the samples of a step, counted from 0, by where they came from.
    """

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        decides: dict[str, Any],
        state: TrainState[Any],
        ids: Callable[[int], list[str]],
    ) -> None:
        self.run, self.config, self.decides, self.ids = run, config, decides, ids
        self.validation: dict[str, float] = {}  # the latest metrics
        self.latest: dict[str, float] = {}  # with the loop's own
        self.first = distributed.rank() == 0
        self._seconds, self._started = state.seconds, time.monotonic()
        self._first_step = self._shown_step = state.step
        self._warned: set[str] = set()
        self._progress: Progress | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        if self.first:
            run.rewind_metrics(state.step)
            checkpoints.remove_leftovers(run.folder / "checkpoints")
            batch, steps = config.global_batch_size, config.max_steps
            self._progress = Progress("train", batch * steps, "images", done=batch * state.step)

    def stepped(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.advance((step - self._shown_step) * self.config.global_batch_size)
        self._shown_step = step

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append the loop's metrics to metrics.jsonl."""
        self.latest = metrics | self.validation
        if self._progress is not None:
            self.run.log(metrics, step)
            self._progress.advance(0, loss=f"{metrics.get('train/loss', float('nan')):.4g}")

    def validated(self, metrics: dict[str, float], step: int) -> None:
        """Append what validation measured."""
        self.validation = metrics
        self.latest |= metrics
        if self.first:
            self.run.log(metrics, step)
            found = {name.removeprefix("validation/"): value for name, value in metrics.items()}
            shown = [f"{name} {found[name]:.4g}" for name in found if name in HEADLINES or name.startswith("rfd_")]
            say(f"step {step}: {', '.join(shown)}")

    def show(self, rows: list[np.ndarray], warnings: list[str], step: int) -> None:
        """Draw rows of pictures, (B, H, W, 3) uint8 each, and say what a reader of the log should look into."""
        if rows:
            save_rows(self.run.folder / "pictures" / f"step-{step:08d}.png", rows)
        for text in warnings:
            what = text.partition(":")[0]  # without its numbers
            if what not in self._warned:
                say(f"warning: {text}")
            self._warned.add(what)

    def save(self, state: TrainState[Any]) -> None:
        """Copy the state to main memory and have it written beside training.

        Waits for the checkpoint before, so that at most one copy is kept, and raises what went wrong with it.
        """
        self._wait()
        if self.first:
            average, tensors = state.snapshot()
            samples = state.step * self.config.global_batch_size
            record = {"samples_seen": samples, "seconds": self.seconds(), "decides": self.decides}
            folder, keep = self.run.folder / "checkpoints", self.config.keep_checkpoints
            self._writing = self._writer.submit(checkpoints.save, folder, state.step, average, tensors, keep, **record)
        elif state.sharded:
            state.snapshot()  # the first worker's needs the others' parts

    def _wait(self) -> None:
        """Return when nothing is being written; raises what the last writing raised, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def keep_ids(self, step: int) -> str:
        """Keep which samples a step, counted from 1, saw whose loss or gradient was NaN or infinite; says where."""
        place = f"{NOT_FINITE}/step-{step:08d}.json"
        if self.first:
            (self.run.folder / NOT_FINITE).mkdir(exist_ok=True)
            write_json(self.run.folder / place, {"step": step, "ids": self.ids(step - 1)})
        return place

    def stop_reason(self) -> str:
        """Why the driver wants to end; '' to go on."""
        return "stopped" if (self.run.folder / STOP_FILE).exists() else ""

    def seconds(self) -> float:
        """Spent on this run, earlier attempts up to the checkpoint they left included."""
        return self._seconds + time.monotonic() - self._started

    def results(self, state: TrainState[Any]) -> dict[str, float]:
        """What summary.json says of the run."""
        batch = self.config.global_batch_size
        here = (state.step - self._first_step) * batch / max(time.monotonic() - self._started, 1e-9)
        return {
            **{name.replace("/", "_"): value for name, value in self.validation.items()},
            "steps": float(state.step),
            "images_seen": float(state.step * batch),
            "train_seconds": self.seconds(),
            "images_per_second": here,  # of this attempt, validations and checkpoints included
            "parameters": float(sum(p.numel() for p in state.model.parameters())),
        }

    def close(self) -> None:
        """End the progress bar; return when the last checkpoint is safe, or raise why it is not."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.close()
        try:
            self._wait()
        finally:
            self._writer.shutdown()


@contextmanager
def followed(run: Run, tracker: Tracker, pictures: str) -> Iterator[None]:
    """While the body trains, report new checkpoints and pictures, each once, and pass on `run.should_stop`.

    Args:
        run: whose folder is looked at.
        tracker: they are reported to.
        pictures: the name under which pictures are shown.
    """
    stop_file = run.folder / STOP_FILE
    stop_file.unlink(missing_ok=True)
    ended = threading.Event()
    look = _reporter(run.folder, tracker, pictures)

    def follow() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                if run.should_stop:
                    stop_file.touch()
                look()
            except OSError as error:  # a full or slow disk must not end the only thread that hears a stop
                say(f"following the run: {error}")

    thread = threading.Thread(target=follow, daemon=True, name="follow")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()
        stop_file.unlink(missing_ok=True)


def _reporter(folder: Path, tracker: Tracker, pictures: str) -> Callable[[], None]:
    """What reports what is new in a run folder since it was called last."""

    def names(pattern: str) -> set[str]:
        return {path.name for path in folder.glob(pattern)}

    seen = {pattern: names(pattern) for pattern in ("checkpoints/step-*", "pictures/step-*.png")}

    def look() -> None:
        saved, drawn = (names(pattern) - known for pattern, known in seen.items())
        seen["checkpoints/step-*"] |= saved
        if saved:
            tracker.commit()
        for name in sorted(drawn):
            seen["pictures/step-*.png"].add(name)
            path = folder / "pictures" / name
            tracker.picture(path, pictures, int(path.stem.removeprefix("step-")))
            tracker.artifact(path, "pictures")

    return look
