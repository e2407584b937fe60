"""What a model calls the columns that it takes, and the classes that it answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nnxp._arrays import Shape
from nnxp._errors import OptionError, ShapeError
from nnxp.layers._layer import Layer


def column_names(columns: Any, first: Layer) -> tuple[str, ...]:
    """The names of the columns that a model takes; they fit its first layer.

    Raises OptionError for what are no names, ShapeError if they are too many or too few.
    """
    names = _listed("columns", columns)
    for name in names:
        if type(name) is not str:
            raise OptionError(f"columns are names, but one is {name!r:.60}")
    if not first._takes((1, len(names))):
        raise ShapeError(f"{len(names)} names of columns do not fit {first!r:.80}")
    return names


def class_names(classes: Any, row: Shape | None) -> tuple[str | int | float | bool, ...]:
    """The classes that a model answers, one for each output; two may share a single one.

    `row` is the shape of what the model answers for a row, None if nobody knows. Raises OptionError
    for what are no classes, ShapeError if they are too many or too few.
    """
    names = _listed("classes", classes)
    if len({type(name) for name in names}) > 1 or type(names[0]) not in (str, int, float, bool):
        raise OptionError(
            f"classes are all str, int, float or bool, not {', '.join(map(repr, names)):.100}"
        )
    if len(set(names)) < len(names):
        raise OptionError(
            f"classes differ from each other, unlike {', '.join(map(repr, names)):.100}"
        )
    if row is not None and row != (len(names),) and not (len(names) == 2 and row in ((), (1,))):
        answers = str(("rows", *row)).replace("'", "")
        raise ShapeError(f"{len(names)} classes do not fit a model that answers {answers}")
    return names


def _listed(what: str, names: Any) -> tuple[Any, ...]:
    if isinstance(names, str | bytes) or not isinstance(names, Iterable):
        raise OptionError(f"{what} are several names, not {names!r:.60}")
    listed = tuple(name.item() if isinstance(name, np.generic) else name for name in names)
    if not listed:
        raise OptionError(f"{what} are at least one name, or None if nobody knows them")
    return listed
