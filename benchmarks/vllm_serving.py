"""Goal 9: a mixture in vLLM, against a plain LoRA of rank E*r in the same engine and a PEFT model behind a loop.

    python -m benchmarks.vllm_serving            # in the environment of `make vllm`; --quick: tiny, judges nothing

Both adapters are in one engine, whose --max-lora-rank pads each of them to 64 columns: E*r = 56, and 8 of the router.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# one process with one thread, as vLLM reads them when it is imported: threads that wait for each other would measure
# what else the machine does
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

from benchmarks import llama  # noqa: E402
from benchmarks.measure import Row, interleaved  # noqa: E402
from benchmarks.table import alone, ratio_row  # noqa: E402
from moe_lora_interop.peft_tuner import MoeLoraConfig  # noqa: E402

EXPERTS, RANK, TOP_K, MAX_RANK = 8, 7, 2, 64
NEW = 16
COMMON: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
CONFIGS = {
    "mixture": MoeLoraConfig(r=RANK, num_experts=EXPERTS, top_k=TOP_K, **COMMON),
    "lora": peft.LoraConfig(r=EXPERTS * RANK, **COMMON),
}


def base_model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def adapters(base: Path, directory: Path) -> dict[str, Path]:
    """{name: directory} of two random adapters of as many columns."""
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        peft.get_peft_model(base_model(base), config).save_pretrained(directory / name)
    return {name: directory / name for name in CONFIGS}


def asking(engine: LLM, adapter: LoRARequest | None, prompts: Sequence[list[int]], new: int) -> Callable[[], Any]:
    """All prompts at once; greedy, exactly `new` tokens each."""
    parameters = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return lambda: engine.generate(given, parameters, lora_request=adapter, use_tqdm=False)


def in_peft(model: Any, prompts: Sequence[list[int]], new: int) -> Callable[[], Any]:
    """What a loop around a PEFT model does: one request after the other."""

    @torch.inference_mode()
    def run() -> list[list[int]]:
        fields = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        return [model.generate(torch.tensor([p]), **fields)[0, len(p) :].tolist() for p in prompts]

    return run


def rows(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as directory:
        base = llama.save(Path(directory) / "base", quick=quick, head_dim=32 if quick else 64)
        made = adapters(base, Path(directory))
        engine = LLM(
            str(base),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=256,
            max_num_batched_tokens=4096,
            max_num_seqs=32,
            enable_prefix_caching=False,
            enable_lora=True,
            max_loras=2,
            max_lora_rank=MAX_RANK,
        )
        requests = {n: LoRARequest(n, i, str(path)) for i, (n, path) in enumerate(made.items(), start=1)}
        model = peft.PeftModel.from_pretrained(base_model(base), made["mixture"]).eval()
        rng, vocabulary = np.random.default_rng(0), llama.QUICK["vocab_size"]
        for batch in (1, 32):
            for kind, length, new in (("prefill", 128, 1), ("decode", 8, NEW)):
                prompts = rng.integers(3, vocabulary, (batch, length)).tolist()
                asked = {n: asking(engine, r, prompts, new) for n, r in [*requests.items(), ("base", None)]}
                of_vllm = [list(out.outputs[0].token_ids) for out in asked["mixture"]()]
                loop = in_peft(model, prompts, new)
                equal = sum(a == b for a, b in zip(of_vllm, loop(), strict=True))
                found = interleaved(asked, "lora", rounds=2 if quick else 12)
                alternative = interleaved({"mixture": asked["mixture"], "loop": loop}, "mixture", rounds=2)["loop"]
                ms = {n: f"{n} {found[n].seconds * 1e3:.0f} ms" for n in ("base", "lora", "mixture")}
                shape = f"{batch} x {length} tokens and {new} new; {', '.join(ms.values())}"
                cost, of = found["mixture"], f"{kind}, batch {batch}"
                yield ratio_row(f"9. vLLM, {of}: mixture <= 1.05x of LoRA(E*r)", cost, cost.median <= 1.05, shape)
                note = f"{alternative.seconds * 1e3:.0f} ms; {equal} of {batch} answers have equal tokens"
                yield ratio_row(f"9. vLLM, {of}: a PEFT model behind a loop, times as long", alternative, None, note)


if __name__ == "__main__":
    alone(rows)
