""".npz files, read and written strictly: no pickles, and bfloat16, which numpy does not know."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_lora_interop.disk import files, limits
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; no pickles."""
    arrays: dict[str, np.ndarray] = {}
    with files.opened(path, ".npz file") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                limits.check_archive(archive, os.fstat(file.fileno()).st_size)
                for member in archive.namelist():
                    with archive.open(member) as stored:
                        array = np.lib.format.read_array(stored, allow_pickle=False)
                    if array.dtype == "V2":  # what numpy writes for bfloat16, which it does not know
                        array = array.view(ml_dtypes.bfloat16)
                    arrays[member.removesuffix(".npy")] = array
                if len(arrays) < len(archive.namelist()):
                    raise ValueError("two arrays have one name")
        except Exception as error:  # zipfile, its decompressors and numpy raise a dozen kinds for damaged files
            raise CheckpointError("unreadable .npz file", [f"{path}: {error or type(error).__name__}"]) from error
    return arrays


def write_npz(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """As numpy.savez, which takes some names for its own arguments; one array in memory at a time."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
