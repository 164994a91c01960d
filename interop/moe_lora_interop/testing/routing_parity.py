"""Whether the functions of a routing agree, and keep the contract of `config.routings`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from moe_lora_interop.config.routings import FRAMEWORKS, find_routing, registration
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.testing.frameworks import Answer, Evaluate, evaluator

TOKENS, EXPERTS = 24, 5
ON_EDGES = ("ties", "zeros")  # where a difference of the function may rightly be none of its derivatives


def check_routing(
    routing: Any, *, frameworks: Sequence[str] = FRAMEWORKS, tolerance: float = 1e-5, seed: int = 0
) -> tuple[str, ...]:
    """Compares a routing's functions with each other, and each with the contract, on logits that are hard to treat.

    On random logits, ties, zeros, logits of 1e4 and one expert, for no top_k, 1, 2 and all: the scores and gates of
    each function, the derivatives of the JAX and PyTorch functions, and these with finite differences of the numpy
    function (except at ties, jumps and kinks). The contract: shape and dtype, finite values and derivatives,
    scores >= 0, at most top_k gates that are not 0, and each token decided by itself.

        check_routing(Mine(power=3.0))  # ('jax', 'torch', 'numpy')

    Args:
        routing: the name of a registered routing, whose newest version is taken; its class; or an object, with fields
            other than the defaults. Its class need not be registered yet.
        frameworks: those to compare, if not every one that the routing has a function for.
        tolerance: how far values and derivatives may be apart, absolute where they are below 1, else relative.
        seed: of the random logits.

    Returns:
        The frameworks that were compared.

    Raises:
        ConfigError: with one entry per difference or breach: which output, which functions, on which logits; or fewer
            than two functions to compare.
        ImportError: a framework is not installed; leave it out of `frameworks`.
    """
    kind = find_routing(routing) if isinstance(routing, str) else routing
    rule = kind() if isinstance(kind, type) else kind
    found = tuple(name for name in FRAMEWORKS if name in frameworks and callable(getattr(rule, name, None)))
    if len(found) < 2:
        problem = f"functions: found {', '.join(found) or 'none'}, expected two of {', '.join(FRAMEWORKS)} to compare"
        raise ConfigError("nothing to compare", [problem])
    registered = registration(type(rule))
    ks = (None, 1, 2, EXPERTS) if registered is None or registered.takes_top_k else (None,)
    problems: list[str] = []
    for top_k in ks:
        functions = {name: evaluator(rule, name, top_k) for name in found}
        for case, logits in _cases(np.random.default_rng(seed)).items():
            if top_k is None or top_k <= logits.shape[1]:
                where = f"{case}, top_k {top_k}"
                problems += [
                    f"{problem} ({where})" for problem in _differences(functions, case, logits, top_k, tolerance)
                ]
    if problems:
        name = registered.name if registered else type(rule).__name__
        raise ConfigError(f"the routing {name!r} breaks its contract", list(dict.fromkeys(problems)))
    return found


def _cases(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shape = (TOKENS, EXPERTS)
    found = {
        "random": rng.normal(0, 2, shape),
        "ties": rng.integers(-2, 3, shape),
        "zeros": np.zeros(shape),
        "large": rng.normal(0, 1e4, shape),
        "one expert": rng.normal(0, 2, (TOKENS, 1)),
    }
    return {case: z.astype(np.float32).astype(np.float64) for case, z in found.items()}


def _differences(
    functions: Mapping[str, Evaluate], case: str, z: np.ndarray, top_k: int | None, tolerance: float
) -> Iterator[str]:
    """What is wrong on these logits, one line for each output and pair of functions."""
    cotangent = np.random.default_rng(1).normal(size=z.shape)
    others = z.copy()
    others[TOKENS // 2 :] = 2 * z[TOKENS // 2 :] + np.arange(z.shape[1])  # other tokens beside those of the first half
    answers: dict[str, Answer] = {}
    for name, function in functions.items():
        try:
            answers[name], beside = function(z, cotangent), function(others, cotangent)
        except ConfigError as error:
            yield from error.problems
            continue
        yield from (f"{name}: {problem}" for problem in _breaches(answers[name], name, top_k))
        for word in ("scores", "gates"):
            first, second = (getattr(a, word)[: TOKENS // 2] for a in (answers[name], beside))
            if problem := _apart(first, second, tolerance):
                yield f"{name}: {word} of a token depend on other tokens: {problem}"
        smooth = np.isfinite(answers[name].gates_slope).mean()
        if case == "random" and smooth < 0.5:
            yield f"{name}: gates, slope: found kinks or jumps at {1 - smooth:.0%} of the logits, expected at most half"
    for (one, a), (other, b) in combinations(answers.items(), 2):
        for word in Answer._fields:
            if word.endswith("slope") and "numpy" in (one, other) and case in ON_EDGES:
                continue
            if problem := _apart(getattr(a, word), getattr(b, word), tolerance):
                yield f"{word.replace('_', ', ')}: {one} against {other}: {problem}"


def _breaches(answer: Answer, name: str, top_k: int | None) -> Iterator[str]:
    for word, values in answer._asdict().items():
        is_difference = name == "numpy" and word.endswith("slope")  # nan means a kink
        if not is_difference and (wrong := np.argwhere(~np.isfinite(values))).size:
            found = f"found {values[tuple(wrong[0])]} at {_place(wrong[0])}"
            yield f"{word.replace('_', ', ')}: {found}, expected a finite number"
    if (wrong := np.argwhere(answer.scores < 0)).size:
        yield f"scores: found {answer.scores[tuple(wrong[0])]:g} at {_place(wrong[0])}, expected >= 0"
    most = np.count_nonzero(answer.gates, axis=-1).max()
    if top_k is not None and most > top_k:
        yield f"gates: found {most} that are not 0 at one token, expected at most {top_k}"


def _apart(found: np.ndarray, expected: np.ndarray, tolerance: float) -> str | None:
    """Where two arrays differ most; nan differs from nothing: it is reported by itself, or a kink."""
    difference = np.abs(found - expected) / np.maximum(1, np.maximum(np.abs(found), np.abs(expected)))
    difference = np.nan_to_num(difference, nan=0.0)
    if not (wrong := difference > tolerance).any():
        return None
    place = np.unravel_index(difference.argmax(), difference.shape)
    return (
        f"found {found[place]:.8g} and {expected[place]:.8g} at {_place(place)}, the worst of {wrong.sum()} that differ"
    )


def _place(place: Any) -> str:
    return f"token {place[0]}, expert {place[1]}"
