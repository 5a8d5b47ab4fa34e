"""What fails in the first hour on a new machine or cluster, found in a minute: a line for each thing that is looked at.

Where `RAY_ADDRESS` names a cluster (inside a submitted job it does), all its nodes are asked; else this machine.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core.checkpoints import check_architecture, find, from_hub, is_hub_id
from pipeline.core.cluster import check_cluster, check_room, connect, most_resources, names_cluster, pick_device
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.files import INPUT_KEYS, in_temporary_copy, leave, masked, resolve_paths
from pipeline.core.job import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    command_line,
    own_stdout,
    parse_arguments,
    refuse,
)
from pipeline.core.presets import load_config
from pipeline.data.checks import check_files, check_pictures
from pipeline.tracking import check_store, check_tracking

WEIGHTS = (  # files that a preset may name
    "losses.perceptual_backbone", "losses.perceptual_heads", "evaluate.inception_weights", "evaluate.reference",
    "evaluate.lpips_backbone", "evaluate.lpips_heads",
)  # fmt: skip
UPLOAD_BYTES = 100 * 2**20  # what Ray's dashboard takes of a working directory
LEAST_BYTES = 2 * 2**30  # of free storage: some checkpoints and shards
SECONDS = 40  # that the nodes of a cluster which answers may take
PREFIX = "PROBE "  # of the line that `probe` prints, among what Ray prints


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    problem: str = ""  # a sentence that says how to mend it; '' where all is well
    note: str = ""  # what was seen


def diagnose(description: str | None) -> NoReturn:
    """Print a line for each thing that is looked at, with the arguments of this process; exits, makes no run folder."""
    arguments = parse_arguments(description)
    stdout = own_stdout()
    problems = 0
    try:
        config = resolve_paths(load_config(arguments.preset, arguments.overrides))
        for finding in examine(config, ray=not arguments.dry_run):
            problems += bool(finding.problem)
            line = f"{'wrong' if finding.problem else 'well '}  {finding.name:<10} {finding.problem or finding.note}"
            print(line.rstrip(), file=stdout, flush=True)
    except BadInput as error:
        refuse(error)
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr)
        leave(EXIT_STOPPED)
    if problems:
        print(f"error: {problems} thing{'s' if problems > 1 else ''} would fail", file=sys.stderr)
    else:
        say(f"next, train:\n  {command_line('train', arguments.preset, *arguments.overrides)}")
    leave((EXIT_BAD_INPUT if arguments.dry_run else EXIT_FAILED) if problems else EXIT_DONE)


def examine(config: Config, ray: bool = True) -> Iterator[Finding]:
    """Look at one thing after the other.

    Args:
        config: with resolved paths.
        ray: also what needs Ray, or writes a file.
    """
    yield _found("pictures", lambda: check_pictures(config))
    yield _found("weights", lambda: _check_weights(config, ask=ray))
    yield _found("tracking", lambda: _check_tracking(config, ask=ray))
    if not ray:
        return
    if not in_temporary_copy():
        yield _found("upload", lambda: _check_upload(Path.cwd()))
    storage = _found("storage", lambda: _check_storage(config))
    yield storage
    address = os.environ["RAY_ADDRESS"] if names_cluster() else ""
    cluster: dict[str, Any] = {}
    yield _found("ray", lambda: cluster.update(_ask(config, address, usable=not storage.problem)))
    if cluster:
        yield _found("resources", lambda: _check_resources(config, cluster["resources"]))
        yield _found("nodes", lambda: check_nodes(cluster["nodes"]))


def _found(name: str, check: Callable[[], Any]) -> Finding:
    """What a check says, or what it raises."""
    try:
        note = check()
        return Finding(name, note=note if isinstance(note, str) else "")
    except BadInput as error:
        return Finding(name, problem=str(error))


def _check_weights(config: Config, ask: bool) -> None:
    check_files(config, *WEIGHTS)
    check_architecture(config)
    if ask and is_hub_id(config.tokenizer.checkpoint):
        from_hub(config.tokenizer.checkpoint)
    if config.generator.checkpoint:
        find(config.generator.checkpoint, "generator.checkpoint")


def _check_tracking(config: Config, ask: bool) -> str:
    check_tracking(config)
    if ask:
        check_store(config)
    return masked(config.tracking.uri) or "none"


def _check_upload(folder: Path) -> str:
    """What `ray job submit --working-dir .` would upload from here."""
    size, largest = _upload(folder)
    mib = size / 2**20
    if size > UPLOAD_BYTES:
        names = ", ".join(f"{name} ({bytes_ / 2**20:.0f} MiB)" for name, bytes_ in largest)
        raise BadInput(
            f"{str(folder)!r} holds {mib:.0f} MiB that `ray job submit --working-dir .` would upload; expected at most "
            f"{UPLOAD_BYTES // 2**20}: move the largest away or name them in .rayignore: {names}"
        )
    return f"{mib:.1f} MiB from {folder}"


def _upload(folder: Path) -> tuple[int, list[tuple[str, int]]]:
    """Bytes of the files that Ray would upload, and the three largest."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size

    _dir_travel(folder, [_get_excludes(folder, get_runtime_env_default_excludes())], add, include_gitignore=True)
    return sum(sizes.values()), sorted(sizes.items(), key=lambda item: -item[1])[:3]


def _check_storage(config: Config) -> str:
    """The storage of run.output, as this machine sees it."""
    output = Path(config.run.output)
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"run.output {str(output)!r} cannot be made in {str(there)!r}; expected a folder to write to")
    free = shutil.disk_usage(there).free
    if free < LEAST_BYTES:
        raise BadInput(
            f"run.output {str(output)!r} has {free / 2**30:.1f} GiB of free storage; expected at least "
            f"{LEAST_BYTES / 2**30:.0f} for shards and checkpoints"
        )
    return f"{free / 2**30:.0f} GiB free for {output}"


def _ask(config: Config, address: str, usable: bool) -> dict[str, Any]:
    """The cluster's resources and what its nodes see.

    Raises:
        BadInput: there is no way in.
    """
    seen = sorted({path for key in (*INPUT_KEYS, "data.shards") for path in _paths(config, key) if path[:1] == "/"})
    output = Path(config.run.output)
    written = [str(output)] if usable else []
    made = not output.exists()
    check_cluster()
    try:
        if not address:
            return {"resources": _own_resources(), "nodes": [look(seen, written, "")]}
        if not usable:
            return _ask_cluster(address, seen, [], "")
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output, prefix=".doctor-") as marker:
            return _ask_cluster(address, seen, written, marker.name)
    finally:
        if made and output.is_dir() and not any(output.iterdir()):
            output.rmdir()


def _paths(config: Config, key: str) -> tuple[str, ...]:
    """What a key names: one, several or ''."""
    value = config.value(key)
    return value if isinstance(value, tuple) else (value,)


def _own_resources() -> dict[str, float]:
    """Of this machine."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def _ask_cluster(address: str, seen: list[str], written: list[str], marker: str) -> dict[str, Any]:
    """What `probe` says in a process of its own: a client that Ray does not let in may hang or be ended by Ray."""
    arguments = json.dumps({"seen": seen, "written": written, "marker": marker})
    command = [sys.executable, "-m", "pipeline.doctor", arguments]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
        output, errors = said.stdout, said.stderr
    except subprocess.TimeoutExpired:
        output, errors = "", f"no answer within {SECONDS} s"
    for line in output.splitlines():
        if line.startswith(PREFIX):
            return dict(json.loads(line.removeprefix(PREFIX)))
    last = masked((errors.strip().splitlines() or ["no answer"])[-1])
    raise BadInput(
        f"RAY_ADDRESS is {address!r}, whose nodes do not answer ({last}); expected a cluster that this machine is a "
        "node of, or no RAY_ADDRESS to work on this machine"
    )


def _check_resources(config: Config, resources: dict[str, float]) -> str:
    """Whether the workers of every stage find room."""
    from pipeline.training.train import check_resources

    for section in ("train", "train_generator"):
        part = getattr(config, section)
        if part.num_workers:
            check_resources(resources, config, section)
        else:
            pick_device(section, part.device)
    for section in ("evaluate", "tokens", "generate"):
        part = getattr(config, section)
        check_room(resources, f"{section}.num_workers", part.num_workers, gpu=part.device == "cuda")
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


def check_nodes(nodes: list[dict[str, Any]]) -> str:
    """Whether all nodes see the same storage and have the same versions.

    Args:
        nodes: what `look` says on each.

    Raises:
        BadInput: naming the first node that differs, and in what.
    """
    for node in nodes:
        if node["missing"]:
            raise BadInput(
                f"node {node['node']!r} does not see {node['missing'][0]!r}; expected storage that every node mounts"
            )
        for folder, reason in node["unwritable"].items():
            raise BadInput(
                f"node {node['node']!r} cannot write to {folder!r} ({reason}); expected shared storage to write to"
            )
        if not node["shared"]:
            raise BadInput(
                f"node {node['node']!r} has a run.output of its own; expected one that all nodes share, NFS or the like"
            )
        for name, version in nodes[0]["versions"].items():
            if node["versions"][name] != version:
                raise BadInput(
                    f"node {node['node']!r} has {name} {node['versions'][name]}; "
                    f"expected {version}, as node {nodes[0]['node']!r}"
                )
    return f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"


def look(seen: list[str], written: list[str], marker: str) -> dict[str, Any]:
    """What this machine sees. Runs on every node of a cluster, as plain Python: the project need not be there.

    Args:
        seen: paths; those that do not exist here are named.
        written: folders that a file is made in and removed again; the reasons why not are named.
        marker: a file that the doctor has made just now, on storage that all nodes should share; '' for none.
    """
    unwritable = {}
    for folder in written:
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x" * 4096)
                file.flush()
        except OSError as error:
            unwritable[folder] = error.strerror or str(error)
    versions = {"python": platform.python_version()}
    for name in ("ray", "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {
        "node": platform.node(),
        "missing": [path for path in seen if not os.path.exists(path)],
        "unwritable": unwritable,
        "shared": not marker or os.path.exists(marker),
        "versions": versions,
    }


def probe(seen: list[str], written: list[str], marker: str) -> dict[str, Any]:
    """`resources` that the cluster has or can grow to, and `nodes`: what each living one sees."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray = connect()
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    here = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    found = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(seen, written, marker)
        for node in here
    ]
    return {"resources": most_resources(ray), "nodes": ray.get(found, timeout=60)}


if __name__ == "__main__":
    print(PREFIX + json.dumps(probe(**json.loads(sys.argv[1]))), flush=True)
