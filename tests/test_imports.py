"""Who may import whom: two packages, their rooms, and no arrow that runs back up. CONTRIBUTING says it in words."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moe_lora_interop

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"moe_lora_interop": ROOT / "interop", "moe_lora_jax": ROOT}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "moe_lora_jax"}
TORCH = {"torch", "transformers", "peft", "accelerate"}
# Foreign adapters are often pickles: the one file that may import torch, when it meets one.
READS_PICKLES = "torch_files.py"
# What others add has a function for each framework: the file that calls them imports a framework for its function.
COMPARES_FRAMEWORKS = "moe_lora_interop.testing.frameworks"
RUN_BY_A_SUBPROCESS = "moe_lora_jax.demo.peft_check"  # a script that is read and run elsewhere, never imported

# Every room, from the foundation up: a room imports only from rooms before it.
INTEROP = ["errors", "memory", "progress", "progress_bar", "disk", "config", "rules", "dialects", "checkpoint"]
INTEROP += ["export", "testing", "peft_tuner", "vllm_plugin", "cli", "peft_run"]
JAX_ROOMS = [
    "processes",
    "sharding",
    "compiled",
    "layers",
    "tree",
    "models",
    "adapters",
    "train",
    "measure",
    "report",
    "demo",
]
JAX_ROOMS += ["cli"]
ORDER = [f"moe_lora_interop.{r}" for r in INTEROP] + ["moe_lora_interop"]
ORDER += [f"moe_lora_jax.{r}" for r in JAX_ROOMS] + ["moe_lora_jax"]


def files() -> dict[str, Path]:
    """{dotted module: file} of both packages."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((folder / package).rglob("*.py")):
            found[".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


FILES = files()


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, at the top or in a function; by statement or by name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def arrows() -> Iterator[tuple[str, str]]:
    """(file, file of ours that it imports), a room's face handing out its own files apart."""
    for module, path in FILES.items():
        for target in imported(path):
            hands_out = path.name == "__init__.py" and target.startswith(f"{module}.")
            if target in FILES and target != module and not hands_out:
                yield module, target


def test_every_file_stands_in_a_room_that_the_order_names():
    assert {room(module) for module in FILES} == set(ORDER)


def test_no_room_imports_from_a_room_above_it():
    place = {name: number for number, name in enumerate(ORDER)}
    upward = [f"{a} imports {b}" for a, b in arrows() if place[room(b)] > place[room(a)]]
    assert upward == []


def test_no_files_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for module, target in arrows():
        graph[module].add(target)
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)  # raises CycleError, which names the circle


def test_the_search_finds_every_way_of_importing(tmp_path):
    lines = [
        "from moe_lora_interop.cli import shell",
        "import moe_lora_jax",
        "import_module('torch')",
        "from jax import a",
    ]
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert set(imported(tmp_path / "a.py")) == {"moe_lora_interop.cli.shell", "moe_lora_jax", "torch", "jax"}


@pytest.mark.parametrize("module", [m for m, p in FILES.items() if p.name == "__init__.py"])
def test_a_face_hands_out_nothing_that_is_named_like_one_of_its_files(module):
    tree = ast.parse(FILES[module].read_text("utf-8"))
    names = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    inside = {m.rpartition(".")[2] for m in FILES if m.rpartition(".")[0] == module}
    assert names & inside == set()
    assert ast.get_docstring(tree), "a sentence that says what the room is for"


def offenders(modules, forbidden):
    tops = {m: {name.partition(".")[0] for name in imported(FILES[m])} for m in modules}
    return {m: bad for m, found in tops.items() if (bad := forbidden & found)}


def test_frameworks_stay_where_they_belong():
    interop = [m for m in FILES if m.startswith("moe_lora_interop")]
    tuner = [m for m in interop if room(m) == "moe_lora_interop.peft_tuner"]
    in_vllm = [m for m in interop if room(m) == "moe_lora_interop.vllm_plugin"]
    neutral = [m for m in interop if m not in [*tuner, *in_vllm, COMPARES_FRAMEWORKS]]
    neutral = [m for m in neutral if FILES[m].name != READS_PICKLES]
    in_jax = [
        m for m in FILES if m.startswith("moe_lora_jax") and FILES[m].name != "peft_check.py"
    ]  # run, not imported
    assert (len(neutral) > 40, len(tuner) > 10, len(in_jax) > 40) == (True, True, True)
    assert offenders(neutral, JAX | TORCH) == {}
    assert offenders(tuner + in_vllm, JAX) == {}
    assert offenders(in_jax, {"torch", "peft", "accelerate"}) == {}


def test_the_comparison_of_frameworks_imports_them_only_when_called():
    assert offenders([COMPARES_FRAMEWORKS], (JAX | TORCH) - {"jax", "torch"}) == {}
    top = [n for n in ast.parse(FILES[COMPARES_FRAMEWORKS].read_text("utf-8")).body if isinstance(n, ast.Import)]
    assert [ast.unparse(n) for n in top] == ["import numpy as np"]
    done = python(blocking(JAX | TORCH, "from moe_lora_interop.testing import check_routing"))
    assert done.returncode == 0, done.stderr


def test_the_reader_of_pickles_imports_torch_only_when_called():
    path = FILES["moe_lora_interop.disk.torch_files"]
    assert path.name == READS_PICKLES
    assert offenders(["moe_lora_interop.disk.torch_files"], JAX | (TORCH - {"torch"})) == {}
    top = [n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("torch" in ast.unparse(n).split() for n in top)


def python(code, *args):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def blocking(names, code):
    return f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(names)!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
{code}
"""


@pytest.mark.parametrize(
    ("blocked", "code"),
    [
        (JAX | TORCH, "import moe_lora_interop as m; [getattr(m, n) for n in m.__all__]"),
        (
            JAX | TORCH,
            "from moe_lora_interop.cli import main, inspect_verify, convert, export",
        ),
        (JAX | TORCH | {"tyro", "rich"}, "import moe_lora_interop"),
        ({"torch", "peft"}, "import moe_lora_jax as m; [getattr(m, n) for n in m.__all__]"),
        (JAX, "import moe_lora_interop.peft_tuner"),
    ],
    ids=["interop", "interop_verbs", "interop_without_shell", "moe_lora_jax_without_torch", "peft_tuner_without_jax"],
)
def test_imports_without(blocked, code):
    done = python(blocking(blocked, code))
    assert done.returncode == 0, done.stderr


TRAIN = """
from tests.tiny_training import tiny_model, token_data
from moe_lora_jax.train import TrainSettings, train
train(tiny_model(), token_data(2), sys.argv[1], TrainSettings(steps=1, batch_size=2))
print(*(m for m in sys.modules if m.startswith(("moe_lora_interop.progress_bar", "moe_lora_interop.cli"))))
"""


def test_training_needs_no_shell(tmp_path):
    """The room itself is free of rich too; in a whole process that cannot be asked, because flax imports it."""
    done = python(blocking({"tyro"}, TRAIN), tmp_path)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
    assert offenders([m for m in FILES if room(m) == "moe_lora_jax.train"], {"tyro", "rich"}) == {}


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
import moe_lora_jax as mlj
print(mlj.compare.__name__)
for name in ("plot_tokens", "plot_router"):
    try:
        getattr(mlj, name)
    except ImportError as error:
        print(error)
"""


def test_pictures_name_the_extra_that_they_need():
    done = python(WITHOUT_MATPLOTLIB)
    needed = [f"{n} needs matplotlib: pip install 'moe-lora-jax[report]'" for n in ("plot_tokens", "plot_router")]
    assert done.stdout.splitlines() == ["compare", *needed], done.stderr


def test_the_block_works():
    done = python(blocking({"numpy"}, "import moe_lora_interop"))
    assert done.returncode == 1 and "numpy is blocked" in done.stderr


def test_interop_loads_only_what_it_declares():
    code = """
import sys
before = {n.partition(".")[0] for n in sys.modules}
import moe_lora_interop
from importlib.metadata import packages_distributions as owners
found = {n.partition(".")[0] for n in sys.modules} - before - set(sys.stdlib_module_names)
print(*sorted(n for n in found if n in owners()))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    declared = {"numpy", "safetensors", "ml_dtypes", "regex", "xxhash"}
    assert set(done.stdout.split()) - {"moe_lora_interop"} == declared


def test_the_two_packages_share_one_config_class():
    done = python("import moe_lora_interop as i, moe_lora_jax as m; assert m.MoeLoraConfig is i.MoeLoraConfig")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["jax", "torch", "flax", "numpy", "safetensors", "peft"])
def test_no_file_shadows_a_framework(name):
    folders = [*(folder / package for package, folder in FOLDERS.items()), ROOT / "tests"]
    assert [p for folder in folders for p in folder.rglob(f"{name}.py")] == []


def test_the_package_has_a_name_of_its_own():
    """`interop` is another project's on PyPI: the folder of that name is no package, and nothing of ours imports it."""
    assert Path(moe_lora_interop.__file__) == ROOT / "interop" / "moe_lora_interop" / "__init__.py"
    assert not (ROOT / "interop" / "__init__.py").exists()
    assert [m for m, path in FILES.items() if "interop" in {name.partition(".")[0] for name in imported(path)}] == []
