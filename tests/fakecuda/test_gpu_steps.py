"""The steps of ci/gpu reach their ends where CuPy is the library, on tiny arrays: not their times.

Of verify and goldens a few layers only: test_layers.py has them all. Of a race nnxp's own
contenders, once, in this process.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import cupy
import pytest

import nnxp.verify
from fakecuda.plugin import multiplied
from nnxp.testing import LIMIT, goldens
from nnxp.testing.parity import compare

BENCH = Path(__file__).parents[2] / "bench"
STEPS = """where verify goldens replays nan products network host fused models training graphs
    memory blocks"""
FEW = goldens.layer_examples()[:3]


@pytest.mark.parametrize("gpu", [False], ids=["at once"], indirect=True)
@pytest.mark.parametrize("step", STEPS.split())
def test_a_step_finds_nothing_wrong_and_is_written_down(gpu, monkeypatch, tmp_path, step):
    monkeypatch.setattr(cupy, "matmul", multiplied)
    monkeypatch.syspath_prepend(str(BENCH))
    for each in (goldens, nnxp.verify):
        monkeypatch.setattr(each, "layer_examples", lambda: FEW)
    module, here, races, report, contenders = map(
        importlib.import_module,
        (f"gpu.{step}", "gpu.here", "gpu.races", "gpu.report", "contenders"),
    )

    def race(here, names, task):
        names = [name for name in names if name in races.OURS]
        for name in names:
            built = contenders.rivals(False)[name].build(task)
            y, due = task.checked(built.host(built.run())), task.expected(name)
            assert compare("", "", "", y, due.value, due.error).ratio <= LIMIT
        return {name: {"µs": 1.0} for name in names}, {name: [1.0] for name in names}, {}

    monkeypatch.setattr(here.Here, "sized", lambda self, there, small: small)
    monkeypatch.setattr(here.Here, "seconds", lambda self, run, least=0: run() is None or 1.0)
    monkeypatch.setattr(races, "raced", race)
    if hasattr(module, "raced"):
        monkeypatch.setattr(module, "raced", race)
    found = report.plain(
        json.loads(json.dumps(dict(module.figures(here.Here("cupy", tmp_path))), default=str))
    )
    assert list(report.problems(found)) == []
    report.written([report.Step(step, "ok", figures=found)], {"backend": "cupy"}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["steps"][0]["figures"] == found
    assert f"\n## {step}\n" in (tmp_path / "report.md").read_text()
    with cupy.cuda.Device(1):  # where the doctor looks, too
        cupy.get_default_memory_pool().free_all_blocks()
