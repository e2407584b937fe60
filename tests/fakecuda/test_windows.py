"""Convolutions and pools on the device: patches in pieces, products, an engine over a small CNN."""

from __future__ import annotations

from functools import partial

import cupy
import numpy as np
import pytest

import nnxp
from conftest import draw
from fakecuda.test_engine import check, every_type, put
from nnxp import kernels
from nnxp.kernels.cuda import conv, lt
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
    {"dilation": 2, "padding": ((0, 3), (2, 1)), "activation": kernels.hard_swish},
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
    agrees(kernels.conv, x, weight, stride=stride, padding=(0, 1))
    first = put(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).transpose(0, 2, 3, 1)
    around = put(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))[:, 1:-1, 1:-1]
    weight = put(weight)
    wanted = kernels.conv(put(x), weight, stride=stride).get()
    for there in (first, around):
        gpu.done.clear()
        y = kernels.conv(there, weight, stride=stride)
        np.testing.assert_array_equal(y.get(), wanted)
        assert "CuPy's kernel" not in [kind for kind, _ in gpu.done]  # nothing is copied before


@every_type
@pytest.mark.parametrize("activation", [kernels.identity, kernels.relu, kernels.softmax])
def test_patches_are_laid_out_in_pieces(gpu, monkeypatch, activation, dtype):
    """The same bits as all at once, in pieces of which none takes more than it may."""
    x, weight, bias = draw((25, 9, 9, 3), dtype), draw((3, 3, 3, 8), dtype, 1), draw((8,), dtype, 2)
    options = {"padding": 1, "activation": activation}
    given = [put(each) for each in (x, weight, bias)]
    whole = kernels.conv(*given, **options).get()
    monkeypatch.setattr(conv, "PATCHES", 600 * 32 * x.itemsize)
    kernels.conv(*given, **options)  # and cuBLASLt's algorithms are timed
    gpu.finish()
    gpu.lt.calls.clear()
    y = kernels.conv(*given, **options)
    gpu.finish()
    assert [call.rows for call in gpu.lt.calls] == [512, 512, 512, 489]
    np.testing.assert_array_equal(y.get(), whole)
    agrees(kernels.conv, x, weight, bias, **options)


@pytest.mark.parametrize(
    ("dtype", "precision", "inner"),
    [("float32", None, 27), ("float32", "tf32", 28), ("float16", None, 32), ("bfloat16", None, 32)],
)
def test_lines_for_tensor_cores_are_of_16_bytes(gpu, dtype, precision, inner):
    """Zeros fill them up; not of few lines, for which it would be one more thing to start."""
    x, weight = draw((25, 9, 9, 3), dtype), draw((3, 3, 3, 8), dtype, 1)
    there = put(x), put(weight)
    for rows, wanted in ((25, inner), (10, 27)):
        gpu.lt.calls.clear()
        one = partial(kernels.conv, padding=1)
        y = one(there[0][:rows], there[1], precision=precision).get()
        assert {call.lds[1] for call in gpu.lt.calls} == {wanted}
        found = compare("conv", "", "cuda:0", y, *error_bound(one, x[:rows], weight))
        assert found.ok, found.problem


@every_type
@pytest.mark.parametrize("cols", [24, 10])
@pytest.mark.parametrize("start", [0, 1])
def test_a_product_fills_what_it_is_given(gpu, start, cols, dtype):
    """Where it lies on other bytes than a new result would, or narrower, by a copy."""
    x, weight, bias = (put(draw(shape, dtype)) for shape in ((64, 16), (16, cols), (cols,)))
    out = cupy.empty((70, cols), x.dtype)[start : start + 64]
    for activation in (kernels.relu, kernels.tanh):
        assert lt.product(x, weight, bias, activation, out=out) is out
        expected = lt.product(x, weight, bias, activation)
        np.testing.assert_array_equal(out.get(), expected.get())


@every_type
def test_weights_of_channels_may_lie_in_any_way(gpu, dtype):
    x, bias = put(draw((2, 5, 5, 8), dtype)), put(draw((16,), dtype, 2))[::2]
    weight = put(draw((8, 1, 3, 2), dtype, 1)).transpose(2, 3, 1, 0)
    y = kernels.conv(x, weight, bias, groups=8)
    same = kernels.conv(x, put(weight.get()), put(bias.get()), groups=8)
    np.testing.assert_array_equal(y.get(), same.get())


TRANSPOSED = [
    {"stride": 1, "activation": kernels.softmax},
    {"stride": 2, "padding": 1, "activation": kernels.gelu},
    {"stride": (2, 4), "padding": 1, "activation": kernels.softmax},
    {"stride": (4, 2), "padding": ((0, 1), (1, 2)), "activation": kernels.tanh},
]


@every_type
@pytest.mark.parametrize("options", TRANSPOSED, ids=["one", "alike", "apart", "with gaps"])
def test_transposed_convolutions(gpu, options, dtype):
    """In 16 bits, too, their products are of 16 bits, and nothing is rounded twice."""
    x, weight = draw((3, 5, 6, 8), dtype), draw((3, 4, 8, 4), dtype, 1)
    agrees(kernels.conv_transpose, x, weight, None, stride=2)
    agrees(kernels.conv_transpose, x, weight, draw((4,), dtype, 2), **options)
    gpu.finish()
    assert {call.factors for call in gpu.lt.calls} == {dtype}


def test_no_rows_make_no_rows(gpu):
    x = put(np.empty((0, 6, 6, 4), "float32"))
    weight, apart = put(draw((3, 3, 4, 8))), put(draw((3, 3, 1, 4)))
    assert kernels.conv(x, weight, padding=1).shape == (0, 6, 6, 8)
    assert kernels.conv(x, apart, groups=4).shape == (0, 4, 4, 4)
    assert kernels.max_pool(x, window=(2, 2)).shape == (0, 3, 3, 4)
    assert kernels.average_pool(x, window=(2, 2)).shape == (0, 3, 3, 4)


def network(dtype="float32"):
    """Of every way to look through windows."""
    net = nnxp.Sequential(
        nnxp.Conv(3, 8, (3, 3), "relu", padding=1, rng=0),
        nnxp.MaxPool((2, 2)),
        nnxp.Conv(8, 8, (3, 3), "hard_swish", groups=8, padding=1, rng=1),
        nnxp.Conv(8, 16, (1, 1), rng=2),
        nnxp.BatchNorm(16),
        nnxp.Conv(16, 12, (2, 3), "tanh", groups=2, stride=2, rng=3),
        nnxp.AveragePool((2, 1), padding=(1, 0)),
        nnxp.ConvTranspose(12, 4, (2, 2), "relu", stride=2, rng=4),
        nnxp.Flatten(),
        nnxp.Dense(32, 5, "softmax", rng=5),
    )
    noisy = {name: x + draw(x.shape, seed=len(name)) / 8 for name, x in net.parameters().items()}
    noisy["layers.4.var"] = np.abs(noisy["layers.4.var"]) + 1
    return net.with_parameters(noisy).astype(dtype)


@every_type
def test_an_engine_answers_few_rows_and_many(gpu, monkeypatch, dtype):
    """Few are replayed as a graph, by which nothing of CuPy's is asked that cannot be captured:
    neither by patches in pieces, nor by lines that are filled up."""
    monkeypatch.setattr(conv, "PATCHES", 1 << 14)
    monkeypatch.setattr(conv, "PAD_FROM_LINES", 64)
    net, x = network(dtype), draw((150, 10, 8, 3), dtype)
    engine = nnxp.Engine(net, "cuda")
    check(engine(x), net, x)
    check(engine(put(x)), net, x)
    for _ in range(4):
        few = engine(x[:5])
    check(few, net, x[:5])
    assert len(engine._replicas[0].ready) == 1
    gpu.done.clear()
    np.testing.assert_array_equal(engine(x[:5]), few)
    kinds = {kind for kind, _ in gpu.done}
    assert {"graph's product", "graph's kernel"} <= kinds
    assert not kinds & {"product", "kernel", "cuBLAS"}


def test_every_product_of_an_engine_has_its_precision(gpu):
    net, x = network(), draw((20, 10, 8, 3))
    for precision, compute in (("tf32", 77), (None, 68)):
        engine = nnxp.Engine(net, "cuda", precision=precision)
        gpu.lt.calls.clear()
        check(engine(x), net, x)
        gpu.finish()
        assert {call.compute for call in gpu.lt.calls} == {compute}
        (prepared,) = engine._replicas[0]._prepared.values()
        names = [step.name for step in prepared.program.steps]
        assert names.count("conv") + names.count("conv_max_pool") == 4
        assert names.count("conv_transpose") == 1


def test_a_residual_and_its_relu_are_one_pass_behind_convolutions(gpu):
    """Bias and relu of each are in its product; each has a kernel for its patches."""
    block = (
        nnxp.Conv(8, 8, (3, 3), "relu", padding=1, rng=0),
        nnxp.Conv(8, 8, (3, 3), padding=1, rng=1),
    )
    net = nnxp.Sequential(nnxp.Residual(*block), nnxp.Activation("relu"))
    engine, x = nnxp.Engine(net, "cuda"), draw((9, 6, 6, 8))
    for _ in range(4):
        engine(x)
    gpu.finish()
    gpu.done.clear()
    check(engine(x), net, x)
    (prepared,) = engine._replicas[0]._prepared.values()
    assert [step.name for step in prepared.program.steps] == ["conv", "conv", "elementwise"]
    counts = {kind: n for (kind, _), n in gpu.done.items()}
    assert (counts["graph's product"], counts["graph's kernel"]) == (2, 3)


def test_weights_lie_by_outputs_where_tensor_cores_take_float32_so(gpu):
    """Laid out once, when the engine prepares: few rows are replayed without a copy of them."""
    net = nnxp.Sequential(
        nnxp.Conv(3, 8, (3, 3), "relu", padding=1, rng=0),
        nnxp.Conv(8, 8, (3, 3), groups=8, rng=1),
        nnxp.Flatten(),
        nnxp.Dense(8 * 6 * 4, 12, "relu", rng=2),
    )
    x = draw((20, 8, 6, 3))
    for precision, lds in ((None, {8, 12}), ("tf32", {27, 28, 192})):
        engine = nnxp.Engine(net, "cuda", precision=precision)
        check(engine(x), net, x)
        gpu.finish()
        gpu.done.clear()
        gpu.lt.calls.clear()
        check(engine(x), net, x)
        gpu.finish()
        assert {call.lds[0] for call in gpu.lt.calls} <= lds
        assert "CuPy's kernel" not in {kind for kind, _ in gpu.done}


class Peak(cupy.cuda.memory_hook.MemoryHook):
    """The most bytes that were in use at once."""

    name = "peak"

    def __init__(self):
        self.sizes, self.most = {}, 0

    def malloc_postprocess(self, *, device_id, size, mem_size, mem_ptr, pmem_id):
        self.sizes[mem_ptr] = size
        self.most = max(self.most, sum(self.sizes.values()))

    def free_postprocess(self, *, device_id, mem_size, mem_ptr, pmem_id):
        self.sizes.pop(mem_ptr, None)


COUNTED = [
    nnxp.Conv(3, 64, (3, 3)),
    nnxp.Conv(3, 4, (3, 3), padding=1),
    nnxp.Conv(3, 64, (3, 3), "relu", stride=2),
    nnxp.Conv(3, 8, (1, 1)),
    nnxp.Conv(3, 3, (3, 3), "hard_swish", groups=3, padding=1),
    nnxp.Conv(3, 12, (3, 1), groups=3, padding=1),
    nnxp.Sequential(nnxp.Conv(3, 4, (1, 1)), nnxp.Conv(4, 6, (3, 3), groups=2)),
    nnxp.ConvTranspose(3, 4, (4, 4), stride=2, padding=1),
    nnxp.MaxPool((3, 3), stride=2, padding=1),
    nnxp.AveragePool((2, 2)),
    network(),
]


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", None), ("float32", "tf32"), ("float16", None)]
)
@pytest.mark.parametrize("layer", COUNTED, ids=lambda layer: repr(layer)[:50])
def test_no_more_memory_is_taken_than_is_counted(gpu, layer, dtype, precision):
    """Beside what cuBLASLt works in; a block of rows is cut by this count."""
    gpu.lt.algorithms = [(1, 0)]
    net, x = layer.astype(dtype), draw((40, 10, 8, 3), dtype)
    precision = precision if net.dtype == "float32" else None  # a pool has no type
    engine = nnxp.Engine(net, "cuda", precision=precision)
    there = put(x)
    engine(there)
    (prepared,) = engine._replicas[0]._prepared.values()
    with Peak() as peak:
        prepared.run((there,))
    costs = prepared.costs
    assert x.nbytes + peak.most <= costs.row_bytes * len(x) + costs.fixed_bytes
