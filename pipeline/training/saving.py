"""Checkpoints written beside training: the state is copied to main memory at the step, the files come from a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import checkpoints
from pipeline.training.state import TrainState


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
