"""What several stages check before anything is made: pictures and files. Imports neither torch nor ray."""

from pathlib import Path

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.inputs import shards_of_gone_source
from pipeline.data import preprocess
from pipeline.data.shards import check_shards
from tatok_model.filtering_rules import SCORES

SMALLEST = 11  # pixels a side: the window of SSIM, which validation and evaluation measure


def check_pictures(config: Config) -> None:
    """Refuse pictures that cannot be used; reads none.

    Raises:
        BadInput: too small for SSIM, shards made for another image size, or, without shards, no source to make them of.
    """
    if config.data.image_size < SMALLEST:
        raise BadInput(f"data.image_size is {config.data.image_size}; expected at least {SMALLEST} pixels for SSIM")
    if not config.data.shards:
        try:
            preprocess.check(config)
            return
        except BadInput:
            shards = shards_of_gone_source(config)
            if shards is None:
                raise
            config = config.with_values("data", shards=str(shards))
    check_shards(config)


def check_score(config: Config) -> None:
    """Refuse a ranking that asks an entropy model where there is none.

    Raises:
        BadInput: naming the score.
    """
    tokenizer = config.tokenizer
    asks = SCORES[config.filter.score].asks_entropy_model and tokenizer.patch_tokens
    if asks and not tokenizer.has_entropy_model:
        others = ", ".join(name for name, score in SCORES.items() if not score.asks_entropy_model)
        raise BadInput(
            f"filter.score is {config.filter.score!r} with tokenizer.entropy_layers 0; "
            f"expected a tokenizer with an entropy model, or one of {others}"
        )


def check_global_counts(config: Config) -> None:
    """Refuse cuts of a tokenizer without patch tokens that are not a number of its global tokens.

    Raises:
        BadInput: another rule than count, or a threshold that is not a whole number from 1 to M.
    """
    if config.tokenizer.patch_tokens:
        return
    section, most = config.filter, config.tokenizer.global_tokens
    cuts = {"evaluate.thresholds": config.evaluate.thresholds}
    if (section.rule, section.threshold) != ("relative", 1):
        cuts["filter.threshold"] = (section.threshold,)
    for key, thresholds in cuts.items():
        if thresholds and section.rule != "count":
            raise BadInput(f"filter.rule is {section.rule!r} without patch tokens; expected count, of global tokens")
        for threshold in thresholds:
            if not 1 <= threshold <= most or threshold % 1:
                raise BadInput(f"{key} has {threshold:g}; expected a whole number from 1 to {most}, the global tokens")


def check_files(config: Config, *keys: str) -> None:
    """Refuse files that are named and not there.

    Args:
        config: the configuration.
        keys: `section.key` of paths; an empty path is none.

    Raises:
        BadInput: naming the first that is missing.
    """
    for key in keys:
        path = config.value(key)
        if path and not Path(path).is_file():
            raise BadInput(f"{key} {path!r} does not exist; expected a file")
