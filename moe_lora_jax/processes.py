"""What the processes of one run agree on (`jax.distributed`). In a run of one process all of this is nothing."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_lora_interop.errors import CheckpointError, ConfigError


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several, before anything else is done with JAX. Without a coordinator it stays alone.

    Args:
        coordinator: "host:port" of the first process; "auto" asks the cluster (Slurm, Open MPI, Kubernetes, TPU pods).
        num_processes: how many there are; the cluster's business with "auto".
        process_id: which one this is, from 0.

    Raises:
        ConfigError: one of the three without the others.
        CheckpointError: the processes did not find each other.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    complete = [name for name, value in given.items() if value is not None]
    if complete != (["coordinator"] if coordinator == "auto" else [] if coordinator is None else list(given)):
        expected = "none of them, coordinator auto, or coordinator, num_processes and process_id"
        raise ConfigError("invalid arguments", [f"found {', '.join(complete)}, expected {expected}"])
    if coordinator is None:
        return
    where = {} if coordinator == "auto" else given
    try:
        jax.distributed.initialize(where.get("coordinator"), where.get("num_processes"), where.get("process_id"))  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError("the processes did not find each other", [str(error).splitlines()[0]]) from error


def is_first() -> bool:
    """Whether this is the process that writes files and talks."""
    return jax.process_index() == 0


def once(action: Callable[[], Any]) -> Any:
    """What `action`, run by the first process alone, returns (JSON values); an error of it is raised by all."""
    if jax.process_count() == 1:
        return action()
    answer, error = b"", None
    if is_first():
        try:
            answer = json.dumps({"value": action()}).encode()
        except Exception as caught:  # whatever it is, the others wait to be told; raised again below
            error = caught
            what, problems = f"{type(caught).__name__}: {caught}", tuple[str, ...]()
            if isinstance(caught, CheckpointError):
                what, problems = caught.what, caught.problems
            answer = json.dumps({"error": f"{what} (in the first process)", "problems": problems}).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int64(len(answer))))
    sent = np.frombuffer(answer, np.uint8) if is_first() else np.zeros(length, np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes())
    if error is not None:
        raise error
    if "error" in told:
        raise CheckpointError(told["error"], told["problems"])
    return told["value"]


def largest(number: int) -> int:
    """The largest that any process has; all of them must ask."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int64(number))))


def whole(array: Any) -> np.ndarray:
    """An array as numpy; one that no process has whole is gathered, and all of them must ask."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(jax.device_get(array))
