"""Models in ONNX files, as Graphs.

The package onnx parses a file, checks it and brings it to one version of the standard; nothing of
it is run while it is read. What a model keeps in files of its own must lie below the model's
folder, and its size must be what the model says, before a byte of it is read.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from nnxp._arrays import HostArray, dtype_of
from nnxp._errors import CheckpointError, ConversionError, NnxpError
from nnxp.io.checkpoint import foreign, load, status_of_file
from nnxp.layers._layer import Layer
from nnxp.layers.graph import (
    BODIES,
    DTYPE_ATTRIBUTES,
    DTYPES,
    Graph,
    Weight,
    known_beforehand,
    packed,
    unknown_operators,
    unpacked,
)
from nnxp.layers.operators import OPERATORS

OPSET = 21
"""Older models are brought to this version of the standard."""
NEWEST = 28
"""Newer ones may say other things by the same words."""
IR_NEWEST = 14
SMALL = 1024
"""Numbers in an array that takes part in the checks; larger ones are put aside meanwhile."""
LARGEST = 1 << 31
"""Bytes of a file, and of one that ends in .onnx: protobuf reads no larger ones."""


def load_onnx(source: Any) -> Graph:
    """The model in an ONNX file, as a layer like any other.

    Operators of ONNX and what dense models need of ai.onnx.ml are known, in any version up to 28.
    `nnxp.save` writes the result to a file that is read without the package onnx.

        model = nnxp.load_onnx("model.onnx")
        y = model(x)

    Args:
        source: a path, the bytes of a file, or a ModelProto.

    Returns:
        A Graph, which takes arrays in the order of the graph's inputs, and answers an array, or a
        tuple of several.

    Raises:
        CheckpointError: the file is not whole or not sound.
        ConversionError: there are operators that are not known (all of them are named), or the
            package onnx is missing.
        OSError: such as FileNotFoundError, the file cannot be read.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConversionError(
            f'load_onnx needs the package onnx ({error}); pip install "nnxp[onnx]" brings it'
        ) from error

    name, folder = "the model", None
    if isinstance(source, str | os.PathLike):
        name, folder = os.fspath(source), Path(os.fspath(source)).parent
    elif not isinstance(source, bytes | bytearray | memoryview | onnx.ModelProto):
        raise ConversionError(
            f"load_onnx takes a path, bytes or a ModelProto, not {type(source).__name__}"
        )
    try:
        return _Reader(onnx, _parsed(onnx, source), folder).graph()
    except (OSError, MemoryError, ConversionError):
        raise
    except NnxpError as error:
        raise CheckpointError(f"{name} cannot be loaded: {error}") from error
    except Exception as error:  # whatever else a hostile file provokes in another's code
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{name} cannot be loaded: {reason:.400}") from error


def load_model(path: str | os.PathLike[str]) -> Layer:
    """The model in a file: in ONNX if its name ends in .onnx, else as `nnxp.save` writes it."""
    return load_onnx(path) if Path(path).suffix.lower() == ".onnx" else load(path)


def _parsed(onnx: Any, source: Any) -> Any:
    """The ModelProto, without what lies in other files."""
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        return model
    if isinstance(source, str | os.PathLike):
        status = status_of_file(os.fspath(source))
        if stat.S_ISREG(status.st_mode) and status.st_size > LARGEST:
            raise CheckpointError(f"{status.st_size:,} bytes, more than protobuf reads")
        source = Path(source).read_bytes()
    model, data = onnx.ModelProto(), bytes(source)
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, of which there are two by now
        reason = foreign(data[:200]) or f"it is no whole ONNX file ({error})"
        if data[8:10] == b'{"':
            reason = (
                "it is a safetensors file: nnxp.load reads it, and so do the commands unless its "
                "name ends in .onnx"
            )
        raise CheckpointError(reason) from error
    return model


class _Reader:
    """Reads one ONNX model as a Graph."""

    def __init__(self, onnx: Any, model: Any, folder: Path | None) -> None:
        self.onnx, self.model, self.folder = onnx, model, folder
        self.arrays: dict[str, HostArray] = {}

    def graph(self) -> Graph:
        model = self.model
        if not model.graph.output:
            raise CheckpointError("it is no ONNX model: its graph has no outputs")
        opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
        version = opsets.pop("ai.onnx", 1 if not opsets else OPSET)
        if version > NEWEST or model.ir_version > IR_NEWEST:
            raise ConversionError(
                f"it is of opset {version} and IR {model.ir_version}; nnxp knows up to "
                f"{NEWEST} and {IR_NEWEST}"
            )
        if model.graph.sparse_initializer:
            raise ConversionError("it has sparse initialisers, which nnxp does not know")
        self._refuse_foreign_data()
        if model.functions:
            self.model = model = self.onnx.inliner.inline_local_functions(model)
        self._refuse_unknown(version)
        self._detach_large_arrays()
        if 3 <= model.ir_version < 4:  # initialisers had to be inputs, too, and are not always
            model.ir_version = 4
        self._check()
        if 0 < version < OPSET and any(
            not n.domain or n.domain == "ai.onnx" for n in model.graph.node
        ):
            self._upgrade(version)
        return self._to_graph()

    # before anything is done

    def _refuse_foreign_data(self) -> None:
        """Read what lies in other files, and only in those that may be read; check all sizes."""
        for tensor in _tensors(self.model.graph, self.model.functions):
            if any(n < 0 for n in tensor.dims):
                raise CheckpointError(f"{tensor.name!r} has the shape {list(tensor.dims)}")
            if tensor.data_location != self.onnx.TensorProto.EXTERNAL:
                continue
            dtype = self._dtype(tensor.data_type, tensor.name)
            size = prod(tensor.dims) * dtype.itemsize
            tensor.raw_data = self._external(tensor, size)
            tensor.data_location = self.onnx.TensorProto.DEFAULT
            del tensor.external_data[:]

    def _external(self, tensor: Any, size: int) -> bytes:
        """The bytes of a tensor that lie in a file below the model's folder."""
        location = {entry.key: entry.value for entry in tensor.external_data}
        name, who = location.get("location", ""), f"the data of {tensor.name!r}"
        if self.folder is None:
            raise CheckpointError(f"{who} are in a file {name!r:.80}: load the model by its path")
        folder = self.folder.resolve()
        relative = Path(name)
        if (
            not name
            or "\0" in name
            or relative.is_absolute()
            or ".." in relative.parts
            or "\\" in name
        ):
            raise CheckpointError(
                f"{who} are in {name!r:.80}, which is not below the model's folder"
            )
        path = (folder / relative).resolve()
        if not path.is_relative_to(folder):
            raise CheckpointError(f"{who} are in {name!r:.80}, a link out of the model's folder")
        try:
            offset, length = int(location.get("offset", 0)), int(location.get("length", size))
        except ValueError:
            raise CheckpointError(f"{who} are at {location!r:.100}") from None
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{who} are in {name!r:.80}, which is not a regular file")
        if length != size or offset < 0 or offset + size > status.st_size:
            raise CheckpointError(
                f"{who} are {size:,} bytes, but {name!r:.80} has {length:,} of them at {offset:,} "
                f"of {status.st_size:,}"
            )
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise CheckpointError(f"{who}: {name!r:.80} ends early")
        return data

    def _refuse_unknown(self, version: int) -> None:
        """Refuse operators that are not known, all of them at once."""
        unknown = []
        for node in _nodes(self.model.graph):
            name = _operator_name(node)
            if name == "Scan" and version < 9:
                raise ConversionError(
                    f"Scan of opset {version} goes along axis 1; from 9 on it is read"
                )
            if name not in OPERATORS and name not in (*BODIES, *_UPGRADED):
                unknown.append(
                    {"op": name, "name": node.name, "outputs": list(node.output) or [""]}
                )
        if unknown:
            raise ConversionError(unknown_operators(unknown))

    def _detach_large_arrays(self) -> None:
        """Take large arrays out, so that what checks and upgrades the model has little to carry."""
        graph = self.model.graph
        inputs = {value.name for value in graph.input}
        kept = []
        for tensor in graph.initializer:
            size = prod(tensor.dims)
            if size <= SMALL or tensor.name in self.arrays:
                kept.append(tensor)
                continue
            self.arrays[tensor.name] = self._array(tensor)
            if tensor.name not in inputs:
                graph.input.append(
                    self.onnx.helper.make_tensor_value_info(
                        tensor.name, tensor.data_type, list(tensor.dims)
                    )
                )
        if len(kept) != len(graph.initializer):
            kept = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
            del graph.initializer[:]
            graph.initializer.extend(kept)

    def _check(self) -> None:
        """Refuse what does not follow the standard; outputs may go without a type or a shape."""
        model = self.onnx.ModelProto()
        model.CopyFrom(self.model)
        for graph in _graphs(model.graph):
            for value in (*graph.input, *graph.output):
                if value.type.WhichOneof("value") in (None, "tensor_type"):
                    tensor = value.type.tensor_type
                    tensor.elem_type = tensor.elem_type or self.onnx.TensorProto.FLOAT
                    tensor.shape.SetInParent()
        self.onnx.checker.check_model(model)

    def _dtype(self, code: int, who: str) -> np.dtype[Any]:
        """The type of numbers for ONNX's code of it."""
        try:
            name = self.onnx.TensorProto.DataType.Name(code).lower()
        except ValueError:
            raise CheckpointError(f"{who!r} is of an unknown type {code}") from None
        name = {"float": "float32", "double": "float64"}.get(name, name)
        if name not in DTYPES:
            raise ConversionError(
                f"{who!r} is of the type {name}, which nnxp does not compute with"
            )
        return dtype_of(name)

    def _array(self, tensor: Any) -> HostArray:
        """The numbers of a tensor, as many as it says."""
        if (wider := self._of_four_bits(tensor)) is not None:
            return wider
        dtype = self._dtype(tensor.data_type, tensor.name)
        if tensor.HasField("raw_data"):
            data = tensor.raw_data  # a copy each time it is asked for
            if len(data) != prod(tensor.dims) * dtype.itemsize:
                raise CheckpointError(
                    f"{tensor.name!r}, {list(tensor.dims)} of {dtype}, has {len(data)} bytes"
                )
            return np.frombuffer(data, dtype.newbyteorder("<")).reshape(tensor.dims)
        fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
        if sum(len(getattr(tensor, name)) for name in fields) != prod(tensor.dims):
            raise CheckpointError(f"{tensor.name!r} has not as many numbers as its shape says")
        array: HostArray = self.onnx.numpy_helper.to_array(tensor)
        return array.astype(dtype, copy=False)

    def _of_four_bits(self, tensor: Any) -> HostArray | None:
        """Whole numbers of four bits as such of eight, where nothing but DequantizeLinear asks for
        them, to which it is the same; None for others."""
        kinds = {self.onnx.TensorProto.INT4: "int8", self.onnx.TensorProto.UINT4: "uint8"}
        dtype = kinds.get(tensor.data_type)
        if dtype is None:
            return None
        asking = {n.op_type for n in _nodes(self.model.graph) if tensor.name in n.input}
        if asking != {"DequantizeLinear"}:
            return None
        count = prod(tensor.dims)
        if tensor.HasField("raw_data"):
            both = np.frombuffer(tensor.raw_data, "uint8")
        else:
            both = np.asarray(tensor.int32_data, "int32").astype("uint8")
        if len(both) != -(-count // 2):
            raise CheckpointError(
                f"{tensor.name!r}, {list(tensor.dims)} of four bits, has {len(both)} bytes"
            )
        halves = np.stack([both << 4, both & 0xF0], axis=-1).reshape(-1)[:count]
        return (halves.view(dtype) >> 4).reshape(tensor.dims)

    # to one version

    def _upgrade(self, version: int) -> None:
        """Bring the model to the one version of the standard."""
        if version < 7:
            self._reshape_slopes()
        self.model = self.onnx.version_converter.convert_version(self.model, OPSET)
        if version < 11:
            self._keep_old_resize()

    def _keep_old_resize(self) -> None:
        """Before opset 11 a resized array had its places at multiples, not between pixels."""
        for node in _nodes(self.model.graph):
            if node.op_type == "Resize" and not node.domain:
                node.attribute.extend(
                    self.onnx.helper.make_attribute(name, value)
                    for name, value in RESIZED_BEFORE.items()
                )

    def _reshape_slopes(self) -> None:
        """A slope for each channel was (c,) before PRelu broadcast as all others do."""
        model = self.onnx.shape_inference.infer_shapes(self.model)
        graph = model.graph
        ndims = {v.name: len(v.type.tensor_type.shape.dim)
                 for v in (*graph.input, *graph.value_info, *graph.output)}  # fmt: skip
        small = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type != "PRelu" or node.domain:
                continue
            tensor, ndim = small.get(node.input[1]), ndims.get(node.input[0], 0)
            if tensor is not None and len(tensor.dims) == 1 and ndim > 2:
                tensor.dims.extend([1] * (ndim - 2))
                for value in self.model.graph.input:
                    if value.name == tensor.name:
                        for _ in range(ndim - 2):
                            value.type.tensor_type.shape.dim.add().dim_value = 1

    # as a Graph

    def _to_graph(self) -> Graph:
        graph = self.model.graph
        for tensor in graph.initializer:
            self.arrays.setdefault(tensor.name, self._array(tensor))
        nodes = []
        for node in graph.node:
            if node.op_type == "Constant" and not node.domain:
                self.arrays[node.output[0]] = self._constant(node)
            else:
                nodes.append(self._node(node))
        sizes: Counter[str] = Counter()
        for array in self.arrays.values():
            if array.ndim and "float" in str(array.dtype):
                sizes[str(array.dtype)] += array.nbytes
        inputs = [self._input(value) for value in graph.input if value.name not in self.arrays]
        floats = [entry["dtype"] for entry in inputs if "float" in entry["dtype"]]
        if "float32" in floats:  # statistics of a scaler, of twice the width
            del sizes["float64"]
        kind = max(sizes, key=sizes.__getitem__) if sizes else (floats or ["float32"])[0]
        used = {name for node in _nodes(graph) for name in node.input}
        used |= {value.name for part in _graphs(graph) for value in part.output}
        own = {name: array for name, array in self.arrays.items() if name in used}
        shapes = known_beforehand(nodes)  # such as the scales of a Resize, which nobody trains
        weights = {
            n: a for n, a in own.items() if a.ndim and str(a.dtype) == kind and n not in shapes
        }
        return Graph.of(
            nodes=tuple(nodes),
            inputs=tuple(inputs),
            outputs=tuple(value.name for value in graph.output),
            constants={name: packed(array) for name, array in own.items() if name not in weights},
            names=tuple(weights),
            weights=tuple(map(Weight, weights.values())),
            kind=kind,
        )

    def _input(self, value: Any) -> dict[str, Any]:
        if value.type.WhichOneof("value") != "tensor_type":
            raise ConversionError(f"the input {value.name!r} is no tensor")
        tensor = value.type.tensor_type
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(
                d.dim_value if d.WhichOneof("value") == "dim_value" and d.dim_value >= 0 else None
                for d in tensor.shape.dim
            )
        return {
            "name": value.name,
            "dtype": str(self._dtype(tensor.elem_type, value.name)),
            "shape": shape,
        }

    def _constant(self, node: Any) -> HostArray:
        (attribute,) = node.attribute
        value = self._attribute(attribute, node)
        if isinstance(value, dict) and "data" in value:
            array: HostArray = unpacked(value)
            return array
        dtype = {"value_float": "float32", "value_floats": "float32", "value_int": "int64",
                "value_ints": "int64"}.get(attribute.name)  # fmt: skip
        if dtype is None:
            raise ConversionError(f"Constant {node.output[0]!r} has a {attribute.name}")
        value = float(value["float"]) if isinstance(value, dict) else value
        return np.asarray(value, dtype)

    def _node(self, node: Any) -> dict[str, Any]:
        return {
            "op": _operator_name(node),
            "name": node.name,
            "inputs": tuple(node.input),
            "outputs": tuple(node.output),
            "attributes": {a.name: self._attribute(a, node) for a in node.attribute},
        }

    def _attribute(self, attribute: Any, node: Any) -> Any:
        value = self.onnx.helper.get_attribute_value(attribute)
        if attribute.name in DTYPE_ATTRIBUTES and isinstance(value, int):
            return str(self._dtype(value, node.output[0]))
        if isinstance(value, self.onnx.TensorProto):
            return packed(self._array(value))
        if isinstance(value, self.onnx.GraphProto):
            return self._body(value)
        if isinstance(value, self.onnx.TypeProto):  # what an Optional holds says itself
            return None
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, float):
            return value if isfinite(value) else {"float": str(value)}
        if isinstance(value, int | str):
            return value
        try:
            items = tuple(item.decode() if isinstance(item, bytes) else item for item in value)
        except TypeError:
            items = (None,)
        if not all(isinstance(item, int | float | str) for item in items):
            raise ConversionError(
                f"{node.op_type} {node.name!r}: attribute {attribute.name!r} is not known"
            )
        return items

    def _body(self, graph: Any) -> dict[str, Any]:
        """A graph within a graph; its constants become nodes."""
        if graph.sparse_initializer:
            raise ConversionError("a graph within the graph has sparse initialisers")
        nodes = [
            {"op": "Constant", "name": "", "inputs": (), "outputs": (tensor.name,),
             "attributes": {"value": packed(self._array(tensor))}}
            for tensor in graph.initializer
        ]  # fmt: skip
        nodes += [self._node(node) for node in graph.node]
        described = {"nodes": tuple(nodes), "outputs": tuple(value.name for value in graph.output)}
        return described | (
            {"inputs": tuple(value.name for value in graph.input)} if graph.input else {}
        )


RESIZED_BEFORE = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "simple"}
"""What Resize was before opset 11, and Upsample; "simple" is a word of ONNX Runtime's."""

_UPGRADED = ("Upsample", "Scatter")
"""Operators of old versions that others have taken the place of."""


def _operator_name(node: Any) -> str:
    plain = node.domain in ("", "ai.onnx")
    return node.op_type if plain else f"{node.domain}.{node.op_type}"


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those within it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _nodes(graph: Any) -> Iterator[Any]:
    for part in _graphs(graph):
        yield from part.node


def _tensors(graph: Any, functions: Any) -> Iterator[Any]:
    """Every tensor in a graph, in those within it, and in its functions."""
    for part in _graphs(graph):
        yield from part.initializer
    for node in [*_nodes(graph), *(node for function in functions for node in function.node)]:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
