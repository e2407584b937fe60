"""nnxp's plugin for pytest: tests on every backend, and a run that cannot pass by skipping them.

    def test_my_function(xp, nnxp_draw):          # runs once on each backend
        assert (my_function(nnxp_draw((3, 4))) > 0).all()

    @pytest.mark.nnxp_gpu                         # skipped, with the reason, where no GPU is usable
    def test_that_needs_cuda(): ...

The last lines of a run say for each backend how much ran there, or why nothing did. A test that
leaves another default backend behind fails. Under pytest-xdist all GPU tests go to one worker.

It stands outside the package so that pytest starts without NumPy or nnxp: until a test module
imports nnxp, or a test or an option asks for what is offered here, nothing happens.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

NAMES = ("numpy", "sim", "cupy")
GROUP = "nnxp_gpu"
_LIBRARIES = {"cpu": "numpy", "cuda": "cupy"}  # devices that are not called by their library
_RAN, _COMPARED, _SKIPPED = "nnxp_ran", "nnxp_compared", "nnxp_skipped"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nnxp", "array backends (nnxp)")
    group.addoption(
        "--nnxp-backends",
        metavar="NAMES",
        help=f"Where tests with the fixtures xp and backend run; default: {','.join(NAMES)}. "
        "What is not usable here is skipped, with the reason.",
    )
    group.addoption(
        "--nnxp-require",
        metavar="NAMES",
        help="Fail the run unless these are usable and something ran on them, such as cupy. "
        "NNXP_REQUIRE_GPU=1 is the same as --nnxp-require=cupy.",
    )
    group.addoption(
        "--nnxp-gpu-memory",
        metavar="SIZE",
        default=os.environ.get("NNXP_GPU_MEMORY"),
        help='Most bytes of CuPy\'s memory pool in a process, such as "2 GiB". '
        "Default: NNXP_GPU_MEMORY, else no limit.",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist decides how tests are spread
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "nnxp_gpu: needs a usable GPU; skipped with the reason where there is none"
    )
    chosen = _names(config, "--nnxp-backends") or NAMES
    required = list(_names(config, "--nnxp-require"))
    if os.environ.get("NNXP_REQUIRE_GPU", "0") not in ("", "0"):
        required.append("cupy")
    if not hasattr(config, "workerinput"):
        _refuse_unusable(required)
    if any(map(_is_gpu, required)) and getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"  # as "load", and a group of tests stays together
    if getattr(config, "workerinput", {}).get(GROUP):
        config.option.loadgroup = True  # pytest-xdist's workers see the command line alone
    config.pluginmanager.register(Run(config, chosen, required), "nnxp_run")
    config.pluginmanager.register(fixtures(chosen), "nnxp_fixtures")


def _names(config: pytest.Config, option: str) -> Sequence[str]:
    """The backends that an option names; an unknown one is an error, never a skip."""
    names = [name.strip() for name in (config.getoption(option) or "").split(",") if name.strip()]
    if names:
        from nnxp.backend import TABLE

        known = dict.fromkeys(word for row in TABLE for word in row[:2])
        for name in names:
            if name.partition(":")[0] not in known:
                listed = ", ".join(known)
                raise pytest.UsageError(f"{option}: no backend {name!r}; there are {listed}")
    return names


def _refuse_unusable(required: Sequence[str]) -> None:
    for name in required:
        import nnxp

        try:
            nnxp.get_backend(name)
        except nnxp.BackendUnavailable as error:
            raise pytest.UsageError(f"nnxp: {name} is required, but {error}") from None


def _is_gpu(name: object) -> bool:
    return str(name).partition(":")[0] in ("cupy", "cuda")


def _library(device: str) -> str:
    name = device.partition(":")[0]
    return _LIBRARIES.get(name, name)


class Run:
    """What ran where in this run, and what was asked of it."""

    def __init__(
        self, config: pytest.Config, chosen: Sequence[str], required: Sequence[str]
    ) -> None:
        self.config, self.chosen, self.required = config, chosen, required
        self.asked = bool(required or config.getoption("--nnxp-backends"))
        self.tests: Counter[str] = Counter()
        self.comparisons: Counter[str] = Counter()
        self.skipped: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)  # around all others, and so before pytest-xdist reads the groups
    def pytest_collection_modifyitems(
        self, items: list[pytest.Item]
    ) -> Generator[None, None, None]:
        if "nnxp" in sys.modules and self.config.pluginmanager.hasplugin("xdist"):
            for item in items:
                params = getattr(getattr(item, "callspec", None), "params", {})
                if item.get_closest_marker("nnxp_gpu") or _is_gpu(params.get("backend")):
                    item.add_marker(pytest.mark.xdist_group(GROUP))
        return (yield)

    def pytest_pycollect_makeitem(self, collector: Any) -> None:
        """From the first module on that imports nnxp, tests are guarded."""
        manager = self.config.pluginmanager
        if "nnxp" in sys.modules and not manager.hasplugin("nnxp_guard"):
            manager.register(Guard(), "nnxp_guard")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist whether groups stay together."""
        node.workerinput[GROUP] = self.config.option.dist == "loadgroup"

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("nnxp_gpu"):
            connect(item, "cupy")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """What ran on a GPU gives back its memory, once its fixtures are gone."""
        try:
            return (yield)
        finally:
            if any(name == _RAN and _is_gpu(value) for name, value in item.user_properties):
                _free_pools()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Note on the test how many comparisons it made, and where."""
        before = _comparisons()
        try:
            return (yield)
        finally:
            for device, count in (_comparisons() - before).items():
                item.user_properties.append((_COMPARED, f"{device} {count}"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collected from the reports, which come from all workers."""
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == _RAN:
                    self.tests[_library(str(value))] += 1
                elif name == _COMPARED:
                    device, count = str(value).split()
                    self.comparisons[_library(device)] += int(count)
                elif name == _SKIPPED:
                    backend, _, reason = str(value).partition(" ")
                    self.skipped.setdefault(_library(backend), reason)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(self.config, "workerinput") and self._missing():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _missing(self) -> list[str]:
        """The required backends on which nothing ran."""
        if self.config.getoption("collectonly"):
            return []
        return [name for name in self.required if not self._ran(_library(name))]

    def _ran(self, name: str) -> str:
        tests, comparisons = self.tests[name], self.comparisons[name]
        counts = [_count(tests, "test"), _count(comparisons, "comparison")]
        return ", ".join(filter(None, counts))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not (self.asked or self.tests or self.comparisons or self.skipped):
            return
        for name in NAMES:
            ran = self._ran(name)
            outcome = ran or f"nothing ran: {self._why_nothing(name)}"
            terminalreporter.write_line(f"nnxp: {name}: {outcome}", yellow=not ran)
        for name in self._missing():
            terminalreporter.write_line(f"nnxp: {name} is required: the run failed", red=True)

    def _why_nothing(self, name: str) -> str:
        import nnxp

        availability = nnxp.available_backends()[name]
        if name in self.skipped or not availability.ok:
            return self.skipped.get(name, availability.reason)
        chosen = name in map(_library, self.chosen)
        return "no test that ran asked for it" if chosen else "not among --nnxp-backends"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s'[: number > 1]}" if number else ""


def _comparisons() -> Counter[str]:
    parity = sys.modules.get("nnxp.testing.parity")
    return Counter(parity.comparisons) if parity else Counter()


def connect(item: pytest.Item, name: str) -> Any:
    """The backend of this name for one test, which is skipped if it is not usable here."""
    import nnxp

    try:
        usable = nnxp.get_backend(name)
    except nnxp.BackendUnavailable as error:
        reason = error.reason.removeprefix(f"backend={name!r}: ")
        item.user_properties.append((_SKIPPED, f"{name} {reason}"))
        pytest.skip(f"{name}: {reason}")
    if _is_gpu(usable.name):
        _prepare_gpu(item)
    item.user_properties.append((_RAN, usable.device))
    return usable


def _prepare_gpu(item: pytest.Item) -> None:
    config = item.config
    alone = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) == 1
    if not alone and not item.nodeid.endswith(f"@{GROUP}"):  # so pytest-xdist marks a group's tests
        mend = "add --dist loadgroup"
        if getattr(config.option, "loadgroup", False):
            mend = (
                f"this pytest-xdist ignores groups under pytest {pytest.__version__}; leave out -n"
            )
        pytest.fail(f"several workers would share the GPU: {mend}", pytrace=False)
    limit = config.getoption("--nnxp-gpu-memory")
    if limit:  # asked again for each test, because a test may have set another
        import cupy

        from nnxp.engine import parse_bytes

        cupy.get_default_memory_pool().set_limit(size=parse_bytes(limit))


def _free_pools() -> None:
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()


def fixtures(names: Sequence[str]) -> object:
    """The fixtures, of which `backend` runs a test once for each of these names."""

    class Fixtures:
        @pytest.fixture(params=names)
        def backend(self, request: pytest.FixtureRequest) -> Generator[Any, None, None]:
            """Each backend in turn, as nnxp.get_backend gives it; its device is the current one."""
            connected = connect(request.node, request.param)
            with connected.current():
                yield connected
                connected.synchronize()

        @pytest.fixture
        def xp(self, backend: Any) -> Any:
            """The array library of each backend in turn: numpy, nnxp.sim, cupy."""
            return backend.xp

        @pytest.fixture
        def nnxp_draw(self, request: pytest.FixtureRequest) -> Callable[..., Any]:
            """draw(shape, dtype="float32"): normal numbers, on the test's backend if it has one.

            Drawn on the host from a seed that belongs to the test, so they are the same on every
            backend and in every run; each call draws on.
            """
            import numpy as np

            from nnxp._arrays import float_dtype
            from nnxp.backend import to_backend

            rng = np.random.default_rng(zlib.crc32(request.node.nodeid.partition("[")[0].encode()))
            where = "backend" in request.fixturenames and request.getfixturevalue("backend")

            def draw(shape: int | tuple[int, ...], dtype: object = "float32") -> Any:
                host = rng.normal(size=shape).astype(float_dtype(dtype))
                return to_backend(host, where) if where else host

            return draw

    return Fixtures()


class Guard:
    """No test changes what the next one runs on."""

    @pytest.fixture(autouse=True)
    def _nnxp_default_backend(self) -> Generator[None, None, None]:
        from nnxp import backend

        before = backend._set, backend._used.get()
        yield
        after = backend._set, backend._used.get()
        if after != before:
            backend._set = before[0]
            backend._used.set(before[1])
            pytest.fail(
                f"the test leaks a default backend: set_backend, use_backend were {before}, and "
                f"are {after}; leave the block of use_backend, or take the fixture `backend`",
                pytrace=False,
            )
