"""Text corpora as int32 token streams, and batches that are a function of (seed, step).

    python -m experiments.training.data list
    python -m experiments.training.data download ptb --data-dir DIR
    python -m experiments.training.data check DIR

`corpora` says which there are and where their files lie, `tokenizer` how text becomes tokens.
"""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.training.corpora import CORPORA, Level, Source, corpus_files, default_data_dir, download, find_source
from experiments.training.tokenizer import Vocabulary, check_level, tokenize

_OWN_TEXT = Source((), "char", (0, 0, 0), None)


class Corpus(NamedTuple):
    name: str
    vocabulary: Vocabulary
    train: np.ndarray  # int32 [tokens], as are the next two; read-only
    valid: np.ndarray
    test: np.ndarray


def load(
    name: str = "shakespeare",
    *,
    data_dir: str | Path | None = None,
    level: Level | None = None,
    path: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """The corpus `name` of `CORPORA`, or your own text at `path`: three int32 streams and their vocabulary.

    `path` is a UTF-8 file or a directory of `*.txt`, joined in the order of their names; it goes before
    `name`. `level` defaults to what the corpus is known for, and to "char" for a `path`. A single text is
    split 90/5/5 in order. The vocabulary is that of all splits: characters sorted, words by falling
    frequency, as an adaptive softmax wants them. The text is read in blocks, twice; with `cache_dir` only
    the first time, as later calls map `cache_dir/KEY.*.npy`, where KEY is a hash of the content.

    FileNotFoundError says what was looked for and how to get it; ValueError, which name, level or text is
    wrong.

    >>> corpus = load("shakespeare")
    >>> corpus.train.shape, len(corpus.vocabulary), corpus.vocabulary.decode(corpus.train[:14])
    ((1003854,), 65, 'First Citizen:')
    """
    if path is not None:
        name, source, splits = Path(path).name, _OWN_TEXT, [_text_files(Path(path))]
    else:
        source = find_source(name)
        splits = corpus_files(name, source, default_data_dir() if data_dir is None else Path(data_dir))
    level = source.level if level is None else level
    check_level(level)
    vocabulary, streams = tokenize(splits, source, level, None if cache_dir is None else Path(cache_dir))
    if len(streams) == 1:
        n = len(streams[0])
        streams = np.split(streams[0], [n * 90 // 100, n * 95 // 100])
    return Corpus(name, vocabulary, *streams)


class Segment(NamedTuple):
    inputs: np.ndarray  # int32 [batch, time]
    targets: np.ndarray  # int32 [batch, time], the inputs of one token later
    is_start: bool  # the streams start anew: forget the history of the segment before


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """Training segments; build them with `segments`."""

    tokens: np.ndarray
    batch: int
    length: int
    seed: int | None
    rows: range

    def __len__(self) -> int:
        """Segments in an epoch: the tokens after them, fewer than `length` a stream, are left out."""
        return (len(self.tokens) // self.batch - 1) // self.length

    def __getitem__(self, step: int) -> Segment:
        if (step := operator.index(step)) < 0:
            raise IndexError(f"step must be at least 0, got {step}")
        epoch, k = divmod(step, len(self))
        n = len(self.tokens)
        # The corpus, turned by `offset`, in `batch` streams of n // batch tokens: b starts at b (n // batch).
        offset = 0 if self.seed is None else int(np.random.default_rng((self.seed, epoch)).integers(n))
        starts = offset + np.asarray(self.rows) * (n // self.batch) + k * self.length
        positions = (starts[:, None] + np.arange(self.length + 1)) % n
        return Segment(_take(self.tokens, positions[:, :-1]), _take(self.tokens, positions[:, 1:]), k == 0)

    def __iter__(self) -> Iterator[Segment]:
        """One epoch, the first."""
        return (self[step] for step in range(len(self)))

    def shard(self, process_index: int, process_count: int) -> "Segments":
        """The share of one process: rows [i·batch/p, (i+1)·batch/p) of every segment."""
        return dataclasses.replace(self, rows=_share(self.rows, process_index, process_count))


def segments(tokens: np.ndarray, batch: int, length: int, *, seed: int | None = None) -> Segments:
    """Segments of `tokens` (integers [n]) for language modeling with a carried history.

    The tokens are laid out as `batch` contiguous streams; segment k is columns k·length to (k + 1)·length
    of each, as in Bai et al. and Transformer-XL. `segments[step]` depends on (seed, step) alone: any step
    from 0 on is valid, epochs follow one another, and to resume is to store the step. With a `seed` each
    epoch first turns the corpus by a random offset, so that the cuts fall elsewhere; the one transition
    from the last token to the first is then a target like any other. ValueError if there is less than one
    segment.

    >>> batches = segments(np.arange(10), batch=2, length=2)
    >>> len(batches)
    2
    >>> batches[1]
    Segment(inputs=array([[2, 3],
           [7, 8]], dtype=int32), targets=array([[3, 4],
           [8, 9]], dtype=int32), is_start=False)
    """
    tokens = _check_tokens(tokens, batch, length, needed=batch * (length + 1))
    if seed is not None and operator.index(seed) < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return Segments(tokens, batch, length, seed, range(batch))


class EvaluationSegment(NamedTuple):
    inputs: np.ndarray  # int32 [batch, time]
    targets: np.ndarray  # int32 [batch, time]
    weights: np.ndarray  # float32 [batch, time]: 1, or 0 where there is only padding
    is_start: bool


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSegments:
    """One pass over a corpus; build it with `evaluation_segments`."""

    tokens: np.ndarray
    batch: int
    length: int
    rows: range

    def __len__(self) -> int:
        return -(-self._width // self.length)

    @property
    def _width(self) -> int:
        return -(-(len(self.tokens) - 1) // self.batch)

    def __getitem__(self, step: int) -> EvaluationSegment:
        if not 0 <= (step := operator.index(step)) < len(self):
            raise IndexError(f"step must be in [0, {len(self)}), got {step}")
        # Position p < n − 1 predicts token p + 1, and uniquely p = row · width + column.
        columns = step * self.length + np.arange(self.length)
        positions = np.asarray(self.rows)[:, None] * self._width + columns
        real = (columns < self._width) & (positions < len(self.tokens) - 1)
        positions = np.where(real, positions, 0)
        inputs, targets = _take(self.tokens, positions), _take(self.tokens, positions + 1)
        return EvaluationSegment(inputs, targets, real.astype(np.float32), step == 0)

    def shard(self, process_index: int, process_count: int) -> "EvaluationSegments":
        """The share of one process: add up losses and weights over the processes, then divide."""
        return dataclasses.replace(self, rows=_share(self.rows, process_index, process_count))


def evaluation_segments(tokens: np.ndarray, batch: int, length: int) -> EvaluationSegments:
    """Segments in which each of `tokens` (integers [n]) but the first is a target of weight 1 exactly once.

    Laid out as in `segments`, and padded with weight 0 at the end. The perplexity of the text is
    exp(Σ weights·loss / Σ weights), with Σ weights = n − 1.

    >>> [part.targets.tolist() for part in evaluation_segments(np.arange(6), batch=1, length=3)]
    [[[1, 2, 3]], [[4, 5, 1]]]
    >>> evaluation_segments(np.arange(6), batch=1, length=3)[1].weights
    array([[1., 1., 0.]], dtype=float32)
    """
    return EvaluationSegments(_check_tokens(tokens, batch, length, needed=2), batch, length, range(batch))


def check(data_dir: str | Path) -> bool:
    """Compare every corpus in `data_dir` with its published counts, print a line each; True if none differs.

    >>> check("nowhere")  # doctest: +ELLIPSIS
    shakespeare   ok: (1003854, 55770, 55770), vocabulary 65
    ptb           absent...
    """
    good = True
    for name, source in CORPORA.items():
        try:
            corpus = load(name, data_dir=data_dir)
        except FileNotFoundError as error:
            print(f"{name:13} absent: {str(error).splitlines()[0]}")
            continue
        got = tuple(len(stream) for stream in (corpus.train, corpus.valid, corpus.test))
        size = len(corpus.vocabulary)
        same = got == source.counts and source.vocabulary in (None, size)
        verdict = "ok" if same else f"DIFFERS: expected {source.counts}, vocabulary {source.vocabulary}, got"
        print(f"{name:13} {verdict}{':' if same else ''} {got}, vocabulary {size}")
        good &= same
    return good


def list_corpora() -> None:
    """Print the name, level, sizes and origin of every corpus."""
    for name, source in CORPORA.items():
        origin = source.urls[0] if source.urls else "embedded"
        print(f"{name:13} {source.level}  {' / '.join(f'{n:,}' for n in source.counts)}  {origin}")


def main(args: Sequence[str] | None = None) -> None:
    import tyro  # here, so that an experiment can load data without it

    commands = {"download": download, "list": list_corpora, "check": check}
    try:
        result = tyro.extras.subcommand_cli_from_dict(
            commands,
            args=args,
            prog="python -m experiments.training.data",
            description=__doc__,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if result is False:
        raise SystemExit(1)


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a UTF-8 text file or a directory of *.txt")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} is empty: a directory without a *.txt file")
    return files


# Streams to segments.


def _check_tokens(tokens: np.ndarray, batch: int, length: int, needed: int) -> np.ndarray:
    for name, value in (("batch", batch), ("length", length)):
        if operator.index(value) < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"expected tokens as integers [n], got {tokens.dtype} {list(tokens.shape)}")
    if len(tokens) < needed:
        raise ValueError(
            f"batch {batch} and length {length} need at least {needed} tokens, got {len(tokens)}: less than one segment"
        )
    return tokens


def _take(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return tokens[positions].astype(np.int32, copy=False)


def _share(rows: range, process_index: int, process_count: int) -> range:
    if not 0 <= process_index < process_count:
        raise ValueError(f"expected 0 <= process_index < process_count, got {process_index} of {process_count}")
    if len(rows) % process_count:
        raise ValueError(f"a batch of {len(rows)} cannot be shared evenly by {process_count} processes")
    share = len(rows) // process_count
    return rows[process_index * share : (process_index + 1) * share]


if __name__ == "__main__":
    main()
