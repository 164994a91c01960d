"""What a checkpoint layout is: a table. Tensors by `Rule`s, config fields by `Field`s, and what it cannot vary."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_lora_interop.config.allowed import LARGEST
from moe_lora_interop.rules.codecs import SAME, Codec
from moe_lora_interop.rules.derived import Derive
from moe_lora_interop.rules.tensors import Rule, claim

SET = object()
"""In a `cases` table: any value but null."""

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """One config value in both vocabularies.

    Args:
        ours: field of `MoeLoraConfig`.
        theirs: their field; "a.b" is field b of object a.
        codec: how the two values correspond.
        default: their value where the field is absent; `REQUIRED` if it must be there.
    """

    ours: str
    theirs: str
    codec: Codec = SAME
    default: Any = REQUIRED


@dataclass(frozen=True)
class Option:
    """A config value that the layout does not record and the reader must be given.

    Args:
        name: keyword of `moe_lora_interop.read`.
        what: one line for the error that asks for it.
        codec: how the value given corresponds to ours.
        default: value where it is not given; `REQUIRED` if it must be.
        ours: the field of `MoeLoraConfig` that it sets, if that has another name.
    """

    name: str
    what: str
    codec: Codec = SAME
    default: Any = REQUIRED
    ours: str = ""

    @property
    def field(self) -> str:
        """The field that it sets, if it sets one."""
        return self.ours or self.name


@dataclass(frozen=True)
class Folders:
    """Experts in folders of their own, each with an ordinary LoRA config.

    Args:
        listed_in: field of the main config that names the folders: a list, or an object {number: path}.
        main: folder of the main config; "" is the directory itself.
        name: template of a folder's name when writing.
        outside: whether they may lie outside of the directory.
        sidecar: .npz file of further tensors, read if it exists or if an option of its name (without suffix) gives one.
        config: name of the main config.
        weights: name of the file of main tensors; .pt is read in place of .safetensors.
        as_object: whether `listed_in` is an object {number: path}; a list otherwise.
        by_option: no file names the folders, the reader's option `listed_in` does. Only their configs are read, then:
            the main file has the tensors of every expert.
    """

    listed_in: str
    main: str = ""
    name: str = "expert_{expert}"
    outside: bool = False
    sidecar: str = ""
    config: str = "adapter_config.json"
    weights: str = "adapter_model.safetensors"
    as_object: bool = False
    by_option: bool = False


def lookup(raw: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value at "a.b" of their config; "experts.b" is the list of b over the experts' own configs."""
    head, _, rest = path.partition(".")
    if head == "experts" and rest:
        found = [lookup(expert, rest, default) for expert in raw.get("experts", [])]
        return REQUIRED if not found or any(v is REQUIRED for v in found) else found
    if head not in raw:
        return default
    if rest:
        return lookup(raw[head], rest, default) if isinstance(raw[head], Mapping) else default
    return raw[head]


@dataclass(frozen=True)
class Dialect:
    """A checkpoint layout.

    Args:
        name: what it is called on the command line.
        source: where the layout comes from: repo@commit, or the package and its version.
        rules: what every tensor is.
        needs: roles without which a directory is not in this layout (for detection).
        fields: config fields in both vocabularies.
        own_config: whether the config is ours as it stands; `fields` is then empty, and its peft_type means this layout
            only: what does not fit is wrong, not of another layout.
        fixed: our values that the layout implies.
        const: their fields that may have only the values listed (the first is written); SET allows any, () none.
        cases: rows of (their values, ours) that hold together; exactly one row must fit.
        ignore: their fields that do not change what is computed.
        options: what the layout does not record.
        plain: whether a module without a router is plain LoRA (otherwise it is incomplete).
        experts_from_tensors: whether num_experts is counted in the tensors.
        counted: {our field: (role, axis)}: sizes that only the tensors say; the same in every module.
        weights: file name written; of adapter_model, .safetensors and .bin are both read.
        measured: {their field: (role, axis)}: sizes that their config repeats from the tensors: that of the model's
            tensor, or the list of those of the modules' tensors, to which a file may add more.
        folders: where the experts are, if not in the same file.
        derive: computes our tensors from what `rules` make of the stored ones, where these are not ours themselves (see
            `derived`).
        read_only: why the layout cannot be written; "" if it can.
        depth: their field with the number of a router's layers; `{last}` in a rule is the number of the last one.
        stride: (their field, stride if it is zero or absent, stride otherwise) for `{j*stride}` in a key.
        config_file: whether there is an adapter_config.json.
        metadata: what a save writes into the header of .safetensors; {name} stands for a field of the config.
        signed: whether it adds a digest of config and tensors, which is checked where there is one.
        card: whether it adds a README.md that says what the adapter is and how to load it.
        notes: what the layout cannot express, in a sentence.
        hint: what is probably wrong where tensors are missing.
    """

    name: str
    source: str
    rules: tuple[Rule, ...]
    needs: frozenset[str] = frozenset({"lora_A", "lora_B", "router"})
    fields: tuple[Field, ...] = ()
    own_config: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    const: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    cases: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] = ()
    ignore: frozenset[str] = frozenset()
    options: tuple[Option, ...] = ()
    plain: bool = False
    experts_from_tensors: bool = False
    counted: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    weights: str = "adapter_model.safetensors"
    measured: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    folders: Folders | None = None
    derive: Derive | None = None
    read_only: str = ""
    depth: str = ""
    stride: tuple[str, int, int] | None = None
    config_file: bool = True
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    signed: bool = False
    card: bool = False
    notes: str = ""
    hint: str = ""

    @property
    def has_own_file(self) -> bool:
        """Whether its tensors are in a file of a name that no other kind of layout has."""
        in_folders = self.folders is not None and not self.folders.by_option
        return not in_folders and not self.weights.startswith("adapter_model.")

    def header(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """The header metadata of a file with this config."""
        return {key: value.format_map(raw) for key, value in self.metadata.items()}

    def specialised(self, raw: Mapping[str, Any]) -> "Dialect":
        """The same table with `{j*stride}` and `{last}` resolved by their config."""
        if self.stride is None:
            return self
        name, without, otherwise = self.stride
        factor = otherwise if raw.get(name) else without
        depth = raw.get(self.depth)
        last = depth - 1 if isinstance(depth, int) and 0 < depth < LARGEST else 0  # what is wrong, `fields` say
        rules = tuple(
            dataclasses.replace(
                rule, key=re.sub(r"\*stride}", f"*{factor}}}", rule.key), role=rule.role.replace("{last}", str(last))
            )
            for rule in self.rules
        )
        return dataclasses.replace(self, rules=rules, stride=None)

    def const_problems(self, raw: Mapping[str, Any]) -> list[str]:
        """Their fields that have another value than the layout allows."""
        found = ((name, allowed, lookup(raw, name, None)) for name, allowed in self.const.items())
        return [
            f"{name}: found {value!r}, expected {' or '.join(map(repr, allowed)) or 'no such field'}"
            for name, allowed, value in found
            if value is not None and value not in allowed and SET not in allowed
        ]

    def claims_any(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a tensor of these is one of an adapter in this layout."""
        claimed = (claim(self.rules, name, len(shape)) for name, shape in shapes.items())
        return any(rule is not None and rule.copy == "" for rule in claimed)

    def misfits(self, shapes: Mapping[str, tuple[int, ...]], raw: Mapping[str, Any]) -> list[str]:
        """Why a directory with these tensors and this config is not in this layout; empty if it is."""
        if self.config_file and not raw:
            return ["adapter_config.json: missing file"]
        rules = self.specialised(raw).rules
        claimed = {name: claim(rules, name, len(shape)) for name, shape in shapes.items()}
        unclaimed = [name for name, rule in claimed.items() if rule is None]
        reasons = []
        if unclaimed:
            reasons.append(f"no rule for {unclaimed[0]}" + (f" and {len(unclaimed) - 1} more" if unclaimed[1:] else ""))
        found = {rule.role for rule in claimed.values() if rule is not None and rule.copy == ""}
        if missing := sorted(self.needs - found):
            reasons.append(f"no tensor is a {' or a '.join(missing)}")
        reasons.extend(self.const_problems(raw))
        if "peft_type" in self.const and "peft_type" not in raw:
            reasons.append(f"peft_type is missing, expected {self.const['peft_type'][0]!r}")
        return reasons
