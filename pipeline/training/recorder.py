"""What training leaves behind: logged metrics, pictures, checkpoints and progress, written by the first worker."""

import time
from collections.abc import Callable
from contextlib import suppress

from pipeline import checkpoints
from pipeline.grids import save_rows
from pipeline.progress import Progress, say
from pipeline.run import Run
from pipeline.training import adaptivity, distributed
from pipeline.training.loop import Hooks
from pipeline.training.resume import deciding
from pipeline.training.state import TrainState
from pipeline.training.validation import Validator

STOP_FILE = "stop"  # in the run folder: the driver was told to end


class Recorder:
    """The loop's hooks.

    Args:
        run: the run folder and the configuration.
        validator: measures the averaged model.
        report: told the latest validation metrics at every checkpoint, on every worker.
        state: where the run starts from.
    """

    def __init__(
        self, run: Run, validator: Validator, report: Callable[[dict[str, float]], None], state: TrainState
    ) -> None:
        self.run, self.validator, self.report = run, validator, report
        self.validated: dict[str, float] = {}
        self.first = distributed.rank() == 0
        self._seconds, self._started = state.seconds, time.monotonic()
        self._first_step = state.step
        self._progress: Progress | None = None
        if self.first:
            run.rewind_metrics(state.step)
            checkpoints.remove_leftovers(run.folder / "checkpoints")
            batch, steps = run.config.train.global_batch_size, run.config.train.max_steps
            self._progress = Progress("train", batch * steps, "images", done=batch * state.step)

    def hooks(self) -> Hooks:
        """As the loop wants them."""
        return Hooks(self.log, self.validate, self.save, self.advance, self.stop_reason)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append to metrics.jsonl."""
        if self.first:
            self.run.log(metrics, step)

    def validate(self, state: TrainState) -> None:
        """Measure the averaged model and draw originals over reconstructions."""
        self.validated = self.validator.measure(state.average)
        self.log(self.validated, state.step)
        if not self.first:
            return
        if len(self.validator.shown):
            path = self.run.folder / "pictures" / f"step-{state.step:08d}.png"
            save_rows(path, self.validator.examples(state.average))
        values = ", ".join(f"{k.removeprefix('validation/')} {v:.4g}" for k, v in self.validated.items())
        say(f"step {state.step}: {values}")
        if "validation/psnr_quarter" in self.validated:
            for text in adaptivity.warnings(self.validated, state.model.config.global_tokens > 0):
                say(f"warning: {text}")

    def save(self, state: TrainState) -> None:
        """Write a checkpoint; no worker goes on before it is safe."""
        if self.first:
            config = self.run.config
            record = {
                "samples_seen": state.step * config.train.global_batch_size,
                "seconds": self.seconds(),
                "decides": deciding(config),
            }
            folder, keep = self.run.folder / "checkpoints", config.train.keep_checkpoints
            checkpoints.save(folder, state.step, state.average, state.tensors(), keep, **record)
        distributed.wait_for_all()
        self.report({**self.validated, "step": state.step})

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

    def results(self, state: TrainState) -> dict[str, float]:
        """What summary.json says of the run."""
        batch = self.run.config.train.global_batch_size
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
        """End the progress bar."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.close()
