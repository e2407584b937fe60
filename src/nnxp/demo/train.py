"""How the demo's network came about: `python -m nnxp.demo.train [folder]` makes its files again.

The rows are scikit-learn's digits, 1,797 pictures of 8 x 8 pixels from 0 to 16. Every fifth row,
from the first on, is unseen: not trained on. The same 13 people wrote the seen and the unseen
rows, so the accuracy is one on unseen digits in known hands, and lower for an unknown hand.

It is trained in float64 and then rounded: BLAS orders its sums by the processor and the number of
threads, which changes the last bits of the float64 weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from nnxp.engine import predict
from nnxp.io.checkpoint import save
from nnxp.layers.containers import Sequential
from nnxp.layers.dense import Dense
from nnxp.layers.norm import Standardize
from nnxp.training.fit import fit
from nnxp.training.optimizers import AdamW
from nnxp.training.schedules import Cosine


def train(folder: Path) -> float:
    """Write digits.safetensors and digits.npz to the folder; the accuracy on the unseen rows."""
    from sklearn.datasets import load_digits

    pixels, labels = (array.astype("uint8") for array in load_digits(return_X_y=True))
    unseen = np.arange(len(pixels)) % 5 == 0
    x, y, rng = pixels[~unseen], labels[~unseen], np.random.default_rng(0)
    scale = x.std(axis=0)
    network = Sequential(
        Standardize(x.mean(axis=0), np.where(scale > 0, scale, 1)),
        Dense(64, 128, "relu", rng=rng, dtype="float64"),
        Dense(128, 64, "relu", rng=rng, dtype="float64"),
        Dense(64, 10, "softmax", rng=rng, dtype="float64"),
    )
    batch, epochs = 64, 60
    steps = epochs * (len(x) // batch + 1)
    optimizer = AdamW(Cosine(2e-3, steps), decay=0.1)
    fitted = fit(
        network, x, y, loss="cross_entropy", optimizer=optimizer, epochs=epochs, batch=batch, rng=0
    )
    model = fitted.model.astype("float32")
    save(model, folder / "digits.safetensors")
    np.savez_compressed(folder / "digits.npz", pixels=pixels, labels=labels, unseen=unseen)
    predicted = predict(model, pixels[unseen], "numpy").argmax(axis=1)
    return float(np.mean(predicted == labels[unseen]))


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    accuracy = train(folder)
    print(f"{folder}: {accuracy:.1%} of the unseen digits are right")
