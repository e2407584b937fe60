"""What is read as text: printed in a terminal, shown as it is in a notebook."""

from __future__ import annotations

from collections.abc import Sequence


class Printed:
    """A report whose `str()` is laid out in lines and columns."""

    def _repr_html_(self) -> str:
        from html import escape  # brings a table of all entities: not for every import

        return f"<pre>{escape(str(self))}</pre>"


def aligned(table: Sequence[Sequence[str]], right: int | None = None) -> list[str]:
    """The rows of a table as lines; columns from number `right` on are flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = len(widths) if right is None else right
    lines = []
    for row in table:
        cells = enumerate(zip(row, widths, strict=True))
        padded = (text.ljust(n) if i < right else text.rjust(n) for i, (text, n) in cells)
        lines.append("  ".join(padded).rstrip())
    return lines


def beside(label: str, text: str, indent: int, joint: str = "", width: int = 80) -> str:
    """The text beside its label, its further lines below one another; `joint` ends all but one."""
    import textwrap

    room = width - indent - len(joint)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return label.ljust(indent) + f"{joint}\n{' ' * indent}".join(lines)
