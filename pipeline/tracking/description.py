"""What a tracking server is told about a run beside its metrics. No environment, no credentials."""

from typing import Any

from pipeline.config import Config
from pipeline.run import Run
from pipeline.run import commit as code_version
from pipeline.tracking.address import masked


def parameters(config: Config) -> dict[str, str]:
    """The configuration as `section.key: value` texts, without credentials in addresses."""
    return {name: masked(str(value)) for name, value in _flattened(config.to_dict())}


def _flattened(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        pairs += _flattened(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return pairs


def standard_tags(run: Run) -> dict[str, str]:
    """Tags that every run carries, to filter and group by."""
    version = code_version()
    return {
        "stage": run.stage,
        "preset": run.config.preset,
        "global_tokens": str(run.config.tokenizer.global_tokens),
        "commit": version["commit"],
        "dirty": str(version["dirty"]).lower(),
        "run_folder": str(run.folder.absolute()),
    }
