"""Whether a generator, a tokenizer and what is asked of them fit together."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.checkpoints import read_generator
from pipeline.core.config import Config, GenerateConfig
from pipeline.core.errors import BadInput
from pipeline.generator.fit import asked_labels, check_fit, check_guidance
from tatok_model.config import GeneratorConfig

SIZES = {"size": "nano", "classes": 3, "global_tokens": 2, "grid_size": 4, "codebook_size": 16, "max_patch_tokens": 16}


def generator(**changes: object) -> GeneratorConfig:
    return GeneratorConfig(**{**SIZES, **changes})  # type: ignore[arg-type]


def test_a_generator_of_the_tokenizers_shape_fits(configure: Callable[..., Config]) -> None:
    check_fit(configure(), generator())
    check_fit(configure(), generator(tokenizer_sha256="f" * 64), "f" * 64)
    only = "tokenizer.patch_tokens=false", "filter.rule=count", "filter.threshold=1"
    check_fit(configure(*only), generator(patch_tokens=False, max_patch_tokens=0, global_tokens=1))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch_tokens": False, "max_patch_tokens": 0}, "has patch_tokens False; expected the tokenizer's, True"),
        ({"codebook_size": 8}, "has codebook_size 8; expected the tokenizer's, 16"),
        ({"global_tokens": 1}, "has global_tokens 1; expected the tokenizer's, 2"),
        ({"grid_size": 5}, "has patch_positions 25; expected the tokenizer's, 16"),
        ({"tokenizer_sha256": "0" * 64}, "writes tokens of a tokenizer with sha256 000000000000...; expected that of"),
    ],
)
def test_another_shape_or_tokenizer_is_refused(
    configure: Callable[..., Config], changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        check_fit(configure("generator.checkpoint=/made"), generator(**changes))


def test_more_global_tokens_than_the_tokenizer_has_are_refused(configure: Callable[..., Config]) -> None:
    only = "tokenizer.patch_tokens=false", "filter.rule=count", "filter.threshold=1"
    with pytest.raises(BadInput, match="has 3 global tokens; expected at most the tokenizer's, 2"):
        check_fit(configure(*only), generator(patch_tokens=False, max_patch_tokens=0, global_tokens=3))


def test_classes_are_asked_for_in_turn() -> None:
    assert asked_labels(GenerateConfig(), 3) == (0, 1, 2)
    assert asked_labels(GenerateConfig(labels=(2, 2, 0)), 3) == (2, 2, 0)
    assert asked_labels(GenerateConfig(unconditional=True), 3) == (-1,)
    assert asked_labels(GenerateConfig(), 0) == (-1,)


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (10, "generate.labels has 12; expected 0 to 9, the generator's classes"),
        (0, "generate.labels has 3; expected none: the generator has no classes"),
    ],
)
def test_a_class_that_does_not_exist_is_refused(classes: int, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        asked_labels(GenerateConfig(labels=(3, 12)), classes)


def test_guidance_towards_no_class_is_refused() -> None:
    check_guidance(GenerateConfig(guidance=2), (0, 1), 0.1)
    check_guidance(GenerateConfig(), (-1,), 0.1)
    check_guidance(GenerateConfig(), (0, 1), 0)
    for name in ("guidance", "position_guidance"):
        with pytest.raises(BadInput, match=f"generate.{name} is 1.5 without classes; expected 1"):
            check_guidance(GenerateConfig(**{name: 1.5}), (-1,), 0.1)  # type: ignore[arg-type]
        with pytest.raises(BadInput, match=f"generate.{name} is 1.5 with a generator trained at .* 0; expected 1"):
            check_guidance(GenerateConfig(**{name: 1.5}), (0, 1), 0)  # type: ignore[arg-type]


def test_a_folder_without_a_generator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="generator.checkpoint: checkpoint .* has no config.json"):
        read_generator(str(tmp_path))
    (tmp_path / "checkpoint").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "checkpoint" / name).write_text("[]")
    with pytest.raises(BadInput, match="generator.checkpoint: config.json in .* is not a generator's"):
        read_generator(str(tmp_path))
