"""Small MediaWiki dumps and document folders for tests, made on the spot."""

import bz2
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from data_prep.parts import Batch, Document, Stage, convert, encode_document, part_paths, read_part

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="en">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>testwiki</dbname>
    <namespaces>
      <namespace key="-2" case="first-letter">Medium</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Talk</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""
TAIL = "</mediawiki>\n"
WORDS = "the river crosses an old stone bridge where seven ships were built before that winter came".split()


def prose(number: int, words: int = 80) -> str:
    """Text of its own for each number."""
    dice = random.Random(number)
    return " ".join(f"{dice.choice(WORDS)}{dice.randrange(90)}" for _ in range(words)) + "."


def page(number: int, markup: str | None = None, title: str | None = None, extra: str = "<ns>0</ns>") -> str:
    """One page of an export; `extra` stands between title and id."""
    if markup is None:
        markup = f"'''Page {number}''' is [[thing|one]].\n\n== Part ==\n{prose(number)}"
    name = escape(title or f"Page {number}")
    return (
        f"  <page>\n    <title>{name}</title>\n    {extra}\n    <id>{number}</id>\n"
        f"    <revision>\n      <id>{number + 1000}</id>\n      <model>wikitext</model>\n"
        f'      <text xml:space="preserve">{escape(markup)}</text>\n    </revision>\n  </page>\n'
    )


def dump(pages: Iterable[str]) -> bytes:
    """A whole export."""
    return (HEAD + "".join(pages) + TAIL).encode()


def multistream(pages: list[str], pages_per_stream: int = 5) -> bytes:
    """A bz2 export as Wikimedia writes it: head, blocks of pages and tail are streams of their own."""
    blocks = ["".join(pages[i : i + pages_per_stream]) for i in range(0, len(pages), pages_per_stream)]
    return b"".join(bz2.compress(text.encode()) for text in (HEAD, *blocks, TAIL))


def cut_anywhere(content: bytes, stream_bytes: int) -> bytes:
    """bz2 streams that end anywhere, in mid-page or mid-tag, as parallel compressors write them."""
    return b"".join(bz2.compress(content[i : i + stream_bytes]) for i in range(0, len(content), stream_bytes))


def write_documents(folder: Path, documents: list[Document], name: str = "books", per_task: int = 3) -> Path:
    """A finished documents folder holding `documents`."""
    tasks = [documents[i : i + per_task] for i in range(0, len(documents), per_task)]
    stage = Stage(name, folder, [{"name": name}], {}, "a test")
    convert(stage, tasks, lambda task: _batch(name, task), 1, 0)
    return folder


def _batch(name: str, documents: list[Document]) -> Batch:
    return Batch(
        kept={name: (b"".join(map(encode_document, documents)), len(documents))}, seen=len(documents)
    )


def document(number: int, text: str | None = None) -> Document:
    """A document of its own text, or of the given one."""
    return {
        "id": f"test:{number}",
        "source": "test",
        "title": f"Title {number}",
        "text": prose(number) if text is None else text,
    }


def documents_in(folder: Path, split: str | None = None) -> list[Document]:
    """All documents of a finished folder, in order."""
    return [found for path in part_paths(folder, split) for found in read_part(path)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Small parts, so that a small corpus has many of them; and death by SIGKILL at the n-th rename of a file.
STAGE = """
import os, signal, sys
import data_prep.books, data_prep.dumps, data_prep.parts
from data_prep.__main__ import main

data_prep.parts.PART_BYTES = 20_000
data_prep.dumps.BLOCK_BYTES = data_prep.books.BATCH_BYTES = 8_000
data_prep.dumps.CHUNK_BYTES = 4_000
data_prep.dumps.RANGE_BYTES = 2_000
renames_left = int(sys.argv[1])
replace = os.replace

def counted_replace(source, target):
    global renames_left
    renames_left -= 1
    if renames_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = counted_replace
if __name__ == "__main__":
    if int(sys.argv[2]):
        import data_prep.wikipedia  # before this process may no longer read them
        os.setuid(int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
"""
ROOT = Path(__file__).parent.parent


def run_stage(
    *arguments: object, kill_at_rename: int = 0, as_user: int = 0
) -> "subprocess.CompletedProcess[str]":
    """`python -m data_prep ARGUMENTS` with small parts, in a process of its own."""
    command = [sys.executable, "-c", STAGE, str(kill_at_rename), str(as_user), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of `size_bytes` at `folder`; skips the test where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
