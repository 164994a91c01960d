"""Data from disk: a file four times as long takes no more memory, and what is read is what it was."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_lora_jax.train import examples as examples_module
from moe_lora_jax.train.batches import TrainBatches, eval_batches
from moe_lora_jax.train.data import TokenData, check_vocabulary, read_data, split_by, split_data
from moe_lora_jax.train.errors import BadLine, DataError
from moe_lora_jax.train.examples import Example, Examples, ExampleWriter
from moe_lora_jax.train.tables import read_records

LINES, WORDS = 2_000, 250
PEAK = 2**20  # of Python and numpy, in bytes
ANONYMOUS = 4 * 2**20  # of the process, without pages of files


class Bytes:
    """A tokenizer that is fast: every byte is a token, the end is 0."""

    eos_token_id = 0
    bos_token_id = None

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        ids = list(text.encode())
        return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}


def write(path: Path, lines: int) -> Path:
    """Lines of about 1 kB; one in ten is longer than 1000 tokens."""
    with path.open("w") as file:
        for number in range(lines):
            text = f"{number:06} " * (WORDS if number % 10 == 0 else WORDS // 2)
            file.write(json.dumps({"text": text, "topic": "ab"[number % 2], "unread": 1}) + "\n")
    return path


def use(path: Path) -> None:
    """Everything that is done with data before and while training."""
    data = read_data(path, Bytes(), max_length=1000, vocab_size=256, keys=("topic",))
    train, held_out = split_data(data, 0.1, 0)
    check_vocabulary(train, SimpleNamespace(config=SimpleNamespace(vocab_size=256)))
    assert train.digest and train.describe() and train.longest == 1000
    assert sum(len(part.examples) for part in split_by(data, "topic").values()) == len(data.examples)
    batches = TrainBatches(train.examples, batch_size=4, gradient_accumulation=1, epochs=1, seed=0, pad_id=0)
    for _ in range(10):
        next(batches)
    for _ in eval_batches(held_out.examples, batch_size=8, pad_id=0):
        pass


def test_the_memory_of_python_and_numpy_does_not_grow_with_the_file(tmp_path, measured):
    peaks = []
    use(write(tmp_path / "warm.jsonl", 100))
    for lines in (LINES, 4 * LINES):
        path = write(tmp_path / f"{lines}.jsonl", lines)
        tracemalloc.start()
        use(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = path.stat().st_size
    assert size > 7 * PEAK
    measured(
        f"peak of Python's memory for {size / 2**20:.0f} MB of JSONL less that for a quarter, MB",
        np.diff(peaks)[0] / 2**20,
    )
    assert peaks[1] - peaks[0] < PEAK, peaks


WORKER = """
import sys, threading
from pathlib import Path
from tests.test_streaming import use

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

use(Path(sys.argv[1]))
for path in sys.argv[1:]:
    peak, done = [0], threading.Event()
    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    use(Path(path))
    done.set()
    thread.join()
    print(peak[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what memory is anonymous")
def test_the_memory_of_the_process_does_not_grow_with_the_file(tmp_path, measured):
    """Without pages of files, which the system takes back when others need the memory."""
    paths = [write(tmp_path / f"{lines}.jsonl", lines) for lines in (LINES, 4 * LINES)]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", WORKER, *paths], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    measured("anonymous memory of a process that reads it, less that for a quarter, MB", (many - few) / 2**20)
    assert many - few < ANONYMOUS, (few, many)


def test_what_comes_back_from_disk_is_what_was_written():
    rng = np.random.default_rng(0)
    made = [
        Example(rng.integers(0, 2**31, n).astype(np.int32), rng.random(n) < 0.5, int(rng.integers(1, 2**40)))
        for n in rng.integers(1, 30, 50)
    ]
    with ExampleWriter() as writer:
        for example in made:
            writer.add(example.ids.tolist(), example.counted.tolist(), example.line)
        stored = writer.examples()
    in_memory = Examples.of(tuple(made))
    assert Examples.of(stored) is stored and len(stored) == len(in_memory) == 50
    chosen = rng.permutation(50)[:20]
    for found, expected in (
        (stored, made),
        (in_memory, made),
        (stored[10:30:3], made[10:30:3]),
        (stored.take(chosen), [made[i] for i in chosen]),
        ([stored[-1]], [made[-1]]),
    ):
        for one, other in zip(found, expected, strict=True):
            assert one.ids.dtype == np.int32 and one.counted.dtype == bool
            assert (one.ids.tobytes(), one.counted.tobytes(), one.line) == (
                other.ids.tobytes(), other.counted.tobytes(), other.line
            )  # fmt: skip
    crc = 0
    for example in made:
        crc = zlib.crc32(example.counted.tobytes(), zlib.crc32(example.ids.tobytes(), crc))
    for kind in (stored, in_memory, tuple(made)):  # the words of a run that began with the examples in a tuple
        assert TokenData(Path("a"), kind).digest == f"50 examples, crc32 {crc:08x}"


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    data = read_data(write(tmp_path / "data.jsonl", 20), Bytes(), max_length=9)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert data.examples[3].ids.tolist() == list(b"000003 00")


def test_a_disk_that_is_full_or_missing_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", 2_000)
    monkeypatch.setattr(examples_module, "_BUFFER", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))
    with pytest.raises(DataError, match="No space left on device: tokens are kept there .* TMPDIR chooses another"):
        read_data(path, Bytes(), max_length=2000)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere: No such file or directory: tokens are kept there"):
        read_data(path, Bytes(), max_length=2000)


def test_of_very_many_bad_lines_the_first_are_named(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a b"}\n' + "[]\n" * 250)
    with pytest.raises(DataError, match="has 250 bad lines") as caught:
        read_data(tmp_path / "data.jsonl", Bytes(), max_length=9)
    assert len(caught.value.problems) == 101 and ":101: found list" in caught.value.problems[99]
    assert caught.value.problems[100] == "and 150 more"


def test_of_very_many_unused_keys_the_first_are_named(tmp_path):
    lines = [json.dumps({"text": "a b", f"key {n}": n}) for n in range(150)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = read_data(tmp_path / "data.jsonl", Bytes(), max_length=9)
    assert len(data.unused) == 101 and data.unused[None] == 50
    assert data.describe().endswith("; unused key 'key 99' on 1 line; more unused keys on 50 lines")


def found(path: Path) -> list:
    return [(number, str(r) if isinstance(r, BadLine) else r) for number, r in read_records(path)]


@pytest.mark.parametrize(
    "raw",
    [
        b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
        b'{"text": "a"}\r\r{"text": "b"}\r',
        b'\n  \n{"text": "a"}\n{"text": "b"}',
        b'{"text": \n{"text": "b"}\n',
        b'{"text": "a"}\n[\n',
        b"[1]\n[2]\n",
        b'[1, 2]',
        b'\xef\xbb\xbf\n{"text": "a"}\n{"text": "b"}\n',
        b"{\n{\n{\n",
    ],
)  # fmt: skip
def test_lines_are_those_of_the_whole_text(tmp_path, raw):
    """Numbers and records by bytes.splitlines of everything, packed or not."""
    expected = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            expected.append((number, record if isinstance(record, dict) else None))
    (tmp_path / "data.jsonl").write_bytes(raw)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(raw))
    for name in ("data.jsonl", "data.jsonl.gz"):
        records = found(tmp_path / name)
        assert [(number, r if isinstance(r, dict) else None) for number, r in records] == expected


def test_a_pipe_is_read_too(tmp_path):
    """As the shell's `<(zcat data.jsonl.gz)` gives it."""
    path = write(tmp_path / "data.jsonl", 300)
    expected = read_data(path, Bytes(), max_length=50).digest
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as process:
        assert read_data(f"/dev/fd/{process.stdout.fileno()}", Bytes(), max_length=50).digest == expected


def test_a_file_that_has_changed_since_is_not_split_by_its_keys(tmp_path):
    path = write(tmp_path / "data.jsonl", 5)
    data = read_data(path, Bytes(), max_length=9)
    path.write_text(path.read_text()[:20])
    with pytest.raises(DataError, match="line 2 is not there any more"):
        split_by(data, "topic")


def test_a_parquet_file_is_read_by_batches_of_rows(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"a {n}", "topic": None if n % 3 else "b"} for n in range(2_500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=700)
    (tmp_path / "data.parquet.gz").write_bytes(gzip.compress((tmp_path / "data.parquet").read_bytes()))
    expected = [(n, {k: v for k, v in row.items() if v is not None}) for n, row in enumerate(rows, start=1)]
    for name in ("data.parquet", "data.parquet.gz"):
        assert found(tmp_path / name) == expected
