"""A layer as vLLM compiles it where it compiles (not on a CPU): one graph, which serves whatever is loaded later."""

import types

import pytest
import torch

from tests.serving.server import skip_without_vllm

skip_without_vllm()
pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own are no errors of ours

IN, OUT, RANK, SLOTS = 24, 10, 32, 3


class Punica:
    """vLLM's products as a compiler can follow them; on a GPU they are Triton's, which it does not look into."""

    def __init__(self, slots):
        self._token_lora_indices = slots

    def add_shrink(self, y, x, lora_a_stacked, scale):
        for one, weights in zip(y, lora_a_stacked, strict=True):
            one.copy_(scale * self._product(x, weights))

    def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True):
        for one, weights, size in zip(x, lora_b_stacked, output_slices, strict=True):
            y[:, offset_start : offset_start + size] += self._product(one, weights)
            offset_start += size

    def _product(self, x, weights):
        slots = self._token_lora_indices[: x.shape[0]]
        products = torch.einsum("ti,toi->to", x, weights[slots, 0])
        return torch.where((slots >= 0)[:, None], products, 0.0)


@pytest.fixture
def layer():
    """A layer of two slices with the plugin's forward pass, without what vLLM's constructor needs an engine for."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    from moe_lora_interop.vllm_plugin import register
    from moe_lora_interop.vllm_plugin.tables import Tables, gated

    register()
    torch.manual_seed(0)
    made = BaseLinearLayerWithLoRA.__new__(BaseLinearLayerWithLoRA)
    torch.nn.Module.__init__(made)
    made.n_slices, made.tp_size, made.output_slices = 2, 1, (OUT, OUT)
    made.lora_a_stacked = tuple(torch.randn(SLOTS, 1, RANK, IN) for _ in range(2))
    made.lora_b_stacked = tuple(torch.randn(SLOTS, 1, OUT, RANK) for _ in range(2))
    made.moe_lora_tables, made.moe_lora_gate = Tables(2, SLOTS, RANK, 1), gated
    made.punica_wrapper = Punica(torch.tensor([0, -1, 1, 2, 0, 7]))
    return made


def test_one_graph_serves_what_is_loaded_later(layer):
    from moe_lora_interop.vllm_plugin.rules import Rule
    from moe_lora_interop.vllm_plugin.tables import Gating

    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer._apply_lora_to_output, fullgraph=True, backend=count)
    x, base = torch.randn(5, IN), torch.randn(5, 2 * OUT)
    rules = [
        Rule(),
        Rule(experts=4, top_k=2, renormalise=1),
        Rule(experts=3, score=4, top_k=3),
        Rule(experts=2, tau=0.4),
    ]
    seen = []
    for rule in rules:
        layer.moe_lora_tables.fill(0, [Gating(rule, (), (2,) * int(rule.experts))] * 2)
        found, expected = compiled(x, base.clone()), layer._apply_lora_to_output(x, base.clone())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1], base[1])  # no adapter
        seen.append(found[0])
    assert len(graphs) == 1
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


def test_a_batch_axis_of_the_transformers_backend(layer):
    x, base = torch.randn(5, IN), torch.randn(5, 2 * OUT)
    expected = layer._apply_lora_to_output(x, base.clone())
    found = layer._apply_lora_to_output(x[None], base.clone()[None])
    assert torch.equal(found[0], expected)


def test_what_vllm_does_without_tables(layer):
    """Where no mixture can be served, the layer is vLLM's own."""
    calls = []

    def add_lora_linear(y, x, a, b, scale, slices):
        calls.append((scale, slices))
        return y

    layer.moe_lora_tables = None
    layer.punica_wrapper = types.SimpleNamespace(add_lora_linear=add_lora_linear)
    base = torch.randn(5, 2 * OUT)
    assert layer._apply_lora_to_output(torch.randn(5, IN), base) is not None
    assert calls == [(1.0, (OUT, OUT))]
