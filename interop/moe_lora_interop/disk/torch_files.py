"""Other projects' `adapter_model.bin`: torch's own file format, read without executing anything it contains.

torch is imported only when such a file is met; `weights_only=True` refuses every pickle that is more than tensors.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_lora_interop.disk import files, limits
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError


def read(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of a state dict; bfloat16 bit for bit.

    Raises:
        CheckpointError: torch is not installed, or the file is damaged or holds more than tensors.
    """
    torch = _torch(path)
    try:
        with files.opened(path, ".bin file") as file:
            size = os.fstat(file.fileno()).st_size
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    limits.check_archive(archive, size)
            file.seek(0)
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError ... for damaged files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError("unreadable .bin file", [f"{path}: {reason}"]) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
    ):
        raise CheckpointError("unreadable .bin file", [f"{path}: found more than named tensors"])
    wrong = [
        f"{n}: {t.layout} {t.dtype} on {t.device}, expected plain float32, bfloat16 or float16 values"
        for n, t in loaded.items()
        if t.dtype not in _dtypes(torch) or t.layout != torch.strided or t.device.type != "cpu"
    ]
    in_memory = sum(t.numel() * t.itemsize for t in loaded.values() if not wrong)
    if limits.is_inflated(in_memory, size):  # views with stride 0 of a small storage
        wrong = [f"tensors of {in_memory} bytes in a file of {size}"]
    if wrong:
        raise CheckpointError(f"unsupported tensors in {path}", wrong)
    return {name: _to_numpy(torch, tensor) for name, tensor in loaded.items()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a state dict with torch.save.

    Raises:
        OSError: the disk refuses.
    """
    torch = _torch(path)
    state = {name: _to_torch(torch, array) for name, array in tensors.items()}
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch ends the archive even then, and complains of its position
        refused = error.__context__
        raise refused if isinstance(refused, OSError) else OSError(str(error)) from error


def _torch(path: Path):  # noqa: ANN202
    try:
        import torch
    except ModuleNotFoundError:
        problem = f"{path}: .bin files need torch: pip install 'moe-lora-jax[torch]'"
        raise CheckpointError("torch is not installed", [problem]) from None
    return torch


def _dtypes(torch):  # noqa: ANN001, ANN202
    return (torch.float32, torch.bfloat16, torch.float16)


def _to_numpy(torch, tensor) -> np.ndarray:  # noqa: ANN001
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(torch, array: Tensor):  # noqa: ANN001, ANN202
    copy = np.array(array)  # torch.save must own the memory, and memory-mapped arrays are read-only
    if copy.dtype.name == "bfloat16":
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)
