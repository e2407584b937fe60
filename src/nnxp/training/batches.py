"""Rows for training: in an order that follows from seed and epoch, or as an iterable gives them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf
from typing import Any

import numpy as np

from nnxp._arrays import Array, HostArray, is_array, place_of, xp_of
from nnxp._errors import DeviceMismatch, DtypeMismatch, NnxpError, OptionError, ShapeError
from nnxp._exchange import host_rows, is_by_name, source_of
from nnxp.backend import asnumpy, home_of, to_backend
from nnxp.layers._layer import Layer
from nnxp.layers.containers import Sequential
from nnxp.layers.norm import Standardize

BLOCK = 64
"""Rows on a disk that stay together when they are shuffled, so that they are read in pieces: so
many, or those of a chunk of the file."""
MIXED = 16
"""Blocks whose rows are mixed with one another, and which stay in memory until they are done."""
KEPT_BYTES = 128 << 20
"""Of these blocks, at most: of large chunks two are mixed, at least, and of large rows a block has
fewer."""
CHECKED = 1 << 20
"""Bytes of targets that are looked at together."""


class Rows:
    """Inputs and targets that share axis 0: `rows.at(ids)` gives these rows of each of them.

    Sources are as for `nnxp.predict`; each is read as it is asked for, and converted to the type
    that the model takes.
    """

    def __init__(
        self, model: Layer, x: Any, y: Any, weights: Any = None, *, memory_limit: int | None = None
    ) -> None:
        named = is_by_name(x)
        if named:
            x = _in_order(model, x)
        self.names = tuple(x) if named else None
        self.single = not (named or isinstance(x, tuple))
        inputs = (x,) if self.single else tuple(x.values()) if named else x
        kinds = [*model.takes, *["float"] * len(inputs)][: len(inputs)]
        dtype = model.dtype or np.dtype("float32")
        standardized = self.single and entrance_of(model) is not None
        self._place = model.place or "cpu"
        self._sources = [
            _Source(source, kind, dtype, standardized)
            for source, kind in zip(inputs, kinds, strict=True)
        ]
        self._target = _Source(y, "target", dtype)
        self._sources.append(self._target)
        if weights is not None:
            self._sources.append(_Source(weights, "weights", dtype))
        counts = [len(source) for source in self._sources]
        if len(set(counts)) > 1:
            one = "; targets are one array" if isinstance(y, tuple | list) else ""
            raise ShapeError(
                f"inputs, targets and weights have {counts} rows: they go together{one}"
            )
        self.count = counts[0]
        for source in self._sources:
            if self._place == "cpu" and source.place != "cpu":
                raise DeviceMismatch(
                    f"the model is on the CPU, but {source.name} on {source.place}: "
                    "nnxp.asnumpy(...) copies rows here, model.to(...) moves the model"
                )
        if weights is not None:
            if self._sources[-1].first.ndim > 1:
                shape = [self.count, *self._sources[-1].first.shape[1:]]
                raise ShapeError(f"weights are one number for each row, not {shape}")
            self._sources[-1].look_by(_check_weights)
        self.weighted = weights is not None
        self.in_memory = all(source.in_memory for source in self._sources)
        self.block, self.mixed, self.kept_bytes = self._blocks(memory_limit)

    def _blocks(self, memory_limit: int | None) -> tuple[int, int, int]:
        """The rows that stay together, the blocks of them that are mixed, and the bytes of those
        that are kept."""
        sliced = [source for source in self._sources if source.sliced]
        if not sliced:
            return BLOCK, MIXED, 0
        chunk = max(source.chunk for source in sliced)
        row = sum(source.read_bytes for source in sliced)
        budget = KEPT_BYTES if memory_limit is None else min(KEPT_BYTES, memory_limit // 4)
        mixed, most = MIXED, budget // ((MIXED + 1) * row)
        if most >= chunk:
            block = min(-(-BLOCK // chunk) * chunk, most - most % chunk)
        else:  # fewer, that are chunks as far as two are held
            mixed = max(2, budget // (chunk * row) - 1)
            block = min(chunk, budget // ((mixed + 1) * row))
        kept = mixed if block else 0  # of the largest rows none
        for source in sliced:
            source.block, source.kept = max(1, block), kept
        return max(1, block), mixed, (kept + 1) * block * row

    def at(self, ids: HostArray) -> tuple[Any, ...]:
        """(x, target) or (x, target, weights) for these rows, where the model is."""
        arrays = [source.at(ids) for source in self._sources]
        if self._place != "cpu":
            home = home_of(self._place)
            arrays = [to_backend(array, home) for array in arrays]
        return self._grouped(arrays)

    def like(self, count: int) -> tuple[Any, ...]:
        """What `at` gives for so many rows, in shapes and types: host arrays without memory."""
        return self._grouped(
            [
                np.broadcast_to(np.zeros((), first.dtype), (count, *first.shape[1:]))
                for first in (source.first for source in self._sources)
            ]
        )

    def batches(self, batch: int, seed: int, epoch: int) -> Iterator[tuple[Rows, HostArray]]:
        """An epoch's batches of so many rows: where they lie, and which rows they are."""
        block = None if self.in_memory else self.block
        order = order_of(self.count, seed, epoch, block, self.mixed)
        for ids in batches_of(order, batch):
            yield self, ids
        self.let_go()

    def let_go(self) -> None:
        """Of the blocks that are kept."""
        for source in self._sources:
            source.blocks.clear()

    @property
    def row_bytes(self) -> int:
        """The bytes of a row as it is given, and at most twice as it is read."""
        return sum(source.first.nbytes + 2 * source.read_bytes for source in self._sources)

    def _grouped(self, arrays: list[Any]) -> tuple[Any, ...]:
        """(x, target) or (x, target, weights), of the arrays of all sources."""
        mark = len(self._sources) - (2 if self.weighted else 1)
        x: Any = tuple(arrays[:mark])
        if self.names is not None:
            x = dict(zip(self.names, x, strict=True))
        elif self.single:
            (x,) = x
        return x, *arrays[mark:]

    def check_targets(self, check: Callable[[Array], None]) -> None:
        """Have all targets looked at: now, or as they are read where they are not in memory."""
        self._target.look_by(check)

    def digest(self, count: int = 64) -> str:
        """A hash of so many rows, from the first to the last: to know the data by."""
        ids = np.unique(np.linspace(0, self.count - 1, count).astype("int64"))
        data = hashlib.sha256()
        for source in self._sources:
            rows = asnumpy(source.at(ids))
            data.update(f"{rows.dtype}{rows.shape}".encode() + rows.tobytes())
        self.let_go()
        return data.hexdigest()


class Batches:
    """Batches (x, y) or (x, y, weights) from an iterable, in its order and sizes.

    An iterable is gone through anew in each epoch, and a function is called with the epoch, from 1,
    and answers an iterable.
    """

    count = None
    """The rows of an epoch: not known before its end."""

    def __init__(
        self,
        model: Layer,
        batches: Any,
        check: Callable[[Rows], None],
        memory_limit: int | None = None,
    ) -> None:
        named = isinstance(batches, str | bytes | Mapping) or hasattr(batches, "shape")
        if named or not (isinstance(batches, Iterable) or callable(batches)):
            raise OptionError(
                "fit takes rows x and targets y, or batches (x, y) from an iterable or a function "
                f"of the epoch; there is no y, and x is {_short(batches)}"
            )
        if not isinstance(batches, Iterable):
            try:
                inspect.signature(batches).bind(1)
            except ValueError:  # some functions do not tell what they take
                pass
            except TypeError as error:
                raise OptionError(
                    f"a function of batches is called with the epoch, from 1, which "
                    f"{batches!r:.80} does not take: {error}"
                ) from None
        self._model, self._batches, self._check = model, batches, check
        self.in_memory = isinstance(batches, list | tuple)
        self._memory_limit = memory_limit

    @property
    def once(self) -> bool:
        """Whether they can be gone through only once."""
        return isinstance(self._batches, Iterator)

    def batches(self, batch: int, seed: int, epoch: int) -> Iterator[tuple[Rows, HostArray]]:
        """An epoch's batches: each as rows of its own, and which of them."""
        given = self._batches
        items = given if isinstance(given, Iterable) else given(epoch + 1)
        if not isinstance(items, Iterable):
            raise OptionError(f"a function of batches answers an iterable, not {_short(items)}")
        for number, item in enumerate(items, 1):
            try:
                if not (isinstance(item, tuple | list) and len(item) in (2, 3)):
                    raise ShapeError(
                        f"a batch is (x, y), or (x, y, weights), not {_short(item)}; arrays of all "
                        "rows are given as fit(model, x, y)"
                    )
                x, *others = item
                if isinstance(x, list) and self._model.required_inputs > 1:
                    x = tuple(x)  # of which a DataLoader makes a list
                rows = Rows(self._model, x, *others, memory_limit=self._memory_limit)
                self._check(rows)
            except NnxpError as error:
                raise of_batch(error, epoch, number) from None
            yield rows, np.arange(rows.count)


def of_batch(error: NnxpError, epoch: int, number: int) -> NnxpError:
    """The same error, which tells its batch before the layer that it came from."""
    return type(error)(f"epoch {epoch + 1}, batch {number}: {error}")


def _short(x: object) -> str:
    """What something is, in a few words."""
    shape = getattr(x, "shape", None)
    return f"{x!r:.60}" if shape is None else f"{type(x).__name__} {tuple(shape)}"


def entrance_of(model: Layer) -> str | None:
    """The path of the Standardize that comes first in a model, where its rows go as they come."""
    path = ""
    while isinstance(model, Sequential) and model.layers:
        path, model = f"{path}.layers.0".strip("."), model.layers[0]
    return path if type(model) is Standardize else None


def _in_order(model: Layer, x: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by name in the order in which the model takes them."""
    names = list(inspect.signature(type(model).__call__).parameters)[1:]
    if not x.keys() <= set(names):
        raise OptionError(f"{model!r:.100} takes {', '.join(names)}, not {', '.join(x)}")
    return {name: x[name] for name in names if name in x}


class _Source:
    """One array of rows, or what gives them.

    Rows are rounded to `dtype`, but if they are `standardized` first: of float64 or of whole
    numbers that the type may not hold, they stay in float64 until then.
    """

    def __init__(self, x: Any, kind: str, dtype: np.dtype[Any], standardized: bool = False) -> None:
        self.kind = kind
        self.name = {"target": "the target", "weights": "the weights"}.get(kind, "x")
        self.place = place_of(x) if is_array(x) else "cpu"
        self._device = x if self.place != "cpu" else None
        try:
            self._source = x if self._device is not None else source_of(x)
        except (ShapeError, DtypeMismatch) as error:
            if isinstance(x, Iterator):
                raise ShapeError(
                    f"{self.name} is an iterator, and rows have a length, as an array or a file "
                    "has; without y, fit takes batches (x, y) from an iterator"
                ) from None
            if self.name == "x":
                raise
            named = kind == "target" and isinstance(error, DtypeMismatch)
            fix = "; of classes, numpy.unique(y, return_inverse=True) has the numbers"
            raise type(error)(f"{self.name}: {error}{fix if named else ''}") from None
        self._look: Callable[[Array], None] | None = None
        self.in_memory = self._device is not None or type(self._source) is np.ndarray
        self.sliced = self._device is None and not isinstance(self._source, np.ndarray)
        self.block, self.kept = 1, 0
        self.blocks: dict[int, HostArray] = {}  # the last read is the last
        self._wanted, self._standardized = dtype, standardized
        if not len(self):
            raise ShapeError("there are no rows to train on")
        self.first = self.at(np.zeros(1, "int64"))
        self.read_bytes = max(1, int(getattr(self._source[:1], "nbytes", self.first.nbytes)))

    def __len__(self) -> int:
        return int(self._source.shape[0])

    @property
    def chunk(self) -> int:
        """The rows of a chunk of the file, where it tells: HDF5, Zarr, Dask."""
        rows = getattr(self._source, "chunks", None)
        while isinstance(rows, tuple) and rows:
            rows = rows[0]
        return max(1, int(rows)) if isinstance(rows, int | np.integer) else 1

    def look_by(self, look: Callable[[Array], None]) -> None:
        """Have all rows looked at: now, or as they are read where they are not in memory."""
        if not self.in_memory:
            self._look = look
            return
        block = max(1, CHECKED // max(1, self.first.nbytes))
        for start in range(0, len(self), block):
            look(self.at(np.arange(start, min(start + block, len(self)))))

    @np.errstate(all="ignore")  # what the type does not hold is infinite, and so is the loss
    def at(self, ids: HostArray) -> Array:
        if self._device is not None:
            with home_of(place_of(self._device)).current():
                at = to_backend(ids, home_of(place_of(self._device)))
                return self._typed(xp_of(self._device).take(self._device, at, axis=0))
        rows = self._typed(self._read(ids) if self.sliced else host_rows(self._source[ids]))
        if self._look is not None:
            self._look(rows)
        return rows

    def _read(self, ids: HostArray) -> HostArray:
        """Rows by blocks, each in one slice; the last `kept` blocks wait for the next call."""
        numbers, places = ids // self.block, ids % self.block
        parts: list[tuple[HostArray, HostArray]] = []
        for number in dict.fromkeys(numbers.tolist()):
            block = self.blocks.pop(number, None)
            if block is None:
                start = number * self.block
                end = min(start + self.block, len(self))
                block = host_rows(self._source[start:end])
            wanted = numbers == number
            parts.append((wanted, block[places[wanted]]))
            self.blocks[number] = block
            while len(self.blocks) > self.kept:
                del self.blocks[next(iter(self.blocks))]
        kinds = {part.dtype for _, part in parts}  # where something is missing, it is another one
        rows: HostArray = np.empty((len(ids), *parts[0][1].shape[1:]), np.result_type(*kinds))
        for wanted, part in parts:
            rows[wanted] = part
        return rows

    def _typed(self, rows: Array) -> Array:
        if self.kind == "any":
            return rows
        if self.kind in ("int", "target") and rows.dtype.kind in "iu":
            return rows.astype("int64", copy=False)
        if self.kind == "int":
            raise DtypeMismatch(f"the model takes whole numbers, but x is {rows.dtype}")
        if self._standardized and rows.dtype.kind in "iuf" and (
            rows.dtype.itemsize > self._wanted.itemsize
            or (rows.dtype.kind in "iu" and rows.dtype.itemsize == self._wanted.itemsize)
        ):  # fmt: skip
            return rows.astype("float64", copy=False)
        return rows.astype(self._wanted, copy=False)


def _check_weights(weights: Array) -> None:
    """Raise OptionError for weights that count nothing in a mean."""
    low, high = float(weights.min()), float(weights.max())
    if not (low >= 0 and high < inf):
        raise OptionError(
            f"weights of rows are finite numbers, 0 or more, in {weights.dtype}; they go from "
            f"{low:g} to {high:g}"
        )


def order_of(
    count: int, seed: int, epoch: int, block: int | None = None, mixed: int = MIXED
) -> HostArray:
    """The rows of an epoch in their order, which follows from seed and epoch alone.

    Rows that are not in memory are shuffled by blocks of so many, and within groups of blocks.
    """
    rng = np.random.default_rng([seed, epoch])
    if block is None:
        return rng.permutation(count)
    starts = rng.permutation(-(-count // block)) * block
    blocks = [np.arange(start, min(start + block, count)) for start in starts]
    groups = [np.concatenate(blocks[i : i + mixed]) for i in range(0, len(blocks), mixed)]
    return np.concatenate([rng.permutation(group) for group in groups])


def batches_of(order: HostArray, batch: int, *, joined: bool = True) -> list[HostArray]:
    """The order in pieces of so many rows; the rest is a smaller one.

    A single row that is left goes with the piece before it, if `joined`: it has no variance.
    """
    ends = list(range(batch, len(order), batch))
    if joined and ends and len(order) - ends[-1] == 1:
        ends.pop()
    return np.split(order, ends)
