"""MeteoRA (arXiv:2405.13053): the full state of a model, with the task LoRAs side by side and a gate per layer."""

from moe_lora_interop.rules.base_tensors import BASE_TENSORS
from moe_lora_interop.rules.codecs import EQUAL, ONE_FOR_ALL, PER_EXPERT
from moe_lora_interop.rules.dialect import Dialect, Field, Folders, Option
from moe_lora_interop.rules.lora_fields import INERT
from moe_lora_interop.rules.tensors import Rule

_KEY = "base_model.model.{module}"

METEORA = Dialect(
    name="meteora",
    source="NJUDeepEngine/meteora@2d192ad, MoELoRA/layer.py",
    rules=(
        Rule("lora_A", f"main/{_KEY}.lora_A.weight", "(expert rank) in"),
        Rule("lora_B", f"main/{_KEY}.lora_B.weight", "out (expert rank)"),
        Rule("router", f"main/{_KEY}.moe_gate.weight", "logit in"),
        # the folders that its training begins with; it moves A and B, and saves them in the full state
        Rule("lora_A", f"{{expert}}/{_KEY}.lora_A.weight", "rank in", copy="stale"),
        Rule("lora_B", f"{{expert}}/{_KEY}.lora_B.weight", "out rank", copy="stale"),
        *(Rule(r.role, f"main/{r.key}", r.axes, canonical_axes=r.axes, copy="base") for r in BASE_TENSORS),
        Rule("base_weight", f"main/{_KEY}norm.weight", "out", canonical_axes="out", copy="base"),
    ),
    fields=(
        Field("num_experts", "num_experts"),
        Field("r", "experts.r", EQUAL),
        Field("lora_alpha", "experts.lora_alpha", PER_EXPERT),
        Field("lora_dropout", "experts.lora_dropout", ONE_FOR_ALL, default=0.0),
        Field("use_rslora", "experts.use_rslora", ONE_FOR_ALL, default=False),
        Field("target_modules", "experts.target_modules", ONE_FOR_ALL),
        Field("base_model_name_or_path", "experts.base_model_name_or_path", ONE_FOR_ALL, default=None),
        Field("task_type", "experts.task_type", ONE_FOR_ALL, default=None),
    ),
    ignore=INERT,
    options=(
        Option("top_k", "experts kept per token; 2 in its source"),
        Option("temperature", "divides the kept logits; 1 in its source", ours="router_temperature"),
        Option("adapters", "the folders of the task LoRAs, in the order of its list; only their configs count"),
    ),
    folders=Folders("adapters", outside=True, weights="model.safetensors", by_option=True),
    weights="model.safetensors",
    config_file=False,
    notes="top-k, then softmax; one rank for all experts; k, temperature and the order of experts are not stored. The "
    "base's weights are in the file too: compared with a base when it is loaded, and not written",
)
