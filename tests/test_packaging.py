"""What is promised of the distribution: safe loading, one version, pinned dependencies, verbs that name their extra."""

import ast
import re
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moe_lora_interop
import moe_lora_jax
from moe_lora_interop.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moe_lora_interop", "moe_lora_jax")
FOLDERS = (ROOT / "interop" / "moe_lora_interop", ROOT / "moe_lora_jax")
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def unsafe(source: str) -> list[str]:
    """What in this code could run code that a file brings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name.endswith("torch.load") and given.get("weights_only") != "True":
                found.append(f"{name} without weights_only=True")
            if name.endswith(("np.load", "numpy.load")) and given.get("allow_pickle", "False") != "False":
                found.append(f"{name} with allow_pickle")
            if name in ("eval", "exec"):
                found.append(name)
            if given.get("trust_remote_code", "False") != "False":
                found.append(f"{name} with trust_remote_code")
    return found


@pytest.mark.parametrize("path", [p for folder in FOLDERS for p in folder.rglob("*.py")], ids=lambda p: p.stem)
def test_no_file_can_run_what_it_reads(path):
    assert unsafe(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.load(p)", "torch.load without weights_only=True"),
        ("torch.load(p, weights_only=False)", "torch.load without weights_only=True"),
        ("torch.load(p, weights_only=True)", None),
        ("np.load(p, allow_pickle=True)", "np.load with allow_pickle"),
        ("import pickle", "imports pickle"),
        ("from cloudpickle import loads", "imports cloudpickle"),
        ("A.from_pretrained(p, trust_remote_code=True)", "A.from_pretrained with trust_remote_code"),
        ("A.from_pretrained(p, trust_remote_code=flag)", "A.from_pretrained with trust_remote_code"),
        ("exec(text)", "exec"),
        ("model.eval()", None),
    ],
)
def test_the_search_finds(code, found):
    assert unsafe(code) == ([found] if found else [])


def test_one_version():
    assert moe_lora_interop.__version__ == moe_lora_jax.__version__ == version("moe-lora-jax")
    assert PROJECT["dynamic"] == ["version"]
    assert f"## [{moe_lora_interop.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"\nversion: {moe_lora_interop.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_both_packages_are_typed():
    assert all((folder / "py.typed").is_file() for folder in FOLDERS)


def pins(name: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_everything_an_install_brings_is_pinned_once():
    """The requirements of all extras and, transitively, theirs; at the versions that are installed here."""
    from importlib.metadata import PackageNotFoundError, requires

    pinned = {canonicalize_name(name): number for name, number in pins().items()}
    assert len(pinned) == len(pins())
    todo, seen, problems = [("moe-lora-jax", "all")], set(), []
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = version(name)
        except PackageNotFoundError:
            problems.append(f"{name}: not installed")
            continue
        if name != "moe-lora-jax" and pinned.get(name) != found.partition("+")[0]:
            problems.append(f"{name}: installed {found}, pinned {pinned.get(name)}")
        for line in requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    assert len(seen) > 50 and problems == []


@pytest.mark.parametrize(
    ("name", "python", "groups"),
    [("constraints.txt", "3.11", None), ("constraints-current.txt", "3.13", ("jax", "train", "report", "quant"))],
)
def test_every_lower_bound_admits_the_pinned_version(name, python, groups):
    extras = PROJECT["optional-dependencies"]
    wanted = [PROJECT["dependencies"], *(extras[group] for group in groups or extras)]
    requirements = [Requirement(line) for group in wanted for line in group]
    pinned = {canonicalize_name(name): number for name, number in pins(name).items()}
    wrong = [
        f"{r}: pinned {pinned.get(canonicalize_name(r.name))}"
        for r in requirements
        if r.name != "moe-lora-jax"
        and (r.marker is None or r.marker.evaluate({"python_version": python}))
        and not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))
    ]
    assert wrong == []


@pytest.mark.parametrize("at", ["import", "call"])
def test_a_verb_without_its_packages_says_which_extra_to_install(at, monkeypatch, capsys):
    missing = ModuleNotFoundError("No module named 'jax'", name="jax")

    def verb() -> None:
        raise missing

    class Point:
        name, extras = "train", ["train"]

        def load(self):
            if at == "import":
                raise missing
            return verb

    monkeypatch.setattr(cli, "entry_points", lambda group: [Point()])
    assert cli.main(["train"]) == 2
    advice = "moe-lora train needs the package 'jax': pip install 'moe-lora-jax[train]'\n"
    assert capsys.readouterr().err == advice


def test_the_extras_that_verbs_name_exist():
    declared = PROJECT["entry-points"]["moe_lora.verbs"]
    named = {name: extra for name, value in declared.items() for extra in re.findall(r"\[(\w+)]", value)}
    assert named["train"] == named["measure"] == "train"
    assert set(named.values()) <= PROJECT["optional-dependencies"].keys()
    assert {p.name for p in entry_points(group=cli.GROUP) if p.value.startswith(PACKAGES)} <= declared.keys()
    # a verb without an extra needs what every install has
    for name in declared.keys() - named.keys():
        assert declared[name].startswith("moe_lora_interop."), name
