"""Weights that torch wrote, as a state dict in a safetensors file, into a model of ours, by names.

A field that holds an array is known by torch's name for it, and turned from torch's form into
ours: a matrix is transposed, gates are put in order, one matrix of attention is three here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nnxp._arrays import HostArray, float_dtype, is_array
from nnxp._errors import CheckpointError, ConversionError
from nnxp.backend import asnumpy
from nnxp.io._atomic import path_of
from nnxp.io.checkpoint import opened
from nnxp.layers._layer import Layer, check_model
from nnxp.layers.conv import ConvTranspose, window_of_conv, window_of_conv_transpose

Turn = Callable[..., HostArray]


class Source(NamedTuple):
    """Where a parameter comes from: torch's names for it, and what turns their arrays into ours."""

    names: tuple[str, ...]
    turn: Turn


def load_state(model: Layer, path: str | os.PathLike[str], *, partial: bool = False) -> Layer:
    """The model with the weights of a state dict that torch wrote, taken by their names.

        safetensors.torch.save_file(module.state_dict(), "state.safetensors")   # where torch is
        net = nnxp.load_state(net, "state.safetensors")                         # here, without it

    A layer in a field has the name of the field, as a module in an attribute has in torch. Of a
    Sequential the layers that have parameters are those of torch's nn.Sequential, in their order,
    whatever stands between them. Weights are turned into the form that they have here, and have
    the types of the model's own. `num_batches_tracked` is not wanted by anybody.

    Args:
        model: a layer of the same make as the module: its fields are called as the module's
            attributes are.
        path: of a file that safetensors.torch.save_file wrote.
        partial: take what fits, leave other parameters as they are, and warn of all that did not
            fit, instead of raising.

    Returns:
        A model like this one, in host memory.

    Raises:
        ConversionError: with all parameters that the file has not, all tensors that the model has
            no place for, and all whose shapes differ.
        CheckpointError: the file is no safetensors file, or one that nnxp.save wrote.
        OSError: such as FileNotFoundError, the file cannot be read.
    """
    check_model(model, "load_state")
    tensors = _tensors(path_of(path))
    own = {name: asnumpy(value) for name, value in model.parameters().items()}
    sources = dict(_sources(model, "", "", set(tensors)))
    parameters, problems = dict(own), []
    for name, value in own.items():
        source = sources[name]
        absent = [tensor for tensor in source.names if tensor not in tensors]
        if absent:
            problems.append(f"{name} is not there, as {' and '.join(absent)}")
            continue
        arrays = [tensors[tensor] for tensor in source.names]
        shapes = " and ".join(f"{tensor} {tensors[tensor].shape}" for tensor in source.names)
        try:
            converted = source.turn(*arrays)
        except ValueError:  # of another number of axes
            converted = None
        if converted is None or converted.shape != value.shape:
            problems.append(f"{name} {value.shape} cannot be {shapes}")
        else:
            parameters[name] = np.ascontiguousarray(converted, value.dtype)
    used = {tensor for name in own for tensor in sources[name].names}
    unused = tensors.keys() - used
    stray = sorted(name for name in unused if not name.endswith("num_batches_tracked"))
    if stray:
        problems.append(f"the model has no place for {', '.join(stray)}")
    if problems:
        message = f"{model!r:.100} does not fit {path_of(path)}: {'; '.join(problems)}"
        if not partial:
            raise ConversionError(f"{message}. partial=True takes what fits")
        warnings.warn(message, UserWarning, stacklevel=2)
    return model.with_parameters(parameters)


def _tensors(path: str) -> dict[str, HostArray]:
    """All arrays of a safetensors file by name."""
    with opened(path) as file:
        if "nnxp" in (file.metadata() or {}):
            raise CheckpointError("it is a model that nnxp.save wrote: nnxp.load reads it")
        names = list(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
        if "BF16" in dtypes:
            float_dtype("bfloat16")  # which wants a package, and says so
        try:
            return {name: file.get_tensor(name) for name in names}
        except (TypeError, AttributeError):
            types = " and ".join(sorted(dtypes))
            raise CheckpointError(
                f"it has tensors of {types}, not all types of NumPy's; module.float() makes them "
                "so, before they are saved"
            ) from None


def _sources(layer: Layer, ours: str, theirs: str, names: set[str]) -> Iterator[tuple[str, Source]]:
    """Of each parameter of a layer, by its name in the model, where it comes from."""
    kind = type(layer).__name__
    children = dict(layer.children())
    if kind in _WHOLE:
        for name, source in _WHOLE[kind](layer, theirs, names):
            yield ours + name, source
        children = {}
    for name, value in layer._fields():
        if is_array(value) and kind not in _WHOLE:
            theirs_of, turn = _FIELDS.get((kind, name), (name, _as_it_is))
            if isinstance(layer, ConvTranspose) and name == "weight":
                turn = partial(window_of_conv_transpose, groups=layer.groups)
            yield ours + name, Source((theirs + theirs_of,), turn)
    numbers = _numbers(children, theirs, names) if kind == "Sequential" else {}
    for name, child in children.items():
        if kind in ("Residual", "ChannelsFirst"):
            inner = theirs
        else:
            renamed = numbers.get(name) or _CHILDREN.get(kind, {}).get(name, name)
            inner = f"{theirs}{renamed}."
        yield from _sources(child, f"{ours}{name}.", inner, names)


def _numbers(children: dict[str, Layer], theirs: str, names: set[str]) -> dict[str, str]:
    """torch's numbers of the layers of a Sequential: those that have parameters, in order."""
    after = (name.removeprefix(theirs) for name in names if name.startswith(theirs))
    numbers = sorted(
        {int(first) for name in after if (first := name.partition(".")[0]).isdecimal()}
    )
    own = [name for name, child in children.items() if child.parameters()]
    if len(numbers) != len(own):
        return {name: name.removeprefix("layers.") for name in children}
    return dict(zip(own, map(str, numbers), strict=True))


def _as_it_is(x: HostArray) -> HostArray:
    return x


def _transposed(x: HostArray) -> HostArray:
    return x.T


_FIELDS: dict[tuple[str, str], tuple[str, Turn]] = {
    ("Dense", "weight"): ("weight", _transposed),
    ("Conv", "weight"): ("weight", window_of_conv),
    ("Bilinear", "weight"): ("weight", lambda x: np.moveaxis(x, 0, -1)),
    ("PReLU", "slope"): ("weight", _as_it_is),
    ("BatchNorm", "mean"): ("running_mean", _as_it_is),
    ("BatchNorm", "var"): ("running_var", _as_it_is),
} | {
    (kind, "gain"): ("weight", _as_it_is)
    for kind in "LayerNorm RMSNorm BatchNorm GroupNorm InstanceNorm".split()
}
"""Fields that torch calls otherwise, or has in another form."""

_CHILDREN = {
    "TransformerEncoderLayer": {
        "attention": "self_attn", "attention_norm": "norm1", "inner": "linear1",
        "outer": "linear2", "norm": "norm2",
    },
}  # fmt: skip
"""Layers in fields that torch calls otherwise."""


def _attention(layer: Layer, theirs: str, names: set[str]) -> Iterator[tuple[str, Source]]:
    """One matrix for queries, keys and values in torch, unless they have sizes of their own."""
    whole = f"{theirs}in_proj_weight"
    for i, (ours, own) in enumerate([("query", "q"), ("key", "k"), ("value", "v")]):

        def third(x: HostArray, i: int = i) -> HostArray:
            return np.split(x, 3)[i].T

        apart = Source((f"{theirs}{own}_proj_weight",), _transposed)
        yield f"{ours}.weight", apart if apart.names[0] in names else Source((whole,), third)
        yield f"{ours}.bias", Source((f"{theirs}in_proj_bias",), third)
    yield "output_projection.weight", Source((f"{theirs}out_proj.weight",), _transposed)
    yield "output_projection.bias", Source((f"{theirs}out_proj.bias",), _as_it_is)


def _cell(layer: Layer, theirs: str, names: set[str], suffix: str = "") -> Iterator[Any]:
    """A cell's weights, with its gates in our order, (gates * size, inputs) in torch."""
    kind = type(layer).__name__

    def turn(x: HostArray) -> HostArray:
        if kind == "LSTMCell":
            i, f, g, o = np.split(x, 4)
            x = np.concatenate([i, f, o, g])
        return x.T

    def both(x: HostArray, h: HostArray) -> HostArray:
        return turn(x + h)

    def named(*parts: str) -> tuple[str, ...]:
        return tuple(f"{theirs}{part}{suffix}" for part in parts)

    yield "weight_x", Source(named("weight_ih"), turn)
    yield "weight_h", Source(named("weight_hh"), turn)
    if kind == "GRUCell":
        yield "bias", Source(named("bias_ih"), turn)
        yield "bias_h", Source(named("bias_hh"), turn)
    else:
        yield "bias", Source(named("bias_ih", "bias_hh"), both)
    yield "projection", Source(named("weight_hr"), _transposed)


def _stack(layer: Any, theirs: str, names: set[str]) -> Iterator[tuple[str, Source]]:
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    for i, cell in enumerate(layer.cells):
        suffix = f"_l{i // len(ends)}{ends[i % len(ends)]}"
        for name, source in _cell(cell, theirs, names, suffix):
            yield f"cells.{i}.{name}", source


_WHOLE: dict[str, Callable[[Any, str, set[str]], Iterator[tuple[str, Source]]]] = {
    "MultiHeadAttention": _attention,
    **dict.fromkeys(("RNN", "GRU", "LSTM"), _stack),
    **dict.fromkeys(("RNNCell", "GRUCell", "LSTMCell"), _cell),
}
"""Layers whose parameters torch has in one module, without those that are in fields of them."""
