"""The driver's side of a training run: follows what the workers leave in the run folder.

The driver alone talks to MLflow and hears signals. Workers, in this process or on other machines, write checkpoints and
pictures; a thread looks for new ones and tells the tracker, and passes a wish to stop on as a file.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.progress import say
from pipeline.run import Run
from pipeline.tracking import Tracker
from pipeline.training.recorder import STOP_FILE

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
