"""NVIDIA's frontend of cuDNN, of which NumPy computes the graphs when their turn comes.

tests/test_cudnn.py shows that cuDNN itself takes the graphs that this one is told.
"""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np

from fakecuda.kernels import view
from fakecuda.machine import machine
from nnxp import kernels


class Names:
    """An enumeration, whose members are their names."""

    def __getattr__(self, name):
        return name


class Tensor:
    def __init__(self, uid=None, dim=None, stride=None, value=None):
        self.uid, self.dim, self.stride, self.value = uid, dim, stride, value
        self.output = False

    def set_output(self, output):
        self.output = output
        return self

    def set_uid(self, uid):
        self.uid = uid
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


def last(x):
    """Channels behind the axes of space, as they are in NumPy."""
    return np.moveaxis(x, 1, -1)


class Graph:
    SIZE = 1000  # bytes of workspace

    def __init__(self, cudnn, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert (intermediate_data_type, compute_data_type) == ("FLOAT", "FLOAT")
        kinds = {"FLOAT": "f4", "HALF": "f2", "BFLOAT16": ml_dtypes.bfloat16}
        self.cudnn, self.dtype, self.handle = cudnn, np.dtype(kinds[io_data_type]), handle
        self.tensors, self.left_out, self.limit = [], set(), None

    def _made(self, value, **about):
        self.tensors.append(Tensor(value=value, **about))
        return self.tensors[-1]

    def tensor(self, *, dim, stride, uid):
        return self._made(None, uid=uid, dim=dim, stride=stride)

    def conv_fprop(self, *, image, weight, pre_padding, post_padding, stride, dilation):
        def value(of):
            x, filters = last(of(image)), np.moveaxis(of(weight), (0, 1), (-1, -2))
            pads = tuple(zip(pre_padding, post_padding, strict=True))
            options = {"stride": tuple(stride), "dilation": tuple(dilation), "padding": pads}
            groups = x.shape[-1] // filters.shape[-2]
            y = kernels.conv.reference(x, filters, groups=groups, **options)
            return np.moveaxis(y, -1, 1)

        return self._made(value)

    def bias(self, *, input, bias):
        return self._made(lambda of: of(input) + of(bias))

    def relu(self, *, input):
        best = np.fmax if self.cudnn.drops_nan else np.maximum
        return self._made(lambda of: best(of(input), np.float32(0)))

    def validate(self):
        (self.result,) = (each for each in self.tensors if each.output)

    def build_operation_graph(self):
        if self.cudnn.takes_nothing:
            raise self.cudnn.cudnnGraphNotSupportedError("none of it")

    def create_execution_plans(self, modes):
        assert modes == ["A", "FALLBACK"]

    def deselect_numeric_notes(self, notes):
        self.left_out |= set(notes)

    def deselect_workspace_greater_than(self, limit):
        self.limit = limit

    def check_support(self):
        assert self.limit >= self.SIZE

    def build_plans(self):
        self.cudnn.planned.append(self)

    def get_workspace_size(self):
        return self.SIZE

    def execute(self, pointers, workspace, handle):
        """With the stream of the handle; anything may be in the workspace afterwards."""
        assert handle is self.handle
        places = {each.uid: each for each in self.tensors if each.uid is not None}
        assert places.keys() == pointers.keys()
        for at in (*pointers.values(), workspace):
            machine.alive(at)
            machine.rule(at % 16 == 0, "cuDNN is given what is not aligned")
        self.cudnn.executed.append((self, handle.stream, workspace))

        def array(tensor):
            steps = [each * self.dtype.itemsize for each in tensor.stride]
            return view(self.dtype, pointers[tensor.uid], tuple(tensor.dim), tuple(steps))

        def work():
            def of(tensor):
                if tensor.value is None:
                    return array(tensor).astype("f4")
                return tensor.value(of)

            view(np.dtype("u1"), workspace, (self.SIZE,), (1,))[...] = 0xAB
            with np.errstate(all="ignore"):
                y = of(self.result)
                assert y.shape == tuple(self.result.dim)
                array(self.result)[...] = y

        machine.give(handle.stream, "cuDNN", work)


class Cudnn:
    """The module. `planned` and `executed` are what it was asked for."""

    data_type, numerical_note, heur_mode = Names(), Names(), Names()

    class cudnnGraphNotSupportedError(Exception):
        pass

    def __init__(self):
        self.planned, self.executed = [], []
        self.drops_nan = self.takes_nothing = False

    def create_handle(self):
        return SimpleNamespace(stream=0, device=machine.device)

    def set_stream(self, *, handle, stream):
        machine.rule(handle.device == machine.device, "a handle of another device")
        handle.stream = stream

    def pygraph(self, **about):
        return Graph(self, **about)
