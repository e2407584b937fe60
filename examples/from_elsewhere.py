"""One pipeline of scikit-learn's, three ways: as it is, as a network of nnxp, and by way of ONNX.

    python examples/from_elsewhere.py [FOLDER]

Needs scikit-learn; the part about ONNX also the package onnx.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import nnxp


def main(folder: Path) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    network = MLPClassifier((32, 16), early_stopping=True, random_state=0)
    pipeline = make_pipeline(StandardScaler(), network).fit(x, y)

    net = nnxp.from_sklearn(pipeline)  # scaler and network as one model
    ours, theirs = nnxp.predict(net, x), pipeline.predict_proba(x)
    print("largest difference from predict_proba:", f"{abs(ours - theirs).max():.1e}")
    assert (np.take(net.classes, ours.argmax(axis=1)) == pipeline.predict(x)).all()

    nnxp.save(net, folder / "cancer.safetensors")  # read without scikit-learn, and without pickle
    again = nnxp.load(folder / "cancer.safetensors")
    assert (nnxp.predict(again, x) == ours).all()
    print("wrote", folder / "cancer.safetensors")

    if importlib.util.find_spec("onnx"):
        nnxp.save_onnx(net, folder / "cancer.onnx", row=(x.shape[1],))
        graph = nnxp.load_onnx(folder / "cancer.onnx")
        rows = x.astype("float32")
        difference = abs(nnxp.predict(graph, rows) - nnxp.predict(net, rows)).max()
        print("largest difference by way of ONNX:", f"{difference:.1e}")

    nnxp.testing.assert_parity(net, x[:100])
    print("all backends here agree with float64")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
