"""From what a source says of a picture's class to a class index, or one sentence.

A *raw label* is a class index (-1: none), a class name, or None. The index of a name is known once all of a source was
looked at: names are numbered in their order, numbers among them as numbers. A text that is a number and no class name
is an index.
"""

import re
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from pipeline.core.errors import BadInput
from pipeline.core.files import printable

RawLabel = int | str | None
MAX_CLASSES = 100_000  # a larger "class index" is no class index


def raw_label(value: Any, where: str, key: str = "label_column") -> RawLabel:
    """The label that a column, a `.cls` or a `.json` member holds.

    Numbers and booleans that are whole, texts, also as bytes, and lists of one of these; null, NaN, an empty text and
    an empty list are none.

    Args:
        value: as it was read.
        where: what it was read from, for the message.
        key: of `data`, that names it.

    Raises:
        BadInput: a fraction, a number that is no class index, several values, a date.
    """
    one = value
    while isinstance(one, list) and len(one) <= 1:
        one = one[0] if one else None
    if isinstance(one, bytes):
        one = one.decode(errors="backslashreplace")
    if one is None or one == "" or one != one:  # NaN, which is what pandas makes of a number that is missing
        return None
    if isinstance(one, str):
        return -1 if index_of(one) == -1 else printable(one)
    if isinstance(one, bool | int | float | Decimal) and one % 1 == 0 and -1 <= one < MAX_CLASSES:
        return int(one)
    raise BadInput(
        f"{where} holds {value!r:.80}; expected class indices below {MAX_CLASSES} (-1: none) or class names, one a "
        f"picture, or data.{key}= to go without"
    )


def index_of(text: str) -> int | None:
    """The class index that a text is, also as pandas writes it ("3.0"), at least -1; None for other texts."""
    number = int(text.partition(".")[0]) if re.fullmatch(r"\s*(-1|\+?\d{1,9})(\.0*)?\s*", text, re.ASCII) else None
    return number if number is not None and number < MAX_CLASSES else None


def class_names(indexed: Iterable[tuple[int, str]], names: Iterable[str]) -> list[str]:
    """The name of every class index; names without indices are numbered in their order.

    Args:
        indexed: class indices with their names ("" unknown), of all sources.
        names: class names without an index, of all sources.

    Raises:
        BadInput: an index has two names, or a name two indices, or none although other classes have one.
    """
    known: dict[int, str] = {}
    for label, name in indexed:
        if name and known.get(label, "") not in ("", name):
            raise BadInput(
                f"class {label} is {known[label]!r} in data.source and {name!r} in data.heldout_source; "
                "expected one name"
            )
        known[label] = known.get(label) or name
    texts = sorted(set(names))
    if not known:
        numbers = {text: int(text) if text.isdecimal() and text.isascii() else None for text in texts}
        return sorted(texts, key=lambda text: (numbers[text] is None, numbers[text] or 0, text))
    table = [known.get(label) or str(label) for label in range(max(known) + 1)]
    times = Counter(table)
    for text in texts:
        index = index_of(text)
        if times[text] > 1:
            raise BadInput(f"class {text!r} has {times[text]} indices; expected one, or indices for all pictures")
        if not times[text] and (index is None or index >= len(table)):
            raise BadInput(f"class {text!r} has no index, but others have; expected indices for all or for none")
    return table


def label_of(raw: RawLabel, indices: dict[str, int]) -> int:
    """Class index of a raw label; -1 for none."""
    if isinstance(raw, str):
        index = indices.get(raw, index_of(raw))
        if index is None:
            raise BadInput(f"class {raw!r} was not there when the source was looked at; expected the same files")
        return index
    return -1 if raw is None else raw
