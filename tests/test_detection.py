"""Detection on what the programs write for a 7B Llama: names and shapes, spelled out here and not from the rules."""

import numpy as np
import pytest

import moe_lora_interop
from moe_lora_interop.checkpoint.directory import Directory
from moe_lora_interop.checkpoint.store import store
from moe_lora_interop.dialects.lora import PLAIN_LORA
from moe_lora_interop.dialects.registry import dialect_named, file_dialects, register_dialect
from moe_lora_interop.disk import torch_files
from moe_lora_interop.rules.tensors import decode
from tools.samples import sample

register_dialect(PLAIN_LORA)
LAYERS, HIDDEN, INTER, E, R = 32, 4096, 11008, 8, 8
ATTENTION = {name: (HIDDEN, HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
FFN = {"gate_proj": (HIDDEN, INTER), "up_proj": (HIDDEN, INTER), "down_proj": (INTER, HIDDEN)}
PEFT = "base_model.model.model.layers"
EXPERTS = range(E)


def linears(attention=True, ffn=True):
    """(layer, path, in, out) of the targeted linear layers."""
    for layer in range(LAYERS):
        for block, names in (("self_attn", ATTENTION if attention else {}), ("mlp", FFN if ffn else {})):
            for name, (n_in, n_out) in names.items():
                yield layer, f"{block}.{name}", n_in, n_out


def native():
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        yield from (
            (f"{m}.moe_lora_A", (E, R, i)),
            (f"{m}.moe_lora_B", (E, o, R)),
            (f"{m}.moe_lora_router.weight", (E, i)),
        )


def native_model_scope():
    for layer, path, i, o in linears():
        yield from ((f"{PEFT}.{layer}.{path}.moe_lora_A", (E, R, i)), (f"{PEFT}.{layer}.{path}.moe_lora_B", (E, o, R)))
    for j, shape in enumerate([(64, HIDDEN), (E, 64)]):
        yield from (
            (f"base_model.moe_lora_router_{j}.weight", shape),
            (f"base_model.moe_lora_router_{j}.bias", shape[:1]),
        )


def loramoe():
    for layer, path, i, o in linears(attention=False):
        m = f"{PEFT}.{layer}.{path}"
        for e in EXPERTS:
            yield from ((f"{m}.lora_A{e}.weight", (R, i)), (f"{m}.lora_B{e}.weight", (o, R)))
        yield f"{m}.lora_route.weight", (E, i)


def ld_mole():
    """Of LoRAMoE's keys; one MLP for each number of inputs, under every module."""
    yield from loramoe()
    widths = sorted({i for _, _, i, _ in linears(attention=False)})
    modules = [f"{PEFT}.{layer}.{path}.sparsegen" for layer, path, _, _ in linears(attention=False)]
    for m in ("base_model.sparsegen_fn", *modules):
        for width in widths:
            mlp = f"{m}.mlp.proj_layers.{width}"
            yield from ((f"{mlp}.0.weight", (512, width)), (f"{mlp}.0.bias", (512,)))
            yield from ((f"{mlp}.2.weight", (1, 512)), (f"{mlp}.2.bias", (1,)))


def hydralora():
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        yield f"{m}.lora_A.weight", (R, i)
        yield from ((f"{m}.lora_B{e}.weight", (o, R)) for e in EXPERTS)
        yield f"{m}.lora_route.weight", (E, i)


def moe_peft(method, gate_per="linear", attention="plain"):
    for layer, path, i, o in linears():
        m = f"{method}.layers.{layer}.{path}"
        if path.startswith("self_attn") and attention == "plain":
            yield from ((f"{m}.lora_A.weight", (R, i)), (f"{m}.lora_B.weight", (o, R)))
            continue
        for e in EXPERTS:
            yield from ((f"{m}.experts.{e}.lora_A.weight", (R, i)), (f"{m}.experts.{e}.lora_B.weight", (o, R)))
        if gate_per == "linear":
            yield f"{m}.moe_gate.weight", (E, i)
    if gate_per == "ffn":
        yield from ((f"{method}.layers.{layer}.mlp.moe_gate.weight", (E, HIDDEN)) for layer in range(LAYERS))


def mixlora_legacy():
    old = {"w1_proj": (HIDDEN, INTER), "w2_proj": (INTER, HIDDEN), "w3_proj": (HIDDEN, INTER)}
    for layer in range(LAYERS):
        yield f"mixlora.layers.{layer}.gate.weight", (E, HIDDEN)
        for e in EXPERTS:
            for name, (i, o) in old.items():
                m = f"mixlora.layers.{layer}.experts.{e}.{name}"
                yield from ((f"{m}.lora_A.weight", (R, i)), (f"{m}.lora_B.weight", (o, R)))
        for name, (i, o) in ATTENTION.items():
            m = f"mixlora.layers.{layer}.self_attn.{name}"
            yield from ((f"{m}.lora_A.weight", (R, i)), (f"{m}.lora_B.weight", (o, R)))


def mola():
    for layer, path, i, o in linears():
        m, experts = f"{PEFT}.{layer}.{path}", 2 + 2 * (layer // 8)  # 2 to 8, rising by layer
        for e in range(experts):
            yield from ((f"{m}.lora_A_{e}.weight", (R, i)), (f"{m}.lora_B_{e}.weight", (o, R)))
        yield f"{m}.router.router.weight", (experts, i)


def adamole_keys(threshold, duplicates):
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        for e in EXPERTS:
            for prefix, infix in ((f"{m}.lora_", f".{e}"), (f"{m}.moe_layer.experts.{e}.lora_", "")):
                if infix or duplicates:
                    yield from ((f"{prefix}A{infix}.weight", (R, i)), (f"{prefix}B{infix}.weight", (o, R)))
        yield f"{m}.lora_gating.weight", (E, i)
        if threshold:
            yield from ((f"{m}.lora_threshold.weight", (1, i)), (f"{m}.lora_threshold.bias", (1,)))


def for_ai():
    for block in ("encoder", "decoder"):
        for layer in range(24):
            for name in ("q", "v"):
                m = f"{block}/layers_{layer}/attention/{name}"
                yield from ((f"{m}/lora_A", (10, 2048, 4)), (f"{m}/lora_B", (10, 4, 2048)))
                v = f"{m}/router/router_weights/v"
                yield from ((f"{v}/kernel", (2048, 10)), (f"{v}/bias", (10,)))


def poly(splits):
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        yield from (
            (f"{m}.poly_lora_A", (splits, E, i // splits, R)),
            (f"{m}.poly_lora_B", (splits, E, R, o // splits)),
        )
        yield f"{m}.poly_router.module_logits", (20, splits * E)


def moelora():
    yield from (("lora_task_embedding.weight", (17, 64)), ("lora_gate.GateL.weight", (E, 64)))
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        yield from ((f"{m}.lora_task_embedding.weight", (17, 64)), (f"{m}.lora_gate.GateL.weight", (E, 64)))
        for e in EXPERTS:
            for tail in (".mlp.weight", ".weight"):
                yield f"{m}.lora_A.loraA.{e}{tail}", (R // 4, i)
                yield f"{m}.lora_B.loraB.{e}{tail}", (o, R // 4)


def coin():
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        yield f"{m}.lora_router.weight", (E, i)
        for e in EXPERTS:
            for tail in (".mlp.weight", ".weight"):
                yield f"{m}.lora_A.loraA.{e}{tail}", (R // 4, i)
                yield f"{m}.lora_B.loraB.{e}{tail}", (o, R // 4)


def comol():
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        yield from ((f"{m}.lora_A.weight", (R, i)), (f"{m}.lora_B.weight", (o, R)), (f"{m}.lora_router.weight", (E, R)))
        yield from ((f"{m}.lora_Cores.{e}", (R, R)) for e in EXPERTS)


def mtl_lora():
    for layer, path, i, o in linears():
        m = f"model.layers.{layer}.{path}"
        yield from ((f"{m}.lora_A", (1, R, i)), (f"{m}.lora_B", (3, o, R)), (f"{m}.lora_B_w", (8, 3)))
        yield f"{m}.lora_lambdas", (8, R, R) if layer % 2 else (8, R)


def mtl_moelora():
    for layer, path, i, o in linears():
        m = f"model.layers.{layer}.{path}"
        yield from ((f"{m}.lora_task_embedding.weight", (17, 64)), (f"{m}.lora_gate.GateL.weight", (E, 64)))
        for e in EXPERTS:
            for tail in (".mlp.weight", ".weight"):
                yield f"{m}.lora_A.loraA.{e}{tail}", (R // 4, i)
                yield f"{m}.lora_B.loraB.{e}{tail}", (o, R // 4)


def meteora():
    for layer, path, i, o in linears():
        m = f"main/{PEFT}.{layer}.{path}"
        yield f"{m}.base_layer.weight", (o, i)
        yield f"{m}.lora_A.weight", (E * R, i)
        yield f"{m}.lora_B.weight", (o, E * R)
        yield f"{m}.moe_gate.weight", (E, i)
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"main/{PEFT}.{layer}.{norm}.weight", (HIDDEN,)
    yield "main/base_model.model.model.norm.weight", (HIDDEN,)
    yield from ((f"main/base_model.model.{name}.weight", (32000, HIDDEN)) for name in ("model.embed_tokens", "lm_head"))


def plain_lora():
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        yield from ((f"{m}.lora_A.weight", (R, i)), (f"{m}.lora_B.weight", (o, R)))


def in_folders(experts=EXPERTS):
    """The experts of X-LoRA and Arrow, each in its folder."""
    for e in experts:
        yield from ((f"{e}/{name}", shape) for name, shape in plain_lora())


def xlora():
    yield from in_folders()
    for j, shape in ((0, (2048, HIDDEN)), (3, (LAYERS * 7 * E, 2048))):  # layer 3: a dropout layer between
        key = f"main/base_model.internal_xlora_classifier.layers.{j}"
        yield from ((f"{key}.weight", shape), (f"{key}.bias", shape[:1]))


def xlora_original():
    for e in EXPERTS:
        yield from ((f"{e}/internal_xlora_classifier.{name}.bias", (2048,)) for name in ("inner.0", "last"))
    yield from in_folders()
    for name, shape in (("inner.0", (2048, HIDDEN)), ("last", (LAYERS * 7 * E, 2048))):
        yield from ((f"main/{name}.weight", shape), (f"main/{name}.bias", shape[:1]))


def arrow():
    yield from in_folders()
    yield from ((f"main/{name}", shape) for name, shape in plain_lora())


def ewora():
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        yield from ((f"{m}.ewora_As", (E, i, R)), (f"{m}.ewora_Bs", (E, R, o)))
        yield from ((f"{m}.ewora_weighting.weight", (E, E * R)), (f"{m}.ewora_weighting.bias", (E,)))


def peft_router():
    yield from (("router.weight", (E, HIDDEN)), ("router.bias", (E,)))
    for layer, path, i, o in linears():
        m = f"{PEFT}.{layer}.{path}"
        for e in EXPERTS:
            yield from ((f"{m}.lora_A.expert_{e}.weight", (R, i)), (f"{m}.lora_B.expert_{e}.weight", (o, R)))


LORA = {"peft_type": "LORA", "bias": "none"}
MIXLORA = {"peft_type": "MIXLORA", "routing_strategy": "mixlora", "bias": "none"}
MANIFESTS = {
    "native": ("native", native, {"peft_type": "MOE_LORA"}),
    "native, model scope": ("native", native_model_scope, {"peft_type": "MOE_LORA"}),
    "loramoe": ("loramoe", loramoe, {**LORA, "lora_nums": E}),
    "ld-mole": ("ld-mole", ld_mole, {**LORA, "sparsegen_cfg": {"enabled": True, "hidden_sizes": 512}}),
    "hydralora": ("hydralora", hydralora, {**LORA, "lora_nums": E}),
    "moe-peft loramoe": (
        "moe-peft-loramoe",
        lambda: moe_peft("loramoe"),
        {"peft_type": "LORAMOE", "routing_strategy": "loramoe", "bias": "none"},
    ),
    "moe-peft mola": (
        "moe-peft-mola",
        lambda: moe_peft("mola", attention="experts"),
        {"peft_type": "MOLA", "routing_strategy": "mola", "bias": "none"},
    ),
    "dynmole": (
        "dynmole",
        lambda: moe_peft("dynmole", attention="experts"),
        {"peft_type": "DYNMOLE", "routing_strategy": "dynmole", "bias": "none"},
    ),
    "mixlora": ("mixlora", lambda: moe_peft("mixlora", "ffn"), MIXLORA),
    "mixlora legacy": ("mixlora-legacy", mixlora_legacy, {**MIXLORA, "routing_strategy": "mixtral"}),
    "mola": ("mola", mola, LORA),
    "mole": ("mole", lambda: adamole_keys(False, True), {"peft_type": "MOLE", "bias": "none"}),
    "adamole": ("adamole", lambda: adamole_keys(True, True), {"peft_type": "ADAMOLE", "bias": "none"}),
    "adamole, own keys only": ("adamole", lambda: adamole_keys(True, False), {"peft_type": "ADAMOLE", "bias": "none"}),
    "goat": ("goat", lambda: adamole_keys(False, True), {"peft_type": "GOAT", "bias": "none", "init_type": "default"}),
    "for-ai": ("for-ai-molora", for_ai, {}),
    "poly": ("poly", lambda: poly(1), {"peft_type": "POLY", "poly_type": "poly"}),
    "mhr": ("poly", lambda: poly(4), {"peft_type": "POLY", "poly_type": "poly"}),
    "moelora": ("moelora", moelora, {"peft_type": "MMOELORAS", "bias": "none"}),
    "coin": ("coin", coin, {"peft_type": "MOE_LORA_CoIN", "bias": "none"}),
    "comol": ("comol", comol, {"peft_type": "MoCoreLORA", "bias": "none", "core_router": True}),
    "meteora": ("meteora", meteora, {}),
    "mtl-lora": ("mtl-lora", mtl_lora, {}),
    "mtl-moelora": ("mtl-moelora", mtl_moelora, {}),
    "lora": ("lora", plain_lora, LORA),
    "peft-router": ("peft-router", peft_router, LORA),
    "ewora": ("ewora", ewora, {"peft_type": "EWORA", "bias": "none"}),
    "xlora": ("xlora", xlora, {"peft_type": "XLORA", "xlora_dropout_p": 0.2, "scaling_pass_value": 0.0}),
    "xlora-original": ("xlora-original", xlora_original, {"xlora_depth": 2, "enable_relu_and_dropout": True}),
    "arrow": ("arrow", arrow, {**LORA, "arrow_config": {"use_gks": False}}),
}
FOLDERED = ("xlora", "xlora-original", "arrow", "meteora")


def fitting(shapes, raw, *, foldered=False):
    """The layouts without a misfit, among those that a directory of this kind is tried against."""
    tried = [d for d in file_dialects() if (d.folders is not None) == foldered]
    return [d.name for d in tried if not d.misfits(shapes, raw)]


@pytest.mark.parametrize("case", MANIFESTS)
def test_exactly_one_layout_fits(case):
    name, keys, raw = MANIFESTS[case]
    shapes = dict(keys())
    assert len(shapes) > 300
    assert fitting(shapes, raw, foldered=name in FOLDERED) == [name]


def test_every_layout_is_covered():
    assert {name for name, _, _ in MANIFESTS.values()} == {d.name for d in file_dialects()}


def test_goat_and_mole_differ_by_peft_type_only():
    keys = dict(adamole_keys(False, False))
    assert fitting(keys, {"peft_type": "MOLE"}) == ["mole"] and fitting(keys, {"peft_type": "GOAT"}) == ["goat"]
    assert fitting(keys, {"peft_type": "LORA"}) == [] and fitting(keys, {}) == []


@pytest.mark.parametrize("case", [c for c, (name, _, _) in MANIFESTS.items() if name not in FOLDERED])
def test_one_unknown_tensor_is_no_layout(case):
    name, keys, raw = MANIFESTS[case]
    shapes = dict(keys()) | {"surprise": (3,)}
    assert fitting(shapes, raw) == []
    assert "no rule for surprise" in dialect_named(name).misfits(shapes, raw)[0]


def test_a_missing_router_is_named():
    shapes = {n: s for n, s in loramoe() if not n.endswith("lora_route.weight")}
    assert dialect_named("loramoe").misfits(shapes, {**LORA, "lora_nums": E}) == ["no tensor is a router"]


# --- near misses: read completely, small -----------------------------------------------------------------------------


def written(layout, tmp_path, change):
    """A sample in a layout, with its stored tensors changed by `change(tensors)` before they are written."""
    moe_lora_interop.write(sample(layout), tmp_path / "good", layout)
    table = dialect_named(layout)
    with Directory(tmp_path / "good") as directory:
        stored = directory.stored(table)
        tensors = {name: np.asarray(tensor) for name, tensor in stored.tensors().items()}
    change(tensors)
    (tmp_path / "bad").mkdir()
    for name, write in store(table, stored.raw, tensors).items():
        write(tmp_path / "bad" / name)
    return tmp_path / "bad"


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[f"base_model.model.model.layers.{name}"]

    return change


def replace(name, make):
    def change(tensors):
        key = f"base_model.model.model.layers.{name}"
        tensors[key] = make(tensors[key])

    return change


M = "1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("layout", "change", "reasons"),
    [
        (
            "mole",
            drop(f"{M}.lora_A.1.weight", f"{M}.lora_B.1.weight"),
            [f"{M}.lora_A.1.weight: missing tensor", f"{M}.lora_B.1.weight: missing tensor"],
        ),
        ("mole", drop(f"{M}.lora_A.3.weight"), [f"{M}.lora_A.3.weight: missing tensor"]),
        ("mole", drop(f"{M}.lora_gating.weight"), [f"{M} router: missing tensor"]),
        (
            "mole",
            replace(f"{M}.lora_gating.weight", lambda t: t[:, :-1]),
            [f"{M} router: shape [4, 7] [logit, in], found in = 7, expected 8"],
        ),
        (
            "mole",
            replace(f"{M}.lora_gating.weight", lambda t: t[:-1]),
            [f"{M} router: shape [3, 8] [logit, in], found logit = 3, expected 4"],
        ),
        (
            "mola",
            drop(f"{M}.lora_A_1.weight", f"{M}.lora_B_1.weight"),
            [f"{M}.lora_A_1.weight: missing tensor", f"{M}.lora_B_1.weight: missing tensor"],
        ),
        (
            "mola",
            drop(f"{M}.lora_A_3.weight", f"{M}.lora_B_3.weight"),
            [f"{M}.lora_A_3.weight: missing tensor", f"{M}.lora_B_3.weight: missing tensor"],
        ),
        (
            "hydralora",
            drop(f"{M}.lora_B3.weight"),
            [f"{M}.lora_B3.weight: missing tensor"],
        ),
        (
            "adamole",
            replace(f"{M}.lora_threshold.weight", lambda t: t[:, :-2]),
            [f"{M} threshold: shape [6] [in], found in = 6, expected 8"],
        ),
        (
            "mole",
            replace(f"{M}.lora_A.1.weight", lambda t: t.astype("float16")),
            ["the experts' dtypes differ (float16, float32)"],
        ),
    ],
)
def test_near_misses_are_refused_with_every_reason(layout, change, reasons, tmp_path):
    bad = written(layout, tmp_path, change)
    options = {"top_k": [1, 2]} if layout == "mola" else {}
    with pytest.raises((moe_lora_interop.CheckpointError, moe_lora_interop.ConfigError)) as error:
        moe_lora_interop.read(bad, **options)
    for reason in reasons:
        assert reason in str(error.value)


def test_unequal_expert_counts_without_a_pattern(tmp_path):
    change = drop(*(f"0.self_attn.{p}_proj.lora_{ab}.3.weight" for p in "qv" for ab in "AB"))
    with pytest.raises(moe_lora_interop.CheckpointError) as error:
        moe_lora_interop.read(written("mole", tmp_path, change))
    assert len([p for p in error.value.problems if p.endswith("missing tensor")]) >= 4


@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_aliases_that_disagree(kind, tmp_path):
    adapter = sample("moelora")
    moe_lora_interop.write(adapter, tmp_path, "moelora", duplicates=True)
    assert moe_lora_interop.read(tmp_path).modules == adapter.modules
    tensors = torch_files.read(tmp_path / "adapter_model.bin")
    alias = f"base_model.model.model.layers.{M}.{kind}.{kind.replace('_', '')}.2.weight"
    tensors[alias] = tensors[alias] + np.float32(1e-3)
    torch_files.write(tmp_path / "adapter_model.bin", tensors)
    with pytest.raises(
        moe_lora_interop.CheckpointError, match=f"of model.layers.{M}: differs from the tensor that it duplicates"
    ):
        moe_lora_interop.read(tmp_path)


def test_decoding_a_manifest_finds_every_module_once():
    """The keys of two layers with real values: 14 modules with A, B and a router each."""
    stored = {name: np.zeros(shape, "f4") for name, shape in mola() if int(name.split(".")[4]) < 2}
    tensors, problems = decode(dialect_named("mola").rules, stored, lambda module: {})
    assert not problems and len(tensors) == 3 * 14
    assert tensors["model.layers.1.mlp.down_proj", "lora_B"].shape == (2, HIDDEN, R)
