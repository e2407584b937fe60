"""Modules of PyTorch as nnxp models: a table of its layers, and what stands between them by tracing.

torch is never imported by nnxp: who has a module has it.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nnxp._arrays import Array, float_dtype
from nnxp._errors import ConversionError, NnxpError, OptionError
from nnxp.layers._layer import Layer
from nnxp.layers.activation import Activation
from nnxp.layers.attention import MultiHeadAttention, TransformerEncoder, TransformerEncoderLayer
from nnxp.layers.containers import Sequential
from nnxp.layers.dense import Dense
from nnxp.layers.dropout import Dropout
from nnxp.layers.norm import BatchNorm, LayerNorm, RMSNorm
from nnxp.layers.positions import Embedding
from nnxp.layers.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from nnxp.layers.shape import Flatten
from nnxp.layers.torch_functions import VIEWS, known
from nnxp.layers.torch_graph import ChannelsFirst, Constant, TorchGraph, encoded

Module = Any
Take = Callable[[Any], Array]


def from_torch(
    module: Module, *, inputs: Sequence[str] | None = None, dtype: object = None
) -> Layer:
    """The model that computes what a torch module answers in eval().

    `module` is any torch.nn.Module made of modules that are known here (layers in `MODULES`) and of
    functions, operators and methods between them (`nnxp.layers.torch_functions`), which torch.fx
    traces. Modules in a row become a Sequential, all else a TorchGraph. The model takes what `forward`
    takes, in torch's layout: axis 0 is rows, images are (rows, channels, ...). It answers an array, or
    a tuple: nested ones are flat, of a dict the values.

    `inputs` names the arguments of `forward` that the model takes; without it those that have no
    default. All others are at their defaults. A recurrent module by itself answers y and its last
    states, as `returns="states"` has them: (rows, layers * directions, size).

    Parameters are copied, in their own type or in `dtype`. Tied ones stay tied where the layers keep
    them in the same form.

    Raises ConversionError, before anything is converted, with all that cannot be read.

        net = nnxp.from_torch(torchvision.models.resnet18(weights="DEFAULT"))
        y = nnxp.predict(net, images)
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"from_torch takes a module of PyTorch, which is not installed ({error})"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"from_torch takes a torch.nn.Module, not {module!r:.80}")
    if "forward" in vars(module):
        raise ConversionError(
            f"forward of this {type(module).__name__} is not that of its class, which is what is read"
        )
    with torch.no_grad(), _evaluating(module):
        graph = _traced(module, inputs)
        return _Reading(module, None if dtype is None else float_dtype(dtype)).model(graph)


@contextmanager
def _evaluating(module: Module) -> Iterator[None]:
    """The module in eval(), and afterwards as it was."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


def _kind(module: Module) -> str:
    """The name of a module of torch's in the table; "" for one that is not there."""
    from torch.nn.utils import parametrize

    cls = type(module)
    if parametrize.is_parametrized(module):
        cls = cls.__mro__[1]
    return (
        cls.__name__ if cls.__module__.startswith("torch.nn.") and cls.__name__ in MODULES else ""
    )


def _traced(module: Module, inputs: Sequence[str] | None) -> Any:
    """The graph of `forward`: of these arguments, all others being at their defaults."""
    from torch import fx

    parameters = inspect.signature(module.forward).parameters
    plain = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    wanted = (
        [n for n, p in plain.items() if p.default is p.empty] if inputs is None else list(inputs)
    )
    if _kind(module) in NEEDED and inputs is None:
        wanted = wanted[: NEEDED[_kind(module)]]
    unknown = set(wanted) - plain.keys()
    if unknown or not wanted:
        raise OptionError(
            f"inputs names arguments of forward({', '.join(plain)}), not {', '.join(sorted(unknown))}"
        )
    if _kind(module):
        graph = fx.Graph(module)
        given = {name: graph.placeholder(name) for name in wanted}
        graph.output(graph.call_module("", (), given))
        return graph

    class Writable(fx.Proxy):  # fx itself takes x += y for x = x + y, and knows no x[...] = y
        def __setitem__(self, key: Any, value: Any) -> None:
            self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    for name in _IN_PLACE - {"setitem"}:

        def write(self: Any, other: Any, target: Any = getattr(operator, name)) -> Any:
            return self.tracer.create_proxy("call_function", target, (self, other), {})

        setattr(Writable, f"__{name}__", write)

    class Tracer(fx.Tracer):
        trace_asserts = True
        proxy_buffer_attributes = True

        def proxy(self, node: Any) -> Any:
            return Writable(node, self)

        def is_leaf_module(self, inner: Module, path: str) -> bool:
            return bool(_kind(inner)) or super().is_leaf_module(inner, path)

    fixed = {n: p.default for n, p in plain.items() if n not in wanted and p.default is not p.empty}
    try:
        graph = Tracer(autowrap_modules=(math,)).trace(module, concrete_args=fixed)
    except Exception as error:  # whatever a forward may say to arrays without numbers
        raise ConversionError(
            f"forward of {type(module).__name__} cannot be traced: {type(error).__name__}: "
            f"{str(error):.400}. {_ROAD}"
        ) from error
    graph.wanted = wanted
    return graph


_ROAD = "torch.onnx.export writes such a module as ONNX, which nnxp.load_onnx reads"


class _Reading:
    """A graph of torch.fx, node by node, as the steps of a TorchGraph."""

    def __init__(self, module: Module, dtype: Any) -> None:
        self.module, self.dtype = module, dtype
        self.layers: list[Layer] = []
        self.steps: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.inputs: list[str] = []
        self.problems: list[str] = []
        self.values: dict[
            Any, Any
        ] = {}  # of each node: a value, a tuple of them, or a plain number
        self._arrays: dict[Any, tuple[Array, Any]] = {}
        self._made: dict[str, Any] = {}
        self._same: dict[Any, list[Any]] = {}  # of a node: those that are the same tensor

    def model(self, graph: Any) -> Layer:
        nodes = list(graph.nodes)
        wanted = getattr(graph, "wanted", None)
        needed = _needed(nodes)
        self._refuse_hidden_writes(nodes)
        answer: Any = None
        for node in nodes:
            if node.op == "placeholder":
                if wanted is None or node.target in wanted:
                    self.values[node] = {"value": -1 - len(self.inputs)}
                    self.inputs.append(node.target)
            elif node not in needed:
                continue
            elif node.op == "output":
                answer = self._value(node.args[0])
            else:
                try:
                    self.values[node] = self._node(node)
                except (_Unknown, NnxpError) as error:
                    self.problems.append(f"{_where(node)}: {error}")
                    self.values[node] = {"value": -1}
        answers = tuple(_flat(answer))
        if not all(_is_value(each) for each in answers):
            self.problems.append(f"the answer is no array: {answers!r:.80}")
        if self.problems:
            name = type(self.module).__name__
            problems = "; ".join(dict.fromkeys(self.problems))
            raise ConversionError(f"from_torch cannot read {name}: {problems}. {_ROAD}")
        return self._finished(answers)

    # one node

    def _node(self, node: Any) -> Any:
        args = [self._value(each) for each in node.args]
        options = {name: self._value(each) for name, each in node.kwargs.items()}
        if node.op == "get_attr":
            return self._constant(node.target)
        if node.op == "call_module":
            module = self.module.get_submodule(node.target)
            made = self._module(node.target, module, args, options)
            if getattr(module, "inplace", False):
                self._written(node, made)
            return made
        name = node.target if node.op == "call_method" else _function_name(node.target)
        if name == "getitem" and type(args[0]) is tuple and isinstance(args[1], int):
            return args[0][args[1]]
        inplace = _writes(node)
        own = known(
            name.removesuffix("_") if inplace and name.endswith("_") and name[-2:] != "__" else name
        )
        if not own:
            raise _Unknown(f"{'method' if node.op == 'call_method' else 'function'} {name}")
        options.pop("inplace", None)
        made = self._step(own, args, options)
        if inplace:
            self._written(node, made)
        return made

    def _value(self, x: Any) -> Any:
        """An argument of a node: a value, a plain one, or a tuple of them."""
        import torch
        from torch import fx

        if isinstance(x, fx.Node):
            if x not in self.values:
                raise _Unknown(f"it looks at {x.name}, which is not among the inputs")
            return self.values[x]
        if isinstance(x, slice):
            return {"slice": tuple(self._value(each) for each in (x.start, x.stop, x.step))}
        if isinstance(x, dict):
            return {name: self._value(each) for name, each in x.items()}
        if isinstance(x, tuple | list):
            return tuple(self._value(each) for each in x)
        if isinstance(x, torch.dtype):
            return str(x)
        if isinstance(x, torch.device | torch.memory_format):
            return None
        if isinstance(x, torch.Tensor):
            return self._kept(x)
        return encoded(x)

    def _step(self, what: str, args: Sequence[Any], options: dict[str, Any] | None = None) -> Any:
        self.steps.append((what, tuple(args), options or {}))
        return {
            "value": len(self.steps) - 1
        }  # inputs are below 0, until it is known what is needed

    def _layer(self, path: str, make: Callable[[], Layer]) -> str:
        """The step that calls this layer, which is made once for each path."""
        if path not in self._made:
            self.layers.append(make())
            self._made[path] = f"layers.{len(self.layers) - 1}"
        return str(self._made[path])

    def _constant(self, target: str) -> Any:
        value: Any = self.module
        for name in target.split("."):
            value = getattr(value, name)
        return self._kept(value)

    def _kept(self, tensor: Any) -> Any:
        number = self._layer(f"constant {id(tensor)}", lambda: Constant(self.take(tensor)))
        return self._step(number.replace("layers", "constant"), ())

    def take(self, tensor: Any) -> Array:
        """A tensor's numbers in an array of ours, once for tensors that share their memory."""
        import torch

        tensor = tensor.detach()
        key = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
        if key not in self._arrays or not tensor.numel():
            host = tensor.cpu()
            array = np.array(host.float().numpy() if host.dtype == torch.bfloat16 else host.numpy(),
                             order="C")  # fmt: skip
            if host.dtype == torch.bfloat16:
                array = array.astype(float_dtype("bfloat16"))
            if self.dtype is not None and array.dtype.kind in "fV":
                array = array.astype(self.dtype)
            self._arrays[key] = array, tensor  # which keeps its memory from being another's
        return self._arrays[key][0]

    def _module(self, path: str, module: Module, args: list[Any], options: dict[str, Any]) -> Any:
        kind = _kind(module)
        if not kind:
            raise _Unknown(f"torch has {type(module).__name__}, which has no counterpart here")
        if module._forward_hooks or module._forward_pre_hooks:
            raise _Unknown(f"{type(module).__name__} has hooks")
        names = list(inspect.signature(module.forward).parameters)
        given = dict(zip(names, args, strict=False)) | options
        special = _CALLS.get(kind)
        if special is not None:
            return special(self, path, module, given)
        made = MODULES[kind](module, self.take)
        if isinstance(made, tuple):  # a function with these options
            return self._step(made[0], list(given.values()), dict(made[1]))
        return self._step(self._layer(path, lambda: made), list(given.values()))

    # what writes into its argument

    def _written(self, node: Any, made: Any) -> None:
        """From here on all that are the tensor that this node writes into stand for what it wrote."""
        target = node.args[0]
        same = self._same[node] = self._same.setdefault(target, [target])
        same.append(node)
        self.values.update(dict.fromkeys(same, made))

    def _refuse_hidden_writes(self, nodes: list[Any]) -> None:
        """Refuse a write into an array that another one, needed later, may look at."""
        root: dict[Any, Any] = {}
        same: dict[Any, Any] = {}
        for i, node in enumerate(nodes):
            root[node] = same[node] = node
            target = _written_node(node, self.module)
            first = next((a for a in node.args if a in root), None) if node.args else None
            if target is not None:
                root[node], same[node] = root[target], same[target]
                later = set(nodes[i + 1 :])
                for other, its_root in root.items():
                    hidden = its_root is root[target] and same[other] is not same[target]
                    if hidden and later & other.users.keys():
                        self.problems.append(
                            f"{_where(node)}: it writes into an array that {other.name} looks at"
                        )
            elif first is not None and _may_view(node, self.module):
                root[node] = root[first]

    # the end

    def _finished(self, answers: tuple[Any, ...]) -> Layer:
        """The steps that are needed as a model, of the simplest kind that says it all."""
        wanted = set(_numbers(answers))
        kept = []
        for i in reversed(range(len(self.steps))):
            if i in wanted:
                kept.append(i)
                wanted |= set(_numbers(self.steps[i][1:]))
        kept.reverse()
        count = len(self.inputs)
        places = {-1 - i: i for i in range(count)} | {s: count + n for n, s in enumerate(kept)}
        steps = tuple(_renumbered(self.steps[i], places) for i in kept)
        answers = _renumbered(answers, places)
        in_a_row = count == 1 and len(answers) == 1 and all(
            what.startswith("layers.") and args == ({"value": i},) and not options
            for i, (what, args, options) in enumerate(steps)
        )  # fmt: skip
        if in_a_row and answers == ({"value": len(steps)},):
            layers = [self.layers[int(what.partition(".")[2])] for what, *_ in steps]
            return layers[0] if len(layers) == 1 else Sequential(*layers)
        return self._graph(steps, answers)

    def _graph(self, steps: tuple[Any, ...], answers: tuple[Any, ...]) -> TorchGraph:
        used = sorted({int(w.partition(".")[2]) for w, *_ in steps if "." in w})
        new = {old: i for i, old in enumerate(used)}

        def renamed(what: str) -> str:
            kind, dot, number = what.partition(".")
            return f"{kind}.{new[int(number)]}" if dot else what

        kinds = []
        layers = tuple(self.layers[i] for i in used)
        steps = tuple((renamed(what), args, options) for what, args, options in steps)
        for i in range(len(self.inputs)):
            kinds.append(_kind_of_input({"value": i}, steps, layers))
        return TorchGraph.of(layers, steps, answers, tuple(kinds))


class _Unknown(Exception):
    """Something in a module that has no counterpart."""


def _kind_of_input(value: Any, steps: tuple[Any, ...], layers: tuple[Layer, ...]) -> str:
    """What an input is: as the layer takes it that it goes into, else anything."""
    for what, args, _ in steps:
        if what == "embedding" and args[0] == value:
            return "int"
        if what.startswith("layers.") and value in args:
            takes = layers[int(what.partition(".")[2])].takes
            place = args.index(value)
            return takes[place] if place < len(takes) else "float"
    return "any"


def _is_value(x: Any) -> bool:
    return type(x) is dict and x.keys() == {"value"}


def _flat(x: Any) -> Iterator[Any]:
    if type(x) is tuple:
        for each in x:
            yield from _flat(each)
    elif type(x) is dict and not _is_value(x):
        for each in x.values():
            yield from _flat(each)
    elif x is not None:
        yield x


def _numbers(x: Any) -> Iterator[int]:
    if isinstance(x, tuple | list):
        for each in x:
            yield from _numbers(each)
    elif _is_value(x):
        yield x["value"]
    elif type(x) is dict:
        yield from _numbers(tuple(x.values()))


def _renumbered(x: Any, places: dict[int, int]) -> Any:
    if type(x) is tuple:
        return tuple(_renumbered(each, places) for each in x)
    if _is_value(x):
        return {"value": places[x["value"]]}
    if type(x) is dict:
        return {name: _renumbered(each, places) for name, each in x.items()}
    return x


def _where(node: Any) -> str:
    """Where in the module a node stands."""
    if node.op == "call_module":
        return str(node.target) or "the module"
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f"forward of {path}" if path else "forward"


def _function_name(target: Any) -> str:
    name = str(getattr(target, "__name__", target))
    home = str(getattr(target, "__module__", "") or "")
    ours = home.split(".")[0] in ("torch", "_operator", "builtins", "math", "")
    return name if ours else f"{home}.{name}"


_IN_PLACE = frozenset(["iadd", "isub", "imul", "itruediv", "setitem"])
_SIZES = frozenset(["size", "dim", "numel", "ndimension"])


def _is_number(x: Any) -> bool:
    """Whether an argument is a number, or a size of an array, which nobody writes into."""
    if not hasattr(x, "op"):
        return not isinstance(x, tuple | list)
    if x.op == "call_method":
        return x.target in _SIZES
    if x.op != "call_function":
        return False
    name = _function_name(x.target)
    if name == "getattr":
        return x.args[1] in ("shape", "ndim")
    return name in ("getitem", *dir(operator)) and all(map(_is_number, x.args))


def _writes(node: Any) -> bool:
    """Whether a function or method writes into its first argument."""
    if node.args and _is_number(node.args[0]):
        return False
    name = node.target if node.op == "call_method" else _function_name(node.target)
    under = name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_")
    return under or name in _IN_PLACE or node.kwargs.get("inplace") is True


def _written_node(node: Any, module: Module) -> Any:
    """The node that this one writes into; None mostly."""
    if node.op == "call_module":
        inplace = getattr(module.get_submodule(node.target), "inplace", False)
        return node.args[0] if inplace and node.args else None
    return node.args[0] if node.op in ("call_function", "call_method") and _writes(node) else None


def _may_view(node: Any, module: Module) -> bool:
    if node.op == "call_module":
        kind = type(module.get_submodule(node.target)).__name__
        return kind in ("Identity", "Flatten", "Unflatten") or "Dropout" in kind
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if node.op == "call_method" else _function_name(node.target)
    return known(name) in VIEWS or name in VIEWS or name in ("view", "detach", "contiguous")


def _needed(nodes: list[Any]) -> set[Any]:
    """The nodes that the answer depends on, and those that write into what others read."""
    needed: set[Any] = set()
    for node in reversed(nodes):
        acts = node.op in ("call_function", "call_method") and _writes(node)
        if node.op == "output" or node in needed or acts:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return needed


# Modules that are called with more than one argument, or answer more than one array


def _batch_first(self: _Reading, path: str, module: Module, x: Any) -> Any:
    """x with its rows on axis 0"""
    if module.batch_first:
        return x
    if not path:
        raise _Unknown(
            f"{type(module).__name__} has batch_first=False, so that its rows are on axis 1; here they "
            "are on axis 0: set batch_first=True"
        )
    return self._step("transpose", (x, 0, 1))


def _recurrent(self: _Reading, path: str, module: Module, given: dict[str, Any]) -> Any:
    what = self._layer(path, lambda: MODULES[type(module).__name__](module, self.take))
    states = given.get("hx")
    states = () if states is None else states if type(states) is tuple else (states,)
    turned = [self._step("transpose", (each, 0, 1)) for each in states]
    x = _batch_first(self, path, module, given["input"])
    made = self._step(what, (x, None, *turned) if turned else (x,))
    count = 3 if _kind(module) == "LSTM" else 2
    y, *last = (self._step("getitem", (made, i)) for i in range(count))
    if not path:
        return (y, *last)
    if not module.batch_first:
        y = self._step("transpose", (y, 0, 1))
    last = [self._step("transpose", (each, 0, 1)) for each in last]
    return y, (tuple(last) if len(last) > 1 else last[0])


def _cell(self: _Reading, path: str, module: Module, given: dict[str, Any]) -> Any:
    what = self._layer(path, lambda: MODULES[type(module).__name__](module, self.take))
    states = given.get("hx")
    states = () if states is None else states if type(states) is tuple else (states,)
    made = self._step(what, (given["input"], *states))
    if _kind(module) != "LSTMCell":
        return made
    return tuple(self._step("getitem", (made, i)) for i in range(2))


def _mask(
    self: _Reading, x: Any, padding: Any, attn: Any, heads: int, dtype: str
) -> tuple[Any, ...]:
    if padding is None and attn is None:
        return ()
    rows = self._step("size", (x, 0))
    return (self._step("mask_of_attention", (padding, attn, rows, heads, dtype)),)


def _attention(self: _Reading, path: str, module: Module, given: dict[str, Any]) -> Any:
    what = self._layer(path, lambda: MODULES["MultiheadAttention"](module, self.take))
    x, keys, values = (
        _batch_first(self, path, module, given[name]) for name in ("query", "key", "value")
    )
    dtype = str(module.out_proj.weight.dtype).removeprefix("torch.")
    mask = _mask(
        self, x, given.get("key_padding_mask"), given.get("attn_mask"), module.num_heads, dtype
    )
    y = self._step(what, (x, keys, values, *mask))
    if not module.batch_first:
        y = self._step("transpose", (y, 0, 1))
    return y if not path else (y, None)


def _encoder(self: _Reading, path: str, module: Module, given: dict[str, Any]) -> Any:
    what = self._layer(path, lambda: MODULES[type(module).__name__](module, self.take))
    first = module.layers[0] if hasattr(module, "layers") else module
    attention = first.self_attn
    x = _batch_first(self, path, attention, given["src"])
    dtype = str(attention.out_proj.weight.dtype).removeprefix("torch.")
    attn = given.get("mask", given.get("src_mask"))
    mask = _mask(self, x, given.get("src_key_padding_mask"), attn, attention.num_heads, dtype)
    y = self._step(what, (x, *mask))
    return y if attention.batch_first else self._step("transpose", (y, 0, 1))


_CALLS = {
    "RNN": _recurrent, "GRU": _recurrent, "LSTM": _recurrent,
    "RNNCell": _cell, "GRUCell": _cell, "LSTMCell": _cell,
    "MultiheadAttention": _attention, "TransformerEncoderLayer": _encoder,
    "TransformerEncoder": _encoder,
}  # fmt: skip

NEEDED = {name: 1 for name in _CALLS} | {"MultiheadAttention": 3}
"""How many arguments such a module takes unless `inputs` names them."""


# Modules as layers


def _bias(bias: Any, take: Take) -> Array | None:
    return None if bias is None else take(bias)


def _linear(m: Module, take: Take) -> Layer:
    return Dense.of(take(m.weight.T), _bias(m.bias, take))


def _affine(m: Module, like: Any, take: Take) -> tuple[Array, Array]:
    """gain and bias of a norm, ones and zeros where it has none"""
    return (
        take(like.new_ones(like.shape) if m.weight is None else m.weight),
        take(like.new_zeros(like.shape) if m.bias is None else m.bias),
    )


def _layer_norm(m: Module, take: Take) -> Any:
    shape = tuple(m.normalized_shape)
    if m.weight is None:
        return "layer_norm", {"shape": shape, "eps": float(m.eps)}
    if len(shape) != 1:
        raise _Unknown(f"LayerNorm over {len(shape)} axes")
    return LayerNorm.of(*_affine(m, m.weight, take), float(m.eps))


def _rms_norm(m: Module, take: Take) -> Any:
    import torch

    shape = tuple(m.normalized_shape)
    if m.weight is None:
        return "rms_norm", {"shape": shape, "eps": m.eps}
    if len(shape) != 1:
        raise _Unknown(f"RMSNorm over {len(shape)} axes")
    eps = torch.finfo(m.weight.dtype).eps if m.eps is None else m.eps
    return RMSNorm.of(take(m.weight), float(eps))


def _batch_norm(m: Module, take: Take) -> Layer:
    if m.running_mean is None:
        raise _Unknown(f"{type(m).__name__} without running statistics mixes rows")
    gain, bias = _affine(m, m.running_mean, take)
    norm = BatchNorm.of(take(m.running_mean), take(m.running_var), gain, bias, float(m.eps))
    return ChannelsFirst(norm)


def _embedding(m: Module, take: Take) -> Layer:
    if m.max_norm is not None:
        raise _Unknown("Embedding with max_norm changes its weights as it goes")
    return Embedding.of(take(m.weight))


def _flatten(m: Module, take: Take) -> Any:
    if (m.start_dim, m.end_dim) == (1, -1):
        return Flatten()
    return "flatten", {"start_dim": m.start_dim, "end_dim": m.end_dim}


def _softmax(name: str) -> Callable[[Module, Take], Any]:
    def make(m: Module, take: Take) -> Any:
        return Activation(name) if m.dim == -1 else (name, {"dim": m.dim})

    return make


def _softplus(m: Module, take: Take) -> Any:
    return Activation("softplus") if m.beta == 1 else ("softplus", {"beta": m.beta})


def _activation(name: str, **options: str) -> Callable[[Module, Take], Layer]:
    def make(m: Module, take: Take) -> Layer:
        return Activation(name, **{ours: float(getattr(m, its)) for ours, its in options.items()})

    return make


def _identity(m: Module, take: Take) -> Layer:
    rate = float(getattr(m, "p", 0.0))
    return Dropout(rate) if 0 < rate < 1 else Activation("identity")


def _in_order(tensor: Any, gates: str, wanted: str) -> Any:
    """A tensor (gates * size, ...) with its gates in another order, transposed if it is a matrix."""
    import torch

    parts = dict(zip(gates, tensor.chunk(len(gates)), strict=True))
    whole = torch.cat([parts[name] for name in wanted])
    return whole.T if whole.ndim == 2 else whole


_GATES = {"RNN": ("h", "h"), "GRU": ("rzn", "rzn"), "LSTM": ("ifgo", "ifog")}


def _cell_of(m: Module, kind: str, suffix: str, take: Take) -> Layer:
    """The cell whose weights are m.weight_ih and so on, with this suffix."""
    gates = _GATES[kind]

    def part(name: str) -> Any:
        value = getattr(m, name + suffix, None)
        return None if value is None else _in_order(value, *gates)

    x, h = take(part("weight_ih")), take(part("weight_hh"))
    bias_x, bias_h = part("bias_ih"), part("bias_hh")
    if kind == "GRU":
        return GRUCell.of(x, h, _bias(bias_x, take), _bias(bias_h, take))
    bias = None if bias_x is None else take(bias_x + bias_h)
    if kind == "RNN":
        return RNNCell.of(x, h, bias, m.nonlinearity)
    projection = getattr(m, "weight_hr" + suffix, None)
    return LSTMCell.of(x, h, bias, None if projection is None else take(projection.T))


def _stack_of(kind: str, stack: type[Layer]) -> Callable[[Module, Take], Layer]:
    def make(m: Module, take: Take) -> Layer:
        ends = ("", "_reverse") if m.bidirectional else ("",)
        suffixes = [f"_l{layer}{end}" for layer in range(m.num_layers) for end in ends]
        cells = tuple(_cell_of(m, kind, suffix, take) for suffix in suffixes)
        return stack.of(cells, m.bidirectional, "states")

    return make


def _multi_head(m: Module, take: Take) -> Layer:
    if m.bias_k is not None or m.add_zero_attn:
        raise _Unknown("MultiheadAttention with add_bias_kv or add_zero_attn")
    if m.in_proj_weight is None:
        weights = [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
    else:
        weights = list(m.in_proj_weight.chunk(3))
    biases = [None] * 3 if m.in_proj_bias is None else list(m.in_proj_bias.chunk(3))
    query, key, value = (
        Dense.of(take(weight.T), _bias(bias, take))
        for weight, bias in zip(weights, biases, strict=True)
    )
    return MultiHeadAttention.of(
        query, key, value, _linear(m.out_proj, take), m.num_heads, m.num_heads
    )


def _encoder_layer(m: Module, take: Take) -> Layer:
    from torch import nn
    from torch.nn import functional as F

    names = {F.relu: "relu", F.gelu: "gelu"}
    made = m.activation
    if isinstance(made, nn.Module):
        layer = MODULES[_kind(made)](made, take) if _kind(made) else None
        plain = isinstance(layer, Activation) and not layer.options
        name = layer.activation if plain else None
    else:
        name = names.get(made, getattr(made, "__name__", None))
    try:
        Activation(str(name))
    except OptionError:
        raise _Unknown(f"TransformerEncoderLayer with the activation {made!r:.60}") from None
    inner, outer = _linear(m.linear1, take), _linear(m.linear2, take)
    return TransformerEncoderLayer.of(
        _multi_head(m.self_attn, take),
        _layer_norm(m.norm1, take),
        Dense.of(inner.weight, inner.bias, name),
        outer,
        _layer_norm(m.norm2, take),
        bool(m.norm_first),
    )


def _encoder_stack(m: Module, take: Take) -> Layer:
    norm = None if m.norm is None else MODULES[_kind(m.norm)](m.norm, take)
    return TransformerEncoder(*(_encoder_layer(each, take) for each in m.layers), norm=norm)


MODULES: dict[str, Callable[[Module, Take], Any]] = {
    "Linear": _linear,
    "NonDynamicallyQuantizableLinear": _linear,
    "Embedding": _embedding,
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    "BatchNorm1d": _batch_norm,
    "BatchNorm2d": _batch_norm,
    "BatchNorm3d": _batch_norm,
    "RNN": _stack_of("RNN", RNN),
    "GRU": _stack_of("GRU", GRU),
    "LSTM": _stack_of("LSTM", LSTM),
    "RNNCell": lambda m, take: _cell_of(m, "RNN", "", take),
    "GRUCell": lambda m, take: _cell_of(m, "GRU", "", take),
    "LSTMCell": lambda m, take: _cell_of(m, "LSTM", "", take),
    "MultiheadAttention": _multi_head,
    "TransformerEncoderLayer": _encoder_layer,
    "TransformerEncoder": _encoder_stack,
    "Identity": _identity,
    "Dropout": _identity,
    "Dropout1d": _identity,
    "Dropout2d": _identity,
    "Dropout3d": _identity,
    "AlphaDropout": _identity,
    "FeatureAlphaDropout": _identity,
    "Flatten": _flatten,
    "Unflatten": lambda m, take: ("unflatten", {"dim": m.dim, "sizes": tuple(m.unflattened_size)}),
    "ReLU": _activation("relu"),
    "LeakyReLU": _activation("leaky_relu", negative_slope="negative_slope"),
    "ELU": _activation("elu", alpha="alpha"),
    "SELU": _activation("selu"),
    "Sigmoid": _activation("sigmoid"),
    "Tanh": _activation("tanh"),
    "SiLU": _activation("silu"),
    "Mish": _activation("mish"),
    "Softsign": _activation("softsign"),
    "Hardsigmoid": _activation("hard_sigmoid"),
    "Softplus": _softplus,
    "Softmax": _softmax("softmax"),
    "LogSoftmax": _softmax("log_softmax"),
    "GELU": lambda m, take: Activation("gelu_tanh" if m.approximate == "tanh" else "gelu"),
}
"""torch's modules: what each is here, a layer or a function with its options.

A module of images is a `ChannelsFirst` of the layer that is meant: torch has its channels on axis 1.
"""
