"""Read MediaWiki export dumps (.xml, .xml.bz2 single or multistream, .xml.gz) as a stream of blocks of pages.

How a dump falls into blocks depends on its bytes alone. A multistream dump gives ranges of the file, which
workers decompress themselves; any other is decompressed once, here, and its blocks carry their pages. Exports
escape every "<" of the text, so `<page>` and `</page>` as bytes are real borders in every schema version.
"""

import bz2
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 20  # of XML in a block that carries its pages
RANGE_BYTES = 1 << 18  # of bz2 in a block that names a range: about as much XML
MAX_PAGE_BYTES = 32 << 20  # MediaWiki's own limit is 2 MB of markup; full-history dumps go beyond
MAX_STREAM_GAP = 64 << 20  # no second stream within this: not a multistream dump
MAX_RANGE_TEXT = 256 << 20  # of XML out of one range: beyond, it is a decompression bomb

OPEN, CLOSE, END = b"<page>", b"</page>", b"</mediawiki>"
STREAM_START = re.compile(rb"BZh[1-9]\x31\x41\x59\x26\x53\x59")
STREAM_FOOTER = 0x177245385090


@dataclass(frozen=True)
class Site:
    """What the head of a dump says: its name (e.g. "enwiki") and the names of its namespaces by number."""

    name: str
    namespaces: dict[int, str]


@dataclass(frozen=True)
class Block:
    """Some pages of a dump: as XML in `pages`, or the bz2 streams that start in bytes [start, end) of `path`.

    `input_bytes` of the file are accounted to this block; the `last` block of a dump must hold its end tag.
    """

    path: Path
    site: Site
    input_bytes: int
    pages: bytes | None = None
    start: int = 0
    end: int = 0
    last: bool = False


def blocks(path: Path) -> Iterator[Block]:
    """The blocks of a dump in order. Raises ValueError when it is empty, cut off, or no MediaWiki export."""
    with open(path, "rb") as file:
        magic = file.read(10)
        if not magic:
            raise ValueError(f"{path} is empty (0 bytes); fetch it again")
        is_bz2 = STREAM_START.match(magic) is not None
    if is_bz2:
        _check_bz2_end(path)
    site = read_site(path)
    if is_bz2 and _is_multistream(path):
        yield from _ranges(path, site)
    else:
        yield from _carried(path, site)


def block_pages(block: Block) -> Iterator[bytes]:
    """The XML of each page that starts in the block."""
    if block.pages is not None:
        yield from _pages_starting_in(block.path, block.pages, iter(()))
        return
    with open(block.path, "rb") as file:
        file.seek(block.start)
        streams = _bz2_streams(file, block.path)
        own, later = _own_text(block, streams)
        if block.last and END not in own:
            raise ValueError(_cut_off(block.path))
        yield from _pages_starting_in(block.path, own, later)


def read_site(path: Path) -> Site:
    """Site name and namespaces from the head of a dump. A document type is refused: exports have none."""
    head = b""
    for chunk, _ in _decompressed(path):
        head += chunk
        if b"</siteinfo>" in head or OPEN in head or len(head) >= CHUNK_BYTES:
            break
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.search(rb"<!DOCTYPE|<!ENTITY", start.partition(OPEN)[0]):
        raise ValueError(f"{path} declares a document type, which no MediaWiki export does; it is not read")
    if not re.match(rb"(<\?xml[^>]*\?>)?\s*(<!--.*?-->\s*)*<mediawiki[\s>]", start, re.DOTALL):
        raise ValueError(
            f"{path} is not a MediaWiki export: it begins with {start[:40]!r}, not with <mediawiki>"
        )
    return _parse_site(head)


def _parse_site(head: bytes) -> Site:
    text = head.decode("utf-8", "replace")
    name = re.search(r"<dbname>([^<]+)</dbname>", text) or re.search(r"<sitename>([^<]+)</sitename>", text)
    found = re.findall(r'<namespace key="(-?\d+)"[^>]*>([^<]*)</namespace>', text)
    return Site(name[1].strip() if name else "wiki", {int(key): title for key, title in found})


def _decompressed(path: Path) -> Iterator[tuple[bytes, int]]:
    """(text, bytes of the file read so far) pieces of a dump, whatever its compression."""
    with open(path, "rb") as file:
        magic = file.read(3)
        file.seek(0)
        if magic == b"BZh":
            for _, text in _bz2_streams(file, path):
                yield text, file.tell()
        elif magic[:2] == b"\x1f\x8b":
            yield from _gunzipped(file, path)
        else:
            while text := file.read(CHUNK_BYTES):
                yield text, file.tell()


def _bz2_streams(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset of the stream in the file, text) pieces from where `file` stands; ValueError for damage."""
    offset, data = file.tell(), b""
    while data or (data := file.read(CHUNK_BYTES)):
        decompressor = bz2.BZ2Decompressor()
        while not decompressor.eof:
            if decompressor.needs_input and not data and not (data := file.read(CHUNK_BYTES)):
                raise ValueError(_cut_off(path))
            try:
                text = decompressor.decompress(data, CHUNK_BYTES)
            except OSError as error:
                raise ValueError(f"{path} is damaged near byte {offset}: {error}; fetch it again") from error
            data = b""
            if text:
                yield offset, text
        data = decompressor.unused_data
        offset = file.tell() - len(data)


def _gunzipped(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int]]:
    try:
        with gzip.GzipFile(fileobj=file) as texts:
            while text := texts.read(CHUNK_BYTES):
                yield text, file.tell()
    except EOFError as error:
        raise ValueError(_cut_off(path)) from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged before byte {file.tell()}: {error}; get it again") from error


def _check_bz2_end(path: Path) -> None:
    """A bz2 stream ends with a 48-bit footer, a 32-bit sum and at most 7 bits to fill the byte."""
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 11, 0))
        tail = int.from_bytes(file.read(), "big")
    if not any((tail >> (32 + bits)) & ((1 << 48) - 1) == STREAM_FOOTER for bits in range(8)):
        raise ValueError(_cut_off(path))


def _cut_off(path: Path) -> str:
    return f"{path} is cut off: {path.stat().st_size} bytes and no proper end; fetch it again"


def _stream_starts(path: Path, before: int | None = None) -> Iterator[int]:
    """Offsets of the bz2 streams that start before byte `before`; by chance 2**-80 a byte."""
    window, start = b"", 0
    with open(path, "rb") as file:
        while (before is None or start < before) and (data := file.read(CHUNK_BYTES)):
            window += data
            for match in STREAM_START.finditer(window):
                yield start + match.start()
            kept = window[-9:]  # a mark less one byte, so that a mark across two reads is seen, and once
            start += len(window) - len(kept)
            window = kept


def _is_multistream(path: Path) -> bool:
    return len(list(islice(_stream_starts(path, before=MAX_STREAM_GAP), 2))) == 2


def _ranges(path: Path, site: Site) -> Iterator[Block]:
    size = path.stat().st_size
    start = 0
    for offset in _stream_starts(path):
        if offset - start >= RANGE_BYTES:
            yield Block(path, site, offset - start, start=start, end=offset)
            start = offset
    yield Block(path, site, size - start, start=start, end=size, last=True)


def _own_text(block: Block, streams: Iterator[tuple[int, bytes]]) -> tuple[bytes, Iterator[bytes]]:
    """The text of the block's own streams, and what comes after it for a page that goes on there."""
    own: list[bytes] = []
    length = 0
    for offset, text in streams:
        if offset >= block.end:
            return b"".join(own), _chain(text, streams)
        own.append(text)
        length += len(text)
        if length > MAX_RANGE_TEXT:
            raise ValueError(
                f"{block.path}: bytes {block.start} to {block.end} expand to more than {MAX_RANGE_TEXT} "
                "bytes; this is no dump of articles"
            )
    return b"".join(own), iter(())


def _chain(text: bytes, streams: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    yield text
    for _, more in streams:
        yield more


def _pages_starting_in(path: Path, own: bytes, later: Iterator[bytes]) -> Iterator[bytes]:
    data = own
    while any(data.endswith(OPEN[:cut]) for cut in range(1, len(OPEN))) and (more := next(later, b"")):
        data += more
    position = data.find(OPEN)
    while 0 <= position < len(own):
        end = data.find(CLOSE, position)
        while end < 0:
            searched = len(data) - len(CLOSE)
            data += next(later, b"")
            if len(data) <= searched + len(CLOSE):
                raise ValueError(_cut_off(path))
            _check_page_size(path, len(data) - position)
            end = data.find(CLOSE, max(searched, position))
        end += len(CLOSE)
        yield data[position:end]
        position = data.find(OPEN, end)


def _check_page_size(path: Path, size: int) -> None:
    if size > MAX_PAGE_BYTES:
        raise ValueError(
            f"{path} holds a page of more than {MAX_PAGE_BYTES} bytes; use a dump of current pages "
            "(pages-articles), not of their whole history"
        )


def _carried(path: Path, site: Site) -> Iterator[Block]:
    """Blocks of whole pages, cut after the first page border past BLOCK_BYTES."""
    rest, accounted = b"", 0
    for text, position in _decompressed(path):
        rest += text
        cut = rest.rfind(CLOSE) + len(CLOSE)
        if cut >= BLOCK_BYTES:
            yield Block(path, site, position - accounted, pages=rest[:cut])
            rest, accounted = rest[cut:], position
        _check_page_size(path, len(rest) - BLOCK_BYTES)
    if END not in rest:
        raise ValueError(_cut_off(path))
    yield Block(path, site, path.stat().st_size - accounted, pages=rest, last=True)
