"""What is read as text: printed in a terminal, shown as it is in a notebook."""

from __future__ import annotations


class Printed:
    """A report whose `str()` is laid out in lines and columns."""

    def _repr_html_(self) -> str:
        from html import escape  # brings a table of all entities: not for every import

        return f"<pre>{escape(str(self))}</pre>"
