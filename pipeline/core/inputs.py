"""Inputs that a stage needs and no key names: a run that is made of the same is taken, else made; a line says so.

Runs say in `summary.json` what they are `made_of`; one that is made on the way is named by a fingerprint of it, so that
old results stay and new ones appear beside them: docs/decisions/0007. Data is made unasked, a model only with `--make`.
Stages are asked by name, so that nothing here imports a higher package.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipeline.core.checkpoints import (
    architecture_differs,
    check_architecture,
    find,
    is_hub_id,
    read_architecture,
    read_generator,
)
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.files import boxed, sha256_file
from pipeline.core.job import run_nested
from pipeline.core.manifest import fingerprint, read_described
from pipeline.core.run import read_summary, wait_while_held
from pipeline.core.stages import Maker, find_stage


@dataclass(frozen=True)
class InputKind:
    """What a key names, and the stage that makes it."""

    key: str
    stage: str
    what: str  # in words
    making: str  # the same
    needs: tuple[str, ...]  # keys of what it is made from
    last: str  # the file of the run folder that is written last; a manifest lists what else has to be there
    folder: str = ""  # of the run folder, which the key names
    section: str = ""  # of a training: a model, whose making takes long

    def named(self, run: Path) -> str:
        """The value of the key for a run folder."""
        return str(run / self.folder)


KINDS = {
    kind.key: kind
    for kind in (
        InputKind("data.shards", "preprocess", "shards", "preprocessing data.source", (), "manifest.json"),
        InputKind("tokenizer.checkpoint", "train", "tokenizer", "training", ("data.shards",),
                  "checkpoint/config.json", "checkpoint", "train"),
        InputKind("tokens.path", "tokenize_images", "token stream", "tokenizing",
                  ("data.shards", "tokenizer.checkpoint"), "tokens.json"),
        InputKind("generator.checkpoint", "train_generator", "generator", "training",
                  ("tokens.path", "tokenizer.checkpoint"), "checkpoint/config.json", "checkpoint", "train_generator"),
    )
}  # fmt: skip


def find_input(config: Config, key: str, begun: Path | None = None) -> Config:
    """The configuration with the input that a key names, and what it is made from, as far as they are there.

    Args:
        config: its run folder, if there is one, may have been begun with inputs that it goes on with.
        key: of `KINDS`.
        begun: that folder, where it is not the configuration's.
    """
    kind = KINDS[key]
    if config.value(key):
        return _with_recorded(config, kind, Path(config.value(key)))
    found = config
    for need in kind.needs:
        found = find_input(found, need, begun)
    folder = _look(found, kind, begun)
    if folder is None:
        return found
    by_hand = kind.section and folder == _plain(config, kind)  # brings what it was made from
    return _with_recorded(_with(config if by_hand else found, kind, folder), kind, folder)


def check_input(config: Config, key: str) -> Config:
    """As `find_input`; refuses what could not be made, before anything is.

    Raises:
        BadInput: as the check of the stage that would make it; a model that there is not, without `--make`.
    """
    found, kind = find_input(config, key), KINDS[key]
    if found.value(key):
        return found
    find_stage(kind.stage).check(config)
    open_question = not all(found.value(need) for need in kind.needs) and (
        _is_whole(_plain(config, kind), kind) or any(_runs(config, kind))
    )  # whether one of these fits is known once what they are made from is there
    if kind.section and not config.run.make and not open_question:
        raise BadInput(_refusal(found, kind))
    return found


def check_tokenizer(config: Config) -> None:
    """Refuse a tokenizer that cannot be used, or that there is not; see `check_input`."""
    found = check_input(config, "tokenizer.checkpoint")
    if found.tokenizer.checkpoint:
        check_architecture(found)


def with_input(config: Config, key: str, begun: Path | None = None) -> Config:
    """As `find_input`; what is not there is made first.

    Raises:
        BadInput: a model would have to be trained, without `--make`; or as the stages.
        Stopped: the stop that was asked for came to what is made.
    """
    kind, found = KINDS[key], find_input(config, key, begun)
    if found.value(key):
        if not config.value(key):
            say(f"{_why_taken(config, kind)}: taking {found.value(key)}")
        return found
    if kind.section and not config.run.make:
        raise BadInput(_refusal(found, kind))
    for need in kind.needs:
        found = with_input(found, need, begun)
    if kind.needs and (folder := _look(found, kind, begun)):  # of which nobody could know before
        say(f"{key} is empty: taking {folder}")
        return _with(found, kind, folder)
    stage = cast(Maker, find_stage(kind.stage))
    name = stage.default_name(found)
    if kind.needs:  # shards have no plain name
        name = f"{name}-{fingerprint(stage.made_of(found))}"
    folder = Path(found.run.output) / name
    if wait_while_held(folder, 0):
        say(f"{key} is empty: another process is making {folder}, waiting for it")
        wait_while_held(folder, math.inf)
    if not _is_whole(folder, kind):
        say(f"{key} is empty: {kind.making} first{_steps(config, kind, ', ')} -> {folder}")
        run_nested(kind.stage, found, name)
    return _with(found, kind, folder)


def _why_taken(config: Config, kind: InputKind) -> str:
    try:
        if not kind.needs:
            find_stage(kind.stage).check(config)
    except BadInput:
        return f"data.source {config.data.source!r} cannot be read any more"
    return f"{kind.key} is empty"


def _with(config: Config, kind: InputKind, folder: Path) -> Config:
    section, name = kind.key.split(".")
    return config.with_values(section, **{name: kind.named(folder)})


def _steps(config: Config, kind: InputKind, before: str) -> str:
    if not kind.section:
        return ""
    section = getattr(config, kind.section)
    return f"{before}{section.max_steps} steps of {section.global_batch_size} pictures"


def _refusal(found: Config, kind: InputKind) -> str:
    """What to say where a model would have to be trained that nobody asked for."""
    plain = _plain(found, kind)
    differs = f": {str(plain)!r} {_differs(found, kind, plain)}" if _is_whole(plain, kind) else ""
    others = [run.name for run, _ in _runs(found, kind) if run != plain]
    there = f" (there: {', '.join(others[:3])}{', ...' * (len(others) > 3)})" if others else ""
    box = f" (in the box: {', '.join(boxed())})" if kind.key == "tokenizer.checkpoint" else ""
    return (
        f"{kind.key} is empty and {found.run.output!r} holds no {kind.what} of this configuration{there}{differs}; "
        f"expected {kind.key} to name one{box}, or --make to train it first, {_steps(found, kind, '')}"
    )


# What is there.


def _runs(config: Config, kind: InputKind) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Finished runs of the stage in `run.output` that are whole, with their summaries."""
    for path in sorted(Path(config.run.output).glob("*/summary.json")):
        summary = _summary(path.parent)
        if (summary.get("stage"), summary.get("status")) == (kind.stage, "finished") and _is_whole(path.parent, kind):
            yield path.parent, summary


def _summary(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_summary(folder)
    return {}


def _is_whole(folder: Path, kind: InputKind) -> bool:
    """Whether everything is there; damage inside files is found by who reads them."""
    with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        values = json.loads((folder / kind.last).read_bytes())
        if kind.section:
            return (folder / kind.last).with_name("model.safetensors").is_file()
        lists = [
            each for split in values.get("splits", {}).values() for each in split.values() if isinstance(each, list)
        ]
        return all((folder / file["file"]).is_file() for files in lists for file in files)
    return False


def _look(config: Config, kind: InputKind, begun: Path | None) -> Path | None:
    """The run folder that holds what the configuration asks for, with the inputs that it names."""
    if not kind.needs:
        return _look_for_shards(config, kind, begun)
    if all(config.value(need) for need in kind.needs) and not _of_hub(config):
        made_of = cast(Maker, find_stage(kind.stage)).made_of(config)
        for run, summary in _runs(config, kind):
            if summary.get("made_of") == made_of:
                return run
    plain = _plain(config, kind)
    return plain if kind.section and _is_whole(plain, kind) and not _differs(config, kind, plain) else None


def _of_hub(config: Config) -> bool:
    return is_hub_id(config.tokenizer.checkpoint)


def _look_for_shards(config: Config, kind: InputKind, begun: Path | None) -> Path | None:
    """Shards of the same files; those that a run was begun with; of a source that is gone, the newest."""
    stage = cast(Any, find_stage(kind.stage))
    asked = stage.asked_for(config)
    own = begun or Path(config.run.output) / (config.run.name or ".")
    if taken := _recorded(own, "shards"):
        summary = _summary(Path(taken))
        if _is_whole(Path(taken), kind) and asked.items() <= summary.get("made_of", {}).items():
            return Path(taken)
    try:
        made_of = stage.made_of(config)
    except BadInput:
        return shards_of_gone_source(config)
    return next((run for run, summary in _runs(config, kind) if summary.get("made_of") == made_of), None)


def shards_of_gone_source(config: Config) -> Path | None:
    """The newest whole shards of a source that cannot be read any more; None where it can, or there are none."""
    stage, kind = cast(Any, find_stage("preprocess")), KINDS["data.shards"]
    with suppress(BadInput):
        stage.made_of(config)
        return None
    asked = stage.asked_for(config)
    runs = [run for run, summary in _runs(config, kind) if asked.items() <= summary.get("made_of", {}).items()]
    return max(runs, key=lambda run: (run / kind.last).stat().st_mtime_ns, default=None)


def _recorded(folder: Path, name: str) -> str:
    """The path of an input that a run was begun with, or that its tokens were made from; '' where it does not say."""
    inputs = _summary(folder).get("inputs", {})
    path = inputs.get(name, {}).get("path", "")
    tokens = inputs.get("tokens", {}).get("path", "")
    return path or (_recorded(Path(tokens), name) if tokens and name != "tokens" else "")


def _with_recorded(config: Config, kind: InputKind, value: Path) -> Config:
    """With what it was made from, where the configuration does not say and it is still there: tokens, tokenizer.

    As if it had just been made: classes are called as they are there, and only the tokenizer that wrote tokens reads
    them.
    """
    if "tokenizer.checkpoint" not in kind.needs:
        return config
    run = value.parent if kind.folder and value.name == kind.folder else value
    tokens, tokenizer = _recorded(run, "tokens"), _recorded(run, "tokenizer")
    if "tokens.path" in kind.needs and not config.tokens.path and tokens:
        there = _is_whole(Path(tokens), KINDS["tokens.path"])
        config = config.with_values("tokens", path=tokens if there else "")
    if not config.tokenizer.checkpoint and tokenizer:
        with suppress(BadInput):  # it is no longer there
            if not is_hub_id(tokenizer):
                find(tokenizer)
            config = config.with_values("tokenizer", checkpoint=tokenizer)
    trained = KINDS["tokenizer.checkpoint"]
    if not config.tokenizer.checkpoint and _is_whole(_plain(config, trained), trained):
        config = _with(config, trained, _plain(config, trained))
    return config


def _plain(config: Config, kind: InputKind) -> Path:
    """The run folder of the job itself, when nobody names it."""
    return Path(config.run.output) / find_stage(kind.stage).default_name(config)


def _differs(config: Config, kind: InputKind, run: Path) -> str:
    """Why the model that somebody trained under the plain name is not taken; '' where it is, whatever its steps."""
    if kind.key == "tokenizer.checkpoint":
        ours, theirs = config.data.shards, _summary(run).get("inputs", {}).get("shards", {})
        if (
            not ours
            or theirs.get("sha256") != read_described(ours, "manifest.json", "jobs/preprocess.py")["fingerprint"]
        ):
            return f"was trained on other pictures, {theirs.get('path', 'unknown')!r} instead of {ours!r}"
        found = architecture_differs(read_architecture(str(run)), config)
        return f"has {found}" if found else ""
    generator = read_generator(str(run))
    wanted = {"size": config.generator.size, "cut": config.filter.cut(config.tokenizer.patch_tokens)}
    for name, value in wanted.items():
        if getattr(generator, name) not in ("", value):
            return f"has {name} {getattr(generator, name)!r} instead of {value!r}"
    path = config.tokenizer.checkpoint
    sha256 = sha256_file(find(path) / "model.safetensors") if path and not _of_hub(config) else ""
    if sha256 and generator.tokenizer_sha256 not in ("", sha256):
        return f"writes tokens of another tokenizer than {path!r}"
    return ""
