"""Text to token ids and back, by SentencePiece or by Hugging Face `tokenizers`, never giving a control id.

Texts longer than 1 Mi characters are encoded in slices that end at a newline or before a space, to bound
memory. With the models trained here that changes nothing; with a given tokenizer it can differ by a token at
the cut.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow
import pyarrow.compute
import sentencepiece as spm
import tokenizers

from data_prep.files import read_json, sha256_of, whole_file
from data_prep.shards import TokenizerInfo
from data_prep.tokenizer_files import MODEL_NAME, SPACE, is_separable, parse_model

INFO_NAME = "tokenizer_info.json"
HUGGINGFACE_NAME = "tokenizer.json"
SLICE_CHARS = 1 << 20
_REMEMBERED_WORDS = 1 << 18  # about 45 MB
_REMEMBERED_CHARS = 32
_GROUP_CHARS = 1 << 22
_CHARACTER_BYTES = 4  # at most, in UTF-8
_CONTINUING_BYTES = [f"<0x{byte:02X}>" for byte in range(0x80, 0xC0)]


class SpellsControl(ValueError):
    """A tokenizer gives a control token for ordinary text."""


class Tokenizer(Protocol):
    """Ids are arrays of `info.dtype`, without bos and eos."""

    info: TokenizerInfo

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

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
    """Each different word of a batch is encoded once, where the model allows (see `is_separable`).

    Arrow cuts the texts into words and numbers them, SentencePiece encodes the words not seen before, Arrow strings
    the ids together. That is faster than SentencePiece on running text, and the ids are SentencePiece's own for each
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
        self._known: dict[str, bytes] = {}

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not self._separable:
            return [self._joined([self._ids(part) for part in slices(text)]) for text in texts]
        parts = [list(slices(text)) for text in texts]
        encoded = (ids for group in _groups(chain.from_iterable(parts)) for ids in self._encode_words(group))
        return [self._joined(list(islice(encoded, len(mine)))) for mine in parts]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode([int(number) for number in ids]))

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self._dtype), *parts])

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), self._dtype)

    def _encode_words(self, texts: list[str]) -> list[np.ndarray]:
        # A space before each newline makes it the first letter of a "word", which then has no space of its own.
        # So does one before the text; its empty word (a space) and the newline are taken off again below.
        marked = [f"\n{text}".replace(SPACE, " ").replace("\n", " \n") for text in texts]
        words = pyarrow.compute.split_pattern(pyarrow.array(marked), " ")
        numbered = words.flatten().dictionary_encode()
        ids_of_words = pyarrow.array(self._ids_of_words(numbered.dictionary.to_pylist()), pyarrow.binary())
        strung = ids_of_words.take(numbered.indices)
        _, ends, content = strung.buffers()
        ids = np.frombuffer(content, self._dtype) if content else np.empty(0, self._dtype)
        bounds = np.frombuffer(ends, np.int32)[words.offsets.to_numpy()] // self._dtype.itemsize
        skipped = len(self._ids(" ")) + 1
        return [ids[start + skipped : end] for start, end in pairwise(bounds.tolist())]

    def _ids_of_words(self, words: list[str]) -> list[bytes]:
        known = self._known
        new = [word for word in words if word not in known]
        texts = [word if word[:1] == "\n" else f" {word}" for word in new]
        # starting its threads costs more than a few words
        many = (
            self._processor.encode(texts, num_threads=1)
            if len(texts) > 16
            else map(self._processor.encode, texts)
        )
        known.update((word, array(self._code, ids).tobytes()) for word, ids in zip(new, many, strict=True))
        found = [known[word] for word in words]
        for word in reversed(new):
            if len(word) > _REMEMBERED_CHARS or len(known) > _REMEMBERED_WORDS:
                del known[word]
        return found


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Neighbours together, so that the words of a few million characters are in memory, not more."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _GROUP_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


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
        self._continuing = frozenset(map(self._tokenizer.token_to_id, _CONTINUING_BYTES)) - {None}
        # Before what is decoded within a text: at its beginning a space would be lost.
        self._within = self._tokenizer.encode("x", add_special_tokens=False).ids

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate(
            [self._encode_slice(part) for part in slices(text)] or [np.empty(0, self._dtype)]
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([int(number) for number in ids]))

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int | None]]:
        """(ids, ends): how many characters of `text` have been read with each token.

        None where the next token begins within them: the token has part of a character only, or part of what
        normalisation made of it. Raises SpellsControl.
        """
        parts = [text]
        found = [self._tokenizer.encode(text, add_special_tokens=False)]
        if self._has_control(found[0].ids):
            parts = self._cut_names(text)
            found = [self._tokenizer.encode(part, add_special_tokens=False) for part in parts]
        ids: list[int] = []
        ends: list[int | None] = []
        start = 0
        for part, tokens in zip(parts, found, strict=True):
            nexts = [*(begin for begin, _ in tokens.offsets[1:]), len(part)]
            both = zip(tokens.offsets, nexts, strict=False)  # of no token there is no next one
            ends += [start + end if end <= following else None for (_, end), following in both]
            ids += tokens.ids
            start += len(part)
        return ids, ends

    def decode_with_ends(self, ids: Iterable[int]) -> tuple[str, list[int | None]]:
        """(text, ends): how many characters of it each token reaches to, None where it ends within a character.

        What is left of a character at the beginning, where its first bytes are missing, is left out; elsewhere bytes
        that make no character become U+FFFD.
        """
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        numbers = [int(number) for number in ids]
        first = next((i for i, number in enumerate(numbers) if number not in self._continuing), len(numbers))
        text, waiting = "", 0
        ends: list[int | None] = [None] * first
        for number in numbers[first:]:
            part = stream.step(self._tokenizer, number)
            waiting = waiting + 1 if part is None else 0
            text += part or ""
            ends.append(None if part is None else len(text))
            if waiting > _CHARACTER_BYTES:  # what never becomes one; without a new stream time is quadratic
                text, waiting = text + "\ufffd", 0
                stream = tokenizers.decoders.DecodeStream(self._within, False)
        text += "\ufffd" if waiting else ""
        half = len(text) - len(text.lstrip("\ufffd"))
        return text[half:], [None if end is None or end <= half else end - half for end in ends]

    def _has_control(self, ids: Sequence[int] | np.ndarray) -> bool:
        return bool(np.isin(ids, self._control).any())

    def _encode_slice(self, text: str) -> np.ndarray:
        ids = self._ids(text)
        if not self._has_control(ids):
            return ids
        return np.concatenate([self._ids(part) for part in self._cut_names(text)])

    def _cut_names(self, text: str) -> list[str]:
        """A text in which a vocabulary lookup found a control token, in parts that have half of a name each.

        Raises SpellsControl where that does not help.
        """
        cuts = [0, *(match.start() + 1 for match in self._spelled.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        for part in parts:
            if len(found := np.intersect1d(self._ids(part), self._control)):
                control = self._tokenizer.id_to_token(int(found[0]))
                raise SpellsControl(
                    f"this tokenizer gives its control token {control!r} for ordinary text; use another one"
                )
        return parts

    def _ids(self, text: str) -> np.ndarray:
        # of its encoders only the batch one can leave out offsets, which saves time
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, self._dtype)


def slices(text: str, limit: int = SLICE_CHARS) -> Iterator[str]:
    """Cut a text into pieces of at most `limit` characters.

    After a newline if there is one, else before a space, else anywhere.
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
