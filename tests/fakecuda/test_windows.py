"""Convolutions and pools on the device: patches in pieces, products, an engine over a small CNN."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from conftest import draw
from fakecuda.test_engine import every_type, put
from nnxp import kernels
from nnxp.kernels.cuda import conv
from nnxp.testing.parity import compare, error_bound

pytestmark = pytest.mark.parametrize("gpu", [True], ids=["as late as possible"], indirect=True)


def agrees(kernel, *arrays, **options):
    """The kernel on the device answers what it does on the host, within the bound."""
    one = partial(kernel, **options)
    y = one(*(each if each is None else put(each) for each in arrays)).get()
    assert y.dtype == arrays[0].dtype
    found = compare(kernel.__name__, "", "cuda:0", y, *error_bound(one, *arrays))
    assert found.ok, found.problem


OPTIONS = [
    {},
    {"padding": 1, "activation": kernels.relu},
    {"stride": (2, 1), "padding": "same", "activation": kernels.softmax},
    {"dilation": 2, "padding": ((0, 3), (2, 1)), "activation": kernels.silu},
]


@every_type
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "padded", "strided", "dilated"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions(gpu, options, groups, dtype):
    if groups > 1 and dtype != "float32" and options.get("activation") is kernels.softmax:
        options = options | {"activation": kernels.relu}  # softmax goes to the reference body
    x, weight = draw((3, 8, 7, 8), dtype), draw((3, 2, 8 // groups, 16), dtype, seed=1)
    for bias in (None, draw((16,), dtype, seed=2)):
        agrees(kernels.conv, x, weight, bias, groups=groups, **options)
    agrees(kernels.conv_max_pool, x, weight, bias, groups=groups, window=(1, 2), **options)


@every_type
@pytest.mark.parametrize("stride", [1, 2])
def test_a_window_of_one_element_is_a_product(gpu, stride, dtype):
    """Of x as it lies, unless it lies otherwise or some of it is left out."""
    x, weight = draw((3, 6, 6, 8), dtype), draw((1, 1, 8, 24), dtype, seed=1)
    agrees(kernels.conv, x, weight, stride=stride)
    assert ("kernel" in [kind for kind, _ in gpu.done]) == (stride == 2)
    there = put(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).transpose(0, 2, 3, 1)
    y = kernels.conv(there, put(weight), stride=stride)
    np.testing.assert_array_equal(y.get(), kernels.conv(put(x), put(weight), stride=stride).get())


@every_type
@pytest.mark.parametrize("activation", [kernels.identity, kernels.relu, kernels.softmax])
def test_patches_are_laid_out_in_pieces(gpu, monkeypatch, activation, dtype):
    """The same bits as all at once, in pieces of which none takes more than it may."""
    x, weight, bias = draw((25, 9, 9, 3), dtype), draw((3, 3, 3, 8), dtype, 1), draw((8,), dtype, 2)
    options = {"padding": 1, "activation": activation}
    given = [put(each) for each in (x, weight, bias)]
    whole = kernels.conv(*given, **options).get()
    monkeypatch.setattr(conv, "PATCHES", 600 * 27 * x.itemsize)
    kernels.conv(*given, **options)  # and cuBLASLt's algorithms are timed
    gpu.finish()
    gpu.lt.calls.clear()
    y = kernels.conv(*given, **options)
    gpu.finish()
    assert [call.rows for call in gpu.lt.calls] == [512, 512, 512, 489]
    np.testing.assert_array_equal(y.get(), whole)
    agrees(kernels.conv, x, weight, bias, **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_transposed_convolutions(gpu, monkeypatch, bias, dtype):
    x, weight = draw((3, 5, 6, 8), dtype), draw((3, 4, 8, 4), dtype, 1)
    bias = draw((4,), dtype, 2) if bias else None
    for stride, padding in ((1, 0), (2, 1), ((3, 2), ((0, 1), (1, 2)))):
        agrees(kernels.conv_transpose, x, weight, bias, stride=stride, padding=padding)
