"""The flags of `moe-lora train`, in groups: each with its default and its help, and what they mean together."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from moe_lora_interop.config.adapter_config import FORMAT_VERSION, MoeLoraConfig, preset_fields
from moe_lora_interop.disk.files import read_json
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.models.attending import Form
from moe_lora_jax.models.remat import Remat
from moe_lora_jax.train.settings import TrainSettings

ALL_LINEAR = "all-linear"
# The flags that are fields of the config, and those of them that may change what an initial adapter brings.
TRAINING_FIELDS = ("lora_dropout", "router_aux_loss_coef", "router_z_loss_coef")
FIELDS = ("r", "lora_alpha", "num_experts", "top_k", "target_modules", *TRAINING_FIELDS)


def otherwise(value: Any) -> Any:
    """The help's words for a flag that is None unless it is given: what then holds."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {value})")


@dataclass(frozen=True, kw_only=True)
class AdapterFlags:
    """What is trained: a flag that is given wins over --adapter-config, which wins over --preset and the defaults.

    Args:
        preset: a published method's routing: loramoe, hydralora, mola, mole, adamole, mixlora, molora, arrow or xlora.
        r: rank of one expert, or one rank per expert.
        lora_alpha: the scaling is lora_alpha / r; one number, or one per expert.
        num_experts: experts per target module.
        top_k: experts used per token.
        target_modules: names of linear layers, or all-linear (all but lm_head).
        lora_dropout: dropout on the experts' input.
        router_aux_loss_coef: weight of the load-balancing loss.
        router_z_loss_coef: weight of the router z-loss.
        adapter_config: JSON with any fields of adapter_config.json, for those that have no flag.
        init_adapter: continue from this adapter (any readable layout). It brings its own config; of the flags above, a
            dropout or loss coefficient that is given wins over it, 0 too, and the others are refused.
        init_layout: that layout's name; None detects it.
        base_name: what the adapter calls its base model, for example the id on the Hugging Face Hub. None: the Hub's
            name that the path or config.json tells, else the path.
    """

    preset: str | None = None
    r: Annotated[int | list[int] | None, otherwise(MoeLoraConfig.r)] = None
    lora_alpha: Annotated[int | float | list[int | float] | None, otherwise(MoeLoraConfig.lora_alpha)] = None
    num_experts: Annotated[int | None, otherwise(MoeLoraConfig.num_experts)] = None
    top_k: Annotated[int | Literal["all"] | None, otherwise("all")] = None
    target_modules: Annotated[tuple[str, ...] | None, otherwise(ALL_LINEAR)] = None
    lora_dropout: Annotated[float | None, otherwise(MoeLoraConfig.lora_dropout)] = None
    router_aux_loss_coef: Annotated[float | None, otherwise(MoeLoraConfig.router_aux_loss_coef)] = None
    router_z_loss_coef: Annotated[float | None, otherwise(MoeLoraConfig.router_z_loss_coef)] = None
    adapter_config: Path | None = None
    init_adapter: Path | None = None
    init_layout: str | None = None
    base_name: str | None = None

    def fields(self) -> dict[str, Any]:
        """The config's fields from the flags and the file; beside init_adapter, those that replace what it brings.

        Raises:
            ConfigError: a field that is init_adapter's to say.
        """
        given = {f: getattr(self, f) for f in FIELDS if getattr(self, f) is not None}
        if given.get("top_k") == "all":
            given["top_k"] = None
        if "target_modules" in given:
            targets = list(given["target_modules"])
            given["target_modules"] = ALL_LINEAR if targets == [ALL_LINEAR] else targets
        base = {} if self.base_name is None else {"base_model_name_or_path": self.base_name, "revision": None}
        if self.init_adapter is not None:
            wrong = [f for f in given if f not in TRAINING_FIELDS]
            wrong += [f for f in ("preset", "adapter_config") if getattr(self, f) is not None]
            if wrong:
                problems = [f"{f}: found beside init_adapter" for f in wrong]
                raise ConfigError("init_adapter brings its own config", problems)
            return {**given, **base}
        from_file = read_json(self.adapter_config) if self.adapter_config is not None else {}
        if from_file.get("format_version", 1) == 1:
            from_file["format_version"] = FORMAT_VERSION  # flags may say what version 1 cannot
        defaults = {"task_type": "CAUSAL_LM", "target_modules": ALL_LINEAR}
        fields = {**defaults, **from_file, **given, **base}
        return fields if self.preset is None else preset_fields(self.preset, fields)


@dataclass(frozen=True, kw_only=True)
class SettingsFlags(TrainSettings):
    """How to train.

    Args:
        seed: of the initial adapter, dropout and data order.
        tensorboard: the same as --report-to tensorboard.
    """

    learning_rate: Annotated[float, tyro.conf.arg(aliases=("--lr",))] = TrainSettings.learning_rate
    keep_checkpoints: Annotated[int, tyro.conf.arg(aliases=("--keep",))] = TrainSettings.keep_checkpoints
    tensorboard: bool = False

    def __post_init__(self) -> None:
        pass  # tyro would put the problems into words of its own

    def checked(self) -> TrainSettings:
        """The settings; raises ConfigError with all that is wrong with them."""
        values = dataclasses.asdict(self)
        if values.pop("tensorboard") and "tensorboard" not in self.report_to:
            values["report_to"] = ("tensorboard", *self.report_to)
        return TrainSettings(**values)


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """What is read.

    Args:
        max_length: tokens; longer examples are cut, and counted in the output.
        chat_template: a file with a Jinja template for messages, instead of the tokenizer's own.
        eval_file: JSONL to evaluate on.
        eval_fraction: or evaluate on this part of the data, which is then not trained on.
    """

    max_length: int = 512
    chat_template: Path | None = None
    eval_file: Path | None = None
    eval_fraction: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong with them."""
        problems = []
        if not 0 <= self.eval_fraction < 1:
            problems.append(f"eval_fraction: found {self.eval_fraction}, expected a number in [0, 1)")
        if self.eval_fraction and self.eval_file is not None:
            problems.append("eval_fraction and eval_file: found both, expected at most one")
        if self.max_length < 2:
            problems.append(f"max_length: found {self.max_length}, expected an integer >= 2")
        return problems


@dataclass(frozen=True, kw_only=True)
class ProgramFlags:
    """In which numbers it runs, and as which program.

    Args:
        dtype: of the base model.
        scan_layers: compile the layers as one loop: a smaller program, and what remat needs to save memory on a CPU.
        remat: what of a layer is kept for the backward pass, which computes the rest again: full keeps its input alone,
            minimal all its products too (MaxText's names).
        attention: auto is splash on TPUs and cuDNN on GPUs; elsewhere plain for short rows, and chunked for long ones,
            whose memory grows with the row and not with its square.
        mesh: spread the run over all devices, e.g. data=2 fsdp=4; the axes are data, fsdp, tensor and expert. With
            several processes, data alone if nothing is given.
    """

    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    scan_layers: bool = False
    remat: Annotated[Remat | None, otherwise("full with scan_layers, else none")] = None
    attention: Form = "auto"
    mesh: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """What `load_base_model` and `abstract_base_model` take of them, but for the mesh."""
        dtype = None if self.dtype == "stored" else self.dtype
        same = {name: getattr(self, name) for name in ("scan_layers", "remat", "attention")}
        return {"dtype": dtype, **same}

    def axes(self) -> dict[str, int]:
        """{axis: size} of the words that are right; `problems` names the others."""
        pairs = [word.partition("=") for word in self.mesh]
        return {name: int(size) for name, _, size in pairs if size.isdigit()}

    def problems(self) -> list[str]:
        """What is wrong with them."""
        names = [word.partition("=")[0] for word in self.mesh]
        return [
            f"mesh: found {word!r}, expected name=size, each name once"
            for number, (word, name) in enumerate(zip(self.mesh, names, strict=True))
            if not word.partition("=")[2].isdigit() or name in names[:number]
        ]


@dataclass(frozen=True, kw_only=True)
class MachineFlags(ProgramFlags):
    """Where it runs, and in which numbers.

    Args:
        coordinator: run as one of several processes, all with this HOST:PORT of the first; auto asks the cluster.
        num_processes: how many they are.
        process_id: which one this is, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
