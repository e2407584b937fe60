"""Models in files: one safetensors file holds the arrays, and its header what they make up.

The header's metadata has one entry, "nnxp": JSON with the version of this format and the model.
A layer is the name of its class and its fields; a field is a layer, an array by the name of its
tensor, which is its dotted name in the model, or a plain value:

    {"version": 1, "model":
      {"layer": "Sequential", "fields": {"layers": [
        {"layer": "Dense", "fields": {"weight": {"tensor": "layers.0.weight"},
                                      "bias": null, "activation": "relu"}}]}}}

A list stands for a tuple, and {"dict": {...}} for a dict. One entry, because safetensors writes
several in any order, and the same model shall make the same file.

Whoever wrote a file may mean harm. Nothing in it is run, and no class is looked up but among the
layers that are known; what comes out has the fields that the class declares, of the kinds that it
declares, and has passed the class's own `validate`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import numpy as np

from nnxp._arrays import Array, float_dtype, is_array
from nnxp._errors import CheckpointError, NnxpError, OptionError
from nnxp.backend import asnumpy
from nnxp.io._atomic import path_of, written_beside
from nnxp.layers import MODULES
from nnxp.layers._layer import Layer, check_model

VERSION = 1
DEEPEST = 100
"""Layers within layers; Python's own stack ends a few times further on."""
LONGEST = 10_000_000
"""Characters of the description: some 100,000 layers. Parsed, it takes ten times the memory."""

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def save(model: Layer, path: str | os.PathLike[str]) -> None:
    """Write the model to one safetensors file: its layers and its parameters.

        nnxp.save(net, "net.safetensors")

    The arrays are written from host memory, wherever the model is, and the file does not remember
    the place. It is written beside `path` and then renamed, so that the file there is the old one
    or the new one, whole. An array that two layers share becomes two.

    Args:
        model: any layer.
        path: of the file; .safetensors is the usual ending.

    Raises:
        CheckpointError: a file cannot hold the model.
        OptionError: it is no model, or the file is to be one of ONNX.
        OSError: such as FileNotFoundError or PermissionError, the file cannot be written.
    """
    from safetensors.numpy import save_file

    check_model(model, "nnxp.save")
    if path_of(path).lower().endswith(".onnx"):
        raise OptionError("nnxp.save writes safetensors; nnxp.save_onnx(model, path) writes ONNX")
    model._home  # raises if the arrays are a mixture  # noqa: B018
    arrays = model.parameters()
    described = _to_json(model)
    _from_json(described, arrays.__getitem__)  # what could not be loaded is refused here
    text = json.dumps({"version": VERSION, "model": described}, separators=(",", ":"))
    if len(text) > LONGEST:
        raise CheckpointError(f"the model's description has {len(text):,} characters: too many")
    with written_beside(path) as beside:
        # In C order, because safetensors takes the memory as it lies.
        hosted = {name: np.asarray(asnumpy(value), order="C") for name, value in arrays.items()}
        save_file(hosted, beside, metadata={"nnxp": text})


def model_sha256(model: Layer) -> str:
    """The sha256 of what a model is: its layers, their fields, and the numbers in its arrays.

    Raises CheckpointError for a model that a file cannot hold: such fields cannot be compared.
    """
    import hashlib  # takes as long to import as all layers

    digest = hashlib.sha256(json.dumps(_to_json(model)).encode())
    for name, value in model.parameters().items():
        array = np.asarray(asnumpy(value), order="C")
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(array.reshape(-1).view("uint8").data)
    return digest.hexdigest()


def load(path: str | os.PathLike[str]) -> Layer:
    """The model in a file that `nnxp.save` wrote, in host memory.

        net = nnxp.load("net.safetensors")

    Layers of your own are found by their class names: import the module that defines them first.

    Args:
        path: of the file. Nothing in it is run: a file from a stranger is safe to load.

    Raises:
        CheckpointError: the file is not whole, sound and known.
        OSError: such as FileNotFoundError, the file cannot be read.
    """
    with opened(path) as file:
        return _read(file)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """An open safetensors file; CheckpointError for one that is none, or of which more is wrong."""
    from safetensors import SafetensorError, safe_open

    path = path_of(path)
    _check_readable(path)
    try:
        # Read, not mapped: a mapped file would count twice in memory, and can be cut short later.
        with safe_open(path, framework="numpy", backend="pread") as file:
            yield file
    except (OSError, MemoryError):
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be loaded: {_reason(path, error)}") from None
    except NnxpError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    except Exception as error:  # whatever else a hostile file may provoke, in a `validate` say
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} cannot be loaded: {reason:.300}") from error


_FOREIGN = (
    (
        rb"PK\x03\x04.{26}[^/]*/(data\.pkl|byteorder|version|\.format_version)",
        "it is a PyTorch file, a pickle, which nnxp never opens: load it with torch.load, make the "
        "module a model by nnxp.from_torch, and nnxp.save that",
    ),
    (rb"PK\x03\x04.{26}[^/]*\.npy", "it is a .npz file of NumPy's: arrays, not a model"),
    (rb"PK\x03\x04", "it is a zip archive, not a model that nnxp.save wrote"),
    (
        rb"\x80[\x02-\x05](?!.{6}\{)|\([dl]p\d|c[\w.]+\n[\w.]+\n",
        "it is a pickle, which may run anything, and which nnxp never opens: load it where you "
        "trust it, make a model of it by nnxp.from_sklearn or nnxp.from_torch, and nnxp.save that",
    ),
    (rb"\x93NUMPY", "it is a .npy file of NumPy's: an array, not a model"),
    (rb"\x89HDF", "it is an HDF5 file, as Keras writes them, not a model that nnxp.save wrote"),
    (rb"[\t\r\n\x20-\x7e]+\Z", "it is text, not a model"),
)
"""How files of other libraries begin, and what to do with them."""


_ONNX = re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]")
"""How an ONNX file begins: with its version, and who wrote it."""


def _reason(path: str, error: Exception) -> str:
    """Why a file is no safetensors file."""
    with open(path, "rb") as file:
        start = file.read(200)
    if _ONNX.match(start):
        return (
            "it is an ONNX file: nnxp.load_onnx reads it, and so do the commands if its name ends "
            "in .onnx"
        )
    return foreign(start) or f"it is no whole safetensors file ({error})"


def foreign(data: bytes) -> str:
    """What a file of another library is, by how it begins; "" if it does not tell."""
    reasons = (reason for begins, reason in _FOREIGN if re.match(begins, data, re.DOTALL))
    return next(reasons, "")


def status_of_file(path: str) -> os.stat_result:
    """What the system says of a model's file; IsADirectoryError for a folder."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a model's file", path)
    return status


def _check_readable(path: str) -> None:
    """Raise the OSError that says why a file cannot be read; safetensors would not say."""
    if not stat.S_ISREG(status_of_file(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    with open(path, "rb"):
        pass


# writing


def _to_json(layer: Layer, path: str = "") -> dict[str, Any]:
    """The layer as JSON."""
    cls = type(layer)
    who = f"{path or 'the model'} ({cls.__name__})"
    if _registered(cls.__name__) is not cls:
        raise CheckpointError(
            f"{who} cannot be saved: another layer class of that name is known, so a file could "
            "not tell them apart; give the class a name of its own, and if it was defined anew "
            "since this model was made, make the model anew"
        )

    def written(name: str, value: Any) -> Any:
        if is_array(value):
            return {"tensor": name}
        if isinstance(value, Layer):
            return _to_json(value, name)
        if isinstance(value, tuple) and any(isinstance(item, Layer) for item in value):
            return [written(f"{name}.{i}", item) for i, item in enumerate(value)]
        return _plain(name, value)

    prefix = f"{path}." if path else ""
    fields = {name: written(prefix + name, value) for name, value in layer._fields()}
    return {"layer": cls.__name__, "fields": fields}


def _plain(name: str, value: Any) -> Any:
    """An option as JSON."""
    if type(value) in (str, int, bool, NoneType) or (type(value) is float and isfinite(value)):
        return value
    if type(value) is tuple:
        return [_plain(name, item) for item in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _plain(name, item) for key, item in value.items()}}
    raise CheckpointError(
        f"{name} = {value!r:.60} ({type(value).__name__}) cannot be saved: a field is an array, a "
        "layer, a tuple of layers, or a str, int, finite float, bool, None, or tuple or dict of "
        "those" + ("; its .item() is a plain number" if isinstance(value, np.generic) else "")
    )


# reading


def _read(file: Any) -> Layer:
    """The model in an open safetensors file."""
    described = _described_in(file.metadata() or {})
    names = set(file.keys())
    dtypes = {file.get_slice(name).get_dtype() for name in names}
    if not dtypes <= _DTYPES.keys() or len(dtypes - {"F64"}) > 1:
        types = " and ".join(sorted(dtypes))
        raise CheckpointError(f"its tensors are {types}; they are all of one floating type")
    for dtype in dtypes:
        float_dtype(_DTYPES[dtype])  # bfloat16 wants a package: say so before anything is read

    def take(name: str) -> Array:
        if name not in names:
            raise KeyError(name)
        return file.get_tensor(name)

    model = _from_json(described, take)
    try:
        model._home  # raises if the arrays are a mixture  # noqa: B018
    except NnxpError as error:
        _refuse(str(error))
    stray = names - model.parameters().keys()
    if stray:
        _refuse(f"it has tensors that are no layer's parameters: {', '.join(sorted(stray)):.200}")
    return model


def _described_in(metadata: dict[str, str]) -> Any:
    """The description of the model in a file's metadata."""
    text = metadata.get("nnxp")
    if text is None:
        content = f"; it says {metadata!r:.100}" if metadata else ""
        _refuse(f"it is a safetensors file, but not one that nnxp.save wrote{content}")
    if len(text) > LONGEST:
        _refuse(f"its description has {len(text):,} characters: too many")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(f"its description is no JSON that can be read ({error})")
    version = entry.get("version") if type(entry) is dict else None
    if type(version) is not int or version != VERSION:
        newer = type(version) is int and version > VERSION
        _refuse(
            f"it has version {version!r:.20} of the format, this nnxp reads {VERSION}"
            + ("; a newer nnxp reads it" if newer else "")
        )
    return entry.get("model")


def _from_json(node: Any, take: Callable[[str], Array], path: str = "", depth: int = 0) -> Layer:
    """The layer of a description; `take` gives a tensor by its name, or raises KeyError."""
    who = path or "the model"
    if depth > DEEPEST:
        _refuse(f"{who} is more than {DEEPEST} layers deep")
    if not (type(node) is dict and node.keys() == {"layer", "fields"}):
        _refuse(f"{who} is not described as a layer")
    cls, fields = _layer_class(who, node["layer"]), node["fields"]
    if type(fields) is not dict:
        _refuse(f"{who} has no fields")

    def read(name: str, value: Any) -> Any:
        if type(value) is list:
            return tuple(read(f"{name}.{i}", item) for i, item in enumerate(value))
        if type(value) is not dict:
            return _finite(name, value)
        match value:
            case {"tensor": str(tensor)} if value.keys() == {"tensor"}:
                if tensor != name:
                    _refuse(f"{name} is not the tensor {tensor!r:.60}")
                try:
                    return take(name)
                except KeyError:
                    _refuse(f"the tensor {name} is missing")
            case {"dict": dict(items)} if value.keys() == {"dict"}:
                return {key: read(f"{name}.{key}", item) for key, item in items.items()}
        return _from_json(value, take, name, depth + 1)

    _check_fields(who, cls, fields)
    hints = _hints(cls)
    prefix = f"{path}." if path else ""
    values = {name: read(prefix + name, value) for name, value in fields.items()}
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name])
            _refuse(f"{prefix}{name} is {value!r:.60}, but {cls.__name__} wants {wanted}")
    try:
        return cls.of(**values)
    except NnxpError as error:
        _refuse(f"{who}: {error}")


def _registered(name: str) -> type[Layer] | None:
    """The layer class of this name; one of ours goes before any other, loaded yet or not."""
    if name in MODULES:
        import_module(f"nnxp.layers.{MODULES[name]}")
    return Layer.known.get(name)


def _layer_class(who: str, name: Any) -> type[Layer]:
    """The layer class of this name."""
    cls = _registered(name) if type(name) is str else None
    if cls is None:
        _refuse(
            f"{who} is of a layer class {name!r:.60} that is not known here; if it is one of your "
            "own, import the module that defines it, then load (on the command line: --import)"
        )
    if cls.__call__ is Layer.__call__:
        _refuse(f"{who} is of the class {name}, which has no formula")
    return cls


def _check_fields(who: str, cls: type[Layer], fields: dict[str, Any]) -> None:
    """Refuse unless these are the class's fields; one that has a default may be absent."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    needed = [name for name, default in defaults.items() if default is dataclasses.MISSING]
    missing = [name for name in needed if name not in fields]
    unknown = [name for name in fields if name not in defaults]
    if missing or unknown:
        _refuse(
            f"{who} does not have the fields of {cls.__name__}"
            + (f"; missing: {', '.join(missing):.100}" if missing else "")
            + (f"; unknown: {', '.join(unknown):.100}" if unknown else "")
        )


def _finite(name: str, value: Any) -> Any:
    if type(value) is float and not isfinite(value):  # 1e999
        _refuse(f"{name} is {value}")
    return value


def _hints(cls: type[Layer]) -> dict[str, Any]:
    """What the class's annotations ask of its fields; nothing, if they name what is not there."""
    try:
        return get_type_hints(cls)
    except Exception:  # annotations may be any expression
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that an annotation asks for; of arrays, any library's will do.

    A kind of annotation that is not listed here accepts all: `validate` has the last word.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and type(value) is tuple:
        if inner[-1:] == (Ellipsis,):
            return all(_fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if origin is dict and type(value) is dict:
        return all(_fits(item, inner[1]) for item in value.values())
    if hint is float and type(value) is int:
        return True
    kind = origin or hint
    if is_array(value):
        return not isinstance(kind, type) or kind.__name__ == "ndarray"
    if isinstance(value, bool | int):
        return not isinstance(kind, type) or kind in (type(value), object)
    try:
        return not isinstance(kind, type) or isinstance(value, kind)
    except TypeError:  # a Protocol does not tell
        return True


def _refuse(reason: str) -> NoReturn:
    raise CheckpointError(reason)
