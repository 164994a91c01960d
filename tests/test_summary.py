"""The summary of an applied model: its numbers are those of the adapter, and it shows itself."""

import io
import re

import pytest
from flax import nnx
from rich.console import Console
from tiny_training import tiny_base, tiny_model

import moe_lora_jax as mlj
from moe_lora_interop.errors import CheckpointError

KINDS = {
    "linear": {},
    "dense": {"top_k": None},
    "ffn": {"scope": "ffn", "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "model": {"scope": "model", "top_k": None},
    "plain LoRA": {"num_experts": 1, "top_k": None},
    "shared A": {"shared_lora_A": True, "top_k": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_counts_what_is_saved_and_what_the_base_had(kind):
    model = tiny_model(**KINDS[kind])
    found = mlj.summary(model)
    assert found.parameters == sum(t.size for t in mlj.to_adapter(model).tensors.values())
    assert found.parameters == sum(row.parameters for row in found.rows)
    assert found.base_parameters == sum(leaf.size for _, leaf in nnx.to_flat_state(nnx.state(tiny_base(), nnx.Param)))
    assert found.share == found.parameters / found.base_parameters


def test_the_rows_say_experts_ranks_and_top_k():
    model = tiny_model(rank_pattern={"q_proj": 4}, num_experts_pattern={"v_proj": 5})
    rows = {row.modules: row for row in mlj.summary(model).rows}
    assert [(r.experts, r.rank, r.top_k) for r in rows.values()] == [("3", "4", "2"), ("5", "2", "2"), ("3", "2", "2")]
    assert list(rows) == ["q_proj", "v_proj", "down_proj"]
    assert rows["v_proj"].parameters == 5 * 2 * (32 + 16) + 5 * 32
    routers = {row.modules: row.rank for row in mlj.summary(tiny_model(**KINDS["ffn"])).rows}
    assert routers["mlp"] == "" and routers["up_proj"] == "2"
    assert mlj.summary(tiny_model(**KINDS["model"])).rows[-1].modules == "router of the model"


def test_it_shows_itself_as_text_in_rich_and_in_notebooks():
    found = mlj.summary(tiny_model())
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    for shown in (str(found), console.export_text(), re.sub("<[^>]*>", " ", found._repr_html_())):
        assert "q_proj" in shown and f"{found.parameters:,}" in shown and "12.53%" in shown and "2 largest" in shown
    assert found._repr_html_().count("<tr>") == 1 + len(found.rows)


def test_a_model_without_adapter_has_none():
    with pytest.raises(CheckpointError, match="has no adapter"):
        mlj.summary(tiny_base())
