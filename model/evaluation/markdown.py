"""Tables in Markdown, for every page that is generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(headers: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table without a final line break; cells are written as ``str`` has them, None as an empty cell.

    Raises:
        ValueError: a row has more or fewer cells than there are headers.
    """
    lines = [_line(headers), "|---" * len(headers) + "|"]
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"{len(row)} cells under {len(headers)} headers: {row}")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"
