"""The part of `jobs/evaluate.py` behind `evaluate.generated`: pictures that a generator made, against real ones.

It has the functions of a stage; `evaluate.py` hands over to it.
"""

from typing import TYPE_CHECKING

from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.files import write_atomically
from pipeline.core.inputs import with_shards
from pipeline.core.run import Run
from pipeline.data.checks import check_global_counts, check_pictures
from pipeline.data.shards import read_manifest
from pipeline.generator.generated_files import Generated, read_generated
from pipeline.tokens.token_manifest import check_stream, read_token_manifest
from pipeline.tracking import Tracker

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.evaluation.generated import Comparison


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures. `stage.check` has looked at the rest.

    Raises:
        BadInput: a folder that `jobs/generate.py` did not write or did not finish, pictures of another size than the
            real ones or of other classes, tokens that another tokenizer made, a cut that they cannot have.
    """
    generated = read_generated(config.evaluate.generated)
    check_pictures(config)
    check_global_counts(config)
    size = generated.manifest.image_size
    if size != config.data.image_size:
        raise BadInput(
            f"evaluate.generated {config.evaluate.generated!r} has pictures of {size} pixels; "
            f"expected data.image_size, {config.data.image_size}"
        )
    _check_tokens(config, generated)
    if config.data.shards:
        _check_classes(config, generated)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-evaluate-generated"


def run(run: Run) -> None:
    """Measure, and leave a report and pictures in the run folder.

    Raises:
        BadInput: as `check`, and too few pictures.
        Stopped: the run was asked to stop; features that were computed are kept.
    """
    config = run.config = with_shards(run.config)
    generated = read_generated(config.evaluate.generated)
    _check_classes(config, generated)
    shards = read_manifest(config.data.shards)
    run.inputs["shards"] = {"path": config.data.shards, "sha256": shards.fingerprint}
    run.inputs["generated"] = {"path": config.evaluate.generated, "sha256": generated.manifest.fingerprint}

    from pipeline.evaluation.generated import Comparison

    comparison = Comparison.set_up(run, generated)
    facts = comparison.facts()
    with Tracker.start(run, facts) as tracker:
        run.results = comparison.measure()
        run.rewind_metrics(-1)  # a resumed run measures anew
        run.log(run.results, step=0)
        for name, path in comparison.draw().items():
            run.outputs[name] = str(path)
            tracker.picture(path, name, 0)
        _report(run, comparison, facts, tracker)


def _report(run: Run, comparison: "Comparison", facts: dict[str, str], tracker: Tracker) -> None:
    """Show the table and keep it as `report.md`."""
    from pipeline.core.console import markdown, terminal_table
    from pipeline.evaluation.generated import rows, warnings

    title = f"{run.config.preset}: {comparison.generated.images} generated images"
    lines = list(rows(run.results, comparison.extractor, comparison.generated))
    told = warnings(run.results, comparison.reference, comparison.extractor, comparison.compared_lengths)
    path = run.folder / "report.md"
    write_atomically(path, markdown(title, lines, told, facts).encode())
    run.outputs["report"] = str(path)
    tracker.artifact(path)
    say(terminal_table(title, lines, told))


def _check_tokens(config: Config, generated: Generated) -> None:
    """Lengths are compared with those of the tokenizer whose tokens the generator writes."""
    if not config.tokens.path:
        return
    stream = read_token_manifest(config.tokens.path).stream
    check_stream(config, stream)
    if stream.tokenizer_sha256 != generated.tokenizer_sha256:
        raise BadInput(
            f"tokens.path {config.tokens.path!r} is of a tokenizer with sha256 {stream.tokenizer_sha256[:12]}...; "
            f"expected that of evaluate.generated {config.evaluate.generated!r}, {generated.tokenizer_sha256[:12]}..."
        )
    cut = config.filter.cut(bool(stream.score))
    if generated.cut not in ("", cut):
        raise BadInput(
            f"filter cuts tokens.path by {cut}; expected {generated.cut}, whose lengths the generator of "
            f"evaluate.generated {config.evaluate.generated!r} learned"
        )


def _check_classes(config: Config, generated: Generated) -> None:
    ours, found = read_manifest(config.data.shards).classes, generated.manifest.classes
    if found and len(ours) != len(found):
        raise BadInput(
            f"evaluate.generated {config.evaluate.generated!r} has {len(found)} classes; "
            f"expected {len(ours)}, those of data.shards"
        )
