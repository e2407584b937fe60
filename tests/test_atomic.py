"""Files that are whole or not there, whoever writes at the same time and whoever was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from nnxp.io._atomic import written_beside


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_what_is_written_is_named_after_its_target(tmp_path):
    with written_beside(tmp_path / "y.npy") as beside:
        assert names(tmp_path) == ["y.npy.part"]
        beside.write_bytes(b"y")
    assert names(tmp_path) == ["y.npy"]


KILLED = """
import os, signal, sys
from nnxp.io._atomic import written_beside
with written_beside("y.npy") as beside:
    beside.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a process is killed by SIGKILL")
def test_what_a_killed_process_left_is_found_said_and_replaced(tmp_path):
    (tmp_path / "y.npy").write_bytes(b"old")
    subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, timeout=60, check=False)
    assert names(tmp_path) == ["y.npy", "y.npy.part"]
    said = []
    with written_beside(tmp_path / "y.npy", said.append) as beside:
        assert beside.read_bytes() == b""
        beside.write_bytes(b"new")
    assert names(tmp_path) == ["y.npy"]
    assert (tmp_path / "y.npy").read_bytes() == b"new"
    assert len(said) == 1
    assert "y.npy.part was left by a run that did not end" in said[0]


def test_without_a_listener_a_warning_tells_what_was_left(tmp_path):
    (tmp_path / "y.npy.part").write_bytes(b"half")
    with (
        pytest.warns(RuntimeWarning, match=r"y\.npy\.part was left"),
        written_beside(tmp_path / "y.npy"),
    ):
        pass


@pytest.mark.parametrize("replaces", [False, True])
def test_two_writers_at_once_do_not_tear_each_others_file(tmp_path, replaces):
    target, said = tmp_path / "y", []

    def write(beside, content):
        if replaces:  # as libraries do that write beside and rename, too
            (tmp_path / "other").write_bytes(content)
            os.replace(tmp_path / "other", beside)
        else:
            beside.write_bytes(content)

    with written_beside(target, said.append) as first:
        first.write_bytes(b"fir")
        with written_beside(target, said.append) as second:
            write(second, b"second")
            assert first.read_bytes() == b"fir"
            assert names(tmp_path) == ["y.2.part", "y.part"]
        assert target.read_bytes() == b"second"
        write(first, b"first")
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["y"]
    assert said == []


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    target, seen, failed = tmp_path / "y", [], []

    def write(i):
        try:
            for _ in range(20):
                with written_beside(target, failed.append) as beside, open(beside, "r+b") as file:
                    for _ in range(50):
                        file.write(bytes([i]) * 100)
                seen.append(target.read_bytes())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(seen) == 120
    assert all(len(each) == 5000 and len(set(each)) == 1 for each in seen)
    assert names(tmp_path) == ["y"]


def test_a_block_that_replaced_the_file_and_then_failed_leaves_nothing(tmp_path):
    def fail():
        with written_beside(tmp_path / "y") as beside:
            (tmp_path / "other").write_bytes(b"other")
            os.replace(tmp_path / "other", beside)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == []


def test_a_writer_whose_file_another_has_taken_raises_and_leaves_the_others(tmp_path):
    """Only if the block replaces the file: the new one is nobody's for a moment."""
    other = written_beside(tmp_path / "y")

    def raced():
        with written_beside(tmp_path / "y") as beside:
            os.unlink(beside)
            assert other.__enter__() == beside
            beside.write_bytes(b"others, half")

    with pytest.raises(OSError, match="another process writes there"):
        raced()
    assert names(tmp_path) == ["y.part"]
    other.__exit__(None, None, None)
    assert (tmp_path / "y").read_bytes() == b"others, half"


def test_a_folder_in_the_way_of_the_part_is_left_alone(tmp_path):
    (tmp_path / "y.part").mkdir()
    with written_beside(tmp_path / "y") as beside:
        assert beside.name == "y.2.part"
    assert names(tmp_path) == ["y", "y.part"]
