"""Devices to compile for on any Linux machine, by words: TPU topologies as Google names them, "v5e:4x4"; "h100:8"."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.experimental import topologies

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.compiled.gpus import GPUS, SHARE, target_config

# Read when libtpu starts. It need not ask Google Cloud which machine this is, nor complain that it cannot know, and
# several processes may have a libtpu: no chip is opened here.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # whatever it is, the topology counts
}


class _Generation(NamedTuple):
    """JAX's word for a chip; how many axes a topology has; and GiB that a program can have on one chip: the "available
    HBM" of libtpu 0.0.42's refusals."""

    kind: str
    axes: int
    hbm: float
    examples: str


GENERATIONS = {
    "v5e": _Generation("TPU v5 lite", 2, 15.75, "v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4, v5e:8x8"),
    "v6e": _Generation("TPU v6 lite", 2, 31.25, "v6e:1x1, v6e:2x2, v6e:2x4, v6e:4x4, v6e:8x8"),
    "v5p": _Generation("TPU v5", 3, 95.74, "v5p:1x1x1, v5p:2x2x1, v5p:2x2x2, v5p:2x2x4, v5p:4x4x4"),
}


@dataclass(frozen=True)
class Topology:
    """Chips or GPUs to compile for; none of them needs to exist.

    name: as given, e.g. "v5e:4x4".
    devices: what `make_mesh(sizes, devices=...)` takes.
    """

    name: str
    devices: tuple[jax.Device, ...]


def topology(name: str) -> Topology:
    """The devices that a word stands for.

    Args:
        name: TPU generation and chips along each axis: "v5e:4x4", "v6e:1x1", "v5p:2x2x4"; or GPUs of one host,
            "h100:8", or of several, hosts x GPUs: "h200:2x8".

    Raises:
        ConfigError: no such topology, with those that there are; or its compiler is not installed.
    """
    kind, _, words = name.partition(":")
    sizes = [int(size) for size in words.split("x") if size.isascii() and size.isdigit()]
    axes = (GENERATIONS[kind].axes,) if kind in GENERATIONS else (1, 2) if kind in GPUS else ()
    if len(sizes) not in axes or "x".join(map(str, sizes)) != words or 0 in sizes:
        raise _unknown(name)
    try:
        return Topology(name, tuple((_gpus if kind in GPUS else _tpus)(name, sizes)))
    except jax.errors.JaxRuntimeError as error:
        raise _unknown(name) from error


def _tpus(name: str, sizes: Sequence[int]) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        problem = "libtpu: found none, expected the TPU's compiler: pip install 'moe-lora-jax[plan]'"
        raise ConfigError(f"cannot compile for {name}", [problem])
    # Chips that share a host, 2x2 where there are as many: which process has which chip. It changes no program.
    hosts = tuple(math.gcd(size, 2) for size in sizes[:2]) + (1,)
    with _environment():
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=hosts, num_slices=1
        )
    return found.devices


def _gpus(name: str, sizes: Sequence[int]) -> Sequence[jax.Device]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        problem = "jax_cuda12_plugin: found none, expected the GPU's compiler: pip install 'moe-lora-jax[plan-gpu]'"
        raise ConfigError(f"cannot compile for {name}", [problem])
    jax.devices("cpu")  # JAX finds its plugins when a backend starts
    hosts, each = ([1] + list(sizes))[-2:]
    config = target_config(GPUS[name.partition(":")[0]])
    layout = f"1x{hosts}x{each}"
    found = topologies.get_topology_desc(platform="cuda", topology_name=name, target_config=config, topology=layout)
    return found.devices


def usable_bytes(device: jax.Device) -> int:
    """The memory of a device that one program can have; of a GPU, what JAX takes by default (`gpus.SHARE`).

    Raises:
        ConfigError: a kind of device that is not known here.
    """
    known = {generation.kind: int(generation.hbm * 2**30) for generation in GENERATIONS.values()}
    known |= {gpu.name: int(SHARE * gpu.bytes) for gpu in GPUS.values()}
    if device.device_kind not in known:
        problem = f"device: found {device.device_kind!r}, expected one of {', '.join(known)}"
        raise ConfigError("cannot tell how much memory there is", [problem])
    return known[device.device_kind]


def _unknown(name: str) -> ConfigError:
    examples = [generation.examples for generation in GENERATIONS.values()] + [f"{gpu}:8" for gpu in GPUS]
    return ConfigError("no such topology", [f"topology: found {name!r}, expected one like {'; '.join(examples)}"])


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Those variables, where they are not set, for as long as libtpu starts."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
