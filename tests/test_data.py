"""Text becomes the tokens that it should: packed, held out, ordered, kept on disk, or refused."""

import errno
import gzip
import io
import itertools
import json
import os
import shutil
from datetime import datetime
from types import SimpleNamespace

import datasets
import hub
import numpy as np
import pyarrow.parquet
import pytest
import torch
import zstandard
from conftest import constants
from transformers import AutoTokenizer

import data
from klsplice import storage
from klsplice.errors import UserError
from klsplice.text import documents as text_files
from klsplice.text import token_cache

CONTEXT = 16
LM = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The tiny Gemma's tokenizer, which adds a BOS, and the same without it."""
    with_bos, without = tmp_path_factory.mktemp("bos"), tmp_path_factory.mktemp("plain")
    hub.make_gemma(with_bos, seed=0)
    plain = AutoTokenizer.from_pretrained(with_bos)
    plain.save_pretrained(without)
    file = without / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    both = {True: plain, False: AutoTokenizer.from_pretrained(without)}
    both[True].chat_template = TEMPLATE
    assert both[True]("a")["input_ids"][0] == 2 and both[False]("a")["input_ids"][0] != 2
    return both


@pytest.fixture
def tokenizer(tokenizers):
    return tokenizers[True]


def texts(n=24, seed=0):
    """Documents of 1 to 60 words, one of them empty: it is skipped."""
    rng, words = np.random.default_rng(seed), hub.vocabulary()
    drawn = [rng.choice(words, rng.integers(1, 60)) for _ in range(n)]
    return [" ".join(words) if i != 3 else "" for i, words in enumerate(drawn)]


def write(path, documents, key="text"):
    path.write_text("".join(json.dumps({key: d}) + "\n" for d in documents))
    return str(path)


def prepare(tokenizer, dataset, **changes):
    """Four contexts held out, eight trained on, unless `changes` say otherwise."""
    small = {"DATASET": str(dataset), "DATASET_REVISION": "", "CONTEXT": CONTEXT, "BATCH": 2}
    small |= {"VAL_TOKENS": 4 * CONTEXT, "TOKENS": 8 * CONTEXT, "CACHE": "cache"}
    return data.prepare(constants(**small | changes), tokenizer, LM)


def trained_on(tokens):
    return torch.cat([tokens.batch(step) for step in range(tokens.steps)]).numpy()


def packing(tokenizer, documents, n_val, *, bos, context=CONTEXT):
    """The rule, a token at a time -> held-out and training contexts."""
    start = [tokenizer.bos_token_id] * bos
    val, train, now = [], [], [*start]
    for text in filter(None, documents):
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 1]:
            now.append(token)
            if len(now) == context:
                (val if len(val) < n_val else train).append(now)
                now = [*start]
                if len(val) == n_val and not train:
                    break  # the rest of the document at the border
    return np.array(val), np.array(train)


# ---- packing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("n_val", [1, 4, 7])
def test_documents_are_joined_by_eos_and_cut_into_contexts(at, tokenizers, bos, n_val):
    tokenizer, documents = tokenizers[bos], texts()
    val_SL, train_SL = packing(tokenizer, documents, n_val, bos=bos)
    size = {"VAL_TOKENS": n_val * CONTEXT + 5, "TOKENS": len(train_SL) // 2 * 2 * CONTEXT + 3}
    found = prepare(tokenizer, write(at / "x.jsonl", documents), **size)
    assert np.array_equal(found.val_SL, val_SL) and found.bos == bos
    assert (found.val_SL[:, 0] == 2).all() == bos and not (found.val_SL[:, 1:] == 2).any()
    assert np.array_equal(trained_on(found), train_SL[: len(train_SL) // 2 * 2])
    assert found.tokens == trained_on(found).size


# ---- which sequences -------------------------------------------------------------------------


def test_seed_0_takes_a_finite_text_in_its_order_and_others_a_permutation(at, tokenizer):
    path = write(at / "x.jsonl", texts())
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    n = len(train_SL) // 2 * 2
    orders = []
    for seed in range(4):
        found = prepare(tokenizer, path, SEED=seed, TOKENS=n * CONTEXT)
        assert np.array_equal(trained_on(found), train_SL[found.order_S])
        assert len(set(found.order_S)) == n
        orders.append(found.order_S.tolist())
    assert orders[0] == list(range(n)) and len({tuple(order) for order in orders}) == 4
    few = prepare(tokenizer, path, SEED=2, CACHE="other")
    assert few.order_S.tolist() == orders[2][:8]  # of the whole text, not of its start
    assert max(few.order_S) >= 8


def test_skip_tokens_leaves_out_the_first_training_contexts(at, tokenizer):
    path = write(at / "x.jsonl", texts())
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    found = prepare(tokenizer, path, SKIP_TOKENS=5 * CONTEXT + 1)
    assert np.array_equal(trained_on(found), train_SL[5:13])
    permuted = prepare(tokenizer, path, SKIP_TOKENS=5 * CONTEXT, SEED=1)
    assert min(permuted.order_S) >= 5


# ---- a hub's stream --------------------------------------------------------------------------


class Stream:
    """What Documents.open gives; raises `fault` once before each row of `faulty`."""

    def __init__(self, documents, faulty=(), fault=ConnectionError):
        self.rows, self.faulty, self.fault = [{"text": d} for d in documents], {*faulty}, fault
        self.at, self.stream = 0, self

    def open(self, state):
        self.at = state["at"] if state else 0
        return self

    def state_dict(self):
        return {"at": self.at}

    def __iter__(self):
        while self.at < len(self.rows):
            if self.at in self.faulty:
                self.faulty.discard(self.at)
                raise self.fault("hung up")
            self.at += 1
            yield self.rows[self.at - 1]


HUB = {"dataset": "someone/text", "DATASET_REVISION": "5eed" * 10}


@pytest.fixture
def streamed(at, monkeypatch, tokenizer):
    """A function that prepares tokens from a Stream, without waiting."""
    monkeypatch.setattr(text_files, "DOCUMENTS_AT_A_TIME", 2)
    waited = []
    monkeypatch.setattr(text_files, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(token_cache, "time", SimpleNamespace(monotonic=lambda: 0.0))

    def run(stream, **changes):
        monkeypatch.setattr(text_files.Documents, "open", lambda self, state: stream.open(state))
        return prepare(tokenizer, **HUB | changes)

    run.waited = waited
    return run


def test_a_seed_takes_its_slice_of_a_stream(streamed, tokenizer):
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    for seed in (2, 0, 1):  # whatever ran before
        found = streamed(Stream(texts()), SEED=seed, SKIP_TOKENS=CONTEXT)
        assert np.array_equal(trained_on(found), train_SL[1 + 8 * seed :][:8])
    with pytest.raises(UserError, match="TOKENS"):  # a slice that ends after the text
        streamed(Stream(texts()), SEED=len(train_SL) // 8)


def test_revision_files_and_split_reach_datasets(at, tokenizer, monkeypatch):
    path, asked, original = write(at / "x.jsonl", texts()), [], datasets.load_dataset_builder

    def load_dataset_builder(name, **options):
        asked.append((name, options["revision"], options["data_files"]))
        return original("json", data_files={"train": path, "other": path})

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    first, second = "a" * 40, "b" * 40
    changes = [{}, {"DATASET_REVISION": second}, {"DATA_FILES": "x/*"}, {"SPLIT": "other"}]
    given = HUB | {"DATASET_REVISION": first}
    prints = {prepare(tokenizer, **given | change).fingerprint for change in changes}
    commits, files = [first, second, first, first], [None, None, "x/*", None]
    assert asked == [("someone/text", *one) for one in zip(commits, files)] and len(prints) == 4


def test_a_fault_that_passes_loses_and_doubles_nothing(streamed, tokenizer):
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    for n in range(12):
        found = streamed(Stream(texts(), faulty={n, n + 1, n + 5}), CACHE=f"c{n}")
        assert np.array_equal(trained_on(found), train_SL[:8])
    assert set(streamed.waited) == {1, 4}


def test_a_fault_that_stays_keeps_what_was_read(streamed, tokenizer):
    class Broken(Stream):
        def __iter__(self):
            for row in super().__iter__():
                if self.at == 8:
                    raise ConnectionError("still down")
                yield row

    tokens = 30 * CONTEXT
    with pytest.raises(UserError, match="still down") as e:
        streamed(Broken(texts()), TOKENS=tokens)
    assert e.value.code == 1 and 1500 < sum(streamed.waited) < 2100  # half an hour
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    rest = Stream(texts())  # whose first documents are not wanted again
    rest.rows[:6] = [{"text": 3}] * 6
    assert np.array_equal(trained_on(streamed(rest, TOKENS=tokens)), train_SL[:30])


# ---- the cache -------------------------------------------------------------------------------


def bins(cache="cache"):
    (folder,) = [f for f in os.listdir(cache) if f.startswith("tokens-")]
    return {n: open(os.path.join(cache, folder, f"{n}.bin"), "rb").read() for n in ("val", "train")}


class Killed(BaseException):
    pass


@pytest.fixture
def often(monkeypatch):
    """The cache is saved after each two documents."""
    monkeypatch.setattr(text_files, "DOCUMENTS_AT_A_TIME", 2)
    ticks = itertools.count(step=10)
    monkeypatch.setattr(token_cache, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


@pytest.mark.parametrize("point", ["pack", "save"])
@pytest.mark.parametrize("kept", range(4))
def test_an_interrupted_cache_goes_on_byte_for_byte(at, tokenizer, monkeypatch, often, point, kept):
    path, everything = write(at / "x.jsonl", texts()), {"TOKENS": 30 * CONTEXT}
    wanted = trained_on(prepare(tokenizer, path, CACHE="whole", **everything))
    plain, calls = getattr(token_cache.TokenCache, point), itertools.count(1)

    def call(self, *args):
        plain(self, *args)  # after pack the files hold more than the state knows
        if next(calls) > kept:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(token_cache.TokenCache, point, call)
        prepare(tokenizer, path, **everything)
    prepare(tokenizer, path)  # what is there may be enough for fewer
    assert np.array_equal(trained_on(prepare(tokenizer, path, **everything)), wanted)
    assert bins() == bins("whole")


def test_what_the_state_says_is_on_disk_before_it_says_so(at, tokenizer, monkeypatch, often):
    replace, seen = os.replace, []

    def check(new, old):
        state, folder = json.load(open(new)), os.path.dirname(new)
        for name in ("val", "train"):
            size = os.path.getsize(os.path.join(folder, f"{name}.bin"))
            assert size == state[name] * CONTEXT * 4
        seen.append(state["documents"])
        replace(new, old)

    monkeypatch.setattr(os, "replace", check)
    prepare(tokenizer, write(at / "x.jsonl", texts()), TOKENS=30 * CONTEXT)
    assert len(seen) > 3 and seen == sorted(seen)


@pytest.mark.parametrize("name", ["val.bin", "train.bin"])
def test_a_cache_shorter_than_its_state_is_refused(at, tokenizer, name):
    path = write(at / "x.jsonl", texts())
    prepare(tokenizer, path)
    (folder,) = (at / "cache").iterdir()
    os.truncate(folder / name, 3 * CONTEXT * 4)
    for tokens in (8, 30):
        refused(tokenizer, path, name, TOKENS=tokens * CONTEXT)


def test_other_text_tokeniser_or_packing_never_shares_a_cache(at, tokenizers):
    documents = texts()
    paths = [write(at / "x.jsonl", documents), write(at / "y.jsonl", documents[1:])]
    (at / "x.txt").write_bytes((at / "x.jsonl").read_bytes())
    changes = [{}, {"CONTEXT": 15, "VAL_TOKENS": 60}, {"VAL_TOKENS": 3 * CONTEXT}]
    cases = [(tokenizers[bos], path, ch) for bos in tokenizers for path in paths for ch in changes]
    cases.append((tokenizers[True], at / "x.txt", {}))
    with_template = AutoTokenizer.from_pretrained(tokenizers[True].name_or_path)
    with_template.chat_template = "other"
    cases.append((with_template, paths[0], {}))
    prints = {prepare(tokenizer, path, **change).fingerprint for tokenizer, path, change in cases}
    assert len(prints) == len(cases) == len(os.listdir("cache"))
    prepare(tokenizers[True], write(at / "moved.jsonl", documents))  # the same text elsewhere
    assert len(os.listdir("cache")) == len(cases)


# ---- documents -------------------------------------------------------------------------------


def test_documents_without_text_are_skipped_and_counted(streamed, tokenizer, capsys):
    """Across an interruption, too; rows that lack the field are among them."""
    sound = [text for text in texts() if text]
    val_SL, train_SL = packing(tokenizer, sound, 4, bos=True)
    rows = [row for text in sound for row in ({"text": text}, {"text": None}, {"id": 1})]
    rows += [{"text": ""}, {"text": " \n\t"}, {"text": []}]
    for faulty, cache in ((set(), "whole"), ({8}, "stopped")):
        stream = Stream([], faulty, ValueError)
        stream.rows = rows
        if faulty:
            with pytest.raises(UserError):
                streamed(stream, TOKENS=30 * CONTEXT, CACHE=cache)
        found = streamed(stream, TOKENS=len(train_SL) * CONTEXT, CACHE=cache)
        assert np.array_equal(found.val_SL, val_SL)
        assert np.array_equal(trained_on(found), train_SL[: len(train_SL) // 2 * 2])
        assert found.skipped == sum(not row.get("text", "") for row in rows[: stream.at])


# ---- kinds of files --------------------------------------------------------------------------


def lines(documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()


def array(at):
    (at / "x.json").write_text(json.dumps([{"text": text} for text in texts()], indent=1))
    return at / "x.json"


def packed(at):
    half = len(texts()) // 2
    (at / "a.json.gz").write_bytes(gzip.compress(lines(texts()[:half])))
    (at / "b.jsonl.zst").write_bytes(zstandard.compress(lines(texts()[half : half + 3])))
    (at / "c.NDJSON").write_bytes(lines(texts()[half + 3 :]))
    (at / "README.md").write_text("no text")
    return at


def parquet(at):
    pyarrow.parquet.write_table(pyarrow.table({"text": texts()}), at / "x.parquet")
    return at / "x.parquet"


@pytest.mark.parametrize("make", [array, packed, parquet])
def test_every_kind_of_file_gives_the_tokens_of_its_documents(at, tokenizer, make, capsys):
    val_SL, train_SL = packing(tokenizer, texts(), 4, bos=True)
    found = prepare(tokenizer, make(at), CACHE="../cache")
    assert np.array_equal(found.val_SL, val_SL) and np.array_equal(trained_on(found), train_SL[:8])
    assert ("README.md" in capsys.readouterr().out) == (make == packed)  # what is left out


def test_a_text_keeps_its_blank_lines_and_spaces(at, tokenizer):
    (at / "a.txt").write_text(" a\n\n b  \n" + "c d\te\n" * 200)
    (at / "b.txt").write_text("\n\n f " * 200)
    documents = [(at / name).read_text() for name in ("a.txt", "b.txt")]
    val_SL, train_SL = packing(tokenizer, documents, 4, bos=True)
    found = prepare(tokenizer, at / "*.txt")
    assert np.array_equal(found.val_SL, val_SL) and np.array_equal(trained_on(found), train_SL[:8])


@pytest.mark.parametrize("dtype", ["int64", ">i4", "uint16"])
def test_an_array_of_tokens_is_taken_as_it_stands(at, tokenizer, dtype):
    rows_SL = np.random.default_rng(0).integers(0, 256, (20, CONTEXT)).astype(dtype)
    rows_SL[:, 0] = 2 if dtype == "int64" else 7
    np.save(at / "x[1].npy", rows_SL)
    found = prepare(tokenizer, at / "x[1].npy", SKIP_TOKENS=2 * CONTEXT)
    assert np.array_equal(found.val(0, 4), rows_SL[:4]) and found.bos == (dtype == "int64")
    assert np.array_equal(trained_on(found), rows_SL[6:14])
    other = prepare(tokenizer, at / "x[1].npy", SEED=1)
    assert np.array_equal(trained_on(other), rows_SL[4:][other.order_S])
    assert not (at / "cache").exists()


# ---- conversations ---------------------------------------------------------------------------


def test_conversations_pass_through_the_chat_template_with_one_bos(at, tokenizer):
    chats = [
        [{"role": "user", "content": t}, {"role": "model", "content": t[::-1]}] for t in texts()
    ]
    plain = [f"user: {t}\nmodel: {t[::-1]}\n" for t in texts()]
    val_SL, train_SL = packing(tokenizer, plain, 4, bos=True)
    found = prepare(tokenizer, write(at / "x.jsonl", chats, "messages"), TEXT_KEY="messages")
    assert np.array_equal(found.val_SL, val_SL) and np.array_equal(trained_on(found), train_SL[:8])


def with_template(tokenizer, template):
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = template
    return other


def chat_ids(at, tokenizer, chats, **settings):
    """The tokens of conversations, without the BOS that contexts start with."""
    write(at / "x.jsonl", chats, "messages")
    sizes = {"VAL_TOKENS": CONTEXT, "TOKENS": 2 * CONTEXT}
    found = prepare(tokenizer, at / "x.jsonl", TEXT_KEY="messages", **sizes | settings)
    return found.val_SL[:, int(found.bos) :].flatten().tolist()


MARKED = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>\n{% endfor %}"


def test_a_chat_that_ends_its_turn_gets_no_further_eos(at, tokenizer):
    chats = [[{"role": "user", "content": t}] for t in texts()]
    marked = with_template(tokenizer, MARKED.replace("<s>", "").replace("</s>", "<eos>"))
    eos = tokenizer.eos_token_id
    ids = chat_ids(at, marked, chats, VAL_TOKENS=20 * CONTEXT)
    plain = "".join(f"user {t}<eos>\n" for t in texts())
    wanted = tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert ids == wanted[: len(ids)] and eos in ids


# ---- refused ---------------------------------------------------------------------------------


def refused(tokenizer, dataset, words, code=2, **changes):
    with pytest.raises(UserError, match=words) as e:
        prepare(tokenizer, dataset, **changes)
    assert code is None or e.value.code == code
    assert "\n" not in e.value.what and len(e.value.what) < 450 and e.value.hint
    assert "network" not in e.value.hint


def test_a_text_shorter_than_wanted_is_refused(at, tokenizer):
    path = write(at / "x.jsonl", texts())
    have = sum(map(len, packing(tokenizer, texts(), 4, bos=True))) * CONTEXT
    for name in ("TOKENS", "SKIP_TOKENS"):
        refused(tokenizer, path, f"{have:,} tokens", **{name: have + 160})
    refused(tokenizer, path, "tokens", VAL_TOKENS=have + 160)


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ONE_TOO_LARGE = np.pad(np.array([[300]]), ((39, 0), (CONTEXT - 1, 0)))  # for another seed only
PICKLE = b"\x80\x04cos\nsystem\n(S'touch canary'\ntR."
LINE = b'{"text": "a b c"}\n'
REFUSED = {  # name, content, words
    "too narrow": ("x.npy", saved(np.zeros((20, CONTEXT - 1), int)), "CONTEXT|15"),
    "floating point": ("x.npy", saved(np.zeros((20, CONTEXT))), "float64"),
    "negative": ("x.npy", saved(np.full((20, CONTEXT), -100)), "negative"),
    "beyond the vocabulary": ("x.npy", saved(ONE_TOO_LARGE), "token 300"),
    "too short": ("x.npy", saved(np.zeros((11, CONTEXT), int)), "176 tokens"),
    "a pickle": ("x.npy", PICKLE, "x.npy"),
    "another key": ("x.jsonl", b'{"txt": "a", "meta": 1}\n', "txt, meta"),
    "a number": ("x.jsonl", b'{"text": 3}\n', "document 0"),
    "no JSON": ("x.jsonl", LINE + b'{"text": "a" "b"}\n', "1 documents.* column 14"),
    "another kind": ("train.arrow", b"", "save_to_disk"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_without_tokens_or_text_is_refused(at, tokenizer, case):
    name, content, words = REFUSED[case]
    (at / name).write_bytes(content)
    refused(tokenizer, at / name, words, SEED=1)
    assert not (at / "canary").exists()


def test_a_special_token_past_the_vocabulary_is_text(at, tokenizer):
    wider = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    wider.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    documents = [text + " <image_soft_token> ba" for text in texts()]
    found = prepare(wider, write(at / "x.jsonl", documents))
    assert found.train_SL.max() < 300
    said = wider.decode(found.train_SL.flatten(), skip_special_tokens=True)
    assert "<image_soft_token>" in said


def test_a_file_system_that_cannot_map_files_is_read_at_once(tmp_path, monkeypatch):
    """As some FUSE and network file systems are; what else goes wrong is raised."""
    array_SL = np.arange(12, dtype=np.uint32).reshape(3, 4)
    np.save(tmp_path / "a.npy", array_SL)
    array_SL.tofile(tmp_path / "a.bin")
    kind = np.memmap

    def cannot(*args, **kwargs):
        raise OSError(errno.ENODEV, "No such device")

    for file, given in (("a.npy", ()), ("a.bin", ((3, 4),))):
        path = str(tmp_path / file)
        monkeypatch.setattr(np, "memmap", kind)
        assert isinstance(storage.mapped(path, *given), kind)
        monkeypatch.setattr(np, "memmap", cannot)
        monkeypatch.setattr("numpy.lib.format.open_memmap", cannot)
        monkeypatch.setattr("numpy.lib._npyio_impl.format.open_memmap", cannot)
        assert np.array_equal(storage.mapped(path, *given), array_SL)
        monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        storage.mapped(str(tmp_path / "none.bin"), (3, 4))


def test_a_template_with_todays_date_gives_one_text_on_any_day(at, tokenizer, monkeypatch):
    dated = "{{ strftime_now('%d %b %Y') }} {{ date_string }}" + MARKED
    chats, found = [[{"role": "user", "content": t}] for t in texts()], []
    for day in ("2020-01-01", "2031-12-31"):
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", OnDay(day))
        found.append(chat_ids(at, with_template(tokenizer, dated), chats))
        shutil.rmtree(at / "cache")
    assert found[0] == found[1]


class OnDay:
    """datetime, on which it is always that day."""

    def __init__(self, day):
        self.day = datetime.fromisoformat(day)

    def now(self, *args):
        return self.day
