"""What a model is made of and what it costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from nnxp._arrays import Shape
from nnxp.layers._layer import Layer
from nnxp.layers._trace import trace_shapes


@dataclass(frozen=True)
class LayerSummary:
    """One layer: its name, what it is, the shape it makes, and what it costs."""

    name: str
    layer: str
    output_shape: Shape
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Summary:
    """A model for one shape of x; `multiply_adds` are for all its rows, `row_bytes` for one row."""

    layers: tuple[LayerSummary, ...]
    input_shape: Shape
    output_shape: Shape
    dtype: str
    place: str
    parameters: int
    parameter_bytes: int
    multiply_adds: int
    row_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("", "layer", "output", "parameters", "multiply-adds")
        lines = [
            (
                each.name,
                each.layer,
                str(each.output_shape),
                f"{each.parameters:,}",
                f"{each.multiply_adds:,}",
            )
            for each in self.layers
        ]
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(5)]
        table = [
            "  ".join(
                cell.rjust(width) if i > 2 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [header, *lines]
        ]
        return "\n".join(
            [
                *table,
                f"{self.input_shape} -> {self.output_shape}, {self.dtype} on {self.place}",
                f"{self.parameters:,} parameters ({self.parameter_bytes:,} bytes), "
                f"{self.multiply_adds:,} multiply-adds, "
                f"{self.row_bytes:,} bytes a row at the widest point",
            ]
        )


def summarize(model: Layer, shape: Shape) -> Summary:
    """The summary of a model for an x of this shape; ShapeError if such an x does not fit."""
    output = model.output_shape(shape)
    leaves = [step for step in trace_shapes(model, shape) if _is_leaf(step.layer)]
    layers = tuple(
        LayerSummary(
            step.name,
            repr(step.layer),
            step.output,
            step.layer.parameter_count,
            step.layer.multiply_adds(step.input),
        )
        for step in leaves
    )
    values = model.parameters().values()
    return Summary(
        layers=layers,
        input_shape=shape,
        output_shape=output,
        dtype=str(model.dtype or "any float"),
        place=model.place or "anywhere",
        parameters=model.parameter_count,
        parameter_bytes=sum(value.nbytes for value in values),
        multiply_adds=sum(each.multiply_adds for each in layers),
        row_bytes=costs(model, shape[1:])[0],
    )


def costs(model: Layer, row: Shape) -> tuple[int, int, int]:
    """(bytes a row, bytes besides, work a row) for rows of this shape, at the widest point.

    A layer holds its input, its output and its temporaries; a layer with children holds its own
    input meanwhile. 16-bit types are computed in float32 beside their own copy, and the parameters
    of one layer with them: these are the bytes besides. A byte that is passed over takes about as
    long as a multiply-add in a product, so both are work.
    """
    steps = {step.name: step for step in trace_shapes(model, (1, *row))}
    held = {name: prod(step.input) for name, step in steps.items()}
    widest = 0
    for name, step in steps.items():
        parts = name.split(".")
        around = sum(held.get(".".join(parts[:i]), 0) for i in range(1, len(parts)))
        arrays = 1 + step.layer.temporaries
        widest = max(widest, around + prod(step.input) + arrays * prod(step.output))
    narrow = model.dtype is not None and model.dtype.itemsize == 2
    itemsize = 2 + 4 if narrow else model.dtype.itemsize if model.dtype else 8
    leaves = [step for step in steps.values() if _is_leaf(step.layer)]
    largest = max((step.layer.parameter_count for step in leaves), default=0)
    bytes_ = itemsize * (prod(row) + widest)
    work = sum(step.layer.multiply_adds(step.input) for step in leaves)
    return bytes_, 4 * largest if narrow else 0, bytes_ + work


def _is_leaf(layer: Layer) -> bool:
    return not any(True for _ in layer.children())
