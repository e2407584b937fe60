"""Every layer's formula on CuPy's own arrays: types, views and call forms are those of CuPy."""

from __future__ import annotations

import cupy
import pytest

import nnxp
from conftest import draw_inputs, every_layer, results
from fakecuda.plugin import multiplied
from nnxp.testing.parity import compare, error_bound


@pytest.mark.parametrize("gpu", [False], ids=["at once"], indirect=True)
@every_layer
def test_every_layer_agrees_with_float64(gpu, monkeypatch, layer, shape):
    monkeypatch.setattr(cupy, "matmul", multiplied)
    inputs = draw_inputs(layer, shape)
    there = [None if x is None else nnxp.to_backend(x, "cuda") for x in inputs]
    outputs = results(layer.to("cuda")(*there))
    for i, y in enumerate(outputs):
        one = layer if len(outputs) == 1 else lambda *given, i=i: layer(*given)[i]
        found = compare("layer", "", "cuda:0", y.get(), *error_bound(one, *inputs))
        assert found.ok, found.problem
