"""Class indices and names: which index a label has, over all sources."""

import pytest

from pipeline.core.errors import BadInput
from pipeline.data.labels import class_names, index_of, label_of


@pytest.mark.parametrize(
    ("text", "index"),
    [("0", 0), ("011", 11), (" 3\n", 3), ("3.0", 3), ("7.", 7), ("+2", 2), ("-1", -1), ("99999", 99999),
     ("100000", None), ("-2", None), ("1e3", None), ("0.5", None), ("3a", None), ("", None), ("\u0663", None),
     ("nan", None)],
)  # fmt: skip
def test_a_whole_number_below_the_limit_is_an_index(text: str, index: int | None) -> None:
    assert index_of(text) == index


def test_names_are_numbered_in_order_and_numbers_among_them_as_numbers() -> None:
    assert class_names([], {"dog", "cat", "ant"}) == ["ant", "cat", "dog"]
    assert class_names([], map(str, range(12))) == [str(number) for number in range(12)]
    assert class_names([], {"10", "9", "unknown", "010"}) == ["9", "010", "10", "unknown"]
    assert class_names([], []) == []


def test_classes_of_both_sources_are_one_table() -> None:
    assert class_names([(2, "dog"), (0, ""), (0, "cat")], {"dog"}) == ["cat", "1", "dog"]
    assert class_names([(11, "")], {"2", "10"}) == [str(number) for number in range(12)]
    with pytest.raises(BadInput, match="class 1 is 'cat' in data.source and 'dog' in data.heldout_source"):
        class_names([(1, "cat"), (1, "dog")], [])
    with pytest.raises(BadInput, match="class 'cat' has 2 indices; expected one"):
        class_names([(1, "cat"), (3, "cat")], ["cat"])
    for name in ("ant", "2", "100000"):
        with pytest.raises(BadInput, match=f"class '{name}' has no index, but others have"):
            class_names([(1, "cat")], {name})


def test_a_text_is_the_class_of_this_name_else_its_number() -> None:
    table = class_names([(0, ""), (1, "cat"), (9, "dog")], {"dog", "9"})
    indices = {name: index for index, name in enumerate(table)}
    labels = {"dog": 9, "9": 9, "1": 1, "3.0": 3, 4: 4, -1: -1, None: -1}
    assert {raw: label_of(raw, indices) for raw in labels} == labels
    with pytest.raises(BadInput, match="class 'ant' was not there when the source was looked at"):
        label_of("ant", indices)
