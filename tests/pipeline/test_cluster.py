"""Whether what is asked for fits, where networks compute, and that Ray leaves the job's signals alone."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import grpc
import pytest
import torch

from pipeline.core import cluster
from pipeline.core.cluster import (
    as_they_finish,
    check_cluster,
    check_cpus,
    check_machine,
    connect,
    most_resources,
    pick_device,
    pick_workers_device,
    uses_bf16,
)
from pipeline.core.errors import BadInput
from pipeline.core.presets import load_config
from pipeline.core.stages import find_stage


@pytest.fixture
def gcs() -> Iterator:
    """`gcs(lets_in)` starts what answers calls as a cluster's head does; returns host:port."""
    servers = []

    class Head(grpc.GenericRpcHandler):
        def __init__(self, lets_in: bool) -> None:
            self.lets_in = lets_in

        def service(self, call):
            def answer(request, context):
                if not self.lets_in:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "another token")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    def start(lets_in: bool) -> str:
        server = grpc.server(ThreadPoolExecutor(1), handlers=(Head(lets_in),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.fixture
def silent() -> Iterator[str]:
    """host:port of what takes calls and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "head", "garbage here", "head:port", "head:0", "head:65536", " head:6379", "'head:6379'", ":6379",
     "tcp://head:6379", "http://127.0.0.1:8265", "ray://head:10001", "autos"],
)  # fmt: skip
def test_an_address_of_another_form_is_refused_without_asking(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BadInput) as caught:
        check_cluster()
    assert str(caught.value).startswith(f"RAY_ADDRESS is {address!r}")
    assert str(caught.value).endswith(cluster.EXPECTED)


def test_a_dead_address_is_refused_before_anything_is_made_and_ray_is_not_asked(monkeypatch, silent):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr("ray.init", lambda *about, **more: pytest.fail("Ray would ask for minutes"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests may share one
    for address, reason in (
        ("127.0.0.1:1", "Connection refused"),
        ("no.such.host.invalid:6379", "not known"),
        (silent, "does not answer as Ray does"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        begun = time.monotonic()
        with pytest.raises(BadInput, match=rf"RAY_ADDRESS is '{address}', where no Ray cluster .*{reason}"):
            check_cpus("train.num_workers", 2)
        with pytest.raises(BadInput, match=rf"RAY_ADDRESS is '{address}', where no Ray cluster .*{reason}"):
            connect()
        assert time.monotonic() - begun < 20


def test_a_cluster_that_wants_another_token_says_so(monkeypatch, gcs):
    monkeypatch.setenv("RAY_ADDRESS", gcs(lets_in=True))
    check_cluster()
    monkeypatch.setenv("RAY_ADDRESS", gcs(lets_in=False))
    with pytest.raises(BadInput, match=r"does not let this process in \(another token\); expected RAY_AUTH_MODE=token"):
        check_cluster()


def test_token_authentication_without_a_token(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(BadInput, match="there is no token in .*no_token'; expected the cluster's"):
        check_cluster()


def test_auto_finds_a_cluster_that_is_gone_or_none(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    with pytest.raises(BadInput, match="RAY_ADDRESS is 'auto', where no Ray cluster .*Could not find any running Ray"):
        check_cluster()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # as a killed head leaves it behind
    with pytest.raises(BadInput, match="RAY_ADDRESS is 'auto', .*:1 of the last `ray start` here: .*refused"):
        check_cluster()


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_that_no_ray_can_start_in_is_refused(monkeypatch, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    check_cluster()
    fits = "/tmp/" + "x" * 36  # and 66 of /ray/session_YYYY-MM-DD_hh-mm-ss_ffffff_12345/sockets/plasma_store
    monkeypatch.setenv(variable, fits)
    check_cluster()
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for folder, problem in (
        (fits + "x", "too long by 1 for the sockets"),
        ("/tmp/" + "é" * 19, "too long by 2 for the sockets"),
        ("/proc/version/x", "where Ray cannot make a folder"),
    ):
        monkeypatch.setenv(variable, folder)
        with pytest.raises(BadInput, match=rf"{variable} is '{folder}', {problem}.*; expected RAY_TMPDIR to name"):
            connect()


def test_a_ray_that_does_not_start_is_a_sentence_and_the_signals_stay(monkeypatch):
    def fail(*about, **more):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does
        raise RuntimeError("The current node\ntimed out during startup")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", fail)
    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises(BadInput, match=r"Ray cannot start .* \(The current node timed out during startup\); expected"):
        connect()
    assert signal.getsignal(signal.SIGTERM) is earlier


def test_ctrl_c_works_at_once_while_a_cluster_is_asked(repository, silent, tmp_path):
    command = [
        sys.executable,
        str(repository / "jobs" / "preprocess.py"),
        "smoke",
        "data.num_workers=2",
        "tracking.uri=",
    ]
    environment = {**os.environ, "PYTHONPATH": str(repository), "RAY_ADDRESS": silent}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as job:
        time.sleep(6)  # it asks for twenty
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, said = job.communicate(timeout=60)
    assert time.monotonic() - begun < 3
    assert (job.returncode, said.strip()) == (3, "stopped: interrupted")
    assert not list(tmp_path.iterdir())  # no run folder was made


def test_more_workers_than_cpus_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    check_cpus("train.num_workers", 2)
    check_cpus("train.num_workers", 4, cpus_per_worker=0.5)
    with pytest.raises(BadInput, match="train.num_workers is 3, which needs 3 CPUs; expected at most 2 .* 2 CPUs"):
        check_cpus("train.num_workers", 3)
    with pytest.raises(BadInput, match="needs 4.5 CPUs; expected at most 1"):
        check_cpus("train.num_workers", 3, cpus_per_worker=1.5)


def test_a_cluster_is_not_measured_by_this_machine(monkeypatch, gcs):
    monkeypatch.setenv("RAY_ADDRESS", gcs(lets_in=True))
    check_cpus("train.num_workers", 10_000)
    for none in ("", "local"):  # as `connect` has it
        monkeypatch.setenv("RAY_ADDRESS", none)
        with pytest.raises(BadInput):
            check_cpus("train.num_workers", 10_000)


@pytest.mark.parametrize(
    ("address", "section", "workers", "refused"),
    [
        ("", "train", 0, True),
        ("", "train", 1, True),
        ("", "evaluate", 1, True),
        ("auto", "train", 0, True),  # in this process, whatever cluster there is
        ("auto", "train", 1, False),
        ("auto", "evaluate", 1, False),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_by_what_computes_here(monkeypatch, gcs, address, section, workers, refused):
    monkeypatch.setenv("RAY_ADDRESS", address and gcs(lets_in=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = getattr(load_config("smoke", [f"{section}.device=cuda", f"{section}.num_workers={workers}"]), section)
    with pytest.raises(BadInput, match=f"{section}.device is 'cuda'; expected cpu") if refused else nullcontext():
        check_machine(section, settings)


@pytest.mark.parametrize(
    ("stage", "key"),
    [("train", "train"), ("evaluate", "evaluate"), ("calibrate", "evaluate"), ("tokenize_images", "tokens"),
     ("detokenize", "tokens"), ("generate", "generate"), ("train_generator", "train_generator"), ("demo", "evaluate"),
     ("train_extractor", "train"), ("sweep", "train")],
)  # fmt: skip
def test_every_stage_refuses_a_gpu_that_is_not_there_before_it_makes_anything(monkeypatch, tmp_path, stage, key):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    others = ["filter.mean_tokens=8", "sweep.kind=architecture", "sweep.space={train.seed: [0, 1]}"]
    others += [f"run.output={tmp_path}", "sweep.cuts={relative: [1]}"]
    config = load_config("smoke", [f"{key}.device=cuda", *others])
    with pytest.raises(BadInput, match=f"{key}.device is 'cuda'; expected cpu or auto"):
        find_stage(stage).check(config)


@pytest.mark.usefixtures("ray_session")
def test_connecting_again_does_nothing():
    assert connect() is connect()


@pytest.mark.ray
@pytest.mark.slow
def test_connecting_leaves_sigterm_to_the_job(run_python):
    said = run_python(
        "import signal\n"
        "from pipeline.core.cluster import connect\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: print('orderly stop'))\n"
        "connect()\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    assert (said.returncode, said.stdout) == (0, "orderly stop\n"), said.stderr


def test_what_an_autoscaler_may_add_counts_as_there(monkeypatch):
    from ray._private.state import state

    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "memory": 9.0})
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 64, "GPU": 8})
    assert most_resources(ray) == {"CPU": 64.0, "GPU": 8.0, "memory": 9.0}
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: None)
    assert most_resources(ray) == {"CPU": 4.0, "memory": 9.0}


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_that_died_is_not_waited_for(run_python):
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray's sockets lie in it
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # as a killed head leaves it behind
    code = "from pipeline.core.cluster import connect\nprint(connect().is_initialized())"
    said = run_python(code, RAY_TMPDIR=str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    assert said.stdout.splitlines()[-1:] == ["True"], said.stderr


class WaitsForTheReader:
    """Its second row is not finished before the file is there, for which it waits a while."""

    def __init__(self, place: str) -> None:
        self.place, self.rows = Path(place), 0

    def __call__(self, row: dict) -> dict:
        self.rows += 1
        until = time.monotonic() + 20
        while self.rows == 2 and not self.place.exists() and time.monotonic() < until:
            time.sleep(0.05)
        return {"seen": self.place.exists()}


@pytest.mark.ray
def test_rows_come_when_they_are_finished_and_not_when_the_next_is(tmp_path, ray_session):
    ray = connect()
    items = ray.data.range(2, override_num_blocks=2)
    place = tmp_path / "read"
    pool = ray.data.ActorPoolStrategy(size=1)
    seen = []
    for row in as_they_finish(items.map(WaitsForTheReader, fn_constructor_args=(str(place),), compute=pool)):
        seen.append(row["seen"])
        place.touch()
    assert seen == [False, True]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("train", "auto").type == pick_device("train", "cpu").type == "cpu"
    with pytest.raises(BadInput, match=r"train\.device is 'cuda'; expected cpu or auto on a machine without"):
        pick_device("train", "cuda")


def test_a_gpu_is_taken_where_there_is_one_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [pick_device("train", wanted).type for wanted in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_more_workers_than_the_cluster_has_room_for_are_refused(ray_session: ModuleType) -> None:
    assert pick_workers_device("evaluate", "cpu", 2) == "cpu"
    with pytest.raises(BadInput, match=r"evaluate\.num_workers is 3, which needs 3 CPUs; expected at most .* has, 2"):
        pick_workers_device("evaluate", "auto", 3)
    if not ray_session.cluster_resources().get("GPU"):
        with pytest.raises(BadInput, match=r"tokens\.num_workers is 1, which needs 1 GPUs; expected at most .* has, 0"):
            pick_workers_device("tokens", "cuda", 1)


def test_precision_is_as_configured_and_single_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert [uses_bf16(precision, cpu) for precision in ("auto", "float32", "bf16")] == [False, False, True]
