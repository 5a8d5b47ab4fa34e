"""What training a tokenizer changes (the tokenizer, its average, a discriminator), and where it starts from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.manifest import read_manifest
from pipeline.pretrained import load_tokenizer
from pipeline.training import distributed
from pipeline.training.adversary import Adversary
from pipeline.training.resume import go_on, values_of
from pipeline.training.state import TrainState, derive_seed, load_optimizer, optimizer_tensors, prefixed, under
from tatok_model.tokenizer import TaTok

ENTROPY = "entropy_model."  # beginning of its parameters' names


class TokenizerState(TrainState[TaTok]):
    """The tokenizer, its average, optionally a discriminator, and their optimisers after `step` steps."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        torch.manual_seed(derive_seed(config.train.seed, "weights"))
        model = TaTok(config.tokenizer.architecture()).to(device)
        self.frozen = config.train.parts == "entropy"  # all but the entropy model
        if self.frozen:
            if model.entropy_model is None:
                raise ValueError("this tokenizer has no entropy model; expected one with entropy_layers above 0")
            model.requires_grad_(False)
            model.entropy_model.requires_grad_(True)
        super().__init__(model, config.train, TaTok.from_pretrained)
        self.adversary = Adversary(config, device) if config.losses.gan else None
        self.device = device

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The entropy model's parameters are clipped apart from the rest."""
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

    def shard(self) -> None:
        """Keep this worker's part alone; what is loaded and what starts anew has to be in place before."""
        from pipeline.training.sharding import shard  # imports for a second what only FSDP2 needs

        self.optimizer = shard(self.model, self.average, self.optimizer, self.train_config, self.device)
        self.sharded = True

    def averaged(self) -> TaTok:
        """Gathered into a plain model where the state is sharded."""
        if not self.sharded:
            return self.average
        gathered = TaTok(self.average.config).to(self.device).eval().requires_grad_(False)
        values = {name: distributed.whole(value) for name, value in self.average.state_dict().items()}
        gathered.load_state_dict(values)
        return gathered

    def tensors(self) -> dict[str, Tensor]:
        """With the discriminator's."""
        found = super().tensors()
        if self.adversary is not None:
            found |= prefixed("discriminator", self.adversary.network.state_dict())
            found |= prefixed("discriminator_optimizer", optimizer_tensors(self.adversary.optimizer))
        return found

    def load_tensors(self, found: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        super().load_tensors(found)
        if self.adversary is not None:
            self.adversary.network.load_state_dict(under("discriminator", found))
            load_optimizer(self.adversary.optimizer, under("discriminator_optimizer", found))


def starting_state(config: Config, folder: Path, device: torch.device) -> TokenizerState:
    """From the run's newest checkpoint in `folder`, else from `tokenizer.checkpoint`, else new.

    Raises:
        BadInput: the run was begun with other values, or `tokenizer.checkpoint` cannot be used.
    """
    state = TokenizerState(config, device)
    if not go_on(state, folder, deciding(config)) and config.tokenizer.checkpoint:
        state.start_from(load_tokenizer(config)[0])
    return state


def deciding(config: Config) -> dict[str, Any]:
    """What decides the weights of a step, by key: a run that goes on must have the same."""
    values = values_of(config, "tokenizer", "losses", "kept_sets", "train")
    return {**values, "data.shards": read_manifest(config.data.shards).fingerprint}
