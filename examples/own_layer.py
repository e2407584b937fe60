"""A layer of your own: written once as a formula, then saved, trained, swept and judged.

    python examples/own_layer.py [FOLDER]

The layer is a mixture of experts: several small networks, and a gate that weighs their answers.
"""

import sys
from pathlib import Path

import numpy as np

import nnxp


class Mixture(nnxp.Layer):
    """y = sum over e of gate(x)_e expert_e(x): x (rows, inputs) -> y (rows, outputs)."""

    gate: nnxp.Layer
    experts: tuple[nnxp.Layer, ...]

    def __init__(self, inputs, outputs, experts, *, rng=None):
        rng = np.random.default_rng(rng)
        self.gate = nnxp.Dense(inputs, experts, "softmax", rng=rng)
        self.experts = tuple(nnxp.Dense(inputs, outputs, "tanh", rng=rng) for _ in range(experts))

    def __call__(self, x):
        share = self.gate(x)
        return sum(share[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (4096, 2)).astype("float32")
    y = np.where(x[:, :1] > 0, np.sin(4 * x[:, 1:]), -x[:, 1:]).astype("float32")  # two regimes

    net = nnxp.Sequential(Mixture(2, 16, 4, rng=1), nnxp.Dense(16, 1, rng=2))
    print(net.summary())
    fitted = nnxp.fit(
        net, x, y, loss="mean_square", optimizer=nnxp.Adam(1e-2), epochs=30, batch=64, rng=0
    )
    print(f"loss {fitted.history[0]['loss']:.3f} -> {fitted.history[-1]['loss']:.4f}")

    nnxp.save(fitted.model, folder / "mixture.safetensors")
    again = nnxp.load(folder / "mixture.safetensors")  # finds Mixture, which is defined here
    assert (again(x) == fitted.model(x)).all()

    report = nnxp.testing.parity_report(fitted.model, x[:200])
    print(report)  # its layers and those within, on NumPy, a simulated GPU, and a real one if here
    assert report.ok


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
