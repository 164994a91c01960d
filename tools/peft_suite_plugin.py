"""The pytest plugin of tools/peft_suite.py: points PEFT's own tests at MOE_LORA, and names each refusal.

PEFT's files are run as they are, in place. What is changed, once a test module is imported:

- parametrised lists: PEFT's big tables become ours (`peft_suite_cases`), a list of config classes becomes
  [MoeLoraConfig], and a LoraConfig in a small list becomes the MoeLoraConfig of the same fields;
- the name LoraConfig in the module means MoeLoraConfig: MOE_LORA is held to what PEFT asks of LoRA, not to the
  shorter list that it asks of a method it does not know;
- `set_init_weights_false` spells the option as LoRA does, and `hub_online_once` never goes online.

A test that concerns other methods only, or LoRA's parameter names, is skipped with that reason.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import peft_suite_cases
import pytest
from peft import LoraConfig, PeftConfig

from moe_lora_interop.peft_tuner import MoeLoraConfig

NOT_OURS = "not about MOE_LORA: "

# A refusal counts as one only if it is this sentence. What PEFT tests there is impossible for a mixture with a router.
REFUSALS = {
    "merging": "a MOE_LORA adapter cannot be merged: its router weighs the experts anew for every token",
    "add_weighted_adapter": "MOE_LORA adapters cannot be combined with add_weighted_adapter",
    "layers_to_transform with a string as target_modules (PEFT's LoRA refuses it too)": (
        "while target_modules is a string, expected null"
    ),
    "`bias` option of LoRA": "bias: unknown field with value",
    "embedding, convolution or attention as a target": "no linear layer of this name is targeted",
    "a layer other than linear": "expected torch.nn.Linear or transformers' Conv1D",
    "PeftMixedModel (refused by PEFT)": "'MOE_LORA' is not compatible with the `PeftMixedModel`",
}

# Failures that are understood and are no fault: (pattern of the test's id, part of the message) -> reason.
KNOWN: dict[tuple[str, str], str] = {
    (r"test_mixed_adapter_batches_mlp\[", "allclose"): (
        "rounding: fewer rows at once round the logits differently by 5e-7, and the test allows a log probability of "
        "-7e-4 to differ by 1e-5 of itself"
    ),
    (r"mixed_adapter_batches\[.*OPT", "Length of `adapter_names` should be the same as the number of inputs"): (
        "OPT flattens batch and sequence before its feed-forward layers: PEFT's LoRA raises the same error there"
    ),
}

_OTHER_CONFIG = re.compile(
    "|".join(
        rf"\b{name}\b"
        for name in dir(peft)
        if name.endswith("Config") and name not in ("LoraConfig", "PeftConfig", "BdLoraConfig")
    )
)
_LORA_INTERNALS = re.compile(
    r"\blora_[A-Z]|\blora_embedding|\blora\.|[dD]o[rR][aA]|_register_custom_module|LoraLayer|adapter_layer_names"
    r"|trainable_token|multihead|MHA|alora|layer_replication|MixedModel|\.scaling\b|\.r\["
)
_HUB = re.compile(r'"(bert|facebook|google|HuggingFaceM4|openai-community|Qwen|[\w-]+-internal-testing)[/-]')

_quick = bool(os.environ.get("PEFT_SUITE_QUICK"))
_tables = peft_suite_cases.QUICK if _quick else peft_suite_cases.TABLES
_known_fields = {f.name for f in dataclasses.fields(MoeLoraConfig)}


def _stub_missing_packages() -> None:
    """PEFT's helpers import these two at the top, and use them only in tests that download data or diffusion models."""
    for name, attribute in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        try:
            __import__(name)
        except ModuleNotFoundError:
            stub = types.ModuleType(name)
            setattr(stub, attribute, type(attribute, (), {}))
            sys.modules[name] = stub


_stub_missing_packages()

# --- parameter lists -------------------------------------------------------------------------------------------------


class _Inapplicable(Exception):
    """A row of a list that uses what MOE_LORA has no field for."""


def _ours(value: Any) -> Any:
    """A value of a row: LoRA's class, or a LoraConfig, as MOE_LORA's."""
    if isinstance(value, type) and issubclass(value, PeftConfig):
        return MoeLoraConfig
    if not isinstance(value, PeftConfig):
        return value
    if type(value) is not LoraConfig:
        raise _Inapplicable(type(value).__name__)
    plain = LoraConfig()
    changed = {k: v for k, v in vars(value).items() if v != getattr(plain, k) and k != "peft_type"}
    if unknown := sorted(k for k in changed if k not in _known_fields):
        raise _Inapplicable(", ".join(unknown))
    return MoeLoraConfig(**changed)


def _converted(rows: list) -> list:
    """A small list of PEFT's with MOE_LORA in LoRA's place; rows of other methods are left out."""
    if all(isinstance(row, type) and issubclass(row, PeftConfig) for row in rows):
        return [MoeLoraConfig]
    kept = []
    for row in rows:
        cells = row if isinstance(row, tuple) else (row,)
        classes = [cell for cell in cells if isinstance(cell, type) and issubclass(cell, PeftConfig)]
        if any(cls is not LoraConfig for cls in classes):
            continue
        if classes and any(k not in _known_fields for cell in cells if isinstance(cell, dict) for k in cell):
            continue
        with contextlib.suppress(_Inapplicable):
            converted = tuple(_ours(cell) for cell in cells)
            kept.append(converted if isinstance(row, tuple) else converted[0])
    return kept


def _has_configs(rows: list) -> bool:
    cells = [cell for row in rows for cell in (row if isinstance(row, tuple) else (row,))]
    return any(isinstance(c, PeftConfig) or (isinstance(c, type) and issubclass(c, PeftConfig)) for c in cells)


def _functions(module: types.ModuleType) -> Iterator[Any]:
    for holder in (
        module,
        *(v for v in vars(module).values() if inspect.isclass(v) and v.__module__ == module.__name__),
    ):
        for name, value in list(vars(holder).items()):
            if name.startswith("test_") and inspect.isfunction(value):
                yield value


def _adapt(module: types.ModuleType) -> None:
    tables = {id(getattr(module, name)): rows for name, rows in _tables.items() if hasattr(module, name)}
    for function in _functions(module):
        marks, about_us, lists = [], False, False
        for mark in getattr(function, "pytestmark", []):
            if mark.name != "parametrize" or not isinstance(mark.args[1], list):
                marks.append(mark)
                continue
            rows = mark.args[1]
            if _has_configs(rows):
                lists = True
            if id(rows) in tables:
                new = tables[id(rows)]
            elif _has_configs(rows):
                new = _converted(rows)
            else:
                marks.append(mark)
                continue
            about_us = about_us or (_has_configs(new) and bool(new))
            if new:
                marks.append(pytest.mark.parametrize(mark.args[0], new, **mark.kwargs).mark)
            else:
                marks.append(mark)
        function.pytestmark = marks
        reason = _why_not_ours(function, lists, about_us)
        if reason:
            # one skip for the whole function, not one for each row of other methods
            function.pytestmark = [m for m in marks if m.name not in ("parametrize", "skipif")]
            function.pytestmark.append(pytest.mark.skip(reason=NOT_OURS + reason).mark)
    _alias(module)


def _why_not_ours(function: Any, lists: bool, about_us: bool) -> str | None:
    if about_us:
        return None
    if lists:
        return "a list of cases without LoRA, or with options that only LoRA has"
    source = inspect.getsource(function)
    if "LoraConfig(" not in source or _OTHER_CONFIG.search(source.replace("LoraConfig", "")):
        return "tests another method"
    if _LORA_INTERNALS.search(source):
        return "tests LoRA's parameter names or variants"
    if _HUB.search(source):
        return "needs a model of the hub"
    return None


def _set_init_weights_false(config_cls: type, kwargs: dict) -> dict:
    return {**kwargs, "init_lora_weights": False}


@contextlib.contextmanager
def _never_online(model_id: str) -> Iterator[None]:
    yield


def _alias(module: types.ModuleType) -> None:
    common = [m for n, m in sys.modules.items() if n.endswith((".testing_common", ".testing_utils"))]
    for target in (module, *common):
        for name, value in (
            ("LoraConfig", MoeLoraConfig),
            ("set_init_weights_false", _set_init_weights_false),
            ("hub_online_once", _never_online),
        ):
            if hasattr(target, name):
                setattr(target, name, value)


# --- hooks -----------------------------------------------------------------------------------------------------------


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module):
        _adapt(collector.obj)


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)  # a test of a tiny model is faster so, and two run at once
    if not hasattr(config, "workerinput"):
        peft_suite_cases.build_models(Path.cwd())


def _refusal(error: BaseException | None) -> str | None:
    """Which refusal the error is, or hides (pytest.raises with another message raises anew)."""
    while error is not None:
        for name, sentence in REFUSALS.items():
            if sentence in str(error):
                return name
        error = error.__cause__ or (error.__context__ if isinstance(error, AssertionError) else None)
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.failed and call.excinfo is not None:
        message = str(call.excinfo.value)
        name = _refusal(call.excinfo.value)
        known = next((r for (i, m), r in KNOWN.items() if re.search(i, item.nodeid) and m in message), None)
        kind, reason = ("refused", name) if name else ("known", known) if known else ("failed", message[:300])
        report.user_properties.append(("peft_suite", (kind, reason)))
    return report


class _Counter:
    """Collects the outcome of every test, on the process that started the run."""

    def __init__(self, path: str):
        self.path, self.results = path, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties).get("peft_suite")
        if told:
            self.results[report.nodeid] = tuple(told)
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
            kind = "not ours" if reason.startswith(NOT_OURS) else "skipped"
            self.results[report.nodeid] = (kind, reason.removeprefix(NOT_OURS))
        elif report.when == "call":
            self.results[report.nodeid] = ("passed", "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.results[report.nodeid] = ("failed", f"collection: {report.longreprtext[-300:]}")

    def pytest_sessionfinish(self) -> None:
        with open(self.path, "w", encoding="utf-8") as file:
            json.dump(self.results, file)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    path = os.environ.get("PEFT_SUITE_RESULTS")
    if path and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Counter(path))
