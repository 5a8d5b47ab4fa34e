"""What a cluster looks like from inside: its resources, and what each of its nodes sees of the storage.

    python -m pipeline.doctor_probe '{"seen": [paths], "written": [folders], "marker": file}'

The doctor runs this in a process of its own, since a client that Ray does not let in may hang or be ended by Ray. It
prints one line of JSON. What runs on the nodes is plain Python: the project need not be there.
"""

import json
import sys
from typing import Any

PREFIX = "PROBE "  # of the line, among what Ray prints


def look(seen: list[str], written: list[str], marker: str) -> dict[str, Any]:
    """What this machine sees.

    Args:
        seen: paths; those that do not exist here are named.
        written: folders that a file is made in and removed again; the reasons why not are named.
        marker: a file that the doctor has made just now, on storage that all nodes should share; '' for none.
    """
    import os
    import platform
    import tempfile
    from importlib import metadata

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

    from pipeline.core.cluster import connect, most_resources

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
