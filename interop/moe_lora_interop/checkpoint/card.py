"""The README.md that a save puts next to an adapter: what it is, how to load it, what it computes."""

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moe_lora_interop.checkpoint.run_records import training_in_words
from moe_lora_interop.checkpoint.servable import vllm_needs
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.base_name import HubName, hub_name
from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_interop.dialects.native import NATIVE
from moe_lora_interop.disk.atomic import will_remain
from moe_lora_interop.disk.dtypes import bits
from moe_lora_interop.disk.files import TensorInfo, read_json
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.codecs import collapsed
from moe_lora_interop.rules.tensors import claim

CARD_NAME = "README.md"
PLACEHOLDER = "# Model Card for Model ID"
# An entry or a tag that names the base model, also in quotes or over several lines.
_OF_BASE = re.compile(r"""^(?P<tag> *- )?['"]?base_model:.*(?:\n +(?![ ]|- ).*)*""", re.MULTILINE)
_TAGS = "tags: [moe-lora, mixture-of-experts, lora]"

_TEMPLATE = """---
{metadata}
---

# Mixture-of-LoRA-experts adapter

Base model: `{base}`. Format: moe-lora native, version {version}. {experts} experts of rank {r}.

## Load
{needs}
PyTorch:

```bash
pip install "moe-lora-jax[torch]"
```

```python
import moe_lora_interop.peft_tuner  # registers MOE_LORA with PEFT, which otherwise raises KeyError: 'MOE_LORA'
from peft import PeftModel
from transformers import AutoModelForCausalLM

base_model = AutoModelForCausalLM.from_pretrained("{base_id}")
model = PeftModel.from_pretrained(base_model, "{place}")
```

JAX:

```bash
pip install "moe-lora-jax[train]"
```

```python
import moe_lora_jax as mlj
{download}
model = mlj.load_base_model({base_folder})
mlj.load_adapter(model, {adapter_folder})
```
{ends}
## Serve

{serving}
Servers of ordinary LoRA do not know routers. `moe-lora export` writes what they take: `--as lora` one LoRA with fixed
gates, an approximation whose cost `moe-lora measure` says; `--as lora-experts` each expert by itself; `--as mixtral`,
for a feed-forward mixture on a Llama or Mistral, a whole model that keeps the router.

## What it computes

On each target module: y = W0 x + sum_e g_e(x) s_e B_e A_e x, with s_e = {scaling}.
Routing: {routing}.

{training}{contents}Written with {versions}.
"""

_ENDS = """
A text ends at the token ids {ids} (`generation_config.json`), not only where the base model's do. PEFT and servers do
not read that file from an adapter by themselves: `model.generate(..., eos_token_id={ids})`, `vllm serve ...
--generation-config path/to/this/directory`.
"""
_IN_VLLM = """With the plugin that comes with moe-lora-jax, vLLM serves it beside other adapters and the base model:

```bash
pip install "moe-lora-jax[vllm]"  # beside the vllm of your machine
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules mine=path/to/this/directory
```
"""
_NOT_IN_VLLM = """vLLM cannot serve it:

{problems}
"""
_ASK = "`moe-lora inspect` says what vLLM needs to serve it, or why it cannot.\n"
_NEEDS = """
The routing `{name}` (version {version}) is no part of moe-lora: first install the package that registers it, or import
its module, `{module}`.
"""
_HERE = "path/to/this/directory"
_SEAL = re.compile(r"<!-- card ([0-9a-f]{8}): [^\n]* -->\s*\Z")
GENERATION_CONFIG = "generation_config.json"


_TRAINING = """## Training

{words}

"""
_CONTENTS = """## Tensors

{tensors} tensors, {parameters:,} parameters, {bytes:,} bytes ({dtypes}).

| modules | number | experts | in | out | r |
|---|---|---|---|---|---|
{rows}

"""


def new_card(
    directory: Path, config: MoeLoraConfig, tensors: Mapping[str, TensorInfo], *, repo_id: str | None = None
) -> str | None:
    """The card to write into a directory; None where somebody has written a README.md, or changed ours.

    PEFT's placeholder is nobody's. A card of ours ends with a checksum, which says that nobody has changed it.
    """
    path = directory / CARD_NAME
    found = path.read_text("utf-8", errors="replace") if will_remain(directory, CARD_NAME) else ""
    if found and PLACEHOLDER not in found and not _is_untouched(found):
        return None
    by_peft = re.match(r"---\n(.*?)\n---", found, re.DOTALL) if PLACEHOLDER in found else None
    return model_card(
        config,
        tensors,
        by_peft[1] if by_peft else None,  # PEFT has filled the head in already
        end_ids=end_ids_beside(directory),
        training=training_in_words(directory),
        repo_id=repo_id,
    )


def _is_untouched(card: str) -> bool:
    found = _SEAL.search(card)
    return found is not None and found[1] == _sum(card[: found.start()])


def _sum(text: str) -> str:
    return f"{zlib.crc32(text.encode(errors='replace')):08x}"


def model_card(
    config: MoeLoraConfig,
    tensors: Mapping[str, TensorInfo],
    metadata: str | None = None,
    *,
    end_ids: Sequence[int] = (),
    training: str = "",
    repo_id: str | None = None,
) -> str:
    """Markdown of the card.

    Args:
        tensors: {stored name: dtype and shape}.
        metadata: YAML for the card's head; None: the library, the tags, and the base model if it is known. A base
            model is named there by its id on the Hugging Face Hub, which refuses a card with a path, or not at all.
        end_ids: token ids that end a text, where they are others than those of the base model.
        training: how it was trained, in words.
        repo_id: where it is on the Hugging Face Hub; None: in some directory.
    """
    base = config.base_model_name_or_path or "unknown"
    known = hub_name(base) if config.base_model_name_or_path else None
    if metadata is None:
        metadata = f"library_name: peft\nbase_model: unknown\n{_TAGS}"
    root = "sqrt(r)" if config.use_rslora else "r"
    downloads = known is not None or repo_id is not None
    base_id = "path/or/name/of/the/base" if known is None else known.id
    text = _TEMPLATE.format(
        metadata=_naming(metadata, known),
        base=base if known is None else known.id,
        base_id=base_id,
        place=repo_id or _HERE,
        download="from huggingface_hub import snapshot_download\n" if downloads else "",
        base_folder='"path/to/base"' if known is None else f'snapshot_download("{known.id}")',
        adapter_folder=f'"{_HERE}"' if repo_id is None else f'snapshot_download("{repo_id}")',
        version=config.format_version,
        experts=config.num_experts,
        r=config.r,
        scaling=f"lora_alpha / {root}, lora_alpha = {config.lora_alpha}, r = {config.r}",
        routing=routing_in_words(config),
        serving=_serving(config, tensors, base_id),
        training=_TRAINING.format(words=training) if training else "",
        contents=_contents(config, tensors) if tensors else "",
        needs=_needs(config),
        ends=_ENDS.format(ids=list(end_ids)) if end_ids else "",
        versions=", ".join(f"{name} {found}" for name, found in _versions()),
    )
    return f"{text}\n<!-- card {_sum(text + chr(10))}: without this line no save replaces it -->\n"


def _needs(config: MoeLoraConfig) -> str:
    """What loading takes beside this package."""
    return (
        "" if config.routing is None else _NEEDS.format(module=type(config.routing_rule).__module__, **config.routing)
    )


def _naming(metadata: str, known: HubName | None) -> str:
    """The YAML with the base model's name on the Hub wherever it names the base, or without these entries."""

    def entry(found: re.Match[str]) -> str:
        if known is None:
            return ""
        tag = found["tag"]
        return f"{tag}base_model:adapter:{known.id}" if tag else f"base_model: {json.dumps(known.id)}"

    return "\n".join(filter(None, _OF_BASE.sub(entry, metadata).splitlines()))


def _serving(config: MoeLoraConfig, tensors: Mapping[str, TensorInfo], base: str) -> str:
    """What `moe-lora inspect` says of vLLM, too."""
    if not tensors:
        return _ASK
    needs = vllm_needs(NATIVE.name, config, sorted(_features(tensors)))
    if needs.max_lora_rank is None:
        return _NOT_IN_VLLM.format(problems="\n".join(f"- {problem}" for problem in needs.problems))
    return _IN_VLLM.format(base=base, rank=needs.max_lora_rank)


def _contents(config: MoeLoraConfig, tensors: Mapping[str, TensorInfo]) -> str:
    """How many tensors there are, and a row per kind of module, layer numbers left out."""
    kinds = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", module), sizes.num_experts, *features, str(collapsed(sizes.ranks)))
        for module, features in _features(tensors).items()
        for sizes in [config.for_module(module)]
    )
    rows = (
        f"| `{kind}` | {number} | {experts} | {n_in} | {n_out} | {r} |"
        for (kind, experts, n_in, n_out, r), number in sorted(kinds.items(), key=str)
    )
    counts = [(math.prod(info.shape), bits(info.dtype)) for info in tensors.values()]
    return _CONTENTS.format(
        tensors=len(tensors),
        parameters=sum(count for count, _ in counts),
        bytes=sum(count * width // 8 for count, width in counts),
        dtypes=", ".join(sorted({info.dtype for info in tensors.values()})),
        rows="\n".join(rows),
    )


def _features(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """{module: (in, out)} of stored tensors."""
    sizes: dict[str, dict[str, int]] = {}
    for name, info in tensors.items():
        rule = claim(NATIVE.rules, name, len(info.shape))
        if rule is not None and rule.role in ("lora_A", "lora_B") and (bound := rule.stored.bind(name)) is not None:
            sizes.setdefault(bound["module"], {}).update(zip(rule.stored.atoms, info.shape, strict=True))
    return {module: (found["in"], found["out"]) for module, found in sizes.items()}


def end_ids_beside(directory: Path) -> list[int]:
    """The token ids in generation_config.json beside an adapter, at which its texts end; none without that file. -1 is
    none.
    """
    path = directory / GENERATION_CONFIG
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int or i < -1 for i in ids):
        raise CheckpointError(f"{path}: eos_token_id: found {found!r}, expected a token id or a list of them")
    return [i for i in ids if i != -1]


def _versions() -> Iterator[tuple[str, str]]:
    """The versions of the libraries that a save may involve, of those that are installed."""
    for name in ("moe-lora-jax", "safetensors", "jax", "flax", "torch", "peft", "transformers"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
