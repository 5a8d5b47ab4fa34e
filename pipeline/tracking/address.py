"""Where tracking goes: which addresses make sense, where pictures of a SQLite store lie, what may be shown of them."""

from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import masked

LONGEST_NAME = 500  # characters of an experiment's that MLflow takes
EXPECTED = "expected sqlite:///file.db, http(s)://host:port, databricks, or '' for no tracking"


def check_tracking(config: Config) -> None:
    """Refuse an address that MLflow cannot use; asks no server.

    Raises:
        BadInput: `tracking.uri` of another form, a SQLite path that is a folder, no experiment name or one that is too
            long, a pause that is not positive.
    """
    tracking = config.tracking
    if not tracking.uri:
        return
    _check_uri(tracking.uri)
    if not tracking.experiment.strip():
        raise BadInput(f"tracking.experiment is {tracking.experiment!r}; expected a name")
    if len(tracking.experiment) > LONGEST_NAME:
        raise BadInput(
            f"tracking.experiment has {len(tracking.experiment)} characters; expected at most {LONGEST_NAME}"
        )
    if tracking.flush_seconds <= 0:
        raise BadInput(f"tracking.flush_seconds is {tracking.flush_seconds:g}; expected more than 0")


def _check_uri(uri: str) -> None:
    shown = f"tracking.uri is {masked(uri)!r}"
    if uri.startswith("sqlite:"):
        if not sqlite_path(uri):
            raise BadInput(f"{shown}; {EXPECTED}")
        if Path(sqlite_path(uri)).is_dir():
            raise BadInput(f"{shown}, which is a folder; expected the path of a database file, e.g. {uri}/mlflow.db")
    elif uri.startswith(("http://", "https://")):
        if not _names_a_host(uri):
            raise BadInput(f"{shown}; expected http(s)://host:port, e.g. http://127.0.0.1:5000")
    elif uri != "databricks" and not uri.startswith("databricks://"):
        raise BadInput(f"{shown}; {EXPECTED}")


def check_answers(config: Config, seconds: float = 10.0) -> None:
    """Refuse a tracking server that does not answer.

    Raises:
        BadInput: nothing answers at an http(s) address of `tracking.uri` within `seconds`.
    """
    uri = config.tracking.uri
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urlopen(f"{without_credentials(uri)}/health", timeout=seconds):
            return
    except HTTPError:  # it answers, if only to ask for a password
        return
    except (OSError, ValueError, HTTPException) as error:
        reason = masked(" ".join(str(getattr(error, "reason", error)).split()))
        raise BadInput(
            f"tracking.uri is {masked(uri)!r}, where no server answers ({reason}); expected a running MLflow server, "
            "sqlite:///file.db, or '' for no tracking"
        ) from None


def check_model_name(key: str, name: str) -> None:
    """Refuse a name that MLflow takes no model under.

    Raises:
        BadInput: naming `key`.
    """
    if not name.strip() or {"/", ":"} & set(name) or name == "." or name.startswith(".."):
        raise BadInput(f"{key} is {name!r}, which MLflow registers no model as; expected a name without / and :")


def without_credentials(uri: str) -> str:
    """An http(s) address as urllib takes it: no `user:password`, and no slash at its end."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _names_a_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, a bracket that does not close
        return False


def sqlite_path(uri: str) -> str:
    """The database file of a `sqlite:///` address, '' for any other."""
    return uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else ""


def for_mlflow(uri: str) -> str:
    """The address as MLflow has to be given it: of a SQLite file with `%` or `?` in its path, those escaped.

    SQLAlchemy would take what follows `?` for options and read `%20` as a blank. MLflow makes the folder that a
    `sqlite:` address names as it is written, so the escaped one also names the driver.
    """
    path = sqlite_path(uri)
    if not {"%", "?"} & set(path):
        return uri
    return "sqlite+pysqlite:///" + path.replace("%", "%25").replace("?", "%3F")


def artifact_folder(uri: str, experiment: str) -> str | None:
    """Where pictures and models of a SQLite store lie: beside the database, wherever a job was started.

    MLflow's own choice is `./mlruns` of the process that made the experiment. None: the server decides. It reads `%20`
    as a blank, so what has a `%` is escaped.
    """
    if not sqlite_path(uri):
        return None
    folder = Path(sqlite_path(uri)).absolute().parent / "mlartifacts" / quote(experiment, safe=" ")
    return str(folder).replace("%", "%25")
