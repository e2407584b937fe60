"""The named math that layers are made of."""

from nnxp.kernels._dispatch import KERNELS as KERNELS
from nnxp.kernels._dispatch import Kernel as Kernel
from nnxp.kernels._dispatch import kernel as kernel
from nnxp.kernels.activations import ACTIVATIONS as ACTIVATIONS
from nnxp.kernels.activations import elu as elu
from nnxp.kernels.activations import gelu as gelu
from nnxp.kernels.activations import gelu_tanh as gelu_tanh
from nnxp.kernels.activations import hard_sigmoid as hard_sigmoid
from nnxp.kernels.activations import identity as identity
from nnxp.kernels.activations import leaky_relu as leaky_relu
from nnxp.kernels.activations import mish as mish
from nnxp.kernels.activations import relu as relu
from nnxp.kernels.activations import selu as selu
from nnxp.kernels.activations import sigmoid as sigmoid
from nnxp.kernels.activations import silu as silu
from nnxp.kernels.activations import softplus as softplus
from nnxp.kernels.activations import softsign as softsign
from nnxp.kernels.activations import tanh as tanh
from nnxp.kernels.linear import linear as linear
from nnxp.kernels.linear import matmul as matmul
from nnxp.kernels.norms import batch_norm as batch_norm
from nnxp.kernels.norms import layer_norm as layer_norm
from nnxp.kernels.norms import rms_norm as rms_norm
from nnxp.kernels.norms import standardize as standardize
from nnxp.kernels.softmax import log_softmax as log_softmax
from nnxp.kernels.softmax import softmax as softmax
