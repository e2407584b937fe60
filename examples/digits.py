"""Handwritten digits, from pixels to a file that any machine reads: train, judge, save, draw.

    python examples/digits.py [FOLDER]

Takes some seconds on a laptop, and needs nothing but nnxp; with matplotlib it draws, too.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np

import nnxp
from nnxp.demo import load_digits


def main(folder: Path) -> None:
    _, pixels, labels, unseen = load_digits()  # 1,797 pictures of 8 x 8, from 0 to 16
    x, y = pixels[~unseen], labels[~unseen]

    net = nnxp.Sequential(
        nnxp.Standardize(x.mean(axis=0), np.maximum(x.std(axis=0), 1)),
        nnxp.Dense(64, 128, "relu", rng=0),
        nnxp.Dropout(0.1),
        nnxp.Dense(128, 10, "softmax", rng=1),
        classes=range(10),
    )
    fitted = nnxp.fit(
        net, x, y, loss="cross_entropy", optimizer=nnxp.AdamW(2e-3), epochs=30, rng=0,
        validation=(pixels[unseen], labels[unseen]), patience=5,
    )  # fmt: skip

    guesses = nnxp.predict(fitted.model, pixels[unseen]).argmax(axis=1)
    print(f"{len(fitted.history)} epochs; right: {(guesses == labels[unseen]).mean():.1%}")

    report = nnxp.testing.parity_report(fitted.model, pixels[:100])
    print("all backends here agree with float64:", report.ok)

    nnxp.save(fitted.model, folder / "digits.safetensors")
    print("wrote", folder / "digits.safetensors")

    if importlib.util.find_spec("matplotlib"):
        nnxp.plots.learning_curve(fitted.history).savefig(folder / "learning.svg")
        nnxp.plots.confusion(labels[unseen], guesses).savefig(folder / "confusion.svg")
        print("drew", folder / "learning.svg", "and", folder / "confusion.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
