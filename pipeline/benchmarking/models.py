"""The tokenizer that a benchmark times."""

from typing import TYPE_CHECKING

from pipeline.run import Run

if TYPE_CHECKING:  # torch is imported inside functions: checks answer without it
    from tatok_model.tokenizer import TaTok


def tokenizer_of(run: Run) -> "TaTok":
    """The trained one where the configuration names it, which is said in the run's inputs, else one of fresh weights.

    Raises:
        BadInput: the checkpoint cannot be used.
    """
    import torch

    from pipeline.pretrained import load_tokenizer
    from tatok_model.tokenizer import TaTok

    section = run.config.tokenizer
    if section.checkpoint:
        tokenizer, sha256 = load_tokenizer(run.config)
        run.inputs["tokenizer"] = {"path": section.checkpoint, "sha256": sha256}
    else:
        torch.manual_seed(0)
        tokenizer = TaTok(section.architecture())
    return tokenizer.eval()
