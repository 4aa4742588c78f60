"""Layers whose weights are not packed, as on a GPU: results, state dicts, replacing in place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from commfuse.nn import GatedColumnParallelLinear, VocabParallelHead, linear
from commfuse.ops import gated_matmul, pack_gate_up
from commfuse.runtime.communicator import Communicator


@pytest.fixture
def comm(monkeypatch):
    monkeypatch.setattr(linear, "_prepare", lambda weight: weight)
    monkeypatch.setattr(linear, "_prepare_gated", lambda gate, up: torch.cat((gate, up)))
    with Communicator() as made, torch.inference_mode():
        yield made


@pytest.mark.parametrize("bias", [False, True])
def test_gated_layers(comm, bias):
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(24, 37, bias=bias) for name in ("gate", "up")})
    gated, x = GatedColumnParallelLinear.from_linears(layers, comm), torch.randn(5, 24)
    torch.testing.assert_close(gated(x), F.silu(layers["gate"](x)) * layers["up"](x))
    for key, value in layers.state_dict().items():
        assert gated.state_dict()[key].equal(value)
    weight, held_bias = gated.weight, gated.bias
    gated.load_state_dict({key: 2 * value for key, value in layers.state_dict().items()})
    assert gated.weight is weight and gated.bias is held_bias
    expected = F.silu(2 * layers["gate"](x)) * layers["up"](x) * 2
    torch.testing.assert_close(gated(x), expected)


def test_packed_and_plain_give_the_same(comm):
    x, gate, up = torch.randn(3, 24), torch.randn(37, 24), torch.randn(37, 24)
    plain = gated_matmul(x, torch.cat((gate, up)))
    torch.testing.assert_close(gated_matmul(x, pack_gate_up(gate, up)), plain)


def test_logits_keep_the_dtype_of_plain_weights(comm):
    head = VocabParallelHead(torch.randn(300, 16).bfloat16(), 300, comm)
    assert head.local(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16
