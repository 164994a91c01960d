"""PEFT's Poly and MHR (arXiv:2202.13914, 2211.03831): a task table per layer; weights are mixed, not outputs."""

from moe_lora_interop.rules.base_tensors import BASE_TENSORS
from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import BOOKKEEPING, INERT, TARGETS
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

POLY = Dialect(
    name="poly",
    source="PyPI peft 0.21.2, tuners/poly/layer.py",
    rules=(
        Rule("lora_A", f"{_PREFIX}.poly_lora_A", "split expert in rank", canonical_axes="expert rank (split in)"),
        Rule("lora_B", f"{_PREFIX}.poly_lora_B", "split expert rank out", canonical_axes="expert (split out) rank"),
        Rule("task_embedding", f"{_PREFIX}.poly_router.module_logits", "task dim"),
        *BASE_TENSORS,
    ),
    needs=frozenset({"lora_A", "lora_B", "task_embedding"}),
    fields=(
        Field("num_experts", "n_skills"),
        Field("num_tasks", "n_tasks"),
        Field("n_splits", "n_splits"),
        Field("r", "r"),
        *TARGETS,
        *BOOKKEEPING,
    ),
    fixed={
        "lora_alpha": 1,
        "router_input": "task",
        "router_depth": 0,
        "scoring_func": "sigmoid",
        "mix": "weights",
    },
    const={"peft_type": ("POLY",), "poly_type": ("poly",)},
    ignore=INERT,
    notes="per-task sigmoid weights of the factors, normalised; alpha is always 1; no dropout",
)
