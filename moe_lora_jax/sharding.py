"""Where a model's variables lie on a mesh of devices. How to compute with them there is XLA's business (GSPMD).

The axes of a mesh have names that say what is spread over them: "data" the rows of a batch, "fsdp" the rows and every
weight, "tensor" the weights' heads and hidden units, "expert" the experts. A mesh has those of them that it wants.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_lora_interop.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "expert")
BATCH_AXES = ("data", "fsdp")

Rules = Sequence[tuple[str, PartitionSpec]]
"""Pairs (pattern of a variable's dotted path, where its axes go). The first that fits counts; without one, every device
holds the whole variable. Axes that the mesh lacks are left out."""

RULES: Rules = (
    (r"model\.embed_tokens\.embedding", PartitionSpec("tensor", "fsdp")),
    (r"lm_head\.kernel", PartitionSpec("fsdp", "tensor")),
    (r".*\.(q|k|v|gate|up)_proj\.kernel", PartitionSpec("fsdp", "tensor")),
    (r".*\.(q|k|v|gate|up)_proj\.bias", PartitionSpec("tensor")),
    (r".*\.(o|down)_proj\.kernel", PartitionSpec("tensor", "fsdp")),
    # "tensor" would cut through q, k and v that one kernel makes, and devices would exchange activations
    (r".*\.(qkv|gate_up)_proj\.kernel", PartitionSpec("fsdp")),
)


FEATURES = {("lora_a", 3): 2, ("lora_b", 3): 2, ("kernel", 2): 0, ("kernels", 2): 0, ("threshold_kernel", 1): 0}
"""{(name, axes) of an adapter's variable: which axis is as long as the model is wide}: `in`, but `out` of B."""


def make_mesh(sizes: Mapping[str, int], *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes, e.g. {"data": 2, "fsdp": 4}; or of the devices given.

    Args:
        sizes: {axis: into how many parts}.
        devices: those to use, for example of a topology that a program is compiled for (`compiled.topology`).

    Raises:
        ConfigError: an unknown axis, or sizes whose product is not the number of devices.
    """
    problems = [f"axis: found {name!r}, expected some of {', '.join(AXES)}" for name in sizes if name not in AXES]
    product, count = math.prod(sizes.values()), jax.device_count() if devices is None else len(devices)
    if product != count or min(sizes.values(), default=1) < 1:
        problems.append(f"sizes: found {dict(sizes)}, expected numbers whose product is that of devices, {count}")
    if problems:
        raise ConfigError("no such mesh", problems)
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh, with axes over which XLA decides how to compute (`jax.make_mesh` makes "explicit" ones)."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def shardings(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, rules: Rules) -> dict[str, NamedSharding]:
    """{dotted path: its sharding} for variables of these shapes.

    Raises:
        ConfigError: axes that do not divide into as many parts as the mesh wants; all of them.
    """
    found, problems = {}, []
    for path, shape in shapes.items():
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), PartitionSpec())
        if len(spec) > len(shape):
            problems.append(f"{path}: found shape {shape}, expected as many axes as in its rule {spec}")
            continue
        names = [_on(mesh, entry) for entry in spec]
        for size, entry in zip(shape, names, strict=False):
            parts = math.prod(mesh.shape[name] for name in entry)
            if size % parts:
                problems.append(
                    f"{path}: found {size} in shape {shape}, expected a multiple of {' x '.join(entry)} = {parts}"
                )
        found[path] = NamedSharding(mesh, PartitionSpec(*(entry or None for entry in names)))
    if problems:
        raise ConfigError("the mesh does not fit the model; other rules may leave an axis whole", problems)
    return found


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which a tree's arrays (or a model's variables) lie; None if they are on one device."""
    leaves = jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    found = (getattr(leaf, "sharding", None) for leaf in leaves)
    return next((s.mesh for s in found if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)


def row_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows of a batch over "data" and "fsdp"; `axis` is theirs."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, _on(mesh, BATCH_AXES) or None))


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch go."""
    return math.prod(mesh.shape[name] for name in _on(mesh, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def is_abstract(tree: Any) -> bool:
    """Whether a tree (or a model) has shapes, `jax.ShapeDtypeStruct`, in place of arrays."""
    leaves = jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def put(value: Any, sharding: NamedSharding) -> Any:
    """An array that every process has whole, on the mesh: each device gets its part. Of a shape, the shape there."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(value), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def put_like(value: np.ndarray, array: jax.Array) -> jax.Array:
    """An array that every process has whole, where `array` is."""
    sharding = array.sharding
    return put(value, sharding) if isinstance(sharding, NamedSharding) else jax.numpy.asarray(value)


def put_rest(tree: Any, mesh: Mesh) -> Any:
    """The tree with what is not on the mesh yet whole on every device."""
    whole = replicated(mesh)
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf.sharding, NamedSharding) else put(leaf, whole), tree)


def put_rows(tree: Any, mesh: Mesh | None, axis: int = 0) -> Any:
    """Batches of numpy arrays with their rows spread over the mesh; as they are without one."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda rows: put(rows, row_sharding(mesh, axis)), tree)


def place_adapter(model: nnx.Module) -> None:
    """Puts an adapter, and every other variable that is not there yet, on the mesh of the base model's variables.

    The features `in` of A [expert, rank, in] and of a router's kernel [in, logit], and `out` of B [expert, rank, out],
    lie as the axis of that name of the layer's kernel [in, out] does, and over "fsdp" too. What is left of "fsdp" and
    "tensor" goes to the rank of A and B: there XLA gathers the small factor when it is due, while with "tensor" on
    features that the kernel has whole the devices would exchange activations. Experts go over "expert". An axis that
    does not divide a size is left out. The rest (biases, task tables, RNG streams) is whole on every device.
    """
    mesh = mesh_of(model)
    if mesh is None:
        return
    flat = nnx.to_flat_state(nnx.state(model))
    specs = {path: variable.get_value().sharding.spec for path, variable in flat if _is_placed(variable)}
    placed = [
        (path, v if _is_placed(v) else v.replace(put(v.get_value(), _beside(path, v, specs, mesh)))) for path, v in flat
    ]
    nnx.update(model, nnx.from_flat_state(placed))


def _beside(path: tuple[Any, ...], variable: Any, specs: Mapping[Any, PartitionSpec], mesh: Mesh) -> NamedSharding:
    """Where a variable goes that is not on the mesh yet."""
    if not _has_features(path, variable):
        return replicated(mesh)
    layer = path[:-2] if path[-2:-1] == ("router",) else path[:-1]
    kernels = ((*layer, *["base_layer"] * n, "kernel", *codes) for n in (1, 2) for codes in ((), ("codes",)))
    spec = next((specs[kernel] for kernel in kernels if kernel in specs), PartitionSpec())
    return _spread(path, variable, (*_own(path, spec, mesh), "fsdp"), mesh)


def when_due(path: tuple[Any, ...], variable: Any, mesh: Mesh) -> NamedSharding | None:
    """Where a variable of a layer of `models.Decoder` is gathered to when the layer runs: `RULES` without "fsdp".

    Left to itself, XLA would multiply by an adapter's parts one after the other as they arrive. That pays for large
    weights only.
    """
    if "fsdp" not in mesh.axis_names or not _has_features(path, variable):
        return None
    kernel = ".".join(str(part) for part in path[:-1] if part not in ("base_layer", "router")) + ".kernel"
    spec = _rule(kernel)
    return _spread(path, variable, [axis for axis in _own(path, spec, mesh) if axis != "fsdp"], mesh)


def base_when_due(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The same for a base weight of this dotted path that is used several times: XLA would gather it each time."""
    entries = [[axis for axis in _on(mesh, entry) if axis != "fsdp"] for entry in _rule(name)]
    axes = [dividing(size, entry, mesh) or None for size, entry in zip(shape, entries, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*axes))


def _rule(name: str) -> PartitionSpec:
    return next((spec for pattern, spec in RULES if re.fullmatch(pattern, name)), PartitionSpec())


def _spread(path: tuple[Any, ...], variable: Any, axes: Sequence[str], mesh: Mesh) -> NamedSharding:
    """Features over these axes; see `place_adapter`."""
    where: list[tuple[str, ...]] = [()] * variable.ndim
    features = FEATURES[_name(path), variable.ndim]
    where[features] = dividing(variable.shape[features], axes, mesh)
    if variable.ndim == 3:
        where[0] = dividing(variable.shape[0], ("expert",), mesh)
        if "fsdp" in axes and variable.shape[0] > 1:  # one expert's rank would be summed over devices, not gathered
            left = [axis for axis in ("fsdp", "tensor") if axis not in where[features]]
            where[1] = dividing(variable.shape[1], left, mesh)
    return NamedSharding(mesh, PartitionSpec(*(entry or None for entry in where)))


def _own(path: tuple[Any, ...], kernel: PartitionSpec, mesh: Mesh) -> tuple[str, ...]:
    """The mesh's axes over which the kernel [in, out] has the features of a variable beside it."""
    return _on(mesh, (*kernel, None, None)[int(_name(path) == "lora_b")])


def _has_features(path: tuple[Any, ...], variable: Any) -> bool:
    return isinstance(variable, nnx.LoRAParam) and (_name(path), variable.ndim) in FEATURES


def _name(path: tuple[Any, ...]) -> Any:
    return path[-1] if isinstance(path[-1], str) else path[-2]  # a model router's kernels are a list


def dividing(size: int, axes: Iterable[str], mesh: Mesh) -> tuple[str, ...]:
    """The axes over which `size` can be spread: in this order, each that the mesh has and that still divides it."""
    chosen: tuple[str, ...] = ()
    for axis in dict.fromkeys(axes):
        if axis in mesh.axis_names and size % math.prod(mesh.shape[name] for name in (*chosen, axis)) == 0:
            chosen += (axis,)
    return chosen


def _is_placed(variable: Any) -> bool:
    return isinstance(variable.get_value().sharding, NamedSharding)


def _on(mesh: Mesh, entry: Any) -> tuple[str, ...]:
    """The names of a spec's entry that the mesh has."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    return tuple(name for name in names if name in mesh.axis_names)


Read = Callable[[tuple[slice, ...]], np.ndarray]


def read_sharded(shape: tuple[int, ...], sharding: NamedSharding, read: Read) -> jax.Array:
    """An array whose devices get what `read` returns for their part; no part is read twice."""
    parts: dict[Any, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part)
