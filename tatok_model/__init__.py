"""TaTok: an adaptive discrete image tokenizer with global tokens and dynamic token filtering.

Names are imported on first use, so that reading a configuration does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tatok_model.codec import Codec
    from tatok_model.config import LossConfig, TokenizerConfig
    from tatok_model.generator import Generator
    from tatok_model.generator_config import GeneratorConfig, SamplingConfig
    from tatok_model.sampling import sample
    from tatok_model.sequences import Sequences
    from tatok_model.tokenizer import TaTok
    from tatok_model.tokens import Tokens

_HOME = {
    "Codec": "tatok_model.codec",
    "Generator": "tatok_model.generator",
    "GeneratorConfig": "tatok_model.generator_config",
    "SamplingConfig": "tatok_model.generator_config",
    "Sequences": "tatok_model.sequences",
    "sample": "tatok_model.sampling",
    "TaTok": "tatok_model.tokenizer",
    "Tokens": "tatok_model.tokens",
    "TokenizerConfig": "tatok_model.config",
    "LossConfig": "tatok_model.config",
}
__all__ = [
    "Codec", "Generator", "GeneratorConfig", "LossConfig", "SamplingConfig", "Sequences", "TaTok", "TokenizerConfig",
    "Tokens", "sample",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tatok_model' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
