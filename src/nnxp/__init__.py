"""nnxp: one neural network, written once, on NumPy or on CuPy."""

__version__ = "0.2.0"

from typing import TYPE_CHECKING

from nnxp._errors import *  # noqa: F403 (its __all__: the tree of errors)
from nnxp.layers import MODULES as _LAYERS

if TYPE_CHECKING:
    from nnxp import cluster as cluster
    from nnxp import plots as plots
    from nnxp import sim as sim
    from nnxp import sklearn as sklearn
    from nnxp import testing as testing
    from nnxp._arrays import get_array_module as get_array_module
    from nnxp.backend import Availability as Availability
    from nnxp.backend import Backend as Backend
    from nnxp.backend import asnumpy as asnumpy
    from nnxp.backend import available_backends as available_backends
    from nnxp.backend import get_backend as get_backend
    from nnxp.backend import set_backend as set_backend
    from nnxp.backend import to_backend as to_backend
    from nnxp.backend import use_backend as use_backend
    from nnxp.engine import Engine as Engine
    from nnxp.engine import predict as predict
    from nnxp.engine import predict_iter as predict_iter
    from nnxp.io.checkpoint import load as load
    from nnxp.io.checkpoint import save as save
    from nnxp.io.columns import Columns as Columns
    from nnxp.io.onnx import load_onnx as load_onnx
    from nnxp.io.onnx_export import save_onnx as save_onnx
    from nnxp.io.sklearn import from_sklearn as from_sklearn
    from nnxp.io.torch import from_torch as from_torch
    from nnxp.io.torch_state import load_state as load_state
    from nnxp.layers._layer import Layer as Layer
    from nnxp.layers.activation import GLU as GLU
    from nnxp.layers.activation import Activation as Activation
    from nnxp.layers.activation import PReLU as PReLU
    from nnxp.layers.attention import MultiHeadAttention as MultiHeadAttention
    from nnxp.layers.attention import TransformerEncoder as TransformerEncoder
    from nnxp.layers.attention import TransformerEncoderLayer as TransformerEncoderLayer
    from nnxp.layers.bilinear import Bilinear as Bilinear
    from nnxp.layers.columns import Clip as Clip
    from nnxp.layers.columns import Take as Take
    from nnxp.layers.containers import Add as Add
    from nnxp.layers.containers import Concatenate as Concatenate
    from nnxp.layers.containers import Residual as Residual
    from nnxp.layers.containers import Sequential as Sequential
    from nnxp.layers.conv import Conv as Conv
    from nnxp.layers.conv import ConvTranspose as ConvTranspose
    from nnxp.layers.dense import Dense as Dense
    from nnxp.layers.dropout import Dropout as Dropout
    from nnxp.layers.graph import Graph as Graph
    from nnxp.layers.norm import BatchNorm as BatchNorm
    from nnxp.layers.norm import GroupNorm as GroupNorm
    from nnxp.layers.norm import InstanceNorm as InstanceNorm
    from nnxp.layers.norm import LayerNorm as LayerNorm
    from nnxp.layers.norm import LocalResponseNorm as LocalResponseNorm
    from nnxp.layers.norm import RMSNorm as RMSNorm
    from nnxp.layers.norm import Standardize as Standardize
    from nnxp.layers.pool import AdaptiveAveragePool as AdaptiveAveragePool
    from nnxp.layers.pool import AdaptiveMaxPool as AdaptiveMaxPool
    from nnxp.layers.pool import AveragePool as AveragePool
    from nnxp.layers.pool import GlobalAveragePool as GlobalAveragePool
    from nnxp.layers.pool import GlobalMaxPool as GlobalMaxPool
    from nnxp.layers.pool import LpPool as LpPool
    from nnxp.layers.pool import MaxPool as MaxPool
    from nnxp.layers.positions import Embedding as Embedding
    from nnxp.layers.positions import PositionEmbedding as PositionEmbedding
    from nnxp.layers.positions import RotaryEmbedding as RotaryEmbedding
    from nnxp.layers.positions import SinusoidalEncoding as SinusoidalEncoding
    from nnxp.layers.recurrent import GRU as GRU
    from nnxp.layers.recurrent import LSTM as LSTM
    from nnxp.layers.recurrent import RNN as RNN
    from nnxp.layers.recurrent import GRUCell as GRUCell
    from nnxp.layers.recurrent import LSTMCell as LSTMCell
    from nnxp.layers.recurrent import RNNCell as RNNCell
    from nnxp.layers.resize import Pad as Pad
    from nnxp.layers.resize import PixelShuffle as PixelShuffle
    from nnxp.layers.resize import PixelUnshuffle as PixelUnshuffle
    from nnxp.layers.resize import Resize as Resize
    from nnxp.layers.shape import Flatten as Flatten
    from nnxp.layers.shape import Reshape as Reshape
    from nnxp.layers.shape import Transpose as Transpose
    from nnxp.layers.torch_graph import ChannelsFirst as ChannelsFirst
    from nnxp.layers.torch_graph import Constant as Constant
    from nnxp.layers.torch_graph import TorchGraph as TorchGraph
    from nnxp.training import losses as losses
    from nnxp.training import schedules as schedules
    from nnxp.training.differentiate import value_and_gradients as value_and_gradients
    from nnxp.training.differentiate import vjp as vjp
    from nnxp.training.fit import Fitted as Fitted
    from nnxp.training.fit import fit as fit
    from nnxp.training.optimizers import SGD as SGD
    from nnxp.training.optimizers import Adagrad as Adagrad
    from nnxp.training.optimizers import Adam as Adam
    from nnxp.training.optimizers import AdamW as AdamW
    from nnxp.training.optimizers import Lion as Lion
    from nnxp.training.optimizers import Momentum as Momentum
    from nnxp.training.optimizers import Nesterov as Nesterov
    from nnxp.training.optimizers import Optimizer as Optimizer
    from nnxp.training.optimizers import RMSProp as RMSProp
    from nnxp.training.optimizers import clip_by_norm as clip_by_norm

_MODULES = {
    name: module
    for module, names in {
        "_arrays": "get_array_module",
        "backend": "Availability Backend asnumpy available_backends get_backend set_backend "
        "to_backend use_backend",
        "engine": "Engine predict predict_iter",
        "io.checkpoint": "load save",
        "io.columns": "Columns",
        "io.onnx": "load_onnx",
        "io.onnx_export": "save_onnx",
        "io.sklearn": "from_sklearn",
        "io.torch": "from_torch",
        "io.torch_state": "load_state",
        "layers._layer": "Layer",
        "training.differentiate": "value_and_gradients vjp",
        "training.fit": "Fitted fit",
        "training.optimizers": "Adagrad Adam AdamW Lion Momentum Nesterov Optimizer RMSProp SGD "
        "clip_by_norm",
    }.items()
    for name in names.split()
} | {name: f"layers.{module}" for name, module in _LAYERS.items()}
"""The module of each public name, loaded when the name is first used, as in Python's PEP 562."""
_PACKAGES = {"losses": "training.losses", "schedules": "training.schedules"} | {
    name: name
    for name in "backend cluster engine io kernels layers plots program sim sklearn testing "
    "training".split()
}


def __getattr__(name: str) -> object:
    import importlib

    if name in _PACKAGES:
        attribute: object = importlib.import_module(f"nnxp.{_PACKAGES[name]}")
    elif name in _MODULES:
        attribute = getattr(importlib.import_module(f"nnxp.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'nnxp' has no attribute {name!r}")
    globals()[name] = attribute
    return attribute


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_PACKAGES} - {"TYPE_CHECKING"})
