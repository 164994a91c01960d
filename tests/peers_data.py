"""The adapters in tests/peers, with what their provenance says of them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent / "peers"
BASES = {"hydralora": "mha", "loramoe": "mha", "mola": "mha", "moe_peft": "moe_peft", "coin": "coin"}
BASES |= dict.fromkeys(("dynmole", "ewora", "ld_mole"), "hundred_words")
BASES |= dict.fromkeys(("comol", "meteora", "mtl_lora", "xlora_original"), "gqa48")
BLOG_OPTIONS = {"router_input": "hidden", "top_k": None}  # what the blog's layout does not record


@dataclass(frozen=True)
class Peer:
    name: str

    @property
    def directory(self) -> Path:
        return ROOT / self.name

    @property
    def base(self) -> Path:
        return ROOT / "bases" / BASES.get(self.name.split("/")[0], "gqa")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return json.loads((self.directory / "provenance.json").read_text())

    @property
    def options(self) -> dict[str, Any]:
        given = self.provenance.get("read_options", BLOG_OPTIONS if self.name.startswith("seed_style") else {})
        folders = {n: [str(self.directory / path) for path in v] for n, v in given.items() if n == "adapters"}
        return given | folders  # so that they are found from a copy elsewhere, too

    @property
    def reference(self) -> dict[str, np.ndarray]:
        with np.load(self.directory / "reference.npz") as archive:
            return dict(archive)


ALL = [Peer(str(path.parent.relative_to(ROOT))) for path in sorted(ROOT.glob("**/provenance.json"))]
READ = {"xlora/depth2_scaling_pass"}  # may be refused
STRICT = {"xlora_original/broken_names_prefix"}  # might be read, by leaving out what belongs to another adapter
REFUSED = [
    p for p in ALL if {"must_refuse", "may_refuse"} & {k for k, v in p.provenance.items() if v} or p.name in STRICT
]
REFUSED = [p for p in REFUSED if p.name not in READ]
READABLE = [p for p in ALL if p not in REFUSED]
WITH_LOGITS = [p for p in READABLE if (p.directory / "reference.npz").exists()]
