"""Runs notebooks where they lie and keeps their new outputs, without times and versions: `make notebooks-outputs`.

`jupyter execute` has no way to leave the times out.
"""

import sys
from copy import deepcopy
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for name in sys.argv[1:]:
    notebook = nbformat.read(name, as_version=4)
    metadata = deepcopy(notebook.metadata)
    where = {"metadata": {"path": str(Path(name).parent)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False, resources=where).execute()
    notebook.metadata = metadata
    nbformat.write(notebook, name)
