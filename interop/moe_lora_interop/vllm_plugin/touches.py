"""Every touch of vLLM's own names, which are private: what is replaced, and what it is expected to look like.

    LoRAModelManager._create_lora_modules            gives each layer its tables
    WorkerLoRAManager._load_adapter                  reads a directory of peft_type MOE_LORA
    LoRAModelManager.activate_adapter                fills the tables of the slot that an adapter gets
    BaseLinearLayerWithLoRA._apply_lora_to_output    has the gates between its two products
    bgmv_* of vllm.lora.ops.torch_ops                on a CPU: `cpu_ops`

What vLLM does with a plain LoRA stays: names are mapped, values cast, packed, split and cached by its own code. What a
GPU runs is written and compiled as one graph by a test; it was not run on a GPU.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm import envs
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from moe_lora_interop.checkpoint.detection import detect
from moe_lora_interop.checkpoint.read_write import opened
from moe_lora_interop.checkpoint.servable import TRIED
from moe_lora_interop.config.adapter_config import PEFT_TYPE
from moe_lora_interop.disk.files import CONFIG_NAME
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.vllm_plugin import cpu_ops
from moe_lora_interop.vllm_plugin.stacking import rows_of, stacked
from moe_lora_interop.vllm_plugin.tables import Gating, Tables, gated, gated_by_adapter

_EXPECTED: list[tuple[Callable[..., Any], str]] = [
    (LoRAModelManager._create_lora_modules, "self"),
    (LoRAModelManager.activate_adapter, "self lora_id"),
    (WorkerLoRAManager._load_adapter, "self lora_request"),
    (BaseLinearLayerWithLoRA._apply_lora_to_output, "self x output"),
    (PunicaWrapperBase.add_shrink, "self y x lora_a_stacked scale kwargs"),
    (PunicaWrapperBase.add_expand, "self y x lora_b_stacked output_slices offset_start add_inputs kwargs"),
    (
        LoRAModel.from_lora_tensors,
        "lora_model_id tensors peft_helper device dtype model_vocab_size weights_mapper skip_prefixes",
    ),
    (get_adapter_absolute_path, "lora_path"),
    (parse_fine_tuned_lora_name, "name weights_mapper"),
    (tensor_model_parallel_all_reduce, "input_"),
    (lora_ops.bgmv_shrink, "inputs lora_b_weights output_tensor lora_indices_tensor scaling"),
    (lora_ops.bgmv_expand, "inputs lora_b_weights output_tensor lora_indices_tensor add_inputs"),
    (
        lora_ops.bgmv_expand_slice,
        "inputs lora_b_weights output_tensor lora_indices_tensor slice_offset slice_size add_inputs",
    ),
]
_MARK = "moe_lora_plugin"


def register() -> list[str]:
    """Replaces what the module's docstring lists, once in a process; or nothing, and says why."""
    if hasattr(LoRAModelManager.activate_adapter, _MARK):
        return []
    problems = [*_misfits()]
    if not problems:
        _replace(LoRAModelManager, _create_lora_modules)
        _replace(LoRAModelManager, activate_adapter)
        _replace(WorkerLoRAManager, _load_adapter)
        BaseLinearLayerWithLoRA.moe_lora_tables = None  # of a layer that no manager has made
        _replace(BaseLinearLayerWithLoRA, _apply_lora_to_output)
        if current_platform.is_cpu():
            for op in (cpu_ops.bgmv_shrink, cpu_ops.bgmv_expand, cpu_ops.bgmv_expand_slice):
                for module in (lora_ops, punica_cpu):
                    setattr(module, op.__name__, op)
    return problems


def _misfits() -> Iterator[str]:
    """In what this vLLM is not like those tried."""
    minor = vllm.__version__.split(".")[:2]
    if minor not in [version.split(".")[:2] for version in TRIED]:
        yield f"vllm: found version {vllm.__version__}, expected one like {', '.join(TRIED)}"
    for function, expected in _EXPECTED:
        found = " ".join(inspect.signature(function).parameters)
        if found != expected:
            yield f"{function.__qualname__}: found arguments ({found}), expected ({expected})"


def _replace(owner: type, function: Callable[..., Any]) -> None:
    """`function` gets what it replaces as its first argument."""
    original = getattr(owner, function.__name__)

    @wraps(original)
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(original, self, *args, **kwargs)

    setattr(replaced, _MARK, True)
    setattr(owner, function.__name__, replaced)


# --- layers ----------------------------------------------------------------------------------------------------------


def _create_lora_modules(original: Any, manager: Any) -> None:
    """Every linear layer that takes a LoRA gets tables of no adapter; None where no mixture can be served."""
    original(manager)
    can_serve = not [*_deployment_problems(manager)]
    for layer in manager.modules.values():
        if isinstance(layer, BaseLinearLayerWithLoRA):
            slots, _, rank, _ = layer.lora_a_stacked[0].shape
            rows = rows_of(layer.lora_a_stacked[0].dtype)
            layer.moe_lora_tables = Tables(layer.n_slices, slots, rank, rows, layer.device) if can_serve else None
            layer.moe_lora_gate = _gate(layer)


def _gate(layer: Any) -> Callable[[Tensor, Tensor, Tables], Tensor]:
    """What gates A x on this layer."""
    if isinstance(layer, RowParallelLinearWithLoRA) and layer.tp_size > 1:
        return partial(gated, over_processes=tensor_model_parallel_all_reduce)
    return gated_by_adapter if current_platform.is_cpu() else gated  # on a CPU vLLM compiles nothing that has a LoRA


def _apply_lora_to_output(original: Any, layer: Any, x: Tensor, output: Tensor) -> Tensor:
    """y + B (gates * A x), y the base layer's output, into which it is added."""
    tables = layer.moe_lora_tables
    if tables is None:
        return original(layer, x, output)
    y = output.flatten(0, -2)  # the transformers backend has a batch axis
    x = x.flatten(0, -2)
    tokens, punica = x.shape[0], layer.punica_wrapper
    codes = torch.zeros(layer.n_slices, tokens, tables.owners.shape[-1], dtype=torch.float32, device=x.device)
    punica.add_shrink(codes, x, layer.lora_a_stacked, 1.0)
    codes = layer.moe_lora_gate(codes, punica._token_lora_indices[:tokens], tables)
    punica.add_expand(y, codes, layer.lora_b_stacked, layer.output_slices, add_inputs=True)
    return y.view(output.shape)


# --- adapters --------------------------------------------------------------------------------------------------------


def activate_adapter(original: Any, manager: Any, lora_id: int) -> bool:
    """Fills the tables of the adapter's slot on every layer, whatever the slot held before."""
    is_new = original(manager, lora_id)
    if is_new:
        slot = manager.lora_index_to_id.index(lora_id)
        gatings = getattr(manager._registered_adapters[lora_id], "moe_lora_gatings", {})
        for name, layer in manager.modules.items():
            if (tables := getattr(layer, "moe_lora_tables", None)) is not None:
                of_slices = [gatings.get(n, Gating()) for n in _slices(manager, name, layer)]
                tables.fill(slot, of_slices)
    return is_new


def _slices(manager: Any, name: str, layer: Any) -> list[str]:
    """The name in an adapter of each slice of a layer, which vLLM may have fused from several."""
    names = manager.packed_modules.get(name, [name])
    return names * layer.n_slices if len(names) == 1 else names


def _load_adapter(original: Any, worker: Any, lora_request: Any) -> Any:
    """Reads a mixture; leaves every other directory to vLLM."""
    path = Path(get_adapter_absolute_path(lora_request.lora_path))
    if _peft_type(path) == PEFT_TYPE:
        return _load_mixture(worker, lora_request, path)
    try:
        return original(worker, lora_request)
    except ValueError as error:
        layout = _other_layout(path)
        if layout is None:
            raise
        problem = f"layout: found {layout}, expected native; first `moe-lora convert SRC DST`"
        raise CheckpointError(f"{path}: vLLM cannot serve this adapter", [problem]) from error


def _load_mixture(worker: Any, lora_request: Any, path: Path) -> LoRAModel:
    manager, lora_config = worker._adapter_manager, worker.lora_config
    seen, key, state = worker.__dict__.setdefault("moe_lora_seen", {}), (lora_request.lora_name, path), _state(path)
    problems = [*_deployment_problems(manager)]
    if seen.get(key, state) != state:
        problems.append(_CHANGED.format(name=lora_request.lora_name))
    if problems:
        raise CheckpointError(f"{path}: vLLM cannot serve this adapter as it was started", problems)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    tensors: dict[str, Tensor] = {}
    gatings: dict[str, Gating] = {}
    with opened(path) as adapter:
        for module, (a, b, gating) in stacked(adapter, lora_config.max_lora_rank, lora_config.lora_dtype):
            stored = f"base_model.model.{module}.lora_%s.weight"
            tensors |= {stored % "A": a, stored % "B": b}
            name, _ = parse_fine_tuned_lora_name(stored % "A", mapper)
            problems += _module_problems(manager, module, name, a, b)
            gatings[name] = gating
    if len(gatings) < len(tensors) / 2:
        problems.append(f"modules: found {len(tensors) // 2} that vLLM maps to {len(gatings)} layers, expected as many")
    if problems:
        raise CheckpointError(f"{path}: the adapter does not fit {type(manager.model).__name__}", problems)
    rank = lora_config.max_lora_rank
    lora = worker._lora_model_cls.from_lora_tensors(
        lora_request.lora_int_id,
        tensors,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=adapter.modules),
        device="cpu",
        dtype=lora_config.lora_dtype,
        weights_mapper=mapper,
    )
    lora.moe_lora_gatings = gatings
    seen[key] = state
    return lora


def _peft_type(path: Path) -> Any:
    """None where vLLM itself has to say what is wrong."""
    try:
        config = json.loads((path / CONFIG_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("peft_type") if isinstance(config, dict) else None


def _other_layout(path: Path) -> str | None:
    """The layout of a mixture that is not in our own."""
    try:
        layout = detect(path)
    except (CheckpointError, ConfigError):
        return None
    return None if layout == "lora" else layout


# --- what is refused -------------------------------------------------------------------------------------------------


def _deployment_problems(manager: Any) -> Iterator[str]:
    """Why no mixture can be served by this process, as it was started."""
    if manager.lora_config.fully_sharded_loras:
        yield "--fully-sharded-loras: found true, expected false: it splits the columns that the router needs together"
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        yield "VLLM_LORA_ENABLE_DUAL_STREAM: found true, expected false: it adds deltas without the gates"
    if manager.is_pooling_model:
        yield f"model: found {type(manager.model).__name__}, which pools, expected one that generates"
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        yield f"platform: found {current_platform.device_name}, expected cpu or cuda"


# vLLM's prefix cache knows an adapter by name and path, and would take tokens of older weights for new ones
_CHANGED = (
    "{name}: found other files than when it was loaded first, expected the same; load what has changed from another "
    "path, or under another name"
)


def _state(path: Path) -> list[tuple[str, int, int]]:
    return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in path.glob("adapter_*"))


def _module_problems(manager: Any, module: str, name: str, a: Tensor, b: Tensor) -> Iterator[str]:
    """Why a module of the adapter is no layer of this model; vLLM would leave it out, or fill it with zeros."""
    fused = {n: (owner, i) for owner, names in manager.packed_modules.items() for i, n in enumerate(names)}
    owner, index = fused.get(name, (name, 0))
    layer = manager.modules.get(owner)
    if getattr(layer, "moe_lora_tables", None) is None:
        if not _is_on_another_process(manager.model, owner):
            yield f"{module}: {name} is no linear layer of this model that takes a LoRA"
        return
    if len(_slices(manager, owner, layer)) != layer.n_slices:
        yield f"{module}: vLLM cuts {owner} into {layer.n_slices} slices, expected one for each module"
        return
    base = layer.base_layer
    sizes = base.output_sizes if owner in manager.packed_modules else [base.output_size]
    found, expected = [len(b), a.shape[1]], [sizes[index], base.input_size]
    if found != expected and layer.tp_size == 1:
        yield f"{module}: the adapter is for [out, in] = {found}, the base has {expected}"


def _is_on_another_process(model: Any, name: str) -> bool:
    """Whether the layer belongs to another stage of a pipeline."""
    missing = {path for path, module in model.named_modules() if isinstance(module, PPMissingLayer)}
    return any(name.startswith(f"{path}.") for path in missing)
