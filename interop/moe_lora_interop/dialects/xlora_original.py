"""X-LoRA as its own program saves it (arXiv:2402.07148): LoRA folders, a classifier and a config of its own name."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from moe_lora_interop.dialects.xlora import XLORA
from moe_lora_interop.rules.derived import layers_into_one
from moe_lora_interop.rules.dialect import Dialect, Field, Folders, Option
from moe_lora_interop.rules.lora_fields import INERT
from moe_lora_interop.rules.tensors import Rule

_KEY = "{expert}/base_model.model.{module}"
_BASE, _WHOLE_BATCH = "base_model_name_or_path", "enable_softmax_topk"

_ACTIVATIONS: Sequence[tuple[dict[str, Any], dict[str, Any]]] = (
    ({"enable_relu_and_dropout": True}, {}),
    # without an activation the layers are one
    ({"enable_relu_and_dropout": False}, {"router_depth": 1, "router_hidden_size": None, "router_dropout": 0.0}),
)

XLORA_ORIGINAL = Dialect(
    name="xlora-original",
    source="EricLBuehler/xlora@8217992, src/xlora",
    rules=(
        Rule("router_{last}", "main/last.weight", "unit in", module=""),
        Rule("router_bias_{last}", "main/last.bias", "unit", module=""),
        Rule("router_{j}", "main/inner.{j*stride}.weight", "unit in", module=""),
        Rule("router_bias_{j}", "main/inner.{j*stride}.bias", "unit", module=""),
        Rule("lora_A", f"{_KEY}.lora_A.weight", "rank in"),
        Rule("lora_B", f"{_KEY}.lora_B.weight", "out rank"),
        # PEFT saves every tensor with "bias" in its name beside an adapter, the classifier's too
        Rule("router_bias_{j}", "{expert}/internal_xlora_classifier.inner.{j}.bias", "unit", module="", copy="dead"),
        Rule("router_bias_{last}", "{expert}/internal_xlora_classifier.last.bias", "unit", module="", copy="dead"),
    ),
    needs=XLORA.needs,
    fields=(
        *(field for field in XLORA.fields if field.ours not in (_BASE, "task_type")),
        Field("router_bias", "use_bias", default=True),
        Field(_BASE, "base_model_id", default=None),
    ),
    fixed={"scope": "model"},
    cases=tuple(
        ({**{name: value for name, value in scores.items() if name != _WHOLE_BATCH}, **activation}, {**ours, **shape})
        for (scores, ours), (activation, shape) in product(XLORA.cases[:3], _ACTIVATIONS)
    ),
    measured=XLORA.measured,
    ignore=INERT | {"use_trainable_adapters", _WHOLE_BATCH},  # refused where it is true
    folders=Folders(
        "adapters", name="adapter_{expert}", config="xlora_config.json", weights="xlora_classifier.safetensors"
    ),
    options=(
        Option("adapters", "the folders of the experts in order, if not those that the config names", default=None),
    ),
    derive=layers_into_one,
    stride=("enable_relu_and_dropout", 1, 3),
    depth="xlora_depth",
    notes="as xlora, and signed scores without softmax; a classifier without activation is read as one layer; the "
    "order of modules in a layerwise router is not stored",
    hint="adapters whose names are numbers lose tensors when this program saves them, and one whose name is the "
    "beginning of another's gets the other's too",
)
