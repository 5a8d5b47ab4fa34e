"""TaTok: an adaptive discrete image tokenizer with global tokens and dynamic token filtering.

Names are imported on first use, so that reading a configuration does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from tatok_model.codec.bytestream import Codec
    from tatok_model.config import GeneratorConfig, LossConfig, SamplingConfig, TokenizerConfig
    from tatok_model.generation.generator import Generator
    from tatok_model.generation.sampling import sample
    from tatok_model.generation.sequences import Sequences
    from tatok_model.tiles import PictureTokens, decode_picture, encode_picture, load_picture, save_picture
    from tatok_model.tokenizer import TaTok
    from tatok_model.tokens import Tokens

_HOME = {
    "Codec": "tatok_model.codec.bytestream",
    "Generator": "tatok_model.generation.generator",
    "GeneratorConfig": "tatok_model.config",
    "SamplingConfig": "tatok_model.config",
    "Sequences": "tatok_model.generation.sequences",
    "sample": "tatok_model.generation.sampling",
    "TaTok": "tatok_model.tokenizer",
    "Tokens": "tatok_model.tokens",
    "TokenizerConfig": "tatok_model.config",
    "LossConfig": "tatok_model.config",
    "PictureTokens": "tatok_model.tiles",
    "decode_picture": "tatok_model.tiles",
    "encode_picture": "tatok_model.tiles",
    "load_picture": "tatok_model.tiles",
    "save_picture": "tatok_model.tiles",
}
__all__ = [
    "Codec", "Generator", "GeneratorConfig", "LossConfig", "PictureTokens", "SamplingConfig", "Sequences", "TaTok",
    "TokenizerConfig", "Tokens", "decode_picture", "encode_picture", "load_picture", "sample", "save_picture",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("tatok")
    if name not in _HOME:
        raise AttributeError(f"module 'tatok_model' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
