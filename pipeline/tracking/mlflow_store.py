"""One MLflow run behind a few verbs. The only module that imports mlflow.

It works through `MlflowClient` with an explicit address: no active run, no global tracking URI. Every method may raise
and may take as long as the network does: `tracker.py` calls them from a thread of its own. What MLflow will never take
is told from an outage by `refusal`, before work begins, and by `is_final` and `is_of_run`.
"""

import logging
import os
import re
import sqlite3
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from pipeline.core.console import say
from pipeline.core.files import masked, within
from pipeline.core.run import versions
from pipeline.tracking.address import artifact_folder, for_mlflow, sqlite_path

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    import numpy as np

ENVIRONMENT = {  # only where the user has not decided otherwise
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # with the two below a dead server is noticed after seconds, not minutes
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # making a SQLite store otherwise prints its migrations
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is a contract, and the address may hold a password
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run contacts nobody but the tracking server
}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on charts, not on chat traces
PARAMETERS, METRICS = 100, 1000  # how many of them MLflow takes in one call
FINAL = (  # error codes of MLflow that waiting does not change
    "BAD_REQUEST", "ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "INVALID_PARAMETER_VALUE", "INVALID_STATE",
    "NOT_IMPLEMENTED", "PERMISSION_DENIED", "RESOURCE_DOES_NOT_EXIST", "UNAUTHENTICATED",
)  # fmt: skip
FINAL_TEXTS = ("not in a valid JSON format", "credential configuration failed")  # of errors that have no code
OF_RUN = ("INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")  # not of who asks, which may change
SECONDS = 5.0  # that a server may take to refuse a run before it begins; one that is away is waited for meanwhile
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


def save_pyfunc(folder: Path, loader: str, data: Path, example: "np.ndarray", answer: "dict[str, np.ndarray]") -> None:
    """Write a model that `mlflow.pyfunc.load_model` loads where this project is installed.

    Args:
        folder: does not exist yet.
        loader: module whose `_load_pyfunc(path)` makes an object with `predict` of a copy of `data`.
        data: file or folder that the loader reads.
        example: (B, ...) input.
        answer: what `predict` makes of it, (B, ...) arrays by name.
    """
    _prepare()
    with warnings.catch_warnings():  # at its own type hints
        warnings.filterwarnings("ignore", ".*Any type hint is inferred", UserWarning)
        import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def shape(array: "np.ndarray") -> tuple[int, ...]:
        return (-1, *array.shape[1:])

    mlflow.pyfunc.save_model(
        str(folder),
        loader_module=loader,
        data_path=str(data),
        signature=ModelSignature(
            inputs=Schema([TensorSpec(example.dtype, shape(example))]),
            outputs=Schema([TensorSpec(array.dtype, shape(array), name) for name, array in answer.items()]),
        ),
        input_example=example,
        pip_requirements=[f"{name}=={number}" for name, number in versions().items() if name in ("tatok", "torch")],
    )


class MetricPoint(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    milliseconds: int  # since 1970
    step: int


class Refused(Exception):
    """MLflow does not take this, now or later."""


def _prepare() -> None:
    """Settings that MLflow reads from the environment, before it is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It repeats every attempt on a dead server; the tracker says it once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def is_of_run(error: Exception) -> bool:
    """Whether MLflow refuses this item or this run, which somebody may have deleted meanwhile."""
    return isinstance(error, Refused) or getattr(error, "error_code", "") in OF_RUN


def is_final(error: Exception) -> bool:
    """Whether MLflow refuses for good, as opposed to being away or busy."""
    return getattr(error, "error_code", "") in FINAL or any(text in str(error) for text in FINAL_TEXTS)


def refusal(uri: str, experiment: str) -> str:
    """Why no run of this experiment will ever get to this address, in a sentence; '' where it may.

    Nothing is made or changed. A server that does not answer refuses nothing.
    """
    _prepare()
    shown = f"tracking.uri is {masked(uri)!r}"
    if sqlite_path(uri):
        return _refusal_of_file(shown, uri, experiment)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def ask() -> Any:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)  # that of one name hides a server that is no MLflow
        return client.get_experiment_by_name(experiment)

    try:
        found = within(SECONDS, ask)
    except MlflowException as error:
        return f"{shown}, {in_words(error)}" if is_final(error) else ""
    except Exception:  # noqa: BLE001 - whatever it is, the tracker goes on asking
        return ""
    return _deleted(experiment, found.experiment_id) if found and found.lifecycle_stage != "active" else ""


def in_words(error: Any) -> str:
    """What a server answers that refuses for good, and what may help."""
    code = getattr(error, "error_code", "")
    status = {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403, "ENDPOINT_NOT_FOUND": 404}.get(code, code)
    expected = "the address of an MLflow server"
    if status in (401, 403):
        expected = (
            "a server that was started with --allowed-hosts for this name, and credentials in "
            "MLFLOW_TRACKING_USERNAME and _PASSWORD if it asks"
        )
    elif FINAL_TEXTS[1] in str(error):
        expected = "credentials for Databricks"
    answers = f"which answers {status}" if code in FINAL else "which cannot be used"
    return f"{answers}; expected {expected} ({masked(' '.join(str(error).split()))[:200]})"


def _deleted(experiment: str, number: Any) -> str:
    return (
        f"tracking.experiment is {experiment!r}, which was deleted in MLflow; expected another name, or "
        f"`mlflow experiments restore --experiment-id {number}` with MLFLOW_TRACKING_URI set first"
    )


def _refusal_of_file(shown: str, uri: str, experiment: str) -> str:
    """As `refusal`, of a SQLite file."""
    path = Path(sqlite_path(uri)).absolute()
    there = next(folder for folder in path.parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"{shown}, and {str(there)!r} cannot be written to; expected a path in a folder that can"
    if not path.exists():
        return ""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=2.0)) as database:
            database.isolation_level = None
            for command in ("BEGIN IMMEDIATE", "PRAGMA user_version = 1", "ROLLBACK"):  # as a writer
                database.execute(command)
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "experiments" not in tables:
                return ""
            version = database.execute("SELECT version_num FROM alembic_version").fetchone()
            named = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'"
            deleted = database.execute(named, (experiment,)).fetchone()
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):  # by another run, which is no refusal
            return ""
        return (
            f"{shown}, which cannot be used ({error}); expected a database of MLflow's that may be written, or none yet"
        )
    from mlflow.store.db.utils import _get_latest_schema_revision  # no public call answers without changing the file

    wanted = _get_latest_schema_revision()
    if version != (wanted,):
        return (
            f"{shown}, whose schema is of another version of MLflow ({version and version[0]}, not {wanted}); expected "
            f"one that `mlflow db upgrade {for_mlflow(uri)}` has brought up to date, the newer MLflow that made it, or "
            "a new file"
        )
    return _deleted(experiment, deleted[0]) if deleted else ""


class MlflowStore:
    """Writes to one run of one experiment, making both when they are not there.

    Args:
        uri: tracking address.
        experiment: name.
        run_id: the MLflow run to go on with, None for a new one.
        system_metrics: whether `sample` measures anything.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, uri: str, experiment: str, run_id: str | None, system_metrics: bool) -> None:
        _prepare()
        from mlflow import MlflowClient

        self.run_id = run_id
        self._uri, self._experiment = uri, experiment
        self._client_class = MlflowClient
        self._client: Any = None
        self._wants_samples, self._monitor = system_metrics, None

    def open(self, name: str, started: float, parameters: dict[str, str], tags: dict[str, str]) -> None:
        """Make the run, or open it again; log new parameters, note changed ones as tags `changed.<name>`."""
        if self._client is None:
            if sqlite_path(self._uri):
                Path(sqlite_path(self._uri)).absolute().parent.mkdir(parents=True, exist_ok=True)
            self._client = self._client_class(for_mlflow(self._uri))
        run = self._reopened() or self._client.create_run(
            self._experiment_id(), start_time=int(started * 1000), run_name=name
        )
        self.run_id = run.info.run_id
        known = run.data.params
        new = {key: value for key, value in parameters.items() if key not in known}
        changed = {
            f"changed.{key}": f"{known[key]} -> {value}"
            for key, value in parameters.items()
            if known.get(key, value) != value
        }
        self._log_texts(new, {**tags, **changed})
        self._monitor = self._monitor or self._make_monitor()

    def _reopened(self) -> Any:
        """The run `run_id`, running again; None when there is none, e.g. because the server is another one."""
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if run.info.lifecycle_stage != "active":
            return None
        self._client.update_run(self.run_id, status="RUNNING")
        return run

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found:
            return found.experiment_id
        return self._client.create_experiment(
            self._experiment, artifact_folder(self._uri, self._experiment), tags=EXPERIMENT_TAGS
        )

    def _log_texts(self, parameters: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        entries = [Param(*pair) for pair in parameters.items()]
        for start in range(0, len(entries), PARAMETERS):
            self._client.log_batch(self.run_id, params=entries[start : start + PARAMETERS], synchronous=True)
        self._client.log_batch(self.run_id, tags=[RunTag(*pair) for pair in tags.items()], synchronous=True)

    def metrics(self, points: list[MetricPoint]) -> None:
        """Log points. MLflow ignores those that it has already, so a batch may be sent again after a doubt.

        Raises:
            Refused: MLflow calls them invalid.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        entries = [Metric(_NOT_IN_NAMES.sub("_", p.name), p.value, p.milliseconds, p.step) for p in points]
        try:
            for start in range(0, len(entries), METRICS):
                self._client.log_batch(self.run_id, metrics=entries[start : start + METRICS], synchronous=True)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise Refused(str(error)) from error
            raise

    def tag(self, key: str, value: str) -> None:
        """Set one tag."""
        self._client.set_tag(self.run_id, key, value, synchronous=True)

    def artifact(self, path: str, folder: str) -> None:
        """Store a file, or what a folder holds, under `folder` ('' is the top).

        Raises:
            Refused: there is nothing at `path`.
        """
        if not Path(path).exists():
            raise Refused(f"{path} does not exist")
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        log(self.run_id, path, folder or None)

    def picture(self, path: str, name: str, step: int) -> None:
        """Show a picture in the run's charts, where steps become a slider.

        Raises:
            Refused: there is no picture at `path`.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as picture:
                self._client.log_image(self.run_id, picture.copy(), key=name, step=step, synchronous=True)
        except (FileNotFoundError, UnidentifiedImageError) as error:
            raise Refused(str(error)) from error

    def register(self, model: str, name: str, alias: str) -> None:
        """Keep a folder that `save_pyfunc` wrote as `alias` and make it the registered model that the alias names.

        Once for each run: called again, after a doubt or a resume, it replaces the files and moves the alias back.

        Raises:
            Refused: there is no model, or MLflow does not take the name.
        """
        from mlflow.exceptions import MlflowException

        if not (Path(model) / "MLmodel").exists():
            raise Refused(f"{model} holds no model")
        self._client.log_artifacts(self.run_id, model, alias)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if is_final(error):
                raise Refused(f"no model is registered as {name!r}: {error}") from error
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = [v for v in self._client.search_model_versions(f"run_id='{self.run_id}'") if v.name == name]
        source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{alias}"
        made = known[0] if known else self._client.create_model_version(name, source, self.run_id)
        self._client.set_registered_model_alias(name, alias, made.version)
        say(f"registered in MLflow: models:/{name}@{alias}")

    def sample(self) -> dict[str, float]:
        """CPU, memory, disk, network and, where MLflow can read it, GPU use, averaged since the last call."""
        if self._monitor is None:
            return {}
        try:
            self._monitor.collect_metrics()
            values: dict[str, float] = self._monitor.aggregate_metrics()
            for part in self._monitor.monitors:
                part.clear_metrics()
        except Exception as error:  # noqa: BLE001 - not worth an outage
            return self._without_samples(error)
        return {f"system/{name}": value for name, value in values.items()}

    def _without_samples(self, error: Exception) -> dict[str, float]:
        say(f"system metrics are not tracked: {type(error).__name__}: {error}")
        self._monitor, self._wants_samples = None, False
        return {}

    def _make_monitor(self) -> Any:
        """MLflow's monitor, never started: its own thread ends at the first outage and is joined without a limit."""
        if not self._wants_samples:
            return None
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            return SystemMetricsMonitor(self.run_id, tracking_uri=for_mlflow(self._uri))
        except Exception as error:  # noqa: BLE001 - e.g. psutil is missing
            self._without_samples(error)
            return None

    def end(self, status: str) -> None:
        """Mark the run FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)
