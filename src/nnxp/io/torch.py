"""Modules of PyTorch as nnxp models: its layers by a table, and what is between them by tracing.

torch is never imported by nnxp: who has a module has it.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nnxp._arrays import Array, float_dtype
from nnxp._errors import ConversionError, NnxpError, OptionError
from nnxp.io._torch_modules import (
    MODULES,
    Module,
    Unknown,
    activation_of,
    is_written_as_functions,
    kind_of,
)
from nnxp.layers._layer import Layer
from nnxp.layers.containers import Sequential
from nnxp.layers.dense import Dense
from nnxp.layers.torch_functions import ATTRIBUTES, FUNCTIONS, MAKERS, VIEWS, check_choices, known
from nnxp.layers.torch_graph import Constant, TorchGraph, encoded


def from_torch(
    module: Module, *, inputs: Sequence[str] | None = None, dtype: object = None
) -> Layer:
    """The model that computes what a torch module answers in eval().

    Modules in a row become a Sequential, all else a TorchGraph. The model takes what `forward`
    takes, in torch's layout: axis 0 is rows, images are (rows, channels, ...). It answers an array,
    or a tuple: nested ones are flat, of a dict the values. Parameters are copied; tied ones stay
    tied, as those of an embedding and of the dense layer that is its transpose; in a file they are
    two. A recurrent module by itself answers y and its last states, as `returns="states"` has them:
    (rows, layers * directions, size).

        net = nnxp.from_torch(torchvision.models.resnet18(weights="DEFAULT"))
        y = nnxp.predict(net, images)

    Args:
        module: any torch.nn.Module made of modules that are known here (layers in `MODULES`) and of
            functions, operators and methods between them (`nnxp.layers.torch_functions`), which
            torch.fx traces.
        inputs: the arguments of `forward` that the model takes; without it those that have no
            default. All others are at their defaults.
        dtype: of the parameters; without it their own.

    Raises:
        ConversionError: before anything is converted, with all that cannot be read.
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
            f"forward of this {type(module).__name__} is not that of its class, which would be read"
        )
    with torch.no_grad(), _evaluating(module):
        graph = _traced(module, inputs)
        return _Reader(module, None if dtype is None else float_dtype(dtype)).model(graph)


@contextmanager
def _evaluating(module: Module) -> Iterator[None]:
    """The module in eval(), and afterwards as it was."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _traced(module: Module, inputs: Sequence[str] | None) -> Any:
    """The graph of `forward`: of these arguments, all others being at their defaults."""
    import torch
    from torch import fx

    parameters = inspect.signature(module.forward).parameters
    plain = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    wanted = (
        [n for n, p in plain.items() if p.default is p.empty] if inputs is None else list(inputs)
    )
    if kind_of(module) in NEEDED and inputs is None:
        wanted = wanted[: NEEDED[kind_of(module)]]
    unknown = set(wanted) - plain.keys()
    if unknown or not wanted:
        raise OptionError(
            f"inputs names arguments of forward({', '.join(plain)}), not "
            f"{', '.join(sorted(unknown)) or 'none'}"
        )
    if kind_of(module):
        graph = fx.Graph(module)
        arguments: dict[str, Any] = {name: graph.placeholder(name) for name in wanted}
        graph.output(graph.call_module("", (), arguments))
        return graph

    class Writable(fx.Proxy):  # type: ignore[misc]  # fx itself takes x += y for x = x + y, and knows no x[...] = y
        def __setitem__(self, key: Any, value: Any) -> None:
            self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

        def __len__(self) -> int:
            count = _chunks(self.node)
            return int(super().__len__()) if count is None else count

    def writer(target: Any) -> Callable[[Any, Any], Any]:
        return lambda self, other: self.tracer.create_proxy(
            "call_function", target, (self, other), {}
        )

    for name in _IN_PLACE - {"setitem"}:
        setattr(Writable, f"__{name}__", writer(getattr(operator, name)))

    class Tracer(fx.Tracer):  # type: ignore[misc]
        trace_asserts = True
        proxy_buffer_attributes = True

        def proxy(self, node: Any) -> Any:
            return Writable(node, self)

        def iter(self, obj: Any) -> Any:
            count = _chunks(obj.node)
            return super().iter(obj) if count is None else (obj[i] for i in range(count))

        def is_leaf_module(self, inner: Module, path: str) -> bool:
            if is_written_as_functions(inner):
                return False
            return bool(kind_of(inner)) or super().is_leaf_module(inner, path)

    fixed = {n: p.default for n, p in plain.items() if n not in wanted and p.default is not p.empty}
    before = torch.get_rng_state()
    try:
        with _tracing, _sizes_together():
            graph = Tracer(autowrap_modules=(math,)).trace(module, concrete_args=fixed)
    except Exception as error:  # whatever a forward may say to arrays without numbers
        raise ConversionError(
            f"forward of {type(module).__name__} cannot be traced: {_line_of(error)}"
            f"{type(error).__name__}: {error!s:.400}. {_ROAD}"
        ) from error
    if not torch.equal(before, torch.get_rng_state()):
        raise ConversionError(
            f"forward of {type(module).__name__} draws at random, which would be a constant of the "
            "model: let it take what is drawn as an input"
        )
    for node in graph.nodes:  # what is at its default is no input
        node.meta["left out"] = node.op == "placeholder" and node.target not in wanted
    return graph


def _chunks(node: Any) -> int | None:
    """How many arrays a node answers that is x.chunk(n), which from now on refuses an x that is too
    short for as many; None for another."""
    if node.op not in ("call_function", "call_method") or _called(node) != "chunk":
        return None
    count = node.kwargs.get("chunks", *node.args[1:2])
    if not isinstance(count, int):
        return None
    node.update_kwarg("counted", True)
    return count


_tracing = threading.RLock()
"""Held while a module is traced, for which functions of torch's are replaced for all threads."""


@contextmanager
def _sizes_together() -> Iterator[None]:
    """Within the block torch.zeros(n, 3) is torch.zeros((n, 3)), as fx traces it."""
    import torch

    names = "zeros", "ones", "empty"
    makers = {name: getattr(torch, name) for name in names}

    def together(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *sizes, **options: make(
            *(sizes[:1] if len(sizes) < 2 else [sizes]), **options
        )

    for name, make in makers.items():
        setattr(torch, name, together(make))
    try:
        yield
    finally:
        for name, make in makers.items():
            setattr(torch, name, make)


def _line_of(error: BaseException) -> str:
    """Where in a module's own code a trace came to its end: its file, line and words."""
    lines = traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if not any(home in line.filename for home in _NOT_ITS_OWN)]
    return f"{own[-1].filename}, line {own[-1].lineno}, {own[-1].line!r:.100}: " if own else ""


_NOT_ITS_OWN = os.path.join("torch", "fx", ""), os.path.join("torch", "nn", "modules", ""), __file__


def _makes_weight(hook: Any) -> bool:
    """Whether a hook makes a module's weight of its parts, and nothing else."""
    return type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")


_ROAD = "torch.onnx.export writes such a module as ONNX, which nnxp.load_onnx reads"


class _Reader:
    """A graph of torch.fx, node by node, as the steps of a TorchGraph."""

    def __init__(self, module: Module, dtype: Any) -> None:
        self.module, self.dtype = module, dtype
        self.layers: list[Layer] = []
        self.steps: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.inputs: tuple[str, ...] = ()
        self.problems: list[str] = []
        self.values: dict[Any, Any] = {}  # by node: a value, a tuple of them, or a plain number
        self._arrays: dict[Any, tuple[Array, Any]] = {}
        self._names: dict[str, Any] = {}
        self._same: dict[Any, list[Any]] = {}  # of a node: those that are the same tensor

    def model(self, graph: Any) -> Layer:
        nodes = list(graph.nodes)
        taken = [n for n in nodes if n.op == "placeholder" and not n.meta.get("left out")]
        self.inputs = tuple(node.target for node in taken)
        self.values.update((node, {"value": i}) for i, node in enumerate(taken))
        needed = _needed(nodes, self.module)
        self._refuse_hidden_writes(nodes)
        answer: Any = None
        for node in nodes:
            if node.op == "placeholder" or node not in needed:
                continue
            if node.op == "output":
                answer = self._value(node.args[0])
            else:
                try:
                    self.values[node] = self._node(node)
                except (Unknown, NnxpError) as error:
                    self.problems.append(f"{_where(node)}: {error}")
                    self.values[node] = {"value": -1}
        answers = tuple(_flat(answer))
        if not all(_is_value(value) for value in answers):
            self.problems.append(f"the answer is no array: {answers!r:.80}")
        if self.problems:
            name = type(self.module).__name__
            problems = "; ".join(dict.fromkeys(self.problems))
            raise ConversionError(f"from_torch cannot read {name}: {problems}. {_ROAD}")
        return self._finished(answers)

    # one node

    def _node(self, node: Any) -> Any:
        args = [self._value(x) for x in node.args]
        options = {name: self._value(x) for name, x in node.kwargs.items()}
        if node.op == "get_attr":
            return self._constant(node.target)
        if node.op == "call_module":
            module = self.module.get_submodule(node.target)
            result = self._module(node.target, module, args, options)
            if getattr(module, "inplace", False):
                self._written(node, result)
            return result
        name = _called(node)
        if name in ("getitem", "setitem") and isinstance(node.args[1], list):
            args[1] = (args[1],)  # x[[0, 1]] is x[[0, 1],], not x[0, 1]
        if name == "getitem" and type(args[0]) is tuple and isinstance(args[1], int):
            return args[0][args[1]]
        if node.op == "call_method" and type(args[0]) is tuple:
            raise Unknown(f"method {name} of several arrays, of which one is to be picked")
        inplace = _writes(node)
        in_place_form = inplace and name.endswith("_") and not name.endswith("__")
        own = known(name.removesuffix("_") if in_place_form else name)
        if not own and name.endswith("_with_indices"):
            raise Unknown(f"function {name.removesuffix('_with_indices')} with return_indices=True")
        if not own:
            raise Unknown(f"{'method' if node.op == 'call_method' else 'function'} {name}")
        options.pop("inplace", None)
        of_weights = own == "batch_norm" and self._is_constant(args[0])
        result = self._step(own, *_arguments(own, args, options, {} if of_weights else _ONLY))
        if inplace:
            self._written(node, result)
        return result

    def _value(self, x: Any) -> Any:
        """An argument of a node: a value, a plain one, or a tuple of them."""
        import torch
        from torch import fx

        if isinstance(x, fx.Node):
            if x not in self.values:
                raise Unknown(f"it looks at {x.name}, which is not among the inputs")
            return self.values[x]
        if isinstance(x, slice):
            return {"slice": tuple(self._value(bound) for bound in (x.start, x.stop, x.step))}
        if isinstance(x, dict):
            return {name: self._value(item) for name, item in x.items()}
        if isinstance(x, tuple | list):
            return tuple(self._value(item) for item in x)
        if isinstance(x, torch.dtype):
            return str(x)
        if isinstance(x, torch.device | torch.memory_format):
            return None
        if isinstance(x, torch.Tensor):
            return self._constant_step(x)
        return encoded(x)

    def _step(self, what: str, args: Sequence[Any], options: dict[str, Any] | None = None) -> Any:
        self.steps.append((what, tuple(args), options or {}))
        return {"value": len(self.inputs) + len(self.steps) - 1}

    def _is_constant(self, value: Any) -> bool:
        """Whether a value follows from constants alone."""
        left, seen = [value], set[int]()
        while left:
            numbers = {leaf["value"] for leaf in _flat(left.pop()) if _is_value(leaf)} - seen
            if any(number < len(self.inputs) for number in numbers):
                return False
            seen |= numbers
            for number in numbers:
                _, arguments, options = self.steps[number - len(self.inputs)]
                left += [arguments, tuple(options.values())]
        return True

    def _layer(self, path: str, make: Callable[[], Layer]) -> str:
        """The step that calls this layer, which is made once for each path."""
        if path not in self._names:
            self.layers.append(make())
            self._names[path] = f"layers.{len(self.layers) - 1}"
        return str(self._names[path])

    def _constant(self, target: str) -> Any:
        value: Any = self.module
        for name in target.split("."):
            value = getattr(value, name)
        return self._constant_step(value)

    def _constant_step(self, tensor: Any) -> Any:
        import torch

        learns = isinstance(tensor, torch.nn.Parameter)
        number = self._layer(
            f"constant {id(tensor)}", lambda: Constant(self.take(tensor), learns=learns)
        )
        return self._step(number.replace("layers", "constant"), ())

    def take(self, tensor: Any) -> Array:
        """A tensor's numbers in an array of ours, once for tensors that share their memory, even if
        one is the other transposed; a list of numbers in the type of the module's first floats."""
        import torch

        if isinstance(tensor, list):
            tensors = [*self.module.parameters(), *self.module.buffers()]
            own = next((str(x.dtype) for x in tensors if x.is_floating_point()), "float32")
            return np.array(tensor, self.dtype or float_dtype(own.removeprefix("torch.")))
        tensor = tensor.detach()
        key = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
        turned = *key[:2], *(sizes[::-1] for sizes in key[2:])
        if tensor.ndim == 2 and turned != key and turned in self._arrays:  # as an embedding's is
            return self._arrays[turned][0].T
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
        kind = kind_of(module)
        if not kind:
            raise Unknown(f"torch has {type(module).__name__}, which has no counterpart here")
        if module._forward_hooks or not all(map(_makes_weight, module._forward_pre_hooks.values())):
            raise Unknown(f"{type(module).__name__} has hooks")
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
        names = list(inspect.signature(module.forward).parameters)
        arguments = dict(zip(names, args, strict=False)) | options
        special = _CALLS.get(kind)
        if special is not None:
            return special(self, path, module, arguments)
        counterpart = MODULES[kind](module, self.take)
        if isinstance(counterpart, tuple):  # a function with these options
            options = {name: self._value(option) for name, option in counterpart[1].items()}
            return self._step(counterpart[0], list(arguments.values()), options)
        return self._step(self._layer(path, lambda: counterpart), list(arguments.values()))

    def part(self, path: str, read: Callable[..., Any], *args: Any) -> Any:
        """What `read(*args)` answers for a part of a module; a value that stands for it where it
        cannot be read, which is noted, so that the parts behind it are looked at, too."""
        try:
            return read(*args)
        except (Unknown, NnxpError) as error:
            self.problems.append(f"{path or 'the module'}: {error}")
            return {"value": -1}

    # what writes into its argument

    def _written(self, node: Any, result: Any) -> None:
        """All that are the tensor written into by this node now stand for what it wrote."""
        target = node.args[0]
        same = self._same[node] = self._same.setdefault(target, [target])
        same.append(node)
        self.values.update(dict.fromkeys(same, result))

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
        """The steps as a model, of the simplest kind that says it all."""
        in_a_row = len(self.inputs) == 1 and all(
            what.startswith("layers.") and args == ({"value": i},) and not options
            for i, (what, args, options) in enumerate(self.steps)
        )
        if in_a_row and answers == ({"value": len(self.steps)},):
            layers = [self.layers[int(what.partition(".")[2])] for what, *_ in self.steps]
            return layers[0] if len(layers) == 1 else Sequential(*layers)
        places = range(len(self.inputs))
        kinds = tuple(_kind_of_input({"value": i}, self.steps, self.layers) for i in places)
        return TorchGraph.of(tuple(self.layers), tuple(self.steps), answers, kinds, self.inputs)


def _kind_of_input(value: Any, steps: Sequence[Any], layers: Sequence[Layer]) -> str:
    """What an input is: as the layer takes it that it goes into, else anything."""
    for what, args, _ in steps:
        if what == "embedding" and args[0] == value:
            return "int"
        if what.startswith("layers.") and value in args:
            takes = layers[int(what.partition(".")[2])].takes
            place = args.index(value)
            return takes[place] if place < len(takes) else "float"
    return "any"


_NAMES = {"axis": "dim", "keepdims": "keepdim"}
_FIRST = ("input", "self", "tensors", "tensor")
_SEVERAL = {"permute": "dims", "flip": "dims", "expand": "size", "repeat": "repeats",
            "tile": "dims", "reshape": "shape"}  # fmt: skip
"""Functions of any number of sizes or axes, by the name that torch has for all of them."""
_ONLY = {"return_indices": False, "divisor_override": None, "training": False,
         "use_input_stats": True, "offsets": None, "max_norm": None,
         "padding_idx": None}  # fmt: skip
"""Options that are known at one value."""


def _arguments(
    name: str, args: list[Any], options: dict[str, Any], only: dict[str, Any]
) -> tuple[list[Any], Any]:
    """The arguments of a function as it takes them here; Unknown for what it does not take."""
    function = MAKERS.get(name) or FUNCTIONS[name]
    takes = inspect.signature(function).parameters
    first = [options.pop(key) for key in _FIRST if key in options and key not in takes]
    second = [
        options.pop(key)
        for key in ("other", "mask")
        if key in options and key not in takes and not args[1:]
    ]
    several = [options.pop(key) for key in (_SEVERAL.get(name),) if key in options]
    args = [*first, *args, *second, *several]
    options = {_NAMES.get(key, key): value for key, value in options.items()}
    if options.get("out", ...) is None:
        del options["out"]
    lead = [None] if name in MAKERS else []
    try:
        bound = inspect.signature(function).bind(*lead, *args, **options).arguments
    except (TypeError, ValueError) as error:
        raise Unknown(f"function {name} with arguments not known here: {error}") from None
    if name == "dropout" and bound.get("training", True) is not False:
        raise Unknown("function dropout without training=self.training, which drops in eval(), too")
    for option, value in only.items():
        if bound.get(option, value) != value:
            raise Unknown(f"function {name} with {option}={bound[option]}")
    check_choices(name, bound)
    if name == "one_hot" and bound.get("num_classes", -1) == -1:
        raise Unknown("function one_hot without num_classes, whose shape depends on the numbers")
    if name == "getattr" and args[1] not in ATTRIBUTES:
        raise Unknown(f"attribute {args[1]}")
    return args, options


def _is_value(x: Any) -> bool:
    return type(x) is dict and x.keys() == {"value"}


def _flat(x: Any) -> Iterator[Any]:
    if isinstance(x, tuple | list):
        for item in x:
            yield from _flat(item)
    elif type(x) is dict and not _is_value(x):
        for item in x.values():
            yield from _flat(item)
    elif x is not None:
        yield x


def _where(node: Any) -> str:
    """Where in the module a node stands."""
    if node.op == "call_module":
        return str(node.target) or "the module"
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f"forward of {path}" if path else "forward"


def _called(node: Any) -> str:
    """The name of the function or the method that a node calls."""
    if node.op == "call_method":
        return f"tensor_{node.target}" if node.target in _OWN_METHODS else str(node.target)
    target = node.target
    name = str(getattr(target, "__name__", target))
    home = str(getattr(target, "__module__", "") or "")
    ours = home.split(".")[0] in ("torch", "_operator", "builtins", "math", "")
    return name if ours else f"{home}.{name}"


_OWN_METHODS = frozenset(["unfold", "where"])
"""Methods that take other arguments than torch's functions of these names."""
_IN_PLACE = frozenset(["iadd", "isub", "imul", "itruediv", "setitem"])
_SIZES = frozenset(["size", "dim", "numel", "nelement", "ndimension"])


def _is_number(x: Any) -> bool:
    """Whether an argument is a number, or a size of an array, which nobody writes into."""
    if not hasattr(x, "op"):
        return not isinstance(x, tuple | list)
    if x.op == "call_method":
        return x.target in _SIZES
    if x.op != "call_function":
        return False
    name = _called(x)
    if name == "getattr":
        return x.args[1] in ("shape", "ndim")
    return name in ("getitem", *dir(operator)) and all(map(_is_number, x.args))


def _writes(node: Any) -> bool:
    """Whether a function or method writes into its first argument."""
    if node.args and _is_number(node.args[0]):
        return False
    name = _called(node)
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
    name = _called(node)
    if name == "getattr":
        return node.args[1] in ("T", "mT")
    return name != "clone" and known(name) in VIEWS


def _needed(nodes: list[Any], module: Module) -> set[Any]:
    """The nodes that the answer depends on; among them those that write into an array which one of
    them looks at later."""
    array: dict[Any, Any] = {}  # of a node: the first that is the same array
    for node in nodes:
        target = _written_node(node, module)
        array[node] = node if target is None else array[target]
    needed, arrays = set[Any](), set[Any]()
    for node in reversed(nodes):
        writes = array[node] is not node and array[node] in arrays
        if node.op == "output" or node in needed or writes:
            needed |= {node, *node.all_input_nodes}
            arrays.update(array[n] for n in node.all_input_nodes)
    return needed


# Modules that are called with more than one argument, or answer more than one array


def _batch_first(self: _Reader, path: str, module: Module, x: Any) -> Any:
    """x with its rows on axis 0"""
    if module.batch_first:
        return x
    if not path:
        raise Unknown(
            f"{type(module).__name__} has batch_first=False, so that its rows are on axis 1; here "
            "they are on axis 0: set batch_first=True"
        )
    return _swapped(self, x)


def _swapped(self: _Reader, x: Any) -> Any:
    """x with its first two axes exchanged: rows and time"""
    return self._step("transpose", (x, 0, 1))


def _states(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The states that a recurrent module is called with."""
    states = arguments.get("hx")
    return () if states is None else states if type(states) is tuple else (states,)


def _recurrent(self: _Reader, path: str, module: Module, arguments: dict[str, Any]) -> Any:
    what = self._layer(path, lambda: MODULES[type(module).__name__](module, self.take))
    turned = [_swapped(self, state) for state in _states(arguments)]
    x = _batch_first(self, path, module, arguments["input"])
    result = self._step(what, (x, None, *turned) if turned else (x,))
    count = 3 if kind_of(module) == "LSTM" else 2
    y, *last = (self._step("getitem", (result, i)) for i in range(count))
    if not path:
        return (y, *last)
    y = y if module.batch_first else _swapped(self, y)
    last = [_swapped(self, state) for state in last]
    return y, (tuple(last) if len(last) > 1 else last[0])


def _cell(self: _Reader, path: str, module: Module, arguments: dict[str, Any]) -> Any:
    what = self._layer(path, lambda: MODULES[type(module).__name__](module, self.take))
    result = self._step(what, (arguments["input"], *_states(arguments)))
    if kind_of(module) != "LSTMCell":
        return result
    return tuple(self._step("getitem", (result, i)) for i in range(2))


def _mask(self: _Reader, x: Any, padding: Any, attn: Any, attention: Module) -> tuple[Any, ...]:
    """The mask of a MultiheadAttention, for rows like x; nothing where there is none."""
    if padding is None and attn is None:
        return ()
    heads, dtype = attention.num_heads, str(attention.out_proj.weight.dtype)
    arguments = padding, attn, self._step("size", (x, 0)), heads, dtype.removeprefix("torch.")
    return (self._step("mask_of_attention", arguments),)


def _attention(self: _Reader, path: str, module: Module, arguments: dict[str, Any]) -> Any:
    arrays = [
        _batch_first(self, path, module, arguments[name]) for name in ("query", "key", "value")
    ]
    masks = arguments.get("key_padding_mask"), arguments.get("attn_mask")
    y = _attended(self, path, module, arrays, *masks)
    y = y if module.batch_first else _swapped(self, y)
    return y if not path else (y, None)


def _attended(
    self: _Reader, path: str, module: Module, arrays: Sequence[Any], padding: Any, attn: Any
) -> Any:
    """What MultiheadAttention makes of a query, keys and values with their rows on axis 0."""
    what = self._layer(path, lambda: MODULES["MultiheadAttention"](module, self.take))
    return self._step(what, (*arrays, *_mask(self, arrays[0], padding, attn, module)))


def _encoder(self: _Reader, path: str, module: Module, arguments: dict[str, Any]) -> Any:
    what = self._layer(path, lambda: MODULES[type(module).__name__](module, self.take))
    first = module.layers[0] if hasattr(module, "layers") else module
    attention = first.self_attn
    x = _batch_first(self, path, attention, arguments["src"])
    attn = arguments.get("mask", arguments.get("src_mask"))
    mask = _mask(self, x, arguments.get("src_key_padding_mask"), attn, attention)
    y = self._step(what, (x, *mask))
    return y if attention.batch_first else _swapped(self, y)


def _decoder(self: _Reader, path: str, module: Module, arguments: dict[str, Any]) -> Any:
    """norm(last(... first(tgt, memory))), of one layer or a stack of them"""
    stack = hasattr(module, "layers")
    layers = dict(module.layers.named_children()) if stack else {"": module}
    if strangers := {type(m).__name__ for m in layers.values()} - {"TransformerDecoderLayer"}:
        raise Unknown(f"{type(module).__name__} of {', '.join(sorted(strangers))}")
    attention = next(iter(layers.values())).self_attn
    x, memory = (_batch_first(self, path, attention, arguments[name]) for name in ("tgt", "memory"))
    for name, layer in layers.items():
        inner = ".".join(filter(None, (path, f"layers.{name}" if stack else "")))
        x = _decoded(self, inner, layer, x, memory, arguments)
    if getattr(module, "norm", None) is not None:
        at = _below(path, "norm")
        x = self.part(at, self._module, at, module.norm, [x], {})
    return x if attention.batch_first else _swapped(self, x)


def _decoded(
    self: _Reader, path: str, module: Module, x: Any, memory: Any, arguments: dict[str, Any]
) -> Any:
    """One layer of a decoder: attention to itself, to the memory, and the inner layers; each is
    added to what it takes, which is normed before it or after."""

    def attend(to: str, x: Any, seen: Any) -> Any:
        name = {"tgt": "self_attn", "memory": "multihead_attn"}[to]
        masks = arguments.get(f"{to}_key_padding_mask"), arguments.get(f"{to}_mask")
        inner, at = getattr(module, name), _below(path, name)
        return self.part(at, _attended, self, at, inner, [x, seen, seen], *masks)

    def hidden(x: Any) -> Any:
        activation = activation_of(module.activation, self.take)
        first = MODULES["Linear"](module.linear1, self.take)
        inner = Dense.of(first.weight, first.bias, activation)
        what = self._layer(_below(path, "linear1 and its activation"), lambda: inner)
        return self._step(what, (x,))

    def feed(x: Any) -> Any:
        return through("linear2", self.part(_below(path, "activation"), hidden, x))

    def through(name: str, x: Any) -> Any:
        at = _below(path, name)
        return self.part(at, self._module, at, getattr(module, name), [x], {})

    parts: list[Callable[[Any], Any]] = [
        lambda x: attend("tgt", x, x),
        lambda x: attend("memory", x, memory),
        feed,
    ]
    for i, part in enumerate(parts, 1):
        if module.norm_first:
            x = self._step("add", (x, part(through(f"norm{i}", x))))
        else:
            x = through(f"norm{i}", self._step("add", (x, part(x))))
    return x


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _transformer(self: _Reader, path: str, module: Module, arguments: dict[str, Any]) -> Any:
    """decoder(tgt, encoder(src))"""
    _batch_first(self, path, module, arguments["src"])  # which refuses what it does
    parts = {"encoder": module.encoder, "decoder": module.decoder}
    for name, part in parts.items():
        if kind_of(part) != f"Transformer{name.capitalize()}":
            raise Unknown(f"Transformer with the {name} {type(part).__name__}")
    source = {
        "src": arguments["src"],
        "mask": arguments.get("src_mask"),
        "src_key_padding_mask": arguments.get("src_key_padding_mask"),
    }
    at = _below(path, "encoder")
    memory = self.part(at, _encoder, self, at, module.encoder, source)
    return _decoder(self, _below(path, "decoder"), module.decoder, arguments | {"memory": memory})


_CALLS = {
    "RNN": _recurrent, "GRU": _recurrent, "LSTM": _recurrent,
    "RNNCell": _cell, "GRUCell": _cell, "LSTMCell": _cell,
    "MultiheadAttention": _attention, "TransformerEncoderLayer": _encoder,
    "TransformerEncoder": _encoder, "TransformerDecoderLayer": _decoder,
    "TransformerDecoder": _decoder, "Transformer": _transformer,
}  # fmt: skip

NEEDED = dict.fromkeys(_CALLS, 1) | {"MultiheadAttention": 3}
NEEDED |= {"TransformerDecoderLayer": 2, "TransformerDecoder": 2, "Transformer": 2}
"""How many arguments such a module takes unless `inputs` names them."""
