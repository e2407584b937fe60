"""How the demo's network came about: `python -m nnxp.demo.train [folder]` makes its files again.

The rows are scikit-learn's digits, 1,797 pictures of 8 x 8 pixels from 0 to 16. Every fifth row,
from the first on, is unseen: not trained on. The same 13 people wrote the seen and the unseen
rows, so the accuracy is one on unseen digits in known hands, and lower for an unknown hand.

The same files come out again on the same versions of scikit-learn and NumPy. BLAS orders its sums
by the processor and the number of threads, which changes the last bits of the float64 weights; in
float32 they were the same for every order that was tried.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from nnxp.engine import predict
from nnxp.io.checkpoint import save
from nnxp.io.sklearn import from_sklearn


def train(folder: Path) -> float:
    """Write digits.safetensors and digits.npz to the folder; the accuracy on the unseen rows."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pixels, labels = (each.astype("uint8") for each in load_digits(return_X_y=True))
    unseen = np.arange(len(pixels)) % 5 == 0
    network = MLPClassifier((128, 64), alpha=0.1, max_iter=400, random_state=0)
    pipeline = make_pipeline(StandardScaler(), network)
    with threadpool_limits(1):
        pipeline.fit(pixels[~unseen], labels[~unseen])
    model = from_sklearn(pipeline)
    save(model, folder / "digits.safetensors")
    np.savez_compressed(folder / "digits.npz", pixels=pixels, labels=labels, unseen=unseen)
    found = network.classes_[predict(model, pixels[unseen], "numpy").argmax(axis=1)]
    return float(np.mean(found == labels[unseen]))


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    accuracy = train(folder)
    print(f"{folder}: {accuracy:.1%} of the unseen digits are right")
