"""How alike the experts of a module are."""

from collections.abc import Mapping

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter


def delta_similarity(adapter: Adapter) -> Mapping[str, np.ndarray]:
    """{module: [expert, expert]}, the cosine between what two experts add to the weight: B_e A_e and B_f A_f.

    With the Frobenius product <X, Y> = sum_ij X_ij Y_ij, and sizes that never exceed (expert rank)^2:

        <B_e A_e, B_f A_f> = sum_rs (B_e^T B_f)_rs (A_e A_f^T)_rs

    The scaling of an expert is positive and drops out. An expert whose delta is zero (untrained) has NaN with all
    others. Modules with one expert are left out.
    """
    found = {}
    for module in adapter.modules:
        a, b = (np.asarray(adapter.tensors[module, role], np.float32) for role in ("lora_A", "lora_B"))
        experts, out, rank = b.shape
        if experts > 1:
            a = np.broadcast_to(a, (experts, rank, a.shape[2])).reshape(experts * rank, -1)
            b = b.transpose(0, 2, 1).reshape(experts * rank, out)
            terms = ((a @ a.T) * (b @ b.T)).reshape(experts, rank, experts, rank)
            products = terms.sum(axis=(1, 3), dtype=np.float64)
            norms = np.sqrt(np.diagonal(products))
            with np.errstate(invalid="ignore"):
                found[module] = products / np.outer(norms, norms)
    return found


def mean_pairs(similarity: np.ndarray) -> float:
    """The mean over pairs of different experts; NaN if none of them has a value."""
    pairs = similarity[~np.eye(len(similarity), dtype=bool)]
    return float(np.nanmean(pairs)) if np.isfinite(pairs).any() else np.nan
