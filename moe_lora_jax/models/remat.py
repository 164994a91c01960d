"""What of a layer is kept for the backward pass, where the rest is computed again: MaxText's policies, by their names.

The products of a layer are named as there (`jax.ad_checkpoint.checkpoint_name`): query_proj, key_proj, value_proj,
context (what attention mixed), out_proj, mlpwi_0 (gate), mlpwi_1 (up), mlpwo (down). With an adapter, each is what the
layer and its adapter give together; where whole blocks are experts, what each of them gives.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

Remat = Literal[
    "none",
    "full",
    "save_out_proj",
    "save_qkv_proj",
    "save_dot_except_mlp",
    "minimal",
    "minimal_with_context",
    "qkv_proj_offloaded",
    "minimal_offloaded",
]

_QKV = ("query_proj", "key_proj", "value_proj")
_PRODUCTS = (*_QKV, "out_proj", "mlpwi_0", "mlpwi_1", "mlpwo")
KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "save_out_proj": ("out_proj",),
    "save_qkv_proj": _QKV,
    "save_dot_except_mlp": (*_QKV, "out_proj"),
    "minimal": _PRODUCTS,
    "minimal_with_context": (*_PRODUCTS, "context"),
}
"""{policy: what it keeps beside a layer's input}. "none" computes nothing again."""
OFFLOADED: dict[str, tuple[str, ...]] = {"qkv_proj_offloaded": _QKV, "minimal_offloaded": _PRODUCTS}
"""The same for those that keep it in the host's memory."""


def checked(remat: str | None, *, scan_layers: bool) -> str:
    """The policy's name. None: those who scan have large models, and want "full"; without a scan it is "none".

    Raises:
        ValueError: no such policy.
    """
    if remat is None:
        return "full" if scan_layers else "none"
    if remat not in get_args(Remat):
        raise ValueError(f"remat: found {remat!r}, expected None or one of {', '.join(get_args(Remat))}")
    return remat


def with_remat(function: Callable[..., Any], remat: str, *, prevent_cse: bool) -> Callable[..., Any]:
    """The function, computed again in its backward pass as the policy says."""
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    if remat in OFFLOADED:
        names: dict[str, Any] = {"names_which_can_be_saved": [], "names_which_can_be_offloaded": OFFLOADED[remat]}
        policy = policies.save_and_offload_only_these_names(**names, offload_src="device", offload_dst="pinned_host")
    else:
        policy = policies.save_only_these_names(*KEPT[remat])
    return jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)
