"""CuPy itself over a pretend CUDA: its pools, arenas, streams, events, copies and graphs are real.

What it shows: that nnxp and CuPy together keep CUDA's rules (the order of streams, what is copied
from pageable memory and what from pinned, what a graph may hold, whose memory is whose, what is
given back), on a device that does everything at once and on one that does it as late as it may.
And that every layer's formula is one that CuPy takes. nnxp's kernels run in their build for the
host, cuBLASLt is the stand-in of test_lt.py, and CuPy's own kernels are computed by NumPy from the
names that they have.

What it cannot show: that a GPU keeps the same rules; what NVRTC, cuBLAS, cuBLASLt and the
driver do; races within a kernel, or of two kernels that run at the same time; that the numbers of
CuPy's own kernels are right; and anything about speed.

It is loaded as a plugin of pytest, `-p fakecuda.plugin`, in a process of its own, because it
writes into the code of the CUDA runtime that is inside CuPy. tests/test_fakecuda.py does that.
"""
