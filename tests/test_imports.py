"""Who imports whom: interop stands alone, JAX and PyTorch never meet."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "moe_lora_jax"}
TORCH = {"torch", "transformers", "peft", "accelerate"}
RUN_BY_A_SUBPROCESS = {"peft_check.py"}  # scripts that are read and run elsewhere, never imported


def python(code):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)


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


PUBLIC = ["Adapter", "CheckpointError", "ConfigError", "MoeLoraConfig", "convert", "detect", "inspect", "read"]


@pytest.mark.parametrize(
    ("blocked", "code"),
    [
        (JAX | TORCH, f"import interop; [getattr(interop, n) for n in {[*PUBLIC, 'verify', 'write']}]"),
        (JAX | TORCH, "import interop.cli, interop.verbs, interop.dialects"),
        (JAX | TORCH | {"tyro", "rich"}, "import interop"),
        ({"torch", "peft"}, "import moe_lora_jax as m; [getattr(m, n) for n in m.__all__]"),
        (JAX, "import interop.peft_tuner"),
    ],
    ids=["interop", "interop_verbs", "interop_without_shell", "moe_lora_jax_without_torch", "peft_tuner_without_jax"],
)
def test_imports_without(blocked, code):
    done = python(blocking(blocked, code))
    assert done.returncode == 0, done.stderr


def test_the_block_works():
    done = python(blocking({"numpy"}, "import interop"))
    assert done.returncode == 1 and "numpy is blocked" in done.stderr


def test_interop_loads_only_what_it_declares():
    code = """
import sys
before = {n.partition(".")[0] for n in sys.modules}
import interop
from importlib.metadata import packages_distributions as owners
found = {n.partition(".")[0] for n in sys.modules} - before - set(sys.stdlib_module_names)
print(*sorted(n for n in found if n in owners()))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"interop", "numpy", "safetensors", "ml_dtypes", "regex", "xxhash"}


def test_the_two_packages_share_one_config_class():
    done = python("import interop, moe_lora_jax as m; assert m.MoeLoraConfig is interop.MoeLoraConfig")
    assert done.returncode == 0, done.stderr


def imported(path):
    """Top-level packages that a file imports anywhere, at the top or in a function; by statement or by name."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            yield from (a.value.partition(".")[0] for a in node.args if isinstance(a, ast.Constant))


def sources(package):
    return [p for p in sorted((ROOT / package).rglob("*.py")) if p.name not in RUN_BY_A_SUBPROCESS]


def offenders(paths, forbidden):
    return {str(p.relative_to(ROOT)): bad for p in paths if (bad := forbidden & set(imported(p)))}


# Foreign adapters are often pickles: the one file that may import torch, when it meets one.
READS_PICKLES = "torch_files.py"


def test_interop_never_imports_a_framework():
    paths = [p for p in sources("interop") if "peft_tuner" not in p.parts and p.name != READS_PICKLES]
    assert len(paths) > 10
    assert offenders(paths, JAX | TORCH) == {}


def test_the_reader_of_pickles_imports_torch_only_when_called():
    path = ROOT / "interop" / READS_PICKLES
    if path.exists():
        assert offenders([path], JAX | (TORCH - {"torch"})) == {}
        top = [n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not any("torch" in ast.unparse(n).split() for n in top)


def test_the_tuner_never_imports_jax():
    paths = [p for p in sources("interop") if "peft_tuner" in p.parts]
    assert len(paths) > 3
    assert offenders(paths, JAX) == {}


def test_moe_lora_jax_never_imports_torch_or_peft():
    paths = sources("moe_lora_jax")
    assert len(paths) > 10
    assert offenders(paths, {"torch", "peft", "accelerate"}) == {}


@pytest.mark.parametrize("name", ["jax", "torch", "flax", "numpy", "safetensors", "peft"])
def test_no_file_shadows_a_framework(name):
    assert [p for package in ("interop", "moe_lora_jax", "tests") for p in (ROOT / package).rglob(f"{name}.py")] == []
    assert not (ROOT / "tests" / "interop").exists()
