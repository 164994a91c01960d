"""Mixture-of-LoRA-experts fine-tuning in Flax NNX: apply, train, save, load."""

from typing import TYPE_CHECKING, Any

from moe_lora_interop import __version__ as __version__
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax.adapters.adapter_bank import AdapterBank, select_adapters
from moe_lora_jax.adapters.apply import apply_moe_lora, remove_moe_lora
from moe_lora_jax.adapters.checkpoint import combine, load_adapter, save_pretrained, to_adapter
from moe_lora_jax.adapters.filters import experts_only, router_only
from moe_lora_jax.adapters.model_spec import ModelSpec
from moe_lora_jax.adapters.parameter_summary import summary
from moe_lora_jax.layers.gating import RouterOutput
from moe_lora_jax.layers.linear import MoeLoraLinear
from moe_lora_jax.layers.linear_maps import LinearMap
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.router import Router
from moe_lora_jax.models import CausalLM, abstract_base_model, generate, load_base_model
from moe_lora_jax.models.quantized import quantize_base
from moe_lora_jax.sharding import make_mesh

if TYPE_CHECKING:
    from moe_lora_jax.measure.comparison import compare
    from moe_lora_jax.report import plot_router, plot_tokens

__all__ = [
    "AdapterBank",
    "CausalLM",
    "LinearMap",
    "ModelSpec",
    "MoeLoraConfig",
    "MoeLoraLinear",
    "MoeLoraParam",
    "Router",
    "RouterOutput",
    "abstract_base_model",
    "apply_moe_lora",
    "combine",
    "compare",
    "experts_only",
    "generate",
    "load_adapter",
    "load_base_model",
    "make_mesh",
    "plot_router",
    "plot_tokens",
    "quantize_base",
    "remove_moe_lora",
    "router_only",
    "save_pretrained",
    "select_adapters",
    "summary",
    "to_adapter",
]


def __getattr__(name: str) -> Any:
    """The names that need more than the extra `jax`: imported when they are asked for."""
    try:
        match name:
            case "compare":
                from moe_lora_jax.measure.comparison import compare

                return compare
            case "plot_router" | "plot_tokens":
                from moe_lora_jax import report

                return getattr(report, name)
    except ModuleNotFoundError as error:
        needed = str(error.name).partition(".")[0]
        raise ImportError(f"{name} needs {needed}: pip install 'moe-lora-jax[report]'") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
