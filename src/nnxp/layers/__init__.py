"""The layers, one family a file; `nnxp` itself exports them."""

from nnxp.layers._layer import Layer as Layer
from nnxp.layers._layer import Rng as Rng

LATER = {
    name: module
    for module, names in {
        "attention": "MultiHeadAttention TransformerEncoder TransformerEncoderLayer",
        "bilinear": "Bilinear",
        "conv": "Conv ConvTranspose",
        "dropout": "Dropout",
        "graph": "Graph",
        "norm": "BatchNorm GroupNorm InstanceNorm LayerNorm LocalResponseNorm RMSNorm Standardize",
        "pool": "AdaptiveAveragePool AdaptiveMaxPool AveragePool GlobalAveragePool GlobalMaxPool "
        "LpPool MaxPool",
        "positions": "Embedding PositionEmbedding RotaryEmbedding SinusoidalEncoding",
        "recurrent": "GRU GRUCell LSTM LSTMCell RNN RNNCell",
        "resize": "Pad PixelShuffle PixelUnshuffle Resize",
        "torch_graph": "ChannelsFirst Constant TorchGraph",
    }.items()
    for name in names.split()
}
"""Layers that are loaded when they are first named, with their modules."""
