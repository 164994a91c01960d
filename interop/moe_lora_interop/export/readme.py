"""The README.md of an export: what it is, how to load it, and what was lost on the way."""

from collections.abc import Sequence

from moe_lora_interop.config.adapter_config import MoeLoraConfig
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
    base = config.base_model_name_or_path or "unknown"
    lines = "\n".join(f"- {note}" for note in notes)
    code = _MODEL_CODE if is_model else _LORA_CODE
    library = "transformers" if is_model else "peft"
    return (
        f"---\nlibrary_name: {library}\nbase_model: {base}\n---\n\n# {title}\n\n{what}\n\nBase model: `{base}`.\n\n"
        f"{code}\n\n## What it is not\n\nExported by moe-lora from a mixture of {config.num_experts} LoRA "
        f"experts whose routing rule is: {routing_in_words(config)} (scope {config.scope}).\n\n{lines}\n"
    )
