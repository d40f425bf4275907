"""The corpora against their published counts, batches against the stream they came from, and every error."""

import doctest
import functools
import gzip
import hashlib
import http.server
import io
import lzma
import os
import re
import socket
import sys
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest

from experiments.training import corpora, data, tokenizer

WORDS = tokenizer.Vocabulary(("<eos>", "<unk>", "a", "rose", "is"), "word")


@functools.cache
def published(name, level=None):
    """A corpus of the directory DEQ_JAX_DATA names, read once for all tests."""
    if not os.environ.get("DEQ_JAX_DATA"):
        pytest.skip("needs real corpora: set DEQ_JAX_DATA to a directory that holds them")
    try:
        return data.load(name, level=level)
    except FileNotFoundError as error:
        pytest.skip(str(error).splitlines()[0])


def test_examples():
    results = [doctest.testmod(module) for module in (data, corpora, tokenizer)]
    assert sum(result.attempted for result in results) > 10 and not any(result.failed for result in results)


# Vocabularies.


def test_vocabulary_inverts():
    text = "a rose is\na rose\n"
    ids = WORDS.encode(text)
    assert ids.dtype == np.int32 and WORDS.decode(ids) == text
    chars = tokenizer.Vocabulary(tuple(sorted(set(text))))
    np.testing.assert_array_equal(chars.decode(chars.encode(text)), text)
    assert chars.encode("").shape == (0,) and chars.decode([]) == ""


def test_unknown_tokens():
    assert WORDS.decode(WORDS.encode("a tulip is")) == "a <unk> is"
    with pytest.raises(ValueError, match=r"word 'tulip' at position 1 is not in this vocabulary of 1"):
        tokenizer.Vocabulary(("a",), "word").encode("a tulip")
    with pytest.raises(ValueError, match=r"character 'é' at position 2 is not in this vocabulary of 2"):
        tokenizer.Vocabulary(("a", "b")).encode("abé")
    with pytest.raises(ValueError, match=r"expected ids in \[0, 5\), got -1 at position 1"):
        WORDS.decode([0, -1])
    with pytest.raises(ValueError, match=r"must differ; repeated: \['a'\]"):
        tokenizer.Vocabulary(("a", "b", "a"))
    with pytest.raises(ValueError, match="level must be 'char' or 'word', got 'byte'"):
        tokenizer.Vocabulary(("a",), "byte")


def test_fingerprint_tells_vocabularies_apart():
    prints = [tokenizer.Vocabulary(*args).fingerprint for args in [(("a", "b"),), (("b", "a"),), (("a", "b"), "word")]]
    assert len(set(prints)) == 3
    # A checkpoint outlives a process: the value must not depend on hash seeds or versions.
    assert prints[0] == hashlib.sha256(b'["char", ["a", "b"]]').hexdigest()


# Corpora.


@pytest.mark.parametrize("name", ["ptb", "ptb-char", "wikitext-2", "wikitext-103", "text8", "enwik8"])
def test_published_counts(name):
    corpus, source = published(name), corpora.CORPORA[name]
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == source.counts
    assert source.vocabulary in (None, len(corpus.vocabulary))
    for stream in corpus[2:]:
        assert stream.dtype == np.int32 and not stream.flags.writeable
        head = stream[:5000]
        np.testing.assert_array_equal(corpus.vocabulary.encode(corpus.vocabulary.decode(head)), head)


def test_ptb_reads_as_itself():
    corpus = published("ptb")
    start = corpus.vocabulary.decode(corpus.train[:31])
    assert start.startswith("aer banknote berlitz") and "\npierre <unk> N years" in start
    assert corpus.vocabulary.tokens[:3] == ("the", "<unk>", "<eos>")  # by falling frequency


def test_ptb_char_is_ptb_spelled():
    words, letters = published("ptb"), published("ptb-char")
    assert letters.vocabulary.decode(letters.valid) == words.vocabulary.decode(words.valid)
    as_words = published("ptb-char", "word")
    assert as_words.vocabulary == words.vocabulary
    np.testing.assert_array_equal(as_words.test, words.test)


def test_shakespeare():
    corpus = data.load("shakespeare")
    assert tuple(map(len, corpus[2:])) == corpora.CORPORA["shakespeare"].counts and len(corpus.vocabulary) == 65
    text = corpus.vocabulary.decode(np.concatenate(corpus[2:]))
    digest = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_missing_corpus_says_where_and_how(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        data.load("ptb", data_dir=tmp_path)
    assert str(caught.value) == (
        f"ptb: no ptb/ptb.train.txt, ptb/ptb.valid.txt, ptb/ptb.test.txt (plain, .xz or .gz) in {tmp_path}\n"
        f"To get it: python -m experiments.training.data download ptb --data-dir {tmp_path}"
    )
    (tmp_path / "wikitext-103").mkdir()
    for split in ("valid", "test"):
        (tmp_path / f"wikitext-103/wiki.{split}.tokens").write_text(" a \n")
    with pytest.raises(FileNotFoundError, match=r"no wikitext-103/wiki.train.tokens \(plain"):
        data.load("wikitext-103", data_dir=tmp_path)
    with pytest.raises(ValueError, match="expected a corpus among shakespeare, ptb, .*, got 'ptbb'"):
        data.load("ptbb")
    with pytest.raises(ValueError, match="level must be 'char' or 'word', got 'byte'"):
        data.load("shakespeare", level="byte")


def test_data_dir_default(monkeypatch, tmp_path):
    monkeypatch.setenv("DEQ_JAX_DATA", str(tmp_path))
    assert corpora.default_data_dir() == tmp_path
    monkeypatch.delenv("DEQ_JAX_DATA")
    assert corpora.default_data_dir().parts[-2:] == (".cache", "deq_jax")


def test_bytes_and_long_lines(tmp_path, monkeypatch):
    """enwik8's symbols are bytes, text8 is one line, and neither depends on where a block ends."""
    monkeypatch.setattr(tokenizer, "BLOCK", 7)
    raw = bytes(range(256)) * 2
    (tmp_path / "enwik8").mkdir()
    (tmp_path / "enwik8/enwik8.gz").write_bytes(gzip.compress(raw))
    corpus = data.load("enwik8", data_dir=tmp_path)
    assert corpus.vocabulary.decode(np.concatenate(corpus[2:])).encode("latin-1") == raw
    (tmp_path / "text8").mkdir()
    (tmp_path / "text8/text8").write_text(text := " anarchism originated as a term" * 9)
    corpus = data.load("text8", data_dir=tmp_path)
    assert corpus.vocabulary.decode(np.concatenate(corpus[2:])) == text


# A text of one's own.


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
def test_own_text(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tokenizer, "BLOCK", block)
    (tmp_path / "b.txt").write_bytes("über Ärger\r\nund 戦場\n".encode())
    (tmp_path / "a.txt").write_bytes("\ufeffzuerst\n".encode())
    (tmp_path / "c.md").write_text("not this")
    corpus = data.load(path=tmp_path)
    assert corpus.vocabulary.decode(np.concatenate(corpus[2:])) == "zuerst\nüber Ärger\nund 戦場\n"
    words = data.load(path=tmp_path / "b.txt", level="word")
    assert words.name == "b.txt"
    assert words.vocabulary.decode(np.concatenate(words[2:])) == "über Ärger\nund 戦場\n"
    assert [len(part) for part in words[2:]] == [5, 0, 1]


def test_own_text_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt does not exist; expected a UTF-8 text file or"):
        data.load(path=tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="is empty: a directory without a"):
        data.load(path=tmp_path)
    (empty := tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt is empty: it holds no char tokens"):
        data.load(path=empty)


@pytest.mark.parametrize("block", [4, 1 << 18])
def test_not_utf8_names_the_byte(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tokenizer, "BLOCK", block)
    (bad := tmp_path / "bad.txt").write_bytes(b"so weit gut\nnun " + "Ärger".encode("latin-1"))
    with pytest.raises(ValueError, match="bad.txt: expected utf-8 text, got byte 0xc4 at offset 16"):
        data.load(path=bad)


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_damaged_file_is_named(tmp_path, suffix, pack):
    (short := tmp_path / f"short.txt{suffix}").write_bytes(pack(b"a rose is a rose" * 99)[:-12])
    with pytest.raises(ValueError, match=re.escape(f"short.txt{suffix} is damaged: ")):
        data.load(path=short)
    (other := tmp_path / f"other.txt{suffix}").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=re.escape(f"other.txt{suffix} is damaged: ")):
        data.load(path=other)


# The cache, and memory.


def test_cache_is_the_same_and_mapped(tmp_path, monkeypatch):
    (text := tmp_path / "own.txt").write_text("a rose is a rose\n" * 50)
    plain = data.load(path=text, level="word")
    first = data.load(path=text, level="word", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(tokenizer, "_count", None)  # from here on nothing may be tokenized
    second = data.load(path=text, level="word", cache_dir=tmp_path / "cache")
    for corpus in (first, second):
        assert corpus.vocabulary == plain.vocabulary and isinstance(corpus.train, np.memmap)
        for got, expected in zip(corpus[2:], plain[2:], strict=True):
            np.testing.assert_array_equal(got, expected)
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".json", ".npy"]
    text.write_text("another rose\n")  # the key is the content
    with pytest.raises(TypeError):
        data.load(path=text, level="word", cache_dir=tmp_path / "cache")


def test_a_failed_cache_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    (text := tmp_path / "own.txt").write_text("a rose")
    monkeypatch.setattr(tokenizer, "_encode_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load(path=text, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("level, tokens", [("char", 5_000_000), ("word", 1_000_000)])
def test_memory_does_not_grow_with_the_corpus(tmp_path, level, tokens):
    line = " ".join(f"w{i}" for i in range(99)) + "\n"
    per_line = len(line) if level == "char" else 100
    (text := tmp_path / "large.txt").write_text(line * (tokens // per_line + 1))
    tracemalloc.start()
    corpus = data.load(path=text, level=level, cache_dir=tmp_path / "cache")
    segment = data.segments(corpus.train, 32, 100)[7]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, corpus[2:])) >= tokens and type(segment.inputs) is np.ndarray
    assert peak < 16 * 2**20  # 5M ids are 20 MB, a million words as a list 60 MB


# Segments.


@pytest.mark.parametrize("n, batch, length", [(10, 2, 2), (103, 4, 5), (1000, 7, 13), (6, 2, 2)])
@pytest.mark.parametrize("seed", [None, 3])
def test_segments_reproduce_the_stream(n, batch, length, seed):
    tokens = np.random.default_rng(0).permutation(n).astype(np.int32)
    batches = data.segments(tokens, batch, length, seed=seed)
    assert len(batches) == (n // batch - 1) // length >= 1
    for epoch in range(3):
        parts = [batches[epoch * len(batches) + k] for k in range(len(batches))]
        assert [part.is_start for part in parts] == [True] + [False] * (len(batches) - 1)
        inputs = np.concatenate([part.inputs for part in parts], axis=1)
        targets = np.concatenate([part.targets for part in parts], axis=1)
        assert inputs.dtype == targets.dtype == np.int32
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        turned = np.roll(tokens, -int(np.flatnonzero(tokens == inputs[0, 0])[0]))
        streams = turned[: n // batch * batch].reshape(batch, -1)
        np.testing.assert_array_equal(inputs, streams[:, : len(batches) * length])
        np.testing.assert_array_equal(targets, streams[:, 1 : len(batches) * length + 1])
        assert seed is not None or inputs[0, 0] == tokens[0]


def test_segments_are_a_function_of_seed_and_step():
    tokens = np.arange(5000)
    batches = data.segments(tokens, 4, 10, seed=1)
    far = batches[12_345]
    resumed = data.segments(tokens, 4, 10, seed=1)[np.int64(12_345)]
    np.testing.assert_array_equal(far.inputs, resumed.inputs)
    starts = {int(batches[epoch * len(batches)].inputs[0, 0]) for epoch in range(20)}
    assert len(starts) > 15
    assert (data.segments(tokens, 4, 10, seed=2)[0].inputs != batches[0].inputs).any()
    assert len(list(batches)) == len(batches)  # one epoch, not for ever


@pytest.mark.parametrize("make", [data.segments, data.evaluation_segments])
def test_shards_are_the_batch(make):
    whole = make(np.arange(1003), 6, 7)
    shards = [whole.shard(i, 3) for i in range(3)]
    for step in range(len(whole)):
        for field in range(len(whole[0]) - 1):
            together = np.concatenate([shard[step][field] for shard in shards])
            np.testing.assert_array_equal(together, whole[step][field])
    with pytest.raises(ValueError, match="a batch of 6 cannot be shared evenly by 4 processes"):
        whole.shard(0, 4)
    with pytest.raises(ValueError, match="expected 0 <= process_index < process_count, got 3 of 3"):
        whole.shard(3, 3)


@pytest.mark.parametrize("n, batch, length", [(2, 1, 5), (101, 4, 5), (1000, 7, 13), (5, 8, 2), (31, 3, 10)])
def test_evaluation_covers_each_token_once(n, batch, length):
    tokens = np.arange(n)
    seen = np.zeros(n, int)
    parts = data.evaluation_segments(tokens, batch, length)
    for step, part in enumerate(parts):
        assert part.inputs.shape == part.targets.shape == part.weights.shape == (batch, length)
        assert part.weights.dtype == np.float32 and part.is_start == (step == 0)
        real = part.weights == 1
        np.testing.assert_array_equal(part.inputs[real] + 1, part.targets[real])
        np.add.at(seen, part.targets[real], 1)
    assert step + 1 == len(parts)
    np.testing.assert_array_equal(seen, [0] + [1] * (n - 1))  # nothing precedes the first token
    with pytest.raises(IndexError, match=re.escape(f"step must be in [0, {len(parts)}), got {len(parts)}")):
        parts[len(parts)]


@pytest.mark.parametrize("make", [data.segments, data.evaluation_segments])
def test_segment_errors(make):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        make(np.arange(9), 0, 1)
    with pytest.raises(ValueError, match="length must be at least 1, got -2"):
        make(np.arange(9), 1, -2)
    with pytest.raises(TypeError, match=r"expected tokens as integers \[n\], got float64 \[3\]"):
        make(np.ones(3), 1, 1)
    with pytest.raises(TypeError, match=r"expected tokens as integers \[n\], got int64 \[2, 2\]"):
        make(np.ones((2, 2), np.int64), 1, 1)


def test_too_short_for_one_segment(tmp_path):
    (text := tmp_path / "short.txt").write_text("so short a text")
    corpus = data.load(path=text)
    message = "batch 4 and length 3 need at least 16 tokens, got 13: less than one segment"
    with pytest.raises(ValueError, match=message):
        data.segments(corpus.train, 4, 3)
    assert len(data.segments(np.arange(16), 4, 3)) == 1
    with pytest.raises(ValueError, match="need at least 2 tokens, got 1"):
        data.evaluation_segments(np.arange(1), 4, 3)
    with pytest.raises(IndexError, match="step must be at least 0, got -1"):
        data.segments(np.arange(16), 4, 3)[-1]
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        data.segments(np.arange(16), 4, 3, seed=-1)


# Downloads, from a server on this machine.


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.body`, from where Range says if `server.ranges`, and hangs up at byte `server.cut`."""

    def do_GET(self):
        server = self.server
        server.seen.append(dict(self.headers))
        first = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.ranges else 0
        if first >= len(server.body) or self.path.startswith("/missing"):
            return self.send_error(404 if self.path.startswith("/missing") else 416)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(server.body) - first))
        self.end_headers()
        self.wfile.write(server.body[first : server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.ranges, server.cut, server.seen = b"a rose is a rose\n" * 9000, True, None, []
        server.url = f"http://127.0.0.1:{server.server_port}/a.txt"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def sha256(raw):
    return hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("bar", [True, False])
def test_fetch(server, tmp_path, monkeypatch, bar):
    if not bar:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    file = tmp_path / "own/a.txt"
    corpora.fetch(server.url, sha256(server.body), [file])
    assert file.read_bytes() == server.body and [f.name for f in file.parent.iterdir()] == ["a.txt"]
    assert not server.seen[0]["User-Agent"].startswith("Python-urllib")
    corpora.fetch(server.url, sha256(server.body), [file])  # there already
    assert len(server.seen) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_resumes(server, tmp_path, ranges):
    file, server.cut, server.ranges = tmp_path / "a.txt", 100_000, ranges
    with pytest.raises(ConnectionError, match=r"cut after 100000 of 153000 bytes\nTo resume, run the same"):
        corpora.fetch(server.url, sha256(server.body), [file])
    assert not file.exists() and (tmp_path / "a.txt.part").stat().st_size == 100_000
    server.cut = None
    corpora.fetch(server.url, sha256(server.body), [file])
    assert server.seen[1]["Range"] == "bytes=100000-"
    assert file.read_bytes() == server.body and not (tmp_path / "a.txt.part").exists()


def test_fetch_starts_over_from_a_wrong_part(server, tmp_path):
    (tmp_path / "a.txt.part").write_bytes(b"x" * len(server.body))  # the server answers 416
    corpora.fetch(server.url, sha256(server.body), [tmp_path / "a.txt"])
    assert (tmp_path / "a.txt").read_bytes() == server.body


def test_fetch_verifies(server, tmp_path):
    expected, got = "0" * 64, sha256(server.body)
    with pytest.raises(ValueError, match=f"a.txt: expected sha256 {expected}, got {got}; what came was deleted"):
        corpora.fetch(server.url, expected, [tmp_path / "a.txt"])
    assert list(tmp_path.iterdir()) == []


def test_fetch_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.txt"
        with pytest.raises(ConnectionError) as caught:
            corpora.fetch(url, sha256(b"by hand"), [tmp_path / "a.txt"])
        message, part = str(caught.value), tmp_path / "a.txt.part"
        assert f"could not download {url}" in message and "refused" in message
        assert f"By hand: save that address as {part}\nand run the same command again" in message
        part.write_bytes(b"by hand")  # as the message says
        corpora.fetch(url, sha256(b"by hand"), [tmp_path / "a.txt"])
        assert (tmp_path / "a.txt").read_bytes() == b"by hand"


def test_fetch_http_error(server, tmp_path):
    with pytest.raises(ConnectionError, match="could not download .*/missing.txt: HTTP Error 404"):
        corpora.fetch(server.url.replace("a.txt", "missing.txt"), "0" * 64, [tmp_path / "a.txt"])


def zipped(**members):
    with zipfile.ZipFile(raw := io.BytesIO(), "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return raw.getvalue()


def test_fetch_unzips_only_what_it_names(server, tmp_path):
    server.body = zipped(**{"wiki/": "", "wiki/a.tokens": "a", "../../evil.txt": "evil", "../b.tokens": "b"})
    url, home = server.url.replace("a.txt", "w.zip"), tmp_path / "deep/er"
    corpora.fetch(url, sha256(server.body), [home / "a.tokens", home / "b.tokens"])
    assert (home / "a.tokens").read_text() == "a" and (home / "b.tokens").read_text() == "b"
    assert sorted(f.name for f in tmp_path.rglob("*") if f.is_file()) == ["a.tokens", "b.tokens"]
    with pytest.raises(ValueError, match=r"w.zip.part: expected a member c.tokens, got \[.*'a.tokens'"):
        corpora.fetch(url, sha256(server.body), [tmp_path / "c.tokens"])


def test_download_lays_files_where_load_looks(server, tmp_path, monkeypatch, capsys):
    server.body = b" aer N \n pierre <unk> \n"
    for name in ("ptb", "ptb-char"):
        monkeypatch.setitem(corpora.CORPORA, name, corpora.CORPORA[name]._replace(urls=(server.url,) * 3))
    monkeypatch.setitem(corpora.SHA256, "a.txt", sha256(server.body))
    for name in ("ptb", "ptb-char"):
        data.main(["download", name, "--data-dir", str(tmp_path)])
        corpus = data.load(name, data_dir=tmp_path)
        assert corpus.vocabulary.decode(corpus.test) == "aer N\npierre <unk>\n"
    assert "ptb.char.test.txt" in capsys.readouterr().out
    spelled = (tmp_path / "ptb-char/ptb.char.test.txt").read_text()
    assert spelled == "a e r _ N \n p i e r r e _ < u n k > \n "


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_spelling_is_the_published_one(split):
    published("ptb"), published("ptb-char")
    (words,), (letters,) = (
        [corpora.default_data_dir() / name.format(split)] for name in ("ptb/ptb.{}.txt", "ptb-char/ptb.char.{}.txt")
    )
    with tokenizer._open(corpora._find(words)) as plain, tokenizer._open(corpora._find(letters)) as spelled:
        assert corpora._spell(plain.read().decode()) == spelled.read().decode()


# The command line.


def test_every_url_has_a_checksum():
    for source in corpora.CORPORA.values():
        assert all(len(corpora.SHA256[url.rsplit("/", 1)[1]]) == 64 for url in source.urls)
        assert len(source.urls) in (0, 1, len(source.files))


def test_command_line(tmp_path, capsys):
    data.main(["list"])
    assert "wikitext-2    word  2,088,628 / 217,646 / 245,569  https://" in capsys.readouterr().out
    data.main(["download", "shakespeare"])
    assert "nothing to download" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: expected a corpus among .*, got 'ptbb'"):
        data.main(["download", "ptbb", "--data-dir", str(tmp_path)])
    for split in ("train", "valid", "test"):
        (tmp_path / "ptb").mkdir(exist_ok=True)
        (tmp_path / f"ptb/ptb.{split}.txt").write_text(" aer N \n")
    with pytest.raises(SystemExit) as caught:
        data.main(["check", str(tmp_path)])
    out = capsys.readouterr().out
    assert caught.value.code == 1 and "shakespeare   ok: (1003854, 55770, 55770), vocabulary 65" in out
    assert "DIFFERS: expected (929589, 73760, 82430), vocabulary 10000, got (3, 3, 3), vocabulary 3" in out
    assert "wikitext-2    absent: wikitext-2: no wikitext-2/wiki.train.tokens" in out
