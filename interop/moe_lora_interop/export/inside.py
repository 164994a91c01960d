"""An ordinary LoRA for a model that has the text model inside it, where every module's path begins with a prefix."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.inspection import base_shapes, layer_problems
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.export.plain_lora import Factors, plain_lora


@dataclass(frozen=True)
class Inside:
    """Where the text model is.

    Attributes:
        prefix: what stands before the paths of its modules, such as "language_model.".
        base: Hugging Face directory of the whole model; its tensors' names and shapes are what is checked.
    """

    prefix: str
    base: Path

    def check(self, features: Mapping[str, tuple[int, int]]) -> None:
        """Raises CheckpointError: these modules, {path: (in, out)}, are not all layers of `base` behind the prefix."""
        placed = {f"{self.prefix}{module}": sizes for module, sizes in features.items()}
        if problems := [*layer_problems(placed, base_shapes(self.base), self.base)]:
            raise CheckpointError(f"prefix {self.prefix!r}: the modules are not all in the base", problems)

    def placed(self, lora: Adapter) -> Adapter:
        """The same LoRA with the prefix before the path of every module."""
        factors = {}
        for module, sizes in lora.config.for_modules(lora.modules).items():
            a, b = (np.asarray(lora.tensors[module, role][0]) for role in ("lora_A", "lora_B"))
            factors[f"{self.prefix}{module}"] = Factors(a, b, sizes.alphas[0])
        return plain_lora(factors, lora.config, use_rslora=lora.config.use_rslora)
