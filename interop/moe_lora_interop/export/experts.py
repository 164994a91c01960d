"""One ordinary LoRA directory per expert."""

import os

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.disk.atomic import require_empty, write_text
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.export.inside import Inside
from moe_lora_interop.export.plain_lora import Factors, plain_lora, write_plain_lora
from moe_lora_interop.export.readme import readme
from moe_lora_interop.progress import OnProgress, no_progress, tracked


def expert_lora(adapter: Adapter, expert: int) -> Adapter:
    """Expert `expert` alone: s_e B_e A_e on every module that has such an expert, unpadded, values unchanged.

    A module without a router (plain LoRA) belongs to every expert, and so does a shared A.
    """
    factors = {}
    for module, sizes in adapter.config.for_modules(adapter.modules).items():
        index = expert if sizes.has_router else 0
        if index >= sizes.num_experts:
            continue
        rank = sizes.ranks[index]
        a = np.asarray(adapter.tensors[module, "lora_A"][0 if sizes.shared_lora_A else index, :rank])
        b = np.asarray(adapter.tensors[module, "lora_B"][index, :, :rank])
        factors[module] = Factors(a, b, sizes.alphas[index])
    return plain_lora(factors, adapter.config, use_rslora=adapter.config.use_rslora)


def expert_notes(adapter: Adapter) -> list[str]:
    """What the directories do not say of the mixture, one line each."""
    config = adapter.config
    counts = {m: s.num_experts for m, s in config.for_modules(adapter.routed).items()}
    notes = ["The router is lost: each directory is one expert alone, as if it were always chosen with weight 1."]
    if plain := [m for m in adapter.modules if m not in counts]:
        notes.append(f"Plain LoRA on {len(plain)} modules (e.g. {plain[0]}) has no router; it is in every directory.")
    if len(set(counts.values())) > 1:
        notes.append(
            f"The modules have {min(counts.values())} to {max(counts.values())} experts: "
            "a directory leaves out the modules that have no expert of its number."
        )
    if config.routed_scaling_factor != 1:
        notes.append(f"routed_scaling_factor {config.routed_scaling_factor:g} is not applied.")
    if config.mix == "weights":
        notes.append("The mixture averages A and B before they are multiplied; it is not a sum of these directories.")
    if config.scope == "ffn":
        notes.append("The mixture averages outputs of whole feed-forward blocks; it is not a sum of these directories.")
    return notes


def export_lora_experts(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    *,
    inside: Inside | None = None,
    on_progress: OnProgress = no_progress,
) -> list[str]:
    """Writes DIRECTORY/expert_0, expert_1, ...: ordinary LoRA directories that stock PEFT loads, and a README.md.

    Args:
        adapter: the mixture.
        directory: new or empty.
        inside: where the text model is in a larger one, for LoRAs on that.
        on_progress: called with (done, total) in experts written.

    Returns:
        What is lost, one line each.

    Raises:
        CheckpointError: something is in `directory`, an expert has nothing to write, a module is not inside, or the
            disk refuses.
    """
    path, notes, config = require_empty(directory), expert_notes(adapter), adapter.config
    if config.modules_to_save:
        raise CheckpointError(
            "cannot be exported", [f"modules_to_save: found {config.modules_to_save}, expected null: not in the file"]
        )
    if inside is not None:
        inside.check(adapter.features)
    number = max(sizes.num_experts for sizes in config.for_modules(adapter.modules).values())
    for expert in tracked(range(number), on_progress):
        what = f"Expert {expert} of {number}, an ordinary LoRA adapter."
        text = readme(f"LoRA expert {expert}", what, notes, config)
        exported = expert_lora(adapter, expert)
        exported = exported if inside is None else inside.placed(exported)
        write_plain_lora(exported, path / f"expert_{expert}", text)
    what = f"Folders expert_0 to expert_{number - 1}: ordinary LoRA adapters, one per expert."
    write_text(path / "README.md", readme("LoRA experts", what, notes, config))
    return notes
