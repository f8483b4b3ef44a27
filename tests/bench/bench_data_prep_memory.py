"""Memory and speed of `wikipedia` and `documents` on a genuine dump grown to any size.

    python tests/bench/bench_data_prep_memory.py --dump corpora/wikipedia/enwiki-*.bz2 --megabytes 2000

The dump is repeated under new titles and ids, written as multistream bz2 on the fly. Of five copies one is
exact, one differs in a few words (a near-duplicate), three have a quarter of their words replaced.
Peak memory is the resident set of all processes of a stage, sampled; pages they share count more than once.
"""

import argparse
import bz2
import csv
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import psutil

HERE = Path(__file__).parent
RESULTS = Path(__file__).with_suffix(".csv")
STREAM_BYTES = 1 << 20
COMMON_WORDS = ("the", "of", "and", "in", "to", "a", "is", "was", "for", "as", "by", "on")
SAMPLE_SECONDS = 0.1


def copies(pages: list[str]) -> Iterator[str]:
    """The pages again and again, as exact, slightly and strongly altered copies."""
    number = 0
    while True:
        for index, page in enumerate(pages):
            if number % 5 == 1:
                page = page.replace(" between ", f" between{number} ")
            elif number % 5 > 1:
                for word in COMMON_WORDS:
                    page = page.replace(f" {word} ", f" {word}{number} ")
            page = page.replace("</title>", f" ({number})</title>", 1)
            yield re.sub("<id>.*?</id>", f"<id>{number * len(pages) + index + 1}</id>", page, count=1)
        number += 1


def grow(source: Path, target: Path, xml_bytes: int) -> int:
    """Write the grown dump; returns its size as XML in bytes."""
    text = bz2.open(source, "rt", encoding="utf-8").read()
    head, tail = text[: text.index("<page>")], "</mediawiki>\n"
    pages = re.findall(r"<page>.*?</page>\n", text, re.DOTALL)
    written = len(head) + len(tail)
    block: list[str] = []
    with open(target, "wb") as file:
        file.write(bz2.compress(head.encode(), 1))
        for page in copies(pages):
            block.append(page)
            if sum(map(len, block)) >= STREAM_BYTES:
                content = "".join(block).encode()
                file.write(bz2.compress(content, 1))
                written += len(content)
                block = []
            if written >= xml_bytes and not block:
                break
        file.write(bz2.compress(tail.encode(), 1))
    return written


def measured(*arguments: object) -> tuple[float, float]:
    """(seconds, peak resident MiB of the process and all below it) of `python -m data_prep ARGUMENTS`."""
    start, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    with subprocess.Popen(command, cwd=HERE.parent.parent) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, resident_bytes(root))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.monotonic() - start, peak / 2**20


def resident_bytes(root: psutil.Process) -> int:
    """Resident bytes of a process tree; processes that end meanwhile count as nothing."""
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dump", type=Path, required=True, help="a genuine dump, .bz2, to repeat")
    parser.add_argument(
        "--megabytes", type=int, default=50, help="size of the grown dump as XML (10**6 bytes)"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = bench(args.dump, Path(folder), args.megabytes * 10**6, args.workers)
    print(json.dumps(row, indent=1))
    is_new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def bench(dump: Path, folder: Path, xml_bytes: int, workers: int) -> dict[str, object]:
    """One row of results."""
    grown = folder / "grown-multistream.xml.bz2"
    xml_megabytes = grow(dump, grown, xml_bytes) / 1e6
    print(f"grown to {xml_megabytes:.0f} MB of XML, {grown.stat().st_size / 1e6:.0f} MB of bz2", flush=True)
    articles, documents = folder / "wikipedia", folder / "documents"
    extract_seconds, extract_peak = measured("wikipedia", grown, "--out", articles, "--workers", workers)
    clean_seconds, clean_peak = measured("documents", articles, "--out", documents, "--workers", workers)
    index = json.loads((articles / "index.json").read_text())
    text_megabytes = sum(part["json_bytes"] for part in index["parts"]) / 1e6
    counts = json.loads((documents / "index.json").read_text())["counts"]
    return {
        "date": date.today().isoformat(),
        "commit": subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], text=True, cwd=HERE
        ).strip(),
        "device": f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores",
        "python": platform.python_version(),
        "workers": workers,
        "xml_MB": round(xml_megabytes),
        "wikipedia_s": round(extract_seconds, 1),
        "wikipedia_xml_MB_per_s": round(xml_megabytes / extract_seconds, 2),
        "wikipedia_peak_MiB": round(extract_peak),
        "text_MB": round(text_megabytes),
        "documents_s": round(clean_seconds, 1),
        "documents_text_MB_per_s": round(text_megabytes / clean_seconds, 2),
        "documents_peak_MiB": round(clean_peak),
        "documents_in": counts["in"],
        "documents_kept": counts["kept"],
        "dropped": json.dumps(counts["dropped"]),
    }


if __name__ == "__main__":
    main()
