"""One ordinary LoRA that computes exactly what the mixture computes when its gates are fixed."""

import os

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.config.adapter_config import ModuleConfig
from moe_lora_interop.config.modules import block_of
from moe_lora_interop.disk.atomic import require_empty
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.export.gate_sources import Gates
from moe_lora_interop.export.inside import Inside
from moe_lora_interop.export.plain_lora import Factors, plain_lora, write_plain_lora
from moe_lora_interop.export.readme import readme
from moe_lora_interop.progress import OnProgress, no_progress, tracked


def fixed_gates_lora(adapter: Adapter, gates: Gates, *, on_progress: OnProgress = no_progress) -> Adapter:
    """The adapter with one expert per module whose delta is the mixture's at these gates, in float32.

        outputs:  A = concat_e A_e [sum r_e, in],  B = concat_e g_e s_e B_e [out, sum r_e];  B A = sum_e g_e s_e B_e A_e
        weights:  A = [sum_e g_qe A_e,q for splits q],  B = s [sum_e g_qe B_e,q for splits q], of rank r

    r = lora_alpha, so that PEFT's own scaling is 1. Experts with gate 0 are left out, and so are modules
    whose gates are all 0. A module without a router keeps its delta. With a shared A the B's are summed, and the rank
    stays r.

    Args:
        adapter: the mixture.
        gates: {routed module: [split, expert]}.
        on_progress: called with (done, total) in modules done.

    Raises:
        ConfigError: in a feed-forward block more than one expert takes part, or not with gate 1: the activation stands
            between the experts and their sum, so no LoRA computes it; or every gate is 0.
    """
    if adapter.config.modules_to_save:
        problem = (
            f"modules_to_save: found {adapter.config.modules_to_save}, expected null: not in the adapter's tensors"
        )
        raise ConfigError("cannot be exported", [problem])
    _check_blocks(adapter, gates)
    factors = {}
    for module in tracked(adapter.modules, on_progress):
        sizes = adapter.config.for_module(module)
        a, b = (np.asarray(adapter.tensors[module, role], np.float64) for role in ("lora_A", "lora_B"))
        a = np.broadcast_to(a, (sizes.num_experts, *a.shape[1:]))
        own = gates[module] if sizes.has_router else np.ones((adapter.config.n_splits, 1))
        mix = _mixed_weights if adapter.config.mix == "weights" else _concatenated
        a, b = mix(a, b, own, sizes)
        if len(a):
            factors[module] = Factors(a.astype(np.float32), b.astype(np.float32), float(len(a)))
    if not factors:
        raise ConfigError("nothing to export", ["gates: found only zeros"])
    return plain_lora(factors, adapter.config)


def export_lora(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    gates: Gates,
    source: str,
    *,
    inside: Inside | None = None,
    on_progress: OnProgress = no_progress,
) -> list[str]:
    """Writes the ordinary LoRA of `fixed_gates_lora`, and a README.md.

    Args:
        adapter: the mixture.
        directory: new or empty.
        gates: {routed module: [split, expert]}.
        source: where the gates come from, for people: "uniform", "task 3", ...
        inside: where the text model is in a larger one, for a LoRA on that.
        on_progress: as there.

    Returns:
        What is lost, one line each.

    Raises:
        ConfigError: see `fixed_gates_lora`.
        CheckpointError: something is in `directory`, a module is not inside, or the disk refuses.
    """
    path = require_empty(directory)
    exported = fixed_gates_lora(adapter, gates, on_progress=on_progress)
    if inside is not None:
        inside.check(exported.features)
        exported = inside.placed(exported)
    if adapter.config.router_input == "task":
        notes = [f"The gates are fixed ({source}): exact for these tasks, and the router for all others is lost."]
    else:
        notes = [f"The router is lost: every token gets the same gates ({source}), whatever it is."]
    what = "An ordinary LoRA adapter: the experts side by side, each multiplied by a fixed gate."
    write_plain_lora(exported, path, readme("LoRA with fixed gates", what, notes, adapter.config))
    return notes


def _concatenated(
    a: np.ndarray, b: np.ndarray, gates: np.ndarray, sizes: ModuleConfig
) -> tuple[np.ndarray, np.ndarray]:
    kept = [e for e in range(sizes.num_experts) if gates[0, e] != 0]
    if sizes.shared_lora_A and kept:  # sum_e g_e s_e (B_e A) = (sum_e g_e s_e B_e) A, of rank r
        return a[0], sum(gates[0, e] * sizes.scalings[e] * b[e] for e in kept)
    rows = [a[e, : sizes.ranks[e]] for e in kept]
    columns = [gates[0, e] * sizes.scalings[e] * b[e, :, : sizes.ranks[e]] for e in kept]
    if not kept:
        return np.zeros((0, a.shape[-1])), np.zeros((b.shape[1], 0))
    return np.concatenate(rows), np.concatenate(columns, axis=1)


def _mixed_weights(
    a: np.ndarray, b: np.ndarray, gates: np.ndarray, sizes: ModuleConfig
) -> tuple[np.ndarray, np.ndarray]:
    splits = len(gates)
    a_parts = a.reshape(*a.shape[:2], splits, -1)  # [expert, rank, split, in of a split]
    b_parts = b.reshape(b.shape[0], splits, -1, b.shape[2])  # [expert, split, out of a split, rank]
    mixed_a = np.einsum("qe,erqi->rqi", gates, a_parts).reshape(a.shape[1:])
    mixed_b = np.einsum("qe,eqor->qor", gates, b_parts).reshape(b.shape[1:])
    return mixed_a, sizes.scalings[0] * mixed_b


def _check_blocks(adapter: Adapter, gates: Gates) -> None:
    """In scope ffn only sum_e g_e FFN_e = FFN_e is a LoRA."""
    if adapter.config.scope != "ffn":
        return
    first = {block_of(module): row[0] for module, row in gates.items()}
    problems = [
        f"{module}: gates {np.round(row[0], 4).tolist()}, expected one 1 and zeros, the same in the whole block"
        for module, row in gates.items()
        if row[0].max() != 1 or np.count_nonzero(row[0]) != 1 or not np.array_equal(row[0], first[block_of(module)])
    ]
    if problems:
        raise ConfigError(
            "no LoRA computes a fixed mixture of whole feed-forward blocks (scope ffn), because the activation stands "
            "between the experts and their sum; use --as lora-experts, or --as mixtral which keeps the router",
            problems,
        )
