"""Convolutions by cuDNN's graphs: which are, what is left to do, streams, workspaces, an engine."""

from __future__ import annotations

import cupy
import numpy as np
import pytest

import nnxp
from conftest import draw
from fakecuda.graphs import Cudnn
from fakecuda.test_engine import check, every_type, put
from fakecuda.test_windows import agrees, network
from nnxp import kernels
from nnxp.kernels.cuda import cudnn as ours
from nnxp.kernels.cuda.lt import plans

pytestmark = pytest.mark.parametrize("gpu", [True], ids=["as late as possible"], indirect=True)


@pytest.fixture
def cudnn(gpu, monkeypatch):
    """cuDNN, which knows nothing yet, and is always the faster way."""
    there = Cudnn()
    monkeypatch.setattr(ours, "library", lambda: (there, None))
    monkeypatch.setattr(ours, "handles", {})
    monkeypatch.setattr(ours, "failures", {})
    for name in ("plans", "choices"):
        monkeypatch.setattr(ours, name, plans.Lately(100))
    there.takes = iter(())

    def milliseconds(run):
        run()
        return next(
            there.takes, 1 if isinstance(getattr(run, "func", None), ours.Convolution) else 2
        )

    monkeypatch.setattr(ours, "milliseconds", milliseconds)
    return there


OPTIONS = {
    "plain": {},
    "padded": {"padding": ((0, 3), (2, 1)), "activation": kernels.relu},
    "strided": {"stride": (2, 1), "padding": "same", "activation": kernels.hard_swish},
    "dilated": {"dilation": 2, "activation": kernels.softmax},
}


@every_type
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions(cudnn, options, groups, dtype):
    """In 16 bits no pass goes on with what was rounded: those are our own kernels'."""
    activation = options.get("activation", kernels.identity)
    if dtype != "float32" and activation is kernels.softmax and groups > 1:
        options = options | {"activation": kernels.relu}
        activation = kernels.relu
    x, weight = draw((3, 8, 7, 8), dtype), draw((3, 2, 8 // groups, 16), dtype, seed=1)
    for bias in (None, draw((16,), dtype, seed=2)):
        cudnn.executed.clear()
        agrees(kernels.conv, x, weight, bias, groups=groups, **options)
        simple = activation in (kernels.identity, kernels.relu)
        assert bool(cudnn.executed) == (dtype == "float32" or simple)


@pytest.mark.parametrize("space", [(9,), (5, 6), (4, 5, 3)])
def test_any_axes(cudnn, space):
    x, weight = draw((2, *space, 8)), draw((*(2,) * len(space), 8, 4), seed=1)
    agrees(kernels.conv, x, weight, draw((4,), seed=2), padding=1, stride=2)
    assert cudnn.executed


def test_the_same_shapes_may_have_other_windows(cudnn):
    x, weight = draw((2, 7, 7, 8)), draw((3, 3, 8, 8), seed=1)
    for options in ({"padding": 1}, {"padding": 2, "dilation": 2}):
        agrees(kernels.conv, x, weight, **options)
    assert len(cudnn.planned) == 2


def test_what_is_not_aligned_is_our_own(cudnn):
    numbers, weight = put(draw((2 * 6 * 6 * 8 + 1,))), put(draw((3, 3, 8, 8), seed=1))
    aside = numbers[1:].reshape(2, 6, 6, 8)
    y = kernels.conv(aside, weight).get()
    assert not cudnn.planned
    np.testing.assert_allclose(kernels.conv(aside.copy(), weight).get(), y, rtol=0, atol=1e-5)
    assert len(cudnn.planned) == 1


def test_float32_rounds_to_tf32_only_where_that_is_asked_for(cudnn):
    x, weight = put(draw((3, 6, 6, 8))), put(draw((3, 3, 8, 8), seed=1))
    for precision in (None, "tf32"):
        kernels.conv(x, weight, precision=precision)
    kernels.conv(x.astype("float16"), weight.astype("float16"))
    exact, rounded, half = (graph.left_out for graph in cudnn.planned)
    assert exact - rounded == {"TENSOR_CORE"}
    assert rounded == half == set(ours.LEFT_OUT)


@every_type
@pytest.mark.parametrize("drops", [False, True])
def test_relu_keeps_nan(cudnn, drops, dtype):
    cudnn.drops_nan = drops
    x = draw((2, 5, 5, 8), dtype)
    x[0, 2, 2, 3] = np.nan
    weight, bias = put(draw((3, 3, 8, 8), dtype, 1)), put(draw((8,), dtype, 2))
    y = kernels.conv(put(x), weight, bias, activation=kernels.relu)
    assert np.isnan(y.get()[0].astype("float32")).any()
    assert len(cudnn.planned) == 1 + drops
    agrees(
        kernels.conv, draw((2, 5, 5, 8), dtype), weight.get(), bias.get(), activation=kernels.relu
    )


def test_the_faster_way_is_taken_and_kept_for_about_as_many_rows(cudnn):
    x, weight = put(draw((24, 5, 5, 8))), put(draw((3, 3, 8, 8), seed=1))
    cudnn.takes = iter([2, 1, 1, 2])
    for rows, executed in ((20, False), (24, False), (16, True), (12, True)):
        kernels.conv(x[:rows], weight)
        cudnn.executed.clear()
        kernels.conv(x[:rows], weight)
        assert bool(cudnn.executed) == executed
    assert next(cudnn.takes, None) is None


def test_what_cudnn_cannot_do_our_kernels_do(cudnn):
    cudnn.takes_nothing = True
    agrees(kernels.conv, draw((3, 6, 6, 8)), draw((3, 3, 8, 8), seed=1))
    assert ours.failures == {"cudnnGraphNotSupportedError": "none of it"}
    cudnn.takes_nothing = False
    aside = put(draw((3, 6, 6, 9)))[..., 1:]
    kernels.conv(aside, put(draw((3, 3, 8, 8), seed=1)))
    with ours.unused():
        agrees(kernels.conv, draw((4, 6, 6, 8)), draw((3, 3, 8, 8), seed=1))
    assert not cudnn.planned


@every_type
def test_an_engine_answers_few_rows_and_many(cudnn, gpu, dtype):
    """In the stream and the workspace of its lane, and as a graph that is replayed."""
    net, x = network(dtype), draw((150, 10, 8, 3), dtype)
    engine = nnxp.Engine(net, "cuda")
    check(engine(x), net, x)
    by_stream = {}
    for _, stream, at in cudnn.executed:
        by_stream.setdefault(stream, set()).add(at)
    assert len(by_stream) > 1
    assert not set.intersection(*by_stream.values())
    for _ in range(4):
        few = engine(x[:5])
    check(few, net, x[:5])
    gpu.done.clear()
    np.testing.assert_array_equal(engine(x[:5]), few)
    kinds = {kind for kind, _ in gpu.done}
    assert "graph's cuDNN" in kinds
    assert not kinds & {"cuDNN", "product", "kernel"}


def test_weights_are_laid_out_once_for_an_engine(cudnn, gpu):
    net = nnxp.Sequential(nnxp.Conv(8, 8, (3, 3), "relu", rng=0), nnxp.Conv(8, 4, (2, 2), rng=1))
    engine, x = nnxp.Engine(net, "cuda"), draw((9, 6, 6, 8))
    check(engine(x), net, x)
    gpu.finish()
    gpu.done.clear()
    check(engine(x), net, x)
    gpu.finish()
    kinds = {kind for kind, _ in gpu.done}
    assert "cuDNN" in kinds
    assert not {"CuPy's kernel", "copy"} & kinds


def test_programs_for_other_shapes_of_a_row_share_the_weights_that_were_laid_out(cudnn, gpu):
    net = nnxp.Sequential(nnxp.Conv(8, 8, (3, 3), "relu", rng=0), nnxp.Conv(8, 4, (2, 2), rng=1))
    engine = nnxp.Engine(net, "cuda", precision="tf32")
    for length in (5, 6, 7):
        x = draw((3, length, 6, 8))
        check(engine(x), net, x)
    replica = engine._replicas[0]
    assert len(replica._prepared) == 3
    assert len(replica._laid_out) == 2


def test_a_graph_that_fails_later_leaves_the_rest_to_our_kernels(cudnn, monkeypatch):
    x, weight = draw((3, 6, 6, 8)), draw((3, 3, 8, 8), seed=1)
    agrees(kernels.conv, x, weight)
    count = len(cudnn.executed)
    assert count

    def fails(*_):
        raise RuntimeError("EXECUTION_FAILED")

    with monkeypatch.context() as patch:
        patch.setattr(ours.Plan, "__call__", fails)
        agrees(kernels.conv, x, weight)
    assert ours.failures == {"RuntimeError": "EXECUTION_FAILED"}
    agrees(kernels.conv, x, weight)
    assert len(cudnn.executed) == count


def test_a_shape_that_comes_first_while_a_graph_is_captured_is_our_own(cudnn):
    x, weight = put(draw((3, 6, 6, 8))), put(draw((3, 3, 8, 8), seed=1))
    with ours.unused():
        kernels.conv(x, weight)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        kernels.conv(x, weight)
        graph = stream.end_capture()
    assert not cudnn.planned
    del graph
