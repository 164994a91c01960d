"""A directory as an adapter in one layout: names are matched with rules once, then come sizes, and values last."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_lora_interop.checkpoint.adapter import Adapter, config_sizes, resolved
from moe_lora_interop.checkpoint.base_tensors import check_no_whole_modules, left_out
from moe_lora_interop.checkpoint.detection import dialect_of
from moe_lora_interop.checkpoint.directory import Directory
from moe_lora_interop.checkpoint.prototypes import complete_prototypes
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.disk.digest import NAME as DIGEST
from moe_lora_interop.disk.digest import digest
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.rules.base_tensors import base_tensors, below_prefix, whole_modules
from moe_lora_interop.rules.configs import config_of
from moe_lora_interop.rules.dialect import Dialect
from moe_lora_interop.rules.tensors import ByRule, Canonical, Sizes, claim, claimed, differing, moved


@dataclass(frozen=True)
class OpenAdapter(Adapter):
    """An adapter whose tensors are still in its files.

    Attributes:
        dialect: the layout of the files.
        metadata: of the safetensors header.
    """

    dialect: Dialect
    metadata: Mapping[str, str]


class Reading:
    """What a layout makes of a directory that is open.

    Attributes:
        dialect: the layout.
        stored: what it finds.
    """

    def __init__(self, directory: Directory, layout: str | None, options: Mapping[str, Any]):
        """Raises CheckpointError: not in this layout (None: in none that is known), or a part of it is unreadable."""
        found = dialect_of(directory, layout, options)
        self._path, self._options = directory.path, options
        self.stored = directory.stored(found, options)
        self.dialect = found.specialised(self.stored.raw)

    @property
    def has_digest(self) -> bool:
        """Whether files of two saves would be noticed."""
        return self.dialect.signed and DIGEST in self.stored.metadata

    @cached_property
    def config(self) -> MoeLoraConfig:
        """From the config file and the headers alone: no tensor is read.

        Raises:
            ConfigError: with every problem found.
        """
        shapes, problems = self._shapes
        try:
            return config_of(self.dialect, self.stored.raw, shapes, self._options)
        except ConfigError as error:
            problems = [*problems, *error.problems]
            raise ConfigError(f"{self._path} cannot be read as {self.dialect.name}", problems) from None

    def adapter_config(self) -> MoeLoraConfig:
        """The config that `adapter` has, but no tensor is read: which ones it implies is not asked.

        Raises:
            CheckpointError, ConfigError: with every problem found.
        """
        config, (shapes, problems) = self.config, self._shapes
        if problems:
            raise self._incomplete(problems)
        modules = sorted({module for module, role in shapes if role == "lora_B"})
        return resolved(config, modules) if modules else config

    def adapter(self) -> OpenAdapter:
        """The adapter, completely checked.

        Raises:
            CheckpointError, ConfigError: with every problem found.
        """
        check_no_whole_modules(self._path, self.stored.raw, self._of_no_adapter())
        config, (by_rule, unexpected) = self.config, self._claimed
        problems = [*unexpected]
        tensors, copies = moved(by_rule, config_sizes(config), problems)
        problems += differing(copies)
        tensors = self._derived(tensors, problems)
        if self.dialect.folders is not None and self.dialect.folders.sidecar:
            tensors = complete_prototypes(tensors)
        if self.dialect.signed:
            _check_digest(self._path, config, self._flat, self.stored.metadata)
        try:
            adapter = OpenAdapter(
                config, tensors, self.dialect, self.stored.metadata, base_tensors=base_tensors(by_rule)
            )
        except CheckpointError as error:
            problems += error.problems
        if problems:
            raise self._incomplete(problems)
        return adapter

    def notes(self) -> list[str]:
        """What else the files hold, by their headers: tensors of the base model, and modules trained whole."""
        names, infos = self.stored.raw.get("modules_to_save"), self.stored.infos
        whole = whole_modules(names, self._of_no_adapter()) if isinstance(names, list) else []
        rules = {
            key: claim(self.dialect.rules, key, len(info.shape)) for key, info in infos.items() if key not in whole
        }
        of_base = {below_prefix(k): infos[k] for k, rule in rules.items() if rule and rule.copy == "base"}
        trained = [f"{name}: trained as a whole (modules_to_save); only PyTorch can use it" for name in whole]
        return [*left_out(of_base), *trained]

    def _of_no_adapter(self) -> Iterator[str]:
        """The keys that no rule says are the adapter's. (LD-MoLE lists a part of its adapter in modules_to_save.)"""
        for key, info in self.stored.infos.items():
            rule = claim(self.dialect.rules, key, len(info.shape))
            if rule is None or rule.copy == "base":
                yield key

    def _incomplete(self, problems: list[str]) -> CheckpointError:
        hint = [self.dialect.hint] if self.dialect.hint else []
        return CheckpointError(f"{self._path} is not a complete {self.dialect.name} adapter", [*problems, *hint])

    @cached_property
    def _flat(self) -> dict[str, Tensor]:
        return self.stored.tensors()

    @cached_property
    def _claimed(self) -> tuple[ByRule, list[str]]:
        return claimed(self.dialect.rules, self._flat)

    @cached_property
    def _shapes(self) -> tuple[Canonical, list[str]]:
        """The tensors as far as their config need not be known, and problems; nothing where it needs no tensors, or
        where the option that it needs first is missing."""
        folders = self.dialect.folders
        if self.dialect.own_config or (folders is not None and folders.by_option and "experts" not in self.stored.raw):
            return {}, []
        by_rule, unexpected = self._claimed
        problems = [*unexpected]
        return self._derived(moved(by_rule, self._known_sizes, problems)[0], problems), problems

    def _derived(self, tensors: Canonical, problems: list[str]) -> Canonical:
        """Ours, where the layout stores others."""
        if self.dialect.derive is None:
            return tensors
        found, misfits = self.dialect.derive(tensors, {**self.stored.raw, **self._options})
        problems += misfits
        return found

    @property
    def _known_sizes(self) -> Sizes:
        """What is known of the sizes before the config is: the number of experts, if their config has it."""
        names, raw = {f.ours: f.theirs for f in self.dialect.fields}, self.stored.raw
        experts, splits = raw.get(names.get("num_experts", "")), raw.get(names.get("n_splits", ""))
        known = {a: v for a, v in (("expert", experts), ("split", splits)) if isinstance(v, int) and v > 0}
        return lambda module: known


def _check_digest(
    path: Path, config: MoeLoraConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """PEFT writes no digest, so it is optional; when there is one it must be right."""
    if "format_version" in metadata and DIGEST not in metadata:
        problem = f"header metadata: found {metadata}, expected {DIGEST!r} beside 'format_version'"
        raise CheckpointError(f"{path} is damaged", [problem])
    if DIGEST in metadata and metadata[DIGEST] != (found := digest(config.semantic_dict(), tensors, metadata)):
        problem = f"digest: the file says {metadata[DIGEST]}, its config and tensors give {found}"
        raise CheckpointError(f"{path} is damaged, or its two files do not belong together", [problem])
