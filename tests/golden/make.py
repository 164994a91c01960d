"""Writes the goldens: directories as format version 1 and every other layout write them, and what they compute.

    python -m tests.golden.make [NAME ...]

A golden that exists is never written again: users have such files, and every later release must read them. What is
computed comes from `tests.numpy_mixture` in float64, on the adapter in memory before it is written.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy learns bfloat16
import numpy as np
from safetensors.numpy import load_file, save_file

import moe_lora_interop
from moe_lora_interop import MoeLoraConfig
from moe_lora_interop.checkpoint.implied_tensors import expected_tensors
from moe_lora_interop.config.modules import block_of
from moe_lora_interop.dialects.registry import dialect_named
from moe_lora_interop.rules.configs import options_of
from moe_lora_interop.rules.tensors import axes_of
from tests.golden.variants import IDS, LLAMA, NATIVE, TASK_IDS
from tests.numpy_mixture import NumpyMixture
from tools.samples import SAMPLES, with_shared_temperatures

ROOT = Path(__file__).parent
BASE = ROOT / "base"


def main(names: list[str]) -> None:
    if not BASE.exists():
        write_base()
    for name, fields in NATIVE.items():
        if not names or name in names:
            write(ROOT / "native" / name, "native", native_config(**fields), fields.get("dtypes", ("float32",) * 2))
    for layout in sorted(SAMPLES.keys() - {"native"}):
        if not names or layout in names:
            write(ROOT / "layouts" / layout, layout, layout_config(layout), ("float32",) * 2)


def native_config(dtypes: Any = None, **fields: Any) -> MoeLoraConfig:
    defaults = {"r": 2, "lora_alpha": 3, "num_experts": 3, "target_modules": ["q_proj", "down_proj"]}
    return MoeLoraConfig(**{**defaults, **fields})


def layout_config(layout: str) -> MoeLoraConfig:
    preset, fields, kinds = SAMPLES[layout]
    values = {"r": 2, "num_experts": 4, "lora_alpha": 4, **fields, "target_modules": list(kinds[:3])}
    return MoeLoraConfig.preset(preset, **values) if preset else MoeLoraConfig(**values)


def write(directory: Path, layout: str, config: MoeLoraConfig, dtypes: tuple[str, str]) -> None:
    if directory.exists():
        print(f"{directory.name}: exists, and is never written again")
        return
    weights = load_file(BASE / "model.safetensors")
    for seed in range(1000):
        adapter = random_adapter(config, weights, dtypes, seed)
        if layout == "ld-mole":
            adapter = with_shared_temperatures(adapter)
        truth = Recorder(weights, LLAMA, adapter)
        tasks = TASK_IDS if config.router_input == "task" else None
        logits = truth.logits(IDS, tasks)
        if truth.margin > 3e-3:  # no selection hangs on the last bits of float32
            break
    else:
        raise RuntimeError(f"{directory}: no seed with a clear selection")
    stored = directory / "adapter"
    store(adapter, stored, layout, directory.name)
    description = {
        "layout": layout,
        "options": options_of(dialect_named(layout), adapter.config, adapter.modules),
        "written_by": {"minimal": "hand", "peft": "PEFT"}.get(directory.name, "interop"),
        "stored": manifest(stored),
        "config": MoeLoraConfig.to_dict(adapter.config),
        "tensors": {f"{m}:{role}": summary(t) for (m, role), t in sorted(adapter.tensors.items())},
    }
    (directory / "golden.json").write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8")
    arrays = {"ids": IDS, "logits": logits, "gates": np.concatenate([np.zeros(0), *truth.gates])}
    np.savez(directory / "outputs.npz", **arrays, **({} if tasks is None else {"task_ids": tasks}))


def store(adapter: moe_lora_interop.Adapter, directory: Path, layout: str, name: str) -> None:
    moe_lora_interop.write(adapter, directory, layout)
    (directory / "README.md").unlink(missing_ok=True)  # a model card is for people; its text may change
    config = directory / "adapter_config.json"
    if name == "minimal":  # as in FORMAT.md: only what is not the default, and no digest
        fields = {n: v for n, v in NATIVE["minimal"].items()}
        fields |= {"peft_type": "MOE_LORA", "format_version": 1, "target_modules": adapter.config.target_modules}
        config.write_text(json.dumps(fields), "utf-8")
        weights = directory / "adapter_model.safetensors"
        save_file(load_file(weights), weights, metadata={"format": "pt"})
    if name == "peft":
        import peft
        import transformers

        from moe_lora_interop import peft_tuner  # noqa: F401  registers

        model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
        model = peft.PeftModel.from_pretrained(model, directory)
        model.save_pretrained(directory)
        (directory / "README.md").unlink()


class Recorder(NumpyMixture):
    """Keeps the gates too, in the order in which they are computed."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.gates: list[np.ndarray] = []

    def _gates(self, *args: Any) -> np.ndarray:
        self.gates.append(super()._gates(*args))
        return self.gates[-1]


def random_adapter(
    config: MoeLoraConfig, weights: dict[str, np.ndarray], dtypes: tuple[str, str], seed: int
) -> moe_lora_interop.Adapter:
    """Random tensors for every slot that the config implies on the base; zero beyond each expert's own rank."""
    rng, tensors = np.random.default_rng(seed), {}
    shapes = {name.removesuffix(".weight"): w.shape for name, w in weights.items() if "_proj" in name}
    block_in = {block_of(m): size for m, (_, size) in shapes.items() if m.endswith("gate_proj")}
    modules = config.targets.select(sorted(shapes))
    for (module, role), known in expected_tensors(config, modules).items():
        out, size_in = shapes.get(module, (None, block_in.get(module, LLAMA["hidden_size"])))
        sizes = {"in": size_in, "out": out, "one": 1, "dim": 4, "unit": 6} | known
        tensor = rng.normal(size=[sizes[axis] for axis in axes_of(role).split()]) * 0.7
        for expert, rank in enumerate(config.for_module(module).ranks if role == "lora_B" else ()):
            tensor[expert, :, rank:] = 0
        for expert, rank in enumerate(config.for_module(module).ranks if role == "lora_A" else ()):
            tensor[min(expert, len(tensor) - 1), rank:] = 0
        tensors[module, role] = tensor.astype(dtypes[not role.startswith("lora")])
    return moe_lora_interop.Adapter(config, tensors)


def manifest(directory: Path) -> dict[str, Any]:
    """{file: {key: dtype and shape}} as the libraries that own the formats read it."""
    return {
        path.relative_to(directory).as_posix(): {name: kind(t) for name, t in sorted(raw(path).items())}
        for path in sorted(directory.rglob("*"))
        if path.suffix in (".safetensors", ".bin", ".npz")
    }


def raw(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path) as archive:
            return dict(archive)
    import torch

    return {name: t.numpy() for name, t in torch.load(path, weights_only=True).items()}


def kind(tensor: np.ndarray) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def summary(tensor: np.ndarray) -> str:
    """dtype, shape, and SHA-256 of the bytes in C order"""
    return f"{kind(tensor)} {hashlib.sha256(tensor.tobytes()).hexdigest()}"


def write_base() -> None:
    rng, hidden, inner = np.random.default_rng(0), LLAMA["hidden_size"], LLAMA["intermediate_size"]
    shapes = {"model.embed_tokens": (16, hidden), "lm_head": (16, hidden), "model.norm": (hidden,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm": (hidden,), f"{at}.post_attention_layernorm": (hidden,)}
        shapes |= {f"{at}.self_attn.{n}_proj": (hidden if n in "qo" else hidden // 2, hidden) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj": (inner, hidden) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj"] = (hidden, inner)
    tensors = {
        f"{name}.weight": ((rng.normal(size=shape) * 0.4) + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    BASE.mkdir()
    (BASE / "config.json").write_text(json.dumps(LLAMA, indent=2) + "\n", "utf-8")
    save_file(tensors, BASE / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1:])
