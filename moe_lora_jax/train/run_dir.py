"""The `training` folder of an output directory: a lock, what the run is, its metrics and its checkpoints.

OUT/adapter_config.json, adapter_model.safetensors, README.md      the adapter of the newest checkpoint
OUT/best/                        the one with the lowest evaluation loss, if asked for
OUT/training/run.json            settings, adapter config and data, which a continuation must share
OUT/training/starts.jsonl        one line per start and continuation: after which step, up to which, by what command
OUT/training/metrics.jsonl       one line per logged step
OUT/training/tensorboard/        the same numbers for TensorBoard, if asked for; wandb/: for Weights & Biases
OUT/training/checkpoints/STEP/   orbax: adapter, optimizer, rng, position in the data
"""

import fcntl
import json
import os
import shlex
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import jax
from flax import nnx

from moe_lora_interop.checkpoint.run_records import FOLDER, METRICS, RUN, STARTS, read_metrics
from moe_lora_interop.disk.atomic import replace_file
from moe_lora_jax.processes import is_first, once, whole
from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.events import Events
from moe_lora_jax.train.wandb_run import WandbRun

REPORTERS: dict[str, type[Events] | type[WandbRun]] = {"tensorboard": Events, "wandb": WandbRun}


class RunDirectory:
    """An output directory, locked for one run: use as a context manager.

    With several processes, all of them use it and the first one does the work; its errors are raised in all.

    Args:
        output_dir: created if missing.
        identity: JSON values that say what the run is; those of a continuation must be equal.
        growing: paths in the identity (`a.b`) of numbers that a continuation may have larger.
        resume: continue the run that is there.
        report_to: names in REPORTERS, which get the metrics too.

    Raises:
        TrainingError: another run holds it; it holds a run and resume is false, or none and resume is true; or the run
            there is another one (each difference is listed).
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        identity: Mapping[str, Any],
        *,
        resume: bool,
        growing: Collection[str] = (),
        report_to: Collection[str] = (),
    ):
        self.output_dir = Path(output_dir)
        self.identity = json.loads(json.dumps(identity))
        self.resume, self.growing, self.report_to = resume, growing, report_to
        self.grown: dict[str, int] = {}
        self.folder = self.output_dir / FOLDER
        self.checkpoints = self.folder / "checkpoints"
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        self._reporters: list[Events | WandbRun] = []

    def __enter__(self) -> Self:
        self.grown = once(self._open)
        return self

    def _open(self) -> dict[str, int]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("a+")
        except OSError as error:
            raise TrainingError("cannot write the output", [f"{self.folder}: {error.strerror}"]) from error
        try:
            self._take_lock()
            return self._check_identity()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, error: object = None, *_: object) -> None:
        for reporter in self._reporters:
            reporter.close(failed=error is not None)
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()  # closing gives up the lock

    def open_metrics(self, step: int) -> list[dict[str, Any]]:
        """Opens metrics.jsonl for a run that stands after `step`: later lines are removed, the others returned."""
        return once(lambda: self._open_metrics(step))

    def _open_metrics(self, step: int) -> list[dict[str, Any]]:
        path = self.folder / METRICS
        kept = [record for record in read_metrics(self.output_dir) if record["step"] <= step]
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._metrics = path.open("a", encoding="utf-8")
        about = {**self.identity, "command": command(), "output_dir": self.output_dir.name}
        for name in self.report_to:
            self._reporters.append(REPORTERS[name](self.folder / name, about, kept))
        return kept

    def note_start(self, step: int, total_steps: int) -> None:
        """Writes down that the run goes on after `step` up to `total_steps`, which from now on it has."""
        once(lambda: self._note_start(step, total_steps))

    def _note_start(self, step: int, total_steps: int) -> None:
        if self.grown:
            self._write_identity()
        line = json.dumps({"step": step, "total_steps": total_steps, "command": command()})
        with (self.folder / STARTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl, at once."""
        if not is_first():
            return
        assert self._metrics is not None, "open_metrics comes first"
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for reporter in self._reporters:
            reporter.add(record)

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when the process ends
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            problem = f"{self.output_dir}: process {holder} is training into it; wait, or choose another output_dir"
            raise TrainingError("two runs cannot share an output directory", [problem]) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def _check_identity(self) -> dict[str, int]:
        """{path in the identity: what it was} of the numbers that have grown."""
        path = self.folder / RUN
        check_free(self.output_dir, resume=self.resume)
        if not path.exists():
            self._write_identity()
            return {}
        try:
            stored = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise TrainingError("cannot resume", [f"{path}: {error}"]) from error
        problems, grown = [], {}
        for name, found, before in _differences(stored, self.identity):
            if name in self.growing and isinstance(found, int) and isinstance(before, int) and found > before:
                grown[name] = before
            else:
                more = ", expected that or more" if name in self.growing else ""
                more += "; max_length and the chat template have a say in the tokens" if name == "data" else ""
                problems.append(f"{name}: found {found!r}, the run has {before!r}{more}")
        if problems:
            problems.append("use the settings of the run, or start a new one with init_adapter")
            raise TrainingError("not the same run, so it cannot be continued bit for bit", problems)
        return grown

    def _write_identity(self) -> None:
        replace_file(self.folder / RUN, (json.dumps(self.identity, indent=2) + "\n").encode())


def command() -> str:
    """The command line of this process, its program without the folder."""
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def check_free(output_dir: Path, *, resume: bool) -> None:
    """Before any model is read.

    Raises:
        TrainingError: a run would meet another one there, a model or a file; or none to continue.
    """
    in_the_way = next((path for path in (output_dir, *output_dir.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise TrainingError("cannot write the output", [f"{in_the_way}: found a file, expected a directory"])
    if (output_dir / "config.json").exists():  # an adapter beside it is what transformers would load
        problem = f"{output_dir}: holds a model (config.json), expected another directory"
        raise TrainingError("a model's directory would become an adapter's", [problem])
    has_run = (output_dir / FOLDER / RUN).exists()
    if resume and not has_run:
        raise TrainingError("nothing to resume", [f"{output_dir}: no run has started there"])
    if has_run and not resume:
        problem = f"{output_dir}: already holds a run; resume it (--resume), or choose another output_dir"
        raise TrainingError("a run would be overwritten", [problem])


def base_fingerprint(base: nnx.State) -> str:
    """Tells one base model from another cheaply: parameter count and a checksum of the start of every tensor."""
    leaves, total = jax.tree.leaves(base), 0
    for leaf in leaves:
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            start = leaf[(0,) * (leaf.ndim - 1)][:16] if leaf.ndim else leaf
            total = zlib.crc32(whole(start).tobytes(), total)
    return f"{sum(leaf.size for leaf in leaves)} parameters, crc32 {total:08x}"


def _differences(stored: Any, found: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, found, stored) of every value that differs."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for key in sorted(stored.keys() | found.keys()):
            yield from _differences(stored.get(key), found.get(key), f"{path}.{key}" if path else key)
    elif stored != found:
        yield path, found, stored
