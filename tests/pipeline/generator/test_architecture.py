"""Which generator a stream at a cut asks for."""

from dataclasses import replace

import pytest

from pipeline.core.errors import BadInput
from pipeline.core.presets import load_config
from pipeline.generator.fit import generator_config
from pipeline.tokens.token_manifest import Stream, TokenManifest, TokenSplit

STREAM = Stream("distortion", 1, "a" * 64, 0, 16, 16, 16, 4)  # no global tokens, 16 patch positions
EMPTY = TokenSplit(0, ())
MANIFEST = TokenManifest(STREAM, {}, "made", ("ant", "bee"), {"train": EMPTY, "heldout": EMPTY}, "made")


def test_the_cut_and_the_class_dropout_travel_with_the_generator():
    config = load_config("smoke", ["filter.rule=residual", "filter.threshold=2.5", "generator.class_dropout=0.3"])
    found = generator_config(config, MANIFEST, shortest=1, longest=9)
    assert found.cut == config.filter.cut(patch_tokens=True) == "distortion, 1 rounds, residual 2.5"
    assert (found.class_dropout, found.classes, found.max_patch_tokens) == (0.3, 2, 9)


def test_a_cut_that_keeps_nothing_at_all_is_refused():
    config = load_config("smoke", ["filter.threshold=0"])
    with pytest.raises(BadInput, match=r"filter.threshold is 0, which keeps no token of any picture"):
        generator_config(config, MANIFEST, shortest=0, longest=0)
    with_globals = replace(MANIFEST, stream=replace(STREAM, global_tokens=2))
    assert generator_config(config, with_globals, shortest=0, longest=0).max_patch_tokens == 0
