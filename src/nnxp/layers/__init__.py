"""The layers, one family a file; `nnxp` itself exports them."""

from nnxp.layers._layer import Layer as Layer
from nnxp.layers._layer import Rng as Rng
