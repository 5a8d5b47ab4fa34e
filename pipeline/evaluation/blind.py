"""The tokenizer of `evaluate.blind_checkpoint`: the evaluated one with an entropy model that sees no global tokens.

Its sizes are compared before anything is made, its weights before anything is measured.
"""

from typing import TYPE_CHECKING

from pipeline.checkpoints import SHAPING, find, read_architecture
from pipeline.config import Config
from pipeline.errors import BadInput
from pipeline.paths import sha256_file
from pipeline.run import Run

if TYPE_CHECKING:  # torch is imported inside functions: a stage's `check` answers without it
    from tatok_model.tokenizer import TaTok

KEY = "evaluate.blind_checkpoint"
MODEL = "entropy_model."  # beginning of an entropy model's weights' names


def check_information(config: Config) -> None:
    """Refuse tokenizers that information cannot be measured with; reads no weights.

    Raises:
        BadInput: no entropy model or one that does not see the global tokens; no blind checkpoint where one is named,
            or one that sees them or has another architecture.
    """
    if not config.evaluate.information:
        return
    tokenizer, path = config.tokenizer, config.evaluate.blind_checkpoint
    if not tokenizer.has_entropy_model:
        raise BadInput("evaluate.information is true; expected a tokenizer with an entropy model")
    if tokenizer.global_tokens and not tokenizer.entropy_globals:
        raise BadInput("tokenizer.entropy_globals is false; expected true: evaluate.information asks for H(c | g)")
    if not path:
        return
    found = read_architecture(path, KEY)
    if found.entropy_globals:
        raise BadInput(f"{KEY} sees the global tokens; expected tokenizer.entropy_globals: false")
    for name in SHAPING:
        wanted = getattr(tokenizer, name)
        if name != "entropy_globals" and getattr(found, name) != wanted:
            raise BadInput(f"{KEY} has {name} {getattr(found, name)}; expected {wanted}, as tokenizer.checkpoint")


def load_blind(run: Run, tokenizer: "TaTok") -> "TaTok | None":
    """The second model, noted among the run's inputs; None where none is named.

    Raises:
        BadInput: there is none, or as `check_blind`.
    """
    from tatok_model.tokenizer import TaTok

    path = run.config.evaluate.blind_checkpoint
    if not path:
        return None
    folder = find(path, KEY)
    blind = TaTok.from_pretrained(folder)
    check_blind(tokenizer, blind)
    run.inputs["blind"] = {"path": path, "sha256": sha256_file(folder / "model.safetensors")}
    return blind


def check_blind(tokenizer: "TaTok", blind: "TaTok") -> None:
    """Refuse a second model that does not belong to the tokenizer.

    Raises:
        BadInput: it sees the global tokens, its entropy model has another size, or other weights than that model's
            differ.
    """
    import torch

    if blind.entropy_model is None or blind.config.entropy_globals:
        raise BadInput(f"{KEY} sees the global tokens; expected tokenizer.entropy_globals: false")
    for name in ("entropy_layers", "entropy_width"):
        wanted, given = getattr(tokenizer.config, name), getattr(blind.config, name)
        if given != wanted:
            raise BadInput(f"{KEY} has {name} {given}; expected {wanted}, as tokenizer.checkpoint")
    ours, theirs = (
        {name: value for name, value in model.state_dict().items() if not name.startswith(MODEL)}
        for model in (tokenizer, blind)
    )
    same = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    if not same:
        raise BadInput(f"{KEY} is another tokenizer; expected tokenizer.checkpoint, frozen")
