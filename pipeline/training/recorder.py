"""Training that leaves something behind: metrics, pictures, checkpoints and progress, written by the first worker."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.core import checkpoints
from pipeline.core.config import TrainConfig
from pipeline.core.console import Progress, say
from pipeline.core.errors import Stopped
from pipeline.core.files import write_json
from pipeline.core.plots import save_rows
from pipeline.core.run import Run
from pipeline.tracking import Tracker
from pipeline.training import distributed
from pipeline.training.loop import Batch, Batches, Hooks, Objective, train
from pipeline.training.state import TrainState

# Checkpoints written beside training: the state is copied to main memory at the step, the files come from a thread.


class CheckpointThread:
    """Writes one checkpoint at a time; what fails is raised at the next call.

    Args:
        folder: the run's `checkpoints`.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, state: TrainState[Any], **record: Any) -> None:
        """Copy the state and return; waits for the checkpoint before, so that at most one copy is kept."""
        self.wait()
        average, tensors = state.snapshot()
        self._writing = self._thread.submit(
            checkpoints.save, self._folder, state.step, average, tensors, self._keep, **record
        )

    def wait(self) -> None:
        """Return when nothing is being written; raises what the last writing raised, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


# The driver's side of a training run: follows what the workers leave in the run folder.

SECONDS = 0.5  # between looks


@contextmanager
def followed(run: Run, tracker: Tracker, pictures: str) -> Iterator[None]:
    """While the body trains, report checkpoints and pictures to `tracker` and pass on `run.should_stop`.

    Args:
        run: whose folder is looked at.
        tracker: is told.
        pictures: the name under which pictures are shown.
    """
    stop_file = run.folder / STOP_FILE
    stop_file.unlink(missing_ok=True)
    ended = threading.Event()
    follower = Follower(run, tracker, pictures)

    def follow() -> None:
        while not ended.wait(SECONDS):
            try:
                if run.should_stop:
                    stop_file.touch()
                follower.look()
            except OSError as error:  # a full or slow disk must not end the only thread that hears a stop
                say(f"following the run: {error}")

    thread = threading.Thread(target=follow, daemon=True, name="follow")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        follower.look()
        stop_file.unlink(missing_ok=True)


class Follower:
    """Tells the tracker of each new checkpoint and picture once."""

    def __init__(self, run: Run, tracker: Tracker, pictures: str) -> None:
        self.run, self.tracker, self._name = run, tracker, pictures
        self._checkpoint = self._newest_checkpoint()
        self._pictures = self._all_pictures()

    def look(self) -> None:
        """Look once."""
        newest = self._newest_checkpoint()
        if newest != self._checkpoint:
            self._checkpoint = newest
            self.tracker.commit()
        for name in sorted(self._all_pictures() - self._pictures):
            self._pictures.add(name)
            step = int(name.removeprefix("step-").removesuffix(".png"))
            path = self.run.folder / "pictures" / name
            self.tracker.picture(path, self._name, step)
            self.tracker.artifact(path, "pictures")

    def _newest_checkpoint(self) -> str:
        return max((path.name for path in (self.run.folder / "checkpoints").glob("step-*")), default="")

    def _all_pictures(self) -> set[str]:
        return {path.name for path in (self.run.folder / "pictures").glob("step-*.png")}


NOT_FINITE = "not_finite"  # folder in the run folder: ids of batches whose loss or gradient was no number
STOP_FILE = "stop"  # in the run folder: the driver was told to end


class Validator(Protocol):
    """Looks at the averaged model on held-out data."""

    def measure(self, model: Any) -> dict[str, float]:
        """Metrics by their logged names; the same on every worker, which all have to ask."""
        ...

    def examples(self, model: Any) -> list[np.ndarray]:
        """Rows of pictures to look at, (B, H, W, 3) uint8 each; none where there is nothing to show."""
        ...

    def warnings(self, model: Any, found: dict[str, float]) -> list[str]:
        """What a reader of the log should look into, given the latest metrics by their logged names."""
        ...


class Recorder:
    """The loop's hooks.

    Args:
        run: the run folder.
        config: of the training.
        decides: what decides the weights of a step, by key; checkpoints keep it.
        validator: measures the averaged model.
        report: told the latest validation metrics at every checkpoint, on every worker.
        state: where the run starts from.
        ids: the samples of a step, counted from 0, by where they came from.
    """

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        decides: dict[str, Any],
        validator: Validator,
        report: Callable[[dict[str, float]], None],
        state: TrainState[Any],
        ids: Callable[[int], list[str]],
    ) -> None:
        self.run, self.config, self.decides = run, config, decides
        self.validator, self.report, self.ids = validator, report, ids
        self.validated: dict[str, float] = {}
        self.trained: dict[str, float] = {}  # the latest of the loop's own metrics
        self.first = distributed.rank() == 0
        self._seconds, self._started = state.seconds, time.monotonic()
        self._first_step = state.step
        self._progress: Progress | None = None
        self._checkpoints: CheckpointThread | None = None
        if self.first:
            self._checkpoints = CheckpointThread(run.folder / "checkpoints", config.keep_checkpoints)
            run.rewind_metrics(state.step)
            checkpoints.remove_leftovers(run.folder / "checkpoints")
            batch, steps = config.global_batch_size, config.max_steps
            self._progress = Progress("train", batch * steps, "images", done=batch * state.step)

    def train(self, objective: Objective[Batch], batches: Batches[Batch]) -> dict[str, Any]:
        """Train to the end of the run; returns once the last checkpoint is safe.

        Returns:
            `results` by name, and `stopped`: why it ended early, or ''.
        """
        stopped = ""
        try:
            train(objective, batches, self.config, self.hooks())
        except Stopped as reason:
            stopped = str(reason)
        finally:
            self.close()
        return {"results": self.results(objective.state), "stopped": stopped}

    def hooks(self) -> Hooks:
        """As the loop wants them."""
        return Hooks(self.log, self.validate, self.save, self.advance, self.stop_reason, self.not_finite)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append the loop's metrics to metrics.jsonl."""
        self.trained = metrics
        self._write(metrics, step)

    def _write(self, metrics: dict[str, float], step: int) -> None:
        if self.first:
            self.run.log(metrics, step)

    def validate(self, state: TrainState[Any]) -> None:
        """Measure the averaged model and draw pictures."""
        average = state.averaged()
        self.validated = self.validator.measure(average)
        self._write(self.validated, state.step)
        if not self.first:
            return
        if rows := self.validator.examples(average):
            save_rows(self.run.folder / "pictures" / f"step-{state.step:08d}.png", rows)
        values = ", ".join(f"{k.removeprefix('validation/')} {v:.4g}" for k, v in self.validated.items())
        say(f"step {state.step}: {values}")
        for text in self.validator.warnings(average, self.trained | self.validated):
            say(f"warning: {text}")

    def save(self, state: TrainState[Any]) -> None:
        """Have a checkpoint written; raises what went wrong with the one before."""
        if self._checkpoints is not None:
            samples = state.step * self.config.global_batch_size
            self._checkpoints.save(state, samples_seen=samples, seconds=self.seconds(), decides=self.decides)
        elif state.sharded:
            state.snapshot()  # the first worker's needs the others' parts
        self.report({**self.validated, "step": state.step})  # all workers meet here

    def not_finite(self, step: int) -> str:
        """Keep which samples a step saw whose loss or gradient was no number; says where."""
        place = f"{NOT_FINITE}/step-{step:08d}.json"
        if self.first:
            (self.run.folder / NOT_FINITE).mkdir(exist_ok=True)
            write_json(self.run.folder / place, {"step": step, "ids": self.ids(step - 1)})
        return place

    def advance(self, images: int, loss: float) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.advance(images, loss=f"{loss:.4g}")

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
            **{name.replace("/", "_"): value for name, value in self.validated.items()},
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
        if self._checkpoints is not None:
            self._checkpoints.close()
