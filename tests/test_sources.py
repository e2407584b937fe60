"""Where rows may come from and go to: memory maps, HDF5, Zarr, columns of several arrays."""

from __future__ import annotations

import numpy as np
import pytest

import nnxp
from conftest import draw, every_backend

NET = nnxp.Sequential(nnxp.Dense(12, 16, "tanh", rng=0), nnxp.Dense(16, 3, rng=1))
X = draw((3000, 12))


@pytest.fixture
def hdf5(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        yield file.create_dataset("x", data=X, chunks=(100, 12), compression="gzip")


@pytest.fixture
def zarr(tmp_path):
    library = pytest.importorskip("zarr", reason="zarr is not installed")
    rows = library.create_array(tmp_path / "x.zarr", shape=X.shape, chunks=(100, 12), dtype="f4")
    rows[:] = X
    return rows


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@every_backend
@pytest.mark.parametrize("kind", ["hdf5", "zarr", "mapped"])
def test_rows_on_disk_give_the_same_bits_as_rows_in_memory(kind, backend, request):
    rows = request.getfixturevalue(kind)
    np.testing.assert_array_equal(nnxp.predict(NET, rows, backend), nnxp.predict(NET, X, backend))


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
def test_a_source_is_read_in_tiles_and_never_whole(kind, request):
    rows, read = request.getfixturevalue(kind), []

    class Spied:
        shape, dtype = rows.shape, rows.dtype

        def __getitem__(self, asked):
            read.append(asked.stop - asked.start)
            return rows[asked]

    nnxp.predict(NET, Spied(), "cpu", memory_limit="64 KiB", workers=1)
    assert sum(read) == len(X)
    assert max(read) * X[0].nbytes < 64 * 1024


@every_backend
def test_how_rows_are_fed_does_not_change_the_bits(backend):
    whole = nnxp.predict(NET, X, backend)
    for fed in (np.asfortranarray(X), np.repeat(X, 2, axis=0)[::2], X.astype("float64")):
        np.testing.assert_array_equal(nnxp.predict(NET, fed, backend), whole)


@every_backend
def test_columns_of_several_arrays_are_rows(backend, mapped):
    columns = nnxp.Columns(mapped[:, :5], X[:, 5].astype("float64"), X[:, 6:].copy())
    assert columns.shape == X.shape
    np.testing.assert_array_equal(
        nnxp.predict(NET, columns, backend), nnxp.predict(NET, X, backend)
    )


def test_columns_must_share_their_rows():
    with pytest.raises(nnxp.ShapeError, match="share axis 0"):
        nnxp.Columns(X, X[:10])
    with pytest.raises(nnxp.ShapeError, match="takes inputs"):
        nnxp.Columns(X, 3.0)
    with pytest.raises(nnxp.ShapeError, match="takes inputs"):
        nnxp.Columns()
    with pytest.raises(nnxp.OptionError, match="slices of rows"):
        nnxp.Columns(X)[3]
    with pytest.raises(nnxp.DtypeMismatch, match="real numbers"):
        nnxp.predict(NET, nnxp.Columns(X[:, :11], np.array([None] * len(X))), "cpu")


@pytest.mark.parametrize("backend", ["numpy", "sim"])
def test_results_go_into_hdf5_by_way_of_predict_iter(backend, hdf5, tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(tmp_path / "y.h5", "w") as file:
        y = file.create_dataset("y", (len(X), 3), "f4")
        batches = (hdf5[start : start + 700] for start in range(0, len(X), 700))
        for i, batch in enumerate(nnxp.predict_iter(NET, batches, backend)):
            y[i * 700 : i * 700 + len(batch)] = batch
        np.testing.assert_allclose(y[:], nnxp.predict(NET, X, "cpu"), rtol=1e-5, atol=1e-6)
