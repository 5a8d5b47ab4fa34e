"""Presets, overrides and checks: what is accepted, and what a wrong value is answered with."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.presets import config_from_dict, load_config


@pytest.fixture
def preset(tmp_path: Path):
    """Writes a preset and returns its path."""

    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def refused(*overrides: str, preset: str = "smoke") -> str:
    with pytest.raises(BadInput) as problem:
        load_config(preset, list(overrides))
    return str(problem.value)


def test_an_override_changes_one_value_and_nothing_else():
    base, changed = load_config("smoke"), load_config("smoke", ["train.max_steps=7"])
    assert changed.train.max_steps == 7
    assert dataclasses.replace(changed, train=base.train) == base


def test_numbers_without_a_dot_are_numbers_also_in_scientific_notation(preset):
    assert load_config("smoke", ["train.learning_rate=1e-4"]).train.learning_rate == 1e-4
    assert load_config(preset("train: {learning_rate: 2e-5}")).train.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_steps=1e3", "train.max_steps", 1000),
        ("train.max_steps=2E4", "train.max_steps", 20000),
        ("train.max_steps=1e+3", "train.max_steps", 1000),
        ("train.max_steps=1.5e3", "train.max_steps", 1500),
        ("train.max_steps=1_000", "train.max_steps", 1000),
        ("data.max_pixels=64e6", "data.max_pixels", 64_000_000),
        ("tokenizer.codebook_size=1e3", "tokenizer.codebook_size", 1000),
        ("benchmark.sizes=[1e3, 1e4]", "benchmark.sizes", (1000, 10000)),
        ("generate.top_k=1e1", "generate.top_k", 10),
        ("run.name=1e3", "run.name", "1e3"),
    ],
)
def test_a_whole_number_may_be_written_with_a_power_of_ten(override, key, value, preset):
    found = load_config("smoke", [override]).value(key)
    assert (found, type(found)) == (value, type(value))
    section, name = key.split(".")
    text = override.partition("=")[2]
    assert load_config(preset(f"{section}: {{{name}: {text}}}")).value(key) == value


def test_several_powers_of_ten_are_read_at_once():
    config = load_config("smoke", ["train.max_steps=1e3", "train.seed=1e1", "evaluate.max_images=5e2"])
    assert (config.train.max_steps, config.train.seed, config.evaluate.max_images) == (1000, 10, 500)


@pytest.mark.parametrize("name", ["007", "on", "2026-11-23", "a: b"])
def test_text_is_taken_as_it_was_typed(name):
    assert load_config("smoke", [f"run.name={name}"]).run.name == name


def test_a_value_may_be_empty_or_hold_an_equals_sign():
    config = load_config("smoke", ["data.source=", "data.shards=a=b"])
    assert (config.data.source, config.data.shards) == ("", "a=b")


def test_a_list_is_written_as_in_yaml():
    config = load_config(
        "smoke", ["tokenizer.quantizer=fsq", "tokenizer.codebook_size=40", "tokenizer.fsq_levels=[8,5]"]
    )
    assert config.tokenizer.fsq_levels == (8, 5)


def test_the_last_override_wins():
    assert load_config("smoke", ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_a_preset_may_be_a_file_that_extends_a_shipped_one(preset):
    config = load_config(preset("extends: smoke\ntrain: {max_steps: 3}\ndata:\n"))
    smoke = load_config("smoke")
    assert config.preset == "mine"
    assert config.train.max_steps == 3
    assert config.train.global_batch_size == smoke.train.global_batch_size
    assert config.data == smoke.data


def test_an_empty_preset_is_all_defaults(preset):
    assert load_config(preset("")) == Config(preset="mine")


def test_the_written_configuration_loads_as_an_equal_one(preset):
    config = load_config("smoke", ["evaluate.baselines=[kmeans]", "train.learning_rate=1e-4", "run.name=007"])
    assert load_config(preset(config.to_yaml(), "config.yaml")) == config


def test_equal_configurations_have_equal_hashes_and_others_do_not():
    assert load_config("smoke").sha256() == load_config("smoke").sha256()
    assert load_config("smoke").sha256() != load_config("smoke", ["train.seed=1"]).sha256()


def test_the_tokenizer_takes_the_image_size_of_the_data():
    assert load_config("smoke", ["data.image_size=64"]).tokenizer.image_size == 64


def test_the_architecture_is_the_section_without_the_checkpoint():
    section = load_config("smoke", ["tokenizer.checkpoint=x"]).tokenizer
    assert not hasattr(section.architecture(), "checkpoint")
    assert section.architecture().codebook_size == section.codebook_size


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_stpes=5", "unknown key 'train.max_stpes' (did you mean 'train.max_steps'?)"),
        ("train.lr=1e-3", "unknown key 'train.lr' (did you mean 'train.learning_rate'?)"),
        ("train.batch_size=8", "unknown key 'train.batch_size' (did you mean 'train.global_batch_size'?)"),
        ("data.resolution=64", "unknown key 'data.resolution' (did you mean 'data.image_size'?)"),
        ("tokeniser.size=tiny", "unknown key 'tokeniser' (did you mean 'tokenizer'?)"),
        ("max_steps=5", "override 'max_steps=5' is not understood; expected section.key=value"),
        ("train.max_steps", "override 'train.max_steps' is not understood"),
        ("train.=5", "override 'train.=5' is not understood"),
        ("train.max_steps=many", "train.max_steps is 'many'; expected a whole number"),
        ("train.max_steps=1e-3", "train.max_steps is '1e-3'; expected a whole number"),
        ("train.max_steps=15e-1", "train.max_steps is '15e-1'; expected a whole number"),
        ("train.max_steps=1.5", "train.max_steps is 1.5; expected a whole number"),
        ("train.max_steps=1e999", "train.max_steps is '1e999'; expected a whole number"),
        ("train.max_steps=-1e3", "train.max_steps is -1000"),
        ("benchmark.sizes=[1e3, x]", "benchmark.sizes has 'x'; expected a whole number"),
        ("train.max_steps=[1", "train.max_steps is '[1'; expected a whole number"),
        ("train.max_steps=", "train.max_steps is None; expected a whole number"),
        ("train.compile=perhaps", "train.compile is 'perhaps'; expected true or false"),
        ("train.learning_rate=0", "train.learning_rate is 0; expected more than 0"),
        ("train.learning_rate=.nan", "train.learning_rate is nan; expected more than 0"),
        ("preset.name=x", "preset is not a section with keys; expected one of run, data"),
        ("run.output=", "run.output is ''; expected a folder"),
        ("run.name=../up", "run.name is '../up'; expected the name of a folder inside run.output"),
        ("run.name=/top", "run.name is '/top'; expected the name of a folder inside run.output"),
        ("tokenizer.patch_size=5", "tokenizer.image_size is 32; expected a multiple of patch_size, 5"),
        ("tokenizer.image_size=64", "tokenizer.image_size is 64; expected data.image_size, 32"),
        ("losses.l2=0", "l1, l2 and perceptual are all 0; expected at least one reconstruction term"),
    ],
)
def test_a_wrong_override_is_named_with_the_expected_form(override, message):
    assert message in refused(override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "holds a list; expected sections with keys"),
        ("train: [1", "is not valid YAML"),
        ("train: 5", "train is 5; expected a section with keys"),
        ("extends: nothing", "extends is 'nothing' in preset"),
        ("train: {max_steps: }", "train.max_steps is None; expected a whole number"),
        ("trian: {max_steps: 1}", "unknown key 'trian' (did you mean 'train'?)"),
        ("train: {maxsteps: 1}", "unknown key 'train.maxsteps' (did you mean 'train.max_steps'?)"),
        ("1: 2", "unknown key '1'"),
        ("train.max_steps: 5", "unknown key 'train.max_steps' (did you mean 'train'?)"),
    ],
)
def test_a_wrong_preset_file_is_named_with_the_expected_form(preset, text, message):
    assert message in refused(preset=preset(text))


def test_an_unknown_preset_is_answered_with_the_nearest_one():
    assert "unknown preset 'smoek' (did you mean 'smoke'?); expected one of" in refused(preset="smoek")
    assert "preset 'none.yaml' does not exist" in refused(preset="none.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.image_size=0", "at least 1"),
        ("data.heldout_fraction=1.0", "below 1"),
        ("data.heldout_fraction=0", "more than 0"),
        ("data.encoding=gif", "png, jpeg or webp"),
        ("data.quality=101", "at most 100"),
        ("data.num_workers=-1", "at least 0"),
        ("train.precision=fp8", "auto, float32 or bf16"),
        ("train.clip_norm=-1.0", "at least 0"),
        ("train.cpus_per_worker=0.0", "more than 0"),
        ("train.global_batch_size=63", "a multiple of num_workers x accumulation, 2"),
        ("train.min_workers=3", "0 to num_workers, 2"),
        ("evaluate.device=tpu", "auto, cpu or cuda"),
        ("evaluate.extractor=vgg", "one of auto, compact_cifar10, inception2015, or a .safetensors file"),
        ("evaluate.lpips_heads=x", "lpips_backbone and lpips_heads to be given together"),
        ("evaluate.blind_checkpoint=x", "information: true"),
        ("generator.size=vast", "one of nano, tiny, small, base, large"),
        (
            "benchmark.kind=everything",
            "one of preprocess, ingest, train_step, encode, generation, evaluate, scaling, all",
        ),
        ("benchmark.images=8", "at least the largest batch, 256"),
        ("sweep.kind=all", "thresholds or architecture"),
    ],
)
def test_every_check_of_a_section_names_the_key_its_value_and_the_expected_form(override, expected):
    key, _, value = override.partition("=")
    sentence = refused("train.num_workers=2", "train.accumulation=1", override)
    assert sentence in (f"{key} is {value}; expected {expected}", f"{key} is {value!r}; expected {expected}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.baselines=[jpeg,pca]", "evaluate.baselines has 'pca'; expected kmeans, jpeg or webp"),
        ("generate.labels=[1,-1]", "generate.labels has -1; expected at least 0"),
        ("benchmark.batch_sizes=[]", "benchmark.batch_sizes is []; expected at least 1"),
        ("benchmark.batch_sizes=[0]", "benchmark.batch_sizes has 0; expected at least 1"),
        (
            "evaluate.extractor=inception2015",
            "evaluate.inception_weights is ''; expected the path of the FID Inception weights",
        ),
    ],
)
def test_a_value_inside_a_list_is_named_with_its_key(override, message):
    assert refused(override) == message


def test_a_section_is_checked_wherever_it_is_made():
    with pytest.raises(ValueError, match="max_steps"):
        Config().with_values("train", max_steps=0)
    with pytest.raises(ValueError, match="max_step"):
        Config().with_values("train", max_step=1)


def test_nested_values_are_checked_as_a_preset_is():
    values = yaml.safe_load(load_config("smoke").to_yaml())
    assert config_from_dict(values) == load_config("smoke")
    values["train"]["max_steps"] = "x"
    with pytest.raises(BadInput, match="train.max_steps is 'x'"):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["filter.threshold=1.5"], r"filter\.threshold is 1\.5; expected a share from 0 to 1 for the rule relative"),
        (["filter.rule=best"], r"filter\.rule is 'best'; expected one of relative, residual, marginal, count"),
        (
            ["filter.rule=count", "filter.threshold=17"],
            r"filter\.threshold is 17; expected at most 16, the patch tokens",
        ),
        (["filter.rounds=17"], r"filter\.rounds is 17; expected 1 to 16, the patch positions"),
        (["filter.score=grid"], r"filter\.rule is 'relative'; expected count for the score 'grid'"),
        (
            ["filter.score=random", "filter.rule=count", "filter.rounds=2"],
            r"filter\.rounds is 2; expected 1 for the score",
        ),
        (["filter.replay=true"], r"filter\.replay is True; expected false unless score is entropy"),
        (["evaluate.thresholds=[0.5,1.5]"], r"evaluate\.thresholds: threshold is 1\.5; expected a share"),
        (["evaluate.thresholds=[0.5,0.5]"], r"evaluate\.thresholds is \(0\.5, 0\.5\); expected different numbers"),
        (["evaluate.blind_checkpoint=/x"], r"evaluate\.blind_checkpoint is '/x'; expected information: true"),
        (
            ["kept_sets.all=0.5"],
            r"kept_sets\.all, none, random, blocks and filtered are .*; expected shares that add up",
        ),
        (
            ["kept_sets.global_tail=0.5"],
            r"kept_sets\.global_tail is 0\.5; expected 0, or tokenizer\.patch_tokens: false",
        ),
        (
            ["train.parts=entropy", "tokenizer.checkpoint=/x", "losses.gan=0.1"],
            r"losses\.gan is 0\.1 with train\.parts 'entropy'; expected 0",
        ),
        (["train.parts=entropy"], r"train\.parts is 'entropy'; expected tokenizer\.checkpoint to name the tokenizer"),
        (
            ["tokenizer.entropy_width=50"],
            r"tokenizer\.entropy_layers is 2 and entropy_width 50; expected .* multiple of 32",
        ),
    ],
)
def test_filtering_that_cannot_be_is_refused_by_its_key(overrides, message):
    with pytest.raises(BadInput, match=message):
        load_config("smoke", overrides)
