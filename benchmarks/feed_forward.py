"""Goal 3: a training step with experts that are whole feed-forward blocks, against MixLoRA's own package.

The package is `mixlora` 0.2.3 of PyPI (`make bench-peers` installs it beside the project). All candidates load the same
model and the same adapter, and their losses must agree before anything is timed.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import peft
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_lora_interop
import moe_lora_interop.peft_tuner
import moe_lora_jax as mlj
from benchmarks import llama
from benchmarks.measure import Row, interleaved
from benchmarks.table import alone, ratio_row

PEERS = Path(__file__).parents[1] / "build" / "bench-peers"
EXPERTS, RANK, TOP_K = 8, 8, 2
TARGETS = ["gate_proj", "up_proj", "down_proj"]

Step = Callable[[], float]


def save_adapter(base: Path, directory: Path) -> None:
    """Writes one random MixLoRA adapter in two layouts: `native` and `mixlora`."""
    sizes = {"r": RANK, "lora_alpha": 2 * RANK, "num_experts": EXPERTS, "top_k": TOP_K}
    config = mlj.MoeLoraConfig(
        **sizes, scope="ffn", target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = mlj.apply_moe_lora(mlj.load_base_model(base), config, rngs=nnx.Rngs(0))
    adapter = mlj.to_adapter(model)
    moe_lora_interop.write(adapter, directory / "native")
    moe_lora_interop.write(adapter, directory / "mixlora", "mixlora")


def torch_step(model: torch.nn.Module, parameters: list[torch.Tensor], ids: np.ndarray) -> Step:
    """Loss, gradient, AdamW in eager PyTorch."""
    optimizer = torch.optim.AdamW(parameters, lr=llama.LEARNING_RATE, weight_decay=0.0)
    tokens = torch.from_numpy(ids).long()

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def base_model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)


def tuner_step(base: Path, adapter: Path, ids: np.ndarray) -> Step:
    model = peft.PeftModel.from_pretrained(base_model(base), str(adapter), is_trainable=True)
    return torch_step(model, [p for p in model.parameters() if p.requires_grad], ids)


def lora_step(base: Path, ids: np.ndarray) -> Step:
    """PEFT's own LoRA of the same number of parameters, but for the routers."""
    config = peft.LoraConfig(r=EXPERTS * RANK, lora_alpha=2 * EXPERTS * RANK, target_modules=TARGETS)
    model = peft.get_peft_model(base_model(base), config)
    return torch_step(model, [p for p in model.parameters() if p.requires_grad], ids)


def mixlora_step(base: Path, adapter: Path, ids: np.ndarray) -> Step:
    """The package's modules. It is made for inference, so what trains is chosen here: experts and routers."""
    sys.path.insert(0, str(PEERS))
    try:
        import mixlora
    finally:
        sys.path.remove(str(PEERS))
    config, weights = mixlora.load_adapter_weights(str(adapter), device="cpu")
    model = base_model(base)
    config.act_fn_ = model.config.hidden_act  # meant to be optional, but it fails without
    config.lora_dropout_ = 0.1  # it insists on a number above 0; the experts are put in evaluation mode below
    mixlora.inject_adapter_in_model(model, config, weights)
    moes = [layer.mlp.mixlora_moes["default"] for layer in model.model.layers]
    experts = torch.nn.ModuleList(e.eval() for moe in moes for e in moe.experts_.values())
    trained = [p for e in experts for p in (e.lora_A.weight, e.lora_B.weight)]
    return torch_step(model, [*trained, *(moe.gate_.requires_grad_() for moe in moes)], ids)


def rows(quick: bool) -> Iterator[Row]:
    batch, length = (2, 16) if quick else (8, 128)
    goal = "3. FFN scope, training step <= 0.6x of the mixlora package"
    ids = np.random.default_rng(0).integers(0, (llama.QUICK if quick else llama.FULL)["vocab_size"], (batch, length))
    with tempfile.TemporaryDirectory() as scratch:
        base = llama.save(Path(scratch) / "base", quick=quick)
        save_adapter(base, Path(scratch))
        steps = {
            "jax": llama.training_step(mlj.load_adapter(mlj.load_base_model(base), Path(scratch) / "native"), ids),
            "tuner": tuner_step(base, Path(scratch) / "native", ids),
        }
        if (PEERS / "mixlora").is_dir():
            steps["mixlora"] = mixlora_step(base, Path(scratch) / "mixlora", ids)
        losses = {name: step() for name, step in steps.items()}
        np.testing.assert_allclose(list(losses.values()), losses["jax"], rtol=1e-4, err_msg=str(losses))
        if "mixlora" not in steps:
            yield Row(goal, "not measured", "", None, "the package is not installed: make bench-peers")
            return
        plain = mlj.MoeLoraConfig(r=EXPERTS * RANK, num_experts=1, target_modules=TARGETS)
        in_jax = mlj.apply_moe_lora(mlj.load_base_model(base), plain, rngs=nnx.Rngs(0))
        steps |= {"jax lora": llama.training_step(in_jax, ids), "lora": lora_step(base, ids)}
        found = interleaved(steps, "mixlora", rounds=3 if quick else 12)
    sizes = f"{batch * length} tokens, E {EXPERTS}, r {RANK}, top {TOP_K}, fp32"
    candidates = {
        "jax": "JAX",
        "tuner": "PEFT tuner",
        "jax lora": "for comparison: plain LoRA of rank E*r in JAX",
        "lora": "for comparison: PEFT's LoRA of rank E*r",
    }
    for name, who in candidates.items():
        ratio, package = found[name], found["mixlora"]
        note = f"{who}, {ratio.seconds * 1e3:.0f} ms; the package {package.seconds * 1e3:.0f} ms; {sizes}"
        yield ratio_row(goal, ratio, ratio.median <= 0.6 if name == "jax" else None, note)


if __name__ == "__main__":
    alone(rows)
