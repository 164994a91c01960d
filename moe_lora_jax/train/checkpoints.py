"""Checkpoints of a run, with orbax: everything that a bit-identical continuation needs."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.step import TrainState


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
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

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
        parts = ocp.args.Composite(
            arrays=ocp.args.StandardSave(_flatten(snapshot)), position=ocp.args.JsonSave(snapshot.position)
        )
        self._manager.save(snapshot.step, args=parts)

    def restore(self, like: Snapshot) -> Snapshot:
        """The newest snapshot, in the structure of `like`.

        Raises:
            TrainingError: there is none, it is damaged, or it holds other arrays (each is listed).
        """
        if self.latest is None:
            raise TrainingError("nothing to resume", [f"{self._manager.directory}: no checkpoint"])
        wanted = _flatten(like)
        try:
            stored = self._manager.restore(
                self.latest,
                args=ocp.args.Composite(arrays=ocp.args.StandardRestore(), position=ocp.args.JsonRestore()),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            where = self._manager.directory / str(self.latest)
            problems = [f"{where}: {error}", "remove that folder to resume from the checkpoint before it"]
            raise TrainingError("damaged checkpoint", problems) from error
        arrays = stored["arrays"]
        problems = [f"{name}: missing" for name in wanted if name not in arrays]
        problems += [f"{name}: unexpected" for name in arrays if name not in wanted]
        problems += [
            f"{name}: found {arrays[name].dtype}{arrays[name].shape}, expected {array.dtype}{array.shape}"
            for name, array in wanted.items()
            if name in arrays and (arrays[name].shape, arrays[name].dtype) != (array.shape, array.dtype)
        ]
        if problems:
            raise TrainingError("the checkpoint is of another run", problems)
        return _unflatten(like, arrays)._replace(step=self.latest, position=stored["position"])


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
