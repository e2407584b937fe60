"""The pytest plugin, seen from a user's project: each run is a pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import nnxp

CUPY = nnxp.available_backends()["cupy"]

PROJECT = """
    import numpy as np
    import pytest
    import nnxp

    def half_exp(x):
        return nnxp.get_array_module(x).exp(x) / 2

    def test_on_each_backend(backend, xp, nnxp_draw):
        x = nnxp_draw((3, 4))
        assert nnxp.get_array_module(x) is xp is backend.xp
        nnxp.testing.assert_close(half_exp(x), np.exp(nnxp.asnumpy(x).astype("d")) / 2, bound=1e-6)

    @pytest.mark.nnxp_gpu
    def test_that_needs_a_gpu():
        pass
"""
LEAK = """
    import nnxp

    def test_that_leaks():
        nnxp.set_backend("sim")

    def test_after_it():
        assert nnxp.get_backend("auto").name != "sim"
"""
# A simulated device in the place of a GPU, to test what happens where there is one.
SIM_IS_THE_GPU = """
    import nnxp_pytest

    nnxp_pytest._is_gpu = lambda name: str(name).startswith("sim")
    nnxp_pytest._free_pools = lambda: print("pools freed")
"""
# A test marked as one for a GPU, which looks at the order of things.
MARKED = """
    import pytest

    @pytest.fixture
    def held():
        yield
        print("fixture gone")

    @pytest.mark.nnxp_gpu
    def test_it(held):
        print("ran")
"""
SIM_IS_CUPY = (
    SIM_IS_THE_GPU
    + """
    connect = nnxp_pytest.connect
    nnxp_pytest.connect = lambda item, name: connect(item, "sim" if name == "cupy" else name)
"""
)
WHO_RAN = """
    import os, time
    import nnxp

    def test_where(backend, nnxp_draw, number):
        time.sleep(0.02)
        print(f"RAN {backend.name} {os.environ.get('PYTEST_XDIST_WORKER')}")

    def pytest_generate_tests(metafunc):
        metafunc.parametrize("number", range(6))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Write files and run pytest there: its exit code and what it printed."""
    for name in ("NNXP_REQUIRE_GPU", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def run(*options, tests=PROJECT, conftest=""):
        (tmp_path / "test_it.py").write_text(re.sub(r"^    ", "", tests, flags=re.MULTILINE))
        (tmp_path / "conftest.py").write_text(re.sub(r"^    ", "", conftest, flags=re.MULTILINE))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *options]
        if "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in os.environ:  # as ci/gpu does
            command += ["-p", "nnxp_pytest", *["-p", "xdist.plugin"] * ("-n2" in options)]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return ran.returncode, ran.stdout + ran.stderr

    return run


def test_a_run_says_for_each_backend_what_ran_or_why_nothing_did(project):
    code, said = project()
    assert code == 0
    assert "nnxp: numpy: 1 test, 1 comparison\n" in said
    assert "nnxp: sim: 1 test, 1 comparison\n" in said
    if CUPY.ok:
        assert "nnxp: cupy: 2 tests, 1 comparison\n" in said
    else:
        assert f"nnxp: cupy: nothing ran: {CUPY.reason}\n" in said
        assert re.search(r"SKIPPED \[1\].*cupy: ", said)


def test_the_backends_are_chosen_by_an_option_and_an_unknown_one_is_an_error(project):
    code, said = project("--nnxp-backends=numpy")
    assert code == 0
    assert "nnxp: sim: nothing ran: not among --nnxp-backends" in said
    code, said = project("--nnxp-backends=numpy,cupi")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "no backend 'cupi'" in said


@pytest.mark.skipif(CUPY.ok, reason="this machine has a usable GPU")
@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_required_backend_that_is_not_usable_fails_the_run(project, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("NNXP_REQUIRE_GPU", "1")
    code, said = project(*["--nnxp-require=cupy"][: how == "option"])
    assert code == pytest.ExitCode.USAGE_ERROR
    assert f"cupy is required, but backend='cupy': {CUPY.reason}" in said


def test_a_required_backend_on_which_nothing_ran_fails_the_run(project):
    code, said = project("--nnxp-require=sim", "-k", "numpy")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "nnxp: sim is required: the run failed" in said
    assert project("--nnxp-require=sim", "-k", "sim")[0] == 0


def test_a_test_that_leaks_the_default_backend_fails_and_the_next_one_does_not(project):
    code, said = project(tests=LEAK)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "ERROR test_it.py::test_that_leaks" in said
    assert "the test leaks a default backend" in said
    assert "PASSED test_it.py::test_after_it" in said


def test_draws_are_the_same_on_every_backend_and_in_every_run(project):
    tests = """
    import nnxp

    def test_draw(backend, nnxp_draw):
        print("DREW", *nnxp.asnumpy(nnxp_draw((2,), "float16")))
    """
    said = [project("--nnxp-backends=numpy,sim", tests=tests)[1] for _ in range(2)]
    drawn = [re.findall(r"DREW (\S+ \S+)", each) for each in said]
    assert len(drawn[0]) == 2
    assert drawn[0][0] == drawn[0][1]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("more", [[], ["--dist=loadgroup"]])
def test_gpu_tests_share_one_worker(project, more):
    options = "--nnxp-backends=numpy,sim", "--nnxp-require=sim", "-n2", *more
    code, said = project(*options, tests=WHO_RAN, conftest=SIM_IS_THE_GPU)
    if code:  # pytest-xdist 3.8.0 ignores groups under pytest 9.2.0: that may not pass unseen
        assert len(re.findall("this pytest-xdist ignores groups under pytest", said)) >= 6
        assert "RAN sim" not in said
        return
    assert len(re.findall("RAN sim", said)) == 6
    assert len(set(re.findall(r"RAN sim (\w+)", said))) == 1
    assert "pools freed" in said
    assert "nnxp: sim: 6 tests" in said  # counted across workers


def test_a_marked_test_runs_where_there_is_a_gpu_and_frees_it_after_its_fixtures(project):
    code, said = project("-s", tests=MARKED, conftest=SIM_IS_CUPY)
    assert code == 0, said
    assert said.index("ran") < said.index("fixture gone") < said.index("pools freed")


def test_workers_see_that_groups_stay_together(project, tmp_path, monkeypatch):
    plugin = re.sub(r"^    ", "", SIM_IS_THE_GPU, flags=re.MULTILINE)
    (tmp_path / "sim_gpu.py").write_text(plugin)  # before the options are read
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = "-p", "sim_gpu", "--nnxp-backends=sim", "--nnxp-require=sim", "-n2"
    code, said = project(*options, tests=WHO_RAN)
    assert "add --dist loadgroup" not in said
    assert code == 0 or "this pytest-xdist ignores groups under pytest" in said


@pytest.mark.nnxp_gpu
def test_a_gpu_that_is_required_is_used_by_one_worker_without_more_options(project):
    code, said = project("--nnxp-require=cupy", "--nnxp-gpu-memory=1 GiB", "-n2", tests=WHO_RAN)
    ran = set(re.findall(r"RAN cupy (\w+)", said))
    assert len(ran) == (0 if "this pytest-xdist ignores groups" in said else 1)
    assert (code == 0) == (len(ran) == 1)


def test_a_project_that_does_not_use_it_sees_nothing_and_loads_nothing(project, monkeypatch):
    tests = "    import sys\n    def test_it():\n"
    tests += "        assert not {'numpy', 'nnxp'} & {*sys.modules}\n"
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others may well load NumPy
    code, said = project("-p", "nnxp_pytest", "--setup-show", tests=tests)
    assert code == 0, said
    assert "nnxp" not in said.partition("collected")[2].replace("-p nnxp_pytest", "")


def test_a_fixture_of_the_same_name_comes_first(project):
    tests = "    import pytest\n    @pytest.fixture\n    def backend():\n        return 'mine'\n"
    tests += "    def test_it(backend):\n        assert backend == 'mine'\n"
    code, said = project(tests=tests)
    assert (code, "nnxp:" in said) == (0, False)


def test_a_memory_limit_is_set_on_the_pool(monkeypatch):
    import nnxp_pytest

    class Pool:
        def set_limit(self, size):
            self.size = size

    class Config:
        def getoption(self, name):
            return "2 GiB"

    pool = Pool()
    cupy = type(sys)("cupy")
    cupy.get_default_memory_pool = lambda: pool
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(os.environ, "PYTEST_XDIST_WORKER_COUNT", "1")
    nnxp_pytest._prepare_gpu(SimpleNamespace(config=Config(), nodeid="test"))
    assert pool.size == 2 << 30
