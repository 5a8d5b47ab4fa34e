"""Presets: YAML, which may extend another one, and `section.key=value` overrides become a checked `Config`.

Unknown keys are refused with the nearest valid one; every message names the key, its value and the expected form.
"""

import copy
import dataclasses
import functools
import itertools
import operator
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from pipeline.core.checkpoints import with_architecture
from pipeline.core.config import Config, DataConfig
from pipeline.core.errors import BadInput, did_you_mean

POWER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,2}")  # YAML 1.1 wants a dot and a sign: 1.0e+3
ELSEWHERE = {  # what other programs call a key of ours
    "lr": "learning_rate", "bs": "global_batch_size", "batch_size": "global_batch_size", "epochs": "max_steps",
    "steps": "max_steps", "iterations": "max_steps", "wd": "weight_decay", "workers": "num_workers",
    "gpus": "num_workers", "path": "source", "root": "source", "dataset": "source", "resolution": "image_size",
    "res": "image_size", "vocab_size": "codebook_size", "num_codes": "codebook_size", "out": "output",
    "output_dir": "output", "num_images": "images", "num_samples": "images", "cfg_scale": "guidance",
}  # fmt: skip
SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}


def load_config(preset: str = "demo", overrides: list[str] | None = None) -> Config:
    """Read a preset and apply overrides.

    Args:
        preset: a name in `pipeline/configs` or the path of a YAML file.
        overrides: `section.key=value` texts; values are YAML.

    Raises:
        BadInput: unknown preset or key (with the nearest valid one), a value of the wrong type, a failed check.
    """
    values = read_preset(preset)
    values.setdefault("preset", Path(preset).stem)
    for text in overrides or []:
        _apply_override(values, text)
    return config_from_dict(with_architecture(values, _stated(preset, overrides or [])))


def _stated(preset: str, overrides: list[str]) -> set[str]:
    """Keys that the checkpoint in use may not change: typed ones, and those of a YAML file that names it itself."""
    keys = {text.partition("=")[0] for text in overrides}
    if preset.endswith((".yaml", ".yml")) and "tokenizer.checkpoint" not in keys:
        own = yaml.safe_load(Path(preset).read_text(encoding="utf-8", errors="replace")) or {}
        beside = {f"{name}.{key}" for name, part in own.items() if isinstance(part, dict) for key in part}
        keys |= beside if "tokenizer.checkpoint" in beside else set()
    return keys


def config_from_dict(values: dict[str, Any]) -> Config:
    """Check nested values and build the `Config`; raises as `load_config`."""
    data, tokenizer = values.get("data") or {}, values.get("tokenizer") or {}
    if isinstance(data, dict) and isinstance(tokenizer, dict):
        image_size = data.get("image_size", DataConfig.image_size)
        values = {**values, "tokenizer": {"image_size": image_size, **tokenizer}}
    adapter = TypeAdapter(Config)
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        errors = error.errors()
    try:
        return adapter.validate_python(_with_whole_numbers(values, errors))
    except ValidationError as error:
        raise BadInput(_explain(error.errors())) from None


def _with_whole_numbers(values: dict[str, Any], errors: list[Any]) -> dict[str, Any]:
    """The values with `1e3`, which YAML takes for text, as a number wherever a whole one was expected."""
    values = copy.deepcopy(values)
    for error in errors:
        if error["type"] == "int_parsing" and POWER.fullmatch(str(error["input"])):
            *path, last = error["loc"]
            number = float(error["input"])
            functools.reduce(operator.getitem, path, values)[last] = number if number.is_integer() else error["input"]
    return values


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    folder = resources.files("pipeline") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_head(preset: str) -> str:
    """The comment that a shipped preset opens with: what it is, the command, what to expect."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), _shipped(preset).splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def _shipped(preset: str) -> str:
    return (resources.files("pipeline") / "configs" / f"{preset}.yaml").read_text(encoding="utf-8")


def read_preset(preset: str) -> dict[str, Any]:
    """What a preset sets, by section, with what it extends; raises as `load_config`."""
    if preset.endswith((".yaml", ".yml")):
        path = Path(preset)
        if not path.is_file():
            raise BadInput(f"preset {preset!r} does not exist; expected the path of a YAML file or a name: {_list()}")
        text = path.read_text(encoding="utf-8", errors="replace")
    elif preset in preset_names():
        text = _shipped(preset)
    else:
        raise BadInput(f"unknown preset {preset!r}{did_you_mean(preset, preset_names())}; expected one of {_list()}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise BadInput(f"preset {preset!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadInput(f"preset {preset!r} holds a {type(values).__name__}; expected sections with keys")
    values = {key: {} if value is None else value for key, value in values.items()}  # a section left empty
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or base not in preset_names():
        raise BadInput(f"extends is {base!r} in preset {preset!r}; expected one of {_list()}")
    return _merge(read_preset(base), values)


def _list() -> str:
    return ", ".join(preset_names())


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(values: dict[str, Any], text: str) -> None:
    """Set one `section.key=value` in nested `values`; text keys stay text, others are parsed as YAML."""
    key, separator, raw = text.partition("=")
    if not separator or key.count(".") != 1 or not all(key.split(".")):
        raise BadInput(f"override {text!r} is not understood; expected section.key=value, e.g. train.max_steps=100")
    section, name = key.split(".")
    part = values.setdefault(section, {})
    if not isinstance(part, dict):
        raise BadInput(f"{section} is not a section with keys; expected one of {', '.join(SECTIONS)}")
    part[name] = raw if _is_text(section, name) else _parse_value(raw)


def _is_text(section: str, name: str) -> bool:
    """Text is taken as it was typed: YAML would read a run called 007 as a number and one called on as true."""
    kinds = {field.name: field.type for field in dataclasses.fields(SECTIONS[section])} if section in SECTIONS else {}
    return kinds.get(name) is str or get_origin(kinds.get(name)) is Literal


def _parse_value(raw: str) -> Any:
    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw


EXPECTED = {  # the conditions of `config.py` in words, by pydantic's names for them
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
    "literal_error": "{expected}",
    "too_short": "at least {min_length}",
    "dataclass_type": "a section with keys",
    **dict.fromkeys(
        ("int_parsing", "int_type", "int_from_float", "int_parsing_size", "finite_number"), "a whole number"
    ),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list, e.g. [1, 2]"),
    **dict.fromkeys(("dict_type",), "keys with values, e.g. {a: 1}"),
    **dict.fromkeys(("string_type",), "text"),
}
UNKNOWN = ("unexpected_keyword_argument", "invalid_key")


def _explain(errors: list[Any]) -> str:
    """One sentence on what pydantic has found first: the key, its value and the expected form."""
    error = next((each for each in errors if each["type"] in UNKNOWN), errors[0])
    where, inside = ".".join(map(str, error["loc"][:2])), error["loc"][2:]  # the key, and the place in a list
    if error["type"] in UNKNOWN:
        return _unknown(*map(str, error["loc"][:2]))
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{where}.{message}" if where and not message.startswith(where) else message
    expected = EXPECTED.get(error["type"], "").format(**error.get("ctx", {})).replace("'", "")
    expected = expected or error["msg"].removeprefix("Input should be ").partition(",")[0]
    return f"{where} {'has' if inside else 'is'} {error['input']!r}; expected {expected}"


def _unknown(section: str, key: str = "") -> str:
    """What to say of a section, or of a key of a section, that there is not, with the nearest one that there is."""
    keys = {name: [field.name for field in dataclasses.fields(part)] for name, part in SECTIONS.items()}
    everything = [f"{name}.{each}" for name, names in keys.items() for each in names] if key else list(keys)
    whole = f"{section}.{key}" if key else section
    valid = keys[section] if key else list(keys)
    meant = f"{section}.{ELSEWHERE.get(key, key)}"
    known = f" (did you mean {meant!r}?)" if meant in everything else did_you_mean(whole, everything)
    return f"unknown key {whole!r}{known}; expected one of {', '.join(valid)}"
