"""Lines of plain, .gz and .zst files, as a stream; damaged and cut-off files are told from whole ones."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

READ_BYTES = 1 << 20
ZST_READ_BYTES = 1 << 13  # of a .zst at once: the worst of bombs then expands to 256 MB
MAX_LINE_BYTES = 32 << 20


def file_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """(line without its end, bytes of the file read so far); the suffix tells the compression.

    Raises ValueError when the file is damaged, cut off, or has a line of more than MAX_LINE_BYTES.
    """
    rest: list[bytes] = []
    waiting = position = 0
    for text, position in _texts(path):
        first, *others = text.split(b"\n")
        rest.append(first)
        waiting += len(first)
        if waiting > MAX_LINE_BYTES:
            raise ValueError(f"{path} has a line of more than {MAX_LINE_BYTES} bytes; is it one row a line?")
        if others:
            yield b"".join(rest), position
            yield from ((line, position) for line in others[:-1])
            rest, waiting = [others[-1]], len(others[-1])
    if waiting:
        yield b"".join(rest), position


def _texts(path: Path) -> Iterator[tuple[bytes, int]]:
    with open(path, "rb") as file:
        try:
            for text in _decompressed(file, path.suffix.lower()):
                yield text, file.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise ValueError(f"{path} is damaged before byte {file.tell()}: {error}; get it again") from error


def _decompressed(file: BinaryIO, suffix: str) -> Iterable[bytes]:
    if suffix == ".zst":
        return _zst_texts(file)
    if suffix == ".gz":
        return _blocks(gzip.GzipFile(fileobj=file))
    return _blocks(file)


def _blocks(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while block := file.read(READ_BYTES):
        yield block


def _zst_texts(file: BinaryIO) -> Iterator[bytes]:
    """Every frame of the file. (zstandard's own reader takes a frame that is cut off for a whole one.)"""
    frame = None
    while data := file.read(ZST_READ_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it is cut off")
