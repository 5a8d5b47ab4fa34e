"""The keys of a configuration as people read them: `--help SECTION`, docs/keys.md, and what a job says at its start.

    python -m pipeline.core.keys >docs/keys.md

What a section or a key means is what `config.py` and `tatok_model/config.py` say in comments: there is no other list.
"""

import ast
import dataclasses
import inspect
import io
import json
import shutil
import textwrap
import tokenize
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pipeline.core.config import Config
from pipeline.core.errors import BadInput, did_you_mean
from pipeline.core.presets import SECTIONS, preset_head, preset_names, read_preset

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
TOLD_BY_DEFAULTS = ("true or false", "a number", "text")  # forms that the terminal leaves out
NAME = 28  # columns of a default, at most, before the rest moves
WIDEST = 120


class Key(NamedTuple):
    """One key of a section."""

    name: str
    default: str  # as YAML has it
    form: str  # what it may be
    meaning: str


def keys_of(section: str) -> list[Key]:
    """The keys of a section, in their order; those of the class that it extends first."""
    kind = SECTIONS[section]
    comments: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        comments |= _comments(inspect.getsource(each))
    found = dataclasses.fields(kind)
    return [Key(f.name, _shown(_default(f)), _form(f.type), comments.get(f.name, "")) for f in found]


def _comments(source: str) -> dict[str, str]:
    """What stands behind each field of a dataclass, and alone in the lines below it."""
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string.lstrip("# ")
    alone = {number for number, line in enumerate(source.splitlines(), start=1) if line.lstrip().startswith("#")}
    comments = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno:
            number, parts = node.end_lineno, [lines.get(node.end_lineno, "")]
            while (number := number + 1) in alone:
                parts.append(lines[number])
            comments[node.target.id] = " ".join(parts)
    return comments


def _default(field: Any) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    """A value as YAML has it, on one line."""
    if isinstance(value, str):
        return value if value and not set(value) & set(" ,[]{}:#") else json.dumps(value)
    return json.dumps(value) if not isinstance(value, float) else f"{value:g}"


def _form(kind: Any) -> str:
    """What a field of this type may be, in words."""
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each {_form(get_args(kind)[0])}"
    bounds = ""
    if hasattr(kind, "__metadata__"):  # Annotated
        found = [bound for info in kind.__metadata__ for bound in getattr(info, "metadata", ())]
        told = [f"{words} {getattr(b, name):g}" for b in found for name, words in BOUNDS.items() if hasattr(b, name)]
        kind, bounds = get_args(kind)[0], " and ".join(told)
        if get_origin(kind) is tuple:
            return _form(kind) + ", not empty"
    return ", ".join(filter(None, [KINDS[get_origin(kind) or kind], bounds]))


def section_meaning(section: str) -> str:
    """What a section is about: its comment in `Config`, or else the docstring of its class."""
    comment = _comments(inspect.getsource(Config)).get(section, "")
    return f"{comment[:1].upper()}{comment[1:]}." if comment else str(inspect.getdoc(SECTIONS[section]))


def explain(topic: str) -> str:
    """What `--help TOPIC` says of a section, of a `section.key` or of a preset.

    Raises:
        BadInput: it is none of these.
    """
    section, _, name = topic.partition(".")
    if topic in preset_names():
        return "\n".join([preset_head(topic), "", "It sets:", *told_sections(read_preset(topic))])
    keys = [key for key in keys_of(section) if name in ("", key.name)] if section in SECTIONS else []
    if not keys:
        valid = [*SECTIONS, *preset_names(), *(f"{each}.{key.name}" for each in SECTIONS for key in keys_of(each))]
        raise BadInput(
            f"--help {topic!r} is nothing that can be explained{did_you_mean(topic, valid)}; expected a section "
            f"({', '.join(SECTIONS)}), a section.key or a preset"
        )
    lines = [f"{section}: {section_meaning(section)}", ""]
    first, second = (max(len(key[column]) for key in keys) for column in (0, 1))
    second = min(max(second, len("default")), NAME)
    lines += [f"  {'key':<{first}}  {'default':<{second}}  meaning"]
    for key in keys:
        start = f"  {key.name:<{first}}  {key.default:<{second}}  "
        told = key.form if key.form not in TOLD_BY_DEFAULTS else ""
        meaning = f"{key.meaning} ({told})" if key.meaning and told else key.meaning or key.form
        lines += wrapped(start, meaning, 6 + first + second)
    return "\n".join([*lines, "", f"On the command line: {section}.{keys[0].name}={keys[0].default or 'VALUE'}"])


def wrapped(start: str, text: str, indent: int) -> list[str]:
    """Lines of `start` and `text` that fit the terminal, the later ones indented."""
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(start + text, max(width, indent + 20), subsequent_indent=" " * indent, **options)  # type: ignore[arg-type]


def changed(config: Config, sections: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What differs from the defaults, by section and key."""
    values, defaults = config.to_dict(), Config().to_dict()
    defaults["tokenizer"]["image_size"] = config.data.image_size  # it follows by itself
    found = {
        section: {key: value for key, value in values[section].items() if value != defaults[section][key]}
        for section in sections
    }
    return {section: keys for section, keys in found.items() if keys}


def told_sections(sections: dict[str, dict[str, Any]]) -> list[str]:
    """A line, or a few, for each section with its keys and values."""
    starts = {section: f"  {section:<{max(map(len, SECTIONS))}}  " for section in sections}
    return [
        "\n".join(wrapped(start, "  ".join(f"{key}={_shown(it)}" for key, it in sections[name].items()), len(start)))
        for name, start in starts.items()
    ]


def help_page() -> str:
    """Presets and sections, for the end of `--help`."""
    lines = ["presets (--help PRESET shows one; a YAML file is one too):"]
    for name in preset_names():
        lines += wrapped(f"  {name:<17}  ", preset_head(name).splitlines()[0], 21)
    lines += ["", "sections (--help SECTION lists keys with defaults; docs/keys.md has all):"]
    for section in SECTIONS:
        lines += wrapped(f"  {section:<17}  ", section_meaning(section).splitlines()[0], 21)
    return "\n".join(lines)


def page() -> str:
    """docs/keys.md."""
    lines = [
        "# Keys",
        "",
        "Every key of the configuration with its default, for `python jobs/X.py PRESET section.key=value ...` and for",
        "YAML files (`extends: NAME` and what differs). On the terminal: `python jobs/X.py --help SECTION`. Made by",
        "`python -m pipeline.core.keys >docs/keys.md` from the comments in `pipeline/core/config.py` and",
        "`tatok_model/config.py`; a test compares.",
    ]
    shown: dict[Any, str] = {}
    for section, kind in SECTIONS.items():
        lines += ["", f"## {section}", "", section_meaning(section)]
        if kind in shown:
            lines += ["", f"The keys of [{shown[kind]}](#{shown[kind]})."]
            continue
        shown[kind] = section
        lines += ["", "| key | default | may be | meaning |", "|---|---|---|---|"]
        for key in keys_of(section):
            cells = (f"`{key.name}`", f"`{key.default}`", key.form, key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
