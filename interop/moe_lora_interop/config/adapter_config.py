"""The adapter's configuration: one vocabulary for JAX, PyTorch and every file layout.

The forward pass that a config describes, for a target linear layer W0 with experts e = 1..E:

    z      = (R x + b) / T                                       router logits, fp32, [expert]; T = router_temperature
             and with temperature_hidden_size T = router_temperature + softplus(-(W_1 relu(W_0 x + b_0) + b_1))
    p      = softmax(z) | softmax(|z|) | sigmoid(z) | z | sparsemax(z)                                  scoring_func
             sparsemax(z) = max(z - t, 0), t such that its sum is 1
    keep   = all | the top_k largest p | p >= tau                tau = threshold, times sigmoid(w.x + c) if adaptive
             and with top_p those whose p, added to all larger ones, makes at most top_p (DynMoLE)
             and all where H > entropy_threshold, H = (1 - sum_e P_e^q) / (1 - E^(1-q)), or, q being 1,
             -sum_e P_e log P_e / log E;  P = p + entropy_eps, q = entropy_index
    g      = p (minus tau if adaptive) where kept, else 0; divided by its sum if norm_topk_prob
    p, g   = f(z, top_k)  with a registered routing f, in the place of the three lines before (`config.routings`)
    y      = W0 x + sum_e routed_scaling_factor * g_e * s_e * B_e A_e x
    s_e    = lora_alpha_e / r_e, or lora_alpha_e / sqrt(r_e) with use_rslora

A module with one expert has no router: it is plain LoRA, y = W0 x + s B A x.

Where the router stands (`scope`), what it reads (`router_input`) and what is mixed (`mix`):

    linear, hidden   one router per target linear layer; x is that layer's input
    ffn, hidden      one router per feed-forward block; x is the block's input, and whole expert blocks are mixed:
                     FFN(x) = sum_e g_e FFN_e(x), every W of FFN_e being W0 + s_e B_e A_e (MixLoRA)
    model, hidden    one MLP router for the model; x is the last hidden state (after the final norm) of a first pass
                     without the adapter, or with every g_e = scaling_pass_value (X-LoRA); layerwise: E logits for each
                     target module, in module_order
    linear, expert_activations
                     as linear, hidden, but the router reads relu(concat_e A_e x), [rank] of every expert (EWoRA)
    task             z = R(T[task]), T a table [task, dim]; with task_embedding_dim None the table's rows are the logits
    mix = weights    A = [sum_e g_qe A_e,q for q in splits], B likewise, y = W0 x + s B A x (Poly, MHR): the input of A
                     and the output of B are cut into n_splits parts, each with its own gates
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from moe_lora_interop.config.allowed import (
    ALPHA,
    ALPHA_PATTERN,
    BOOL,
    FINITE,
    FRACTION,
    LAYER_NAMES,
    LAYERS,
    MODULE_NAMES,
    MODULE_PATHS,
    NOT_NEGATIVE,
    NUM_EXPERTS_PATTERN,
    OBJECT,
    POSITIVE,
    PROBABILITY,
    RANK,
    RANK_PATTERN,
    ROUTING,
    TARGETS,
    TEXT,
    TOP_K_PATTERN,
    Allowed,
    exactly,
    integer,
    one_of,
    optional,
    since,
)
from moe_lora_interop.config.combinations import clashes
from moe_lora_interop.config.json_values import as_json
from moe_lora_interop.config.module_config import ModuleConfig, one_per_expert
from moe_lora_interop.config.patterns import first_match, pattern_for
from moe_lora_interop.config.presets import PRESETS, SHARE
from moe_lora_interop.config.routing_rule import routing_dict, rule_of
from moe_lora_interop.config.targets import Targets
from moe_lora_interop.errors import ConfigError, did_you_mean, expected

FORMAT_VERSION = 2  # the newest one; a file has the oldest that can say its config
PEFT_TYPE = "MOE_LORA"
_ROUTER_INPUT = since(2, one_of("hidden", "task", "expert_activations"), "expert_activations")
_SCORES = ("softmax", "abs_softmax", "sigmoid", "identity", "sparsemax")
_SCORE = since(2, one_of(*_SCORES), "identity", "sparsemax")


def _is_version(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= FORMAT_VERSION


_VERSION = Allowed(holds=_is_version, words="1 or 2")
PATTERNS = {
    "rank_pattern": "r",
    "alpha_pattern": "lora_alpha",
    "num_experts_pattern": "num_experts",
    "top_k_pattern": "top_k",
}


@dataclass(frozen=True, kw_only=True)
class MoeLoraConfig:
    """Configuration of a mixture-of-LoRA-experts adapter. Validated at construction; treat its lists as read-only.

    Two configs are equal if they describe the same function: PEFT's bookkeeping fields are not compared.

    Args:
        r: rank of ONE expert, or one rank per expert.
        lora_alpha: numerator of the scaling s = lora_alpha / r, or one per expert.
        use_rslora: s = lora_alpha / sqrt(r) instead (arXiv:2312.03732).
        num_experts: E, experts per target module.
        shared_lora_A: one A for all experts of a module (HydraLoRA, arXiv:2404.19245).
        target_modules: names (whole paths or last parts), a regular expression, or "all-linear".
        exclude_modules: the same forms; wins over target_modules.
        layers_to_transform: restrict to these layer numbers, as in PEFT.
        layers_pattern: the path segment before the layer number, as in PEFT.
        rank_pattern: {regular expression: r} per module; the first that matches the end of the module's path wins, as
            in PEFT.
        alpha_pattern: likewise for lora_alpha.
        num_experts_pattern: likewise for num_experts; 1 is plain LoRA.
        top_k_pattern: likewise for top_k; None is dense.
        init_lora_weights: True: B = 0, so the adapter starts as the identity. False: B random (for tests).
        modules_to_save: modules trained and saved whole beside the adapter (PyTorch only).
        scope: where the router stands: "linear", "ffn" (arXiv:2404.15159) or "model" (arXiv:2402.07148).
        router_input: "hidden", "task" (task ids are then given at call time) or "expert_activations" (what the experts
            make of x before B, rectified: EWoRA, github.com/huggingface/peft/pull/3401).
        router_depth: linear layers of the router, with ReLU between; more than one only in model scope. 0: the task
            table itself holds the logits.
        router_hidden_size: width between the router's layers.
        num_tasks: rows of the task table; ids run from 0 to num_tasks - 1.
        task_embedding_dim: width of the task table; None if its rows are the logits.
        layerwise: the model's router emits separate weights for every target module.
        module_order: the modules in the order of a layerwise router's rows; filled in by `apply` and by readers.
        scaling_pass_value: the gate of every expert in the first pass, which is without gradient; 0 leaves the adapter
            out of it.
        mix: "outputs" or "weights" (arXiv:2202.13914).
        n_splits: parts of input and output with gates of their own, with mix = "weights" (arXiv:2211.03831).
        router_bias: whether the router has a bias b.
        scoring_func: "softmax", "abs_softmax" (Arrow, arXiv:2405.11157), "sigmoid", or "identity": the logits
            themselves, which have a sign (needs norm_topk_prob False), or "sparsemax" (arXiv:1602.02068): a token uses
            as many experts as its logits tell apart.
        router_temperature: divides the logits (and |logits|); with temperature_hidden_size it is the least T.
        temperature_hidden_size: a learned T for every token, from an MLP of this width beside each router (LD-MoLE,
            github.com/eshentw/LD-MoLE).
        top_k: experts kept per token; None keeps all (dense).
        threshold: keep experts with p >= threshold (MoLE); with adaptive_threshold it is the largest tau
            (AdaMoLE, arXiv:2405.00361).
        adaptive_threshold: tau = threshold * sigmoid(w.x + c) is learned per module, and subtracted from p.
        top_p: top_k is then the fewest: more experts are kept as long as the sum of the largest p, their own included,
            is at most top_p (DynMoLE, github.com/mikecovlee/DynMoLE).
        entropy_threshold: top_k is then the fewest: all experts are kept for a token whose entropy H, as a part of the
            largest possible, is above it (DynMoLE).
        entropy_index: q of H, which is Tsallis' entropy; 1 is Shannon's.
        entropy_eps: added to every p in H.
        norm_topk_prob: divide the kept weights by their sum; if nothing is kept the delta is zero.
        routing: a rule of one's own in the place of scoring_func, threshold, top_p, entropy_threshold and
            norm_topk_prob: an object of a class that `moe_lora_interop.register_routing` has registered, or what is
            saved of it, {"name": ..., "version": ..., its fields}, which is also what the config then holds.
        routed_scaling_factor: multiplies every weight of a routed module.
        lora_dropout: dropout on the experts' input, in training.
        expert_dropout: dropout on the gates (kept ones scaled by 1/(1-p)), in training.
        router_dropout: dropout between the layers of a deep router, in training.
        router_jitter_noise: eps; the router's input is multiplied by U(1-eps, 1+eps), in training.
        router_aux_loss: how use is balanced: "switch" (mean of the modules' losses, arXiv:2101.03961), "mixtral" (the
            modules' tokens pooled, as transformers does) or "localized" (LoRAMoE's constraint, arXiv:2312.09979).
        router_aux_loss_delta: delta of the localized loss: how far the two halves of the experts are pulled apart.
        router_aux_loss_coef: coefficient of the balancing loss.
        router_z_loss_coef: coefficient of the z loss (arXiv:2202.08906).
        peft_type: marks the format.
        base_model_name_or_path: bookkeeping of PEFT: the base model.
        revision: bookkeeping of PEFT: of the base model.
        task_type: bookkeeping of PEFT.
        inference_mode: bookkeeping of PEFT.
        auto_mapping: bookkeeping of PEFT.
        peft_version: bookkeeping of PEFT: who wrote it.

    Attributes:
        format_version: the oldest version of the native file format that can say all this; it follows from the rest.

    Raises:
        ConfigError: with one entry per wrong field: what was found and what is allowed.
    """

    r: int | list[int] = field(default=8, metadata=RANK)
    lora_alpha: float | list[float] = field(default=16, metadata=ALPHA)
    use_rslora: bool = field(default=False, metadata=BOOL)
    num_experts: int = field(default=4, metadata=integer(1))
    shared_lora_A: bool = field(default=False, metadata=BOOL)
    target_modules: str | list[str] | None = field(default=None, metadata=optional(TARGETS, 'null, "all-linear", '))
    exclude_modules: str | list[str] | None = field(default=None, metadata=optional(TARGETS, "null, "))
    layers_to_transform: int | list[int] | None = field(default=None, metadata=optional(LAYERS, "null, "))
    layers_pattern: str | list[str] | None = field(default=None, metadata=optional(LAYER_NAMES, "null, "))
    rank_pattern: dict[str, int | list[int]] = field(default_factory=dict, metadata=RANK_PATTERN)
    alpha_pattern: dict[str, float | list[float]] = field(default_factory=dict, metadata=ALPHA_PATTERN)
    num_experts_pattern: dict[str, int] = field(default_factory=dict, metadata=NUM_EXPERTS_PATTERN)
    top_k_pattern: dict[str, int | None] = field(default_factory=dict, metadata=TOP_K_PATTERN)
    init_lora_weights: bool = field(default=True, metadata=BOOL)
    modules_to_save: list[str] | None = field(default=None, metadata=optional(MODULE_NAMES))

    scope: str = field(default="linear", metadata=one_of("linear", "ffn", "model"))
    router_input: str = field(default="hidden", metadata=_ROUTER_INPUT)
    router_depth: int = field(default=1, metadata=integer(0))
    router_hidden_size: int | None = field(default=None, metadata=optional(integer(1)))
    num_tasks: int | None = field(default=None, metadata=optional(integer(1)))
    task_embedding_dim: int | None = field(default=None, metadata=optional(integer(1)))
    layerwise: bool = field(default=False, metadata=BOOL)
    module_order: list[str] | None = field(default=None, metadata=optional(MODULE_PATHS))
    scaling_pass_value: float = field(default=0.0, metadata=since(2, FINITE))
    mix: str = field(default="outputs", metadata=one_of("outputs", "weights"))
    n_splits: int = field(default=1, metadata=integer(1))
    router_bias: bool = field(default=False, metadata=BOOL)
    scoring_func: str = field(default="softmax", metadata=_SCORE)
    router_temperature: float = field(default=1.0, metadata=POSITIVE)
    temperature_hidden_size: int | None = field(default=None, metadata=since(2, optional(integer(1))))
    top_k: int | None = field(default=None, metadata=optional(integer(1), "null (dense) or "))
    threshold: float | None = field(default=None, metadata=optional(PROBABILITY))
    adaptive_threshold: bool = field(default=False, metadata=BOOL)
    top_p: float | None = field(default=None, metadata=since(2, optional(PROBABILITY)))
    entropy_threshold: float | None = field(default=None, metadata=since(2, optional(FRACTION)))
    entropy_index: float = field(default=1.0, metadata=since(2, POSITIVE))
    entropy_eps: float = field(default=0.0, metadata=since(2, FRACTION))
    norm_topk_prob: bool = field(default=True, metadata=BOOL)
    routing: Any = field(default=None, metadata=since(2, optional(ROUTING)))
    routed_scaling_factor: float = field(default=1.0, metadata=POSITIVE)

    lora_dropout: float = field(default=0.0, metadata=FRACTION)
    expert_dropout: float = field(default=0.0, metadata=FRACTION)
    router_dropout: float = field(default=0.0, metadata=FRACTION)
    router_jitter_noise: float = field(default=0.0, metadata=FRACTION)
    router_aux_loss: str = field(default="switch", metadata=one_of("switch", "mixtral", "localized"))
    router_aux_loss_delta: float = field(default=0.0, metadata=FRACTION)
    router_aux_loss_coef: float = field(default=0.0, metadata=NOT_NEGATIVE)
    router_z_loss_coef: float = field(default=0.0, metadata=NOT_NEGATIVE)

    format_version: int = field(init=False, default=1, metadata=_VERSION)
    peft_type: str = field(default=PEFT_TYPE, metadata=exactly(PEFT_TYPE))
    base_model_name_or_path: str | None = field(default=None, compare=False, metadata=optional(TEXT))
    revision: str | None = field(default=None, compare=False, metadata=optional(TEXT))
    task_type: str | None = field(default=None, compare=False, metadata=optional(TEXT))
    inference_mode: bool = field(default=False, compare=False, metadata=BOOL)
    auto_mapping: dict[str, Any] | None = field(default=None, compare=False, metadata=optional(OBJECT))
    peft_version: str | None = field(default=None, compare=False, metadata=optional(TEXT))

    routing_rule: ClassVar[Any] = None
    """The registered rule that `routing` says, of each config; no field."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "format_version", max([1, *self._later().values()]))
        right: dict[str, Any] = {}
        problems: list[str] = []
        for f in dataclasses.fields(self):
            words = f.metadata["words"]
            try:
                value = as_json(getattr(self, f.name))
            except RecursionError:
                problems.append(f"{f.name}: nested too deeply, expected {words}")
                continue
            object.__setattr__(self, f.name, value)
            if f.metadata["holds"](value):
                right[f.name] = value
            else:
                problems.append(f"{f.name}: found {value!r}, expected {words}")
        rule, wrong = rule_of(right.get("routing"))
        if rule is not None:
            object.__setattr__(self, "routing_rule", rule)
            object.__setattr__(self, "routing", routing_dict(rule))
        problems += [*clashes(right), *wrong]
        if problems:
            raise ConfigError("invalid MoeLoraConfig", problems)
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", sorted(set(self.target_modules)))

    def __hash__(self) -> int:  # lists and patterns apart: they need not; 16 and 16.0 hash alike
        return hash(tuple(v for v in self.semantic_dict().values() if not isinstance(v, list | dict)))

    @property
    def targets(self) -> Targets:
        """Which module paths the adapter is applied to."""
        return Targets(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Targets)})

    @property
    def keeps_more(self) -> bool:
        """Whether a token may keep more than top_k experts."""
        return self.top_p is not None or self.entropy_threshold is not None

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the gates of every token sum to 1, in training too.

        That is with norm_topk_prob, and without threshold (nothing may be kept), scaling factor and expert_dropout. A
        registered routing does not promise it.
        """
        is_scaled = self.routed_scaling_factor != 1 or self.expert_dropout > 0
        return self.norm_topk_prob and self.threshold is None and self.routing is None and not is_scaled

    def for_module(self, module: str) -> "ModuleConfig":
        """`for_modules` of one module."""
        return self.for_modules([module])[module]

    def for_modules(self, modules: Iterable[str]) -> dict[str, "ModuleConfig"]:
        """The sizes and selection of each target module, after the patterns.

        Raises:
            ConfigError: the patterns give modules per-expert lists of the wrong length, top_k > num_experts, or what
                the fields would not allow together; with every problem of every module.
        """
        found, problems = self.fitting(modules)
        if problems:
            raise ConfigError("the patterns do not fit together", problems)
        return found

    def fitting(self, modules: Iterable[str]) -> tuple[dict[str, "ModuleConfig"], list[str]]:
        """`for_modules` of those that the patterns fit, and the problems of the others."""
        found: dict[str, ModuleConfig] = {}
        problems: list[str] = []
        for module in modules:
            own = {n: first_match(getattr(self, pattern), module, getattr(self, n)) for pattern, n in PATTERNS.items()}
            experts = own["num_experts"]
            own["top_k"] = own["top_k"] if experts > 1 else None
            same = ("shared_lora_A", "mix", "scope", "router_input")
            wrong = clashes({**own, **{name: getattr(self, name) for name in same}})
            if self.scope == "model" and experts not in (1, self.num_experts):
                wrong.append(f"num_experts: found {experts}, expected {self.num_experts} (one router) or 1 (none)")
            problems += [f"{module}: {problem}" for problem in wrong]
            if not wrong:
                ranks, alphas = (one_per_expert(own[name], experts) for name in ("r", "lora_alpha"))
                most = None if self.keeps_more else own["top_k"]
                found[module] = ModuleConfig(
                    experts, ranks, alphas, self.use_rslora, own["top_k"], most, self.shared_lora_A
                )
        return found, problems

    def routed(self, modules: Iterable[str]) -> list[str]:
        """Those of `modules` that a router serves, in the same order.

        Raises:
            ConfigError: as `for_modules`.
        """
        return [module for module, sizes in self.for_modules(modules).items() if sizes.has_router]

    def resolved(self, modules: Iterable[str]) -> "MoeLoraConfig":
        """The same function on these modules, said in one way, so that two configs can be compared.

        target_modules is their sorted list; the patterns are rewritten so that their order does not matter, because
        JSON writers (PEFT's too) sort it.
        """
        names = sorted(modules)
        owners = names + (sorted({m.rpartition(".")[0] for m in names}) if self.scope == "ffn" else [])
        patterns = {}
        for pattern, name in PATTERNS.items():
            default = getattr(self, name)
            values = {m: first_match(getattr(self, pattern), m, default) for m in owners}
            patterns[pattern] = pattern_for(values, default) if getattr(self, pattern) else {}
        others = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        return dataclasses.replace(self, target_modules=names, **others, **patterns)  # type: ignore[arg-type]

    def _later(self) -> dict[str, int]:
        """{field: the format version that its value needs}, of those that version 1 cannot say."""
        found = {}
        for f in dataclasses.fields(self):
            value, values = getattr(self, f.name), f.metadata.get("values")
            if "version" in f.metadata and (value in values if values else value != f.default):
                found[f.name] = f.metadata["version"]
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary, the inverse of `from_dict`: every field of version 1, and others where they say
        something."""
        later = {f.name for f in dataclasses.fields(self) if "version" in f.metadata and not f.metadata["values"]}
        names = [f.name for f in dataclasses.fields(self) if f.name not in later - self._later().keys()]
        return {name: as_json(getattr(self, name)) for name in names}

    def semantic_dict(self) -> dict[str, Any]:
        """`to_dict` without the bookkeeping fields, which people edit by hand: what a digest covers."""
        return {k: v for k, v in self.to_dict().items() if k not in BOOKKEEPING}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MoeLoraConfig":
        """Builds a config from the parsed adapter_config.json.

        Raises:
            ConfigError: wrong peft_type, newer format_version, or fields that this version does not know (unknown
                fields that are null are accepted: a newer PEFT adds such fields to every config).
        """
        if data.get("peft_type", PEFT_TYPE) != PEFT_TYPE:
            raise ConfigError(
                "not a native config", [f"peft_type: found {data['peft_type']!r}, expected {PEFT_TYPE!r}"]
            )
        version = data.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ConfigError(
                "written by a newer moe-lora-jax",
                [
                    f"format_version: found {version}, this release reads up to {FORMAT_VERSION}: upgrade moe-lora-jax "
                    f"to a release that reads version {version}"
                ],
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = [
            f"{k}: unknown field with value {v!r}{did_you_mean(k, known)}"
            for k, v in data.items()
            if k not in known and v is not None
        ]
        if version is None:
            unknown.append("format_version: missing, expected 1 or 2")
        if unknown:
            raise ConfigError("invalid MoeLoraConfig or adapter_config.json", unknown)
        found = cls(**{k: v for k, v in data.items() if k in known})
        later = [n for n, needed in found._later().items() if needed > version]  # type: ignore[operator]
        if later:
            problems = [f"{n}: found {data[n]!r}, expected what format_version {version} can say" for n in later]
            raise ConfigError("invalid adapter_config.json", problems)
        return found

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "MoeLoraConfig":
        """A published method's routing (`moe_lora_interop.config.presets.PRESETS`), with any field set otherwise.

        Example:
            >>> MoeLoraConfig.preset("mixlora", num_experts=8, target_modules="all-linear").scope
            'ffn'

        Raises:
            ConfigError: no preset of this name, or fields that do not go with it.
        """
        return cls(**preset_fields(name, fields))


def preset_fields(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a preset, with those that are given in their place.

    Raises:
        ConfigError: no preset of this name.
    """
    if name not in PRESETS:
        raise ConfigError("unknown preset", [f"preset: found {name!r}, {expected(name, PRESETS)}"])
    values = {**PRESETS[name], **fields}
    experts = values.get("num_experts", MoeLoraConfig.num_experts)
    return {k: 1 / experts if v is SHARE else v for k, v in values.items()}


_init = MoeLoraConfig.__init__


@functools.wraps(_init)
def _init_of_known(self: MoeLoraConfig, *args: Any, **values: Any) -> None:
    """dataclass's, which does not say which field an unknown keyword was probably meant to be."""
    known = [f.name for f in dataclasses.fields(MoeLoraConfig)]
    problems = [f"{name}: unknown field{did_you_mean(name, known)}" for name in values if name not in known]
    version = values.pop("format_version", 1)  # of a dictionary; the config's own follows from the rest
    if not _is_version(version):
        problems.append(f"format_version: found {version!r}, expected 1 or 2")
    if problems:
        raise ConfigError("invalid MoeLoraConfig", problems)
    _init(self, *args, **values)


MoeLoraConfig.__init__ = _init_of_known  # type: ignore[method-assign]


BOOKKEEPING = tuple(f.name for f in dataclasses.fields(MoeLoraConfig) if not f.compare)
"""Fields that PEFT writes for its own housekeeping: they do not change the function that the adapter computes."""
