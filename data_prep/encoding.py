"""Text to token ids and back, by SentencePiece or by Hugging Face `tokenizers`, never giving a control id.

Texts longer than 1 Mi characters are encoded in slices that end at a newline or before a space, to bound
memory. With the models trained here that changes nothing; with a given tokenizer it can differ by a token at
the cut.
"""

import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece as spm
import tokenizers

from data_prep.files import read_json, sha256_of, whole_file
from data_prep.shards import TokenizerInfo
from data_prep.tokenizer_files import MODEL_NAME, SPACE, is_separable, parse_model

INFO_NAME = "tokenizer_info.json"
HUGGINGFACE_NAME = "tokenizer.json"
SLICE_CHARS = 1 << 20
_REMEMBERED_WORDS = 1 << 17  # about 30 MB
_REMEMBERED_CHARS = 32


class Tokenizer(Protocol):
    """Ids are arrays of `info.dtype`, without bos and eos."""

    info: TokenizerInfo

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder written by `python -m data_prep tokenizer`.

    ValueError when it is unfinished, or a file is not the one that was written (another sha256).
    """
    path = Path(folder) / INFO_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {INFO_NAME}: run `python -m data_prep tokenizer` to its end; "
            "a tokenizer from elsewhere is brought in by its --from"
        )
    values = read_json(path)
    for name, expected in values["files"].items():
        found = sha256_of(path.with_name(name)) if path.with_name(name).is_file() else "no such file"
        if found != expected:
            raise ValueError(f"{path.with_name(name)} has changed: sha256 {expected} expected, found {found}")
    return open_tokenizer(Path(folder), values["kind"], TokenizerInfo(**values["tokenizer"]))


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the files of a tokenizer folder; the one that makes it complete comes last."""
    out.mkdir(parents=True, exist_ok=True)
    for name in [*read_json(folder / INFO_NAME)["files"], INFO_NAME]:
        with whole_file(out / name) as file:
            file.write((folder / name).read_bytes())


def open_tokenizer(folder: Path, kind: str, info: TokenizerInfo) -> Tokenizer:
    """`kind` is "sentencepiece" or "huggingface"."""
    if kind == "sentencepiece":
        return SentencePieceTokenizer((folder / MODEL_NAME).read_bytes(), info)
    return HuggingFaceTokenizer(folder / HUGGINGFACE_NAME, info)


class SentencePieceTokenizer:
    """Words are looked up in a dictionary of those seen before, where the model allows (see `is_separable`).

    That is several times faster than SentencePiece on running text. The ids are SentencePiece's own for each
    word; over a long text its float32 sums lose digits and break ties between splits differently.
    """

    def __init__(self, model: bytes, info: TokenizerInfo) -> None:
        self.info = info
        self._processor = spm.SentencePieceProcessor(model_proto=model)
        self._separable = is_separable(parse_model(model))
        self._dtype = np.dtype(info.dtype)
        self._code = (
            "H" if info.dtype == "uint16" else "I"
        )  # of `array`, which takes short lists faster than numpy
        self._words = _Words(self._processor, self._code)

    def encode(self, text: str) -> np.ndarray:
        parts = [self._encode_slice(part) for part in slices(text)]
        return np.frombuffer(b"".join(parts), self._dtype)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode([int(number) for number in ids]))

    def _encode_slice(self, text: str) -> bytes:
        if not self._separable:
            return array(self._code, self._processor.encode(text)).tobytes()
        # a space before each newline makes it the first letter of a "word", which then has no space of its own
        words = text.replace(SPACE, " ").replace("\n", " \n").split(" ")
        head = array(self._code, self._processor.encode(words[0])).tobytes()
        return head + b"".join(map(self._words.__getitem__, islice(words, 1, None)))


class _Words(dict[str, bytes]):
    """Ids (as bytes) of words that follow a space or begin with a newline; the first so many are remembered."""

    def __init__(self, processor: spm.SentencePieceProcessor, code: str) -> None:
        super().__init__()
        self._processor = processor
        self._code = code

    def __missing__(self, word: str) -> bytes:
        text = word if word[:1] == "\n" else " " + word
        ids = array(self._code, self._processor.encode(text)).tobytes()
        if len(word) <= _REMEMBERED_CHARS and len(self) < _REMEMBERED_WORDS:
            self[word] = ids
        return ids


class HuggingFaceTokenizer:
    """A `tokenizer.json`, without its truncation, padding and added bos or eos."""

    def __init__(self, path: Path, info: TokenizerInfo) -> None:
        self.info = info
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is text
        self._dtype = np.dtype(info.dtype)
        special = {info.pad_id, info.bos_id, info.eos_id, info.mask_id} - {None, info.unk_id}
        self._control = np.array(sorted(number for number in special if number is not None))
        names = [str(self._tokenizer.id_to_token(number)) for number in self._control]
        self._spelled = re.compile("|".join(re.escape(name) for name in names))

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate(
            [self._encode_slice(part) for part in slices(text)] or [np.empty(0, self._dtype)]
        )

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([int(number) for number in ids]))

    def _encode_slice(self, text: str) -> np.ndarray:
        ids = self._ids(text)
        if not np.isin(ids, self._control).any():
            return ids
        # a vocabulary lookup found the name of a control token in the text: cut those names and encode the
        # halves
        cuts = [0, *(match.start() + 1 for match in self._spelled.finditer(text)), len(text)]
        ids = np.concatenate([self._ids(text[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)])
        if np.isin(ids, self._control).any():
            control = self._tokenizer.id_to_token(int(ids[np.isin(ids, self._control)][0]))
            raise ValueError(
                f"this tokenizer gives its control token {control!r} for ordinary text; use another one"
            )
        return ids

    def _ids(self, text: str) -> np.ndarray:
        # of its encoders only the batch one can leave out offsets, which saves time
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, self._dtype)


def slices(text: str, limit: int = SLICE_CHARS) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters: after a newline, else before a space, else
    anywhere.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        if end <= start:
            end = text.rfind(" ", start + 1, start + limit)
        if end <= start:
            end = start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
