"""Matrix products through cuBLASLt: pointers in, nothing copied, bias and relu in the same kernel.

CuPy's own products copy what is not contiguous and cannot be captured in a CUDA graph. cuBLASLt
reads matrices by columns, so y = x @ weight is told to it as the transposed product
y' (N, M) = weight' (N, K) x' (K, M), of which nothing has to be moved; the bias then belongs to
the rows of y', which is how cuBLASLt adds one.

How a product is done is settled when it is first asked for: the algorithms that cuBLASLt proposes
are timed, and its epilogues against a pass of our own. One choice serves all products that differ
only in the number of rows, within a factor of two, so that few ragged blocks cost a new timing,
and the same product gives the same bits for as long as the process remembers it.
"""

from nnxp.kernels.cuda.lt.bindings import LtError, why_not
from nnxp.kernels.cuda.lt.call import product
from nnxp.kernels.cuda.lt.passes import converted
from nnxp.kernels.cuda.lt.stacks import on_this_device, stacked

__all__ = ["LtError", "converted", "on_this_device", "product", "stacked", "why_not"]
