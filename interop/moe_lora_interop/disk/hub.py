"""Models and adapters by their id on the Hugging Face Hub: what is needed of them, in the Hub's cache."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lora_interop.disk.files import read_json
from moe_lora_interop.disk.model_directory import COPIED, INDEX, SINGLE
from moe_lora_interop.errors import CheckpointError

_CONFIG = ("config.json",)
# of adapters in any layout: some keep experts in folders, or tensors in .bin, .npz or .pt files
_ADAPTER = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.npz", *COPIED)
_NOT_ADAPTER = ("checkpoint-*", "training/*", "runs/*", "optimizer*", "scheduler*", "rng_state*", "training_args.bin")


def model_directory(source: str | os.PathLike[str], revision: str | None = None, *, quiet: bool = False) -> Path:
    """A model's directory: `source` itself, or for an id of the Hub the folder in its cache.

    Downloaded are config, tokenizer, and model.safetensors or the shards that the index names; what is there already is
    not. huggingface_hub does it, and its environment variables hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT.

    Args:
        source: a path, or "owner/name" where there is nothing of this path.
        revision: branch, tag or commit, of an id.
        quiet: no bars, which huggingface_hub shows while it loads, on a terminal.

    Raises:
        CheckpointError: the Hub does not have it, does not give it, or cannot be reached; or a path with a revision.
    """
    found = _local(source, revision)
    if found is not None:
        return found
    small = _download(source, revision, (*_CONFIG, INDEX, *COPIED), quiet=quiet)
    listed = read_json(small / INDEX).get("weight_map") if (small / INDEX).is_file() else None
    weights = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else [SINGLE]
    return _download(source, small.name, weights, quiet=quiet)  # of the same commit


def config_directory(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """`model_directory` for whoever needs only the config."""
    return _local(source, revision) or _download(source, revision, _CONFIG)


def tokenizer_directory(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """`model_directory` for whoever needs only the tokenizer and the config."""
    return _local(source, revision) or _download(source, revision, (*_CONFIG, *COPIED))


def adapter_directory(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """`model_directory` for an adapter in any layout: without checkpoints of the training."""
    return _local(source, revision) or _download(source, revision, _ADAPTER, _NOT_ADAPTER)


def _local(source: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The path itself, unless it can only be an id."""
    path, name = Path(source), os.fspath(source)
    is_id = name.count("/") == 1 and not name.startswith(("/", "~", ".")) and not name.endswith("/")
    if is_id and not os.path.lexists(path):
        return None
    if revision is not None:
        problem = f"revision: found {revision!r} with {name!r}, expected an id on the Hub, owner/name"
        raise CheckpointError("a local directory has no revisions", [problem])
    return path


def _download(
    source: str | os.PathLike[str],
    revision: str | None,
    files: Sequence[str],
    left_out: Sequence[str] = (),
    *,
    quiet: bool = False,
) -> Path:
    name = os.fspath(source)
    here = f"{name}: found no such directory"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import tqdm
    except ImportError as error:
        hint = f"to look for it on the Hugging Face Hub: pip install 'moe-lora-jax[hub]' ({error})"
        raise CheckpointError(f"cannot find {name}", [here, hint]) from error

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | ({} if sys.stderr.isatty() and not quiet else {"disable": True}))

    only, but = [*files], [*left_out]
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=only, ignore_patterns=but, tqdm_class=Bar)
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = " ".join(str(error).split())
        of = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(f"cannot find {name}", [here, f"on the Hugging Face Hub{of}: {said[:400]}"]) from error
    return Path(found)
