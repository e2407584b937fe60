"""What passes through each layer of a model: the arrays of a call, or only their shapes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nnxp._arrays import Array, Shape
from nnxp._errors import ShapeError
from nnxp.layers._layer import Layer


@dataclass(frozen=True)
class Step:
    """One layer at work: its name in the model, what went in and what came out."""

    name: str
    layer: Layer
    input: Any
    output: Any


class _Tap(Layer):
    """The layer itself, and a note of the arrays that pass through it."""

    layer: Layer
    name: str
    note: Callable[[Any, Any], None]

    def __call__(self, x: Array) -> Array:
        y = self.layer(x)
        self.note(x, y)
        return y

    def output_shape(self, shape: Shape) -> Shape:
        return self.layer.output_shape(shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # a parent may look at its child's fields


class _ShapeTap(_Tap):
    """The layer itself, and a note of the shapes that pass through it."""

    def output_shape(self, shape: Shape) -> Shape:
        result = self.layer.output_shape(shape)
        self.note(shape, result)
        return result


def _tapped(model: Layer, tap: type[_Tap], steps: list[Step]) -> Layer:
    originals = dict(walk(model))

    def tapped(path: str, layer: Layer) -> Layer:
        def note(given: Any, made: Any) -> None:
            steps.append(Step(path, originals[path], given, made))

        return tap._made(layer=layer, name=path, note=note)

    return model._replaced(layer=tapped)


def walk(model: Layer, prefix: str = "") -> list[tuple[str, Layer]]:
    """Every layer below the model with its path, children before their parents."""
    found = []
    for name, child in model.children():
        found += walk(child, f"{prefix}{name}.")
        found.append((prefix + name, child))
    return found


def trace(model: Layer, x: Array) -> list[Step]:
    """The steps of model(x), in order; the last is the model itself, named "output"."""
    steps: list[Step] = []
    y = _tapped(model, _Tap, steps)(x)
    return [*steps, Step("output", model, x, y)]


def trace_shapes(model: Layer, shape: Shape) -> list[Step]:
    """The same with shapes in place of arrays: nothing is computed.

    A child that its parent's `output_shape` does not ask is taken to get what its parent gets.
    """
    steps: list[Step] = []
    y = _tapped(model, _ShapeTap, steps).output_shape(shape)
    seen = {step.name: step for step in [*steps, Step("output", model, shape, y)]}
    for name, layer in reversed(walk(model)):  # parents first
        if name not in seen:
            parent = name.rpartition(".")[0]
            while parent and parent not in seen:
                parent = parent.rpartition(".")[0]
            given = seen[parent or "output"].input
            with suppress(ShapeError):
                seen[name] = Step(name, layer, given, layer.output_shape(given))
    return list(seen.values())
