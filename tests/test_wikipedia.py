"""Wikipedia dumps to documents: what is kept, as what text, from which containers; damage, kills, workers."""

import bz2
import gzip
import json
from pathlib import Path

import pytest
from corpora import (
    HEAD,
    TAIL,
    contents,
    cut_anywhere,
    documents_in,
    dump,
    multistream,
    page,
    prose,
    run_stage,
    small_disk,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import dumps
from data_prep.__main__ import main
from data_prep.dumps import block_pages, blocks
from data_prep.wikitext import TooComplex, is_disambiguation, plain_text


def convert(tmp_path: Path, content: bytes, name: str = "dump.xml", workers: int = 1) -> Path:
    source, out = tmp_path / name, tmp_path / f"out-{name}-{workers}"
    source.write_bytes(content)
    assert main(["wikipedia", str(source), "--out", str(out), "--workers", str(workers)]) == 0
    return out


def refusal(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str], name: str = "dump.xml"
) -> str:
    source, out = tmp_path / name, tmp_path / "out"
    source.write_bytes(content)
    assert main(["wikipedia", str(source), "--out", str(out), "--workers", "1"]) == 2
    assert not out.exists(), "a refused dump leaves no folder"
    return capsys.readouterr().err


MARKUP = """{{Infobox person|name={{nowrap|A}}|x={{{y|}}}}}
'''Ada''' (''Countess''; {{IPA|x}}) wrote to [[C. Babbage|Babbage]] & [[Luigi]]s.<ref n=a>[[x]]</ref><ref n=a/>
[[Datei:a.jpg|thumb|A [[caption]] here]]<!-- hidden -->
{| class="wikitable"
|-
| cell || {{t}}
{| nested
|}
|}
== Work ==
* first&nbsp;item with [http://x.org a link] and [http://y.org]
* H<sub>2</sub>O<br/>next
: 5 < 6 and 7 > 3 &lt;b&gt;
<gallery>
a.jpg|text
</gallery>
=== Empty ===
== See also ==
<references/>
[[Kategorie:People]]
[[fr:Ada]]
"""


def test_markup_becomes_prose_with_headings_as_lines() -> None:
    assert plain_text(MARKUP, ("datei", "kategorie")).split("\n") == [
        "Ada (Countess) wrote to Babbage & Luigis.",
        "",
        "Work",
        "",
        "first\xa0item with a link and",
        "H2O",
        "next",
        "5 < 6 and 7 > 3 <b>",
    ]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("a {{unclosed b", "a unclosed b"),
        ("a}} b", "a b"),
        ("{{a|}} b {{c|{{{d}}}}} e", "b e"),
        ("<nowiki>[[raw]] {{t}}</nowiki> x", "[[raw]] {{t}} x"),
        ("<nowiki/>a", "a"),
        ("a<ref>never closed", "anever closed"),
        ("a<ref>x<ref>y</ref> b", "ax b"),
        ("<math>x^2</math>y", "y"),
        ("it''''s ''so'' '''''b'''''", "it's so b"),
        ("=not a heading", "=not a heading"),
        ("== h ==\ntext\n== last ==", "h\n\ntext"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("{|\n| x\n{{t|\n|}\n}}\n|}\nrest", "}}\n|}\nrest".replace("}}\n|}\n", "|}\n")),
        (
            "see [[:Category:Ships]], [[:fr:Ada]] or [[: File:a.jpg|a picture]]",
            "see Category:Ships, fr:Ada or a picture",
        ),
        ("", ""),
    ],
)
def test_odd_markup_loses_no_prose(markup: str, text: str) -> None:
    assert plain_text(markup) == text


@pytest.mark.parametrize(
    "unit",
    ['<a b="', "[[a|''b]] '''c", "<div>", "{{", "<nowiki>", "<!--", "[http://a '' [[b]]] ", "<ref><math>"],
)
def test_tag_soup_is_parsed_in_bounded_time_or_refused(unit: str) -> None:
    # before the linear pass, each of these took the parser minutes; the suite's own time limit is the check
    soup = unit * (200_000 // len(unit))
    try:
        plain_text(soup)
    except TooComplex as error:
        assert "unclosed brackets" in str(error)


MARKS = (
    "{{ }} {{{ }}} {| |} |- [[ ]] [ ] '' ''' == === <ref> </ref> <ref/> <nowiki> </nowiki> <!-- --> <p> | :"
)
TOKENS = [
    *MARKS.split(),
    "\n",
    " ",
    "word",
    "File:",
    "http://a",
    "&amp;",
    "<",
    "*",
    "\ue000",
    "\ue0010\ue001",
]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.sampled_from(TOKENS), max_size=60))
def test_no_markup_breaks_the_conversion(tokens: list[str]) -> None:
    text = plain_text("".join(tokens))
    assert "\n\n\n" not in text or "<nowiki>" in tokens


@pytest.mark.parametrize(
    ("title", "markup", "expected"),
    [
        ("Mercury (disambiguation)", "text", True),
        ("Mercury", "'''M''' may be\n* [[a]]\n{{Disambiguation page|x}}", True),
        ("Merkur", "{{Begriffsklärung}}", True),
        ("Mercury", "a planet {{disambiguation needed}}", False),
        ("X", "{{my_own}}", True),
    ],
)
def test_disambiguation_pages_are_told_from_articles(title: str, markup: str, expected: bool) -> None:
    assert is_disambiguation(title, markup, ["My own"]) is expected


def test_markup_of_more_than_any_wiki_allows_is_refused() -> None:
    with pytest.raises(TooComplex, match="5000000 characters of markup"):
        plain_text("a [[b]] c\n" * 500_000)


def test_every_page_is_kept_or_dropped_for_a_reason(tmp_path: Path) -> None:
    pages = [
        page(1),
        page(2, extra="<ns>1</ns>"),
        page(3, extra='<ns>0</ns><redirect title="Page 1" />'),
        page(4, "#REDIRECT [[Page 1]]"),
        page(5, "a\n{{disambig}}"),
        page(6, "{{only|a template}}"),
        page(7, " "),
        page(8, "[" * 3000),
        page(9).replace("<title>", "<title>&bad;"),
        page(10).replace("wikitext</model>", "json</model>"),
    ]
    index = json.loads((convert(tmp_path, dump(pages)) / "index.json").read_text())
    assert index["counts"]["in"] == 10
    assert index["counts"]["kept"] == 1
    assert index["counts"]["dropped"] == {
        "broken_xml": 1, "disambiguation": 1, "no_text": 2, "not_article": 1, "not_wikitext": 1,
        "redirect": 2, "too_complex": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("markup", "is_redirect"),
    [
        ("#REDIRECT [[Page 1]]", True),
        (" # weiterleitung: [[Page 1]]", True),
        ("#перенаправление [[Page 1]]", True),
        ("#転送[[Page 1]]", True),
        ("# word [[Page 1]] and more\n# another", False),
        ("#1 [[Page 1]]", False),
    ],
)
def test_a_list_is_no_redirect(tmp_path: Path, markup: str, is_redirect: bool) -> None:
    index = json.loads((convert(tmp_path, dump([page(1, markup)])) / "index.json").read_text())
    assert index["counts"]["dropped"] == ({"redirect": 1} if is_redirect else {})


def test_a_document_names_its_page(tmp_path: Path) -> None:
    (found,) = documents_in(convert(tmp_path, dump([page(7, "Text of\n\n&amp;", "A & B")])))
    assert found == {"id": "testwiki:7", "source": "testwiki", "title": "A & B", "text": "Text of\n\n&"}


def test_old_exports_without_ns_use_the_names_of_namespaces(tmp_path: Path) -> None:
    old = [page(1, extra=""), page(2, title="Talk:Page 1", extra=""), page(3, title="Star: a tale", extra="")]
    found = documents_in(convert(tmp_path, dump(old).replace(b"export-0.11", b"export-0.3")))
    assert [document["id"] for document in found] == ["testwiki:1", "testwiki:3"]


def test_of_many_revisions_the_last_is_taken(tmp_path: Path) -> None:
    first, rest = page(1, "old text").split("    <revision>")
    history = first + "    <revision>" + rest.replace("  </page>\n", "") + "    <revision>"
    history += page(1, "new text").split("    <revision>")[1]
    (found,) = documents_in(convert(tmp_path, dump([history])))
    assert found["text"] == "new text"


PAGES = [page(number) for number in range(40)]


def test_all_containers_give_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumps, "RANGE_BYTES", 2000)
    monkeypatch.setattr(dumps, "BLOCK_BYTES", 5000)
    plain = dump(PAGES)
    containers = {
        "a.xml": plain,
        "b.xml.bz2": bz2.compress(plain),
        "c.xml.gz": gzip.compress(plain),
        "d.xml.bz2": multistream(PAGES),
        "two-members.gz": gzip.compress(plain[:9000]) + gzip.compress(plain[9000:]),
    }
    expected = documents_in(convert(tmp_path, plain))
    assert len(expected) == 40
    for name, content in containers.items():
        assert documents_in(convert(tmp_path, content, name)) == expected, name


@pytest.mark.parametrize("stream_bytes", [97, 1000, 1777])
def test_pages_that_straddle_streams_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream_bytes: int
) -> None:
    monkeypatch.setattr(dumps, "RANGE_BYTES", 300)
    source = tmp_path / "pbzip2.xml.bz2"
    content = dump(PAGES)
    source.write_bytes(cut_anywhere(content, stream_bytes))
    parts = list(blocks(source))
    assert len(parts) > 5
    assert sum(block.input_bytes for block in parts) == source.stat().st_size
    found = b"".join(one for block in parts for one in block_pages(block))
    assert found == b"".join(page.strip().encode() for page in PAGES)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "dump.xml.bz2"
    source.write_bytes(multistream([page(number) for number in range(150)]))
    for workers in (1, 2, 3):
        done = run_stage("wikipedia", source, "--out", tmp_path / f"out{workers}", "--workers", workers)
        assert done.returncode == 0, done.stderr
    one = contents(tmp_path / "out1")
    assert len(one) > 4
    assert contents(tmp_path / "out2") == one
    assert contents(tmp_path / "out3") == one


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("rename", [2, 3, 6])
def test_killed_anywhere_the_same_command_gives_the_same_bytes(
    tmp_path: Path, rename: int, workers: int
) -> None:
    source = tmp_path / "dump.xml.bz2"
    source.write_bytes(bz2.compress(dump(page(number) for number in range(150))))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["wikipedia", source, "--workers", workers, "--out"]
    assert run_stage(*command, whole).returncode == 0
    assert run_stage(*command, killed, kill_at_rename=rename).returncode == -9
    assert not (killed / "index.json").exists()
    assert run_stage(*command, killed).returncode == 0
    assert contents(killed) == contents(whole)


def test_a_finished_folder_is_not_worked_on_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(tmp_path, dump(PAGES))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    convert(tmp_path, dump(PAGES))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (tmp_path / "dump.xml").write_bytes(dump(PAGES[1:]))
    assert main(["wikipedia", str(tmp_path / "dump.xml"), "--out", str(out)]) == 2
    assert "holds another run: its inputs" in capsys.readouterr().err


def test_a_folder_with_other_files_is_not_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dump.xml").write_bytes(dump(PAGES))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert main(["wikipedia", str(tmp_path / "dump.xml"), "--out", str(tmp_path / "out")]) == 2
    assert "is not empty (it holds 'thesis.tex')" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("one.xml.bz2", bz2.compress(dump(PAGES))[:-20]),
        ("many.xml.bz2", multistream(PAGES)[:-150]),
        ("between.xml.bz2", multistream(PAGES)[: -len(bz2.compress(TAIL.encode()))]),
        ("plain.xml", dump(PAGES)[:-900]),
        ("a.xml.gz", gzip.compress(dump(PAGES))[:-20]),
    ],
)
def test_a_dump_that_is_cut_off_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    assert f"{name} is cut off: {len(content)} bytes" in refusal(tmp_path, content, capsys, name)


def test_flipped_bits_in_a_dump_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(bz2.compress(dump(PAGES)))
    content[len(content) // 2] ^= 0xFF
    assert "dump.bz2 is damaged near byte 0" in refusal(tmp_path, bytes(content), capsys, "dump.bz2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"plain prose, no markup", "is not a MediaWiki export: it begins with b'plain prose"),
        (b"\xff\xfe\x00binary", "is not a MediaWiki export"),
        (bz2.compress(b"<html></html>"), "is not a MediaWiki export: it begins with b'<html>"),
        ((HEAD + TAIL).encode(), "no documents in dump.xml"),
    ],
)
def test_what_is_no_dump_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    assert message in refusal(tmp_path, content, capsys)


def test_entity_bombs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = b'<?xml version="1.0"?><!DOCTYPE m [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>' + dump(
        [page(1, "&b;")]
    )
    assert "declares a document type" in refusal(tmp_path, bomb, capsys)


def test_a_page_without_end_is_refused_before_memory_fills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumps, "MAX_PAGE_BYTES", 1 << 20)
    endless = bz2.compress((HEAD + page(1)[:-20]).encode() + b" " * (8 << 20))
    assert "holds a page of more than" in refusal(tmp_path, endless, capsys, "d.xml.bz2")


def test_a_full_disk_is_an_error_and_work_goes_on_later(tmp_path: Path) -> None:
    source = tmp_path / "dump.xml"
    source.write_bytes(dump(page(number, prose(number, 900)) for number in range(120)))
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        failed = run_stage("wikipedia", source, "--out", disk / "out", "--workers", 1)
        assert failed.returncode == 2
        assert "No space left on device" in failed.stderr
        left = contents(disk / "out")
        assert "index.json" not in left
        assert not [name for name in left if name.endswith(".tmp")]


def test_no_permission_to_write_is_an_error(tmp_path: Path) -> None:
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "dump.xml")
        source.write_bytes(dump(PAGES))
        os.chmod(folder, 0o555)
        nobody = 65534 if os.geteuid() == 0 else 0
        done = run_stage("wikipedia", source, "--out", Path(folder, "out"), "--workers", 1, as_user=nobody)
        os.chmod(folder, 0o755)
        assert done.returncode == 2
        assert "Permission denied" in done.stderr
