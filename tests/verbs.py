"""Verbs as a command line calls them. No test of its own."""

from pathlib import Path

import tyro

from moe_lora_jax.cli.train import train


def train_verb(model: Path, data: Path, output_dir: Path, **flags) -> int | None:
    """`moe-lora train` with these flags, as a command line gives them; errors are raised."""
    words = [f"--model={model}", f"--data={data}", f"--output-dir={output_dir}"]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return tyro.cli(train, args=words)
