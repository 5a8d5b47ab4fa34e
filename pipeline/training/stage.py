"""The stage behind `jobs/train.py`: shards in, a tokenizer checkpoint out."""

import dataclasses

from pipeline.checkpoints import check_architecture, find, is_hub_id
from pipeline.checks import check_files, check_pictures
from pipeline.cluster import check_cpus
from pipeline.config import Config
from pipeline.data.manifest import read_manifest
from pipeline.errors import BadInput
from pipeline.job import run_nested
from pipeline.paths import sha256_file
from pipeline.progress import say
from pipeline.run import Run
from pipeline.tracking import Tracker, check_tracking
from pipeline.training.drive import train_and_export


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: no source and no shards, shards of another image size, a checkpoint of another architecture, weights
            that do not exist, more workers than CPUs, a tracking address of unknown form.
    """
    check_cpus("train.num_workers", config.train.num_workers, config.train.cpus_per_worker)
    check_tracking(config)
    check_architecture(config)
    check_files(config, "losses.perceptual_backbone", "losses.perceptual_heads")
    check_pictures(config)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-train"


def run(run: Run) -> None:
    """Train, and leave the averaged model in `checkpoint/`."""
    run.config = with_shards(run.config)
    manifest = read_manifest(run.config.data.shards)
    run.inputs["shards"] = {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    if run.config.tokenizer.checkpoint:
        run.inputs["tokenizer"] = {"path": run.config.tokenizer.checkpoint, "sha256": _sha256(run.config)}
    if manifest.splits["train"].rows == 0 or manifest.splits["heldout"].rows == 0:
        rows = {name: split.rows for name, split in manifest.splits.items()}
        raise BadInput(f"shards {run.config.data.shards!r} hold {rows} pictures; expected some in both splits")
    if hides_nothing(run.config):
        say("kept_sets.all is 0: kept_sets.hide_globals has no effect, the entropy model always sees the global tokens")
    with Tracker.start(run, {"data_fingerprint": manifest.fingerprint}) as tracker:
        train_and_export(run, tracker, "train", "pipeline.training.worker", "validation/reconstructions")
        say(f"tokenizer in {run.outputs['checkpoint']}")


def hides_nothing(config: Config) -> bool:
    """Whether global tokens are to be hidden from the entropy model in a share of samples of which there are none."""
    tokenizer, kept_sets = config.tokenizer, config.kept_sets
    sees = tokenizer.has_entropy_model and tokenizer.global_tokens and tokenizer.entropy_globals
    return bool(sees and kept_sets.hide_globals and not kept_sets.all)


def with_shards(config: Config) -> Config:
    """The configuration with `data.shards`; makes them from `data.source` when it names none, and says so."""
    if config.data.shards:
        return config
    say("data.shards is empty: preprocessing data.source first")
    made = run_nested("preprocess", "pipeline.data.preprocess", config)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, shards=str(made.folder)))


def _sha256(config: Config) -> str:
    """Of the weights that training starts from; '' for those of the hub, which are not here yet."""
    path = config.tokenizer.checkpoint
    return "" if is_hub_id(path) else sha256_file(find(path) / "model.safetensors")
