"""`moe-lora quickstart`: the whole way at once: a base model, a mixture trained on it, and the same logits in PEFT."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from rich.table import Table

from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.disk.hub import model_directory
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_jax import demo
from moe_lora_jax.adapters.apply import apply_moe_lora
from moe_lora_jax.cli.log_lines import LogLines
from moe_lora_jax.demo.base_and_data import make_base_and_data
from moe_lora_jax.measure.router_statistics import router_statistics, topic_information
from moe_lora_jax.measure.samples import answers, prompts_of
from moe_lora_jax.models import CausalLM, load_base_model
from moe_lora_jax.train.batches import eval_batches
from moe_lora_jax.train.data import Example, TokenData, read_data, split_by, split_data
from moe_lora_jax.train.loop import train
from moe_lora_jax.train.settings import TrainSettings
from moe_lora_jax.train.tokenizer import load_tokenizer, pad_id

MARKER = ".made_by_quickstart"
BATCH_SIZE = 16  # the help of `steps` says it


def quickstart(
    output_dir: Path = Path("quickstart_output"),
    *,
    model: Path | None = None,
    data: Path | None = None,
    num_experts: int = 4,
    top_k: int = 2,
    steps: int = 120,
    learning_rate: float = 5e-3,
    max_length: int = 256,
    seed: int = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small mixture, show what its experts do, and load it in PyTorch PEFT.

    Offline and on a CPU, in under three minutes: the base model is a small Llama that is made on the spot. With --model
    and --data the same happens on a real model and your own text.

    Args:
        output_dir: gets the folders base, data and adapter.
        model: Hugging Face model directory, instead of the small one.
        data: JSONL (text, or prompt and completion, or messages), instead of four made-up topics. A key "topic" in its
            lines names the rows of the table of experts.
        num_experts: experts per layer; at least 2.
        top_k: experts used per token.
        steps: of fine-tuning, with 16 examples each.
        learning_rate: its peak.
        max_length: tokens; longer examples are cut, and counted in the output.
        seed: of everything.
    """
    if (model is None) != (data is None):
        raise ConfigError("invalid arguments", ["model and data: found one, expected both or neither"])
    if num_experts < 2:
        raise ConfigError("invalid arguments", [f"num_experts: found {num_experts}, expected at least 2"])
    config = MoeLoraConfig(
        r=8, lora_alpha=16, num_experts=num_experts, top_k=top_k, target_modules="all-linear",
        router_aux_loss_coef=0.01, task_type="CAUSAL_LM",
    )  # fmt: skip
    _claim(output_dir)

    shell = Shell(quiet=quiet, json=json)
    if model is None or data is None:
        model, data = make_base_and_data(output_dir, seed, shell)
    model = model_directory(model, quiet=quiet)
    tokenizer = load_tokenizer(model)
    base = load_base_model(model, dtype="float32")
    vocabulary = base.config.vocab_size
    examples = read_data(data, tokenizer, max_length=max_length, vocab_size=vocabulary, keys=("topic",))
    train_data, eval_data = split_data(examples, 0.1, seed)
    shell.say(f"fine-tuning on {train_data.describe()}; {len(eval_data.examples)} more are held out")

    apply_moe_lora(base, config, rngs=nnx.Rngs(seed))
    settings = TrainSettings(
        steps=steps, batch_size=BATCH_SIZE, learning_rate=learning_rate, warmup_steps=steps // 20, seed=seed
    )
    pad = pad_id(tokenizer, vocabulary)
    adapter = output_dir / "adapter"
    lines = LogLines(shell, steps)
    with shell.progress("compiling the step") as bar:
        result = train(
            base, train_data, adapter, settings, eval_data=eval_data, pad_id=pad, on_progress=bar, on_log=lines
        )
    if not result.is_finished:
        shell.say(f"stopped after step {result.step} of {result.total_steps}")
        shell.give({"step": result.step, "total_steps": result.total_steps})
        return
    before, after = result.eval_losses[0], result.eval_losses[result.step]
    shell.say(f"loss on held-out examples: {before:.3f} before, {after:.3f} after {steps} steps")
    topics = split_by(eval_data, "topic")
    answers = _show_answers(base, tokenizer, topics, shell)
    module, shares = _show_experts(base, topics, pad, shell)
    shell.say(f"saved in {adapter}")
    in_peft = _compare_with_peft(base, model, adapter, eval_data.examples, pad, shell)
    shell.give(
        {
            "adapter": adapter,
            "eval_loss": {"before": before, "after": after, "steps": steps},
            "answers": answers,
            "experts": {"module": module, "gate_shares": shares},
            "in_peft": in_peft,
        }
    )


def _claim(output_dir: Path) -> None:
    """An empty directory, or one that a quickstart made, which is then cleared."""
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError("cannot write the output", [f"{output_dir}: found a file, expected a directory"])
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / MARKER).exists():
        raise CheckpointError("would overwrite", [f"{output_dir}: not empty and not from quickstart; choose another"])
    for part in ("base", "data", "adapter"):
        shutil.rmtree(output_dir / part, ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MARKER).touch()


def _show_answers(model: CausalLM, tokenizer: Any, topics: dict[str, TokenData], shell: Shell) -> list[dict[str, str]]:
    """What the model now says to the first held-out prompt of each topic; nothing where there are no prompts."""
    prompts = [prompt.ids for prompt in prompts_of(topics, len(topics))]
    if not prompts:
        return []
    with shell.progress("answering held-out prompts"):
        texts = answers(model, tokenizer, prompts, max_new_tokens=48)
    asked = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
    said = [{"prompt": " ".join(p.split()), "answer": " ".join(a.split())} for p, a in zip(asked, texts, strict=True)]
    shell.say("held-out prompts and what the model now says:")
    for pair in said:
        shell.say(f"  > {pair['prompt']}")
        shell.say(f"    {pair['answer']}")
    return said


def _show_experts(
    model: CausalLM, topics: dict[str, TokenData], pad_id: int, shell: Shell
) -> tuple[str, dict[str, list[float]]]:
    """The router that tells the topics apart best, as a table; its module, and {topic: share of each expert}."""
    with shell.progress("running the routers over held-out examples") as bar:
        statistics = router_statistics(model, topics, batch_size=BATCH_SIZE, pad_id=pad_id, on_progress=bar)
    shares = statistics.by_topic
    best = max(shares, key=lambda module: topic_information(shares[module]))
    shell.remarks.print(_expert_table(best, list(topics), shares[best]))
    if len(topics) > 1:
        bits = topic_information(shares[best])
        shell.say(
            f"(of {len(shares)} routers the one that tells topics apart best, {bits:.2f} bits per token; "
            "* marks the expert that a topic uses most)"
        )
    return best, {topic: row.tolist() for topic, row in zip(topics, shares[best], strict=True)}


def _expert_table(module: str, topics: Sequence[str], shares: np.ndarray) -> Table:
    """Topics down, experts across, in per cent; each topic's favourite is marked."""
    table = Table(title=f"gate share of each expert on tokens with loss, {module}", title_justify="left")
    table.add_column("topic")
    for expert in range(shares.shape[1]):
        table.add_column(f"expert {expert}", justify="right")
    for topic, row in zip(topics, shares, strict=True):
        cells = [f"{100 * share:.0f}%{' *' if e == row.argmax() else '  '}" for e, share in enumerate(row)]
        table.add_row(topic, *cells)
    return table


def _has_peft() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "peft"))


def _compare_with_peft(
    model: CausalLM, base: Path, adapter: Path, examples: Sequence[Example], pad_id: int, shell: Shell
) -> dict[str, float] | None:
    """Runs demo/peft_check.py in a process of its own, because nothing here may import torch."""
    if not _has_peft():
        shell.say("to load it in PyTorch: pip install 'moe-lora-jax[torch]', then see the README.md beside it")
        return None
    batch = next(eval_batches(examples[:8], batch_size=min(8, len(examples)), pad_id=pad_id)).batch
    logits = np.asarray(model(batch.input_ids, attention_mask=batch.attention_mask))
    script = Path(str(demo.__file__)).with_name("peft_check.py")
    with tempfile.TemporaryDirectory() as scratch:
        expected = Path(scratch, "expected.npz")
        np.savez(expected, input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits=logits)
        command = [sys.executable, "-P", str(script), str(base), str(adapter), str(expected)]
        with shell.progress("loading it in PyTorch with PEFT"):
            done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError("PEFT could not load the adapter", [last])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    shell.say(
        f"reloaded in PyTorch with PEFT: largest logit difference {found['largest_difference']:.1e} "
        f"(logits up to {found['largest_logit']:.1f})"
    )
    return found
