"""cluster.yaml against Ray's own schema, and what it promises: a head without GPU, spot first, nothing open to all."""

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

# Private to Ray, and the only thing that knows: `ray up` and its autoscaler call the same.
util = pytest.importorskip("ray.autoscaler._private.util")
autoscaler = pytest.importorskip("ray.autoscaler.v2.scheduler")


@pytest.fixture
def cluster(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster.yaml").read_text())


def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    found = util.prepare_config(copy.deepcopy(cluster))
    util.validate_config(found)
    return found


def chosen(cluster: dict[str, Any], demand: dict[str, float], failed: str = "") -> dict[str, int]:
    """The nodes that Ray's autoscaler adds for one such demand, where it has just failed to get the type `failed`."""
    from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    types = AutoscalingConfig(copy.deepcopy(cluster), skip_content_hash=True).get_node_type_configs()
    request = autoscaler.SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={name: kind for name, kind in types.items() if name != "head"},
        max_num_nodes=12,
        resource_requests=[ResourceRequestByCount(request=ResourceRequestUtil.make(demand), count=1)],
        recoverable_resource_availabilities={failed: 0.0},
    )
    events = AutoscalerEventLogger(logger=Mock())
    reply = autoscaler.ResourceDemandScheduler(events).schedule(request)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    assert prepared(cluster)["cluster_name"] == "tatok"


def misspell(cluster: dict[str, Any]) -> None:
    cluster["max_worker"] = cluster.pop("max_workers")


def name_an_unknown_head(cluster: dict[str, Any]) -> None:
    cluster["head_node_type"] = "haed"


def leave_out_resources(cluster: dict[str, Any]) -> None:
    del cluster["available_node_types"]["gpu_spot"]["resources"]


@pytest.mark.parametrize(
    ("mistake", "told"),
    [(misspell, "max_worker"), (name_an_unknown_head, "head_node_type"), (leave_out_resources, "resources")],
)
def test_ray_would_tell_a_mistake(
    cluster: dict[str, Any], mistake: Callable[[dict[str, Any]], None], told: str
) -> None:
    mistake(cluster)
    with pytest.raises(Exception, match=told):
        prepared(cluster)


def test_the_head_has_no_gpu_and_takes_no_work(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


def test_spot_is_tried_before_on_demand(cluster: dict[str, Any]) -> None:
    assert chosen(cluster, {"CPU": 1, "GPU": 1}) == {"gpu_spot": 1}
    assert chosen(cluster, {"CPU": 1, "GPU": 1}, failed="gpu_spot") == {"gpu_on_demand": 1}
    assert chosen(cluster, {"CPU": 1}) == {"cpu_spot": 1}  # and work for CPUs does not wait on a GPU
    types = cluster["available_node_types"]
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"cpu_spot", "gpu_spot"}


def test_workers_come_and_go_with_the_work(cluster: dict[str, Any]) -> None:
    workers = [kind for name, kind in cluster["available_node_types"].items() if name != "head"]
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers)


def test_only_ssh_is_open_and_ray_asks_for_a_token(cluster: dict[str, Any]) -> None:
    rules = cluster["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]
    assert "0.0.0.0" not in str(cluster)
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in cluster[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]


def test_a_stopped_job_has_time_for_a_checkpoint_and_outputs_last(cluster: dict[str, Any]) -> None:
    head = " ".join(cluster["head_start_ray_commands"])
    assert "RAY_JOB_STOP_WAIT_TIME_S=60" in head
    assert "TATOK_ROOT=/mnt/tatok" in head


def test_the_images_have_the_ray_and_python_that_the_project_needs(cluster: dict[str, Any], repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    ray = next(name for name in project["dependencies"] if name.startswith("ray["))
    series = ray.partition("==")[2].removesuffix(".*")
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{series}.")
        assert "-py311-" in image
