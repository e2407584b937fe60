"""What can go wrong, and where in a model it went wrong.

NnxpError
├── ShapeError (ValueError)            an array's shape does not fit
├── DtypeMismatch (TypeError)          an array's type does not fit
├── DeviceMismatch (TypeError)         arrays that must meet are in different places
├── BackendUnavailable (RuntimeError)  what was asked for cannot run here
├── CheckpointError (ValueError)       a file is not a model that can be trusted
├── OptionError (ValueError)           an argument has a value that means nothing here
│   └── FrozenLayer (AttributeError)   a field of a layer cannot be assigned once it is made
├── ConversionError (ValueError)       another library's model has no counterpart here
├── RowsError (ValueError)             a file does not hold rows of numbers
├── SweepError (RuntimeError)          a sweep of many blocks did not end well; it can go on
├── IdError (IndexError)               an id names nothing in its table
├── NotDifferentiable (TypeError)     a formula has no gradient
├── TrainingError (ArithmeticError)   a loss is no number any more
├── UnsupportedFunction (AttributeError)  an array library of ours has no such function
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
    "FrozenLayer",
    "IdError",
    "NnxpError",
    "NotDifferentiable",
    "OptionError",
    "OutOfMemory",
    "RowsError",
    "ShapeError",
    "SweepError",
    "TrainingError",
    "UnsupportedFunction",
]


class NnxpError(Exception):
    """The root of every error that nnxp raises on purpose.

    `layer_path` is the path of the layer that it came from, if it came from one.
    """

    layer_path: str = ""

    def __str__(self) -> str:
        message = super().__str__()
        return f"{self.layer_path} {message}" if self.layer_path else message


def located(error: Exception, path: str) -> None:
    """Say in an error that it arose in the layer of this path, which may be below it already.

    An error of nnxp's own has the path before its message, any other one a note.
    """
    if not path:
        return
    if isinstance(error, NnxpError):
        error.layer_path = f"{path}.{error.layer_path}" if error.layer_path else path
        return
    with suppress(AttributeError):  # an error of someone's own that cannot take a note
        notes = getattr(error, "__notes__", [])
        below = next((n.removeprefix(_NOTE) for n in notes if n.startswith(_NOTE)), "")
        own = [n for n in notes if not n.startswith(_NOTE)]
        error.__notes__ = [*own, _NOTE + (f"{path}.{below}" if below else path)]


_NOTE = "raised in layer "


class ShapeError(NnxpError, ValueError):
    """An array's shape does not fit: the message says what was wanted and what came."""


class DtypeMismatch(NnxpError, TypeError):
    """An array's type does not fit: the message says what was wanted and how to convert."""


class DeviceMismatch(NnxpError, TypeError):
    """Arrays that must meet are in different places: the message names both and the fix."""


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


class FrozenLayer(OptionError, AttributeError):
    """A field of a layer cannot be assigned or deleted: a layer is fixed once it is made."""


class ConversionError(NnxpError, ValueError):
    """A model of another library has no counterpart in nnxp."""


class IdError(NnxpError, IndexError):
    """An id names nothing in its table; the message says which ids there are."""


class SweepError(NnxpError, RuntimeError):
    """A sweep of many blocks did not end well; the message says how, and `report` what was done.

    Run again, it does what is missing.
    """

    report: object = None


class NotDifferentiable(NnxpError, TypeError):
    """A formula has no gradient: the message names the layer and the function in it."""


class TrainingError(NnxpError, ArithmeticError):
    """Training cannot go on: the message says in which epoch and batch, and what to try."""


class UnsupportedFunction(NnxpError, AttributeError):
    """A function or method that `sim`, `bounded` or `traced` arrays do not have, by name."""


class OutOfMemory(NnxpError, MemoryError):
    """Not even one row fits into the memory that may be used."""
