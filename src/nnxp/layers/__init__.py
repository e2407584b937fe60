"""The layers, one family a file; `nnxp` itself exports them."""

MODULES = {
    name: module
    for module, names in {
        "activation": "Activation GLU PReLU",
        "attention": "MultiHeadAttention TransformerEncoder TransformerEncoderLayer",
        "bilinear": "Bilinear",
        "columns": "Clip Take",
        "containers": "Add Concatenate Residual Sequential",
        "conv": "Conv ConvTranspose",
        "dense": "Dense",
        "dropout": "Dropout",
        "graph": "Graph",
        "norm": "BatchNorm GroupNorm InstanceNorm LayerNorm LocalResponseNorm RMSNorm Standardize",
        "pool": "AdaptiveAveragePool AdaptiveMaxPool AveragePool GlobalAveragePool GlobalMaxPool "
        "LpPool MaxPool",
        "positions": "Embedding PositionEmbedding RotaryEmbedding SinusoidalEncoding",
        "recurrent": "GRU GRUCell LSTM LSTMCell RNN RNNCell",
        "resize": "Pad PixelShuffle PixelUnshuffle Resize",
        "shape": "Flatten Reshape Transpose",
        "torch_graph": "ChannelsFirst Constant TorchGraph",
    }.items()
    for name in names.split()
}
"""The module of each layer, loaded when the layer is first named."""
