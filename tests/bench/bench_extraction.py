"""Markup to prose next to bare mwparserfromhell on the same pages, in one process each, in one run.

    python tests/bench/bench_extraction.py --dump corpora/wikipedia/enwiki-*.bz2

`bare` parses whole pages and strips them, as its documentation shows; it keeps what stands in tables and
references. MB are 10^6 bytes of UTF-8 markup; seconds are CPU time. A row is appended to bench_extraction.csv.
"""

import argparse
import csv
import datetime
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell

from data_prep.dumps import block_pages, blocks
from data_prep.wikitext import plain_text

CSV = Path(__file__).with_suffix(".csv")


def articles(dump: Path) -> list[str]:
    """Markup of the pages that are no redirects."""
    pages = (page for block in blocks(dump) for page in block_pages(block) if b"<redirect" not in page)
    return [ElementTree.fromstring(page).findtext("revision/text") or "" for page in pages]


def bare(markup: str) -> str:
    return str(mwparserfromhell.parse(markup).strip_code())


def measured(convert: Callable[[str], str], texts: list[str], repeats: int) -> tuple[float, int]:
    """(least CPU seconds for all texts, characters of prose)"""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        length = sum(len(convert(text)) for text in texts)
        seconds.append(time.process_time() - start)
    return min(seconds), length


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dump", type=Path, required=True, help="a small MediaWiki export")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    texts = articles(args.dump)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ours_seconds, ours_length = measured(plain_text, texts, args.repeats)
    bare_seconds, bare_length = measured(bare, texts, args.repeats)
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.getoutput(f"git -C {CSV.parent} rev-parse --short HEAD"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "mwparserfromhell": importlib.metadata.version("mwparserfromhell"),
        "markup_MB": round(megabytes, 2),
        "ours_MB_per_s": round(megabytes / ours_seconds, 2),
        "bare_MB_per_s": round(megabytes / bare_seconds, 2),
        "ratio": round(bare_seconds / ours_seconds, 2),
        "ours_characters": ours_length,
        "bare_characters": bare_length,
    }
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    is_new = not CSV.exists()
    with open(CSV, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
