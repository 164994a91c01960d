"""`moe-lora generate`: continue a prompt in JAX, with or without an adapter."""

import contextlib
from pathlib import Path
from typing import Literal

from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.disk.hub import adapter_directory, model_directory
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
    revision: str | None = None,
    layout: str | None = None,
    chat: bool = False,
    chat_template: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: Literal["stored", "float32", "bfloat16"] = "stored",
    matmul_precision: Literal["default", "high", "highest"] | None = None,
    seed: int = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt, with or without an adapter.

    Args:
        model: Hugging Face model directory (config.json, safetensors, tokenizer), or an id on the Hub, owner/name.
        prompt: the text to continue.
        adapter: a mixture-of-LoRA adapter for this model, in any readable layout; or its id on the Hub.
        revision: branch, tag or commit of the model's id.
        layout: that layout's name; None detects it.
        chat: pass the prompt as the user's message through the tokenizer's chat template. Generation ends where the
            template ends the assistant's turn.
        chat_template: a file with a Jinja template, instead of the tokenizer's own.
        max_new_tokens: the most tokens to add.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together have this probability.
        dtype: of the base model.
        matmul_precision: of products of float32 numbers, in JAX's words. None: highest for a base model in float32,
            else default, which TPUs round to bfloat16 and NVIDIA's GPUs to TF32.
        seed: of the sampling.
    """
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("importing JAX"):
        import jax
        import jax.numpy as jnp

        from moe_lora_jax.adapters.checkpoint import load_adapter
        from moe_lora_jax.models import generate as decode
        from moe_lora_jax.models import load_base_model
        from moe_lora_jax.train.end_of_text import end_ids
        from moe_lora_jax.train.errors import BadLine
        from moe_lora_jax.train.messages import check_text
        from moe_lora_jax.train.template import ChatTemplate, Conversation
        from moe_lora_jax.train.tokenizer import load_tokenizer, prompt_ids
        from moe_lora_jax.train.turns import prompt_of

    if chat_template is not None and not chat:
        raise ConfigError("invalid arguments", ["chat_template: found without chat, expected both"])
    model = model_directory(model, revision, quiet=quiet)
    adapter = None if adapter is None else adapter_directory(adapter)
    tokenizer = load_tokenizer(model, chat_template)
    if chat and tokenizer.chat_template is None:
        hint = "expected a plain prompt, or a template (chat_template)"
        raise ConfigError("cannot chat", [f"chat: the tokenizer has no chat template, {hint}"])
    try:
        check_text(prompt)
        if chat:
            conversation = Conversation([{"role": "user", "content": prompt}])
            ids = prompt_of(ChatTemplate(tokenizer), conversation)
        else:
            ids = prompt_ids(tokenizer, prompt)
    except BadLine as bad:
        raise ConfigError("cannot chat" if chat else "invalid arguments", [f"prompt: {bad}"]) from None
    if not ids:
        raise ConfigError("nothing to continue", ["prompt: found no tokens, expected at least one"])
    with shell.progress("reading the model") as bar:
        base = load_base_model(model, dtype=None if dtype == "stored" else dtype)
        if adapter is not None:
            bar.stage("reading the adapter")
            load_adapter(base, adapter, layout=layout)
        bar.stage("compiling, then generating")
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(explained(f"generating {max_new_tokens} tokens after {len(ids)}", STEPS))
                if matmul_precision is not None:
                    stack.enter_context(jax.default_matmul_precision(matmul_precision))
                decoded = decode(
                    base,
                    jnp.asarray([ids], jnp.int32),
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    eos_token_id=end_ids(base, tokenizer, adapter),
                    key=jax.random.key(seed),
                )
                tokens = decoded[0, len(ids) :].tolist()  # where a GPU's error about memory shows
        except ValueError as error:
            raise ConfigError("invalid arguments", [str(error)]) from error
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    shell.give({"prompt": prompt, "text": text, "tokens": tokens})
    if not json:
        print(text)
