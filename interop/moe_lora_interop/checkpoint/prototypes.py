"""Arrow's router rows: the direction in which each expert's delta is largest (arXiv:2405.11157)."""

import warnings

import numpy as np

from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.tensors import Canonical

DOMINANCE = 0.9  # second over first singular value; above it PEFT's 15 power iterations do not converge


def prototypes(lora_a: np.ndarray, lora_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leading right singular vectors of B_e A_e, [expert, in], and second over first singular values.

    Computed in float64 from the small factors: with B = Q R, the right singular vectors of B A are those of R A.
    The sign is free (|x.v| does not see it); it is chosen so that the largest entry is positive.

    Args:
        lora_a: [expert, rank, in].
        lora_b: [expert, out, rank].
    """
    rows, ratios = [], []
    for a, b in zip(lora_a.astype(np.float64), lora_b.astype(np.float64), strict=True):
        _, values, right = np.linalg.svd(np.linalg.qr(b, mode="r") @ a, full_matrices=False)
        row = right[0]
        rows.append(row * np.sign(row[np.argmax(np.abs(row))]))
        ratios.append(values[1] / values[0] if len(values) > 1 and values[0] > 0 else float(values[0] == 0))
    return np.stack(rows).astype(np.float32), np.asarray(ratios)


def complete_prototypes(tensors: Canonical) -> Canonical:
    """Adds router rows by exact SVD where no stored prototypes were found; warns where PEFT's differ.

    Raises:
        CheckpointError: some modules have stored prototypes and others do not, or there are values without any.
    """
    modules = [module for module, role in tensors if role == "lora_B" and _fit(tensors, module)]
    missing = [m for m in modules if (m, "router") not in tensors]
    if missing and len(missing) < len(modules):
        raise CheckpointError("the prototypes are not complete", [f"{m}: missing" for m in sorted(missing)])
    found, doubtful = dict(tensors), []
    for module in missing:
        factors = (np.asarray(tensors[module, role]) for role in ("lora_A", "lora_B"))
        try:
            found[module, "router"], ratios = prototypes(*factors)
        except np.linalg.LinAlgError:
            problem = f"{module}: values that are NaN or infinite, which have no main direction"
            raise CheckpointError("no prototypes", [problem]) from None
        doubtful += [f"{module} expert {e} ({r:.2f})" for e, r in enumerate(ratios) if r > DOMINANCE]
    if doubtful:
        warnings.warn(
            "PEFT stores no Arrow prototypes; exact ones were computed, but PEFT's 15 power iterations do not converge "
            "to them where the second singular value is near the first, so its outputs may differ there: "
            f"{', '.join(doubtful[:5])}{' ...' if doubtful[5:] else ''}. Give prototypes= if you have them",
            stacklevel=3,
        )
    return found


def _fit(tensors: Canonical, module: str) -> bool:
    """Whether the module's A and B can be multiplied; if not, it is said of them and not of their prototypes."""
    a, b = (tensors[module, role].shape if (module, role) in tensors else () for role in ("lora_A", "lora_B"))
    return len(a) == len(b) == 3 and a[:2] == (b[0], b[2]) and 0 not in (*a, *b)
