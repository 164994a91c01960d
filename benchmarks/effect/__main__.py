"""`python -m benchmarks.effect BASE` (`make effect`): runs what is missing, one row per run, until all are there.

Then it writes the tables and the picture of RESULTS.md, if the rows are those of this directory.

BASE           directory of the base model (`python tools/smollm2.py BASE`)
--rows FILE    where the rows are and go; a run that is there is not repeated
--minutes N    starts no run after that time
--steps, --batch   a larger budget, for a faster machine; rows of another budget do not mix
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.effect.data import Data, build
from benchmarks.effect.general import general_texts, windows
from benchmarks.effect.methods import METHODS
from benchmarks.effect.plan import next_run
from benchmarks.effect.plot import write_picture
from benchmarks.effect.rows import ROWS, append_row, read_rows
from benchmarks.effect.run import General, provenance, run, scored
from benchmarks.effect.session import Session, Settings
from benchmarks.effect.table import write_tables
from benchmarks.effect.tasks import TASKS
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax import load_base_model
from moe_lora_jax.train.tokenizer import load_tokenizer


def check(rows: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """Raises SystemExit if the rows were made with other data or another budget."""
    for number, row in enumerate(rows, start=1):
        other = [f"{k} {row.get(k)}, expected {v}" for k, v in wanted.items() if row.get(k) != v]
        if other:
            raise SystemExit(f"row {number} is not comparable: {'; '.join(other)}. Give another file with --rows.")


def loaded(base: Path) -> tuple[Data, General]:
    """The data and the general texts in the tokens of a model."""
    tokenizer = load_tokenizer(base)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    data = build({name: task() for name, task in TASKS.items()}, encode, tokenizer.eos_token_id)
    return data, {name: windows(text, encode) for name, text in general_texts().items()}


def complete(
    base: Path,
    file: Path,
    data: Data,
    general: General,
    methods: dict[str, MoeLoraConfig],
    settings: Settings,
    end: float,
) -> bool:
    """Appends the rows that are missing; False if the time ended before."""
    rows = read_rows(file)
    fixed = {**settings._asdict(), **provenance(data, general)}
    check(rows, fixed)
    model = load_base_model(base, dtype="float32")
    name, session = "", None
    while time.monotonic() < end:
        if not any(row["method"] == "base" for row in rows):
            untrained = Session(model, methods[next(iter(methods))], settings)  # B = 0: the base model itself
            row = {"method": "base", "learning_rate": 0.0, "seed": 0, **fixed, **scored(untrained, data, general)[0]}
            untrained.close()
        else:
            chosen = next_run(rows, methods)
            if chosen is None:
                return True
            if chosen.method != name:
                if session is not None:
                    session.close()
                name, session = chosen.method, Session(model, methods[chosen.method], settings)
            assert session is not None
            row = run(session, data, general, chosen)
        rows.append(row)
        append_row(file, row)
        shown = ("method", "learning_rate", "seed", "validation_loss", "validation_accuracy", "seconds")
        print(*(f"{k} {row.get(k)}" for k in shown), sep=", ", flush=True)
    return next_run(rows, methods) is None


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--steps", type=int, default=Settings().steps)
    parser.add_argument("--batch", type=int, default=Settings().batch)
    options = parser.parse_args(arguments)
    jax.config.update("jax_compilation_cache_dir", str(Path("build/effect/compiled").absolute()))
    end = time.monotonic() + 60 * options.minutes
    data, general = loaded(options.base)
    for split, tasks in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        print(f"{split}:", ", ".join(f"{task} {len(examples)}" for task, examples in tasks.items()))
    print("longer than the limit:", data.left_out, "digest", data.digest, flush=True)
    settings = Settings(steps=options.steps, batch=options.batch)
    if not complete(options.base, options.rows, data, general, METHODS, settings, end):
        print("not complete: the same command continues")
    elif options.rows == ROWS:
        write_tables(read_rows(ROWS))
        write_picture(read_rows(ROWS))


if __name__ == "__main__":
    main(sys.argv[1:])
