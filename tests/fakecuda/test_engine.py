"""The whole way through CUDA: engine, lanes, graphs, cuBLASLt and fused kernels."""

from __future__ import annotations

import gc
import threading

import cupy
import numpy as np
import pytest
from cupy.cuda import Device, Stream

import nnxp
from conftest import draw, results
from nnxp.backend import _device, cuda
from nnxp.backend._lanes import Lane
from nnxp.testing.parity import compare, error_bound
from test_lt import CublasLtError

# What goes wrong when all is done at once goes wrong later, too; test_first.py has both.
pytestmark = pytest.mark.parametrize("gpu", [True], ids=["as late as possible"], indirect=True)


def network(dtype="float32", head="softmax"):
    layers = nnxp.Dense(24, 24, "relu", rng=1), nnxp.LayerNorm(24), nnxp.Dense(24, 24, rng=2)
    net = nnxp.Sequential(
        nnxp.Dense(16, 24, "tanh", rng=0), nnxp.Residual(*layers), nnxp.Dense(24, 10, head, rng=3)
    )
    noisy = {name: x + draw(x.shape, seed=len(name)) / 4 for name, x in net.parameters().items()}
    return net.with_parameters(noisy).astype(dtype)


def check(y, net, x):
    """y is net(x), within the bound of the parity kit."""
    y = y.get() if isinstance(y, cupy.ndarray) else y
    assert y.dtype == net.dtype
    value, error = bound(net, x.astype(net.dtype))
    found = compare("engine", "", "cuda:0", y, value, error)
    assert found.ok, found.problem


bounds = {}


def bound(net, x):
    """What net(x) is, and how far off it may be: asked for once, in all tests."""
    numbers = [*net.parameters().values(), x]
    key = repr(net), *((each.dtype, each.shape, each.tobytes()) for each in numbers)
    if key not in bounds:
        bounds[key] = error_bound(net, x)
    return bounds[key]


def put(x):
    return nnxp.to_backend(x, "cuda")


every_type = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
# The head runs over the rows of a result that may be padded, or hands them out: in every type so
# much is the same that each type with one head, and each head, is enough.
every_kind = pytest.mark.parametrize(
    ("dtype", "head"), [("float32", "softmax"), ("float16", "identity"), ("bfloat16", "softmax")]
)


@every_kind
@pytest.mark.parametrize("rows", [1, 30, 220])
def test_host_rows(gpu, rows, dtype, head):
    """220 rows are four blocks; 10 columns are padded to 16, but not in the last block."""
    net = network(dtype, head)
    engine, x = nnxp.Engine(net, "cuda"), draw((rows, 16), dtype)
    check(engine(x), net, x)
    check(engine(x[1:]), net, x[1:]) if rows > 1 else None
    assert {call.lds[2] for call in gpu.lt.calls} == ({24, 16, 10} if rows > 64 else {24, 10})
    assert {pointer for kind, pointer in gpu.done if kind in ("product", "kernel")} <= gpu.own()


def test_resident_rows_are_replayed_without_a_kernel_of_cupy_s(gpu):
    """They take 8 µs longer to launch; what does not lie alike is copied so all the same."""
    net = network(head="identity")
    engine, x = nnxp.Engine(net, "cuda"), draw((5, 16))
    there = put(x)
    for _ in range(4):
        engine(there)
    gpu.finish()
    gpu.done.clear()
    check(engine(there), net, x)
    gpu.finish()
    kinds = {kind for kind, _ in gpu.done}
    assert "graph's product" in kinds
    assert "CuPy's kernel" not in kinds
    aside = put(draw((5, 32)))[:, ::2]
    check(engine(aside), net, aside.get())


@pytest.mark.parametrize("rows", [5, 220])
def test_copies_that_nobody_waits_for_are_of_pinned_memory(gpu, rows):
    engine, x = nnxp.Engine(network(), "cuda"), draw((rows, 16))
    engine(x)
    gpu.done.clear()
    for _ in range(3):
        engine(x)
    kinds = {kind for kind, _ in gpu.done}
    assert {"set", "get"} <= kinds
    assert not {"pageable set", "pageable get"} & kinds


def test_no_more_pinned_memory_is_no_full_device(gpu):
    gpu.pinnable = 0
    net = network()
    engine, x = nnxp.Engine(net, "cuda"), draw((220, 16))
    for rows in (x, x[:5], x[:5], x[:5]):
        check(engine(rows), net, rows)
    assert all(each.most_rows is None for each in engine._replicas[0]._prepared.values())
    assert len(engine._replicas[0].ready) == 1
    assert any(kind == "pageable get" for kind, _ in gpu.done)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_rows_become_16_bits_on_the_device(gpu, dtype):
    """A core rounds fewer numbers a second than can travel in twice the bytes."""
    net = network(dtype)
    engine, x = nnxp.Engine(net, "cuda"), draw((220, 16))
    check(engine(x), net, x)
    gpu.moved.clear()
    engine(x)
    assert gpu.moved["set"] == x.nbytes


def test_rows_on_the_device_go_together_as_far_as_memory_allows(gpu, monkeypatch):
    """Nothing travels beside them: every block more is only more to start."""
    monkeypatch.setattr(nnxp.engine, "BLOCK_ROWS", (64, 64))
    monkeypatch.setattr(nnxp.engine, "FEW_ROWS", 64)
    net, x = network(), draw((500, 16))
    engine, there = nnxp.Engine(net, "cuda"), put(x)
    engine(there)
    gpu.finish()
    gpu.lt.calls.clear()
    check(engine(there), net, x)
    gpu.finish()
    assert [call.rows for call in gpu.lt.calls] == [500] * 4
    engine = nnxp.Engine(net, "cuda", memory_limit="64 KiB")
    gpu.lt.calls.clear()
    check(engine(there), net, x)
    gpu.finish()
    assert max(call.rows for call in gpu.lt.calls) < 250


@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("kind", ["uint8", "float64", ">f4", "float16"])
def test_host_rows_of_another_type(gpu, kind, rows):
    net = network()
    engine, x = nnxp.Engine(net, "cuda"), (draw((rows, 16)) * 3).clip(0).astype(kind)
    for _ in range(4 if rows == 9 else 1):
        check(engine(x), net, x)


@every_type
@pytest.mark.parametrize("shape", [(3, 5, 16), (20, 4, 16), (70, 2, 16)])
def test_rows_of_more_axes(gpu, shape, dtype):
    net, x = network(dtype), draw(shape, dtype)
    engine = nnxp.Engine(net, "cuda")
    for _ in range(3 if len(x) <= 64 else 1):  # 20 rows are recorded, with a padded product
        y = engine(x)
        assert engine(put(x)).get().tobytes() == y.tobytes()
    check(y, net, x)


@every_kind
@pytest.mark.parametrize("rows", [1, 30, 100])
def test_rows_on_the_device_stay_there(gpu, rows, dtype, head):
    net = network(dtype, head)
    engine, x = nnxp.Engine(net, "cuda"), draw((rows, 16), dtype)
    there = put(x)
    made = [engine(there)]  # which times the products, and tries them with NaN
    copies = gpu.copies()
    made += [engine(there) for _ in range(4 if rows == 1 else 1)]
    assert gpu.copies() == copies
    for y in made:
        assert isinstance(y, cupy.ndarray)
        assert y.flags.c_contiguous
        check(y, net, x)
        y[...] = 0  # the caller's own
    check(engine(there), net, x)
    out = cupy.empty((rows, 10), dtype)
    assert engine(there, out) is out
    check(out, net, x)


@every_kind
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_few_rows_replay_a_graph(gpu, rows, dtype, head):
    net = network(dtype, head)
    engine = nnxp.Engine(net, "cuda")
    batches = [draw((rows, 16), dtype, seed) for seed in range(4)]
    eager = [nnxp.Engine(net, "cuda")(x) for x in batches]
    for x, expected in zip(batches, eager, strict=True):
        y = engine(x)
        check(y, net, x)
        assert y.tobytes() == expected.tobytes()
    assert len(engine._replicas[0].ready) == 1
    gpu.done.clear()
    answers = [(engine(x), engine(put(x)).get()) for x in batches]
    for made, expected in zip(answers, eager, strict=True):
        assert [each.tobytes() for each in made] == 2 * [expected.tobytes()]
    kinds = {kind for kind, _ in gpu.done}
    assert "graph's product" in kinds
    assert not kinds & {"product", "kernel"}


class Scored(nnxp.Layer):
    """Attention written out, as an own layer may have it."""

    weight: np.ndarray

    def __init__(self):
        self.weight = draw((8, 8), seed=5)

    def __call__(self, x):
        xp = nnxp.get_array_module(x)
        scores = xp.matmul(x @ self.weight, x.swapaxes(1, 2))
        return xp.matmul(nnxp.kernels.softmax(scores), x)


ATTENTIVE = {
    "encoder": nnxp.TransformerEncoderLayer(8, 2, 12, rng=0),
    "grouped and causal": nnxp.MultiHeadAttention(8, 4, groups=2, causal=True, rng=1),
    "own": Scored(),
}


@every_type
@pytest.mark.parametrize("name", ATTENTIVE)
def test_attention_replays_a_graph_too(gpu, dtype, name):
    """Which it could not with CuPy's own products."""
    net, x = ATTENTIVE[name].astype(dtype), draw((5, 6, 8), dtype)
    engine = nnxp.Engine(net, "cuda")
    for _ in range(3):
        check(engine(x), net, x)
    assert len(engine._replicas[0].ready) == 1
    gpu.done.clear()
    check(engine(x), net, x)
    kinds = {kind for kind, _ in gpu.done}
    assert "graph's product" in kinds
    assert not kinds & {"product", "kernel", "cuBLAS"}
    assert any(call.batch > 1 for call in gpu.lt.calls)


def test_attention_with_a_mask_goes_through_an_engine(gpu):
    net, x = nnxp.TransformerEncoderLayer(8, 2, 12, rng=0), draw((70, 6, 8))
    mask = np.random.default_rng(0).random((70, 6)) < 0.7
    y = nnxp.Engine(net, "cuda")((x, mask))
    value, error = error_bound(net, x, mask)
    assert compare("engine", "", "cuda:0", y, value, error).ok


class Gated(nnxp.Layer):
    """A gate, a norm that no kernel is, and a residual, written out."""

    up: nnxp.Dense
    gate: nnxp.Dense
    scale: np.ndarray

    def __init__(self):
        self.up, self.gate = nnxp.Dense(16, 16, rng=0), nnxp.Dense(16, 16, rng=1)
        self.scale = draw((16,), seed=5)

    def __call__(self, x):
        xp = nnxp.get_array_module(x)
        g = self.gate(x)
        y = self.up(x) * (g / (1 + xp.exp(-g)))  # SiLU * up
        y = y * self.scale + x
        y = xp.where(y > 0, y, 0.1 * y)
        center = y - y.mean(axis=-1, keepdims=True)
        return center / (xp.sqrt((center * center).mean(axis=-1, keepdims=True)) + 1)


def launches_of(gpu, engine, x):
    """How many kernels an engine starts for these rows, the second time, apart from products."""
    engine(x)
    gpu.finish()
    gpu.done.clear()
    engine(x)
    gpu.finish()
    kinds = ("kernel", "CuPy's kernel")
    return [sum(n for (kind, _), n in gpu.done.items() if kind == each) for each in kinds]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_of_elementwise_steps_is_one_launch(gpu, dtype):
    net, there = Gated().astype(dtype), put(draw((600, 16), dtype))
    engines = [nnxp.Engine(net, "cuda", rewrite=rewrite) for rewrite in (True, False)]
    for engine in engines:
        check(engine(there), net, there.get())
    fused, plain = (launches_of(gpu, engine, there) for engine in engines)
    means = 4 if dtype == "float32" else 6  # for 16 bits CuPy converts them
    assert fused == [2, means + 1]  # kernels of ours and of CuPy's
    assert plain == [0, means + 13]


def test_runs_of_elementwise_steps_replay_in_a_graph(gpu):
    net, x = Gated(), draw((5, 16))
    engine = nnxp.Engine(net, "cuda")
    for _ in range(4):
        check(engine(x), net, x)
    assert len(engine._replicas[0].ready) == 1


REFERENCE = {
    "lstm": (nnxp.LSTM(8, 6, rng=0), (4, 8)),
    "batch norm": (nnxp.BatchNorm(8), (8,)),
    "rotary": (nnxp.MultiHeadAttention(8, 2, rotary=nnxp.RotaryEmbedding(2), rng=0), (4, 8)),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_kernels_without_a_body_for_cuda_replay_a_graph_too(gpu, name):
    net, row = REFERENCE[name]
    engine = nnxp.Engine(net, "cuda")
    for seed in range(4):
        x = draw((5, *row), seed=seed)
        y = engine(x)
        for i, made in enumerate(y if isinstance(y, tuple) else (y,)):
            found = compare(
                "engine", "", "cuda:0", made, *error_bound(lambda x, i=i: results(net(x))[i], x)
            )
            assert found.ok, found.problem
    assert len(engine._replicas[0].ready) == 1


def test_a_graph_sees_weights_that_change_in_place_and_nobody_elses_arrays(gpu):
    net = network()
    engine, x = nnxp.Engine(net, "cuda"), draw((5, 16))
    for _ in range(4):
        engine(x)
    others = [nnxp.Engine(network(), "cuda") for _ in range(3)]
    changed = {name: value * 1.5 for name, value in net.parameters().items()}
    for name, value in engine.model.parameters().items():
        value[...] = put(changed[name])
    for each in others:  # their memory is not that of the graph
        check(each(x), net, x)
        check(each(put(np.tile(x, (30, 1)))), net, np.tile(x, (30, 1)))
    check(engine(x), net.with_parameters(changed), x)


def test_answers_that_nobody_waits_for_are_right(gpu):
    net = network()
    engine = nnxp.Engine(net, "cuda")
    batches = [draw((5, 16), seed=seed) for seed in range(8)]
    there = [put(x) for x in batches]
    made = []
    gpu.finish()
    for x in there:  # each on a stream of its own, that has waited for nothing
        with Stream(non_blocking=True):
            made.append(engine(x))
    gpu.finish()
    for x, y in zip(batches, made, strict=True):
        check(y, net, x)


def test_default_streams_of_threads_wait_for_each_other(gpu):
    """CuPy may be told that each thread has one of its own: they are equal, and not the same."""
    net = network()
    engine = nnxp.Engine(net, "cuda")
    batches = [draw((5, 16), seed=seed) for seed in range(4)]
    there = [put(x) for x in batches]
    for _ in range(3):
        engine(there[0])
    gpu.finish()
    answers, turns = [], threading.Barrier(len(batches) + 1, timeout=60)

    def ask(i):
        with Stream.ptds:
            for turn in range(len(batches)):
                turns.wait()
                if turn == i:
                    answers.append(engine(there[i]))
                turns.wait()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(batches))]
    for each in threads:
        each.start()
    for _ in range(2 * len(batches)):
        turns.wait()
    for each in threads:
        each.join()
    gpu.finish()
    for x, y in zip(batches, answers, strict=True):
        check(y, net, x)


def test_what_the_caller_s_stream_has_yet_to_do_comes_first(gpu):
    net = network()
    engine, x = nnxp.Engine(net, "cuda"), draw((70, 16))
    check(engine(x), net, x)
    doubled = {name: put(value * 2) for name, value in net.parameters().items()}
    gpu.finish()
    with Stream(non_blocking=True):
        for name, value in engine.model.parameters().items():
            value[...] = doubled[name]
        y = engine(x)
    check(y, net.with_parameters({name: value.get() for name, value in doubled.items()}), x)


@pytest.mark.parametrize("closed", [True, False])
def test_an_engine_that_ends_gives_its_memory_back_to_the_device(gpu, closed):
    """The fixture sees to it that none was in a pool that is dropped, for CuPy loses that."""
    mine, room = cupy.get_default_memory_pool(), gpu.free
    engine, x = nnxp.Engine(network(), "cuda"), draw((5, 16))
    parameters = room - gpu.free
    for rows in (x, x, x, draw((130, 16))):
        engine(rows)
    assert len(engine._replicas[0].ready) == 1
    assert room - gpu.free > parameters + 8192
    cupy.empty(1 << 16, "uint8")  # the caller's, and idle
    idle = mine.free_bytes()
    assert idle >= 1 << 16
    gc.disable()  # without it, too
    try:
        engine.close() if closed else None
        del engine
    finally:
        gc.enable()
    gpu.finish()
    assert mine.free_bytes() >= idle  # what is the caller's is left to him
    mine.free_all_blocks()
    assert gpu.free == room


def test_nothing_of_an_engine_lies_in_the_caller_s_pool_where_nobody_finds_it(gpu):
    """CuPy's pools hand out what a stream gave back on that stream only."""
    engine, x = nnxp.Engine(network(), "cuda"), draw((5, 16))
    for rows in (x, x, x, draw((130, 16))):
        engine(rows)
    assert len(engine._replicas[0].ready) == 1
    mine = cupy.get_default_memory_pool()
    mine.free_all_blocks(stream=cupy.cuda.Stream.null)
    assert mine.free_bytes() == 0


def test_recordings_that_are_pushed_out_give_their_memory_back(gpu, monkeypatch):
    monkeypatch.setattr(nnxp.engine, "MOST_RECORDED", 1)
    engine, held = nnxp.Engine(nnxp.Dense(16, 24, rng=0), "cuda"), []
    for rows in (1, 2, 3, 4):  # as much memory each
        for _ in range(2):
            engine(draw((rows, 16)))
        gpu.finish()
        held.append(gpu.free)
    assert len(engine._replicas[0].ready) == 1
    assert len(set(held[1:])) == 1


def test_each_stream_has_one_workspace_of_its_own(gpu):
    """Products of two lanes may run at the same time; what one gives back is not cut up."""
    gpu.lt.algorithms = [(2, 4096)]
    engine, x = nnxp.Engine(network(), "cuda"), draw((220, 16))
    engine(x)
    spaces = {}
    gpu.lt.told = lambda stream, at: spaces.setdefault(stream, set()).add(at)
    engine(x)
    gpu.finish()
    assert len(spaces) == 3
    assert all(len(each) == 1 for each in spaces.values())
    assert len(set.union(*spaces.values())) == 3
    x = x[:5]
    engine(x)
    spaces.clear()
    engine(x)  # through a lane, and then recorded: tried on a stream, and then for good
    assert [len(each) for each in spaces.values()] == [1, 2]
    assert not cuda._leaving  # the pool of the trial was empty when it was given up


def test_a_recording_is_tried_after_what_the_caller_s_stream_has_yet_to_do(gpu, monkeypatch):
    """Which may be to write the very parameters."""
    engine, there = nnxp.Engine(network(), "cuda"), put(draw((5, 16)))
    engine(there)
    gpu.finish()
    step, order = gpu.step, []

    def noted(stream):
        order.append((stream.queue[0][0], stream.pointer != 0))
        step(stream)

    monkeypatch.setattr(gpu, "step", noted)
    for _ in range(100):  # streams that are not ordered take turns
        gpu.give(0, "yet to do", lambda: None)
    engine(there)
    gpu.finish()
    assert len(engine._replicas[0].ready) == 1
    assert ("yet to do", False) not in order[order.index(("product", True)) :]


@pytest.mark.parametrize("product", [6, 9, 13], ids=["tried", "run once more", "captured"])
def test_an_attempt_to_record_that_fails_leaves_nothing(gpu, product):
    """Of four products a run: the first four are those of the answer itself."""
    engine, x = nnxp.Engine(network(), "cuda"), draw((5, 16))
    expected, mine = engine(x), cupy.get_default_memory_pool()
    gc.collect()
    mine.free_all_blocks()
    room, told = gpu.free, []

    def refuse(stream, at):
        told.append(cupy.cuda.get_current_stream().is_capturing())
        if len(told) == product:
            raise MemoryError

    gpu.lt.told = refuse
    np.testing.assert_array_equal(engine(x), expected)
    assert told == [False] * min(product, 12) + [True] * (product == 13)
    assert not engine._replicas[0].ready
    gc.collect()
    mine.free_all_blocks()
    assert gpu.free == room


def test_a_graph_finds_its_memory_in_the_pool_when_it_is_captured(gpu, monkeypatch):
    """CUDA allows more to be taken meanwhile, and a full device could not be emptied for it."""
    engine, x = nnxp.Engine(network(), "cuda"), draw((5, 16))
    engine(x)
    take, captured = gpu.malloc, []

    def taken(size):
        captured.append(any(each.captured is not None for each in gpu.streams.values()))
        return take(size)

    monkeypatch.setattr(gpu, "malloc", taken)
    engine(x)
    assert len(engine._replicas[0].ready) == 1
    assert len(captured) > 1
    assert not any(captured)


def test_a_lane_that_was_given_its_rows_is_not_waited_for(gpu, monkeypatch):
    """The next block is read while it works: its results travel when it comes to that."""
    engine, x = nnxp.Engine(network(), "cuda"), draw((220, 16))
    engine(x)
    start, waiting = Lane.start, []

    def started(lane, *block):
        start(lane, *block)
        waiting.append("get" in [kind for kind, _ in gpu.stream(lane.stream.ptr).queue])

    monkeypatch.setattr(Lane, "start", started)
    engine(x)
    assert waiting == [True] * 4


def test_no_memory_for_the_answer_of_a_recording_is_an_error_of_ours(gpu):
    net = network()
    engine, x = nnxp.Engine(net, "cuda"), draw((5, 16))
    there = put(x)
    for _ in range(3):
        engine(there)
    pool, room = cupy.get_default_memory_pool(), gpu.free
    pool.free_all_blocks()
    gpu.free = -(1 << 30)
    with pytest.raises(nnxp.OutOfMemory):
        engine(there)
    gpu.free = room
    check(engine(there), net, x)


@pytest.mark.parametrize("room", [20_000, 100_000])
def test_a_device_that_is_full_gets_smaller_blocks(gpu, room, monkeypatch):
    """What it says of its free memory is not so."""
    monkeypatch.setattr(_device, "BLOCK_ROWS", (256, 256))
    net = network()
    engine, x = nnxp.Engine(net, "cuda"), draw((550, 16))
    there = put(x)
    gpu.free = room
    check(engine(x), net, x)
    (prepared,) = engine._replicas[0]._prepared.values()
    assert prepared.most_rows < 256
    gpu.free = room + 550 * 40
    check(engine(there), net, x)
    gpu.free = -(1 << 30)
    for each in (x, there):
        with pytest.raises(nnxp.OutOfMemory):
            engine(each)


def test_cublaslt_without_memory_is_a_full_device(gpu):
    net = network()
    engine, x = nnxp.Engine(net, "cuda"), draw((220, 16))
    engine(x)
    left = [3, 3]  # so often: the block once more, and then half of it

    def refuse(stream, at):
        if left:
            raise CublasLtError(left.pop())

    gpu.lt.told = refuse
    check(engine(x), net, x)
    (prepared,) = engine._replicas[0]._prepared.values()
    assert prepared.most_rows == 32


def test_tf32_is_asked_for_in_this_engine_only(gpu):
    net = network()
    allowed, exact = (nnxp.Engine(net, "cuda", precision=each) for each in ("tf32", None))
    for x in [draw((70, 16))] + 3 * [draw((5, 16))]:
        for given in (x, put(x)):
            for engine, compute_type in ((allowed, 77), (exact, 68)):
                gpu.lt.calls.clear()
                check(engine(given), net, x)
                gpu.finish()
                assert {call.compute for call in gpu.lt.calls} == {compute_type}


def test_tf32_reaches_attention(gpu):
    net, x = ATTENTIVE["encoder"], draw((70, 6, 8))
    check(nnxp.Engine(net, "cuda", precision="tf32")(x), net, x)
    gpu.finish()
    assert {call.compute for call in gpu.lt.calls} == {77}
    assert any(call.batch > 1 for call in gpu.lt.calls)


def test_the_caller_s_device_and_stream_are_as_they_were(gpu):
    net = network()
    engine, x = nnxp.Engine(net, "cuda"), draw((140, 16))
    there = put(x[:5])
    with Device(1), Stream(non_blocking=True) as mine:
        for rows in (x, x[:5], x[:5], x[:5], x[:5], there, there, there):
            y = engine(rows)
            assert gpu.device == 1
            assert cupy.cuda.get_current_stream() == mine
            with Device(0):
                check(y, net, x[: len(rows)])
        with pytest.raises(nnxp.ShapeError):
            engine(x[:, :3])
        assert cupy.cuda.get_current_stream() == mine
        assert not gpu.streams[mine.ptr].queue
