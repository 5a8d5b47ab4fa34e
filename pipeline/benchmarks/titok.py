"""TiTok's public model (arXiv 2406.07550) at our size and token count, from a checkout of its code.

    git clone https://github.com/bytedance/1d-tokenizer; benchmark.titok=1d-tokenizer

Its code is imported for the run and is no part of this project. Two of its imports are replaced where they are not
installed, because nothing that is timed uses them: omegaconf (it reads configurations) and accelerate (it gathers
between workers for a codebook that is clustered, which this one is not). The file that imports all of its losses is
not run.

Shapes: B images, H = W image side, T tokens, M global tokens, N patch positions.
"""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from pipeline.core.errors import BadInput
from tatok_model.config import TokenizerConfig

SIZES = ("small", "base", "large")  # that its code has; width, layers and heads are ours
FILES = ("modeling/titok.py", "modeling/modules/blocks.py", "modeling/quantizer/quantizer.py")
TOKEN_SIZE = 12  # width of a code vector, as in its configurations


class Options(SimpleNamespace):
    """A part of a configuration, as omegaconf gives it."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where there is none."""
        return getattr(self, name, default)


def check(folder: str, config: TokenizerConfig) -> None:
    """Refuse what cannot be compared.

    Raises:
        BadInput: the folder is not a checkout of its code, or it has no model of our size.
    """
    missing = [name for name in FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise BadInput(f"benchmark.titok is {folder!r}, which has no {missing[0]}; expected a checkout of 1d-tokenizer")
    if config.size not in SIZES:
        raise BadInput(f"tokenizer.size is {config.size!r}; expected one of {', '.join(SIZES)} beside benchmark.titok")


def make(folder: str, config: TokenizerConfig) -> nn.Module:
    """Its model, with fresh weights: as many tokens as ours has when everything is kept, pixels out, no second stage.

    Args:
        folder: checkout of its code.
        config: of ours: image and patch size, size, codebook size; M + N tokens.
    """
    model = _import(folder)
    vq_model = Options(
        vit_enc_model_size=config.size,
        vit_dec_model_size=config.size,
        vit_enc_patch_size=config.patch_size,
        vit_dec_patch_size=config.patch_size,
        num_latent_tokens=config.max_tokens,
        codebook_size=config.codebook_size,
        token_size=TOKEN_SIZE,
        use_l2_norm=True,
        commitment_cost=0.25,
        finetune_decoder=False,
        is_legacy=False,  # pixels, not the codes of another tokenizer
    )
    preprocessing = Options(crop_size=config.image_size)
    made: nn.Module = model(Options(model=Options(vq_model=vq_model), dataset=Options(preprocessing=preprocessing)))
    return made


def loss_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """Its step's loss: mean squared error, and its quantizer's loss at the weight of 1 that its configurations have.

    Args:
        model: of `make`, or what wraps it.
        pixels: (B, 3, H, W) in [0, 1].
    """
    pictures, terms = model(pixels)
    return (pictures.float() - pixels).square().mean() + terms["quantizer_loss"]


def _import(folder: str) -> Any:
    """Its class, imported without the parts that need more packages."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if find_spec("omegaconf") is None:
        sys.modules.setdefault("omegaconf", _module("omegaconf", OmegaConf=SimpleNamespace(create=Options)))
    if find_spec("accelerate") is None:
        operations = _module("accelerate.utils.operations", gather=lambda tensor: tensor)
        for name in ("accelerate", "accelerate.utils"):
            sys.modules.setdefault(name, _module(name, __path__=[]))
        sys.modules.setdefault("accelerate.utils.operations", operations)
    modules = _module("modeling.modules", __path__=[str(Path(folder) / "modeling" / "modules")])
    sys.modules.setdefault("modeling.modules", modules)
    with warnings.catch_warnings():  # torch.cuda.amp.autocast, an older name
        warnings.simplefilter("ignore", FutureWarning)
        from modeling.titok import TiTok  # type: ignore[import-not-found]
    return TiTok


def _module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made
