"""A run's tracker: what the stages use. It waits for a server when a run begins and ends, for a bounded time."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import masked
from pipeline.core.run import Run
from pipeline.core.run import commit as code_version
from pipeline.tracking.address import check_answers
from pipeline.tracking.mlflow_store import MlflowStore, refusal
from pipeline.tracking.sender import Sender


def check_store(config: Config) -> None:
    """Refuse tracking that does not work now: for stages that are of no use without it.

    Raises:
        BadInput: no server answers, or what answers will never take a run.
    """
    if not config.tracking.uri:
        return
    check_answers(config)
    if sentence := refusal(config.tracking.uri, config.tracking.experiment):
        raise BadInput(sentence)


ALWAYS = (  # parameters by which runs are compared, also where they are the defaults
    "preset", "data.image_size", "tokenizer.size", "tokenizer.patch_size", "tokenizer.global_tokens",
    "tokenizer.codebook_size", "filter.score", "filter.rule", "filter.threshold", "train.optimizer",
    "train.learning_rate", "train.global_batch_size", "train.max_steps", "train.seed",
)  # fmt: skip


def parameters(config: Config) -> dict[str, str]:
    """What differs from the defaults, and `ALWAYS`, as `section.key: value` texts, without credentials in addresses.

    All two hundred would bury pictures and comparisons in MLflow; the artifact `config.yaml` has them.
    """
    defaults = dict(_flattened(Config().to_dict(), ""))
    return {
        name: masked(str(value))
        for name, value in _flattened(config.to_dict(), "")
        if name in ALWAYS or value != defaults.get(name)
    }


def _flattened(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def standard_tags(run: Run) -> dict[str, str]:
    """Tags that every run carries, to filter and group by."""
    version = code_version()
    return {
        "stage": run.stage,
        "preset": run.config.preset,
        "global_tokens": str(run.config.tokenizer.global_tokens),
        "commit": version["commit"],
        "dirty": str(version["dirty"]).lower(),
        "run_folder": str(run.folder.absolute()),
        "mlflow.source.name": f"jobs/{run.stage}.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": f"`{masked(' '.join(run.command))}`\n\nRun folder: `{run.folder.absolute()}`. The whole "
        "configuration is the artifact `config.yaml`.",
    }


DATASETS = {"shards", "tokens"}  # inputs of a run that are data
ENDINGS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}  # ours: MLflow's
_SAID: set[str] = set()  # why nothing is tracked: a job that makes its inputs first has several runs
CLOSE_SECONDS = 20.0  # a run waits at most this long for its last metrics to arrive


class Tracker:
    """Feeds one MLflow run from a run folder. Without a store every method does nothing."""

    def __init__(self, run: Run, store: MlflowStore | None, tags: dict[str, str] | None = None) -> None:
        self._run, self._store = run, store
        self._sender: Sender | None = None
        self._announced = False
        if store is not None:
            everything = {**standard_tags(run), **(tags or {})}
            tracking = run.config.tracking
            self._sender = Sender(
                run.folder, store, masked(tracking.uri), parameters(run.config), everything, tracking.flush_seconds
            )

    @classmethod
    def start(cls, run: Run, tags: dict[str, str] | None = None) -> Self:
        """Track `run` as its configuration says, in a new MLflow run or, resumed, in the one it had.

        Without an address, without mlflow and where MLflow refuses for good nothing is tracked; but for the first it is
        said. A server that is away is not waited for.
        """
        tracking = run.config.tracking
        if not tracking.uri:
            return cls(run, None)
        try:
            store = MlflowStore(tracking.uri, tracking.experiment, run.mlflow_run_id, tracking.system_metrics)
        except Exception as error:  # noqa: BLE001 - not installed, or broken: no reason not to train
            say(f"this run is not tracked, because MLflow cannot be imported: {type(error).__name__}: {error}")
            return cls(run, None)
        if sentence := refusal(tracking.uri, tracking.experiment):
            if sentence not in _SAID:
                say(f"nothing is tracked: {sentence}")
            _SAID.add(sentence)
            return cls(run, None)
        tracker = cls(run, store, tags)
        tracker._put("text", "config.yaml", masked(run.config.to_yaml()))
        for name in sorted(DATASETS & run.inputs.keys()):
            tracker._put("dataset", name, run.inputs[name]["path"], run.inputs[name]["sha256"])
        return tracker

    def commit(self) -> None:
        """Let all that `metrics.jsonl` holds be sent: call it when a checkpoint is safe.

        Metrics after the last commit are held back, because a resumed run repeats those steps.
        """
        if self._sender is not None:
            self._sender.commit()
            self._announce()

    def tag(self, key: str, value: str) -> None:
        """Set one tag."""
        self._put("tag", key, masked(value))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file, or what a folder holds, under `folder` of the run's artifacts."""
        self._put("artifact", str(path), folder)

    def picture(self, path: Path, name: str, step: int) -> None:
        """Show a picture beside the run's charts, under `name` with a slider over steps."""
        self._put("picture", str(path), name, step)

    def register(self, model: Path, name: str, alias: str) -> None:
        """Make a folder that `mlflow_store.save_pyfunc` wrote the registered model that `alias` names."""
        self._put("register", str(model), name, alias)

    def run_id(self, seconds: float = CLOSE_SECONDS) -> str | None:
        """The MLflow run, waiting at most `seconds` for the server to make one; None where there is none.

        One that is away is waited for as long as at the end of a run, one that refuses is not.
        """
        begun = time.monotonic()
        while (sender := self._sender) is not None and not sender.opened and not sender.given_up:
            if time.monotonic() - begun > (min(seconds, CLOSE_SECONDS) if sender.away else seconds):
                break
            time.sleep(0.05)
        self._announce()
        return self._run.mlflow_run_id

    def model(self, checkpoint: Path) -> None:
        """Keep the final checkpoint folder as `model/`."""
        self.artifact(checkpoint, "model")

    def close(self, status: str, seconds: float = CLOSE_SECONDS) -> None:
        """Send what is left, waiting at most `seconds`, and mark the run; `status` is as in `summary.json`.

        A finished run sends all of `metrics.jsonl`, a stopped or failed one what was committed.
        """
        if self._sender is None:
            return
        if status == "finished":
            self._sender.commit()
        self._sender.close(ENDINGS[status], seconds)
        self._announce()
        self._sender = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        kept = self._run.kept_status if isinstance(error, BadInput) else None  # a mistyped --resume changes nothing
        self.close(kept if kept in ENDINGS else "stopped" if stopped else "failed" if error else "finished")

    def _put(self, *item: str | int) -> None:
        if self._sender is not None:
            self._sender.put(*item)

    def _announce(self) -> None:
        """Name the MLflow run in `summary.json` once there is one; only the run's own thread writes that file."""
        if self._announced or self._store is None or self._sender is None or not self._sender.opened:
            return
        self._run.mlflow_run_id = self._store.run_id
        self._run.write_summary("running")
        self._announced = True
