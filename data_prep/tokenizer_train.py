"""Train a SentencePiece model on a bounded sample of documents: same documents, same model bytes.

What would break that, and is therefore fixed: the number of threads (unigram sums expectations per thread,
and the model file records it), SentencePiece's own shuffling, the order in which folders are given.
"""

import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from zlib import crc32

import sentencepiece as spm

from data_prep.parts import Document, part_paths, read_part
from data_prep.progress import progress
from data_prep.tokenizer_files import NORMAL, UNIGRAM, parse_model

MODEL_TYPES = ("unigram", "bpe")
SPECIAL_PIECES = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}  # ids 0..4
# One document gives at most this much, so that a long book is not the whole sample.
DOCUMENT_SAMPLE_CHARS = 1 << 20
_WORD_CHARS = 512
_MAX_WORDS = 1 << 21  # different ones, counted; about 250 MB
_MAX_CHARS = 1 << 22  # of different words, given to the trainer
_MAX_COUNTED_CHARS = 3 << 23  # of words times their counts; the trainer takes about 500 MB for it
# Each is a token of its own. A newline must survive, and no piece may cross it. "<" keeps "<s>" or "<0x41>"
# in a text from being looked up whole in the vocabulary, which Hugging Face's unigram would do.
ISOLATED = ("\n", "<")
# Log probabilities are rounded to this step: their sums over a word are then exact in single and double
# precision, so SentencePiece (float32) and Hugging Face (float64) break ties alike.
SCORE_STEP = 2.0**-10


def sample_documents(folders: Iterable[Path], limit_bytes: int) -> list[bytes]:
    """Texts (UTF-8) of a random-looking but fixed choice of train documents, at most `limit_bytes` in all.

    The documents with the smallest hashes are kept, so the choice depends neither on order nor on parts, and
    memory holds no more than the sample. Raises ValueError when there is no train document.
    """
    heap: list[tuple[int, bytes]] = []
    held = 0
    paths = [path for folder in folders for path in _train_parts(folder)]
    with progress("sample", sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            for document in read_part(path):
                text = document["text"][:DOCUMENT_SAMPLE_CHARS].encode()
                heapq.heappush(heap, (-_priority(document), text))
                held += len(text)
                while held > limit_bytes and len(heap) > 1:
                    held -= len(heapq.heappop(heap)[1])
            advance(path.stat().st_size)
    if not held:
        raise ValueError("the train documents hold no text; look at the `dropped` counts in their index.json")
    return [text for _, text in sorted(heap, reverse=True)]


def _train_parts(folder: Path) -> list[Path]:
    paths = part_paths(folder, "train")
    if not paths:
        raise ValueError(
            f"{folder} has no train parts: give the output folder of `python -m data_prep documents`"
        )
    return paths


def _priority(document: Document) -> int:
    key = f"{document['source']}\0{document['id']}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def train_model(texts: list[bytes], vocab_size: int, model_type: str) -> bytes:
    """SentencePiece model (serialised) of `vocab_size` pieces: 5 special, 256 bytes, the rest learned.

    `texts` (UTF-8) is emptied on the way, for memory's sake. No normalisation: decode(encode(text)) == text,
    but for the character U+2581, which is SentencePiece's own sign for a space. Raises ValueError for an
    impossible size.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"--model {model_type!r}: one of {', '.join(MODEL_TYPES)} expected")
    written = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in sorted(frequent_words(texts).items())),
            input_format="tsv",
            model_writer=written,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=SPECIAL_PIECES["pad"],
            control_symbols=[SPECIAL_PIECES["mask"]],
            user_defined_symbols=list(ISOLATED),
            max_sentence_length=8 * _WORD_CHARS,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece cannot train --vocab-size {vocab_size} on this text: {error}"
        ) from None
    return _round_scores(written.getvalue())


def frequent_words(texts: list[bytes]) -> dict[str, int]:
    """How often each word (with the space before it, if any) occurs in `texts`, which is emptied on the way.

    SentencePiece needs no more, since no piece crosses a space. Its unigram trainer takes about 17 bytes for each
    character counted, however often a word is counted (4 GB for 200 MB), so big counts are scaled down.
    """
    counts: Counter[str] = Counter()
    rare = 1
    texts.reverse()
    while texts:
        counts.update(_words(texts.pop().decode()))
        while len(counts) > _MAX_WORDS:
            counts = Counter({word: count for word, count in counts.items() if count > rare})
            rare += 1
    return _scaled(_most_frequent(counts))


def _most_frequent(counts: Counter[str]) -> dict[str, int]:
    kept: dict[str, int] = {}
    room = _MAX_CHARS
    # the hash, so that words counted once are not those that come first in the alphabet
    for word in sorted(counts, key=lambda word: (-counts[word], crc32(word.encode()), word)):
        room -= len(word)
        if room < 0:
            break
        kept[word] = counts[word]
    return kept


def _scaled(counts: dict[str, int]) -> dict[str, int]:
    factor = sum(len(word) * count for word, count in counts.items()) / _MAX_COUNTED_CHARS
    return counts if factor <= 1 else {word: max(1, round(count / factor)) for word, count in counts.items()}


def _words(text: str) -> Iterator[str]:
    for line in text.replace("\t", "\n").split("\n"):
        first, *others = line.split(" ")
        for word in (first, *(f" {other}" for other in others)):
            # a text without spaces would be one word
            yield from (word[start : start + _WORD_CHARS] for start in range(0, len(word), _WORD_CHARS))


def _round_scores(model: bytes) -> bytes:
    proto = parse_model(model)
    if proto.trainer_spec.model_type == UNIGRAM:
        for piece in proto.pieces:
            if piece.type == NORMAL:
                piece.score = round(piece.score / SCORE_STEP) * SCORE_STEP
    return bytes(proto.SerializeToString(deterministic=True))
