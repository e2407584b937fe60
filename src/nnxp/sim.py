"""A pretend GPU: NumPy behind a wall.

Its arrays live on `Device(0)` or `Device(1)`. As CuPy's do, they refuse to meet a NumPy array, an
array of the other device, or a device that is not the current one; they never become NumPy arrays
silently, and reductions give 0-d arrays. Each device counts what crosses the wall, can be given a
byte limit beyond which it raises OutOfMemoryError, and fills memory that is not yet written, or no
longer owned, with NaN. It shows that code keeps the rules, not that CUDA is right.

    device = nnxp.sim.Device(0)
    with device:
        x = nnxp.sim.asarray(host)      # in: counted
        y = nnxp.sim.exp(x)             # on the device
        y.get()                         # out: counted
    assert device.count == nnxp.sim.Count(put=1, get=1)

Tests of your own code may set `device.limit`, a number of bytes, or `device.lazy`: then copies take
as long as a device may take, until somebody waits. What `y.get(out=out, blocking=False)` is to fill
holds NaN until then, and a host array that changes between `x.set(host)` and then is an error, for
a device may read it late. Copies queue in the current `Stream()`, as in CuPy: a blocking `get` and
`stream.synchronize()` wait for those of one stream, `device.synchronize()` for all.
`device.reset()` sets all back to the beginning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np

from nnxp import _library
from nnxp._arrays import HostArray, Shape
from nnxp._errors import OptionError

DEVICES = 2
"""How many simulated devices there are."""

DLPACK = 12
"""What these devices are to DLPack: kDLExtDev."""

# What looks at an array, or copies it, from wherever the current device is.
_ANYWHERE = (_library.VIEWS - {"getitem"}) | {"copy"}


class OutOfMemoryError(MemoryError):
    """The device's byte limit is reached."""


@dataclass
class Count:
    """What happened at the wall: arrays copied in and out, waits, and silent crossings.

    `implicit` counts the crossings that code did not spell out: float(x), bool(x), x.item().
    """

    put: int = 0
    get: int = 0
    synchronize: int = 0
    implicit: int = 0


class Device:
    """One simulated device; `with Device(1):` makes it the current one in this thread."""

    _all: ClassVar[dict[int, Device]] = {}
    _current: ClassVar = threading.local()

    id: int
    limit: int | None
    used: int
    peak: int
    count: Count
    lazy: bool

    def __new__(cls, index: int = 0) -> Device:
        if index not in range(DEVICES):
            raise OptionError(
                f"there are {DEVICES} simulated devices, 0 to {DEVICES - 1}, not {index!r:.60}"
            )
        if index not in cls._all:
            device = super().__new__(cls)
            device.id, device.used = index, 0
            device._lock = threading.RLock()  # a collection within may free an array
            device.reset()
            cls._all[index] = device
        return cls._all[index]

    _lock: threading.RLock

    def reset(self) -> None:
        """Forget the counts, the peak, the limit and copies under way; memory stays in use."""
        self.limit, self.peak, self.count = None, self.used, Count()
        self.lazy, self._under_way = False, []

    @classmethod
    def current(cls) -> Device:
        stack = getattr(cls._current, "stack", None)
        return stack[-1] if stack else Device(0)

    def __enter__(self) -> Device:
        self._current.__dict__.setdefault("stack", []).append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._current.stack.pop()

    _under_way: list[tuple[Stream, Callable[[], None]]]

    def synchronize(self) -> None:
        """Wait for everything that was begun: copies of a lazy device end here."""
        self.tally("synchronize")
        self._end_copies()

    def _end_copies(self, stream: Stream | None = None) -> None:
        """End the copies of this stream, or of all."""
        with self._lock:
            begun = self._under_way
            ending = [copy for copy in begun if stream in (None, copy[0])]
            self._under_way = [copy for copy in begun if copy not in ending]
        for _, end in ending:
            end()

    def _later(self, end: Callable[[], None]) -> None:
        with self._lock:
            self._under_way.append((Stream.current(), end))

    def tally(self, event: str) -> None:
        with self._lock:
            setattr(self.count, event, getattr(self.count, event) + 1)

    def _claim(self, size: int) -> None:
        with self._lock:
            if self.limit is not None and self.used + size > self.limit:
                raise OutOfMemoryError(
                    f"out of memory on {self}: {size:,} bytes asked for, {self.used:,} of "
                    f"{self.limit:,} in use"
                )
            self.used += size
            self.peak = max(self.peak, self.used)

    def _release(self, size: int) -> None:
        with self._lock:
            self.used -= size

    def __reduce__(self) -> tuple[type[Device], tuple[int]]:
        return Device, (self.id,)

    def __repr__(self) -> str:
        return f"sim:{self.id}"


class Stream:
    """A queue of copies on the current device; `with stream:` makes it the current one."""

    _current: ClassVar = threading.local()

    def __init__(self) -> None:
        self.device = Device.current()

    @classmethod
    def current(cls) -> Stream:
        """The stream of this thread and device; without one of its own, the device's default."""
        stack = getattr(cls._current, "stack", [])
        mine = [stream for stream in stack if stream.device is Device.current()]
        return mine[-1] if mine else cls._default(Device.current())

    @classmethod
    @cache
    def _default(cls, device: Device) -> Stream:
        with device:
            return cls()

    def __enter__(self) -> Stream:
        if self.device is not Device.current():
            raise RuntimeError(f"the stream is on {self.device}, but {Device.current()} is current")
        self._current.__dict__.setdefault("stack", []).append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._current.stack.pop()

    def synchronize(self) -> None:
        """Wait for what this stream was given."""
        self.device.tally("synchronize")
        self.device._end_copies(self)


class _Memory:
    """One allocation: it is counted while it lives and poisoned when it dies."""

    owner: Any

    def __init__(self, host: HostArray, device: Device) -> None:
        self.size = 0  # so that __del__ gives back nothing if the claim fails
        device._claim(host.nbytes)
        self.host, self.device, self.size = host, device, host.nbytes

    @classmethod
    def of(cls, owner: Any, host: HostArray, device: Device) -> _Memory:
        """Memory that is another's: neither counted nor poisoned, but kept alive."""
        memory = cls.__new__(cls)
        memory.host, memory.device, memory.size, memory.owner = host, device, 0, owner
        return memory

    def __del__(self) -> None:
        if self.size:
            _poison(self.host)
            self.device._release(self.size)


def _poison(host: HostArray) -> None:
    if host.dtype.kind in "fV" and host.flags.writeable:
        host.fill(np.nan)


def _unchanged(host: HostArray, before: bytes) -> None:
    if host.tobytes() != before:
        raise RuntimeError(
            f"a host array, {host.dtype}{host.shape}, was changed before its copy to the device "
            "was waited for: a device may have read the new numbers, or some of each"
        )


class ndarray(_library.ndarray):
    """An array on a simulated device; made by the functions of this module."""

    __slots__ = ("__weakref__", "_host", "_memory", "device")
    library = "sim"

    def __init__(self, host: HostArray, memory: _Memory) -> None:
        self._host, self._memory, self.device = host, memory, memory.device

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self._host.shape

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return self._host.dtype

    @property
    def strides(self) -> tuple[int, ...]:
        return self._host.strides

    @property
    def flags(self) -> Any:
        return self._host.flags

    @property
    def base(self) -> ndarray | None:
        """None if the memory is its own; for a view, an array of all of it."""
        memory = self._memory
        return None if self._host is memory.host else ndarray(memory.host, memory)

    def __repr__(self) -> str:
        return f"<sim.ndarray {self.dtype}{list(self.shape)} on {self.device}>"

    # across the wall
    def get(self, out: HostArray | None = None, *, blocking: bool = True) -> HostArray:
        """A copy in host memory, or `out` filled with one: at once, or if not blocking, later."""
        self.device.tally("get")
        if out is None:
            out = np.empty(self.shape, self.dtype)
        if out.shape != self.shape or out.dtype != self.dtype:
            raise ValueError(f"out is {out.dtype}{out.shape}, not {self.dtype}{self.shape}")
        if self.device.lazy and not blocking:
            _poison(out)
            self.device._later(partial(np.copyto, out, self._host.copy()))
        else:
            self.device._end_copies(Stream.current())
            out[...] = self._host
        return out

    def set(self, host: HostArray) -> None:
        """Fill with a host array of the same shape and type, which must not change meanwhile."""
        if host.shape != self.shape or host.dtype != self.dtype:
            raise ValueError(f"{host.dtype}{host.shape} does not fit {self.dtype}{self.shape}")
        self.device.tally("put")
        self._host[...] = host
        if self.device.lazy:
            self.device._later(partial(_unchanged, host, host.tobytes()))

    def __array__(self, *args: object, **kwargs: object) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPACK, self.device.id

    def __dlpack__(self, **options: object) -> Any:
        return self._host.__dlpack__()

    def _numbers(self, what: str) -> HostArray:
        self.device.tally("implicit")
        return self._host

    # computing
    @classmethod
    def apply(cls, name: str, arrays: tuple[Any, ...], options: dict[str, Any], out: Any) -> Any:
        """NumPy's function of this name, on the host arrays behind the wall."""
        anywhere = name in _ANYWHERE
        hosts = tuple(_host_of(x, name, anywhere) for x in arrays)
        options = {key: _unwrap(value) for key, value in options.items()}
        if out is not None:
            _library.compute(np, name, hosts, options | {"out": _host_of(out, name)})
            return out
        result = _library.compute(np, name, hosts, options)
        if name.startswith("empty"):
            _poison(result)
        return _wrap(result, arrays[0].device if anywhere else Device.current(), arrays)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check_current()
        self._host[_unwrap(key)] = _host_of(value, "x[...] = y")

    def _check_current(self) -> None:
        current = Device.current()
        if self.device is not current:
            raise ValueError(
                "Array device must be same as the current device: "
                f"array device = {self.device.id} while current = {current.id}"
            )


def _host_of(x: Any, name: str, anywhere: bool = False) -> Any:
    """The host array behind an argument of a function; scalars and None as they are."""
    if isinstance(x, ndarray):
        if not anywhere:
            x._check_current()
        return x._host
    if x is None or isinstance(x, int | float | np.generic) or name == "take":
        return _unwrap(x)  # the indices of `take` may be a list
    raise TypeError(f"Unsupported type {type(x)}")


def _unwrap(x: Any) -> Any:
    """An option, or an index, with host arrays in place of those of the device."""
    if isinstance(x, ndarray):
        x._check_current()
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, tuple | list):
        return type(x)(map(_unwrap, x))
    return x


def _wrap(host: Any, device: Device, sources: Sequence[Any] = ()) -> Any:
    """A result on the device: a view if it shares a source's memory, else memory of its own."""
    if isinstance(host, np.ndarray | np.generic):
        array = np.asarray(host)
        for source in sources:
            views = array.base is not None and isinstance(source, ndarray)
            if views and np.may_share_memory(array, source._memory.host):
                return ndarray(array, source._memory)
        return ndarray(array, _Memory(array, device))
    if isinstance(host, tuple | list):
        return type(host)(_wrap(x, device, sources) for x in host)
    return host


def asarray(x: Any, dtype: Any = None) -> ndarray:
    """x on the current device: a host array is copied in and counted, a device array stays."""
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    device = Device.current()
    array: ndarray = _wrap(np.array(x, dtype=dtype), device)
    device.tally("put")
    return array


array = asarray


class _HostSide:
    """A foreign array of the device, as NumPy may take it."""

    def __init__(self, x: Any) -> None:
        self.__dlpack__ = x.__dlpack__

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def from_dlpack(x: Any) -> ndarray:
    """Another library's array on a simulated device, as one of ours, sharing its memory."""
    kind, index = x.__dlpack_device__()
    if kind != DLPACK:
        raise ValueError(f"DLPack device {kind} is not a simulated one")
    host = np.from_dlpack(_HostSide(x))
    return ndarray(host, _Memory.of(x, host, Device(index)))


def asnumpy(x: ndarray) -> HostArray:
    """A copy of x in host memory, counted."""
    return x.get()


def __getattr__(name: str) -> Any:
    return _library.module_attribute(ndarray, name)
