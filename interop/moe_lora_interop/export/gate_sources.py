"""Where fixed gates come from: equal ones, or a JSON file. (Those of a task: `task_gates`.)"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.config.modules import block_of
from moe_lora_interop.errors import CheckpointError, ConfigError

Gates = dict[str, np.ndarray]
"""{routed module: [split, expert]}, as the experts are weighted: routed_scaling_factor included."""


def uniform_gates(adapter: Adapter) -> Gates:
    """1 / E for every expert, times routed_scaling_factor."""
    config = adapter.config
    sizes = {m: (config.n_splits, of.num_experts) for m, of in config.for_modules(adapter.routed).items()}
    return {m: np.full(size, config.routed_scaling_factor / size[1]) for m, size in sizes.items()}


def gates_from_file(adapter: Adapter, path: str | os.PathLike[str]) -> Gates:
    """Gates from a JSON file: one list for all modules, or {module: list}.

    A list has one number per expert; with n_splits it may be a list of such lists. A module's key is its path, that of
    its feed-forward block, or "model" for all modules.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: modules without gates, keys that name no module, lists of the wrong length; all listed.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("cannot read the gates", [f"{path}: {error}"]) from error
    return gates_of(adapter, data)


def gates_of(adapter: Adapter, data: Any) -> Gates:
    """The same from the content of such a file."""
    if isinstance(data, list):
        data = {"model": data}
    if not isinstance(data, Mapping):
        raise ConfigError("invalid gates", [f"found {type(data).__name__}, expected a list or an object"])
    routed, problems, gates, used = adapter.routed, [], {}, set()
    for module in routed:
        key = next((k for k in (module, block_of(module), "model") if k in data), None)
        if key is None:
            problems.append(f"{module}: no gates")
            continue
        used.add(key)
        shape = (adapter.config.n_splits, adapter.config.for_module(module).num_experts)
        value = _array(data[key])
        if value is None or value.shape not in (shape, shape[1:]):
            problems.append(f"{module}: found {data[key]!r}, expected {shape[1]} finite numbers, one per expert")
        else:
            gates[module] = np.broadcast_to(value, shape)
    problems += [f"{key}: names no module with a router" for key in data if key not in used]
    if problems:
        raise ConfigError("the gates do not fit the adapter", problems)
    return gates


def _array(value: Any) -> np.ndarray | None:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    numbers = [x for row in rows for x in (row if isinstance(row, list) else [None])]
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in numbers):
        return None
    if len({len(row) for row in rows}) != 1:
        return None
    return np.asarray(value, np.float64)
