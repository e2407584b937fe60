"""What a model is made of and what it costs, read off its program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nnxp._arrays import Shape
from nnxp._printed import Printed, aligned
from nnxp.program.program import multiply_adds, sized
from nnxp.program.recording import costs
from nnxp.program.traced import ROWS


@dataclass(frozen=True)
class LayerSummary:
    """One layer: its name, what it is, the shape it makes, and what it costs."""

    name: str
    layer: str
    output_shape: Shape
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Summary(Printed):
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
                layer.name,
                layer.layer,
                str(layer.output_shape),
                f"{layer.parameters:,}",
                f"{layer.multiply_adds:,}",
            )
            for layer in self.layers
        ]
        return "\n".join(
            [
                *aligned([header, *lines], right=3),
                f"{self.input_shape} -> {self.output_shape}, {self.dtype} on {self.place}",
                f"{self.parameters:,} parameters ({self.parameter_bytes:,} bytes), "
                f"{self.multiply_adds:,} multiply-adds",
                f"{self.row_bytes:,} bytes a row at the widest point",
            ]
        )


def summarize(model: Any, shapes: Sequence[Any]) -> Summary:
    """The summary of a layer for inputs of these shapes; ShapeError if such inputs do not fit."""
    output = model.output_shape(*shapes)
    pairs = zip(shapes, model.input_dtypes(len(shapes)), strict=True)
    program = model.program(*(None if shape is None else (shape, dtype) for shape, dtype in pairs))
    rows = shapes[0][0]
    work: dict[str, int] = {}
    for step in program.steps:
        work[step.path] = work.get(step.path, 0) + multiply_adds(step)
    of = {**dict(model.walk()), "": model}
    layers = tuple(
        LayerSummary(
            call.path or "output",
            repr(of[call.path]),
            sized(call.outputs[0].shape, rows),
            of[call.path].parameter_count,
            work.get(call.path, 0) * rows // ROWS,
        )
        for call in program.leaves
    )
    values = model.parameters().values()
    return Summary(
        layers=layers,
        input_shape=shapes[0] if len(shapes) == 1 else tuple(shapes),
        output_shape=output,
        dtype=str(model.dtype or "any float"),
        place=model.place or "anywhere",
        parameters=model.parameter_count,
        parameter_bytes=sum(value.nbytes for value in values),
        multiply_adds=sum(work.values()) * rows // ROWS,
        row_bytes=costs(program).row_bytes,
    )
