"""The label of each row: the class of its largest output."""

from __future__ import annotations

import numpy as np

from nnxp import kernels
from nnxp._arrays import HostArray, Shape
from nnxp._errors import OptionError, RowsError
from nnxp.layers._layer import Layer


class Labels:
    """What makes labels of a model's outputs, for x of this shape: `labels(y)`.

    Of several outputs the largest counts; a single one stands for the second class above 1/2, if a
    sigmoid makes it, and above 0, if a product or tanh does.

    Raises OptionError for a model that knows no classes, or has other outputs.
    """

    def __init__(self, model: Layer, shape: Shape) -> None:
        classes = getattr(model, "classes", None)
        if not classes:
            raise OptionError(
                "the model knows no classes: nnxp.Sequential(model, classes=[...]) names them, and "
                "nnxp.from_sklearn keeps those of a classifier"
            )
        row = model.output_shape(shape)[1:]
        if row not in ((len(classes),), (1,), ()):
            answers = ", ".join(map(str, ("rows", *row)))
            raise OptionError(
                f"labels are for outputs (rows, {len(classes)}), but it answers ({answers})"
            )
        self.classes: HostArray = np.array(classes)
        self.single = row in ((1,), ()) and len(classes) == 2
        self.above = _threshold(model, shape) if self.single else 0.0
        self.dtype = self.classes.dtype
        self._rows = 0

    def __call__(self, y: HostArray) -> HostArray:
        """The labels of the next rows.

        Raises RowsError for a row whose outputs are NaN: it has no label.
        """
        y = y.reshape(len(y), -1)
        unknown = np.isnan(y).any(axis=1)
        if unknown.any():
            row = self._rows + int(unknown.argmax())
            raise RowsError(f"row {row} (from 0) has no label: the model answers NaN for it")
        self._rows += len(y)
        indices = (y[:, 0] > self.above).astype(int) if self.single else y.argmax(axis=1)
        labels: HostArray = self.classes[indices]
        return labels


def _threshold(model: Layer, shape: Shape) -> float:
    """Above what a single output stands for the second class: told from the step that makes it."""
    step = model.program(shape).outputs[0].step
    while step is not None and step.name in ("getitem", "reshape", "squeeze"):
        step = step.inputs[0].step
    name = "" if step is None else step.name
    if step is not None and name == "linear":
        name = step.options.get("activation", kernels.identity).__name__
    if name in ("sigmoid", "hard_sigmoid"):
        return 0.5
    if name in ("identity", "matmul", "add", "tanh"):
        return 0.0
    raise OptionError(
        f"of a single output that {name or 'nothing'} makes nobody can tell where the second class "
        "begins: end the model with a sigmoid, or with one output for each class"
    )
