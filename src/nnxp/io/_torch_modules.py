"""torch's modules as layers: the table that `nnxp.from_torch` looks in.

An entry takes the module, and what turns a tensor into an array of ours; it answers a layer, or the
name of a function in `nnxp.layers.torch_functions` with its options.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nnxp._arrays import Array
from nnxp._errors import OptionError
from nnxp.kernels import ActivationName
from nnxp.layers._layer import Layer
from nnxp.layers.activation import GLU, Activation, PReLU
from nnxp.layers.attention import MultiHeadAttention, TransformerEncoder, TransformerEncoderLayer
from nnxp.layers.conv import Conv, ConvTranspose
from nnxp.layers.dense import Dense
from nnxp.layers.dropout import Dropout
from nnxp.layers.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from nnxp.layers.pool import AdaptiveAveragePool, AdaptiveMaxPool, AveragePool, MaxPool
from nnxp.layers.positions import Embedding
from nnxp.layers.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from nnxp.layers.resize import PixelShuffle
from nnxp.layers.shape import Flatten
from nnxp.layers.torch_functions import check_choices
from nnxp.layers.torch_graph import ChannelsFirst

Module = Any
Take = Callable[[Any], Array]


class Unknown(Exception):
    """Something in a module that has no counterpart."""


def kind_of(module: Module) -> str:
    """The name of a module of torch's in the table; "" for one that is not there."""
    from torch.nn.utils import parametrize

    cls = type(module)
    if parametrize.is_parametrized(module):
        cls = cls.__mro__[1]
    known = cls.__module__.startswith("torch.nn.") and cls.__name__ in (*MODULES, *WRITTEN_OUT)
    return cls.__name__ if known and not is_written_as_functions(module) else ""


FUNCTIONAL = frozenset(
    """Bilinear ChannelShuffle CosineSimilarity EmbeddingBag LocalResponseNorm PixelUnshuffle RReLU
    Softmin Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d""".split()
    + [f"{kind}{n}d" for n in (1, 2, 3) for kind in ("LPPool", "ConstantPad", "ZeroPad",
                                                     "ReflectionPad", "ReplicationPad")]
)  # fmt: skip
"""Modules whose forward is one function, by which they are read."""


def is_written_as_functions(module: Module) -> bool:
    """Whether a module of torch's is read by what its forward calls."""
    cls = type(module)
    padded = getattr(module, "padding_mode", "zeros") != "zeros"  # by a function before it
    return cls.__module__.startswith("torch.nn.") and (padded or cls.__name__ in FUNCTIONAL)


def _bias(bias: Any, take: Take) -> Array | None:
    return None if bias is None else take(bias)


def _linear(m: Module, take: Take) -> Dense:
    return Dense.of(take(m.weight.T), _bias(m.bias, take))


def _affine(m: Module, size: int, take: Take) -> tuple[Array, Array]:
    """gain and bias of a norm, ones and zeros where it has none"""
    return (
        take([1.0] * size if m.weight is None else m.weight),
        take([0.0] * size if m.bias is None else m.bias),
    )


def _layer_norm(m: Module, take: Take) -> Any:
    shape = tuple(m.normalized_shape)
    if m.weight is None or len(shape) != 1:
        options = {"shape": shape, "weight": m.weight, "bias": m.bias, "eps": float(m.eps)}
        return "layer_norm", options
    return LayerNorm.of(*_affine(m, shape[0], take), float(m.eps))


def _rms_norm(m: Module, take: Take) -> Any:
    import torch

    shape = tuple(m.normalized_shape)
    if m.weight is None or len(shape) != 1:
        return "rms_norm", {"shape": shape, "weight": m.weight, "eps": m.eps}
    eps = torch.finfo(m.weight.dtype).eps if m.eps is None else m.eps
    return RMSNorm.of(take(m.weight), float(eps))


def _batch_norm(m: Module, take: Take) -> Layer:
    if m.running_mean is None:
        raise Unknown(f"{type(m).__name__} without running statistics mixes rows")
    gain, bias = _affine(m, m.num_features, take)
    norm = BatchNorm.of(take(m.running_mean), take(m.running_var), gain, bias, float(m.eps))
    return ChannelsFirst(norm)


def _axes(m: Module) -> int:
    """How many axes of space a module is for: `Conv2d` has two."""
    return int(type(m).__name__[-2])


def _per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """An option for each axis."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * axes


def _window_of_conv(m: Module) -> Any:
    """torch's weight is (outputs, channels / groups, *window)."""
    return m.weight.permute(*range(2, m.weight.ndim), 1, 0)


def _window_of_conv_transpose(m: Module) -> Any:
    """torch's weight is (channels, outputs / groups, *window)."""
    channels, outputs, *window = m.weight.shape
    apart = m.weight.reshape(m.groups, channels // m.groups, outputs, *window)
    axes = range(3, 3 + len(window))
    return apart.permute(*axes, 1, 0, 2).reshape(*window, channels // m.groups, -1)


def _convolution(
    kind: type[Layer], window_of: Callable[[Module], Any], *more: str
) -> Callable[[Module, Take], Layer]:
    names = ("stride", "padding", "dilation", "groups", *more)

    def make(m: Module, take: Take) -> Layer:
        options = {name: getattr(m, name) for name in names}
        return ChannelsFirst(kind.of(take(window_of(m)), _bias(m.bias, take), **options))

    return make


def _pool(kind: Callable[..., Layer], *options: str) -> Callable[[Module, Take], Layer]:
    def make(m: Module, take: Take) -> Layer:
        name, axes = type(m).__name__, _axes(m)
        if getattr(m, "return_indices", False) or getattr(m, "divisor_override", None):
            raise Unknown(f"{name} with return_indices or divisor_override")
        values = {option: getattr(m, option) for option in options}
        stride = m.kernel_size if m.stride is None else m.stride
        window = _per_axis(m.kernel_size, axes)
        return ChannelsFirst(kind(window, stride=_per_axis(stride, axes), **values))

    return make


def _adaptive(kind: Callable[..., Layer]) -> Callable[[Module, Take], Layer]:
    return lambda m, take: ChannelsFirst(kind(_per_axis(m.output_size, _axes(m))))


def _group_norm(m: Module, take: Take) -> Layer:
    gain, bias = _affine(m, m.num_channels, take)
    return ChannelsFirst(GroupNorm.of(gain, bias, m.num_groups, float(m.eps)))


def _instance_norm(m: Module, take: Take) -> Layer:
    if m.track_running_stats:
        return _batch_norm(m, take)
    gain, bias = _affine(m, m.num_features, take)
    return ChannelsFirst(InstanceNorm.of(gain, bias, float(m.eps)))


def _glu(m: Module, take: Take) -> Layer:
    if m.dim not in (-1, 1):
        raise Unknown(f"GLU along axis {m.dim}")
    return GLU() if m.dim == -1 else ChannelsFirst(GLU())


def _embedding(m: Module, take: Take) -> Layer:
    if m.max_norm is not None:
        raise Unknown("Embedding with max_norm changes its weights as it goes")
    return Embedding.of(take(m.weight))


def _flatten(m: Module, take: Take) -> Any:
    if (m.start_dim, m.end_dim) == (1, -1):
        return Flatten()
    return "flatten", {"start_dim": m.start_dim, "end_dim": m.end_dim}


def _softmax(name: ActivationName) -> Callable[[Module, Take], Any]:
    def make(m: Module, take: Take) -> Any:
        return Activation(name) if m.dim == -1 else (name, {"dim": m.dim})

    return make


def _softplus(m: Module, take: Take) -> Any:
    if m.beta == 1 and m.threshold >= 20:
        return Activation("softplus")
    return "softplus", {"beta": m.beta, "threshold": m.threshold}


def _activation(name: ActivationName, *options: str) -> Callable[[Module, Take], Layer]:
    return lambda m, take: Activation(name, **{o: float(getattr(m, o)) for o in options})


def _identity(m: Module, take: Take) -> Layer:
    rate = float(getattr(m, "p", 0.0))
    return Dropout(rate) if 0 < rate < 1 else Activation("identity")


def _in_order(tensor: Any, gates: str, wanted: str) -> Any:
    """A tensor (gates * size, ...) with its gates in another order, a matrix transposed."""
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
        raise Unknown("MultiheadAttention with add_bias_kv or add_zero_attn")
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


def activation_of(activation: Any, take: Take) -> str:
    """The name of an activation that is a module or a function of torch's."""
    layer: Any = None
    if hasattr(activation, "forward"):
        layer = MODULES[kind_of(activation)](activation, take) if kind_of(activation) else None
    elif str(getattr(activation, "__module__", "torch") or "torch").startswith("torch"):
        with suppress(OptionError):
            layer = Activation.of(getattr(activation, "__name__", ""), {})
    plain = isinstance(layer, Activation) and not layer.options
    if not plain or "softmax" in layer.activation:
        raise Unknown(f"the activation {activation!r:.60}")
    return str(layer.activation)


def _all(parts: list[tuple[Callable[..., Any], Module]], take: Take) -> list[Any]:
    """What each of these makes of its part; Unknown with all that cannot be read."""
    layers, problems = [], []
    for make, part in parts:
        try:
            layers.append(make(part, take))
        except Unknown as error:
            problems.append(str(error))
    if problems:
        raise Unknown("; ".join(problems))
    return layers


def _norm_of_encoder(m: Module, take: Take) -> Layer:
    norm = _layer_norm(m, take) if kind_of(m) == "LayerNorm" else None
    if not isinstance(norm, Layer):
        raise Unknown(f"an encoder with the norm {m!r:.60}")
    return norm


def _encoder_layer(m: Module, take: Take) -> Layer:
    attention, norm1, name, inner, outer, norm2 = _all(
        [
            (_multi_head, m.self_attn), (_norm_of_encoder, m.norm1),
            (activation_of, m.activation), (_linear, m.linear1), (_linear, m.linear2),
            (_norm_of_encoder, m.norm2),
        ], take,
    )  # fmt: skip
    inner = Dense.of(inner.weight, inner.bias, name)
    return TransformerEncoderLayer.of(attention, norm1, inner, outer, norm2, bool(m.norm_first))


def _encoder_stack(m: Module, take: Take) -> Layer:
    if any(kind_of(layer) != "TransformerEncoderLayer" for layer in m.layers):
        raise Unknown("TransformerEncoder of layers that are not torch's own")
    norm = None if m.norm is None else kind_of(m.norm) and MODULES[kind_of(m.norm)](m.norm, take)
    if not (norm is None or isinstance(norm, Layer)):
        raise Unknown(f"TransformerEncoder with the norm {m.norm!r:.60}")
    layers = _all([(_encoder_layer, layer) for layer in m.layers], take)
    return TransformerEncoder(*layers, norm=norm)


def _gelu(m: Module, take: Take) -> Layer:
    check_choices("gelu", {"approximate": m.approximate})
    return Activation("gelu_tanh" if m.approximate == "tanh" else "gelu")


WRITTEN_OUT = "TransformerDecoderLayer", "TransformerDecoder", "Transformer"
"""Modules that become several steps: of the modules they are made of, and of what is between."""

PLAIN_ACTIVATIONS: dict[str, ActivationName] = {
    "Hardsigmoid": "hard_sigmoid", "Hardswish": "hard_swish", "LogSigmoid": "log_sigmoid",
    "Mish": "mish", "ReLU": "relu", "ReLU6": "relu6", "SELU": "selu", "SiLU": "silu",
    "Sigmoid": "sigmoid", "Softsign": "softsign", "Tanh": "tanh", "Tanhshrink": "tanh_shrink",
}  # fmt: skip
"""Activations without options, by torch's names."""

MODULES: dict[str, Callable[[Module, Take], Any]] = {
    "Linear": _linear,
    "NonDynamicallyQuantizableLinear": _linear,
    "Embedding": _embedding,
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    **{f"BatchNorm{n}d": _batch_norm for n in (1, 2, 3)},
    **{f"Conv{n}d": _convolution(Conv, _window_of_conv) for n in (1, 2, 3)},
    **{
        f"ConvTranspose{n}d": _convolution(
            ConvTranspose, _window_of_conv_transpose, "output_padding"
        )
        for n in (1, 2, 3)
    },
    **{f"MaxPool{n}d": _pool(MaxPool, "padding", "dilation", "ceil_mode") for n in (1, 2, 3)},
    **{
        f"AvgPool{n}d": _pool(AveragePool, "padding", "ceil_mode", "count_include_pad")
        for n in (1, 2, 3)
    },
    **{f"AdaptiveAvgPool{n}d": _adaptive(AdaptiveAveragePool) for n in (1, 2, 3)},
    **{f"AdaptiveMaxPool{n}d": _adaptive(AdaptiveMaxPool) for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": _instance_norm for n in (1, 2, 3)},
    "GroupNorm": _group_norm,
    "PixelShuffle": lambda m, take: ChannelsFirst(PixelShuffle(_per_axis(m.upscale_factor, 2))),
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
    **{f"Dropout{n}d": _identity for n in (1, 2, 3)},
    "AlphaDropout": _identity,
    "FeatureAlphaDropout": _identity,
    "Flatten": _flatten,
    "Unflatten": lambda m, take: ("unflatten", {"dim": m.dim, "sizes": tuple(m.unflattened_size)}),
    **{name: _activation(ours) for name, ours in PLAIN_ACTIVATIONS.items()},
    "LeakyReLU": _activation("leaky_relu", "negative_slope"),
    "ELU": _activation("elu", "alpha"),
    "Hardtanh": _activation("hard_tanh", "min_val", "max_val"),
    "CELU": _activation("celu", "alpha"),
    "Softshrink": _activation("soft_shrink", "lambd"),
    "Hardshrink": _activation("hard_shrink", "lambd"),
    "Threshold": _activation("threshold", "threshold", "value"),
    "PReLU": lambda m, take: ChannelsFirst(PReLU.of(take(m.weight))),
    "GLU": _glu,
    "Softplus": _softplus,
    "Softmax": _softmax("softmax"),
    "LogSoftmax": _softmax("log_softmax"),
    "Softmax2d": lambda m, take: ("softmax", {"dim": -3}),
    "GELU": _gelu,
}
"""torch's modules: what each is here, a layer or a function with its options.

A module of images is a `ChannelsFirst` of the layer that is meant: torch's channels are on axis 1.
"""
