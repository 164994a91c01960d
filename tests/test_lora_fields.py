"""Every field of PEFT's configs: honoured, refused by name, or of no consequence; and what `init_lora_weights` did to
the base. The truth is PEFT's own logits of the model that was trained."""

import copy
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.dialects.registry import file_dialects
from moe_lora_interop.export.combining import combine
from moe_lora_interop.rules.configs import config_of, options_of, raw_of
from moe_lora_interop.rules.dialect import REQUIRED, Dialect
from moe_lora_interop.rules.lora_fields import INERT
from tests.export_truth import IDS, deltas_of, logits, merged_logits, torch_base
from tests.peers_data import ROOT, Peer
from tools.samples import sample

# PEFT's own remarks on what it is doing
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*changes the base weights"),
    pytest.mark.filterwarnings("ignore:.*specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:.*lora with eva initialization"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
TOKENS = torch.as_tensor(IDS)
ORDINARY = (True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica")
CONVERTIBLE = ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga")
CONFIGS = {
    "eva": {"eva_config": EvaConfig(rho=2.0)},
    "corda": {"corda_config": CordaConfig()},
    "lora_ga": {"lora_ga_config": LoraGAConfig()},
    "loftq": {"loftq_config": LoftQConfig(loftq_bits=4)},
}


def rounded_with_residual(weight, num_bits, reduced_rank, num_iter):
    """In place of PEFT's loftq_init, which needs bitsandbytes: W rounded, and the best A and B for the rest."""
    step = weight.detach().abs().max() / 2 ** (num_bits - 1)
    coarse = (weight.detach() / step).round() * step
    u, s, v = torch.linalg.svd(weight.detach() - coarse, full_matrices=False)
    root = s[:reduced_rank].sqrt()
    return coarse, root[:, None] * v[:reduced_rank], u[:, :reduced_rank] * root


@pytest.fixture(autouse=True)
def no_bitsandbytes(monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounded_with_residual)


def trained(init, directory):
    """PEFT's model after three steps, saved as `directory`/lora, and as it began as `directory`/init."""
    torch.manual_seed(0)
    base = torch_base("gqa")
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=init,
        task_type="CAUSAL_LM",
        **copy.deepcopy(CONFIGS.get(init, {})),
    )
    if init == "corda":
        preprocess_corda(base, config, run_model=lambda: base(TOKENS[:1]))
    if init == "lora_ga":
        preprocess_loraga(base, config, train_step=lambda: base(TOKENS, labels=TOKENS).loss.backward())
    model = get_peft_model(base, config)
    if init == "eva":
        batch = {"input_ids": TOKENS, "labels": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
        initialize_lora_eva_weights(model, [batch] * 3, show_progress_bar=False)
    model.save_pretrained(directory / "init")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    model.save_pretrained(directory / "lora")
    return model


def from_the_files(directory):
    """The logits of W + s B A with the base as published and what is read; the formula, without a model of ours."""
    return merged_logits("gqa", deltas_of(moe_lora_interop.read(directory), None))


def refusal(directory, init):
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        moe_lora_interop.read(directory)
    (problem,) = error.value.problems
    assert problem.startswith(f"init_lora_weights: found {init!r}, ")
    for call in (lambda: combine([directory, directory]), lambda: mlj.load_adapter(gqa(), directory)):
        with pytest.raises((moe_lora_interop.CheckpointError, moe_lora_interop.ConfigError), match="init_lora_weights"):
            call()
    assert moe_lora_interop.detect(directory) == "lora"
    return problem


def gqa():
    return mlj.load_base_model(ROOT / "bases" / "gqa")


@pytest.mark.parametrize("init", ORDINARY)
def test_an_initialisation_that_leaves_the_base_alone_is_read(init, tmp_path):
    expected = logits(trained(init, tmp_path))
    lora = tmp_path / "lora"
    assert np.abs(expected - logits(torch_base("gqa"))).max() > 0.1
    np.testing.assert_allclose(logits(PeftModel.from_pretrained(torch_base("gqa"), lora)), expected, atol=1e-5)
    np.testing.assert_allclose(from_the_files(lora), expected, atol=1e-5)
    np.testing.assert_allclose(mlj.load_adapter(gqa(), lora)(jnp.asarray(IDS)), expected, atol=1e-4)
    both = merged_logits("gqa", deltas_of(combine([lora, lora]), lambda module, experts: [0.5, 0.5]))
    np.testing.assert_allclose(both, expected, atol=1e-5)


@pytest.mark.parametrize("init", CONVERTIBLE)
def test_an_initialisation_that_moved_the_base_is_refused_until_peft_converts_it(init, tmp_path):
    model = trained(init, tmp_path)
    expected, lora = logits(model), tmp_path / "lora"
    problem = refusal(lora, init)
    assert "model.save_pretrained(DIR, path_initial_model_for_weight_conversion=INIT)" in problem
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    np.testing.assert_allclose(from_the_files(tmp_path / "converted"), expected, atol=1e-5)
    # what the refusal prevents: the files of before, read as if nothing had happened to the base
    assert np.abs(from_the_files(marked_ordinary(lora)) - expected).max() > 0.1


@pytest.mark.parametrize("init", ("pissa", "olora", "corda", "lora_ga", "loftq"))
def test_on_the_base_that_peft_changed_it_is_an_ordinary_adapter(init, tmp_path):
    model = trained(init, tmp_path)
    expected, lora = logits(model), tmp_path / "lora"
    problem = refusal(lora, init)
    assert "model.unload().save_pretrained(BASE)" in problem and "set init_lora_weights to true" in problem
    model.unload().save_pretrained(tmp_path / "base")
    model = mlj.load_adapter(mlj.load_base_model(tmp_path / "base"), marked_ordinary(lora))
    np.testing.assert_allclose(model(jnp.asarray(IDS)), expected, atol=1e-4)
    if init == "loftq":
        assert np.abs(from_the_files(lora) - expected).max() > 1e-3
        assert "path_initial_model" not in problem


def marked_ordinary(directory):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": True}))
    return directory


@pytest.mark.parametrize("init", ["lora-ga", "true", "", 1, 0, ["pissa"], {}, 0.5])
def test_an_unknown_initialisation_is_refused(init, tmp_path):
    save(tmp_path, init_lora_weights=init)
    with pytest.raises(
        moe_lora_interop.ConfigError, match="init_lora_weights: found .*, expected true, false, gaussian"
    ):
        moe_lora_interop.read(tmp_path)


@pytest.mark.parametrize(
    "layout", [d.name for d in file_dialects() if "init_lora_weights" in d.ignore and not d.read_only]
)
def test_every_layout_that_knows_the_field_refuses_it(layout):
    """Its config, as written, with one value more; of layouts in folders, also the config of an expert."""
    table, adapter = next(d for d in file_dialects() if d.name == layout), sample(layout)
    for fields in ({}, {"init_lora_weights": "gaussian"}):
        assert problems_of(table, adapter, **fields) == []
    (problem,) = problems_of(table, adapter, init_lora_weights="pissa")
    assert problem.startswith("init_lora_weights: found 'pissa', this moved")
    if table.folders is not None:
        (problem,) = problems_of(table, adapter, of_expert={"init_lora_weights": "olora"})
        assert problem.startswith("expert 1: init_lora_weights: found 'olora', this moved")
        (problem,) = problems_of(table, adapter, of_expert={"bias": "all"})
        assert problem.startswith("expert 1: bias: found 'all'")


def problems_of(table: Dialect, adapter, of_expert=None, **fields):
    raw = {**raw_of(table, adapter.config, adapter.tensors, adapter.modules), **fields}
    if of_expert:
        raw["experts"][1] |= of_expert
    options = options_of(table, adapter.config, adapter.modules)
    assert all(o.name in options for o in table.options if o.default is REQUIRED)
    try:
        config_of(table, raw, adapter.tensors, options)
    except moe_lora_interop.ConfigError as error:
        return list(error.problems)
    return []


# --- every field of PEFT's configs -----------------------------------------------------------------------------------

# What another value does to an adapter that is otherwise the same. A new field of PEFT belongs into one of these.
HONOURED = {
    "r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.25,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "target_modules": ["q_proj"],
    "exclude_modules": ["v_proj"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "base_model_name_or_path": "org/base",
    "revision": "abc",
    "task_type": "CAUSAL_LM",
}
INERT_FIELDS = {
    "fan_in_fan_out": True,
    "init_lora_weights": "gaussian",  # some values; the tests above
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 1.5},
    "loftq_config": {"loftq_bits": 8},
    "lora_ga_config": {"direction": "ArBr"},
    "qalora_group_size": 8,
    "megatron_core": "my.core",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "peft_version": "0.3.0",
    "inference_mode": True,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
}
REFUSED_FIELDS = {
    "peft_type": "LOHA",
    "bias": "all",
    "lora_bias": True,
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts.down_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 4},
    "velora_config": {"num_groups": 4},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "ensure_weight_tying": True,
}
OLD_FIELDS = {"enable_lora": [True, False, True]}  # of PEFT 0.3, which many forks copied


def save(directory, **fields):
    """The plain LoRA sample with these fields in its config."""
    moe_lora_interop.write(sample("lora"), directory, "lora")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return directory


def test_every_field_of_lora_config_is_decided():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == HONOURED.keys() | INERT_FIELDS.keys() | REFUSED_FIELDS.keys()
    assert len(fields) == len(HONOURED) + len(INERT_FIELDS) + len(REFUSED_FIELDS)
    assert {n for n in INERT if n in fields} <= INERT_FIELDS.keys()
    assert {n for n in INERT if n not in fields} == {"init_weights", "merge_weights"}


@pytest.mark.parametrize("name", REFUSED_FIELDS | OLD_FIELDS)
def test_a_field_that_changes_the_function_is_refused_by_name(name, tmp_path):
    value = (REFUSED_FIELDS | OLD_FIELDS)[name]
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        moe_lora_interop.read(save(tmp_path, **{name: value}), "lora")
    assert [p.split(":")[0] for p in error.value.problems] == [name]
    assert repr(value) in error.value.problems[0]


@pytest.mark.parametrize("name", INERT_FIELDS)
def test_a_field_without_consequence_changes_nothing(name, tmp_path):
    plain = moe_lora_interop.read(save(tmp_path / "plain"))
    found = moe_lora_interop.read(save(tmp_path / "other", **{name: INERT_FIELDS[name]}))
    assert found.config == plain.config


@pytest.mark.parametrize("name", HONOURED)
def test_a_field_that_is_honoured_arrives(name):
    table, adapter = next(d for d in file_dialects() if d.name == "lora"), sample("lora")
    raw = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [0, 1],
    }
    before = config_of(table, raw, adapter.tensors, {})
    after = config_of(table, {**raw, name: HONOURED[name]}, adapter.tensors, {})
    assert getattr(after, name) == HONOURED[name] != getattr(before, name)


@pytest.mark.parametrize(
    ("config", "layout", "inert"),
    [
        (peft.PolyConfig, "poly", {"init_weights", "peft_version", "inference_mode", "auto_mapping"}),
        (
            peft.XLoraConfig,
            "xlora",
            {"use_trainable_adapters", "peft_version", "inference_mode", "auto_mapping"},
        ),
    ],
)
def test_every_field_of_other_methods_is_known_or_refused(config, layout, inert):
    """A field that the layout has no word for is refused by name, whatever it is."""
    table = next(d for d in file_dialects() if d.name == layout)
    words = {f.theirs.split(".")[0] for f in table.fields} | table.const.keys() | table.measured.keys()
    words |= {name for theirs, _ in table.cases for name in theirs} | {"revision"}
    words |= {table.folders.listed_in} if table.folders else set()
    for field in dataclasses.fields(config):
        if field.name in words or field.name in inert:
            continue
        assert [p.split(":")[0] for p in problems_of(table, sample(layout), **{field.name: ["x"]})] == [field.name]
    assert not problems_of(table, sample(layout), peft_version="1", inference_mode=True)


def test_a_field_inside_an_object_is_not_overlooked(tmp_path):
    table, adapter = next(d for d in file_dialects() if d.name == "arrow"), sample("arrow")
    inner = {"top_k": 1, "router_temperature": 1.0, "use_gks": False, "rng_seed": 3, "gks_adapter_names": ["general"]}
    assert problems_of(table, adapter, arrow_config=inner) == []
    (problem,) = problems_of(table, adapter, arrow_config={**inner, "normalise": True})
    assert problem == "arrow_config.normalise: found True, layout 'arrow' has no meaning for it here"


@pytest.mark.parametrize(("value", "is_read"), [("silu", True), (None, True), ("gelu_new", False), ("relu", False)])
def test_the_activation_of_mixlora_experts(value, is_read):
    table = next(d for d in file_dialects() if d.name == "mixlora")
    problems = problems_of(table, sample("mixlora"), act_fn=value)
    assert problems == [] if is_read else problems[0].startswith(f"act_fn: found {value!r}, its experts use this")


def test_the_revision_of_the_base_goes_with_the_adapter(tmp_path):
    """Two adapters for two revisions of one base are not for the same base."""
    first, second = (save(tmp_path / r, base_model_name_or_path="org/base", revision=r) for r in ("one", "two"))
    moe_lora_interop.write(combine([first, first]), tmp_path / "mixture")
    assert json.loads((tmp_path / "mixture" / "adapter_config.json").read_text())["revision"] == "one"
    with pytest.raises(
        moe_lora_interop.CheckpointError, match="base model 'org/base', revision 'two'; the adapters must"
    ):
        combine([first, second])
    assert combine([first, second], allow_different_bases=True).config.revision == "one"


def test_peers_are_not_written_otherwise_than_before():
    """What is only refused is not written: no layout gains a field."""
    peer = Peer("loramoe/adapter")
    table = next(d for d in file_dialects() if d.name == "loramoe")
    adapter = moe_lora_interop.read(peer.directory)
    raw = raw_of(table, adapter.config, adapter.tensors, adapter.modules)
    assert not raw.keys() & {"sparsegen_cfg", "revision", "init_lora_weights", "fan_in_fan_out"}


def test_modules_that_were_left_out_of_all_linear(tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(torch_base("gqa"), config)
    model.save_pretrained(tmp_path)
    assert any(
        "o_proj" in name for name in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    )
    with torch.no_grad():
        wanted = model(TOKENS).logits.numpy()
    np.testing.assert_allclose(from_the_files(tmp_path), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"use_dora": True}, "use_dora: found True, which means DoRA"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: found [3], which means trained rows of an emb"),
        ({"modules_to_save": ["norm"]}, "modules_to_save: found ['norm'], which means trained copies of whole modules"),
    ],
)
def test_what_no_layout_has_comes_before_what_each_of_them_lacks(tmp_path, fields, problem):
    get_peft_model(torch_base("gqa"), LoraConfig(target_modules=["q_proj"], **fields)).save_pretrained(tmp_path)
    with pytest.raises(moe_lora_interop.CheckpointError, match="no known layout") as error:
        moe_lora_interop.read(tmp_path)
    assert error.value.problems[0].startswith(problem)
