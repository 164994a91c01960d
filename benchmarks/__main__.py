"""All benchmarks that a CPU can run, in one table: `python -m benchmarks` (`make bench`).

--quick           tiny sizes, a minute: shows that the scripts work; no goal is judged
--markdown FILE   also writes the table there
--only NAME       one of the modules below; may be repeated
"""

import argparse
import importlib
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.machine import describe
from benchmarks.table import markdown, results, show

CPU = ("layer", "model", "feed_forward", "program", "tuner", "conversion", "startup", "decode", "packing")
QUICK = (*CPU, "gpu")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--only", action="append", choices=QUICK, metavar="NAME")
    options = parser.parse_args(arguments)
    found = []
    with Console(stderr=True).status("") as status:
        for name in options.only or (QUICK if options.quick else CPU):
            status.update(f"benchmarks.{name}")
            found += results(importlib.import_module(f"benchmarks.{name}").rows, quick=options.quick)
    show(found)
    if options.markdown:
        options.markdown.write_text(f"{describe()}\n\n{markdown(found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
