"""The time on a device, and what it is called."""

import time
from typing import Any


def now(device: Any) -> float:
    """Seconds, when everything asked of a `torch.device` is done."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_facts(device: Any) -> dict[str, str]:
    """Name and threads of a `torch.device`, for the report; `gpu` where it is one."""
    import torch

    if device.type != "cuda":
        return {"device": "CPU", "threads": str(torch.get_num_threads())}
    name = torch.cuda.get_device_name(device)
    return {"device": name, "gpu": name}
