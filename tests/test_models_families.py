"""Every later family of base models: transformers' logits, and all ways of ours to compute them."""

import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.models import DecoderConfig, load_base_model
from moe_lora_jax.models.attending import chunked
from moe_lora_jax.models.rope import inverse_frequencies
from moe_lora_jax.models.support import families
from tests.hf import LATER, LLAMA3_ROPE, VOCAB, YARN_ROPE, Saved, default_rope, make_model

LENGTH = 24
SIZES = dict(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=32,
)
# Gates of all experts, from small routers: where they are close or steep, float32 is 1e-3 off the float64 logits in
# either framework (tests/test_parity.py has selections and steep routers)
MIXTURE = {"r": 2, "lora_alpha": 1, "num_experts": 3, "init_lora_weights": False, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


def padded():
    """ids, a mask with padding on either side, and the positions that transformers is told."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (3, LENGTH))
    mask = np.ones_like(ids)
    mask[1, -7:], mask[2, :7] = 0, 0
    return ids, mask, np.maximum(mask.cumsum(1) - 1, 0)


def by_transformers(model, ids, mask, positions):
    with torch.no_grad():
        ids, mask, positions = (torch.from_numpy(a) for a in (ids, mask, positions))
        return model(ids, attention_mask=mask, position_ids=positions).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _compiled(graphdef, state, ids, options):
    return nnx.merge(graphdef, state)(ids, **options)


def logits(model, ids, **options):
    return _compiled(*nnx.split(model), ids, options)


def off(found, wanted, real):
    """The largest difference, by the largest logit."""
    scale = np.abs(wanted[real]).max()
    assert scale > 0.1 and np.isfinite(np.asarray(found)).all()
    return np.abs(np.asarray(found) - wanted)[real].max() / scale


@pytest.mark.parametrize("case", LATER)
def test_logits_equal_transformers_in_every_way_of_computing_them(case, saved, measured, monkeypatch):
    reference, directory = saved(case)
    ids, mask, positions = padded()
    real = mask.astype(bool)
    wanted = by_transformers(reference, ids, mask, positions)
    plain = load_base_model(directory)
    ours = {".".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(plain))}
    assert ours == {name.rpartition(".")[0] for name, _ in reference.named_parameters()}
    linears = [n for n, m in reference.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)]
    assert plain.linear_order() == linears
    difference = off(logits(plain, ids, attention_mask=mask), wanted, real)
    measured(f"logits of {case}", difference)
    assert difference < 2e-5

    monkeypatch.setattr(chunked, "BLOCK", 8)
    scanned = load_base_model(directory, scan_layers=True, attention="chunked")  # and with remat
    assert off(logits(scanned, ids, attention_mask=mask), wanted, real) < 2e-5

    cache, pieces = plain.empty_cache(3, LENGTH), []
    for start in range(0, LENGTH, 8):
        part = slice(start, start + 8)
        piece, cache = plain(ids[:, part], mask[:, part], cache=cache)
        pieces.append(piece)
    assert off(np.concatenate(pieces, axis=1), wanted, real) < 2e-5

    rows = [ids[0, :9], ids[1, :13]]  # in one row of two, a column of padding behind them
    row, segments = np.concatenate([*rows, [0, 0]])[None], np.repeat([[5, 2, 0]], [9, 13, 2], axis=1)
    packed = np.asarray(plain(row, segment_ids=segments))[0]
    for found, alone in zip(np.split(packed[:22], [9]), (wanted[0, :9], wanted[1, :13]), strict=True):
        assert off(found, alone, slice(None)) < 2e-5


ROPES = [
    dict(YARN_ROPE, truncate=False),
    dict(YARN_ROPE, beta_fast=None, beta_slow=None, factor=0.5),
    dict(YARN_ROPE, mscale=0.7),
    dict(YARN_ROPE, mscale=0.7, mscale_all_dim=1.2, original_max_position_embeddings=4096),
    dict(YARN_ROPE, beta_fast=4.0, beta_slow=4.0, rope_theta=1e6),
    dict(LLAMA3_ROPE, original_max_position_embeddings=None),
]
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 2.0, 2.5, 9.0], long_factor=[1.0, 4.0, 5.0, 6.5])


def rope_of(**config):
    return DecoderConfig.from_hf({**SIZES, **config}).layer_ropes[0]


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_frequencies_are_those_of_transformers(rope):
    rope = {name: value for name, value in rope.items() if value is not None}
    theirs = transformers.LlamaConfig(**SIZES, rope_parameters=dict(rope))
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs)
    ours = rope_of(architectures=["LlamaForCausalLM"], rope_parameters=rope)
    np.testing.assert_allclose(inverse_frequencies(ours, 32), frequencies, rtol=5e-7)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("more", [{}, {"factor": 3.0}, {"factor": 0.5}, {"attention_factor": 1.7}, {"rope_type": "su"}])
def test_longrope_is_that_of_transformers(more):
    rope = {**LONG, **more, "original_max_position_embeddings": 16}
    sizes = {"head_dim": 16, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16}
    theirs = transformers.Phi3Config(**{**SIZES, **sizes, "hidden_size": 64}, rope_parameters=dict(rope))
    ours = rope_of(**sizes, architectures=["Phi3ForCausalLM"], rope_parameters=rope)
    for beyond in (False, True):
        frequencies, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, seq_len=17 if beyond else 16)
        np.testing.assert_allclose(inverse_frequencies(ours, 16, beyond=beyond), frequencies, rtol=5e-7)
        assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


def test_the_readme_names_every_family(capsys):
    words = re.findall(r"\w+", (Path(__file__).parent.parent / "README.md").read_text())
    assert set(families()) <= set(words)
    runpy.run_module("moe_lora_jax.models", run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(families())
    assert any("| `phi3` | `qkv_proj` and `gate_up_proj`" in row for row in rows)
    assert [row.split(" | ")[1] for row in rows if row.endswith("| splash, none |")] == ["`gemma2`"]  # its softcap
    types = {f"`{getattr(transformers, f'{name}Config').model_type}`" for name, _ in LATER.values()}
    assert types <= {row.split(" | ")[1] for row in rows}


def test_what_the_cases_vary_makes_a_difference(saved):
    """The comparisons above would pass for a model that ignores it, if it made none."""
    ids, mask, positions = padded()
    queries = {"llama_4_scaling_beta": 1e-9}
    changes = {
        "granite": (dict(residual_multiplier=1.0), dict(attention_multiplier=8**-0.5), dict(embedding_multiplier=1)),
        "smollm3": (dict(no_rope_layer_interval=3),),
        "smollm3_windows": (dict(sliding_window=30), dict(no_rope_layers=[1, 1, 1])),
        "olmo3_yarn": (
            dict(rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"), default_rope(1e4))),
        ),
        "ministral3": (dict(rope_parameters={**LATER["ministral3"][1]["rope_parameters"], **queries}),),
        "cohere2": (dict(sliding_window=30), dict(logit_scale=0.2)),
    }
    for case, others in changes.items():
        model = saved(case)[0]
        wanted = by_transformers(model, ids, mask, positions)
        for other in others:
            varied = make_model(case, **other)
            varied.load_state_dict(model.state_dict())
            assert off(by_transformers(varied, ids, mask, positions), wanted, mask.astype(bool)) > 1e-2, (case, other)


def test_longrope_beyond_the_original_context(saved):
    """24 tokens: as transformers for a batch, as alone for packed sequences; a cache would need other keys."""
    reference, directory = saved("phi3_longrope")
    model = load_base_model(directory)
    rows = np.random.default_rng(1).integers(3, VOCAB, (2, 30))
    mask = np.ones_like(rows)
    mask[1, 9:] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    real = mask.astype(bool)
    wanted = by_transformers(reference, rows, mask, positions)
    assert off(logits(model, rows, attention_mask=mask), wanted, real) < 2e-5
    short = [by_transformers(reference, *(a[1:, :9] for a in (rows, mask, positions)))[0], wanted[0]]
    assert off(short[0], wanted[1, :9], slice(None)) > 1e-2  # in the batch, the long row decides for both
    row, segments = np.concatenate([rows[1, :9], rows[0]])[None], np.repeat([[1, 2]], [9, 30], axis=1)
    packed = np.asarray(logits(model, row, segment_ids=segments))[0]
    for found, alone in zip(np.split(packed, [9]), short, strict=True):
        assert off(found, alone, slice(None)) < 2e-5
    assert mlj.generate(model, rows[:, :20], max_new_tokens=5).shape == (2, 25)
    with pytest.raises(
        ValueError, match="found room for 25 tokens, expected at most original_max_position_embeddings 24"
    ):
        mlj.generate(model, rows[:, :20], max_new_tokens=6)


MIXTURES = {
    "gemma": {},
    "granite": {},
    "smollm3_windows": {},
    "olmo2": {},
    "olmo3_yarn": {},
    "ministral3": {},
    "phi3": {},
    "phi3_longrope": {"scope": "ffn", "target_modules": ["gate_up_proj", "down_proj"]},
    "cohere2_biases": {},
}


@pytest.mark.parametrize("case", MIXTURES)
def test_a_mixture_is_the_same_in_peft(case, saved, tmp_path, measured):
    directory, (ids, mask, positions) = saved(case)[1], padded()
    ids, mask, positions = (a[:, :12] for a in (ids, mask, positions))
    real, fields = mask.astype(bool), {**MIXTURE, **MIXTURES[case]}

    def in_peft():
        return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()

    model = load_base_model(directory)
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**fields), rngs=nnx.Rngs(0))
    for number, (path, variable) in enumerate(nnx.to_flat_state(nnx.state(model, mlj.MoeLoraParam))):
        if "router" in path:
            router = 0.05 * jax.random.normal(jax.random.key(number), variable.shape)
            nnx.update(model, nnx.from_flat_state({path: variable.replace(router)}))
    mlj.save_pretrained(model, tmp_path / "jax")
    found = np.asarray(logits(model, ids, attention_mask=mask))
    loaded = peft.PeftModel.from_pretrained(in_peft(), tmp_path / "jax")
    differences = [off(by_transformers(loaded, ids, mask, positions), found, real)]
    assert off(by_transformers(in_peft(), ids, mask, positions), found, real) > 1e-2

    torch.manual_seed(0)
    trained = peft.get_peft_model(in_peft(), tuner.MoeLoraConfig(**fields, task_type="CAUSAL_LM")).eval()
    trained.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("jax", "peft"))
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}
    model = mlj.load_adapter(load_base_model(directory), tmp_path / "peft")
    wanted = by_transformers(trained, ids, mask, positions)
    differences.append(off(logits(model, ids, attention_mask=mask), wanted, real))
    measured(f"mixture on {case}, both ways", max(differences))
    assert max(differences) < 1e-5


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gemma", dict(hidden_activation="gelu"), "hidden_activation: found 'gelu', expected None or 'gelu_pytorch_t"),
        ("gemma", dict(sliding_window=5), "sliding_window: found 5, expected None"),
        ("gemma", dict(query_pre_attn_scalar=8), "query_pre_attn_scalar: found 8, expected None"),
        ("gemma", dict(final_logit_softcapping=3.0), "final_logit_softcapping: found 3.0, expected None"),
        ("granite", dict(residual_multiplier=0), "residual_multiplier: found 0, expected a positive number"),
        ("granite", dict(logits_scaling="8"), "logits_scaling: found '8', expected a positive number"),
        ("olmo2", dict(residual_multiplier=0.2), "residual_multiplier: found 0.2, expected None or 1"),
        ("olmo2", dict(attention_multiplier=1), "attention_multiplier: found 1, expected None"),
        ("olmo2", dict(clip_qkv=8.0), "clip_qkv: found 8.0, expected None"),
        ("olmo2", dict(no_rope_layers=[0, 1]), r"no_rope_layers: found \[0, 1\], expected None"),
        ("olmo2", dict(layer_types=["sliding_attention"] * 2), "layer_types: found .*, expected full_attention"),
        ("smollm3", dict(no_rope_layers=[1]), r"no_rope_layers: found \[1\], expected 0 or 1 for each of 2 layers"),
        ("smollm3", dict(no_rope_layers=None, no_rope_layer_interval=0), "no_rope_layer_interval: found 0, expected"),
        ("smollm3", dict(layer_types=["sliding_attention"] * 2), "use_sliding_window: found False"),
        (
            "olmo3",
            dict(rope_parameters=None, rope_theta=1e6),
            "rope_theta: found 1000000.0, expected 500000.0 or",
        ),
        ("olmo3", dict(rope_parameters=YARN_ROPE), "rope_parameters: .*nested under full_attention"),
        (
            "olmo3",
            dict(rope_parameters={"full_attention": {**YARN_ROPE, "truncate": False}}),
            r"full_attention.truncate: found False, expected one of \(True,\)",
        ),
        ("olmo3", dict(sliding_window_pattern=2), "sliding_window_pattern: found 2, expected None or 4"),
        ("ministral3", dict(attention_bias=True), "attention_bias: found True, expected False"),
        ("ministral3", dict(rope_parameters=YARN_ROPE), "llama_4_scaling_beta: found None, expected a positive number"),
        (
            "ministral3",
            dict(rope_parameters={**YARN_ROPE, "llama_4_scaling_beta": 0.1, "beta_fast": -1}),
            "rope_parameters.beta_fast: found -1, expected a positive number",
        ),
        (
            "granite",
            dict(rope_parameters={**YARN_ROPE, "original_max_position_embeddings": 1}),
            "original_max_position_embeddings: found 1, expected more than 1",
        ),
        (
            "granite",
            dict(rope_parameters={**YARN_ROPE, "llama_4_scaling_beta": 0.1}),
            "scaling_beta: found 0.1, expected",
        ),
        ("phi3", dict(resid_pdrop=0.1), "resid_pdrop: found 0.1, expected None or 0"),
        (
            "phi3",
            dict(rope_parameters=dict(rope_type="linear", factor=2.0)),
            "rope_type: found 'linear'",
        ),
        (
            "phi3",
            dict(rope_parameters={"partial_rotary_factor": 0.4}),
            "rotary_factor: found 0.4, expected at most 1",
        ),
        (
            "phi3",
            dict(rope_parameters={"rope_type": "longrope"}),
            "short_factor: found None, expected 4 positive",
        ),
        (
            "phi3_longrope",
            dict(original_max_position_embeddings=25),
            "original_max_position_embeddings: found 25, expected 24 as in rope_parameters",
        ),
        ("cohere2", dict(logit_scale=None), "logit_scale: found None, expected a positive number"),
        ("cohere2", dict(use_qk_norm=True), "use_qk_norm: found True, expected None or False"),
        ("cohere2", dict(use_parallel_block=False), "use_parallel_block: found False, expected None or True"),
        ("cohere2", dict(layer_norm_eps=0), "layer_norm_eps: found 0, expected a positive number"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(case, change, message, saved):
    config = json.loads((saved(case)[1] / "config.json").read_text())
    assert DecoderConfig.from_hf(config)
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf({**config, **change})


def test_a_mesh_computes_what_one_device_does(tmp_path, measured):
    """8 devices, heads over "tensor": a kernel that makes q, k and v is whole over it, and norms see all heads."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, Path(__file__).parent / "mesh_families_worker.py", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr
    for name, found in json.loads(done.stdout).items():
        measured(f"{name} on a mesh", found["off"])
        assert found["off"] < 5e-5 and found["compared"] > 8
        for path, parts in found["parts"].items():
            assert parts == (2 if "qkv_proj" in path or "gate_up_proj" in path else 4), path
