"""Does the bound ever call a correct result wrong? Random correct comparisons, by the thousand.

    python tests/false_alarms.py [--comparisons 10000] [--seed 0]

draws sizes, scales, types, kinds of data and operations, computes each with NumPy on several sets
of BLAS kernels (OPENBLAS_CORETYPE), in several orders of summation, and with torch and JAX where
they are installed, each library in a process of its own. Prints the largest error in units of the
bound, of which 6 are allowed, and records it in bench/results/false_alarms.json. Exit code 1 if any
fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

import nnxp
from nnxp import kernels
from nnxp.testing import LIMIT, error_bound, parity_report
from nnxp.testing.goldens import layer_examples, source_hash
from nnxp.testing.parity import compare
from oracles import ORACLES

RESULT = Path(__file__).parents[1] / "bench/results/false_alarms.json"
CORES = "Prescott", "Nehalem", "Sandybridge", "Haswell", "Zen", "SkylakeX", "Cooperlake"

FAMILIES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(size=shape),
    "lognormal": lambda rng, shape: rng.lognormal(size=shape),
    "sparse": lambda rng, shape: rng.normal(size=shape) * (rng.uniform(size=shape) < 0.05),
    "badly scaled": lambda rng, shape: rng.normal(size=shape) * 10 ** rng.uniform(-4, 4, shape),
    "with an offset": lambda rng, shape: rng.normal(size=shape) + 30,
    "few values": lambda rng, shape: rng.integers(-2, 3, shape) / 3,
    "small whole": lambda rng, shape: rng.integers(-8, 9, shape).astype("float64"),
}
FLOATS = ("float16", "bfloat16", "float32", "float64")


def orders_of_summation(x, w):
    """The same product, summed in other ways: all correct."""
    half = x.shape[1] // 2
    yield "blas", lambda: x @ w
    yield "transposed", lambda: np.ascontiguousarray((w.T @ x.T).T)
    yield "einsum", lambda: np.einsum("mk,kn->mn", x, w)
    yield "split in two", lambda: x[:, :half] @ w[:half] + x[:, half:] @ w[half:]
    yield "reversed", lambda: np.ascontiguousarray(x[:, ::-1]) @ np.ascontiguousarray(w[::-1])
    yield "row by row", lambda: np.concatenate([row[None] @ w for row in x])
    yield "one term after the other", lambda: one_after_the_other(x, w)


def one_after_the_other(x, w):
    y = np.zeros((x.shape[0], w.shape[1]), x.dtype)
    for k in range(x.shape[1]):
        y += x[:, k : k + 1] * w[k]
    return y


class Draw:
    """Random rows and parameters of one size, type and family; what the oracle's cases ask for."""

    def __init__(self, rng, dtype):
        self.rng, self.dtype = rng, dtype
        self.kind = nnxp._arrays.float_dtype(dtype)
        self.rows, self.out = (int(2 ** rng.uniform(0, 6)) for _ in range(2))
        self.channels = int(2 ** rng.uniform(0, 12))
        self.family = str(rng.choice(list(FAMILIES)))
        most = 0 if dtype == "float16" else 3
        self.scale = 10 ** rng.uniform(-most, most)

    def _drawn(self, *shape, scale=1.0):
        values = FAMILIES[self.family](self.rng, shape) * scale
        if self.dtype == "float16":  # the largest is 65504
            values = values.clip(-10, 10) / (shape[0] if len(shape) == 2 else 1)
        return values.astype(self.kind)

    def x(self, times=1):
        return self._drawn(times * self.channels, self.rows, scale=self.scale).T.copy()

    def weight(self):
        return self._drawn(self.channels, self.out)

    def vector(self, size=None):
        return self._drawn(self.out if size == 4 else self.channels)

    def positive(self):
        return self.rng.uniform(0.1, 3, self.channels).astype(self.kind)

    def option(self, low, high):
        return round(float(self.rng.uniform(low, high)), 4)

    def __str__(self):
        return f"{self.dtype} {self.rows}x{self.channels}x{self.out} {self.family} {self.scale:.1e}"


def by_numpy(rng):
    """One random thing that NumPy computes correctly: (name, checks)."""
    what = rng.choice(
        ["order of summation", "kernel", "network", "function"], p=[0.4, 0.4, 0.1, 0.1]
    )
    draw = Draw(rng, str(rng.choice(FLOATS)))
    if what == "order of summation":
        draw.dtype = str(rng.choice(["float32", "float64"]))
        draw.kind = np.dtype(draw.dtype)
        x, w = draw.x(), draw.weight()
        value, error = error_bound(kernels.matmul, x, w)
        ways = list(orders_of_summation(x, w))
        name, way = ways[rng.integers(len(ways))]
        return f"{name} {draw}", [compare(name, "", "cpu", way(), value, error)]
    if what == "kernel":
        name = str(rng.choice(list(ORACLES)))
        arrays, options = ORACLES[name].draw(draw)
        kernel = partial(kernels.KERNELS[name], **options)
        return f"{name} {draw}", parity_report(kernel, *arrays, backends=["numpy"]).checks
    if what == "function":
        q, k, v = (FAMILIES[draw.family](rng, (16, 32)).astype("float32") for _ in range(3))
        return f"attention {draw.family}", parity_report(
            attention, q, k, v, backends=["sim"]
        ).checks
    layer, shape = (examples := layer_examples())[rng.integers(len(examples))]
    rows = int(2 ** rng.uniform(0, 10))
    x = FAMILIES[draw.family](rng, (rows, *shape[1:])).clip(-1e4, 1e4).astype(draw.kind)
    report = parity_report(layer.astype(draw.kind), x, backends=["numpy"])
    return f"{layer!r} {draw.dtype} {draw.family}", report.checks


def attention(q, k, v):
    """Written with the library of its arguments, as a user's own function."""
    xp = nnxp.get_array_module(q)
    scores = xp.matmul(q, k.swapaxes(-1, -2)) / 4
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return xp.matmul(weights / xp.sum(weights, axis=-1, keepdims=True), v)


def by_other(compute, rng, names, floats):
    """One kernel as another library computes it, whose formula may be another."""
    draw = Draw(rng, str(rng.choice(floats)))
    name = str(rng.choice(names))
    arrays, options = ORACLES[name].draw(draw)
    value, error = error_bound(kernels.KERNELS[name], *arrays, **options)
    rounded = ORACLES[name].rounded
    if rounded is not None:
        error = np.maximum(error, error_bound(rounded, *arrays, **options)[1])
    y = compute(name, arrays, options)
    return f"{name} {draw}", [compare(name, "", "other", y, value, error)]


def by_torch(rng):
    import torch

    def compute(name, arrays, options):
        return ORACLES[name].torch(*map(torch.from_numpy, arrays), **options).numpy()

    return by_other(compute, rng, list(ORACLES), ["float32", "float64"])


def by_jax(rng):
    import jax

    jax.config.update("jax_enable_x64", True)
    jnp, nn = jax.numpy, jax.nn

    def layer_norm(x, gain, bias, eps):
        """In two passes: jax.nn.standardize takes one, and loses digits where the mean is large."""
        y = x - x.mean(-1, keepdims=True)
        return y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * gain + bias

    names = "relu elu selu softplus sigmoid silu gelu softmax log_softmax leaky_relu mish".split()
    functions = {name: getattr(nn, name) for name in names} | {
        "gelu": partial(nn.gelu, approximate=False),
        "gelu_tanh": partial(nn.gelu, approximate=True),
        "softsign": nn.soft_sign,
        "tanh": jnp.tanh,
        "matmul": jnp.matmul,
        "linear": lambda x, w, b: x @ w + b,
        "standardize": lambda x, mean, scale: (x - mean) / scale,
        "rms_norm": lambda x, gain, eps: (
            x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * gain
        ),
        "layer_norm": layer_norm,
    }

    def compute(name, arrays, options):
        made = partial(functions[name], **options)
        return np.asarray((jax.jit(made) if rng.uniform() < 0.5 else made)(*arrays))

    return by_other(compute, rng, list(functions), ["float32", "float64"])


WAYS = {"numpy": by_numpy, "torch": by_torch, "jax": by_jax}


def run(way, comparisons, seed):
    """So many comparisons in this process: how many, the largest error and what it was of."""
    worst, failures, done, index = (0.0, ""), [], 0, 0
    while done < comparisons:
        rng = np.random.default_rng([seed, sum(way.encode()), index])
        with np.errstate(all="ignore"):
            name, checks = WAYS[way](rng)
        checks = [each for each in checks if not each.problem.startswith("nothing was compared")]
        for check in checks:
            worst = max(worst, (check.ratio, f"{name}, number {index}"))
            if not check.ok:
                failures.append(f"number {index}: {name} {check.name}: {check.problem}")
        done, index = done + len(checks), index + 1
    return {"comparisons": done, "largest": worst[0], "of": worst[1], "failures": failures}


def kernels_in_use():
    return [each.get("architecture") for each in threadpool_info() if each["user_api"] == "blas"]


def contenders():
    """(name, way, environment) of every process: sets of BLAS kernels, and other libraries."""
    free = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    yield "numpy", "numpy", free
    for core in CORES:
        yield f"numpy, {core} kernels", "numpy", free | {"OPENBLAS_CORETYPE": core}
    for library in ("torch", "jax"):
        if importlib.util.find_spec(library):
            yield library, library, free


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--comparisons", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=WAYS, help="in this process alone")
    options = parser.parse_args()
    if options.way:
        made = run(options.way, options.comparisons, options.seed)
        print(json.dumps(made | {"kernels": kernels_in_use()}))
        return 0
    chosen = list(contenders())
    each = -(-options.comparisons // len(chosen))
    found = {}
    for i, (name, way, environment) in enumerate(chosen):
        command = [sys.executable, __file__, f"--way={way}", f"--comparisons={each}"]
        command.append(f"--seed={options.seed + i}")
        ran = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, check=True, text=True
        )
        found[name] = json.loads(ran.stdout)
        said = found[name]
        print(
            f"{name:28} {said['comparisons']:6,} comparisons, {len(said['failures'])} failed, "
            f"largest {said['largest']:.2f} of {LIMIT:g} units: {said['of']}"
        )
    failed = sum(len(each["failures"]) for each in found.values())
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "sources": source_hash(),
        "machine": platform.platform(),
        "numpy": np.__version__,
        "limit": LIMIT,
        "comparisons": sum(each["comparisons"] for each in found.values()),
        "failed": failed,
        "largest": max(each["largest"] for each in found.values()),
        "by": found,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['comparisons']:,} comparisons, {failed} failed, largest {result['largest']:.2f}"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
