"""Mixtures of different rules, plain LoRAs and the base in one batch of a vLLM engine, against the PEFT tuner.

In the process of the test, so that it can look inside and put vLLM's own functions back. A server is in test_server.
"""

import importlib.util
import json
import logging
import os
import shutil

import numpy as np
import pytest

import moe_lora_interop
from tests.serving.engine import BASE, ENVIRONMENT, LENGTH, LONG, MIXTURES, PROMPTS, TOLERANCE, Made, engine, everyone
from tests.serving.made import write_mixture
from tests.serving.server import skip_without_vllm

skip_without_vllm()
os.environ |= ENVIRONMENT
pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own are no errors of ours


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("llama"), "llama", list(MIXTURES))


@pytest.fixture(scope="module")
def running(llama):
    with engine(llama.base, llama.adapters, max_num_batched_tokens=256, max_cpu_loras=16) as found:
        yield found


def lora_manager(running):
    return running.runner.model.lora_manager


@pytest.fixture
def batches(running, monkeypatch):
    """The slots in each batch; -1 is the base."""
    seen = []
    (punica,) = lora_manager(running).punica_wrapper_mapping.values()
    original = punica.update_metadata

    def update(*args, **kwargs):
        original(*args, **kwargs)
        seen.append(set(punica.token_lora_indices.tolist()))

    monkeypatch.setattr(punica, "update_metadata", update)
    return seen


def test_every_rule_in_one_batch(llama, running, batches, measured):
    asked = everyone(llama.adapters, PROMPTS)
    worst = llama.worst(asked, running.ask(asked, LENGTH))
    measured("log-probabilities in vLLM against PEFT: 8 mixtures, a LoRA and the base in one batch", worst)
    assert worst < TOLERANCE
    assert {-1, *range(9)} in batches
    answers = [llama.expected(name, tuple(PROMPTS[0]), LENGTH).tokens for name in (BASE, *llama.adapters)]
    assert len({tuple(tokens) for tokens in answers}) == len(answers)  # no adapter could stand for another


def test_the_base_is_unchanged_next_to_a_mixture(running):
    alone = running.ask([(BASE, p) for p in PROMPTS], LENGTH)
    beside = running.ask(everyone(["top2"], PROMPTS), LENGTH)[::2]
    assert [a.tokens for a in beside] == [a.tokens for a in alone]
    np.testing.assert_allclose([a.logprobs for a in beside], [a.logprobs for a in alone], atol=1e-5)


def test_chunked_prefill_and_prefix_caching(llama, running, measured):
    """300 tokens are more than a batch of 256; the second time the first blocks come from the cache, per adapter."""
    asked = everyone(["top2", "hydra", "lora"], [LONG])
    first = running.ask(asked, 8)
    again = running.ask(asked, 8)
    worst = max(llama.worst(asked, first, 8), llama.worst(asked, again, 8))
    measured("log-probabilities in vLLM against PEFT: chunked prefill, then the prefix cache", worst)
    assert worst < TOLERANCE
    assert running.cached_tokens == [256] * len(asked)


def test_vllms_own_products_give_the_base_a_delta(llama, running, monkeypatch):
    """What `cpu_ops` is for: without it a base request beside a LoRA gets the last slot's. If this fails, vLLM has
    mended it (vllm-project/vllm#48421)."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    asked = [(BASE, PROMPTS[1]), ("lora", PROMPTS[0])]
    manager = lora_manager(running)
    assert None not in manager.lora_index_to_id  # the last slot holds weights
    assert llama.worst(asked, running.ask(asked, LENGTH)) < TOLERANCE
    spec = importlib.util.spec_from_file_location("stock_lora_ops", lora_ops.__file__)
    stock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stock)
    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        for module in (lora_ops, punica_cpu):
            monkeypatch.setattr(module, name, getattr(stock, name))
    # one gate is 1 and the others 0 on a token without an adapter only if the tables say so; the products do the harm
    base, lora = running.ask(asked, LENGTH)
    assert base.tokens != llama.expected(BASE, tuple(PROMPTS[1]), LENGTH).tokens
    assert lora.tokens == llama.expected("lora", tuple(PROMPTS[0]), LENGTH).tokens


# --- what is refused -------------------------------------------------------------------------------------------------


def altered(source, path, **fields):
    """A copy of an adapter whose config says something else, and whose digest does not know."""
    shutil.copytree(source, path)
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return path


def assert_refused(running, path, *words):
    """Loading fails with these words, and the engine goes on."""
    running.adapters["refused"] = path
    try:
        with pytest.raises(Exception) as error:
            running.load("refused")
        assert [word for word in words if word not in str(error.value)] == []
    finally:
        del running.adapters["refused"]


def test_what_cannot_be_served_is_refused_by_name(llama, running, tmp_path):
    def mixture(name, **fields):
        return write_mixture(tmp_path / name, llama.base, seed=0, **{"num_experts": 4, "r": 4, **fields})

    cases = [
        (mixture("large", r=16), "--max-lora-rank: found 64, expected 128: 68 rows"),
        (mixture("ffn", scope="ffn", target_modules=["up_proj", "down_proj"]), "scope: found ffn", "--as mixtral"),
        (mixture("model", scope="model"), "scope: found model", "--as lora"),
        (mixture("task", router_input="task", num_tasks=2, router_depth=0), "router_input: found task", "--task ID"),
        (mixture("head", target_modules=["lm_head"]), "lm_head: found an adapter on a head"),
        (mixture("temperature", temperature_hidden_size=4), "temperature_hidden_size: found 4"),
        (tmp_path / "nowhere", "nowhere"),
    ]
    for path, *words in cases:
        assert_refused(running, path, *words)
    asked = everyone(["top2"], PROMPTS)
    assert llama.worst(asked, running.ask(asked, LENGTH)) < TOLERANCE


def renamed(source, path, name):
    """The adapter with other module names."""
    adapter = moe_lora_interop.read(source)
    tensors = {(name(module), role): tensor for (module, role), tensor in adapter.tensors.items()}
    config = {**adapter.config.to_dict(), "target_modules": [name(m) for m in adapter.modules]}
    moe_lora_interop.write(moe_lora_interop.Adapter(moe_lora_interop.MoeLoraConfig.from_dict(config), tensors), path)
    return path


def test_modules_that_are_not_the_models_are_refused(llama, running, tmp_path):
    """vLLM leaves out what it does not find, and fills up with zeros what is too small."""
    unknown = renamed(llama.adapters["top2"], tmp_path / "unknown", lambda m: m.replace("self_attn", "attention"))
    words = "model.layers.0.attention.q_proj is no linear layer of this model that takes a LoRA"
    assert_refused(running, unknown, "does not fit LlamaForCausalLM", words)
    deep = renamed(llama.adapters["top2"], tmp_path / "deep", lambda m: m.replace("layers.1", "layers.7"))
    assert_refused(running, deep, "model.layers.7.self_attn.q_proj is no linear layer")
    swapped = renamed(
        llama.adapters["sparsemax"],
        tmp_path / "swapped",
        lambda m: m.replace("q_proj", "x").replace("v_proj", "q_proj").replace("x", "v_proj"),
    )
    assert_refused(
        running, swapped, "model.layers.0.self_attn.q_proj: the adapter is for [out, in] = [64, 128], the base"
    )


def test_vllms_name_mapper_is_asked(llama, running, tmp_path, monkeypatch):
    """As for a model of text inside one of pictures: names resolve, or the adapter is refused (vllm#48019)."""
    from vllm.model_executor.models.utils import WeightsMapper

    running.adapters["wrapped"] = renamed(llama.adapters["top2"], tmp_path / "wrapped", "language_model.{}".format)
    try:
        with pytest.raises(Exception, match="language_model.model.layers.0.self_attn.q_proj is no linear layer"):
            running.load("wrapped")
        mapper = WeightsMapper(orig_to_new_prefix={"language_model.model.": "model."})
        monkeypatch.setattr(running.runner.model, "hf_to_vllm_mapper", mapper, raising=False)
        (found,) = running.ask([("wrapped", PROMPTS[0])], LENGTH)
        assert found.tokens == llama.expected("top2", tuple(PROMPTS[0]), LENGTH).tokens
    finally:
        del running.adapters["wrapped"]


def test_files_that_changed_under_a_known_name_are_refused(llama, running, tmp_path):
    """The prefix cache knows name and path only."""
    path = shutil.copytree(llama.adapters["top2"], tmp_path / "mine")
    running.adapters["mine"] = path
    try:
        running.load("mine")
        assert running.llm.llm_engine.remove_lora(running.request("mine").lora_int_id)
        running.load("mine")  # the same files
        assert running.llm.llm_engine.remove_lora(running.request("mine").lora_int_id)
        shutil.rmtree(path)
        shutil.copytree(llama.adapters["dense"], path)
        with pytest.raises(Exception, match="mine: found other files than when it was loaded first"):
            running.load("mine")
    finally:
        del running.adapters["mine"]


def test_another_layout_is_refused_with_the_verb_that_converts_it(llama, running, tmp_path):
    adapter = moe_lora_interop.read(llama.adapters["hydra"])
    config = {**adapter.config.to_dict(), "scoring_func": "softmax", "top_k": None}
    hydra = moe_lora_interop.Adapter(moe_lora_interop.MoeLoraConfig.from_dict(config), adapter.tensors)
    moe_lora_interop.write(hydra, tmp_path / "theirs", "hydralora")
    assert_refused(running, tmp_path / "theirs", "layout: found hydralora, expected native; first `moe-lora convert")


def test_another_vllm_is_left_as_it_is(monkeypatch, caplog):
    import vllm
    from vllm.lora.model_manager import LoRAModelManager

    from moe_lora_interop.vllm_plugin import register, touches

    assert hasattr(LoRAModelManager.activate_adapter, "moe_lora_plugin")
    stock = LoRAModelManager.activate_adapter.__wrapped__
    monkeypatch.setattr(LoRAModelManager, "activate_adapter", stock)
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    monkeypatch.setattr(touches, "_EXPECTED", [(stock, "self lora_id slot")])
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("ERROR"):
        register()
    assert LoRAModelManager.activate_adapter is stock
    assert "mixtures of LoRA cannot be served: tried with vLLM 0.32.0" in caplog.text
    assert "vllm: found version 0.33.1, expected one like 0.32.0" in caplog.text
    assert "activate_adapter: found arguments (self lora_id), expected (self lora_id slot)" in caplog.text


def test_a_vllm_that_is_left_as_it_is_refuses_a_mixture_itself(llama, running):
    """So nothing is served wrong where the plugin does not register."""
    manager = (
        running.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.lora_manager
    )
    stock = type(manager)._load_adapter.__wrapped__
    with pytest.raises(ValueError, match="moe_lora_A is unsupported LoRA weight"):
        stock(manager, running.request("top2"))
