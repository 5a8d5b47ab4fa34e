"""The store against a real MLflow, in a SQLite file that is made once: that alone takes seconds."""

import contextlib
import io
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from pipeline.core.errors import BadInput
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.tracking import Tracker, check_model_name, check_store
from pipeline.tracking.mlflow_store import MetricPoint, MlflowStore, Refused, refusal
from pipeline.tracking.tracker import parameters


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Address of a store that has one run, and what making it printed."""
    folder = tmp_path_factory.mktemp("store") / "made" / "on the way"
    uri = f"sqlite:///{folder}/mlflow.db"
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        store = MlflowStore(uri, "tatok", None, system_metrics=False)
        store.open("first", time.time(), {}, {})
        store.end("FINISHED")
    return uri, folder, printed.getvalue()


@pytest.fixture
def uri(database):
    return database[0]


@pytest.fixture
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


@pytest.fixture
def store(uri):
    made = MlflowStore(uri, "tatok", None, system_metrics=False)
    made.open("test", time.time(), {"train.max_steps": "100"}, {"stage": "train"})
    yield made
    made.end("FINISHED")


@pytest.fixture
def open_run(tmp_path, uri):
    runs = []

    def make(*overrides, resume=False, name="one"):
        for run in runs:
            run.close()
        keys = [f"run.output={tmp_path}", f"tracking.uri={uri}", "tracking.flush_seconds=0.1", *overrides]
        runs.append(Run.open("train", load_config("smoke", keys), name, resume=resume))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def test_making_a_store_prints_nothing(database):
    assert database[2] == ""


def test_pictures_lie_beside_the_database(database, client):
    experiment = client.get_experiment_by_name("tatok")
    assert experiment.artifact_location == str(database[1] / "mlartifacts" / "tatok")


def test_a_run_arrives_whole(open_run, client, tmp_path):
    run = open_run("data.source=s3://anna:secret@bucket/images", "tracking.system_metrics=false")
    picture = tmp_path / "grid.png"
    Image.new("RGB", (8, 8)).save(picture)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    with Tracker.start(run, {"data_fingerprint": "abc"}) as tracker:
        for step in range(1, 1201):
            run.log({"train/loss": 1 / step}, step)
        tracker.commit()
        tracker.artifact(picture, "pictures")
        tracker.picture(picture, "validation/reconstructions", 5)
        tracker.model(checkpoint)
    found = client.get_run(run.mlflow_run_id)
    history = client.get_metric_history(run.mlflow_run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(1, 1201)]
    assert found.data.params == parameters(run.config)
    assert found.data.params["train.max_steps"] == "20"
    assert found.data.params["data.source"] == "s3://***@bucket/images"
    assert found.data.tags["data_fingerprint"] == "abc"
    assert found.info.run_name == "one"
    assert found.info.status == "FINISHED"
    assert files(client, run.mlflow_run_id, "pictures") == ["pictures/grid.png"]
    assert files(client, run.mlflow_run_id, "model") == ["model/config.json"]
    assert len(files(client, run.mlflow_run_id, "images")) == 2  # MLflow keeps a small copy beside it


def files(client, run_id, folder):
    return [entry.path for entry in client.list_artifacts(run_id, folder)]


def test_a_resumed_run_may_change_its_parameters(open_run, client):
    with pytest.raises(ValueError, match="stop"), Tracker.start(run := open_run()):
        raise ValueError("stop")
    first = run.mlflow_run_id
    assert client.get_run(first).info.status == "FAILED"
    run = open_run("train.max_steps=30", resume=True)
    with Tracker.start(run):
        run.log({"train/loss": 1.0}, 1)
    assert run.mlflow_run_id == first
    found = client.get_run(first)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.max_steps"] == "20"
    assert found.data.tags["changed.train.max_steps"] == "20 -> 30"
    assert "changed.train.seed" not in found.data.tags
    assert found.data.metrics["train/loss"] == 1.0


def test_a_run_that_is_opened_again_is_running_again(uri, client, store):
    store.end("FAILED")
    MlflowStore(uri, "tatok", store.run_id, system_metrics=False).open("test", time.time(), {}, {})
    assert client.get_run(store.run_id).info.status == "RUNNING"


def test_the_same_points_sent_twice_are_kept_once(store, client):
    points = [MetricPoint("loss", math.nan if step == 2 else float(step), 1000 + step, step) for step in range(5)]
    store.metrics(points[:3])
    store.metrics(points)
    assert [metric.step for metric in client.get_metric_history(store.run_id, "loss")] == [0, 1, 2, 3, 4]


def test_names_that_mlflow_does_not_take_are_changed(store, client):
    store.metrics([MetricPoint("psnr@56 (db)", 1.0, 0, 0)])
    assert client.get_run(store.run_id).data.metrics == {"psnr_56 _db_": 1.0}


def test_points_that_mlflow_calls_invalid_are_refused(store):
    with pytest.raises(Refused):
        store.metrics([MetricPoint("x" * 300, 1.0, 0, 0)])


def test_a_file_that_is_gone_is_refused(store, tmp_path):
    with pytest.raises(Refused, match="does not exist"):
        store.artifact(str(tmp_path / "gone.png"), "")
    with pytest.raises(Refused, match=r"gone\.png"):
        store.picture(str(tmp_path / "gone.png"), "grid", 0)


def test_a_picture_that_is_none_is_refused(store, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(Refused, match="cannot identify"):
        store.picture(str(tmp_path / "text.png"), "grid", 0)


@pytest.mark.parametrize("how", ["deleted", "unknown"])
def test_a_run_that_is_gone_is_made_anew(uri, client, how):
    store = MlflowStore(uri, "tatok", "0" * 32, system_metrics=False)
    if how == "deleted":
        store.open("first", time.time(), {}, {})
        client.delete_run(store.run_id)
    earlier = store.run_id
    store.open("second", time.time(), {}, {})
    assert store.run_id != earlier
    assert client.get_run(store.run_id).info.run_name == "second"
    store.end("KILLED")


def test_an_error_other_than_an_unknown_run_is_not_taken_for_one(uri):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="not an id"):
        MlflowStore(uri, "tatok", "not an id/", system_metrics=False).open("x", time.time(), {}, {})


def test_system_metrics_are_measured_without_a_thread_of_mlflow(uri):
    store = MlflowStore(uri, "tatok", None, system_metrics=True)
    store.open("test", time.time(), {}, {})
    sample = store.sample()
    store.end("FINISHED")
    assert 0 <= sample["system/cpu_utilization_percentage"] <= 100
    assert sample["system/system_memory_usage_megabytes"] > 0
    assert "SystemMetricsMonitor" not in [thread.name for thread in threading.enumerate()]


def test_system_metrics_that_fail_are_given_up_and_nothing_else(uri, monkeypatch, capsys):
    store = MlflowStore(uri, "tatok", None, system_metrics=True)
    store.open("test", time.time(), {}, {})
    monkeypatch.setattr(store._monitor, "collect_metrics", lambda: 1 / 0)
    assert store.sample() == {}
    assert store.sample() == {}
    store.end("FINISHED")
    assert capsys.readouterr().err.count("system metrics are not tracked") == 1


def test_without_psutil_only_the_system_metrics_are_missing(uri, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow.system_metrics.system_metrics_monitor", None)
    store = MlflowStore(uri, "tatok", None, system_metrics=True)
    store.open("test", time.time(), {}, {})
    assert store.sample() == {}
    store.end("FINISHED")
    assert "system metrics are not tracked" in capsys.readouterr().err


def test_an_absent_server_is_noticed_within_seconds_and_without_a_line_for_every_attempt(caplog):
    begun = time.monotonic()
    with pytest.raises(Exception, match="Max retries"):
        MlflowStore("http://127.0.0.1:9", "tatok", None, system_metrics=False).open("x", time.time(), {}, {})
    assert time.monotonic() - begun < 15
    assert [record.message for record in caplog.records if record.name.startswith("urllib3")] == []


def test_importing_the_tracker_does_not_import_mlflow(repository):
    code = "import sys, pipeline.tracking; print([name for name in ('mlflow', 'torch', 'ray') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == "[]"


# What MLflow refuses for good, found before anything is made.


@pytest.fixture
def copied(database, tmp_path):
    """Address of a copy of the store, to be spoilt."""
    shutil.copy(database[1] / "mlflow.db", tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def change(uri, command):
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database, database:
        database.execute(command)


def test_a_store_that_takes_runs_refuses_nothing(copied, tmp_path):
    before = (tmp_path / "mlflow.db").read_bytes()
    assert (
        refusal(copied, "tatok") == refusal(copied, "another") == refusal(f"sqlite:///{tmp_path}/new/x.db", "a") == ""
    )
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_deleted_experiment_is_named_and_the_advice_works(copied):
    from mlflow import MlflowClient

    client = MlflowClient(copied)
    number = client.get_experiment_by_name("tatok").experiment_id
    client.delete_experiment(number)
    said = refusal(copied, "tatok")
    assert said.startswith("tracking.experiment is 'tatok', which was deleted in MLflow; expected another name, or")
    assert refusal(copied, "another") == ""
    command = [sys.executable, "-m", "mlflow", "experiments", "restore", "--experiment-id", str(number)]
    assert " ".join(command[2:]) in said
    subprocess.run(command, env={**os.environ, "MLFLOW_TRACKING_URI": copied}, check=True, capture_output=True)
    assert refusal(copied, "tatok") == ""


@pytest.mark.parametrize("revision", ["bd07f7e963c5", "ffffffffffff"])
def test_a_schema_of_another_version_is_named(copied, revision):
    change(copied, f"UPDATE alembic_version SET version_num = '{revision}'")
    said = refusal(copied, "tatok")
    assert f"whose schema is of another version of MLflow ({revision}, not " in said
    assert f"`mlflow db upgrade {copied}`" in said
    config = load_config("smoke", [f"tracking.uri={copied}"])
    with pytest.raises(BadInput, match=revision):
        check_store(config)


def test_an_old_database_is_taken_after_the_upgrade_that_is_advised(copied):
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    command.downgrade(_get_alembic_config(copied), "-1")
    assert "mlflow db upgrade" in refusal(copied, "tatok")
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", copied], check=True, capture_output=True)
    assert refusal(copied, "tatok") == ""


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"pictures, perhaps" * 100)
    said = refusal(f"sqlite:///{tmp_path}/mlflow.db", "tatok")
    assert "which cannot be used (file is not a database); expected a database of MLflow's" in said
    said = refusal(f"sqlite:///{tmp_path}/mlflow.db/x.db", "tatok")
    assert f"'{tmp_path}/mlflow.db' cannot be written to" in said


def test_a_file_that_may_not_be_written_is_named(copied, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **more: connect(name.replace("mode=rw", "mode=ro"), **more))
    assert "which cannot be used (attempt to write a readonly database)" in refusal(copied, "tatok")


def test_a_database_that_another_run_writes_to_refuses_nothing(copied):
    with contextlib.closing(sqlite3.connect(copied.removeprefix("sqlite:///"))) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert refusal(copied, "tatok") == ""


def test_a_path_is_taken_as_it_is_written(tmp_path):
    place = tmp_path / "what now?" / "a%20b" / "x#y" / "100% é&=+"
    uri = f"sqlite:///{place}/mlflow.db"
    assert refusal(uri, "50%/a") == ""
    store = MlflowStore(uri, "50%/a", None, system_metrics=False)
    store.open("test", time.time(), {}, {})
    (tmp_path / "file.txt").write_text("x")
    store.artifact(str(tmp_path / "file.txt"), "folder")
    store.end("FINISHED")
    assert refusal(uri, "50%/a") == ""
    artifact = place / "mlartifacts" / "50%25%2Fa" / store.run_id / "artifacts" / "folder" / "file.txt"
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {
        tmp_path / "file.txt", place / "mlflow.db", artifact
    }  # fmt: skip
    assert artifact.read_text() == "x"
    with contextlib.closing(sqlite3.connect(place / "mlflow.db")) as database:
        assert database.execute("SELECT run_uuid, status FROM runs").fetchall() == [(store.run_id, "FINISHED")]


@pytest.mark.parametrize("name", ["a/b", "a:b", " ", ".", "..", "..x", "models:/tatok"])
def test_a_name_that_no_model_is_registered_as_is_bad_input(name, store):
    from mlflow.exceptions import MlflowException

    with pytest.raises(BadInput, match="sweep.register is .* expected a name without / and :"):
        check_model_name("sweep.register", name)
    with pytest.raises(MlflowException):  # so MLflow has it
        store._client.create_registered_model(name)
    for taken in ("tatok", "my model #1", "x..", "é%20?"):
        check_model_name("sweep.register", taken)
        store._client.create_registered_model(taken)
        store._client.delete_registered_model(taken)


@pytest.fixture
def answering():
    """`answering(status, text)` starts a server that is in health and answers so to everything else."""
    servers = []

    def start(status, text=""):
        class Answering(BaseHTTPRequestHandler):
            def do_GET(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200 if self.path == "/health" else status)
                self.end_headers()
                self.wfile.write(b"OK" if self.path == "/health" else text.encode())

            do_POST = do_GET  # noqa: N815 - its name in http.server

            def log_message(self, *arguments):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answering))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "text", "sentence"),
    [
        (401, "", "which answers 401; expected a server that was started with --allowed-hosts for this name, and cred"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "which answers 403; expected a server that was"),
        (404, "<html>nginx</html>", "which answers 404; expected the address of an MLflow server"),
        (501, "", "which answers NOT_IMPLEMENTED; expected the address of an MLflow server"),
        (200, "<html>a notebook</html>", "which cannot be used; expected the address of an MLflow server"),
    ],
)
def test_a_server_that_refuses_for_good_is_named_at_once(answering, status, text, sentence):
    uri = answering(status, text)
    begun = time.monotonic()
    said = refusal(uri, "tatok")
    assert time.monotonic() - begun < 5
    assert said.startswith(f"tracking.uri is '{uri}', ")
    assert sentence in said
    with pytest.raises(BadInput, match=uri):
        check_store(load_config("smoke", [f"tracking.uri={uri}"]))


def test_databricks_without_credentials_is_refused_for_good(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CONFIG_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    said = refusal("databricks", "tatok")
    assert said.startswith("tracking.uri is 'databricks', which cannot be used; expected credentials for Databricks (")


def test_a_server_that_is_away_busy_or_silent_refuses_nothing(answering):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        for uri in (answering(503), f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:9"):
            begun = time.monotonic()
            assert refusal(uri, "tatok") == ""
            assert time.monotonic() - begun < 8


def test_what_is_refused_for_good_is_said_once_and_not_waited_for(open_run, uri, copied, capsys):
    change(copied, "UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'tatok'")
    begun = time.monotonic()
    for name in ("one", "two"):
        run = open_run(f"tracking.uri={copied}", name=name)
        with Tracker.start(run) as tracker:
            run.log({"train/loss": 1.0}, 1)
            assert tracker.run_id(600) is None
    assert time.monotonic() - begun < 10
    said = capsys.readouterr().err
    assert said.count("nothing is tracked: tracking.experiment is 'tatok', which was deleted in MLflow") == 1
    assert "sent" not in said
    assert run.mlflow_run_id is None
    run = open_run(name="two", resume=True)  # with a store that takes it
    with Tracker.start(run):
        pass
    assert run.mlflow_run_id is not None


@pytest.mark.slow
def test_a_real_server_that_is_killed_and_comes_back_has_every_point_once(open_run, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
               "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
               "--artifacts-destination", str(tmp_path / "artifacts")]  # fmt: skip
    server = start_server(command, address)
    run = open_run(f"tracking.uri={address}", "tracking.flush_seconds=0.5")
    try:
        tracker = Tracker.start(run)
        for step in range(600):
            run.log({"train/loss": float(step)}, step)
            if step % 100 == 99:
                tracker.commit()
            if step == 250:
                stop_server(server)
            if step == 450:
                server = start_server(command, address)
            time.sleep(0.01)
        tracker.close("finished", seconds=60)
        from mlflow import MlflowClient

        history = MlflowClient(address).get_metric_history(run.mlflow_run_id, "train/loss")
        assert [metric.step for metric in history] == list(range(600))
        assert MlflowClient(address).get_run(run.mlflow_run_id).info.status == "FINISHED"
    finally:
        stop_server(server)
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.count("cannot be written to") == said.count("answers again") == 1


def start_server(command, address):
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
    end = time.monotonic() + 90
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return process
        assert time.monotonic() < end, "the server did not start"
        time.sleep(0.5)


def stop_server(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
