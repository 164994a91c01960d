"""Ordinary PEFT LoRA directories, which are adapters with one expert: what exports write and `combine` reads."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import mode
from typing import NamedTuple

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.read_write import read, write
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.dialects.lora import PLAIN_LORA
from moe_lora_interop.disk import files
from moe_lora_interop.disk.atomic import write_text
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.codecs import pattern_for


class Factors(NamedTuple):
    """One module's delta (alpha / r) B A, or (alpha / sqrt(r)) B A with use_rslora. a: [rank, in]; b: [out, rank]."""

    a: np.ndarray
    b: np.ndarray
    alpha: float


def plain_lora(factors: Mapping[str, Factors], like: MoeLoraConfig, *, use_rslora: bool = False) -> Adapter:
    """The adapter with one expert that has these factors; r and lora_alpha become patterns where modules differ.

    Args:
        factors: {module: factors}; at least one.
        like: where base model, task type and dropout come from.
        use_rslora: what alpha means. PEFT advises against it together with patterns, so it is then folded into alpha.
    """
    ranks = {module: f.a.shape[0] for module, f in factors.items()}
    alphas: dict[str, float] = {module: f.alpha for module, f in factors.items()}
    if use_rslora and (_varies(ranks.values()) or _varies(alphas.values())):
        alphas = {module: alpha * ranks[module] ** 0.5 for module, alpha in alphas.items()}
        use_rslora = False
    r, alpha = mode(ranks.values()), mode(alphas.values())
    config = MoeLoraConfig(
        num_experts=1,
        r=r,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        rank_pattern=pattern_for(ranks, r),
        alpha_pattern=pattern_for(alphas, alpha),
        lora_dropout=like.lora_dropout,
        target_modules=sorted(factors),
        base_model_name_or_path=like.base_model_name_or_path,
        task_type=like.task_type,
    )
    tensors = {}
    for module, (a, b, _) in factors.items():
        tensors[module, "lora_A"], tensors[module, "lora_B"] = a[None], b[None]
    return Adapter(config, tensors)


def read_plain_lora(directory: str | os.PathLike[str]) -> Adapter:
    """Reads an ordinary LoRA directory as an adapter with one expert.

    Raises:
        CheckpointError, ConfigError: it is none, or has something that plain A and B do not express (DoRA, biases,
            modules_to_save, ...); each such field is named.
    """
    config = files.existing_directory(directory) / files.CONFIG_NAME
    if config.exists() and (found := files.read_json(config).get("peft_type")) != "LORA":
        raise CheckpointError("not an ordinary LoRA", [f"{config}: peft_type: found {found!r}, expected 'LORA'"])
    return read(directory, PLAIN_LORA.name)


def write_plain_lora(adapter: Adapter, directory: Path, readme: str) -> None:
    """Writes an adapter with one expert as an ordinary LoRA directory, with a README.md."""
    write(adapter, directory, PLAIN_LORA.name)
    write_text(directory / "README.md", readme)


def _varies(values: Collection[float]) -> bool:
    return len(set(values)) > 1
