"""What is read as text: printed in a terminal, shown as it is in a notebook."""

from __future__ import annotations

from html import escape


class Printed:
    """A report whose `str()` is laid out in lines and columns."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"
