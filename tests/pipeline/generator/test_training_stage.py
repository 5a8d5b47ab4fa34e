"""Training a generator as a whole: what it leaves behind, resuming, two workers, and what is refused."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.config import Config
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import sha256_file
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.generator import train_generator as stage
from pipeline.generator.train_generator import check
from pipeline.tokens.token_manifest import read_token_manifest
from tatok_model.generation.generator import Generator
from tatok_model.tokens import Tokens

Configure = Callable[..., Config]
Train = Callable[..., Run]
WriteStream = Callable[..., Path]


def lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "checkpoint" / "model.safetensors")


def equal(one: Run, other: Run) -> bool:
    found, expected = weights(one), weights(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_leaves_a_generator_metrics_and_pictures(configure: Configure, train_generator: Train) -> None:
    run = train_generator(configure(), "whole")
    config = Generator.from_pretrained(run.folder / "checkpoint").config
    assert (config.size, config.classes, config.global_tokens, config.grid_size) == ("nano", 3, 2, 4)
    assert (config.codebook_size, config.positions) == (16, "generated")
    assert config.tokenizer_sha256 == read_token_manifest(run.config.tokens.path).stream.tokenizer_sha256
    last = {name: value for line in lines(run) for name, value in line["metrics"].items()}
    assert {"train/loss", "train/bits_codes", "train/padding_share", "train/images_per_second"} <= last.keys()
    assert {"validation/bits_per_image", "validation/bits_positions", "validation/bits_per_code"} <= last.keys()
    names = [path.name for path in sorted((run.folder / "pictures").iterdir())]
    assert names == ["step-00000003.png", "step-00000006.png"]
    assert (run.results["steps"], run.results["rows_train"]) == (6, 48)
    assert run.results["validation_bits_per_image"] > 0
    assert run.inputs["tokens"]["path"] == run.config.tokens.path
    assert run.outputs["checkpoint"] == str(run.folder / "checkpoint")


@pytest.mark.parametrize(("optimizer", "other"), [("adamw", "muon"), ("muon", "adamw")])
def test_stopping_and_resuming_ends_with_the_weights_of_an_uninterrupted_run(
    configure: Configure, train_generator: Train, optimizer: str, other: str
) -> None:
    own = f"train_generator.optimizer={optimizer}"
    whole = train_generator(configure(own), "whole")
    with pytest.raises(Stopped, match="max_minutes are over after step 1"):
        train_generator(configure(own, "train_generator.max_minutes=1e-9"), "broken")
    resumed = train_generator(configure(own), "broken", resume=True)
    assert equal(resumed, whole)
    for override, sentence in {
        "filter.threshold=0.5": r"filter\.threshold is 0\.5; expected 0\.6, as this run was begun",
        "generator.length_groups=3": r"generator\.length_groups is 3; expected 2",
        "train_generator.seed=1": r"train_generator\.seed is 1; expected 0",
        f"train_generator.optimizer={other}": rf"train_generator\.optimizer is '{other}'; expected '{optimizer}'",
    }.items():
        with pytest.raises(BadInput, match=sentence):
            train_generator(configure(own, override), "broken", resume=True)


@pytest.mark.slow
def test_two_workers_reach_the_weights_of_one(
    ray_session: ModuleType, configure: Configure, train_generator: Train
) -> None:
    same = ("generator.dropout=0", "train_generator.log_every=1")
    one = train_generator(configure(*same), "one")
    two = train_generator(configure(*same, "train_generator.num_workers=2"), "two")
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, atol=1e-4, rtol=1e-2, msg=name)
    logged = [[line["metrics"] for line in lines(run)] for run in (one, two)]
    losses = [[metrics["train/loss"] for metrics in every if "train/loss" in metrics] for every in logged]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name in ("validation_bits_per_image", "validation_bits_positions"):
        assert two.results[name] == pytest.approx(one.results[name], rel=1e-4)
    assert list((two.folder / "pictures").iterdir())


@pytest.mark.parametrize(
    ("override", "positions", "longest"),
    [
        ("filter.threshold=1.0", "derived", 16),
        ("generator.positions=generated", "generated", None),
        ("generator.positions=derived", "derived", 16),
    ],
)
def test_positions_are_derived_where_every_patch_token_is_kept(
    override: str, positions: str, longest: int | None, configure: Configure, train_generator: Train
) -> None:
    keep = [] if positions == "generated" else ["filter.threshold=1.0"]
    run = train_generator(configure(*keep, override, "train_generator.max_steps=1"), "positions")
    config = Generator.from_pretrained(run.folder / "checkpoint").config
    assert config.positions == positions
    assert longest is None or config.max_patch_tokens == longest


def test_derived_positions_need_every_patch_token(configure: Configure, train_generator: Train) -> None:
    with pytest.raises(BadInput, match="generator.positions is 'derived' where sequences have .* a cut that keeps all"):
        train_generator(configure("generator.positions=derived"), "derived")


def test_the_longest_sequence_may_be_a_held_out_one(
    configure: Configure, train_generator: Train, write_stream: WriteStream
) -> None:
    from tatok_model.tokens import Ranking

    def tokens(rows: int, seed: int, flat: bool) -> Tokens:
        random = torch.Generator().manual_seed(seed)
        order = torch.rand(rows, 16, generator=random).argsort(1)
        units = torch.full((rows, 16), 1000) if flat else 1000 * (torch.arange(16) < 4).long().expand(rows, 16)
        codes = torch.randint(16, (rows, 16), generator=random)
        mask = torch.ones(rows, 16, dtype=torch.bool)
        return Tokens(codes[:, :2], codes, mask, Ranking(order, units.contiguous(), "distortion", 1))

    folder = write_stream(train=tokens(24, 0, flat=False), heldout=tokens(8, 1, flat=True))
    run = train_generator(configure(f"tokens.path={folder}", "train_generator.max_steps=1"), "longest")
    assert Generator.from_pretrained(run.folder / "checkpoint").config.max_patch_tokens == 10


def only_globals(rows: int) -> Tokens:
    codes = torch.randint(16, (rows, 2), generator=torch.Generator().manual_seed(rows))
    return Tokens(codes, torch.zeros(rows, 16, dtype=torch.int64), torch.zeros(rows, 16, dtype=torch.bool))


def test_global_tokens_alone_train_at_a_count_of_them(
    configure: Configure, train_generator: Train, write_stream: WriteStream
) -> None:
    folder = write_stream(train=only_globals(24), heldout=only_globals(8))
    alone = [f"tokens.path={folder}", "tokenizer.patch_tokens=false", "tokenizer.checkpoint="]
    alone += ["train_generator.grid_images=0", "train_generator.max_steps=1", "filter.rule=count"]
    run = train_generator(configure(*alone, "filter.threshold=1"), "globals")
    config = Generator.from_pretrained(run.folder / "checkpoint").config
    assert (config.patch_tokens, config.global_tokens, config.max_patch_tokens) == (False, 1, 0)
    assert run.results["tokens_mean"] == 1
    with pytest.raises(BadInput, match="filter.threshold is 9; expected 1 to 2, the global tokens of an image"):
        check(configure(*alone, "filter.threshold=9"))
    with pytest.raises(BadInput, match="filter.rule is 'relative' without patch tokens; expected count, of global"):
        check(configure(*alone, "filter.rule=relative", "filter.threshold=0.5"))


def test_training_starts_from_the_weights_that_are_named(configure: Configure, train_generator: Train) -> None:
    first = train_generator(configure("train_generator.max_steps=2"), "first")
    start = f"generator.checkpoint={first.folder}"
    short = ("train_generator.max_steps=1", "train_generator.learning_rate=1e-12", "train_generator.warmup_steps=0")
    second = train_generator(configure(start, *short), "second")
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, atol=1e-6, rtol=1e-5)
    with pytest.raises(BadInput, match=r"has size 'nano'; expected 'tiny', as generator\.size"):
        check(configure(start, "generator.size=tiny"))
    longer = configure(start, "filter.threshold=0.9")
    with pytest.raises(BadInput, match=r"was made for \d+ patch tokens; expected at least \d+, the longest sequence"):
        train_generator(longer, "longer")
    with pytest.raises(BadInput, match="has positions generated; expected derived at this cut"):
        train_generator(configure(start, "filter.threshold=1.0"), "all")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tokens.path=/nowhere", "'/nowhere' holds no tokens.json"),
        ("filter.score=entropy", "is ranked by distortion; expected filter.score, entropy"),
        ("filter.rounds=4", "is ranked in 1 rounds; expected filter.rounds, 4"),
        ("tokenizer.global_tokens=3", "has global_tokens 2; expected tokenizer.global_tokens, 3"),
        ("tokenizer.checkpoint=", "tokenizer.checkpoint is empty; expected the tokenizer that made .*grid_images=0"),
        ("tokenizer.checkpoint=/nowhere", "tokenizer.checkpoint '/nowhere' does not exist"),
        ("generator.checkpoint=/nowhere", "generator.checkpoint.*/nowhere"),
        ("generate.labels=[7]", "generate.labels has 7; expected 0 to 2, the generator's classes"),
        ("train_generator.num_workers=512", "train_generator.num_workers is 512.*expected at most"),
        ("tracking.uri=file:///tmp/x", "tracking.uri"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    override: str, sentence: str, configure: Configure
) -> None:
    more = ["train_generator.global_batch_size=512"] if "num_workers" in override else []
    with pytest.raises(BadInput, match=sentence):
        check(configure(override, *more))


def test_tokens_of_another_tokenizer_are_refused(configure: Configure, write_stream: WriteStream) -> None:
    folder = write_stream(tokenizer_sha256="0" * 64)
    with pytest.raises(BadInput, match=r"is of a tokenizer with sha256 000000000000\.\.\.; expected that of tokenizer"):
        check(configure(f"tokens.path={folder}"))


def test_a_tokenizer_is_no_generator_to_start_from(configure: Configure, tokenizer_folder: Path) -> None:
    with pytest.raises(BadInput, match="generator.checkpoint: .* is not a generator's"):
        check(configure(f"generator.checkpoint={tokenizer_folder}"))


def test_a_generator_of_other_classes_is_no_start(
    configure: Configure, train_generator: Train, write_stream: WriteStream
) -> None:
    first = train_generator(configure("train_generator.max_steps=1"), "three")
    other = write_stream(classes=("ant", "bee", "cow", "dog"))
    with pytest.raises(BadInput, match=r"has classes 3; expected 4, as tokens\.path"):
        check(configure(f"generator.checkpoint={first.folder}", f"tokens.path={other}"))


def test_a_cut_that_keeps_almost_nothing_is_warned_of(
    configure: Configure, train_generator: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train_generator(configure("filter.rule=marginal", "filter.threshold=1e9", "train_generator.max_steps=1"), "none")
    assert "(rule marginal, score distortion) keeps 0.0% of the patch tokens of 48 pictures" in capsys.readouterr().err
    train_generator(configure("train_generator.max_steps=1"), "some")
    assert "warning: filter.threshold" not in capsys.readouterr().err


@pytest.mark.parametrize("override", ["train_generator.seed=5", "filter.threshold=0.5", "generator.dropout=0.3"])
def test_a_mistyped_resume_is_refused_before_tokens_are_made(
    configure: Configure, train_generator: Train, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    train_generator(configure("train_generator.max_steps=1"), "one")
    monkeypatch.setattr(stage, "with_input", lambda *arguments: pytest.fail("tokens are looked for"))
    with pytest.raises(BadInput, match=f"{override.partition('=')[0]} is .*; expected .*, as this run was begun"):
        train_generator(configure("train_generator.max_steps=1", override), "one", resume=True)


def test_a_split_without_rows_is_refused(configure: Configure, write_stream: WriteStream) -> None:
    folder = write_stream(heldout=only_globals(0), train=only_globals(4))
    config = configure(f"tokens.path={folder}", "tokenizer.patch_tokens=false", "tokenizer.checkpoint=")
    with pytest.raises(BadInput, match="holds .*'heldout': 0.* rows; expected some in both splits"):
        check(config)


def test_tokens_are_made_first_where_none_are_named(
    configure: Configure,
    stream_folder: Path,
    write_shards: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def made(stage: str, config: Config, name: str) -> None:
        asked.append(stage)
        shutil.copytree(stream_folder, Path(config.run.output) / name)

    monkeypatch.setattr("pipeline.core.inputs.run_nested", made)
    rows = {"train": [{"image": b"not looked at"}], "heldout": [{"image": b"not looked at"}]}
    shards = write_shards(tmp_path / "shards", rows, 16, ("ant",))
    config = configure("tokens.path=", f"data.shards={shards}", "train_generator.max_steps=1")
    run = Run.open("train_generator", config, "made", resume=False)
    stage.run(run)
    run.close()
    assert asked == ["tokenize_images"]
    assert re.fullmatch(f"{tmp_path}/runs/smoke-tokens-[0-9a-f]{{8}}", run.config.tokens.path)
    assert run.inputs["tokenizer"]["path"] == config.tokenizer.checkpoint
    assert dataclasses.replace(run.config.tokens, path="") == config.tokens


def test_the_default_name_says_preset_and_stage() -> None:
    assert stage.default_name(load_config("smoke")) == "smoke-train-generator"


def test_the_job_refuses_with_exit_code_2_and_a_dry_run_writes_nothing(
    run_job: Callable, stream_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    values = "quantizer=fsq fsq_levels=[4,4] codebook_size=16 patch_size=4 global_tokens=2 codebook_dim=16"
    shape = ["data.image_size=16", *(f"tokenizer.{value}" for value in values.split())]
    where = [f"tokens.path={stream_folder}", f"tokenizer.checkpoint={tokenizer_folder}", f"run.output={tmp_path}/runs"]
    done = run_job("train_generator", "smoke", *shape, *where, "tracking.uri=", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs").exists()
    refused = run_job("train_generator", "smoke", *shape, *where, "tokens.path=/nowhere", "--dry-run")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: '/nowhere' holds no tokens.json")


def test_inputs_name_the_weights_that_were_started_from(configure: Configure, train_generator: Train) -> None:
    first = train_generator(configure("train_generator.max_steps=1"), "first")
    second = train_generator(configure(f"generator.checkpoint={first.folder}", "train_generator.max_steps=1"), "second")
    assert second.inputs["generator"]["sha256"] == sha256_file(first.folder / "checkpoint/model.safetensors")
