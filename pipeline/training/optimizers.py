"""Which optimiser moves which parameters of a model.

Hidden matrices are the weights of linear layers inside transformer blocks: of a tokenizer's encoder, decoder and
entropy model, of a generator's blocks and code block. A block's `to_qkv` counts as one matrix.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from tatok_model import generator_layers, vit

BLOCKS = (vit.Block, generator_layers.Block)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; with `optimizer: muon` Muon moves the hidden matrices, if there are any, and AdamW the rest.

    Gains, biases and single vectors are not decayed.
    """
    hidden = hidden_matrices(model) if config.optimizer == "muon" else []
    muons = set(hidden)
    trained = [p for p in model.parameters() if p.requires_grad and p not in muons]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=config.fused)
    return MuonAdamW(hidden, adamw, config) if hidden else adamw


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Those that are trained, in the order of the blocks."""
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    return [layer.weight for layer in layers if layer.weight.requires_grad]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, as one: parameters are numbered through, Muon's first.

    Muon makes of a matrix's momentum U S V^T about U V^T. That times 0.2 sqrt(max(rows, columns)) has entries of a root
    mean square of 0.2, which is usual for AdamW: both go by one learning rate and one decay.

    Args:
        hidden: 2-D, at least one.
        adamw: of the rest.
        config: of the training.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; the scale is that of Liu et al. 2025, arXiv
    2502.16982, `match_rms_adamw`.
    """

    def __init__(self, hidden: list[Tensor], adamw: torch.optim.AdamW, config: TrainConfig) -> None:
        self._adamw = adamw
        self._muon = torch.optim.Muon(hidden, config.learning_rate, config.weight_decay, adjust_lr_fn="match_rms_adamw")
        super().__init__([*self._muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient."""
        hidden, *rest = self.param_groups  # what is loaded takes the place of groups and state: both are handed on anew
        self._muon.state = self._adamw.state = self.state
        for matrix in hidden["params"]:
            self._muon.param_groups = [{**hidden, "params": [matrix]}]
            if hasattr(matrix, "full_tensor"):
                self._move_sharded(matrix)
            else:
                self._muon.step()
        self._adamw.param_groups = rest
        self._adamw.step()

    def _move_sharded(self, matrix: Any) -> None:
        """Gather gradient and momentum of one matrix (FSDP2), do as with a whole one, keep this worker's part.

        torch's Muon takes parts too, but then adds up bfloat16 products of workers: other numbers than DDP's, slower.
        """
        from torch.distributed.tensor import Replicate  # imports for a second what only FSDP2 needs

        if matrix.grad is None:
            return
        state, everywhere = self.state[matrix], [Replicate()]
        matrix.grad = matrix.grad.redistribute(placements=everywhere)
        if state:
            state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=everywhere)
        self._muon.step()
        state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=matrix.placements)
        matrix.grad = None  # a whole one would stay until all matrices have moved
