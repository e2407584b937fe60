"""Weights of a state dict that torch wrote go where they belong, or it is said why not."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import nnxp

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


class Featured(nnxp.Layer):
    """features, then a head; a table of numbers of its own"""

    features: nnxp.Layer
    head: nnxp.Layer
    shift: np.ndarray

    def __init__(self, features, head, shift):
        self.features, self.head, self.shift = features, head, np.zeros(shift, "float32")

    def __call__(self, x):
        return self.head(self.features(x)) + self.shift


def cnn():
    import torch.nn as nn

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(4, 6, (3, 2), groups=2), nn.BatchNorm2d(6), nn.ReLU(),
                nn.ConvTranspose2d(6, 4, 2, groups=2), nn.PReLU(4), nn.GroupNorm(2, 4),
            )  # fmt: skip
            self.head = nn.Linear(5, 3, bias=False)
            self.shift = nn.Parameter(torch.empty(3))

        def forward(self, x):
            return self.head(self.features(x)) + self.shift

    conv = nnxp.Conv(4, 6, (3, 2), groups=2), nnxp.BatchNorm(6), nnxp.Activation("relu")
    more = nnxp.ConvTranspose(6, 4, (2, 2), groups=2), nnxp.PReLU(4), nnxp.GroupNorm(2, 4)
    features = nnxp.Sequential(
        *(each if isinstance(each, nnxp.Activation) else nnxp.ChannelsFirst(each)
          for each in (*conv, *more))
    )  # fmt: skip
    return Module(), Featured(features, nnxp.Dense(5, 3, bias=False), 3), (2, 4, 6, 5)


def plain():
    import torch.nn as nn

    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 3))
    return module, nnxp.Sequential(
        nnxp.Dense(5, 4, "relu"), nnxp.LayerNorm(4), nnxp.Dense(4, 3)
    ), (7, 5)  # fmt: skip


def recurrent(kind):
    def make():
        options = {"bidirectional": True, "batch_first": True}
        module = getattr(torch.nn, kind)(4, 3, 2, **options)
        return module, getattr(nnxp, kind)(4, 3, layers=2, bidirectional=True), (2, 5, 4)

    return make


def encoder():
    import torch.nn as nn

    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, nn.LayerNorm(6),
        enable_nested_tensor=False,
    )  # fmt: skip
    layers = [nnxp.TransformerEncoderLayer(6, 2, 8) for _ in range(2)]
    return module, nnxp.TransformerEncoder(*layers, norm=nnxp.LayerNorm(6)), (2, 5, 6)


MADE = {"a CNN": cnn, "a row of layers": plain, "an encoder": encoder}
MADE |= {kind: recurrent(kind) for kind in ("RNN", "GRU", "LSTM")}


@needs_torch
@pytest.mark.parametrize("name", MADE)
def test_a_model_with_torch_s_weights_answers_as_torch_does(name, tmp_path):
    from safetensors.torch import save_file as write

    torch.manual_seed(0)
    module, model, shape = MADE[name]()
    with torch.no_grad():
        for part, value in module.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in part else value.uniform_(-1, 1)
    write(module.state_dict(), tmp_path / "state.safetensors")
    loaded = nnxp.load_state(model, tmp_path / "state.safetensors")
    x = torch.rand(shape) - 0.5
    with torch.no_grad():
        due = module.eval()(x)
    due = due[0] if isinstance(due, tuple) else due
    np.testing.assert_allclose(loaded(x.numpy()), due, rtol=1e-5, atol=1e-5)
    assert loaded.parameters().keys() == model.parameters().keys()


@needs_torch
def test_other_types_are_taken_in_or_refused(tmp_path):
    from safetensors.torch import save_file as write

    module, path = torch.nn.Linear(3, 2), tmp_path / "state.safetensors"
    write(module.bfloat16().state_dict(), path)
    loaded = nnxp.load_state(nnxp.Dense(3, 2), path)
    np.testing.assert_array_equal(loaded.weight, module.weight.detach().float().numpy().T)
    assert loaded.weight.dtype == "float32"
    write(module.to(torch.float8_e4m3fn).state_dict(), path)
    with pytest.raises(nnxp.CheckpointError, match="tensors of F8_E4M3"):
        nnxp.load_state(nnxp.Dense(3, 2), path)


def test_all_that_does_not_fit_is_named_at_once(tmp_path):
    net = nnxp.Sequential(nnxp.Dense(5, 4, "relu", rng=0), nnxp.Dense(4, 3, rng=1))
    path = tmp_path / "state.safetensors"
    state = {
        "0.weight": np.ones((4, 5), "float32"), "0.bias": np.ones(7, "float32"),
        "2.weight": np.ones((3, 4), "float64"), "2.scale": np.ones(3, "float32"),
    }  # fmt: skip
    save_file(state, path)
    with pytest.raises(nnxp.ConversionError) as raised:
        nnxp.load_state(net, path)
    said = str(raised.value)
    assert "layers.0.bias (4,) cannot be 0.bias (7,)" in said
    assert "layers.1.bias is not there, as 2.bias" in said
    assert "the model has no place for 2.scale" in said
    with pytest.warns(UserWarning, match="no place for 2.scale"):
        loaded = nnxp.load_state(net, path, partial=True)
    np.testing.assert_array_equal(loaded.layers[1].weight, np.ones((4, 3)))
    np.testing.assert_array_equal(loaded.layers[0].bias, net.layers[0].bias)
    assert {value.dtype.name for value in loaded.parameters().values()} == {"float32"}


def test_a_bias_that_the_model_does_not_have_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    names = {"weight_ih_l0": (12, 2), "weight_hh_l0": (12, 3), "bias_ih_l0": (12,)}
    names |= {"bias_hh_l0": (12,)}
    save_file({name: np.ones(shape, "float32") for name, shape in names.items()}, path)
    with pytest.raises(nnxp.ConversionError, match="no place for bias_hh_l0, bias_ih_l0"):
        nnxp.load_state(nnxp.LSTM(2, 3, bias=False), path)


def test_files_of_others_are_refused(tmp_path):
    net, path = nnxp.Dense(2, 2), tmp_path / "net.safetensors"
    nnxp.save(net, path)
    with pytest.raises(nnxp.CheckpointError, match=r"nnxp\.load reads it"):
        nnxp.load_state(net, path)
    path.write_bytes(b"\x80\x02nothing")
    with pytest.raises(nnxp.CheckpointError, match="pickle"):
        nnxp.load_state(net, path)
    with pytest.raises(FileNotFoundError):
        nnxp.load_state(net, tmp_path / "none")
    with pytest.raises(nnxp.OptionError, match="takes a model"):
        nnxp.load_state("net", path)
