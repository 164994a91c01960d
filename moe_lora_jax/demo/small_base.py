"""A small language model in Hugging Face's format, made on the spot and trained briefly."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from moe_lora_interop.disk.files import write_tensors
from moe_lora_interop.progress import OnProgress, no_progress
from moe_lora_jax.models import CausalLM, DecoderConfig
from moe_lora_jax.train.batches import TrainBatches
from moe_lora_jax.train.examples import Example
from moe_lora_jax.train.optimizer import adamw, warmup_cosine
from moe_lora_jax.train.settings import TrainSettings
from moe_lora_jax.train.step import make_train_step, merge_back, split_model

PAD, BOS, EOS = 0, 1, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


def make_small_base(
    directory: Path,
    texts: Sequence[str],
    *,
    vocab_size: int,
    steps: int,
    seed: int,
    on_progress: OnProgress = no_progress,
) -> float:
    """Writes config.json, model.safetensors and a tokenizer to `directory`: a Llama trained on `texts`.

    Args:
        directory: created if missing.
        texts: what the tokenizer and the model are trained on.
        vocab_size: of the tokenizer, at most; more than 260.
        steps: of training, with 32 texts each.
        on_progress: called with (done, total) in steps.

    Returns:
        The loss of the last step, nats per token.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(texts, vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    config = {**CONFIG, "vocab_size": tokenizer.get_vocab_size()}
    _write_json(directory / "config.json", config)

    model = CausalLM(DecoderConfig.from_hf(config), rngs=nnx.Rngs(seed))
    ids = [encoding.ids + [EOS] for encoding in tokenizer.encode_batch(list(texts))]
    examples = [Example(np.array(i, np.int32), np.ones(len(i), bool), line) for line, i in enumerate(ids, start=1)]
    loss = _pretrain(model, examples, steps, seed, on_progress)
    write_tensors(directory / "model.safetensors", stored_tensors(model), {"format": "pt"})
    return loss


def _train_tokenizer(texts: Sequence[str], vocab_size: int):  # noqa: ANN202  tokenizers has no types
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def _pretrain(model: CausalLM, examples: Sequence[Example], steps: int, seed: int, on_progress: OnProgress) -> float:
    settings = TrainSettings(steps=steps, batch_size=32, learning_rate=3e-3, warmup_steps=steps // 20, seed=seed)
    schedule = warmup_cosine(settings.learning_rate, settings.warmup_steps, steps)
    optimizer = adamw(schedule, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm)
    graphdef, state, frozen = split_model(model, nnx.Param, optimizer)
    step = make_train_step(graphdef, optimizer, None)
    batches = TrainBatches(
        examples,
        batch_size=settings.batch_size,
        gradient_accumulation=settings.gradient_accumulation,
        epochs=settings.total_epochs(len(examples)),
        seed=seed,
        pad_id=PAD,
    )
    loss = float("nan")
    for number in range(1, steps + 1):
        state, metrics = step(state, frozen, next(batches).batch)
        loss = float(metrics.loss)
        on_progress(number, steps)
    merge_back(model, state, frozen)
    return loss


def stored_tensors(model: CausalLM) -> dict[str, np.ndarray]:
    """{Hugging Face name: array}: the tree's own paths; kernels [in, out] are stored as weights [out, in]."""
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parents, leaf = map(str, path)
        array = np.asarray(jax.device_get(variable[...]))
        name = "weight" if leaf in ("kernel", "embedding") else leaf
        tensors[".".join([*parents, name])] = array.T if leaf == "kernel" else array
    return tensors


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
