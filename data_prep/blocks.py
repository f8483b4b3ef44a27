"""Documents to token ids, one block of one part at a time: the unit of work that a process takes.

A part is cut into blocks by the place of a document's line in it, so that a part far bigger than the others
(one that holds a huge book) is shared among processes. A block's process unpacks the part up to the block's
end.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from data_prep.encoding import Tokenizer, load_tokenizer
from data_prep.shards import TokenizerInfo

BLOCK_BYTES = 8 << 20  # of JSON lines
_MAX_BLOCKS = 16  # a part; more would unpack its beginning too often


@dataclass(frozen=True)
class Block:
    """Documents of one part whose lines begin at bytes [number * num_bytes, (number + 1) * num_bytes)."""

    path: Path
    split: str
    part: int
    number: int
    num_bytes: int
    is_last: bool  # of its part
    tokenizer: Path


@dataclass(frozen=True)
class Encoded:
    """What a block gives.

    tokens: ids of its documents, each `<s> ... </s>`, one after the other. input_bytes: of their JSON lines.
    """

    block: Block
    tokens: np.ndarray
    input_bytes: int


def blocks_of_part(path: Path, split: str, part: int, json_bytes: int, tokenizer: Path) -> list[Block]:
    """The blocks of a part that holds `json_bytes` of JSON lines."""
    count = min(max(1, -(-json_bytes // BLOCK_BYTES)), _MAX_BLOCKS)
    num_bytes = max(1, -(-json_bytes // count))
    return [Block(path, split, part, n, num_bytes, n == count - 1, tokenizer) for n in range(count)]


def encode_block(block: Block) -> Encoded:
    """Token ids of a block.

    ValueError names the part when it is damaged, and a document that cannot be encoded.
    """
    tokenizer = _tokenizer(block.tokenizer)
    bos, eos = _marks(tokenizer.info)
    lines = list(_lines(block))
    input_bytes = sum(map(len, lines))
    documents = [_parse(lines.pop(), block.path) for _ in range(len(lines))][
        ::-1
    ]  # the lines go as they are read
    pieces: list[np.ndarray] = [np.empty(0, bos.dtype)]
    for ids in _encode(tokenizer, documents, block.path):
        pieces += [bos, ids, eos]
    return Encoded(block, np.concatenate(pieces), input_bytes)


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def _marks(info: TokenizerInfo) -> tuple[np.ndarray, np.ndarray]:
    """What stands before and behind a document."""
    return np.array(info.begin_ids, info.dtype), np.array([info.eos_id], info.dtype)


def _lines(block: Block) -> Iterator[bytes]:
    start = block.number * block.num_bytes
    place = 0
    try:
        with (
            open(block.path, "rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream,
            io.BufferedReader(stream, 1 << 20) as lines,
        ):
            for line in lines:
                if place >= start + block.num_bytes and not block.is_last:
                    return
                if place >= start:
                    yield line
                place += len(line)
    except zstandard.ZstdError as error:
        raise ValueError(f"{block.path} is damaged ({error}); {_ADVICE}") from None


_ADVICE = "delete its folder and run the documents stage again"


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} is damaged (a line is not JSON: {error}); {_ADVICE}") from None
    if not document.get("text"):
        raise ValueError(
            f"{path}: document {document.get('id')!r} has no text; {_ADVICE}, which drops such documents"
        )
    return document


def _encode(tokenizer: Tokenizer, documents: list[dict[str, Any]], path: Path) -> list[np.ndarray]:
    for document in documents:
        if not document["text"].isascii():
            _check_unicode(document, path)
    return tokenizer.encode_batch([document["text"] for document in documents])


def _check_unicode(document: dict[str, Any], path: Path) -> None:
    try:
        document["text"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}: document {document['id']!r} is not Unicode text ({error}); {_ADVICE}"
        ) from None
