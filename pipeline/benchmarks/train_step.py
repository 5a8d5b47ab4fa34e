"""Images per second of a training step: in our Ray Train loop, in a bare loop, and of other models.

All contenders take turns in one Ray Train worker, on the same pictures:

- ray_train_loop: `pipeline.training.tokenizer_training.work`, as a training runs it; the rate that it logs, which
  leaves out start, validation and checkpoint.
- bare_loop: the same step written out, on pictures in memory: forward, losses, backward, clipping, `train.optimizer`
  with fused AdamW, average of the weights; no logging, no checks for NaN, no seeding per step.
- bare_float32 or bare_bf16: bare_loop in the other precision. bare_not_fused: with plain AdamW. bare_compiled: with
  `torch.compile`, on a GPU or where `train.compile` is set (on a CPU it takes minutes).
- global_only: bare_loop of a tokenizer with M + N global tokens and no patch tokens.
- titok: bare_loop of TiTok's public model with as many tokens, where `benchmark.titok` names its code; with AdamW.

Every bare loop minimises a mean squared error and its quantizer's loss; ours with patch tokens trains q too.

Shapes: B images, H = W image side, M global tokens, N patch positions, L embeddings of D numbers.
"""

import copy
import dataclasses
import io
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import Findings, Goal, Ratio, Spread
from pipeline.core.cluster import uses_bf16
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.run import Run, read_metrics
from pipeline.training import train as training
from tatok_model.config import SIZES, KeptSetConfig, TokenizerConfig
from tatok_model.vit import CHANNELS

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    import torch
    from torch import Tensor, nn

    from pipeline.training.order import Batch

LOOP, BARE, GLOBAL_ONLY, TITOK = "ray_train_loop", "bare_loop", "global_only", "titok"
TAX, TAX_ON_GPU, AGAINST_TITOK, UTILISATION = Goal(0.97), Goal(0.98), Goal(1.2), Goal(0.45)
WORKER = "pipeline.benchmarks.train_step"  # whose `work` Ray Train runs


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made.

    Raises:
        BadInput: as training's `check`; a `benchmark.titok` that is no checkout, or no size that TiTok has.
    """
    made = dataclasses.replace(config.data, source="samples")  # as good a name as any for pictures that will be made
    known = config if harness.names_pictures(config) else dataclasses.replace(config, data=made)
    training.check(for_benchmark(known))
    if config.benchmark.titok:
        check_titok(config.benchmark.titok, config.tokenizer)


def for_benchmark(config: Config) -> Config:
    """The configuration of the loop: one worker, the benchmark's batch, and no step that stands out.

    Kept sets are those of the ranking from the first step on; nothing is validated or saved but at the end. The first
    half of the steps warms up.
    """
    section, steps = config.benchmark, steps_of(config)
    config = config.with_values("train", num_workers=1, min_workers=0, accumulation=1, max_minutes=0.0)
    config = config.with_values("train", global_batch_size=section.batch_size, log_every=steps, max_steps=2 * steps)
    config = config.with_values("train", validate_every=0, checkpoint_every=0, validation_images=2, grid_images=0)
    folder = str(Path(section.titok).resolve()) if section.titok else ""  # a worker starts in another folder
    return config.with_values("kept_sets", warmup_steps=0).with_values("benchmark", titok=folder)


def steps_of(config: Config) -> int:
    """Steps of a timing."""
    return max(1, config.benchmark.images // config.benchmark.batch_size)


def run(run: Run) -> None:
    """Measure, and leave `report.md` with the table."""
    from pipeline.training.train import run_workers

    with harness.scratch(run) as folder:
        harness.take_pictures(run, folder, heldout_fraction=0.1)
        run.config = for_benchmark(run.config)

        def measure() -> Findings:
            outcome = run_workers(run, "train", WORKER)
            return findings(run.config, outcome["rates"], outcome["facts"])

        harness.publish(run, measure, {"data_fingerprint": run.inputs["shards"]["sha256"]})


def findings(config: Config, rates: dict[str, list[float]], facts: dict[str, str]) -> Findings:
    """What the rates of the contenders, one a round, say; the worker's facts name a `gpu` where there is one."""
    gpu = facts.get("gpu", "")
    tax = TAX_ON_GPU if gpu else TAX
    ratios = [Ratio.of("loop_over_bare", rates[LOOP], rates[BARE], "Ray Train loop over bare loop", tax)]
    for name, its in rates.items():
        if name not in (LOOP, BARE):
            goal = AGAINST_TITOK if name == TITOK else None
            ratios.append(Ratio.of(f"{BARE}_over_{name}", rates[BARE], its, f"bare loop over {name}", goal))
    ratios += utilisation(config, rates[BARE], gpu)
    return Findings(harness.rate_table(rates, BARE), ratios, harness.rate_results(rates), facts)


def utilisation(config: Config, rates: list[float], gpu: str) -> list[Ratio]:
    """Model FLOP utilisation in bf16, where the GPU is one whose peak is known; [] elsewhere."""
    peak = peak_flops(gpu)
    if peak is None:
        return []
    spread = Spread.of([rate * training_flops(config.tokenizer) / peak for rate in rates])
    return [Ratio("flop_utilisation", spread, f"of {peak / 1e12:.0f} dense bf16 TFLOP/s", UTILISATION)]


# Floating point operations of a training step, and what share of a GPU's they are.

FORWARD_AND_BACKWARD = 3  # forward passes' worth
DENSE_BF16 = {  # operations per second without sparsity, by what the name of a GPU contains; the vendor's data sheets
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
}  # fmt: skip


def training_flops(config: TokenizerConfig) -> float:
    """Operations of a training step for each image; q's own ranking pass is not counted."""
    return FORWARD_AND_BACKWARD * forward_flops(config)


def forward_flops(config: TokenizerConfig) -> float:
    """Operations of a forward pass for an image of which everything is read, kept and predicted."""
    return encode_flops(config) + decode_flops(config) + entropy_flops(config)


def encode_flops(config: TokenizerConfig) -> float:
    """Operations of the way from pixels to codebook entries, for an image."""
    width, layers, _, _ = SIZES[config.size]
    dim = config.code_dim
    total = 2.0 * config.patch_positions * config.patch_size**2 * CHANNELS * width
    total += transformer_flops(config.global_tokens + config.patch_positions, width, layers)
    return total + 2.0 * config.max_tokens * dim * (width + config.codebook_size)  # to code vectors, and the nearest


def decode_flops(config: TokenizerConfig) -> float:
    """Operations from codebook entries to pixels, for an image of which all tokens are kept."""
    width, _, layers, _ = SIZES[config.size]
    total = 2.0 * config.patch_positions * config.patch_size**2 * CHANNELS * width
    total += transformer_flops(config.global_tokens + config.patch_positions, width, layers)
    return total + 2.0 * config.max_tokens * config.code_dim * width


def entropy_flops(config: TokenizerConfig) -> float:
    """Operations of q, for an image of which every code is predicted; 0 where there is no q."""
    if not config.has_entropy_model:
        return 0.0
    seen = config.patch_positions + (config.global_tokens if config.entropy_globals else 0)
    total = 2.0 * seen * config.code_dim * config.entropy_width
    total += transformer_flops(seen, config.entropy_width, config.entropy_layers)
    return total + 2.0 * config.patch_positions * config.entropy_width * config.codebook_size


def transformer_flops(length: int, width: int, layers: int) -> float:
    """Operations of blocks on L embeddings: 12 D^2 weights per embedding, and L^2 D each for scores and averages."""
    return 2.0 * layers * (12 * length * width**2 + 2 * length**2 * width)


def peak_flops(gpu: str) -> float | None:
    """Dense bf16 operations per second of a GPU by its name; None: not in the table."""
    return next((peak for name, peak in DENSE_BF16.items() if name in gpu), None)


# What the worker of Ray Train does.

RATE = "train/images_per_second"


class BareLoop:
    """Trains a model on the same batches in memory again and again, with as little else as possible.

    `loss_of` takes the model, (B, 3, H, W) pixels in [0, 1] and (B, draws) uniforms.
    """

    def __init__(
        self, model: "nn.Module", loss_of: "Callable[[nn.Module, Tensor, Tensor], Tensor]", config: Config,
        batches: list["Batch"], bf16: bool, compiled: bool = False,
    ) -> None:  # fmt: skip
        import torch

        from pipeline.training.state import make_optimizer
        from tatok_model.entropy import EntropyModel

        self._used: Any = torch.compile(model) if compiled else model
        self.model, self._loss_of, self._bf16 = model, loss_of, bf16
        self._device = next(model.parameters()).device
        self._average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = make_optimizer(model, config.train)
        self._train = config.train
        self._batches = [(batch.images.to(self._device), batch.uniforms.to(self._device)) for batch in batches]
        q = [p for m in model.modules() if isinstance(m, EntropyModel) for p in m.parameters()]
        rest = [p for p in model.parameters() if not any(p is other for other in q)]
        self._groups = [group for group in (rest, q) if group]  # gradients clipped separately, as in our training
        model.train()

    def rate(self) -> float:
        """Images per second over one pass through the batches."""
        started = harness.now(self._device)
        for images, uniforms in self._batches:
            self._step(images, uniforms)
        return sum(len(images) for images, _ in self._batches) / (harness.now(self._device) - started)

    def _step(self, images: "Tensor", uniforms: "Tensor") -> None:
        import torch

        pixels = images.float() / 255
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            loss = self._loss_of(self._used, pixels, uniforms)
        loss.backward()
        if self._train.clip_norm:
            for group in self._groups:
                torch.nn.utils.clip_grad_norm_(group, self._train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            averages: list[Tensor] = list(self._average.parameters())
            torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - self._train.ema_decay)


def work(
    run: Run,
    device: "torch.device",
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Let all contenders take turns; arguments as those of `pipeline.training.tokenizer_training.work`.

    Returns:
        `rates`: images per second of every contender, one a round; `facts` about this worker.
    """
    config = run.config
    reader = harness.training_batches(config)
    batches = [reader.load(step) for step in range(steps_of(config))]  # what the training sees in a timing's steps
    loops = bare_loops(config, batches, device)
    turns: dict[str, Callable[[], float]] = {LOOP: partial(loop_rate, run, device, report)}
    turns |= {name: loop.rate for name, loop in loops.items()}
    rates = harness.take_turns(run, turns)
    facts = {
        **harness.device_facts(device),
        "steps a timing": str(len(batches)),
        "batch": str(config.benchmark.batch_size),
        "precision": "bf16" if uses_bf16(config.train.precision, device) else "float32",
        "tokenizer": f"{config.tokenizer.size}, {config.tokenizer.max_tokens} tokens",
    }
    return {"rates": rates, "facts": facts}


def loop_rate(run: Run, device: "torch.device", report: Callable[[dict[str, float]], None]) -> float:
    """Images per second of a short training in a folder of its own: the rate that it logs over its second half."""
    from pipeline.training import tokenizer_training

    folder = run.folder / "loop"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    part = Run("train", run.config, folder)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # no log lines in every round
            tokenizer_training.work(part, device, report)
        part.close()
        rates = [line.metrics[RATE] for line in read_metrics(folder, RATE)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rates[-1]


def bare_loops(config: Config, batches: list["Batch"], device: "torch.device") -> dict[str, BareLoop]:
    """All contenders but the Ray Train loop, by their names."""
    import torch

    from tatok_model.tokenizer import TaTok

    torch.manual_seed(config.train.seed)
    architecture, bf16 = config.tokenizer.architecture(), uses_bf16(config.train.precision, device)
    ours = partial(tokenizer_loss, mix=config.kept_sets)
    plain = config.with_values("train", fused=False)
    global_only = dataclasses.replace(architecture, global_tokens=architecture.max_tokens, patch_tokens=False)

    def loop(model: "nn.Module", loss_of: Any, used: Config = config, bf16: bool = bf16, **options: bool) -> BareLoop:
        return BareLoop(model.to(device), loss_of, used, batches, bf16, **options)

    loops = {
        BARE: loop(TaTok(architecture), ours),
        "bare_float32" if bf16 else "bare_bf16": loop(TaTok(architecture), ours, bf16=not bf16),
        "bare_not_fused": loop(TaTok(architecture), ours, plain),
        GLOBAL_ONLY: loop(TaTok(global_only), ours),
    }
    if config.train.compile or device.type == "cuda":
        loops["bare_compiled"] = loop(TaTok(architecture), ours, compiled=True)
    if config.benchmark.titok:
        loops[TITOK] = loop(make_titok(config.benchmark.titok, architecture), titok_loss)
    return loops


def tokenizer_loss(model: "nn.Module", pixels: "Tensor", uniforms: "Tensor", mix: KeptSetConfig) -> "Tensor":
    """The loss of `pipeline.training.tokenizer_training` with its l2 term alone, of a `TaTok` or what wraps it."""
    output = model(pixels, None, uniforms, mix)
    loss: Tensor = (output.images.float() - pixels).square().mean() + output.commitment_loss
    if len(output.code_bits):
        loss = loss + output.code_bits.sum() / output.tokens.patch_indices.numel()
    return loss


# TiTok's public model (arXiv 2406.07550) at our size and token count, from a checkout of its code.
#
#     git clone https://github.com/bytedance/1d-tokenizer; benchmark.titok=1d-tokenizer
#
# TiTok's code is imported for the run and is no part of this project. Two packages that it needs get stubs where they
# are not installed, because nothing that is timed uses them: omegaconf (reads configurations) and accelerate (gathers
# between workers for a codebook that is clustered, which this one is not). `modeling/modules/__init__.py`, which
# imports all losses, is not run.

TITOK_SIZES = ("small", "base", "large")  # sizes in TiTok's code, with our width, layers and heads
TITOK_FILES = ("modeling/titok.py", "modeling/modules/blocks.py", "modeling/quantizer/quantizer.py")
TOKEN_SIZE = 12  # width of a code vector, as in TiTok's configurations


class TiTokOptions(SimpleNamespace):
    """A section of a configuration, in place of omegaconf's."""

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where there is none."""
        return getattr(self, name, default)


def check_titok(folder: str, config: TokenizerConfig) -> None:
    """Refuse what cannot be compared.

    Raises:
        BadInput: the folder is not a checkout of TiTok's code, or TiTok has no model of our size.
    """
    missing = [name for name in TITOK_FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise BadInput(f"benchmark.titok is {folder!r}, which has no {missing[0]}; expected a checkout of 1d-tokenizer")
    if config.size not in TITOK_SIZES:
        raise BadInput(
            f"tokenizer.size is {config.size!r}; expected one of {', '.join(TITOK_SIZES)} beside benchmark.titok"
        )


def make_titok(folder: str, config: TokenizerConfig) -> "nn.Module":
    """TiTok's model with new weights, at our size and with M + N tokens, as many as ours when all are kept."""
    model = _titok_class(folder)
    vq_model = TiTokOptions(
        vit_enc_model_size=config.size,
        vit_dec_model_size=config.size,
        vit_enc_patch_size=config.patch_size,
        vit_dec_patch_size=config.patch_size,
        num_latent_tokens=config.max_tokens,
        codebook_size=config.codebook_size,
        token_size=TOKEN_SIZE,
        use_l2_norm=True,
        commitment_cost=0.25,
        finetune_decoder=False,
        is_legacy=False,  # pixels, not the codes of another tokenizer
    )
    preprocessing = TiTokOptions(crop_size=config.image_size)
    made: nn.Module = model(
        TiTokOptions(model=TiTokOptions(vq_model=vq_model), dataset=TiTokOptions(preprocessing=preprocessing))
    )
    return made


def titok_loss(model: "nn.Module", pixels: "Tensor", uniforms: "Tensor") -> "Tensor":
    """TiTok's loss: mean squared error, and its quantizer's loss with weight 1, as in its configurations."""
    pictures, terms = model(pixels)
    loss: Tensor = (pictures.float() - pixels).square().mean() + terms["quantizer_loss"]
    return loss


def _titok_class(folder: str) -> Any:
    """TiTok's class, imported with stubs for the packages and the file named above."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if find_spec("omegaconf") is None:
        sys.modules.setdefault("omegaconf", _module("omegaconf", OmegaConf=SimpleNamespace(create=TiTokOptions)))
    if find_spec("accelerate") is None:
        operations = _module("accelerate.utils.operations", gather=lambda tensor: tensor)
        for name in ("accelerate", "accelerate.utils"):
            sys.modules.setdefault(name, _module(name, __path__=[]))
        sys.modules.setdefault("accelerate.utils.operations", operations)
    modules = _module("modeling.modules", __path__=[str(Path(folder) / "modeling" / "modules")])
    sys.modules.setdefault("modeling.modules", modules)
    with warnings.catch_warnings():  # torch.cuda.amp.autocast, an older name
        warnings.simplefilter("ignore", FutureWarning)
        from modeling.titok import TiTok  # type: ignore[import-not-found]
    return TiTok


def _module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made
