"""The quickstart's base model and data, made on the spot."""

import json
from pathlib import Path

from moe_lora_interop.cli.shell import Shell
from moe_lora_jax.demo.small_base import make_small_base
from moe_lora_jax.demo.topics import questions, sentences

PRETRAINING_STEPS = 100
QUESTIONS_PER_TOPIC = 300
SENTENCES_PER_TOPIC = 400


def make_base_and_data(output_dir: Path, seed: int = 0, shell: Shell | None = None) -> tuple[Path, Path]:
    """Makes output_dir/base, a small Llama with a tokenizer, and output_dir/data/topics.jsonl, questions with answers.

    Args:
        output_dir: created if missing; it must hold no folder data.
        seed: of the texts, of the model and of its training.
        shell: where progress is shown; None shows nothing.

    Returns:
        The two paths, for `load_base_model` and `read_data`.
    """
    shell = shell or Shell(quiet=True)
    base, data = output_dir / "base", output_dir / "data" / "topics.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join(json.dumps(q._asdict()) + "\n" for q in questions(QUESTIONS_PER_TOPIC, seed)), "utf-8")
    texts, steps = sentences(SENTENCES_PER_TOPIC, seed), PRETRAINING_STEPS
    shell.say(f"making a small Llama in {base}: a tokenizer and {steps} training steps on plain sentences")
    with shell.progress("training it") as bar:
        loss = make_small_base(base, texts, vocab_size=512, steps=steps, seed=seed, on_progress=bar)
    shell.say(f"its loss on those: {loss:.3f}")
    return base, data
