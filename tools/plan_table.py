"""The table of docs/scale.md: `python tools/plan_table.py`. Every row is a command of `moe-lora plan`, run here.

What a command says is kept in build/plan, so that a stopped run goes on; --again forgets it, --only WORD runs the rows
that have the word in them, and --print shows the commands. The table has every row that was ever run.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, KEPT = ROOT / "docs" / "scale.md", ROOT / "build" / "plan"
BEGIN, END = "<!-- the table of tools/plan_table.py -->\n", "<!-- its end -->\n"

MODELS = {"8B": "llama-3-8b", "32B": "qwen2.5-32b", "70B": "llama-3-70b"}
DEVICES = {"v5e:4x4": 16, "v5e:8x8": 64, "v6e:2x4": 8, "v5p:2x2x4": 16, "h100:8": 8}
TOKENS = 2048
LONGER = {("8B", "v5e:4x4"): (8192,), ("8B", "v5e:8x8"): (32768,), ("8B", "v6e:2x4"): (8192, 32768)}
HEAD = [
    "model",
    "devices",
    "tokens",
    "fits",
    "needed",
    "of",
    "arguments",
    "temporaries",
    "kept",
    "million cycles",
    "over LoRA",
    "LoRA needs",
]


def command(model: str, devices: str, tokens: int) -> list[str]:
    """One row of tokens on every device, all linear layers, 8 experts of rank 16, top 2, against LoRA of rank 128."""
    number = DEVICES[devices]
    words = f"--config tools/shapes/{MODELS[model]}.json --topology {devices} --mesh fsdp={number}"
    words += f" --batch {number} --seq {tokens} --num-experts 8 --r 16 --top-k 2 --scan-layers --compare lora"
    return words.split()


def kept(words: list[str]) -> Path:
    """Where the answer of a command is."""
    return KEPT / f"{hashlib.sha256(' '.join(words).encode()).hexdigest()[:16]}.json"


def told(words: list[str], again: bool) -> dict:
    """What the verb says, in JSON."""
    file = kept(words)
    if again or not file.exists():
        run = [sys.executable, "-m", "moe_lora_interop.cli.main", "plan", *words, "--json"]
        done = subprocess.run(run, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"moe-lora plan {' '.join(words)}: exit code {done.returncode}")
        KEPT.mkdir(parents=True, exist_ok=True)
        file.write_text(done.stdout)
    return json.loads(file.read_text())


def row(model: str, devices: str, tokens: int, found: dict) -> list[str]:
    """The cells of one command's answer."""
    lora, cycles = found["lora"], found["cycles"]
    both = cycles is not None and lora["cycles"] is not None
    sizes = [found[name] for name in ("needed_bytes", "usable_bytes", "arguments", "temporaries", "kept_beside")]
    return [
        model,
        devices,
        f"{tokens:,}",
        "yes" if found["fits"] else "no",
        *(f"{size / 2**30:.2f}" for size in sizes),
        "" if cycles is None else f"{cycles / 1e6:,.0f}",
        f"{cycles / lora['cycles']:.3f}" if both else "",
        f"{lora['needed_bytes'] / 2**30:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--print", action="store_true")
    chosen = parser.parse_args()
    names = [(model, devices) for model in MODELS for devices in DEVICES]
    cases = [(*pair, tokens) for pair in names for tokens in (TOKENS, *LONGER.get(pair, ()))]
    every = {case: command(*case) for case in cases}
    for case, words in every.items():
        if chosen.only in " ".join(map(str, case)):
            print("moe-lora plan", *words) if chosen.print else told(words, chosen.again)
    if chosen.print:
        return
    rows = [row(*case, told(words, again=False)) for case, words in every.items() if kept(words).exists()]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
