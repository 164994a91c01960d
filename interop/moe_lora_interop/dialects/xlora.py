"""PEFT's X-LoRA (arXiv:2402.07148): ordinary LoRA folders and one classifier on the model's last hidden state."""

from moe_lora_interop.rules.codecs import IF_DEEP, ONE_FOR_ALL, PER_EXPERT
from moe_lora_interop.rules.dialect import SET, Dialect, Field, Folders
from moe_lora_interop.rules.lora_fields import BOOKKEEPING, INERT
from moe_lora_interop.rules.tensors import Rule

_KEY = "{expert}/base_model.model.{module}"

XLORA = Dialect(
    name="xlora",
    source="PyPI peft 0.19.1, tuners/xlora",
    rules=(
        Rule("router_{j}", "main/base_model.internal_xlora_classifier.layers.{j*stride}.weight", "unit in", module=""),
        Rule("router_bias_{j}", "main/base_model.internal_xlora_classifier.layers.{j*stride}.bias", "unit", module=""),
        Rule("lora_A", f"{_KEY}.lora_A.weight", "rank in"),
        Rule("lora_B", f"{_KEY}.lora_B.weight", "out rank"),
    ),
    needs=frozenset({"lora_A", "lora_B"}),
    fields=(
        Field("num_experts", "num_experts"),
        Field("r", "experts.r", PER_EXPERT),
        Field("lora_alpha", "experts.lora_alpha", PER_EXPERT),
        Field("use_rslora", "experts.use_rslora", ONE_FOR_ALL, default=False),
        Field("lora_dropout", "experts.lora_dropout", ONE_FOR_ALL, default=0.0),
        Field("target_modules", "experts.target_modules", ONE_FOR_ALL),
        Field("router_depth", "xlora_depth"),
        Field("router_hidden_size", "xlora_size", IF_DEEP),
        Field("router_dropout", "xlora_dropout_p", default=0.0),
        Field("layerwise", "layerwise_scalings", default=False),
        Field("router_temperature", "softmax_temperature", default=1.0),
        Field("top_k", "top_k_lora", default=None),
        Field("routed_scaling_factor", "global_scaling_weight", default=1.0),
        Field("scaling_pass_value", "scaling_pass_value", default=0.0),
        *BOOKKEEPING,
    ),
    fixed={"scope": "model", "router_bias": True},
    const={"peft_type": ("XLORA",)},
    cases=(
        (
            {"enable_softmax": True, "enable_softmax_topk": False, "top_k_lora": None},
            {"scoring_func": "softmax", "norm_topk_prob": True, "top_k": None},
        ),
        (
            {"enable_softmax": True, "enable_softmax_topk": False, "top_k_lora": SET},
            {"scoring_func": "softmax", "norm_topk_prob": False, "top_k": SET},
        ),
        (  # the temperature is one of the softmax
            {"enable_softmax": False, "enable_softmax_topk": False},
            {"scoring_func": "identity", "norm_topk_prob": False, "router_temperature": 1.0},
        ),
        (
            {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": SET, "softmax_temperature": 1.0},
            {"scoring_func": "softmax", "norm_topk_prob": True, "top_k": SET, "router_temperature": 1.0},
        ),
    ),
    measured={"hidden_size": ("router_0", 1)},
    ignore=INERT | {"use_trainable_adapters"},  # what was trained
    folders=Folders("adapters", outside=True, as_object=True),
    stride=("xlora_dropout_p", 2, 3),
    notes="one softmax router for the model on its last hidden state; unequal ranks and alphas; the order of modules "
    "in a layerwise router is not stored",
    hint="peft 0.20.1.dev0 and 0.21 save X-LoRA classifiers empty or truncated, so what is missing is lost",
)
