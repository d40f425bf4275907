"""Text to int32 token streams: a vocabulary, and files read in blocks."""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from experiments.training.corpora import Level, Source, replacing

BLOCK = 1 << 18  # bytes of text held at a time, so that memory does not grow with the corpus


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
        check_level(self.level)
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


def check_level(level: str) -> None:
    if level not in ("char", "word"):
        raise ValueError(f"level must be 'char' or 'word', got {level!r}")


def _open(file: Path) -> BinaryIO:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)
    return cast(BinaryIO, opener(file, "rb"))


def _units(text: str, level: Level) -> Sequence[str]:
    return text if level == "char" else text.replace("\n", " <eos> ").split()


def tokenize(
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
            with replacing(name) as part:
                stream = np.lib.format.open_memmap(part, "w+", np.int32, (size,))
                _encode_into(stream, files, source, vocabulary)
                stream.flush()
                del stream  # an open map cannot be renamed on Windows
        with replacing(index) as part:
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
