"""The README.md of an export: what it is, how to load it, and what was lost on the way."""

import json
from collections.abc import Sequence

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.base_name import hub_name
from moe_lora_interop.config.in_words import routing_in_words

_LORA_CODE = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/directory")
```"""
_MODEL_CODE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```"""


def readme(title: str, what: str, notes: Sequence[str], config: MoeLoraConfig, *, is_model: bool = False) -> str:
    """Markdown.

    Args:
        title: heading.
        what: a sentence or two: what this directory holds.
        notes: what differs from the mixture, one line each.
        config: of the mixture.
        is_model: whether it is a whole model and no adapter.
    """
    base = config.base_model_name_or_path or ""
    known = hub_name(base) if base else None
    of_base = "" if known is None else f"base_model: {json.dumps(known.id)}\n"
    lines = "\n".join(f"- {note}" for note in notes)
    code = _MODEL_CODE if is_model else _LORA_CODE
    library = "transformers" if is_model else "peft"
    return (
        f"---\nlibrary_name: {library}\n{of_base}---\n\n# {title}\n\n{what}\n\n"
        f"Base model: `{base or 'unknown'}`.\n\n{code}\n\n## What it is not\n\n"
        f"Exported by moe-lora from a mixture of {config.num_experts} LoRA experts whose routing rule is: "
        f"{routing_in_words(config)} (scope {config.scope}).\n\n{lines}\n"
    )
