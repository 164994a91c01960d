"""The README.md that a save puts next to an adapter: what it is, how to load it, what it computes."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moe_lora_interop.config.adapter_config import FORMAT_VERSION, MoeLoraConfig
from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_interop.disk.files import read_json
from moe_lora_interop.errors import CheckpointError

CARD_NAME = "README.md"
PLACEHOLDER = "# Model Card for Model ID"

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
{ends}
## What it computes

On each target module: y = W0 x + sum_e g_e(x) s_e B_e A_e x, with s_e = {scaling}.
Routing: {routing}.

## Tensors

| name | dtype | shape |
|---|---|---|
{rows}

Written with {versions}.
"""

_ENDS = """
A text ends at the token ids {ids} (`generation_config.json`), not only where the base model's do. PEFT and servers do
not read that file from an adapter by themselves: `model.generate(..., eos_token_id={ids})`, `vllm serve ...
--generation-config path/to/this/directory`.
"""
GENERATION_CONFIG = "generation_config.json"


def describe(directory: Path, config: MoeLoraConfig, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Writes the card, unless somebody has written a README.md there; PEFT's placeholder is nobody's."""
    path = directory / CARD_NAME
    found = path.read_text("utf-8", errors="replace") if path.exists() else ""
    if not found or PLACEHOLDER in found:
        metadata = re.match(r"---\n(.*?)\n---", found, re.DOTALL)  # PEFT has filled these in already
        text = model_card(config, tensors, metadata[1] if metadata else None, end_ids=end_ids_beside(directory))
        path.write_text(text, "utf-8", errors="replace")


def model_card(
    config: MoeLoraConfig,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: str | None = None,
    *,
    end_ids: Sequence[int] = (),
) -> str:
    """Markdown of the card.

    Args:
        tensors: {stored name: (dtype, shape)}.
        metadata: YAML for the card's head; None: the library, the tags, and the base model if it is known.
        end_ids: token ids that end a text, where they are others than those of the base model.
    """
    if metadata is None:
        base = [f"base_model: {json.dumps(config.base_model_name_or_path)}"] if config.base_model_name_or_path else []
        metadata = "\n".join(["library_name: peft", *base, "tags: [moe-lora, mixture-of-experts, lora]"])
    rows = "\n".join(f"| `{name}` | {dtype} | {list(shape)} |" for name, (dtype, shape) in sorted(tensors.items()))
    root = "sqrt(r)" if config.use_rslora else "r"
    return _TEMPLATE.format(
        metadata=metadata,
        base=config.base_model_name_or_path or "unknown",
        version=FORMAT_VERSION,
        experts=config.num_experts,
        r=config.r,
        count=len(config.target_modules or ()),
        scaling=f"lora_alpha / {root}, lora_alpha = {config.lora_alpha}, r = {config.r}",
        routing=routing_in_words(config),
        rows=rows,
        ends=_ENDS.format(ids=list(end_ids)) if end_ids else "",
        versions=", ".join(f"{name} {found}" for name, found in _versions()),
    )


def end_ids_beside(directory: Path) -> list[int]:
    """The token ids in generation_config.json beside an adapter, at which its texts end; none without that file."""
    path = directory / GENERATION_CONFIG
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int or i < 0 for i in ids):
        raise CheckpointError(f"{path}: eos_token_id: found {found!r}, expected a token id or a list of them")
    return ids


def _versions() -> Iterator[tuple[str, str]]:
    """The versions of the libraries that a save may involve, of those that are installed."""
    for name in ("moe-lora-jax", "safetensors", "jax", "flax", "torch", "peft", "transformers"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
