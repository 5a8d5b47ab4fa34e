"""Everything that training changes: a model, its average, its optimiser, the step; whatever the model is."""

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core import checkpoints
from pipeline.core.checkpoints import Checkpoint
from pipeline.core.config import TrainConfig
from pipeline.core.console import say
from pipeline.core.manifest import check_unchanged
from pipeline.training import distributed
from pipeline.training.distributed import Mean, Terms
from tatok_model import vit
from tatok_model.generation import layers

BLOCKS = (vit.Block, layers.CausalBlock)  # whose matrices Muon moves


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine to `min_learning_rate` at `max_steps`; steps are counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


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


Model = TypeVar("Model", bound=nn.Module)


class TrainState(Generic[Model]):
    """A model, its average and its optimiser after `step` steps.

    Args:
        model: what is trained, on its device.
        config: of the training.
        read: the averaged model of a checkpoint folder.
    """

    def __init__(self, model: Model, config: TrainConfig, read: Callable[[Path], Model]) -> None:
        self.train_config, self.read = config, read
        self.step = 0
        self.seconds = 0.0  # spent by earlier attempts
        self.skipped = False  # the last step was left out: its gradient was NaN or infinite
        self.frozen = False  # parts of the model are not trained and stay in evaluation mode
        self.model = model
        self.average: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(model, config)
        self.sharded = False  # every worker holds a part of all this
        self._buffers: list[Tensor] = []

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters whose gradients are clipped together, by the ending of their metric's name."""
        return {"": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}

    def begin_step(self) -> None:
        """Set the learning rate and the model's mode, and key torch's generator by the step.

        Dropout and new codebook entries draw from it: a resumed run draws what an uninterrupted one would have drawn.
        """
        self.model.train(not self.frozen)
        rate = learning_rate(self.step, self.train_config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(derive_seed(self.train_config.seed, "step", self.step))
        if self.keeps_buffers:  # codebooks move while a batch is encoded, before anybody knows its gradient
            self._buffers = [buffer.detach().clone() for buffer in self.model.buffers()]

    @property
    def keeps_buffers(self) -> bool:
        """Whether a step can be taken back once it has begun."""
        return self.skips or self.train_config.accumulation > 1

    def take_back(self) -> None:
        """Undo what a step has changed before `descend`."""
        for buffer, before in zip(self.model.buffers(), self._buffers, strict=True):
            buffer.detach().copy_(before)
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def skips(self) -> bool:
        """Whether a step whose gradient is NaN or infinite is left out: every step then waits for its norm."""
        return self.train_config.not_finite == "skip"

    def descend(self) -> Terms:
        """Clip the gradients that have been added up and move the weights; the norms by their metrics' names.

        Where steps may be left out, one whose gradient is NaN or infinite changes nothing; workers have equal gradients
        and decide alike.
        """
        norms = {}
        limit = self.train_config.clip_norm or (math.inf if self.skips else 0)
        if limit:
            # Apart: cross-entropy in bits would otherwise decide how far the tokenizer may move.
            for name, parameters in self.parameter_groups().items():
                norms[f"gradient_norm{name}"] = distributed.whole(nn.utils.clip_grad_norm_(parameters, limit))
        self.skipped = self.skips and not all(math.isfinite(norm) for norm in norms.values())
        if self.skipped:
            self.take_back()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {name: Mean.of(norm) for name, norm in norms.items()}

    def end_step(self) -> None:
        """Count the step and move the average."""
        self.step += 1
        self.update_average()

    def start_from(self, weights: Model) -> None:
        """Take over the weights of another model of the same architecture: fine-tuning."""
        self.model.load_state_dict(weights.state_dict())
        self.average.load_state_dict(weights.state_dict())

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the model; early steps count more, so that it forgets the start."""
        decay = min(self.train_config.ema_decay, (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - decay)
        for averaged, current in zip(self.average.buffers(), self.model.buffers(), strict=True):
            averaged.copy_(current)  # codebooks are averages already

    def averaged(self) -> Model:
        """The averaged model, whole, on its device; where the state is sharded a copy, and every worker has to ask."""
        return self.average

    def snapshot(self) -> tuple[Model, dict[str, Tensor]]:
        """What a checkpoint keeps, in main memory: the averaged model and `tensors`; as `averaged`."""
        return copy.deepcopy(self.averaged()).cpu(), self.tensors()

    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What a checkpoint keeps besides the averaged model, by the prefix of its tensors' names."""
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all that is `stateful`, in main memory: they are written while training goes on.

        Only the first worker gets them; of sharded tensors the others give their parts.
        """
        copies = {}
        for prefix, part in self.stateful().items():
            tensors = part.state_dict() if isinstance(part, nn.Module) else optimizer_tensors(part)
            for name, tensor in tensors.items():
                value = distributed.whole(tensor.detach())
                if distributed.rank() == 0:
                    copies[f"{prefix}.{name}"] = value.to("cpu", copy=True)
        return copies

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was written."""
        self.load_tensors(checkpoint.tensors())
        self.average.load_state_dict(self.read(checkpoint.folder).state_dict())
        self.step = checkpoint.step
        self.seconds = float(checkpoint.record.get("seconds", 0.0))

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for prefix, part in self.stateful().items():
            names = [name for name in tensors if name.startswith(f"{prefix}.")]
            own = {name.removeprefix(f"{prefix}."): tensors[name] for name in names}
            if isinstance(part, nn.Module):
                part.load_state_dict(own)
            else:
                load_optimizer(part, own)


def derive_seed(seed: int, *keys: int | str) -> int:
    """A seed for one purpose: equal keys give equal seeds, different ones unrelated seeds."""
    text = ":".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of each parameter as `number.key`.

    `torch.distributed.checkpoint.state_dict` would call it by the parameter's name, add all settings of groups, and
    take a step to fill a new optimiser: other checkpoints than those that are there.
    """
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, values in state.items() for key, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; groups keep their own settings."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def go_on(state: TrainState[Any], folder: Path, decides: dict[str, Any]) -> bool:
    """Load the newest checkpoint in `folder` into a new state; False where there is none.

    `decides` is what decides the weights of a step, by key; a run that was begun with other values is refused.
    """
    checkpoint = checkpoints.latest(folder)
    if checkpoint is None:
        return False
    check_unchanged(checkpoint.record["decides"], decides)
    state.load(checkpoint)
    say(f"going on from step {state.step}")
    return True
