"""Checkpoints of a run, with orbax: everything that a bit-identical continuation needs."""

import json
import logging
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from xxhash import xxh3_128

from moe_lora_interop.memory import is_out_of_memory
from moe_lora_jax.processes import once, whole
from moe_lora_jax.sharding import mesh_of, replicated
from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.step import TrainState

logger = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """The moment after a step: its number, the state, the rest of the adapter, and the position in the data."""

    step: int
    state: TrainState
    adapter: nnx.State
    position: dict[str, Any]


class Checkpoints:
    """The newest `keep` snapshots in a directory. A checkpoint that was not finished does not count.

    The arrays are stored flat, {path in the snapshot: array}: readable names, and no list index turns into a string.
    """

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory.absolute(), item_handlers=handlers, options=options)

    def close(self) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint, unless there is one of this step, and removes the oldest ones."""
        if snapshot.step == self.latest:
            return
        arrays = _flatten(snapshot)
        position = {"data": snapshot.position, "digest": _digest(snapshot.step, arrays, snapshot.position)}
        parts = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), position=ocp.args.JsonSave(position))
        self._manager.save(snapshot.step, args=parts)

    def restore(self, like: Snapshot) -> Snapshot:
        """The newest snapshot that is not damaged, in the structure of `like` and where its arrays are.

        Newer ones that are damaged are moved to folders `damaged-STEP-*` beside the checkpoints, with a warning.

        Raises:
            TrainingError: there is none, all are damaged, or it holds other arrays (each is listed).
        """
        directory, wanted = Path(self._manager.directory), _flatten(like)
        damage: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                arrays, position = self._read(step, wanted)
                break
            except Exception as error:  # orbax raises Exception itself, and for some flipped bits AttributeError
                if is_out_of_memory(error):  # that is no damage
                    raise
                damage[step] = f"{directory / str(step)}: {_first_line(error)}"
        else:
            if not damage:
                raise TrainingError("nothing to resume", [f"{directory}: no checkpoint"])
            raise TrainingError("damaged checkpoint", list(damage.values()))
        problems = [f"{name}: missing" for name in wanted if name not in arrays]
        problems += [f"{name}: unexpected" for name in arrays if name not in wanted]
        problems += [
            f"{name}: found {arrays[name].dtype}{arrays[name].shape}, expected {array.dtype}{array.shape}"
            for name, array in wanted.items()
            if name in arrays and (arrays[name].shape, arrays[name].dtype) != (array.shape, array.dtype)
        ]
        if problems:
            raise TrainingError("the checkpoint is of another run", problems)
        for bad, reason in damage.items():
            aside = once(partial(_set_aside, directory / str(bad)))
            logger.warning("damaged checkpoint, resuming from step %d before it: %s; moved to %s", step, reason, aside)
        if damage:
            self._manager.reload()
        return _unflatten(like, arrays)._replace(step=step, position=position)

    def _read(self, step: int, like: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The arrays, each where the one of its name in `like` is: the run may have been on another mesh before."""
        mesh = mesh_of(like)
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else replicated(mesh)
        target = {
            name: jax.ShapeDtypeStruct(
                found.shape, found.dtype, sharding=_fitting(like.get(name), found.shape) or default
            )
            for name, found in self._manager.item_metadata(step)["arrays"].items()
        }
        parts = ocp.args.Composite(arrays=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore())
        stored = self._manager.restore(step, args=parts)
        arrays, position = stored["arrays"], stored["position"]
        expected, found = position["digest"], _digest(step, arrays, position["data"])
        if expected != found:
            raise ValueError(f"digest: the checkpoint says {expected}, its content gives {found}")
        return arrays, position["data"]


def _fitting(array: jax.Array | None, shape: tuple[int, ...]) -> Any:
    return None if array is None or array.shape != shape else array.sharding


def _set_aside(checkpoint: Path) -> str:
    aside = tempfile.mkdtemp(prefix=f"damaged-{checkpoint.name}-", dir=checkpoint.parent.parent)
    os.rename(checkpoint, aside)
    return aside


def _digest(step: int, arrays: dict[str, jax.Array], position: dict[str, Any]) -> str:
    """xxh3-128 over everything in a checkpoint: orbax does not notice every flipped bit."""
    described = [[name, str(array.dtype), list(array.shape)] for name, array in sorted(arrays.items())]
    state = xxh3_128(json.dumps([step, position, described], sort_keys=True).encode())
    for _, array in sorted(arrays.items()):
        state.update(np.ascontiguousarray(whole(array)).reshape(-1).view(np.uint8).data)
    return f"xxh3-128:{state.hexdigest()}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _flatten(snapshot: Snapshot) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): _raw(leaf) for path, leaf in _leaves(snapshot)}


def _unflatten(like: Snapshot, arrays: dict[str, jax.Array]) -> Snapshot:
    leaves, tree = jax.tree_util.tree_flatten_with_path((like.state, like.adapter))
    values = []
    for path, leaf in leaves:
        value = jnp.asarray(arrays[jax.tree_util.keystr(path)])
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        values.append(jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if is_key else value)
    state, adapter = jax.tree_util.tree_unflatten(tree, values)
    return like._replace(state=state, adapter=adapter)


def _leaves(snapshot: Snapshot) -> list[tuple[Any, jax.Array]]:
    return jax.tree_util.tree_flatten_with_path((snapshot.state, snapshot.adapter))[0]


def _raw(leaf: jax.Array) -> jax.Array:
    """Random keys as plain integers: what orbax writes."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
