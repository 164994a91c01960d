"""`moe-lora generate`: continue a prompt in JAX, with or without an adapter."""

from pathlib import Path
from typing import Literal

from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.memory import explained

STEPS = (
    "a smaller max_new_tokens or a shorter prompt: the cache of keys and values grows with both",
    "the base model in bfloat16 takes half of float32, and so does its cache (dtype)",
)


def generate(
    model: Path,
    prompt: str,
    *,
    adapter: Path | None = None,
    dialect: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: Literal["stored", "float32", "bfloat16"] = "stored",
    seed: int = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt, with or without an adapter.

    Args:
        model: Hugging Face model directory (config.json, safetensors, tokenizer).
        prompt: the text to continue.
        adapter: a mixture-of-LoRA adapter for this model, in any readable layout.
        dialect: that layout's name; None detects it.
        chat: pass the prompt as the user's message through the tokenizer's chat template.
        max_new_tokens: the most tokens to add.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        dtype: of the base model.
        seed: of the sampling.
    """
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("importing JAX"):
        import jax
        import jax.numpy as jnp

        from moe_lora_jax.adapters.checkpoint import load_adapter
        from moe_lora_jax.models import generate as decode
        from moe_lora_jax.models import load_base_model
        from moe_lora_jax.train.tokenizer import end_ids, load_tokenizer, prompt_ids

    tokenizer = load_tokenizer(model)
    if chat:
        if tokenizer.chat_template is None:
            raise ConfigError("cannot chat", ["chat: the tokenizer has no chat template, expected a plain prompt"])
        message = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(message, tokenize=True, return_dict=True, add_generation_prompt=True)
        ids = list(rendered["input_ids"])
    else:
        ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise ConfigError("nothing to continue", ["prompt: found no tokens, expected at least one"])
    with shell.progress("reading the model") as bar:
        base = load_base_model(model, dtype=None if dtype == "stored" else dtype)
        if adapter is not None:
            bar.stage("reading the adapter")
            load_adapter(base, adapter, dialect=dialect)
        bar.stage("compiling, then generating")
        try:
            with explained(f"generating {max_new_tokens} tokens after {len(ids)}", STEPS):
                decoded = decode(
                    base,
                    jnp.asarray([ids], jnp.int32),
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    eos_token_id=end_ids(base, tokenizer),
                    key=jax.random.key(seed),
                )
                tokens = decoded[0, len(ids) :].tolist()  # where a GPU's error about memory shows
        except ValueError as error:
            raise ConfigError("invalid arguments", [str(error)]) from error
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    shell.give({"prompt": prompt, "text": text, "tokens": tokens})
    if not json:
        print(text)
