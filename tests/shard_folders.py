"""Documents, tokenizers and shards in small, as the stages make them, for the tests of several stages."""

import pydoc_data.topics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.__main__ import main
from data_prep.files import write_json
from data_prep.parts import encode_document, write_part

# half a megabyte of real English that every Python brings along
TOPICS = [text for _, text in sorted(pydoc_data.topics.topics.items())]


def write_documents(folder: Path, per_part: int = 20, **splits: Sequence[str]) -> Path:
    """A documents folder as the documents stage leaves it; splits by name, train if there is no name."""
    folder.mkdir(parents=True)
    parts: list[dict[str, Any]] = []
    for split, texts in splits.items():
        for start in range(0, len(texts), per_part):
            numbered = list(enumerate(texts))[start : start + per_part]
            lines = [
                encode_document({"id": f"{split}{n}", "source": "test", "title": "", "text": text})
                for n, text in numbered
            ]
            path = folder / f"{split}-{start // per_part:05d}.jsonl.zst"
            parts.append(write_part(path, b"".join(lines), len(lines)))
    total = sum(map(len, splits.values()))
    counts = {"in": total + 3, "kept": total, "dropped": {"short": 3}}
    write_json(folder / "index.json", {"schema": 1, "stage": "documents", "counts": counts, "parts": parts})
    return folder


def train_tokenizer(documents: Path, out: Path, *more: str) -> int:
    return main(["tokenizer", str(documents), "--out", str(out), "--vocab-size", "2000", *more])


def make_shards(documents: Path, tokenizer: Path, out: Path, *more: str) -> int:
    """The shards stage with small shards, in this process unless told otherwise."""
    small = ["--shard-megabytes", "1", "--workers", "1"]
    return main(["shards", str(documents), "--tokenizer", str(tokenizer), "--out", str(out), *small, *more])


HOLD = """
import sys
from pathlib import Path
from data_prep.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that writes to `folder`, until it is killed with -9 or, at the latest, the block ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()
