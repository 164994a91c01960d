"""Ordinary LoRA adapters become the experts of a mixture (upcycling)."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.prototypes import prototypes
from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.export.plain_lora import Factors, read_plain_lora
from moe_lora_interop.progress import OnProgress, no_progress, tracked
from moe_lora_interop.rules.codecs import collapsed, pattern_for

ROUTER_STD = 0.02
ROUTERS = ("uniform", "random", "arrow")


def combine(
    directories: Sequence[str | os.PathLike[str]],
    *,
    router: str = "uniform",
    top_k: int | None = None,
    router_temperature: float = 1.0,
    seed: int = 0,
    fill_missing: bool = False,
    allow_different_bases: bool = False,
    on_progress: OnProgress = no_progress,
) -> Adapter:
    """A mixture whose expert e is the LoRA adapter in `directories[e]`, with a new router on every target module.

    Experts keep their rank, alpha and values; smaller ranks are zero-padded in memory. Where some adapters use rslora
    and others do not, the root goes into alpha. With router "uniform" and no top_k the result computes the average of
    the adapters' deltas.

    Args:
        directories: ordinary PEFT LoRA directories, two or more.
        router: "uniform": zero rows, so every gate is 1/E until trained; "random": rows ~ N(0, 0.02^2); "arrow": each
            expert's leading right singular vector of B_e A_e, scored by softmax(|z|) (arXiv:2405.11157).
        top_k: experts kept per token; None keeps all.
        router_temperature: divides the router's logits.
        seed: of the random router.
        fill_missing: an adapter without a module that others have gets a zero expert of rank 1 there.
        allow_different_bases: accept adapters for base models of different names; the first one's is kept.
        on_progress: called with (done, total), in adapters read and then in modules done.

    Raises:
        CheckpointError: a directory is no plain LoRA, or the adapters do not have the same modules and sizes.
        ConfigError: invalid arguments. Every problem is listed.
    """
    if router not in ROUTERS:
        raise ConfigError("invalid arguments", [f"router: found {router!r}, expected one of {', '.join(ROUTERS)}"])
    if len(directories) < 2:
        raise ConfigError("invalid arguments", [f"directories: found {len(directories)}, expected at least two"])
    adapters = _read_all(directories, on_progress)
    modules = sorted({m for a in adapters.values() for m in a.modules})
    problems = _size_problems(adapters, modules)
    if not fill_missing:
        problems += [
            f"{name}: has no {m}, others do; fill_missing gives it a zero expert there"
            for name, a in adapters.items()
            for m in modules
            if m not in a.modules
        ]
    if not allow_different_bases:
        problems += _base_problems(adapters)
    of_base: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        problems += [f"{name}: {problem}" for problem in _unequal(adapter.base_tensors, of_base)]
        of_base = {**adapter.base_tensors, **of_base}
    if problems:
        raise CheckpointError("these adapters cannot be combined", problems)

    use_rslora = all(a.config.use_rslora for a in adapters.values())
    factors = {m: [_factors(a, m, use_rslora, adapters) for a in adapters.values()] for m in modules}
    config = dataclasses.replace(
        _config(list(adapters.values()), factors),
        use_rslora=use_rslora,
        top_k=top_k,
        router_temperature=router_temperature,
        scoring_func="abs_softmax" if router == "arrow" else "softmax",
    )
    tensors: dict[tuple[str, str], np.ndarray] = {}
    make_rows = _router_rows(router, seed)
    for module in tracked(modules, on_progress):
        a, b = _stacked(factors[module])
        tensors[module, "lora_A"], tensors[module, "lora_B"] = a, b
        tensors[module, "router"] = make_rows(a, b)
    return Adapter(config, tensors, base_tensors=of_base)


def _read_all(directories: Sequence[str | os.PathLike[str]], on_progress: OnProgress) -> dict[str, Adapter]:
    """{name: adapter}, in order; the same directory may be given twice."""
    adapters, problems = {}, []
    for number, directory in enumerate(tracked(directories, on_progress)):
        try:
            adapters[f"{number}: {os.fspath(directory)}"] = read_plain_lora(directory)
        except (CheckpointError, ConfigError) as error:
            problems += [f"{os.fspath(directory)}: {problem}" for problem in error.problems or (error.what,)]
    if problems:
        raise CheckpointError("not plain LoRA adapters", problems)
    return adapters


def _size_problems(adapters: Mapping[str, Adapter], modules: Sequence[str]) -> list[str]:
    features, problems = {name: a.features for name, a in adapters.items()}, []
    for module in modules:
        sizes = {name: a[module] for name, a in features.items() if module in a}
        first, expected = next(iter(sizes.items()))
        problems += [
            f"{name}: {module} has in, out = {found}, {first} has {expected}"
            for name, found in sizes.items()
            if found != expected
        ]
    return problems


def _base_problems(adapters: Mapping[str, Adapter]) -> list[str]:
    bases = {name: (a.config.base_model_name_or_path, a.config.revision) for name, a in adapters.items()}
    known = [{value for value in values if value is not None} for values in zip(*bases.values(), strict=True)]
    if all(len(values) < 2 for values in known):
        return []
    return [
        f"{name}: base model {base!r}{f', revision {revision!r}' if revision else ''}; the adapters must be for the "
        "same one"
        for name, (base, revision) in bases.items()
    ]


def _unequal(found: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
    both = [name for name in found if name in others]
    return [
        f"{name}: other values than in the adapters before, whose base model was another"
        for name in both
        if (found[name].dtype, found[name].tobytes()) != (others[name].dtype, others[name].tobytes())
    ]


def _factors(adapter: Adapter, module: str, use_rslora: bool, others: Mapping[str, Adapter]) -> Factors:
    """One expert's A, B and alpha, where s = alpha / r (or alpha / sqrt(r) with `use_rslora`)."""
    if module not in adapter.modules:
        like = next(a for a in others.values() if module in a.modules)
        n_in, n_out = like.features[module]
        dtype = like.tensors[module, "lora_A"].dtype
        return Factors(np.zeros((1, n_in), dtype), np.zeros((n_out, 1), dtype), 1.0)
    sizes: ModuleConfig = adapter.config.for_module(module)
    alpha = sizes.alphas[0]
    if sizes.use_rslora and not use_rslora:
        alpha *= sizes.rank**0.5
    a, b = (np.asarray(adapter.tensors[module, role][0]) for role in ("lora_A", "lora_B"))
    return Factors(a, b, alpha)


def _config(adapters: Sequence[Adapter], factors: Mapping[str, Sequence[Factors]]) -> MoeLoraConfig:
    ranks = {m: collapsed([f.a.shape[0] for f in of_module]) for m, of_module in factors.items()}
    alphas = {m: collapsed([f.alpha for f in of_module]) for m, of_module in factors.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    configs = [a.config for a in adapters]
    dropouts, tasks = {c.lora_dropout for c in configs}, {c.task_type for c in configs}
    return MoeLoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern=pattern_for(ranks, r),
        alpha_pattern=pattern_for(alphas, alpha),
        num_experts=len(adapters),
        target_modules=sorted(factors),
        lora_dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        base_model_name_or_path=next((c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None),
        revision=next((c.revision for c in configs if c.revision), None),
    )


def _stacked(factors: Sequence[Factors]) -> tuple[np.ndarray, np.ndarray]:
    """A [expert, rank, in] and B [expert, out, rank], zero-padded; float32 where the experts' dtypes differ."""
    rank = max(f.a.shape[0] for f in factors)
    dtypes = {f.a.dtype for f in factors}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    a = np.zeros((len(factors), rank, factors[0].a.shape[1]), dtype)
    b = np.zeros((len(factors), factors[0].b.shape[0], rank), dtype)
    for e, (own_a, own_b, _) in enumerate(factors):
        a[e, : len(own_a)], b[e, :, : len(own_a)] = own_a, own_b
    return a, b


def _router_rows(router: str, seed: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(A, B) -> the router's rows [expert, in] in float32."""
    if router == "arrow":
        return lambda a, b: prototypes(a, b)[0]
    if router == "random":
        rng = np.random.default_rng(seed)  # one for all modules
        return lambda a, b: (ROUTER_STD * rng.standard_normal((len(a), a.shape[-1]))).astype(np.float32)
    return lambda a, b: np.zeros((len(a), a.shape[-1]), np.float32)
