"""nnxp: one neural network, written once, on NumPy or on CuPy."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from nnxp._arrays import get_array_module as get_array_module
from nnxp._errors import *  # noqa: F403 (its __all__: the tree of errors)
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
from nnxp.io.sklearn import from_sklearn as from_sklearn
from nnxp.layers._layer import Layer as Layer
from nnxp.layers.activation import Activation as Activation
from nnxp.layers.columns import Clip as Clip
from nnxp.layers.columns import Take as Take
from nnxp.layers.containers import Residual as Residual
from nnxp.layers.containers import Sequential as Sequential
from nnxp.layers.dense import Dense as Dense
from nnxp.layers.dropout import Dropout as Dropout
from nnxp.layers.norm import BatchNorm as BatchNorm
from nnxp.layers.norm import LayerNorm as LayerNorm
from nnxp.layers.norm import RMSNorm as RMSNorm
from nnxp.layers.norm import Standardize as Standardize
from nnxp.layers.shape import Flatten as Flatten

if TYPE_CHECKING:
    from nnxp import sim as sim
    from nnxp import testing as testing


def __getattr__(name: str) -> object:
    """`nnxp.testing` and `nnxp.sim` are there without an import, and loaded when first used."""
    if name in ("sim", "testing"):
        import importlib

        return importlib.import_module(f"nnxp.{name}")
    raise AttributeError(f"module 'nnxp' has no attribute {name!r}")
