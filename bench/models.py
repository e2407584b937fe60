"""Networks of several kinds against ONNX Runtime and torch: python bench/models.py resnet50 vgg16

Each network is a plain torch module with random weights and running statistics; ONNX Runtime and
"nnxp onnx" take torch's export of it, nnxp takes `from_torch`. Contenders have processes of their
own and as many threads each, are compared with torch in float64 first, and then have turns, as in
race.py. Beside wall time stands the time of all of a process's threads on the cores, which says
more on a machine that has other work.

    python bench/models.py                 # all networks
    python bench/models.py cnn --rows 1    # one row a call
    python bench/models.py lstm --contenders nnxp jax    # JAX, with all threads that it wants
    python bench/models.py --small         # tiny networks, once: that it runs
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from nnxp._comparison import here
from nnxp.testing.parity import Output
from race import Contender, race, serve

Array = np.ndarray[Any, np.dtype[np.float32]]

USUAL = ("nnxp", "nnxp onnx", "onnxruntime", "torch")
CONTENDERS = (*USUAL, "jax")


# the networks, of torch.nn; a small one has an eighth of the channels


def _conv(
    c: int, o: int, window: int = 3, stride: int = 1, act: Any = None, groups: int = 1
) -> Any:
    """Convolution without a bias, batch norm, activation."""
    from torch import nn

    conv = nn.Conv2d(c, o, window, stride, window // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), *([act] if act is not None else []))


def _residual(way: Any, shortcut: Any) -> Any:
    """relu(way(x) + shortcut(x))"""
    import torch

    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.way, self.shortcut = way, shortcut

        def forward(self, x: Any) -> Any:
            return torch.relu(self.way(x) + self.shortcut(x))

    return Residual()


def _resnet(width: int, counts: tuple[int, ...], bottleneck: bool) -> Any:
    """[He et al. 2015, arXiv:1512.03385]"""
    from torch import nn

    grow = 4 if bottleneck else 1
    parts: list[Any] = [_conv(3, width, 7, 2, nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    c = width
    for i, count in enumerate(counts):
        m = width << i
        for j in range(count):
            stride = 2 if i and not j else 1
            if bottleneck:
                ways = _conv(c, m, 1, act=nn.ReLU()), _conv(m, m, 3, stride, nn.ReLU())
                way = nn.Sequential(*ways, _conv(m, 4 * m, 1))
            else:
                way = nn.Sequential(_conv(c, m, 3, stride, nn.ReLU()), _conv(m, m))
            same = c == grow * m and stride == 1
            parts.append(_residual(way, nn.Identity() if same else _conv(c, grow * m, 1, stride)))
            c = grow * m
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1000))


def resnet50(small: bool) -> Any:
    return _resnet(8, (1, 1), True) if small else _resnet(64, (3, 4, 6, 3), True)


def resnet18(small: bool) -> Any:
    return _resnet(8, (1, 1), False) if small else _resnet(64, (2, 2, 2, 2), False)


def vgg16(small: bool) -> Any:
    """[Simonyan & Zisserman 2014, arXiv:1409.1556], its head a mean over space"""
    from torch import nn

    parts: list[Any] = []
    c = 3
    for count, o in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            o = max(8, o // 8) if small else o
            parts += [nn.Conv2d(c, o, 3, padding=1), nn.ReLU()]
            c = o
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1000))


def mobilenet(small: bool) -> Any:
    """Depthwise separable convolutions   [Howard et al. 2017, arXiv:1704.04861], hard swish"""
    from torch import nn

    act = nn.Hardswish()
    c = 8 if small else 32
    parts = [_conv(3, c, 3, 2, act)]
    for o, stride in (
        (2, 1),
        (4, 2),
        (4, 1),
        (8, 2),
        (8, 1),
        (16, 2),
        *[(16, 1)] * 5,
        (32, 2),
        (32, 1),
    ):
        o *= 8 if small else 32
        parts += [_conv(c, c, 3, stride, act, groups=c), _conv(c, o, 1, act=act)]
        c = o
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 1000))


def cnn(small: bool) -> Any:
    from torch import nn

    a, b, d = (4, 8, 16) if small else (32, 64, 128)
    first = nn.Conv2d(1, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    head = nn.Flatten(), nn.Linear(49 * b, d), nn.ReLU(), nn.Linear(d, 10)
    return nn.Sequential(*first, *second, *head)


def minilm(small: bool) -> Any:
    """The encoder of MiniLM   [Wang et al. 2020, arXiv:2002.10957], of vectors"""
    import torch
    from torch.nn import functional

    channels, heads, hidden, layers = (32, 4, 64, 2) if small else (384, 12, 1536, 6)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = heads
            dense, norm = torch.nn.Linear, torch.nn.LayerNorm
            self.q, self.k, self.v, self.o = (dense(channels, channels) for _ in range(4))
            self.inner, self.outer = dense(channels, hidden), dense(hidden, channels)
            self.norm1, self.norm2 = norm(channels), norm(channels)

        def forward(self, x: Any) -> Any:
            def by_heads(y: Any) -> Any:
                return y.reshape(-1, x.shape[1], heads, channels // heads).transpose(1, 2)

            q, k, v = by_heads(self.q(x)), by_heads(self.k(x)), by_heads(self.v(x))
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x = self.norm1(x + self.o(y.reshape(-1, x.shape[1], channels)))
            return self.norm2(x + self.outer(functional.gelu(self.inner(x))))

    return torch.nn.Sequential(*(Layer() for _ in range(layers)))


def lstm(small: bool) -> Any:
    import torch

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            size = 16 if small else 256
            self.lstm = torch.nn.LSTM(size // 2, size, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.lstm(x)[0]

    return Last()


def dense(small: bool) -> Any:
    from torch import nn

    first = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(*first)


NETWORKS: dict[str, tuple[Callable[[bool], Any], int, tuple[int, ...], tuple[int, ...]]] = {
    "resnet50": (resnet50, 8, (3, 224, 224), (3, 32, 32)),
    "resnet18": (resnet18, 8, (3, 224, 224), (3, 32, 32)),
    "vgg16": (vgg16, 4, (3, 224, 224), (3, 32, 32)),
    "mobilenet": (mobilenet, 8, (3, 224, 224), (3, 32, 32)),
    "minilm": (minilm, 16, (128, 384), (16, 32)),
    "lstm": (lstm, 64, (50, 128), (5, 8)),
    "cnn": (cnn, 64, (1, 28, 28), (1, 28, 28)),
    "dense": (dense, 16384, (784,), (784,)),
}
"""By name: what builds it, its rows, and what a row is; of a small one, too."""


def drawn(name: str, small: bool) -> Any:
    """The module, with weights and statistics always the same."""
    import torch

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    module = NETWORKS[name][0](small).eval()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_(0, 0.1)
        elif isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
    return module


def rows_of(name: str, rows: int, small: bool) -> Array:
    _, usual, row, tiny = NETWORKS[name]
    shape = (3, *tiny) if small else (rows or usual, *row)
    return np.random.default_rng(1).standard_normal(shape, "float32")


# a contender


def exported(module: Any, x: Array) -> bytes:
    import torch

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.from_numpy(x[:2]),), file, dynamo=False, opset_version=17,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        )  # fmt: skip
    return file.getvalue()


def built(contender: str, name: str, rows: int, small: bool, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    module, x = drawn(name, small), rows_of(name, rows, small)
    if contender == "torch":
        picture = x.ndim == 4
        order = torch.channels_last if picture else torch.contiguous_format
        module = module.to(memory_format=order)

        def run() -> Array:
            with torch.inference_mode():
                return module(torch.from_numpy(x).to(memory_format=order)).numpy()  # type: ignore[no-any-return]

        return run
    if contender == "onnxruntime":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(exported(module, x), options)
        return lambda: session.run(None, {"x": x})[0]
    if contender == "jax":
        import jax

        import models_jax

        jitted = jax.jit(models_jax.forward(module))
        return lambda: np.asarray(jitted(x))
    import nnxp

    model = nnxp.load_onnx(exported(module, x)) if "onnx" in contender else nnxp.from_torch(module)
    engine = nnxp.Engine(model, "numpy", workers=threads)
    return lambda: engine(x)


def entrant(words: list[str]) -> None:
    contender, name, rows, small, threads = words
    serve(lambda: (built(contender, name, int(rows), small == "True", int(threads)), {}))


# the race


def due(name: str, rows: int, small: bool) -> Output:
    """What torch makes of it in float64; right is what differs by 2e-5 of the largest at most."""
    import torch

    module, x = drawn(name, small), rows_of(name, rows, small)
    y = module.double()(torch.from_numpy(x.astype("float64"))).numpy()
    return Output(y, np.full(y.shape, 2e-6 * np.abs(y).max()), np.dtype("float32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--rows", type=int, default=0, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=USUAL)
    parser.add_argument("--small", action="store_true", help="everything once, on tiny networks")
    parser.add_argument("-o", "--output", type=Path, metavar="JSON")
    args = parser.parse_args()
    args.networks = args.networks or list(NETWORKS)
    if unknown := [name for name in args.networks if name not in NETWORKS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(NETWORKS)}")
    quick = {"turn": 0.001, "pause": 0.0, "rounds": 1} if args.small else {"rounds": args.rounds}
    found: dict[str, Any] = {"place": here(), "threads": args.threads, "networks": {}}
    print(f"{found['place']['cpu']}, {args.threads} threads each; BLAS {found['place']['blas']}")
    print("ms of wall time (share of ONNX Runtime's speed) | ms of CPU time (share) | load")
    right = True
    for name in args.networks:
        expected = due(name, args.rows, args.small)
        words = (name, str(args.rows), str(args.small), str(args.threads))
        entered = [
            Contender(each, (sys.executable, __file__, "entrant", each, *words), expected)
            for each in args.contenders
        ]
        comparison = race(entered, title=name, rows=args.rows, **quick)  # type: ignore[arg-type]
        load = os.getloadavg()[0]
        results = {each.name: each for each in comparison.results}
        base = results.get("onnxruntime")
        for each in comparison.results:
            if each.problem:
                right = False
                print(f"{name:10} {each.name:12} {each.problem}")
                continue
            wall, cpu = min(each.seconds), median(each.cpu)
            line = f"{name:10} {each.name:12} {wall * 1e3:9.2f}"
            if base and base.seconds:
                shares = min(base.seconds) / wall, median(base.cpu) / cpu
                line += f" ({shares[0]:.2f}) | {cpu * 1e3:9.2f} ({shares[1]:.2f}) | {load:.1f}"
            print(line, f"error {each.error:.1e}", flush=True)
        found["networks"][name] = comparison.to_dict() | {"load": load}
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["entrant"]:
        entrant(sys.argv[2:])
    else:
        main()
