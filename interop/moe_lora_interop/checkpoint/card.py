"""The README.md that a save puts next to an adapter: what it is, how to load it, what it computes."""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moe_lora_interop.config.adapter_config import FORMAT_VERSION, MoeLoraConfig
from moe_lora_interop.config.base_name import hub_name
from moe_lora_interop.config.in_words import routing_in_words

CARD_NAME = "README.md"
PLACEHOLDER = "# Model Card for Model ID"
_TAGS = "tags: [moe-lora, mixture-of-experts, lora]"

_TEMPLATE = """---
{metadata}
---

# Mixture-of-LoRA-experts adapter

Base model: `{base}`. Format: moe-lora native, version {version}. {experts} experts of rank {r} on {count} modules.

## Load

PyTorch (the import registers the `MOE_LORA` method with PEFT; without it PEFT raises `KeyError: 'MOE_LORA'`):

```python
import moe_lora_interop.peft_tuner
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/directory")
```

JAX:

```python
import moe_lora_jax as mlj

model = mlj.load_base_model("path/to/base")
mlj.load_adapter(model, "path/to/this/directory")
```

## What it computes

On each target module: y = W0 x + sum_e g_e(x) s_e B_e A_e x, with s_e = {scaling}.
Routing: {routing}.

## Tensors

| name | dtype | shape |
|---|---|---|
{rows}

Written with {versions}.
"""


def describe(directory: Path, config: MoeLoraConfig, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Writes the card, unless somebody has written a README.md there; PEFT's placeholder is nobody's."""
    path = directory / CARD_NAME
    found = path.read_text("utf-8", errors="replace") if path.exists() else ""
    if not found or PLACEHOLDER in found:
        metadata = re.match(r"---\n(.*?)\n---", found, re.DOTALL)  # PEFT has filled these in already
        text = model_card(config, tensors, metadata[1] if metadata else None)
        path.write_text(text, "utf-8", errors="replace")


def model_card(
    config: MoeLoraConfig, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: str | None = None
) -> str:
    """Markdown of the card.

    Args:
        tensors: {stored name: (dtype, shape)}.
        metadata: YAML for the card's head; None: the library, the tags, and the base model if it is known. A base
            model is named there by its id on the Hugging Face Hub, which refuses a card with a path, or not at all.
    """
    base = config.base_model_name_or_path or "unknown"
    known = hub_name(base) if config.base_model_name_or_path else None
    if metadata is None:
        metadata = "\n".join(["library_name: peft", f"base_model: {json.dumps(base)}", _TAGS])
    if known is None or base not in metadata:
        metadata = "\n".join(line for line in metadata.splitlines() if "base_model" not in line)
    else:
        metadata = metadata.replace(base, known.id)
    rows = "\n".join(f"| `{name}` | {dtype} | {list(shape)} |" for name, (dtype, shape) in sorted(tensors.items()))
    root = "sqrt(r)" if config.use_rslora else "r"
    return _TEMPLATE.format(
        metadata=metadata,
        base=base if known is None else known.id,
        version=FORMAT_VERSION,
        experts=config.num_experts,
        r=config.r,
        count=len(config.target_modules or ()),
        scaling=f"lora_alpha / {root}, lora_alpha = {config.lora_alpha}, r = {config.r}",
        routing=routing_in_words(config),
        rows=rows,
        versions=", ".join(f"{name} {found}" for name, found in _versions()),
    )


def _versions() -> Iterator[tuple[str, str]]:
    """The versions of the libraries that a save may involve, of those that are installed."""
    for name in ("moe-lora-jax", "safetensors", "jax", "flax", "torch", "peft", "transformers"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
