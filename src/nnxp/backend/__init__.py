"""Choosing where to compute.

An explicit argument beats `use_backend(...)`, which beats `set_backend(...)`, which beats the
environment variable NNXP_BACKEND, which beats the automatic choice: a usable GPU, else the CPU.
"auto" at any of these levels asks the next one. A choice that cannot be met raises
BackendUnavailable; only the automatic choice falls back, and `backend.why` says why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module

from nnxp._arrays import Array, HostArray, get_array_module, is_array, is_numeric, place_of
from nnxp._errors import BackendUnavailable, DtypeMismatch
from nnxp.backend._base import Availability, Backend, Budget, Memory, Plan, Sweep

__all__ = [
    "Availability",
    "Backend",
    "Budget",
    "Memory",
    "Plan",
    "Sweep",
    "asnumpy",
    "available_backends",
    "get_array_module",
    "get_backend",
    "home_of",
    "set_backend",
    "to_backend",
    "use_backend",
]

# The table of backends: the name of the library, what its devices are called, and its module,
# which has availability(index) and connect(index, why).
TABLE = (
    ("cupy", "cuda", "nnxp.backend.cuda"),
    ("numpy", "cpu", "nnxp.backend.cpu"),
    ("sim", "sim", "nnxp.backend.sim"),
)
NAMES = (
    f"the names are auto, {', '.join(dict.fromkeys(word for row in TABLE for word in row[:2]))}, "
    'and a device such as "cuda:1"'
)
_AUTOMATIC = ("cupy", "numpy")  # in this order; the last one is always there


class _Choice(str):
    """The name that one use_backend block chose, and what was chosen around the block."""

    before: str

    def holds_in(self, current: str) -> bool:
        """Whether this very choice is in force, or was before those that are."""
        while isinstance(current, _Choice):
            if current is self:
                return True
            current = current.before
        return False


_used: ContextVar[str] = ContextVar("nnxp_backend", default="auto")
_set = "auto"


def get_backend(backend: str | Backend = "auto") -> Backend:
    """The backend of this name, or the one that is chosen here.

    "auto" is the choice of `use_backend`, else of `set_backend`, else of the environment variable
    NNXP_BACKEND, else a GPU that works, else the CPU.

        backend = nnxp.get_backend()
        print(backend.name, backend.device, backend.why)
        nnxp.get_backend("numpy").device == "cpu"

    Args:
        backend: "auto", "numpy" or "cpu", "cupy" or "cuda", "cuda:1", "sim", "sim:1". A Backend is
            returned as it is.

    Raises:
        BackendUnavailable: the name or device is unknown, or it cannot be used here; `reason` and
            `hint` say why, and what to do.
    """
    if isinstance(backend, Backend):
        return backend
    used = _used.get()
    for name, asked_by in (
        (_name(backend), f"backend={backend!r:.60}"),
        (used, f"use_backend({used!r})"),
        (_set, f"set_backend({_set!r})"),
        (_environment(), f"NNXP_BACKEND={_environment()}"),
    ):
        if name != "auto":
            return _connect(name, asked_by)
    return _choose()


@contextmanager
def use_backend(backend: str | Backend) -> Iterator[Backend]:
    """Within the block, in this thread or asyncio task only, `backend` is the default.

    A block that a generator entered in one context may be left in another: where this choice is in
    force, the one before it is again, and a context that never knew of it stays as it is.

        with nnxp.use_backend("sim") as backend:
            nnxp.predict(net, x)                # on the simulated GPU
        nnxp.get_backend("auto").name != "sim"

    Args:
        backend: a name as for `get_backend`; "auto" asks the choices around the block.

    Yields:
        The Backend.

    Raises:
        BackendUnavailable: it cannot be used here.
    """
    name = _name(backend)
    if name != "auto":
        get_backend(backend)
    own = _Choice(name)
    own.before = _used.get()
    _used.set(own)
    try:
        yield get_backend(backend)
    finally:
        if own.holds_in(_used.get()):
            _used.set(own.before)


def set_backend(backend: str | Backend) -> Backend:
    """From now on, in every thread of this process, `backend` is the default.

        nnxp.set_backend("numpy")
        nnxp.set_backend("auto")                # the automatic choice again

    Args:
        backend: a name as for `get_backend`.

    Returns:
        The Backend that is chosen now; `use_backend`, where it is in force, is above it.

    Raises:
        BackendUnavailable: it cannot be used here; then the default is as it was.
    """
    global _set
    name = _name(backend)
    if name != "auto":
        get_backend(backend)
    _set = name
    return get_backend(backend)


def available_backends() -> dict[str, Availability]:
    """For every backend whether it can be used here, and if not, why, and what fixes it.

    Where NNXP_BACKEND names the CPU, CUDA is not asked.

        for name, availability in nnxp.available_backends().items():
            print(name, availability.ok, availability.reason, availability.hint)

    Returns:
        An Availability for each of "cupy", "numpy" and "sim". Never raises.
    """
    availabilities, chosen = {}, parsed(_environment())
    for name, _, module in TABLE:
        if name == "cupy" and chosen and chosen[0] == "cpu":
            reason = f"NNXP_BACKEND={_environment()} says not to touch CUDA"
            availabilities[name] = Availability(
                False, reason, "Unset NNXP_BACKEND to let it be tried"
            )
            continue
        try:
            availabilities[name] = _availability(module, 0)
        except BackendUnavailable as error:
            availabilities[name] = Availability(False, error.reason, error.hint)
    return availabilities


def to_backend(x: Array, backend: str | Backend = "auto") -> Array:
    """x on this backend: as it is if it lives there, else a copy. Lists become arrays.

        there = nnxp.to_backend(x, "sim")
        y = net.to("sim")(there)

    Args:
        x: an array of any library here, or a list of numbers, of any shape.
        backend: a name as for `get_backend`.

    Returns:
        An array of the backend's library, of the same shape and type.

    Raises:
        BackendUnavailable: the backend cannot be used here.
        DtypeMismatch: x holds objects or text.
    """
    target = get_backend(backend)
    if is_array(x) and place_of(x) == target.device:
        return x
    host = asnumpy(x)
    if not (is_numeric(host.dtype) or host.dtype.kind == "c"):
        raise DtypeMismatch(f"an array of {host.dtype} cannot be moved to {target.device}")
    return target.put(host)


def asnumpy(x: Array) -> HostArray:
    """x as a NumPy array: as it is if it is one, else a copy in host memory.

        y = nnxp.asnumpy(nnxp.to_backend(x, "sim"))
        bool((y == x).all()) == True

    Args:
        x: an array of any library here, or a list of numbers, of any shape.

    Returns:
        A NumPy array of the same shape and type.

    Raises:
        DtypeMismatch, ShapeError: x holds no numbers, or lists of different lengths.
    """
    if is_array(x) and place_of(x) != "cpu":
        return home_of(place_of(x)).get(x)
    import numpy as np

    from nnxp._exchange import host_rows

    return np.asarray(x) if is_array(x) else host_rows(x)


def home_of(place: str) -> Backend:
    """The backend for a place where an array was found, such as "cuda:0"."""
    return _connect(place, f"an array on {place}")


def _name(backend: str | Backend) -> str:
    if isinstance(backend, Backend):
        return backend.device
    name = str(backend)
    return "auto" if name.lower() == "auto" else name


def _environment() -> str:
    return _name(os.environ.get("NNXP_BACKEND", "").strip() or "auto")


def parsed(name: str) -> tuple[str, str, int] | None:
    """A backend's devices, its module, and the number of the device, by a name in any spelling;
    None for a name of no backend."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", name.lower())
    for library, device, module in TABLE:
        if match and match[1] in (library, device):
            return device, module, int(match[2] or 0)
    return None


def _connect(name: str, asked_by: str) -> Backend:
    asked = parsed(name)
    if asked is None:
        reason = f"{asked_by}: there is no backend {name!r:.60}"
        raise BackendUnavailable(reason, NAMES[0].upper() + NAMES[1:])
    _, module, index = asked
    availability = _availability(module, index)
    if not availability.ok:
        raise BackendUnavailable(f"{asked_by}: {availability.reason}", availability.hint)
    backend: Backend = import_module(module).connect(index, f"{availability.reason}; {asked_by}")
    return backend


def _choose() -> Backend:
    refused: list[str] = []
    for name, _, module in TABLE:
        if name not in _AUTOMATIC:
            continue
        availability = _availability(module, 0)
        if availability.ok:
            why = "; ".join([availability.reason, "chosen automatically", *refused])
            backend: Backend = import_module(module).connect(0, why)
            return backend
        refused.append(f"no GPU: {availability.reason}")
    raise AssertionError("the last automatic backend is always there")


def _availability(module: str, index: int) -> Availability:
    availability: Availability = import_module(module).availability(index)
    return availability
