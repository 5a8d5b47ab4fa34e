"""`generated.json`: what made a folder of generated pictures, how long their token sequences are, how fast it went.

The folder is one of shards too (`manifest.json`; split heldout, label = the class that was asked for). The generated
tokens lie in `tokens/part-NNNNN.parquet`, one file for each shard, rows in the order of the pictures:

    number: int64, label: int32, global_indices: list<int32> (M), codes: list<int32> (T), places: list<int32> (T)
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file, write_json
from pipeline.core.manifest import check_format, parse_values, read_described
from pipeline.core.ranges import Shard
from pipeline.data.shards import Manifest, read_manifest

FORMAT, VERSION = "tatok-generated", 1
NAME, WRITER = "generated.json", "jobs/generate.py"
INTEGERS = pa.list_(pa.field("element", pa.int32()))  # as Parquet names it
SCHEMA = pa.schema(
    {
        "number": pa.int64(),  # of the sample
        "label": pa.int32(),  # class that was asked for, -1 for none
        "global_indices": INTEGERS,
        "codes": INTEGERS,  # of the patch tokens
        "places": INTEGERS,  # their positions in raster order
    }
)


@dataclass(frozen=True)
class Generated:
    """A finished run of `jobs/generate.py`."""

    folder: Path
    manifest: Manifest  # of the pictures
    images: int
    classes: int  # that the generator knows
    generator_sha256: str
    tokenizer_sha256: str
    cut: str  # of the sequences that the generator learned
    seed: int
    batch_size: int
    sampling: dict[str, Any]  # as SamplingConfig
    tokens: dict[str, float]  # mean, std, p05, p50, p95 of the lengths
    speed: dict[str, float]  # images_per_second and more, as in summary.json; empty when the run made nothing anew
    files: tuple[Shard, ...]  # of tokens

    def to_dict(self) -> dict[str, Any]:
        """As in the file."""
        values = asdict(self)
        del values["folder"], values["manifest"]
        return {"format": FORMAT, "version": VERSION, **values, "pictures": self.manifest.fingerprint}

    def write(self) -> None:
        """Write `generated.json`, which marks the run as complete."""
        write_json(self.folder / NAME, self.to_dict())

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(images,) int64 tokens of each picture, M + T, and (images,) int32 labels.

        Raises:
            BadInput: a token file that is missing, changed or of another kind.
        """
        return token_lengths(self.folder, self.files)


def token_lengths(folder: Path, files: tuple[Shard, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and labels of the rows of token files; see `Generated.lengths`."""
    counts, labels = [], []
    for file in files:
        path = folder / file.file
        if not path.is_file() or sha256_file(path) != file.sha256:
            raise BadInput(f"token file {str(path)!r} is missing or changed; expected it as jobs/generate.py wrote it")
        table = pq.read_table(path, columns=["label", "global_indices", "codes"])
        sizes = [table.column(name).combine_chunks().value_lengths() for name in ("global_indices", "codes")]
        counts.append(sum(size.to_numpy(zero_copy_only=False).astype(np.int64) for size in sizes))
        labels.append(table.column("label").to_numpy())
    return np.concatenate(counts), np.concatenate(labels)


def read_generated(folder: str | Path) -> Generated:
    """What the run folder of `jobs/generate.py` holds.

    Raises:
        BadInput: it is none, the run has not ended, or a file is another program's, of another version or damaged.
    """
    what = f"{NAME} in {str(folder)!r}"
    values = read_described(folder, NAME, WRITER, "evaluate.generated")
    check_format(values, what, (FORMAT, VERSION), WRITER)
    manifest = read_manifest(folder)
    found = parse_values(Generated, {**values, "folder": Path(folder), "manifest": manifest}, what)
    if values.get("pictures") != manifest.fingerprint:
        raise BadInput(f"{what} is of other pictures than manifest.json; expected a folder that one run wrote")
    return found
