"""Parse spans of sentences from a grammar, kept beside their shards: one uint16 a token.

`train-00000.spans.npy` is [samples, sequence_length], in the order of `train-00000.tar`. A code holds the
`height`, the highest level of a symbol whose span ends at this token (0: none does; the grammar's levels: the
sentence ends), and the ancestors: on every level one of three symbols. Codes of tokens that are not words are 0.
"""

from pathlib import Path

import numpy as np

from data_prep.files import whole_file
from data_prep.shards import ShardIndex

_HEIGHTS = 8  # heights 0 to 6 share a code with the ancestors in base 3


def spans_path(shard: Path) -> Path:
    return shard.with_suffix(".spans.npy")


def encode_spans(heights: np.ndarray, ancestors: np.ndarray) -> np.ndarray:
    """uint16 codes; `ancestors` is the number in base 3 whose last digit belongs to level 1."""
    return (heights + _HEIGHTS * ancestors).astype("<u2")


def heights_of(codes: np.ndarray) -> np.ndarray:
    """Highest level of a symbol that ends at each token, of the codes' shape; 0 where none does."""
    return codes % _HEIGHTS


def ancestors_of(codes: np.ndarray, levels: int) -> np.ndarray:
    """[..., levels]: which of its level's three symbols stands above each token, from level 1 up.

    The symbol itself is 7 + 3 * (level - 1) + that number.
    """
    return codes[..., None] // _HEIGHTS // 3 ** np.arange(levels) % 3


def write_spans(shard: Path, codes_NL: np.ndarray) -> None:
    """Write the codes of a shard's samples, whole or not at all."""
    with whole_file(spans_path(shard)) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(codes_NL, "<u2"), version=(1, 0))


class SpanReader:
    """Random access to the codes of one split: `reader[i]` is [sequence_length], of sample i of `ShardReader`."""

    def __init__(self, folder: str | Path, split: str) -> None:
        index = ShardIndex.load(folder)
        self.levels = int(index.settings.get("levels", 0))
        self._paths = [spans_path(Path(folder) / shard.name) for shard in index.splits[split].shards]
        missing = [path for path in self._paths if not path.is_file()]
        if missing or not self.levels:
            raise ValueError(
                f"{folder} holds no parse spans ({missing[0].name if missing else 'no grammar'}): they come with the "
                "shards of `python -m data_prep pcfg`; other text has none"
            )
        self._firsts = np.cumsum([0] + [shard.samples for shard in index.splits[split].shards])
        self._open: tuple[int, np.ndarray] | None = None

    def __getitem__(self, sample: int) -> np.ndarray:
        number = int(np.searchsorted(self._firsts, sample, side="right")) - 1
        if self._open is None or self._open[0] != number:
            self._open = (number, np.load(self._paths[number], mmap_mode="r", allow_pickle=False))
        return np.asarray(self._open[1][sample - self._firsts[number]])
