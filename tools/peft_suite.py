"""Runs PEFT's own tests against MOE_LORA: `python tools/peft_suite.py [--quick] [--json] [pytest arguments]`.

Downloads the source distribution of the installed PEFT (its tests are not in the wheel) to build/peft_suite, and runs
its tests of custom and decoder models there, unchanged; `peft_suite_plugin` says what they are given. Prints one table.
Exit code 0: nothing failed but what is refused by design (each by its sentence); 1: something did; 2: no download.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "peft_suite"
FILES = ("test_custom_models.py", "test_decoder_models.py")
KINDS = ("passed", "failed", "refused", "known", "skipped", "not ours")
TITLES = {
    "passed": "passed",
    "failed": "failed",
    "refused": "refused by design",
    "known": "known difference",
    "skipped": "skipped by PEFT's own condition",
    "not ours": "not about MOE_LORA (one for each test function)",
}


class Unreachable(Exception):
    """PyPI gave no source distribution."""


def download(cache: Path = CACHE) -> Path:
    """The tests of the installed PEFT version, fetched once.

    Raises:
        Unreachable: with pip's last line.
    """
    release = version("peft")
    tests = cache / f"peft-{release}" / "tests"
    if tests.is_dir():
        return tests
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1"]
        done = subprocess.run(
            [*pip, "--no-deps", "--no-binary=:all:", "--no-build-isolation", f"peft=={release}", "--dest", folder],
            capture_output=True,
            text=True,
        )
        archives = list(Path(folder).glob("peft-*.tar.gz"))
        if done.returncode or not archives:
            raise Unreachable((done.stderr.strip().splitlines() or ["no archive"])[-1])
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        unpacked = next(Path(folder).glob("peft-*/"))
        (unpacked / "tests" / "__init__.py").touch()  # their relative imports need it, and the archive lacks it
        unpacked.rename(cache / f"peft-{release}")
    return tests


def run(tests: Path, arguments: list[str], quick: bool = False) -> dict[str, tuple[str, str]]:
    """{test id: (kind, reason)} of one pytest run."""
    models = CACHE / "models"
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        ini = Path(folder) / "pytest.ini"
        ini.write_text("[pytest]\nmarkers =\n    single_gpu_tests\n    multi_gpu_tests\n    regression\n")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)]),
            "PEFT_SUITE_RESULTS": str(results),
            "PEFT_SUITE_QUICK": "1" if quick else "",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(models),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-p", "peft_suite_plugin", "-p", "no:cacheprovider", "-q"]
        command += ["-c", str(ini), "--rootdir", str(tests.parent), "-W", "ignore"]
        command += ["--no-header", "--tb=no", "--disable-warnings", *arguments]
        done = subprocess.run(
            [*command, *(str(tests / name) for name in FILES)], cwd=models, env=environment, stdout=2
        )  # the table alone goes to stdout
        if not results.exists():
            raise SystemExit(f"pytest ended with code {done.returncode} before any result")
        return {test: (kind, reason) for test, (kind, reason) in json.loads(results.read_text()).items()}


def summary(results: dict[str, tuple[str, str]]) -> str:
    """One table: file x kind, then the reasons."""
    by_file: dict[str, Counter[str]] = {}
    for test, (kind, _) in results.items():
        by_file.setdefault(test.split("::")[0].rsplit("/", 1)[-1], Counter())[kind] += 1
    lines = [f"PEFT {version('peft')}'s own tests with MoeLoraConfig", ""]
    lines.append(f"{'':26}" + "".join(f"{kind:>10}" for kind in KINDS))
    total: Counter[str] = Counter()
    for name, counts in sorted(by_file.items()):
        lines.append(f"{name:26}" + "".join(f"{counts[kind]:>10}" for kind in KINDS))
        total += counts
    lines.append(f"{'total':26}" + "".join(f"{total[kind]:>10}" for kind in KINDS))
    for kind in KINDS[1:]:
        reasons = Counter(reason for k, reason in results.values() if k == kind)
        if reasons:
            lines += ["", f"{TITLES[kind]}:"]
            lines += [f"{count:>6}  {_short(reason)}" for reason, count in reasons.most_common()]
    failed = [test for test, (kind, _) in results.items() if kind == "failed"]
    return "\n".join([*lines, *(f"FAILED {test}" for test in failed)])


def _short(reason: str) -> str:
    first = " ".join(reason.split())
    return first if len(first) <= 110 else first[:107] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a subset for CI: three MLP cases, one decoder")
    parser.add_argument("--json", action="store_true", help="{test: [kind, reason]} instead of the table")
    parser.add_argument("-n", default="2", help="processes")
    options, rest = parser.parse_known_args()
    try:
        tests = download()
    except Unreachable as error:
        print(f"peft_suite: PyPI gave no source distribution of peft {version('peft')}: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    results = run(tests, ["-n", options.n, *rest], options.quick)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        print(summary(results))
        print(f"\n{time.monotonic() - start:.0f} s")
    return 1 if any(kind == "failed" for kind, _ in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
