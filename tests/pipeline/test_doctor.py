"""Each planted fault is found, in a sentence that says how to mend it, and only it."""

import shutil
import socket
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.core.errors import BadInput
from pipeline.core.files import resolve_paths
from pipeline.core.presets import load_config
from pipeline.doctor import look

KEYS = ("data.num_workers=1", "tracking.uri=")
HEALTHY = {
    "node": "a",
    "missing": [],
    "unwritable": {},
    "shared": True,
    "versions": {"python": "3.11.9", "ray": "2.60"},
}


@pytest.fixture
def examine(tmp_path, monkeypatch):
    """`examine("key=value", ...)`: problems by name, in an empty working directory on a machine with 4 CPUs."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(doctor, "_own_resources", lambda: {"CPU": 4.0, "GPU": 0.0})

    def run(*overrides: str) -> dict[str, str]:
        config = resolve_paths(load_config("smoke", [*KEYS, f"run.output={tmp_path}/runs", *overrides]))
        return {finding.name: finding.problem for finding in doctor.examine(config) if finding.problem}

    return run


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_healthy_machine_has_no_problem(examine, tmp_path):
    assert examine() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["work"]  # nothing is left behind


def test_a_source_that_is_not_there(examine):
    found = examine("data.source=/no/pictures")
    assert "data.source '/no/pictures' does not exist; expected" in found["pictures"]


def test_whatever_a_preset_reads_has_to_be_seen_by_the_nodes(examine, tmp_path):
    (tmp_path / "inception.pth").touch()
    found = examine(
        "tokens.path=/no/tokens", f'evaluate.more_extractors=["{tmp_path}/inception.pth","/no/features.pth"]'
    )
    assert "does not see '/no/features.pth'; expected storage that every node mounts" in found["nodes"]
    assert "does not see '/no/tokens'" in examine("tokens.path=/no/tokens")["nodes"]


def test_weights_that_are_not_there(examine):
    found = examine("losses.perceptual_backbone=/no/vgg.pth", "losses.perceptual_heads=/no/heads.pth")
    assert "losses.perceptual_backbone '/no/vgg.pth' does not exist" in found["weights"]
    assert "no config.json" in examine(f"generator.checkpoint={Path.cwd()}")["weights"]


def test_a_tracking_server_that_does_not_answer(examine):
    found = examine(f"tracking.uri=http://127.0.0.1:{free_port()}")
    assert "no server answers" in found["tracking"]


def test_a_tracking_server_that_refuses_this_name(examine):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 403)
            self.end_headers()

        do_POST = do_GET  # noqa: N815 - its name in http.server

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = examine(f"tracking.uri=http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    assert "answers 403; expected a server that was started with --allowed-hosts" in found["tracking"]


def test_an_upload_that_ray_would_refuse(examine):
    Path("ignored").mkdir()
    for name in ("checkpoint.bin", "ignored/other.bin"):
        with open(name, "wb") as file:
            file.truncate(101 * 2**20)  # takes no room
    Path(".rayignore").write_text("ignored/\n")
    assert "101 MiB" in examine()["upload"]
    assert "name them in .rayignore: checkpoint.bin (101 MiB)" in examine()["upload"]
    Path(".rayignore").write_text("*.bin\n")
    assert examine() == {}


def test_storage_that_cannot_be_written_to(examine):
    Path("file").touch()
    assert "cannot be made in" in examine(f"run.output={Path.cwd()}/file/runs")["storage"]


def test_storage_that_is_nearly_full(examine, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**29))
    assert "has 0.5 GiB of free storage; expected at least 2" in examine()["storage"]


def test_a_cluster_that_is_not_there(examine, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert "where no Ray cluster can be joined ([Errno 111] Connection refused); expected host" in examine()["ray"]


def test_a_cluster_whose_nodes_do_not_answer(examine, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(doctor, "check_cluster", lambda: None)  # it answers
    monkeypatch.setattr(doctor, "SECONDS", 0.05)  # sooner than a connection can be refused
    assert "whose nodes do not answer (no answer within 0.05 s); expected a cluster that this" in examine()["ray"]


def test_a_temporary_folder_that_no_ray_can_start_in(examine, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 60)
    assert " for the sockets that Ray makes below it; expected RAY_TMPDIR" in examine()["ray"]


def test_too_few_cpus_and_gpus(examine, monkeypatch):
    found = examine("train.num_workers=8", "train.global_batch_size=64")
    assert "train.num_workers is 8, which needs 8 CPUs; expected at most what the cluster has, 4" in found["resources"]
    assert "evaluate.num_workers is 5, which needs 5 CPUs" in examine("evaluate.num_workers=5")["resources"]
    assert "tokens.num_workers is 1, which needs 1 GPUs" in examine("tokens.device=cuda")["resources"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # what trains in this process asks this machine
    assert (
        "train.device is 'cuda'; expected cpu or auto on a machine without" in examine("train.device=cuda")["resources"]
    )


def test_the_least_number_of_workers_is_what_has_to_find_room(examine, monkeypatch):
    workers = ("train.num_workers=8", "train.global_batch_size=64", "train.device=cuda")
    monkeypatch.setattr(doctor, "_own_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    assert "needs 8 CPUs" in examine(*workers)["resources"]
    assert "needs 3 GPUs" in examine(*workers, "train.min_workers=3")["resources"]
    assert "resources" not in examine(*workers, "train.min_workers=2")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            {"missing": ["/data/shards"]},
            "node 'b' does not see '/data/shards'; expected storage that every node mounts",
        ),
        (
            {"unwritable": {"/runs": "Read-only file system"}},
            "node 'b' cannot write to '/runs' (Read-only file system)",
        ),
        ({"shared": False}, "node 'b' has a run.output of its own; expected one that all nodes share"),
        ({"versions": {"python": "3.12.1", "ray": "2.60"}}, "node 'b' has python 3.12.1; expected 3.11.9, as node 'a'"),
    ],
)
def test_a_node_that_differs(fault, sentence):
    assert doctor.check_nodes([HEALTHY, {**HEALTHY, "node": "b"}]) == "2 nodes"
    with pytest.raises(BadInput) as caught:
        doctor.check_nodes([HEALTHY, {**HEALTHY, "node": "b", **fault}])
    assert str(caught.value).startswith(sentence)


def test_what_a_node_sees_is_what_is_there(tmp_path):
    (tmp_path / "file").touch()
    marker = str(tmp_path / "marker")
    seen = look([str(tmp_path), "/no/such"], [str(tmp_path / "new"), str(tmp_path / "file" / "x")], marker)
    assert seen["missing"] == ["/no/such"]
    assert seen["unwritable"] == {str(tmp_path / "file" / "x"): "Not a directory"}
    assert not seen["shared"]
    assert look([], [], "")["shared"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_is_asked_on_all_its_nodes(run_python, tmp_path):
    code = f"""
import os
from ray.cluster_utils import Cluster
from pipeline import doctor
from pipeline.core.presets import load_config
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False}})
cluster.add_node(num_cpus=2)
os.environ["RAY_ADDRESS"] = cluster.address
config = load_config("smoke", ["run.output={tmp_path}/runs", "tracking.uri=", "data.num_workers=1"])
for finding in doctor.examine(config): print(finding.name, finding.problem or finding.note)
cluster.shutdown()
"""
    said = run_python(code, timeout=280, RAY_raylet_start_wait_time_s="120")
    assert "resources 3 CPUs, 0 GPUs" in said.stdout, said.stdout + said.stderr
    assert "nodes 2 nodes" in said.stdout


def test_the_job_tells_a_line_for_each_thing_and_fails_when_one_is_wrong(run_job, tmp_path):
    said = run_job("doctor", "smoke", "data.source=/no/pictures", "train.device=cuda", *KEYS, timeout=250)
    assert said.returncode == 1
    lines = [line.split()[:2] for line in said.stdout.splitlines()]
    assert lines == [
        ["wrong", "pictures"], ["well", "weights"], ["well", "tracking"], ["well", "upload"], ["well", "storage"],
        ["well", "ray"], ["wrong", "resources"], ["wrong", "nodes"],
    ]  # fmt: skip
    assert said.stderr.splitlines()[-1] == "error: 3 things would fail"
    assert not list(tmp_path.iterdir())
