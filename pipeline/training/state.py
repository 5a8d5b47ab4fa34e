"""Everything that training changes: models, averages, optimisers, the step."""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoints import Checkpoint
from pipeline.config import Config, TrainConfig
from pipeline.training.adversary import Adversary
from tatok_model.tokenizer import TaTok

ENTROPY = "entropy_model."  # beginning of its parameters' names


class TrainState:
    """The tokenizer, its average, optionally a discriminator, and their optimisers after `step` steps."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.step = 0
        self.seconds = 0.0  # spent by earlier attempts
        torch.manual_seed(derive_seed(config.train.seed, "weights"))
        self.model = TaTok(config.tokenizer.architecture()).to(device)
        self.frozen = config.train.parts == "entropy"  # all but the entropy model
        if self.frozen:
            self.model.requires_grad_(False)
            self.entropy_model.requires_grad_(True)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(self.model, config.train)
        self.adversary = Adversary(config, device) if config.losses.gan else None

    @property
    def entropy_model(self) -> nn.Module:
        """Of the tokenizer, which has to have one."""
        if self.model.entropy_model is None:
            raise ValueError("this tokenizer has no entropy model; expected one with entropy_layers above 0")
        return self.model.entropy_model

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters whose gradients are clipped together, by the ending of their metric's name."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        rest = [p for name, p in trained if not name.startswith(ENTROPY)]
        entropy = [p for name, p in trained if name.startswith(ENTROPY)]
        return {name: group for name, group in {"": rest, "_entropy": entropy}.items() if group}

    def start_from(self, weights: TaTok) -> None:
        """Take over the weights of another tokenizer of the same architecture: fine-tuning.

        With everything but the entropy model frozen, that one starts anew and may be of another size.
        """
        values = weights.state_dict()
        if self.frozen:
            own = {name: value for name, value in self.model.state_dict().items() if name.startswith(ENTROPY)}
            values = {name: value for name, value in values.items() if not name.startswith(ENTROPY)} | own
        self.model.load_state_dict(values)
        self.average.load_state_dict(values)

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the model; early steps count more, so that it forgets the start."""
        decay = min(self.config.train.ema_decay, (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - decay)
        for averaged, current in zip(self.average.buffers(), self.model.buffers(), strict=True):
            averaged.copy_(current)  # codebooks are averages already

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the averaged model."""
        found = _prefixed("model", self.model.state_dict())
        found |= _prefixed("optimizer", _optimizer_tensors(self.optimizer))
        if self.adversary is not None:
            found |= _prefixed("discriminator", self.adversary.network.state_dict())
            found |= _prefixed("discriminator_optimizer", _optimizer_tensors(self.adversary.optimizer))
        return found

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was written."""
        found = checkpoint.tensors()
        self.model.load_state_dict(_under("model", found))
        self.average.load_state_dict(TaTok.from_pretrained(checkpoint.folder).state_dict())
        _load_optimizer(self.optimizer, _under("optimizer", found))
        if self.adversary is not None:
            self.adversary.network.load_state_dict(_under("discriminator", found))
            _load_optimizer(self.adversary.optimizer, _under("discriminator_optimizer", found))
        self.step = checkpoint.step
        self.seconds = float(checkpoint.record.get("seconds", 0.0))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; gains, biases and single vectors are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=config.fused)


def derive_seed(seed: int, *keys: int | str) -> int:
    """A seed for one purpose: equal keys give equal seeds, different ones unrelated seeds."""
    text = ":".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of each parameter as `number.key`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, values in state.items() for key, value in values.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
