"""The simulated device keeps CuPy's rules: it refuses, counts, runs out of memory, and poisons."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import nnxp
from nnxp import sim as xp

X = np.arange(6, dtype="float32").reshape(2, 3)


def test_arrays_never_meet_numpy_arrays(sim):
    x = xp.asarray(X)
    for act in (
        lambda: x + X,
        lambda: X + x,
        lambda: np.add(X, x),
        lambda: xp.matmul(x, X.T),
        lambda: xp.maximum(x, X),
        lambda: x.__setitem__(0, X[0]),
        lambda: np.concatenate([x, X]),
    ):
        with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy.ndarray'>"):
            act()


def test_arrays_never_become_numpy_arrays_silently(sim):
    for act in (np.asarray, np.array, list):
        with pytest.raises(TypeError, match="Implicit conversion"):
            act(xp.asarray(X)) if act is not list else np.asarray(list(xp.asarray(X)))


def test_arrays_of_two_devices_never_meet(sim):
    with xp.Device(1):
        there = xp.asarray(X)
        with pytest.raises(ValueError, match="same as the current device"):
            there + xp_here
    with pytest.raises(ValueError, match="same as the current device"):
        there + 1


xp_here = xp.asarray(X)


def test_crossings_are_counted(sim):
    x = xp.asarray(X)
    y = xp.exp(x)
    assert sim.count == xp.Count(put=1)
    y.get()
    xp.asnumpy(y)
    assert sim.count == xp.Count(put=1, get=2)
    float(y.sum())
    bool(y[0, 0] > 0)
    assert sim.count == xp.Count(put=1, get=2, implicit=2)
    nnxp.get_backend("sim").synchronize()
    assert sim.count.synchronize == 1


def test_reductions_give_arrays_without_axes(sim):
    for y in (
        xp.asarray(X).sum(),
        xp.max(xp.asarray(X)),
        xp.asarray(X).mean(),
        xp.asarray(X)[0, 1],
    ):
        assert isinstance(y, xp.ndarray)
        assert y.shape == ()


def test_operators_methods_and_functions_compute_what_numpy_does(sim):
    x = xp.asarray(X)
    pairs = [
        (x @ x.T, X @ X.T),
        (x.reshape(3, 2), X.reshape(3, 2)),
        (x.astype("float64") / 3, X.astype("float64") / 3),
        (xp.where(x > 2, x, -x), np.where(X > 2, X, -X)),
        (xp.concatenate([x, x], axis=1), np.concatenate([X, X], axis=1)),
        (np.exp(x), np.exp(X)),
        (np.sum(x, axis=0), X.sum(axis=0)),
        (x[:, ::2], X[:, ::2]),
        (x[x > 2], X[X > 2]),
        (x.min(axis=1), X.min(axis=1)),
        (x.argmax(axis=1), X.argmax(axis=1)),
        (x.copy(), X),
        (xp.full((2, 2), 7.0), np.full((2, 2), 7.0)),
        (xp.split(x, 3, axis=1)[1], np.split(X, 3, axis=1)[1]),
    ]
    for there, here in pairs:
        np.testing.assert_array_equal(there.get(), here)
        assert there.dtype == here.dtype
    assert (len(x), x.ndim, x.size, x.nbytes, x.itemsize) == (2, 2, 6, 24, 4)
    assert x.strides == X.strides
    assert x.flags.c_contiguous
    assert "sim:0" in repr(x)


def test_in_place_work_is_seen_through_views(sim):
    x = xp.zeros((2, 3))
    x[0] += 1
    x.T[2] = 5
    x.reshape(6)[1] = 7
    assert x.get().tolist() == [[1, 7, 5], [0, 0, 5]]


def test_set_and_get_want_the_same_shape_and_type(sim):
    x = xp.empty((2, 3), "float32")
    x.set(X)
    out = np.zeros((2, 3), "float32")
    assert x.get(out=out) is out
    np.testing.assert_array_equal(out, X)
    with pytest.raises(ValueError, match="does not fit"):
        x.set(X.astype("float64"))
    with pytest.raises(ValueError, match="out is"):
        x.get(out=np.zeros((3, 2), "float32"))


def test_memory_is_counted_limited_and_given_back(sim):
    before = sim.used
    x = xp.zeros((1000,), "float32")
    assert sim.used == before + 4000
    view = x[10:]
    assert sim.used == before + 4000
    del x
    assert sim.used == before + 4000  # the view holds on to it
    del view
    assert sim.used == before
    assert sim.peak >= before + 4000
    sim.limit = before + 5000
    x = xp.zeros((1000,), "float32")
    with pytest.raises(xp.OutOfMemoryError, match=r"out of memory on sim:0: 4,000 bytes"):
        x + 1
    assert isinstance(xp.OutOfMemoryError(), MemoryError)
    del x
    assert sim.used == before


def test_unwritten_and_freed_memory_is_poisoned(sim):
    assert np.isnan(xp.empty((3,)).get()).all()
    assert np.isnan(xp.empty_like(xp.zeros((2, 2))).get()).all()
    x = xp.zeros((4,))
    leaked = x._host
    del x
    assert np.isnan(leaked).all()


def test_a_result_that_is_not_waited_for_is_nan_on_a_lazy_device(sim):
    x, out = xp.asarray(X), np.zeros_like(X)
    assert (xp.exp(x).get(out=out, blocking=False) == np.exp(X)).all()  # a quick device hides it
    sim.lazy = True
    y = xp.exp(x)
    assert y.get(out=out, blocking=False) is out
    assert np.isnan(out).all()
    y *= 0  # later work does not reach a copy that was begun before
    sim.synchronize()
    np.testing.assert_array_equal(out, np.exp(X))
    np.testing.assert_array_equal(x.get(), X)  # a blocking copy is there at once
    assert np.isnan(x.get(blocking=False)).all()


@pytest.mark.parametrize("wait", [xp.Device.synchronize, lambda sim: xp.asarray(X).get()])
def test_a_buffer_that_is_used_again_too_early_is_an_error_on_a_lazy_device(sim, wait):
    x, buffer = xp.empty(X.shape, X.dtype), X.copy()
    sim.lazy = True
    x.set(buffer)
    sim.synchronize()
    buffer += 1  # in time
    x.set(buffer)
    buffer += 1  # too early
    with pytest.raises(RuntimeError, match="changed before its copy to the device was waited for"):
        wait(sim)
    np.testing.assert_array_equal(x.get(), X + 1)


def test_devices_are_two_and_know_themselves(sim):
    assert xp.Device(0) is sim
    assert copy.deepcopy(sim) is sim
    for index in (2, -1, "0"):
        with pytest.raises(ValueError, match="there are 2 simulated devices"):
            xp.Device(index)
    with xp.Device(1), xp.Device(0):
        assert xp.Device.current().id == 0
    assert xp.Device.current().id == 0


def test_what_is_not_in_the_dialect_is_refused_by_name(sim):
    x = xp.asarray(X)
    for act, said in {
        lambda: xp.loadtxt: "sim has no loadtxt",
        lambda: np.linalg.inv(x): "sim has no inv",
        lambda: xp.linalg.svd: "sim has no svd",
        lambda: np.add.reduce(x): "sim has no add.reduce",
        lambda: x.ctypes: "arrays of sim have no ctypes",
    }.items():
        with pytest.raises(nnxp._errors.UnsupportedFunction, match=said):
            act()


def test_calls_that_cupy_refuses_are_refused(sim):
    x = xp.asarray(X)
    for act in (
        lambda: x.max(axis=1, initial=0.0),
        lambda: xp.max(x, initial=0.0),
        lambda: np.sum(x, where=x > 0),
        lambda: xp.exp(x, where=x > 0),
        lambda: xp.clip(x, min=0.0, max=1.0),
        lambda: xp.add(x1=x, x2=x),
        lambda: xp.reshape(x, shape=(6,)),
        lambda: xp.argsort(x, stable=True),
        lambda: xp.where(x > 0, x, 0.0, out=x),
        lambda: xp.add(x, [1.0, 2.0, 3.0]),
        lambda: xp.sum([1.0, 2.0]),
        lambda: xp.concatenate([x, [[1.0, 2.0, 3.0]]]),
        lambda: x.__setitem__(0, [1.0, 2.0, 3.0]),
    ):
        with pytest.raises(TypeError):
            act()


def test_views_made_by_functions_share_their_memory(sim):
    x = xp.asarray(X.copy())
    used = sim.used
    views = [xp.flip(x, 0), xp.moveaxis(x, 0, 1), x[:, None], xp.split(x, 3, axis=1)[1], x.ravel()]
    assert sim.used == used
    x[...] = 7.0
    for view in views:
        assert (view.get() == 7).all()
        assert view.base is not None
    assert xp.copy(x).base is None


def test_numbers_that_cross_are_counted(sim):
    x = xp.asarray(np.arange(3))
    assert x.tolist() == [0, 1, 2]
    assert [10, 20, 30][x[1]] == 20
    assert sim.count.implicit == 2
