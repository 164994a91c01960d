"""NVIDIA GPUs as XLA's compiler knows them: the numbers that it asks of a GPU, for some that are not here."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """name: JAX's word for it. bytes: its memory. bandwidth: of that, bytes a second."""

    name: str
    bytes: int
    bandwidth: int


# Source: openxla/xla, xla/backends/gpu/target_config/specs (h100_sxm, h200). They differ in nothing else.
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84942979072, 3352320000000),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 151397597184, 4800000000000),
}
SHARE = 0.75
"""Of a GPU's memory, what JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""

_HOPPER = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}


def target_config(gpu: Gpu) -> str:
    """The text of a `GpuTargetConfigProto`: sm_90, CUDA 12.8, cuDNN 9.8."""
    numbers = {**_HOPPER, "device_memory_size": gpu.bytes, "memory_bandwidth": gpu.bandwidth}
    device = " ".join(f"{name}: {number}" for name, number in numbers.items())
    return (
        f"gpu_device_info {{ {device} cuda_compute_capability {{ major: 9 }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }} '
        f'device_description_str: "{gpu.name}"'
    )
