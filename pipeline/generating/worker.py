"""One worker that trains a generator: builds what the loop needs from the configuration, runs it, reports."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.checkpoints import find
from pipeline.config import Config, TrainConfig
from pipeline.devices import uses_bf16
from pipeline.generating.architecture import check_length, check_start, generator_config
from pipeline.generating.batches import LayeredOrder, TokenBatches
from pipeline.generating.fit import read_generator
from pipeline.generating.objective import GeneratorObjective
from pipeline.generating.token_data import TokenDataset
from pipeline.generating.validation import GeneratorValidator
from pipeline.pretrained import load_tokenizer
from pipeline.progress import say
from pipeline.run import Run
from pipeline.tokenizing.manifest import check_tokenizer
from pipeline.training import distributed
from pipeline.training.order import SampleOrder
from pipeline.training.recorder import Recorder
from pipeline.training.resume import go_on, values_of
from pipeline.training.state import TrainState, derive_seed
from tatok_model.generator import Generator
from tatok_model.tokenizer import TaTok

SECTION = "train_generator"


def work(
    run: Run,
    device: torch.device,
    wrap: Callable[[torch.nn.Module], torch.nn.Module],
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Train this worker's part to the end of the run; see `pipeline.training.worker.work`."""
    config, section, train_config = run.config, run.config.generator, run.config.train_generator
    training, heldout = (TokenDataset.load(config.tokens.path, name, config.filter) for name in ("train", "heldout"))
    decides = deciding(config, training)
    wanted = config.generator.from_codebook or train_config.grid_images
    tokenizer = _tokenizer(config, training) if wanted and config.tokenizer.checkpoint else None
    state = starting_state(run, training, heldout, decides, device, tokenizer)
    draws = train_config.grid_images and distributed.rank() == 0
    sizes = train_config.validation_images, config.generate, train_config.grid_images
    validator = GeneratorValidator(heldout, *sizes, tokenizer if draws else None, device)
    shape = state.model.config
    groups = max(section.length_groups, train_config.accumulation)
    batches = TokenBatches(
        training,
        _order(training, train_config),
        distributed.rank(),
        distributed.world_size(),
        groups=groups,
        class_dropout=section.class_dropout,
        ends=int(shape.patch_tokens and shape.positions == "generated"),
    )
    objective = GeneratorObjective(state, device, uses_bf16(train_config.precision, device), wrap)
    seen = LayeredOrder(_order(training, train_config), training.lengths(), groups)  # a thread has the batches' own

    def ids(step: int) -> list[str]:
        return [training.ids[row] for row in seen.global_batch(step)[0]]

    outcome = Recorder(run, train_config, decides, validator, report, state, ids).train(objective, batches)
    lengths = training.lengths()
    facts = {"tokens_mean": float(lengths.mean()), "tokens_std": float(lengths.std()), "rows_train": len(training)}
    outcome["results"] |= facts
    return outcome


def _order(training: TokenDataset, config: TrainConfig) -> SampleOrder:
    return SampleOrder(len(training), config.seed, config.global_batch_size)


def starting_state(
    run: Run,
    training: TokenDataset,
    heldout: TokenDataset,
    decides: dict[str, Any],
    device: torch.device,
    tokenizer: TaTok | None,
) -> TrainState[Generator]:
    """From the run's newest checkpoint, else from `generator.checkpoint`, else new, with the tokenizer's code vectors.

    Raises:
        BadInput: the run was begun with other values, or `generator.checkpoint` writes other sequences.
    """
    config = run.config
    manifest, path = training.manifest, config.generator.checkpoint
    counts = np.concatenate([training.counts, heldout.counts])
    shape = generator_config(config, manifest, int(counts.min()), int(counts.max()))
    if path:
        found = read_generator(path)
        check_start(config, manifest, found)
        check_length(config, found, shape)
        shape = dataclasses.replace(shape, max_patch_tokens=found.max_patch_tokens)
    torch.manual_seed(derive_seed(config.train_generator.seed, "weights"))
    generator = Generator(shape)
    if config.generator.from_codebook and tokenizer is not None:
        generator.start_from_codes(*tokenizer.code_vectors())
    elif config.generator.from_codebook and distributed.rank() == 0:
        say("tokenizer.checkpoint is empty: codes start at random instead of from its codebook")
    state = TrainState(generator.to(device), config.train_generator, Generator.from_pretrained)
    if not go_on(state, run.folder / "checkpoints", decides) and path:
        state.start_from(Generator.from_pretrained(find(path, "generator.checkpoint")))
    return state


def deciding(config: Config, training: TokenDataset) -> dict[str, Any]:
    """What decides the weights of a step, by key: a run that goes on must have the same."""
    values = values_of(config, "generator", SECTION)
    cut = {"filter.rule": config.filter.rule, "filter.threshold": config.filter.threshold}
    return {**values, **cut, "tokens.path": training.manifest.fingerprint}


def _tokenizer(config: Config, training: TokenDataset) -> TaTok:
    tokenizer, sha256 = load_tokenizer(config)
    check_tokenizer(config, training.manifest.stream, sha256)
    return tokenizer
