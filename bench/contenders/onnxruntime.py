"""ONNX Runtime: a session with all optimizations."""

from __future__ import annotations

from contenders import Array, Built, Run, by_threads, tried
from contenders.onnx import model
from networks import Task

MODULES = ("onnxruntime",)


def session(task: Task) -> Built:
    """On all cores or on one."""
    import onnxruntime as ort

    serialized, x = model(task.network).SerializeToString(), task.rows

    def prepare(threads: int) -> Run:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        made = ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])

        def run() -> Array:
            (y,) = made.run(None, {"x": x})
            return y

        return run

    return tried(task, by_threads(prepare))


CPU, GPU = {"onnxruntime": session}, {}
