"""What was measured on some of the images: sums that merge, and pass between processes as bytes."""

import io
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import ImageQuality
from tatok_model.metrics.scores import CodeUsage, InceptionScore


class Totals:
    """Named sums."""

    def __init__(self, **values: float) -> None:
        self.values = values

    def merge(self, other: "Totals") -> None:
        """Add another part's sums."""
        for name, value in other.values.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: one () per name."""
        return {name: np.array(value) for name, value in self.values.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(**{name: float(value) for name, value in arrays.items()})


class Pictures:
    """Reconstructions that will be shown: (B, H, W, 3) uint8, in the order of their images."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def merge(self, other: "Pictures") -> None:
        """Append a later part's pictures."""
        self.images = np.concatenate([self.images, other.images])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: images (B, H, W, 3)."""
        return {"images": self.images}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(arrays["images"])


class PerImage:
    """Named values of each image, in the order of the images: (B, ...) arrays of equal length."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def merge(self, later: "PerImage") -> None:
        """Append a later part's values."""
        pairs = {name: (self.arrays.get(name), array) for name, array in later.arrays.items()}
        self.arrays = {name: new if old is None else np.concatenate([old, new]) for name, (old, new) in pairs.items()}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state: one array per name."""
        return self.arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `to_arrays`."""
        return cls(**arrays)


KINDS: dict[str, Any] = {
    "features": FeatureStatistics,  # of reconstructions
    "original_features": FeatureStatistics,  # only while there are no reference statistics
    "score": InceptionScore,
    "original_score": InceptionScore,
    "quality": ImageQuality,
    "codes_global": CodeUsage,
    "codes_patch": CodeUsage,
    "totals": Totals,
    "pictures": Pictures,
    "lengths": PerImage,  # tokens, patch_tokens, bits_fixed, bits_coded, squared_error; at one water level rate_bits;
    # where positions are replayed replay_state, fallback_bits
    "images": PerImage,  # png_bytes, total_score: what a picture holds, whatever is kept of it
    "shown": PerImage,  # pictures, kept_mask: of the pictures that are shown
}


def kind_of(name: str) -> Any:
    """The class of a state: names may carry a point of the curve before a dot, and an extractor after an @."""
    return KINDS[name.rsplit(".", maxsplit=1)[-1].split("@", maxsplit=1)[0]]


class Measurements:
    """One state per name, see `kind_of`; names that were not measured are missing."""

    def __init__(self, **states: Any) -> None:
        self.states = states

    def __getitem__(self, name: str) -> Any:
        return self.states[name]

    def __contains__(self, name: str) -> bool:
        return name in self.states

    @property
    def images(self) -> int:
        """How many images were measured."""
        return int(self["features"].n)

    def merge(self, later: "Measurements") -> None:
        """Add what was measured on the images after these; sums of floats depend on their order.

        Raises:
            ValueError: the two did not measure the same things.
        """
        if self.states.keys() != later.states.keys():
            raise ValueError(f"cannot merge {sorted(later.states)} into {sorted(self.states)}")
        for name, state in later.states.items():
            self[name].merge(state)

    def to_bytes(self) -> bytes:
        """As an uncompressed npz with one array per `name/part`."""
        arrays = {
            f"{name}/{part}": array for name, state in self.states.items() for part, array in state.to_arrays().items()
        }
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`."""
        parts: dict[str, dict[str, np.ndarray]] = {}
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for key in arrays.files:
                name, part = key.split("/")
                parts.setdefault(name, {})[part] = arrays[key]
        return cls(**{name: kind_of(name).from_arrays(arrays) for name, arrays in parts.items()})
