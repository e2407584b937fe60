"""The rules of choosing a backend, of moving arrays, and of keeping state apart."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import warnings
from contextvars import copy_context

import numpy as np
import pytest

import nnxp
from nnxp.backend import _probe

CUPY = nnxp.available_backends()["cupy"]


# choosing


def test_the_order_is_argument_then_use_then_set_then_environment_then_automatic(monkeypatch):
    automatic = nnxp.get_backend().device
    monkeypatch.setenv("NNXP_BACKEND", "sim:1")
    assert nnxp.get_backend().device == "sim:1"
    try:
        nnxp.set_backend("sim:0")
        assert nnxp.get_backend().device == "sim:0"
        with nnxp.use_backend("numpy"):
            assert nnxp.get_backend().device == "cpu"
            assert nnxp.get_backend("sim:1").device == "sim:1"
            with nnxp.use_backend("sim:1"):
                assert nnxp.get_backend().device == "sim:1"
            assert nnxp.get_backend().device == "cpu"
        assert nnxp.get_backend().device == "sim:0"
    finally:
        nnxp.set_backend("auto")
    assert nnxp.get_backend().device == "sim:1"
    monkeypatch.delenv("NNXP_BACKEND")
    assert nnxp.get_backend().device == automatic


def test_an_engine_and_to_follow_the_default_but_arrays_never_do():
    net, x = nnxp.Dense(3, 2, rng=0), np.ones((4, 3), "float32")
    with nnxp.use_backend("sim"):
        assert nnxp.Engine(net).backend.device == "sim:0"
        assert nnxp.to_backend(x).device is nnxp.sim.Device(0)
        assert isinstance(net(x), np.ndarray)  # the array picks the code, not the ambience


@pytest.mark.parametrize("name", ["numpy", "cpu", "CPU"])
def test_the_cpu_has_two_names_in_any_case(name):
    assert nnxp.get_backend(name).device == "cpu"


def test_a_backend_is_its_own_name():
    backend = nnxp.get_backend("sim:1")
    assert nnxp.get_backend(backend) is backend
    with nnxp.use_backend(backend) as found:
        assert found is backend
        assert nnxp.get_backend() == backend


@pytest.mark.parametrize("name", ["", "gpu", "numpy:1", "cpu:1", "sim:2", "cuda:", "cuda:-1", 0])
def test_unknown_names_and_devices_raise_and_say_what_there_is(name):
    with pytest.raises(nnxp.BackendUnavailable, match=r"there is no") as caught:
        nnxp.get_backend(name)
    assert caught.value.hint
    with pytest.raises(RuntimeError, match=r"there is no"), nnxp.use_backend(name):
        pass
    with pytest.raises(nnxp.BackendUnavailable, match=r"there is no"):
        nnxp.set_backend(name)


def test_a_bad_value_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("NNXP_BACKEND", "tpu")
    with pytest.raises(
        nnxp.BackendUnavailable, match="NNXP_BACKEND=tpu: there is no backend 'tpu'"
    ):
        nnxp.get_backend()
    assert nnxp.get_backend("numpy").device == "cpu"


def test_automatic_says_why():
    backend = nnxp.get_backend()
    assert "chosen automatically" in backend.why
    assert backend.why in repr(backend)
    if not CUPY.ok:
        assert CUPY.reason in backend.why


def test_explicit_choices_say_who_asked(monkeypatch):
    assert "backend='cpu'" in nnxp.get_backend("cpu").why
    with nnxp.use_backend("sim") as backend:
        assert "use_backend('sim')" in nnxp.get_backend().why
        assert backend.device == "sim:0"
    monkeypatch.setenv("NNXP_BACKEND", "sim")
    assert "NNXP_BACKEND=sim" in nnxp.get_backend().why


@pytest.mark.skipif(CUPY.ok, reason="this machine has a usable GPU: nothing is unavailable")
def test_asking_for_cuda_where_there_is_none_raises_with_reason_and_hint(monkeypatch):
    for name in ("cupy", "cuda", "cuda:0", "cuda:7"):
        with pytest.raises(nnxp.BackendUnavailable, match=r"CuPy") as caught:
            nnxp.get_backend(name)
        assert caught.value.reason.startswith("backend=")
        hint = caught.value.hint
        assert hint == _probe.NO_CARD if not _probe.nvidia() else "install" in hint
    monkeypatch.setenv("NNXP_BACKEND", "cupy")
    with pytest.raises(nnxp.BackendUnavailable, match="NNXP_BACKEND=cupy"):
        nnxp.predict(nnxp.Dense(2, 2), np.ones((1, 2)))


@pytest.mark.skipif(CUPY.ok, reason="this machine has a usable GPU")
def test_cupy_without_a_driver_is_told_from_no_cupy():
    pytest.importorskip("cupy", reason="CuPy is not installed; the next test covers that")
    assert "installed, but" in CUPY.reason
    assert "driver" in CUPY.reason or "device" in CUPY.reason


def test_without_cupy_only_who_has_an_nvidia_card_is_told_to_install_it(monkeypatch):
    monkeypatch.setattr(_probe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_probe, "nvidia", lambda: ["the card 0000:01:00.0"])
    answer = _probe._ask(0)
    assert (answer.ok, answer.reason) == (False, "CuPy is not installed")
    assert 'pip install "cupy-cuda13x[ctk]"' in answer.hint
    monkeypatch.setattr(_probe, "nvidia", list)
    answer = _probe._ask(0)
    assert (answer.ok, answer.reason) == (False, "CuPy is not installed")
    assert answer.hint == _probe.NO_CARD
    assert "install" not in answer.hint


@pytest.mark.parametrize(
    "error", ["cudaErrorInsufficientDriver", "cudaErrorNoDevice", "libnvrtc.so.13 is missing"]
)
@pytest.mark.parametrize("card", [True, False])
def test_without_a_card_no_way_to_fix_cupy_is_offered(fake, error, card):
    def fails():
        raise RuntimeError(error)

    fake.setattr(FakeCupy.cuda.runtime, "getDeviceCount", staticmethod(fails))
    fake.setattr(_probe, "nvidia", lambda: ["libcuda"] * card)
    assert (_probe._ask(0).hint == _probe.NO_CARD) == (not card)


@pytest.mark.parametrize(
    ("vendor", "kind", "there"),
    [("0x10de", "0x030000", True), ("0x10de", "0x040300", False), ("0x1002", "0x030000", False)],
    ids=["NVIDIA's card", "NVIDIA's sound", "another's card"],
)
def test_a_card_is_seen_on_the_bus_before_there_is_a_driver(
    monkeypatch, tmp_path, vendor, kind, there
):
    for name in ("PROC", "DEV"):
        monkeypatch.setattr(_probe, name, tmp_path)
    monkeypatch.setattr(_probe, "PCI", tmp_path)
    monkeypatch.setattr(_probe.shutil, "which", lambda name: None)
    monkeypatch.setattr(_probe, "libcuda", lambda: None)
    assert _probe.nvidia() == []
    card = tmp_path / "0000:01:00.0"
    card.mkdir()
    (card / "vendor").write_text(f"{vendor}\n")
    (card / "class").write_text(f"{kind}\n")
    assert _probe.nvidia() == ["the card 0000:01:00.0"] * there


class FakeCupy:
    """As much of CuPy as the probe asks, with one card that may be broken in one way."""

    __version__ = "14.2.0"

    class cuda:
        class runtime:
            getDeviceCount = staticmethod(lambda: 1)
            runtimeGetVersion = staticmethod(lambda: 13000)
            getDeviceProperties = staticmethod(lambda index: {"name": b"Fake 100"})

        Device = nnxp.sim.Device

    asarray = staticmethod(nnxp.sim.asarray)
    exp = staticmethod(nnxp.sim.__getattr__("exp"))
    matmul = staticmethod(nnxp.sim.__getattr__("matmul"))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy)
    monkeypatch.setattr(_probe.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_probe.guard, "pid", None)
    return monkeypatch


def test_the_probe_accepts_a_card_that_computes_right(fake):
    assert _probe._ask(0) == nnxp.Availability(True, "Fake 100")


def test_the_probe_refuses_a_card_that_computes_wrong(fake):
    fake.setattr(FakeCupy, "matmul", staticmethod(lambda x, y: x * float("nan")))
    answer = _probe._ask(0)
    assert not answer.ok
    assert "wrong numbers: product" in answer.reason


def test_the_probe_refuses_a_card_whose_maximum_of_negative_numbers_is_zero(fake):
    fake.setattr(nnxp.sim.ndarray, "max", lambda self: 0.0)
    answer = _probe._ask(0)
    assert "wrong numbers: reduction" in answer.reason


def test_the_probe_names_a_missing_nvrtc_and_its_cure(fake):
    def compile_fails(x):
        raise RuntimeError(
            "CuPy failed to load libnvrtc.so.13: OSError: libnvrtc.so.13: cannot open"
        )

    fake.setattr(FakeCupy, "exp", staticmethod(compile_fails))
    answer = _probe._ask(0)
    assert "libnvrtc" in answer.reason
    assert "cupy-cuda13x[ctk]" in answer.hint


@pytest.mark.parametrize(
    "said",
    [
        "nvrtc: error: invalid value for --gpu-architecture (-arch)",
        "cudaErrorNoKernelImageForDevice: no kernel image is available for execution on the device",
        "CUBLAS_STATUS_ARCH_MISMATCH",
    ],
)
def test_a_card_that_is_too_old_for_the_wheel_is_told_so(fake, said):
    def refuse(x):
        raise RuntimeError(said)

    fake.setattr(FakeCupy, "exp", staticmethod(refuse))
    answer = _probe._ask(0)
    assert said in answer.reason
    assert answer.hint.startswith("The card is too old for this CuPy wheel")
    assert "cupy-cuda12x" in answer.hint


def test_the_probe_knows_how_many_devices_there_are(fake):
    answer = _probe._ask(3)
    assert "there is no cuda:3: this process sees 1" in answer.reason


def test_two_cupy_wheels_are_found_in_the_failure(fake):
    def broken(x):
        raise ImportError("something is inconsistent")

    fake.setattr(FakeCupy, "exp", staticmethod(broken))
    fake.setattr(
        _probe, "cupy_wheels", lambda: {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}
    )
    assert "uninstall all but one" in _probe._ask(0).hint


def test_available_backends_lists_all_with_reasons():
    found = nnxp.available_backends()
    assert set(found) == {"numpy", "cupy", "sim"}
    assert found["numpy"].ok
    assert found["sim"].ok
    assert all(each.reason for each in found.values())


@pytest.mark.parametrize("name", ["numpy", "NumPy", "CPU", "cpu:0", " Numpy "])
def test_numpy_asked_for_by_environment_never_touches_cuda(name):
    code = (
        "import sys, nnxp, numpy as np\n"
        "nnxp.predict(nnxp.Dense(2, 2), np.ones((3, 2)))\n"
        "assert 'not to touch' in nnxp.available_backends()['cupy'].reason\n"
        "assert 'cupy' not in sys.modules, 'CuPy was imported'"
    )
    environment = os.environ | {"NNXP_BACKEND": name}
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True)


# moving


def test_arrays_move_there_and_back_unchanged():
    x = np.arange(6, dtype="float16").reshape(2, 3)
    there = nnxp.to_backend(x, "sim:1")
    assert there.device is nnxp.sim.Device(1)
    assert nnxp.to_backend(there, "sim:1") is there
    assert nnxp.to_backend(x, "numpy") is x
    np.testing.assert_array_equal(nnxp.asnumpy(there), x)
    np.testing.assert_array_equal(nnxp.asnumpy(nnxp.to_backend(there, "sim:0")), x)
    assert nnxp.asnumpy(there).dtype == x.dtype


def test_lists_become_arrays_but_objects_do_not_move():
    assert nnxp.asnumpy(nnxp.to_backend([1, 2], "sim")).tolist() == [1, 2]
    with pytest.raises(nnxp.DtypeMismatch):
        nnxp.to_backend(np.array([None, {}]), "sim")


def test_get_array_module_finds_the_library_and_refuses_two():
    x = nnxp.to_backend(np.ones(2), "sim")
    assert nnxp.get_array_module(x, 1.0, None) is nnxp.sim
    assert nnxp.get_array_module(np.ones(2)) is np
    assert nnxp.get_array_module(3, [1, 2]) is np
    with pytest.raises(nnxp.DeviceMismatch, match="cpu and sim:0"):
        nnxp.get_array_module(x, np.ones(2))


def test_a_memory_map_is_a_host_array(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3), "float32"))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert nnxp.get_array_module(x) is np
    assert nnxp.Dense(3, 2, rng=0)(x).shape == (2, 2)


# state


def test_two_threads_never_see_each_other_s_choice():
    switches, wrong = 2000, []
    barrier = threading.Barrier(2)

    def work(mine, other):
        barrier.wait()
        for i in range(switches):
            with nnxp.use_backend(mine if i % 2 else other):
                expected = mine if i % 2 else other
                if nnxp.get_backend().device != expected:
                    wrong.append((mine, i))

    threads = [
        threading.Thread(target=work, args=pair) for pair in (("sim:0", "sim:1"), ("sim:1", "cpu"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_asyncio_tasks_never_see_each_other_s_choice():
    async def work(mine, other):
        for i in range(2000):
            expected = mine if i % 2 else other
            with nnxp.use_backend(expected):
                await asyncio.sleep(0)
                assert nnxp.get_backend().device == expected

    async def both():
        await asyncio.gather(work("sim:0", "sim:1"), work("sim:1", "cpu"))

    asyncio.run(both())
    assert nnxp.backend._used.get() == "auto"


def test_use_backend_may_be_left_in_another_context():
    def resource():
        with nnxp.use_backend("sim:1") as backend:
            yield backend

    def leave(made):
        assert next(made, None) is None
        return nnxp.get_backend("auto").device

    made = resource()
    copy_context().run(next, made)
    assert copy_context().run(leave, made) == nnxp.get_backend().device  # it never knew of it
    made = resource()
    copy_context().run(next, made)
    with nnxp.use_backend("sim"):  # as here, where another choice is in force
        assert leave(made) == "sim:0"
    with nnxp.use_backend("sim:1"):  # of the same name, too
        made = resource()
        copy_context().run(next, made)
        assert leave(made) == "sim:1"
    with nnxp.use_backend("sim"):
        made = resource()
        next(made)
        assert copy_context().run(leave, made) == "sim:0"  # where it is in force, it is ended
        assert nnxp.get_backend().device == "sim:1"
    assert nnxp.backend._used.get() == "auto"


def test_a_new_thread_sees_set_backend_but_not_use_backend():
    seen = []
    try:
        nnxp.set_backend("sim:1")
        with nnxp.use_backend("cpu"):
            thread = threading.Thread(target=lambda: seen.append(nnxp.get_backend().device))
            thread.start()
            thread.join()
    finally:
        nnxp.set_backend("auto")
    assert seen == ["sim:1"]


def test_use_backend_is_undone_by_an_exception():
    before = nnxp.get_backend()
    with pytest.raises(KeyError), nnxp.use_backend("sim:1"):
        raise KeyError
    assert nnxp.get_backend() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.parametrize("name", ["sim", "cuda", "auto"])
def test_a_forked_child_of_a_process_that_used_a_device_is_told_to_spawn(name, monkeypatch):
    if name == "sim":
        nnxp.get_backend("sim")
    else:
        monkeypatch.setattr(_probe.guard, "pid", os.getpid())  # as after using CUDA
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns that other threads exist
        child = os.fork()
    if child == 0:
        try:
            nnxp.get_backend(name)
            said = "nothing"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert said.startswith("BackendUnavailable")
    assert 'get_context("spawn")' in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_may_use_the_cpu():
    net, x = nnxp.Dense(64, 64, rng=0), np.ones((3000, 64), "float32")
    expected = nnxp.predict(net, x, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        same = np.array_equal(nnxp.predict(net, x, "cpu"), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_auto_at_any_level_asks_the_next_and_is_answered_so():
    automatic = nnxp.get_backend().device
    try:
        nnxp.set_backend("sim")
        with nnxp.use_backend("auto") as backend:
            assert backend.device == nnxp.get_backend().device == "sim:0"
        assert nnxp.set_backend("AUTO").device == automatic
    finally:
        nnxp.set_backend("auto")
    assert nnxp.get_backend("Auto").device == automatic


def test_where_the_environment_names_the_cpu_even_parity_does_not_touch_cuda():
    code = (
        "import sys, nnxp, numpy as np\n"
        "nnxp.testing.assert_parity(nnxp.Dense(2, 2), np.ones((3, 2)))\n"
        "assert 'cupy' not in sys.modules, 'CuPy was imported'"
    )
    environment = os.environ | {"NNXP_BACKEND": "numpy"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True)
