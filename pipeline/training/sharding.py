"""FSDP2: a worker holds its part of weights, average, gradients and optimiser, and all of a block only while it is due.

Cut are the blocks of encoder and decoder, one by one, and the rest together: it is gathered once a step. The entropy
model belongs to the rest, because how often a step asks it depends on the samples of a worker, and what workers gather
together must not.

Everything is loaded and kept whole: checkpoints are those of DDP, and either goes on from the other's.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from pipeline.config import TrainConfig
from pipeline.training import distributed
from pipeline.training.optimizers import make_optimizer
from pipeline.training.state import load_optimizer, optimizer_tensors
from tatok_model.tokenizer import TaTok


def shard(
    model: TaTok, average: TaTok, optimizer: torch.optim.Optimizer, config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Cut two models in place, equal on every worker, and what the optimiser of the first remembers.

    Args:
        model: what is trained.
        average: of the same architecture.
        optimizer: of the whole model.
        config: of the training.
        device: where this worker computes.

    Returns:
        An optimiser of the parameters that `model` now has.

    Source: `torch.distributed.fsdp.fully_shard`, which is FSDP2 (arXiv 2304.11277 for the idea).
    """
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for part in (model, average):
        for block in (*part.encoder.blocks, *part.decoder.blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(part, mesh=mesh)
    own = make_optimizer(model, config)
    parameters = [parameter for group in own.param_groups for parameter in group["params"]]
    found = optimizer_tensors(optimizer)
    for name, tensor in found.items():
        if tensor.ndim:  # a moment, not the count of steps
            found[name] = distribute_tensor(tensor, mesh, parameters[int(name.split(".")[0])].placements)
    load_optimizer(own, found)
    return own
