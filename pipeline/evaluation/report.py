"""What was found, for people: named numbers with notes, as a table in the terminal and as Markdown."""

from dataclasses import dataclass

SMALL = 2048  # images below which a Frechet distance says little


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str  # as in summary.json
    value: float
    note: str


def terminal_table(title: str, rows: list[Row], warnings: list[str]) -> str:
    """Aligned columns, then one line per warning."""
    names, values = [row.name for row in rows], [format_value(row.value) for row in rows]
    first, second = max(map(len, names)), max(map(len, values))
    lines = [title, "-" * len(title)]
    lines += [
        f"{name:<{first}}  {value:>{second}}  {row.note}".rstrip()
        for name, value, row in zip(names, values, rows, strict=True)
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in warnings)])


def columns(table: list[list[str]]) -> str:
    """A header and lines as aligned columns, the first to the left and numbers to the right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join([f"{line[0]:<{widths[0]}}", *(f"{text:>{w}}" for text, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    )


def markdown(
    title: str, rows: list[Row], warnings: list[str], facts: dict[str, str], curve: list[list[str]] | None = None
) -> str:
    """The same as a page: table, warnings, the table of the curve, and the facts that the numbers depend on."""
    lines = [f"# {title}", "", "| metric | value | note |", "|---|---:|---|"]
    lines += [f"| {row.name} | {format_value(row.value)} | {row.note} |" for row in rows]
    lines += [""] + [f"- **warning:** {text}" for text in warnings]
    if curve:
        header, *points = (f"| {' | '.join(line)} |" for line in curve)
        lines += ["", header, "|---|" + "---:|" * (len(curve[0]) - 1), *points]
    lines += ["", "| fact | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def format_value(value: float) -> str:
    """Four significant digits, whole numbers whole."""
    if value == round(value) and abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
