"""The graphs that cuDNN is given, planned by cuDNN itself for cards that are not here.

Its library plans for a card that is described to it, without one; what it plans it cannot run here.
"""

from __future__ import annotations

import json
import re
from itertools import product

import numpy as np
import pytest

from nnxp._arrays import float_dtype
from nnxp.kernels._windows import windows

pytest.importorskip("cupy", reason="NOT CHECKED: CuPy is not installed")
pytest.importorskip("cudnn", reason="NOT CHECKED: the extra cudnn is not installed")

from nnxp.kernels.cuda import cudnn as ours
from nnxp.kernels.cuda.lt.descriptors import WORKSPACE

cudnn, why = ours.library()
pytestmark = pytest.mark.skipif(cudnn is None, reason=f"NOT CHECKED: {why}")

ANY = {
    "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
    "regsPerBlock": 65536, "warpSize": 32, "maxSharedMemoryPerBlock": 49152,
    "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "pciDeviceId": 0, "isTccDriver": 0,
    "supportCoopLaunch": 1, "smClockRateKHz": 1980000, "memClockRateKHz": 2619000,
    "l2CacheSize": 52428800, "driverVer": 13000, "cudaDeviceId": 0, "totalGlobalMem": 85 << 30,
}  # fmt: skip
CARDS = {
    "A100": (80, 108, 166912), "H100": (90, 132, 232448),
    "B200": (100, 148, 232448), "RTX 5090": (120, 170, 101376),
}  # fmt: skip
"""By name, the architecture, the multiprocessors and their shared memory."""


def card(name):
    version, count, shared = CARDS[name]
    about = ANY | {
        "deviceName": f"NVIDIA {name}", "deviceVer": version * 10,
        "multiProcessorCount": count, "maxSharedMemoryPerBlockOptin": shared,
    }  # fmt: skip
    properties = cudnn.create_device_properties(json.dumps(about))
    return {"device_property": properties, "sm_version": version}


CONVOLUTIONS = {
    "of a ResNet": ((8, 56, 56, 64), (3, 3, 64, 64), {"padding": 1}),
    "of a picture": ((8, 224, 224, 3), (7, 7, 3, 64), {"stride": 2, "padding": 3}),
    "of one element": ((8, 28, 28, 256), (1, 1, 256, 64), {"stride": 2}),
    "of channels": ((8, 28, 28, 96), (3, 3, 1, 96), {"padding": ((0, 2), (1, 1))}),
    "of groups, dilated": ((8, 28, 28, 64), (3, 3, 16, 64), {"dilation": 2}),
    "of a line": ((8, 400, 32), (5, 32, 48), {"padding": "same"}),
    "of a volume": ((2, 12, 13, 14, 16), (3, 2, 3, 16, 32), {}),
    "of odd numbers": ((5, 9, 11, 5), (2, 3, 5, 7), {}),
}
WAYS = {"alone": ours.ALONE, "bias": ours.BIAS, "bias and relu": ours.RELU_BIAS}


def planned(gpu, name, kind, tf32, way):
    x, weight, options = CONVOLUTIONS[name]
    over = windows("conv", np.empty(x, "?"), weight[:-2], **options)
    graph = ours.new_graph(cudnn, float_dtype(kind), **card(gpu))
    ours.draw_convolution(graph, x, weight, over, way)
    return ours.built(cudnn, graph, float_dtype(kind), tf32)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("gpu", CARDS)
def test_every_card_has_a_plan(gpu, name):
    kinds = [("float32", False), ("float32", True), ("float16", False), ("bfloat16", False)]
    for kind, way in product(kinds, WAYS.values()):
        assert planned(gpu, name, *kind, way).get_workspace_size() <= WORKSPACE


def test_float32_is_float32_unless_tf32_is_asked_for():
    """The plan is another one: that of tensor cores, which cuDNN likes better, is left out."""
    engines = {
        re.search(rb'"engineId":(\d+)', bytes(graph.serialize()))[1]
        for tf32 in (False, True)
        for graph in [planned("H100", "of a ResNet", "float32", tf32, ours.BIAS)]
    }
    assert len(engines) == 2


def test_addresses_are_all_that_a_launch_needs():
    """Of arrays and of the workspace: no library of arrays is asked."""
    graph = planned("H100", "of a ResNet", "float16", False, ours.BIAS)
    with pytest.raises(Exception, match=r"(?i)handle|cuda|cudnn") as caught:
        graph.execute({1: 256, 2: 512, 3: 1024, 4: 2048}, 4096, handle=None)
    assert not isinstance(caught.value, TypeError | ValueError)
