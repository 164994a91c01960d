"""Short dialogues as JSONL: `python tools/chatterbot.py OUT.jsonl TOPIC [TOPIC ...]`.

Source: the PyPI package chatterbot-corpus 1.3.3 (BSD), English topic files: a question and its answer per conversation.
"""

import importlib.util
import json
import sys
from pathlib import Path

import yaml


def main(target: str, *topics: str) -> None:
    """Writes one {"prompt", "completion", "topic"} line per conversation with a question and an answer."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("the package chatterbot-corpus is not installed: pip install chatterbot-corpus==1.3.3")
    folder = Path(spec.submodule_search_locations[0], "data", "english")
    rows = []
    for topic in topics:
        for question, answer, *_ in yaml.safe_load((folder / f"{topic}.yml").read_text("utf-8"))["conversations"]:
            rows.append({"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}", "topic": topic})
    Path(target).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{target}: {len(rows)} dialogues on {', '.join(topics)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
