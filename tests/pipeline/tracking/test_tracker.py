"""The tracker against a stand-in for MLflow that goes away, hangs and comes back as a test wants."""

import json
import sys
import threading
import time

import pytest

from pipeline.core.errors import BadInput, Stopped
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.tracking import Tracker, sender
from pipeline.tracking.mlflow_store import Refused


class Server:
    """What a tracking server knows, and whether it answers."""

    def __init__(self):
        self.up = True
        self.calls_left = None  # so many calls, then it is down
        self.answers = threading.Event()  # cleared: every call hangs
        self.answers.set()
        self.points, self.tags, self.files, self.ended, self.names = [], {}, [], [], []

    def call(self):
        self.answers.wait()
        if self.calls_left is not None:
            self.calls_left -= 1
            self.up = self.up and self.calls_left >= 0
        if not self.up:
            raise ConnectionError("no route to http://anna:secret@host")

    def steps(self, name="loss"):
        return [point.step for point in self.points if point.name == name]


class FakeStore:
    """One run on a `Server`."""

    def __init__(self, server, run_id=None):
        self.server, self.run_id = server, run_id

    def open(self, name, started, parameters, tags):
        self.server.call()
        if self.run_id not in self.server.names:
            self.run_id = f"run-{len(self.server.names)}"
            self.server.names.append(self.run_id)
        self.server.tags.update(tags)

    def metrics(self, points):
        self.server.call()
        if any(point.name == "bad" for point in points):
            raise Refused("a name it does not like")
        self.server.points += points

    def tag(self, key, value):
        self.server.call()
        self.server.tags[key] = value

    def artifact(self, path, folder):
        self.server.call()
        self.server.files.append((path, folder))

    def picture(self, path, name, step):
        self.server.call()
        self.server.files.append((path, name, step))

    def sample(self):
        return {"system/cpu": 50.0}

    def end(self, status):
        self.server.call()
        self.server.ended.append(status)


@pytest.fixture
def server():
    made = Server()
    yield made
    made.answers.set()  # let hanging threads go


@pytest.fixture
def open_run(tmp_path):
    config = load_config("smoke", [f"run.output={tmp_path}", "run.name=one", "tracking.flush_seconds=0.02"])
    runs = []

    def make(resume=False):
        if runs:
            runs[-1].close()
        runs.append(Run.open("train", config, "one", resume=resume))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def track(run, server):
    return Tracker(run, FakeStore(server, run.mlflow_run_id))


def log(run, steps, name="loss"):
    for step in steps:
        run.log({name: float(step)}, step)


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_metrics_arrive_in_order_while_the_run_goes_on(open_run, server):
    run = open_run()
    with track(run, server) as tracker:
        log(run, range(5))
        tracker.commit()
        wait_until(lambda: server.steps() == [0, 1, 2, 3, 4])
        log(run, range(5, 8))
    assert server.steps() == list(range(8))
    assert server.ended == ["FINISHED"]


def test_what_was_not_committed_is_held_back_when_a_run_stops(open_run, server):
    run = open_run()
    with pytest.raises(Stopped), track(run, server) as tracker:
        log(run, range(3))
        tracker.commit()
        log(run, range(3, 5))
        raise Stopped("enough")
    assert server.steps() == [0, 1, 2]
    assert server.ended == ["KILLED"]


@pytest.mark.parametrize(("error", "ending"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")])
def test_the_run_is_marked_by_how_it_ended(open_run, server, error, ending):
    with pytest.raises(error), track(open_run(), server):
        raise error
    assert server.ended == [ending]


@pytest.mark.parametrize(
    ("earlier", "logs", "ending"),
    [("finished", False, "FINISHED"), ("stopped", False, "KILLED"), ("finished", True, "FAILED")],
)
def test_a_refused_resume_leaves_the_ending_as_it_was(open_run, server, earlier, logs, ending):
    open_run().write_summary(earlier)
    run = open_run(resume=True)
    with pytest.raises(BadInput), track(run, server):
        if logs:  # then it has gone on
            log(run, [1])
        raise BadInput("train.seed is 1; expected 0")
    assert server.ended == [ending]


def test_an_outage_loses_nothing_repeats_nothing_and_is_said_once(open_run, server, capsys):
    run = open_run()
    with track(run, server) as tracker:
        log(run, range(10))
        tracker.commit()
        wait_until(lambda: len(server.points) == 10)
        server.up = False
        for start in range(10, 50, 10):
            log(run, range(start, start + 10))
            tracker.tag("at", str(start))
            tracker.commit()
            time.sleep(0.05)
        server.up = True
        wait_until(lambda: len(server.points) == 50)
    assert server.steps() == list(range(50))
    assert server.tags["at"] == "40"
    said = capsys.readouterr().err
    assert said.count("cannot be written to") == 1
    assert said.count("answers again") == 1


def test_a_server_that_fails_between_batches_gets_each_point_once(open_run, server):
    run = open_run()
    log(run, range(2500))
    server.calls_left = 2  # open, one batch
    with track(run, server) as tracker:
        tracker.commit()
        wait_until(lambda: not server.up)
        assert server.steps() == list(range(1000))
        server.calls_left, server.up = None, True
    assert server.steps() == list(range(2500))


def test_credentials_in_an_error_are_not_shown(open_run, server, capsys):
    server.up = False
    track(open_run(), server).close("finished", seconds=0.2)
    said = capsys.readouterr().err
    assert "secret" not in said
    assert "***@host" in said


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_without_repeating(open_run, server):
    run = open_run()
    tracker = track(run, server)
    log(run, range(5))
    tracker.commit()
    log(run, range(5, 8))
    tracker.close("stopped")
    run = open_run(resume=True)
    run.rewind_metrics(4)
    with track(run, server):
        log(run, range(5, 10))
    assert server.steps() == list(range(10))
    assert server.names == ["run-0"]
    assert run.mlflow_run_id == "run-0"


def test_a_run_that_was_killed_before_its_summary_named_the_mlflow_run_finds_it_again(open_run, server):
    run = open_run()
    Tracker(run, FakeStore(server)).close("stopped")
    with Tracker(run, FakeStore(server)):
        pass
    assert server.names == ["run-0"]


def test_resuming_from_an_older_checkpoint_repeats_no_point(open_run, server):
    run = open_run()
    with track(run, server):
        log(run, range(10))
    run = open_run(resume=True)
    run.rewind_metrics(3)
    with track(run, server):
        log(run, range(4, 12))
    assert server.steps() == list(range(12))


def test_close_is_bounded_and_the_rest_is_sent_when_the_run_is_resumed(open_run, server, capsys, tmp_path):
    run = open_run()
    server.up = False
    tracker = track(run, server)
    log(run, range(7))
    tracker.artifact(tmp_path / "grid.png", "pictures")
    tracker.picture(tmp_path / "grid.png", "validation/reconstructions", 5)
    tracker.model(tmp_path / "checkpoint")
    begun = time.monotonic()
    tracker.close("finished", seconds=0.3)
    assert time.monotonic() - begun < 2
    assert "7 metric values, 3 tags or files and how it ended are kept in" in capsys.readouterr().err
    server.up = True
    with track(open_run(resume=True), server):
        pass
    assert server.steps() == list(range(7))
    grid = str(tmp_path / "grid.png")
    assert server.files == [
        (grid, "pictures"),
        (grid, "validation/reconstructions", 5),
        (str(tmp_path / "checkpoint"), "model"),
    ]
    assert server.ended == ["FINISHED"]


def test_a_hanging_server_blocks_neither_the_training_thread_nor_the_end(open_run, server):
    run = open_run()
    server.answers.clear()
    begun = time.monotonic()
    tracker = track(run, server)
    for step in range(200):
        run.log({"loss": 1.0}, step)
        tracker.tag("step", str(step))
        tracker.commit()
    assert (time.monotonic() - begun) / 200 < 0.005
    begun = time.monotonic()
    tracker.close("finished", seconds=0.3)
    assert time.monotonic() - begun < 2


def test_the_summary_names_the_mlflow_run_from_the_first_checkpoint_on(open_run, server):
    run = open_run()
    with track(run, server) as tracker:
        wait_until((run.folder / "tracking.json").exists)
        tracker.commit()
        assert json.loads((run.folder / "summary.json").read_text())["mlflow_run_id"] == "run-0"


def test_a_server_that_forgot_the_run_gets_everything_in_a_new_one(open_run, server):
    run = open_run()
    with track(run, server):
        log(run, range(3))
    other = Server()
    other.names = ["somebody else's"]
    run = open_run(resume=True)
    with track(run, other):
        log(run, [3])
    assert other.steps() == [0, 1, 2, 3]
    assert run.mlflow_run_id == "run-1"


def test_what_the_server_refuses_does_not_hold_up_the_rest(open_run, server, capsys):
    run = open_run()
    with track(run, server) as tracker:
        log(run, [1], name="bad")
        tracker.commit()
        wait_until(lambda: "refuses" in capsys.readouterr().err)
        log(run, [2])
        tracker.tag("after", "yes")
    assert server.steps() == [2]
    assert server.tags["after"] == "yes"
    assert server.ended == ["FINISHED"]


class ForGood(Exception):
    """As MLflow raises where waiting does not help."""

    error_code = "PERMISSION_DENIED"


def test_a_server_that_takes_no_run_is_not_asked_again_before_it_is_resumed(open_run, server, monkeypatch, capsys):
    def refuse(*about):
        raise ForGood("http://anna:secret@host: no")

    run = open_run()
    with monkeypatch.context() as patched:
        patched.setattr(FakeStore, "open", refuse)
        begun = time.monotonic()
        with track(run, server) as tracker:
            log(run, range(3))
            tracker.tag("key", "value")
            assert tracker.run_id(600) is None
        assert time.monotonic() - begun < 5
    said = capsys.readouterr().err
    assert said.count("does not take this run, which answers 403; expected a server") == 1
    assert "secret" not in said
    assert server.names == []
    with track(open_run(resume=True), server):
        pass
    assert server.steps() == [0, 1, 2]
    assert server.tags["key"] == "value"


def test_a_run_that_is_deleted_meanwhile_is_said_once_and_nothing_is_promised(open_run, server, monkeypatch, capsys):
    class Deleted(Exception):
        error_code = "INVALID_PARAMETER_VALUE"

    def refuse(*about):
        raise Deleted("The run 7 must be in the 'active' state. Current state is deleted.")

    run = open_run()
    with track(run, server) as tracker:
        log(run, [1])
        tracker.commit()
        wait_until(lambda: server.steps() == [1])
        for name in ("metrics", "tag", "end"):
            monkeypatch.setattr(FakeStore, name, refuse)
        for step in (2, 3, 4):
            log(run, [step])
            tracker.tag("step", str(step))
            tracker.commit()
            time.sleep(0.1)
    said = capsys.readouterr().err.splitlines()
    reason = "The run 7 must be in the 'active' state. Current state is deleted."
    assert [line for line in said if "MLflow" in line] == [
        f"MLflow refuses something of this run, which stays in {run.folder} only: {reason}"
    ]


def test_a_server_that_is_away_keeps_nobody_waiting_for_the_run(open_run, server, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.tracker.CLOSE_SECONDS", 0.3)
    server.up = False
    with track(open_run(), server) as tracker:
        begun = time.monotonic()
        assert tracker.run_id(600) is None
        assert time.monotonic() - begun < 3
        tracker.close("finished", 0.1)


def test_tags_say_what_the_run_is(open_run, server):
    run = open_run()
    with Tracker(run, FakeStore(server), {"data_fingerprint": "abc"}) as tracker:
        tracker.tag("source", "s3://anna:secret@bucket/images")
    expected = {"stage": "train", "preset": "smoke", "global_tokens": "4", "data_fingerprint": "abc"}
    assert expected.items() <= server.tags.items()
    assert {"commit", "dirty", "run_folder"} <= set(server.tags)
    assert server.tags["source"] == "s3://***@bucket/images"


def test_samples_of_the_system_are_logged_by_seconds_since_the_start(open_run, server, monkeypatch):
    monkeypatch.setattr(sender, "SAMPLE_SECONDS", 0.1)
    with track(open_run(), server):
        wait_until(lambda: server.steps("system/cpu"))
    assert set(server.steps("system/cpu")) <= {0, 1, 2, 3}


def test_without_an_address_nothing_is_tracked(tmp_path):
    run = Run.open("train", load_config("smoke", [f"run.output={tmp_path}", "tracking.uri="]), "one", resume=False)
    with Tracker.start(run) as tracker:
        log(run, range(3))
        tracker.commit()
        tracker.tag("key", "value")
        tracker.artifact(tmp_path)
        tracker.picture(tmp_path, "grid", 0)
        tracker.model(tmp_path)
    run.close()
    assert run.mlflow_run_id is None
    assert not (run.folder / "tracking.json").exists()


def test_without_mlflow_a_run_goes_on_and_says_once_that_it_is_not_tracked(open_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    run = open_run()
    with Tracker.start(run) as tracker:
        log(run, range(3))
        tracker.commit()
    assert capsys.readouterr().err.count("this run is not tracked") == 1
    assert not (run.folder / "tracking.json").exists()
