"""What people read about keys: one source, the comments of the configuration, for the terminal and docs/keys.md."""

import re

import pytest

from pipeline.core import keys
from pipeline.core.errors import BadInput
from pipeline.core.presets import SECTIONS, load_config, preset_names
from pipeline.core.stages import MADE, NEXT, READS, STAGES


def test_the_page_is_what_the_comments_say(repository):
    written = (repository / "docs" / "keys.md").read_text()
    assert written == keys.page(), "python -m pipeline.core.keys >docs/keys.md"


def test_every_key_has_a_meaning_a_default_and_a_form():
    found = [(section, key) for section in SECTIONS for key in keys.keys_of(section)]
    assert len(found) > 200
    assert [f"{section}.{key.name}" for section, key in found if not (key.meaning and key.default and key.form)] == []


def test_comments_of_several_lines_of_base_classes_and_bounds_are_read():
    found = {section: {key.name: key for key in keys.keys_of(section)} for section in SECTIONS}
    assert found["evaluate"]["extractor"].meaning.endswith("auto: inception2015 when its weights are given")
    assert found["tokenizer"]["patch_size"].meaning == "pixels, square"  # of `tatok_model`
    assert found["generate"]["top_k"] == ("top_k", "0", "a whole number", "of codes: only the k likeliest; 0: all")
    assert found["train"]["max_steps"] == ("max_steps", "1000", "a whole number, at least 1", "optimiser steps")
    assert found["data"]["heldout_fraction"].form == "a number, above 0 and below 1"
    assert found["train"]["parallel"][1:3] == ("ddp", "ddp | fsdp2")
    assert found["benchmark"]["sizes"][1:3] == ("[1000, 10000]", "a list, each a whole number, at least 1, not empty")
    assert found["evaluate"]["thresholds"][1:3] == ("[]", "a list, each a number")
    assert found["data"]["source"].default == '""'


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_explained_with_all_its_keys(section):
    lines = keys.explain(section).splitlines()
    assert lines[0].startswith(f"{section}: ")
    names = [key.name for key in keys.keys_of(section)]
    assert [word for word in re.findall(r"^  (\w+)  ", "\n".join(lines), flags=re.MULTILINE) if word != "key"] == names
    assert max(map(len, lines)) <= 120


def test_a_key_alone_and_a_preset_are_explained():
    assert "max_steps  1000     optimiser steps" in keys.explain("train.max_steps")
    assert "seed" not in keys.explain("train.max_steps")
    smoke = keys.explain("smoke")
    assert smoke.startswith("Seconds, for tests: every stage")
    assert "python jobs/train.py smoke" in smoke
    assert "max_steps=20" in smoke


@pytest.mark.parametrize(
    ("topic", "near"), [("trian", "train"), ("train.max_stpes", "train.max_steps"), ("smok", "smoke"), ("x.y.z", "")]
)
def test_what_cannot_be_explained_is_answered_with_the_nearest(topic, near):
    with pytest.raises(BadInput) as problem:
        keys.explain(topic)
    told = str(problem.value)
    assert told.startswith(f"--help {topic!r} is nothing that can be explained")
    assert (f"(did you mean {near!r}?)" in told) == bool(near)


def test_the_help_page_names_every_preset_and_section():
    page = keys.help_page()
    for name in [*preset_names(), *SECTIONS]:
        assert re.search(rf"^  {name}  ", page, flags=re.MULTILINE), name


def test_what_is_told_at_the_start_is_what_differs():
    assert keys.changed(load_config("smoke", ["train.max_steps=1000"]), ["train"])["train"].keys() == {
        "global_batch_size", "warmup_steps", "log_every", "validate_every", "validation_images", "checkpoint_every",
    }  # fmt: skip
    assert "image_size" not in keys.changed(load_config("tiny64"), SECTIONS)["tokenizer"]  # it follows data.image_size
    assert keys.changed(load_config("smoke"), ["losses"]) == {}


def test_stages_read_sections_that_exist_and_lead_to_stages_that_exist():
    assert set(READS) == set(STAGES)
    assert {section for sections in READS.values() for section in sections.split()} <= set(SECTIONS)
    assert {job for job, _, _ in NEXT.values()} <= set(STAGES)
    for key in [key for key, _ in MADE.values()] + [key for _, _, used in NEXT.values() for key in used.split()]:
        load_config("smoke").value(key)
