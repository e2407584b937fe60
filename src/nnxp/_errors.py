"""What can go wrong, and where in a model it went wrong.

NnxpError
├── ShapeError (ValueError)            an array's shape does not fit
├── DtypeMismatch (TypeError)          an array's type does not fit
├── DeviceMismatch (TypeError)         arrays that must meet are in different places
├── BackendUnavailable (RuntimeError)  what was asked for cannot run here
├── CheckpointError (ValueError)       a file is not a model that can be trusted
├── OptionError (ValueError)           an argument has a value that means nothing here
├── ConversionError (ValueError)       another library's model has no counterpart here
└── OutOfMemory (MemoryError)          not even one row fits
"""

from __future__ import annotations

from contextlib import suppress

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "ConversionError",
    "DeviceMismatch",
    "DtypeMismatch",
    "NnxpError",
    "OptionError",
    "OutOfMemory",
    "RowsError",
    "ShapeError",
]


class NnxpError(Exception):
    """The root of every error that nnxp raises on purpose.

    `layer_path` is the path of the layer that it came from, if it came from one.
    """

    layer_path: str = ""

    def __str__(self) -> str:
        message = super().__str__()
        return f"{self.layer_path} {message}" if self.layer_path else message


class ShapeError(NnxpError, ValueError):
    """An array's shape does not fit: the message says what was wanted and what came."""


class DtypeMismatch(NnxpError, TypeError):
    """An array's type does not fit: the message says what was wanted and how to convert."""


class DeviceMismatch(NnxpError, TypeError):
    """Arrays that must meet are in different places: the message names both and the mend."""


class BackendUnavailable(NnxpError, RuntimeError):
    """What was asked for cannot run here: `reason` says why, `hint` what to do about it."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason, hint)
        self.reason, self.hint = reason, hint

    def __str__(self) -> str:
        return f"{self.reason}. {self.hint}" if self.hint else self.reason


class CheckpointError(NnxpError, ValueError):
    """A file is truncated, mislabelled or hostile; nothing was loaded from it."""


class RowsError(NnxpError, ValueError):
    """A file does not hold rows of numbers, or not whole; the message says where it fails."""


class OptionError(NnxpError, ValueError):
    """An argument has a value that means nothing here: the message lists what does."""


class ConversionError(NnxpError, ValueError):
    """A model of another library has no counterpart in nnxp."""


class OutOfMemory(NnxpError, MemoryError):
    """Not even one row fits into the memory that may be used."""


def name_layer(error: Exception, name: str) -> None:
    """Put `name` in front of the path of the layer that the error came from.

    An error from deep inside a model passes here at every level, so it arrives with the whole
    path: `layers.3.inner.layers.0`.
    """
    inner = getattr(error, "layer_path", "")
    with suppress(AttributeError):  # an error of someone's own that cannot take it goes on bare
        error.layer_path = f"{name}.{inner}" if inner else name  # type: ignore[attr-defined]
