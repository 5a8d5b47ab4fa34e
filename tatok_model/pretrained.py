"""What the tokenizer and the generator share as saved models: loading in a precision, and a model card of their own."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn

PAPER = "https://arxiv.org/abs/2605.16384"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


class Pretrained(nn.Module, PyTorchModelHubMixin):
    """A model in a folder of config.json, model.safetensors and README.md, or on a hub."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder or a hub's model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, or `owner/name`.
            kwargs: `dtype` (or `torch_dtype`), of floating point, "bfloat16" or torch.bfloat16 for instance; float32 if
                there is none. The others are the hub's: `revision`, `token`, `cache_dir`, ...

        Raises:
            ValueError: another dtype.
        """
        dtype = kwargs.pop("dtype", None)
        dtype = kwargs.pop("torch_dtype", dtype)
        known = {None: torch.float32} | DTYPES | {each: each for each in FLOATS}
        if dtype not in known:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        # Strict, else missing weights stay random; stdout, where the hub's library says that it loads, is the caller's.
        with redirect_stdout(io.StringIO()):
            return super().from_pretrained(str(pretrained_model_name_or_path), strict=True, **kwargs).to(known[dtype])

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        umask = os.umask(0)  # the only way to read it
        os.umask(umask)
        (save_directory / "model.safetensors").chmod(0o666 & ~umask)  # safetensors makes files for their owner alone

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """README.md of the folder: what the model is and how it is used."""
        info = self._hub_mixin_info.model_card_data.to_yaml()
        millions = sum(weight.numel() for weight in self.parameters()) / 1e6
        return ModelCard(f"---\n{info}\n---\n\n{self.card(millions)}\n\nAfter [TaTok]({PAPER}).\n")

    def card(self, millions: float) -> str:
        """The text of the card, of a model of so many million parameters."""
        raise NotImplementedError
