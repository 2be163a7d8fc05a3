"""Text becomes the tokens that it should: packed, held out, ordered, kept on disk, or refused."""

import itertools
import json
import os
import sys
from types import SimpleNamespace

import hub
import numpy as np
import pytest
import torch
from conftest import constants
from transformers import AutoTokenizer

import data
from klsplice.errors import Stopped, UserError
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


def setting(dataset, **changes):
    """Four contexts held out, eight trained on, unless `changes` say otherwise."""
    small = {"DATASET": str(dataset), "DATASET_REVISION": "", "CONTEXT": CONTEXT, "BATCH": 2}
    small |= {"VAL_TOKENS": 4 * CONTEXT, "TOKENS": 8 * CONTEXT, "CACHE": "cache"}
    return constants(**small | changes)


def prepare(tokenizer, dataset, **changes):
    return data.prepare(setting(dataset, **changes), tokenizer, LM)


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
    assert np.array_equal(trained_on(found), train_SL[: len(train_SL) // 2 * 2])
    assert found.tokens == trained_on(found).size


def test_bos_is_first_in_each_context_and_nowhere_else(at, tokenizers):
    for bos, tokenizer in tokenizers.items():
        found = prepare(tokenizer, write(at / "x.jsonl", texts()))
        for part_SL in (found.val_SL, trained_on(found)):
            assert (part_SL[:, 0] == 2).all() == bos and not (part_SL[:, 1:] == 2).any()


def test_no_document_is_on_both_sides_of_the_held_out_border(at, tokenizer):
    letters = [chr(ord("a") + i) * (9 + i) for i in range(26)]  # they share no token
    for n_val in range(1, 9):
        found = prepare(tokenizer, write(at / "x.jsonl", letters), VAL_TOKENS=n_val * CONTEXT)
        held_out, rest = set(found.val_SL.flat) - {1, 2}, set(found.train_SL.flat) - {1, 2}
        assert held_out and rest and not held_out & rest


# ---- which sequences -------------------------------------------------------------------------


def test_the_held_out_tokens_depend_on_no_other_setting(at, tokenizer):
    path = write(at / "x.jsonl", texts())
    wanted = prepare(tokenizer, path).val_SL
    changes = [{"SEED": 3}, {"SKIP_TOKENS": 64}, {"TOKENS": 4 * CONTEXT}, {"BATCH": 4}]
    for i, change in enumerate([*changes, {"PASSES": 2}, {"KEEP": "first"}]):
        for cache in ("cache", f"cache{i}"):
            assert np.array_equal(prepare(tokenizer, path, CACHE=cache, **change).val_SL, wanted)


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


def test_the_order_of_a_permuted_text_does_not_depend_on_earlier_runs(at, tokenizer):
    path = write(at / "x.jsonl", texts())
    wanted = trained_on(prepare(tokenizer, path, SEED=1, CACHE="a"))
    prepare(tokenizer, path, SEED=0, CACHE="b")
    assert np.array_equal(trained_on(prepare(tokenizer, path, SEED=1, CACHE="b")), wanted)


def test_skip_tokens_leaves_out_the_first_training_contexts(at, tokenizer):
    path = write(at / "x.jsonl", texts())
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    found = prepare(tokenizer, path, SKIP_TOKENS=5 * CONTEXT + 1)
    assert np.array_equal(trained_on(found), train_SL[5:13])
    permuted = prepare(tokenizer, path, SKIP_TOKENS=5 * CONTEXT, SEED=1)
    assert min(permuted.order_S) >= 5


def test_passes_repeat_the_same_batches(at, tokenizer):
    path = write(at / "x.jsonl", texts())
    once, thrice = (prepare(tokenizer, path, PASSES=n) for n in (1, 3))
    assert (once.steps, thrice.steps, thrice.tokens) == (4, 12, 3 * once.tokens)
    assert np.array_equal(trained_on(thrice), np.tile(trained_on(once), (3, 1)))


def test_keep_says_where_the_sae_does_not_stand_in(at, tokenizer):
    tokens_BL = torch.tensor([[2, 9, 1, 8], [7, 2, 0, 6]])
    wanted = {"none": range(8), "special": [1, 3, 4, 7], "first": [1, 2, 3, 5, 6, 7]}
    for keep, positions in wanted.items():
        found = prepare(tokenizer, write(at / "x.jsonl", texts()), KEEP=keep)
        assert found.active(tokens_BL, None).tolist() == list(positions)


# ---- a hub's stream --------------------------------------------------------------------------


class Stream:
    """What load_dataset(streaming=True) gives; raises `fault` once before each row of `faulty`."""

    def __init__(self, documents, faulty=(), fault=ConnectionError):
        self.rows, self.faulty, self.fault = [{"text": d} for d in documents], {*faulty}, fault
        self.at = 0

    def open(self, seen, state):
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

    def sleep(seconds):
        waited.append(seconds)
        assert len(waited) < 99 or pytest.fail("it tries for ever")

    monkeypatch.setattr(text_files, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(token_cache, "time", SimpleNamespace(monotonic=lambda: 0.0))

    def run(stream, **changes):
        monkeypatch.setattr(text_files.Documents, "open", stream.open)
        return prepare(tokenizer, **HUB | changes)

    run.waited = waited
    return run


def test_seed_s_takes_the_s_th_slice_of_a_stream(streamed, tokenizer):
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    for seed in (2, 0, 1):  # whatever ran before
        found = streamed(Stream(texts()), SEED=seed, SKIP_TOKENS=CONTEXT)
        assert np.array_equal(trained_on(found), train_SL[1 + 8 * seed :][:8])


def test_a_stream_that_ends_before_the_last_seeds_slice_is_refused(streamed, tokenizer):
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    last = len(train_SL) // 8  # a slice that begins in the text and ends after it
    streamed(Stream(texts()), SEED=last - 1)
    with pytest.raises(UserError, match=r"\(SEED \+ 1\) x TOKENS"):
        streamed(Stream(texts()), SEED=last)


def test_a_long_stream_is_written_a_piece_at_a_time(streamed, tokenizer, monkeypatch):
    """What a run trains on is the same; the cache is only as long as the run has come."""
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    monkeypatch.setattr(data, "PIECE", 5 * CONTEXT)
    n = len(train_SL) // 8 * 8
    for again in (False, True):  # the second finds the cache of the first
        stream = Stream(texts())
        tokens = streamed(stream, TOKENS=n * CONTEXT)
        if not again:
            assert stream.at < len(stream.rows) and len(tokens.train_SL) < n
        assert np.array_equal(trained_on(tokens), train_SL[:n])
    tokens = streamed(Stream(texts()), TOKENS=2 * n * CONTEXT, CACHE="other")
    with pytest.raises(UserError, match="ended after") as e:
        trained_on(tokens)
    assert e.value.code == 1


def test_a_fault_that_passes_loses_and_doubles_nothing(streamed, tokenizer):
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    for n in range(12):
        found = streamed(Stream(texts(), faulty={n, n + 1, n + 5}), CACHE=f"c{n}")
        assert np.array_equal(trained_on(found), train_SL[:8])
    assert set(streamed.waited) == {1, 2}


def test_a_fault_that_stays_ends_the_run_and_keeps_what_was_read(streamed, tokenizer):
    class Broken(Stream):
        def __iter__(self):
            for row in super().__iter__():
                if self.at == 8:
                    raise ConnectionError("still down")
                yield row

    tokens = 30 * CONTEXT
    with pytest.raises(UserError, match="after 6 documents.*still down") as e:
        streamed(Broken(texts()), TOKENS=tokens)
    assert e.value.code == 1 and streamed.waited == list(text_files.RETRY_SECONDS)
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    rest = Stream(texts())  # whose first documents are not wanted again
    rest.rows[:6] = [{"text": 3}] * 6
    assert np.array_equal(trained_on(streamed(rest, TOKENS=tokens)), train_SL[:30])


def test_a_stop_while_the_text_is_read_is_no_fault_of_the_text(streamed):
    with pytest.raises(Stopped):
        streamed(Stream(texts(), faulty={3}, fault=lambda _: Stopped(15)))
    assert not streamed.waited


def test_what_will_not_pass_is_not_retried(streamed):
    with pytest.raises(UserError, match="from the start: FileNotFoundError: hung up") as e:
        streamed(Stream(texts(), faulty={0}, fault=FileNotFoundError))
    assert e.value.code == 2 and not streamed.waited


# ---- the cache -------------------------------------------------------------------------------


def bins(cache="cache"):
    (folder,) = [f for f in os.listdir(cache) if f.startswith("tokens-")]
    return {n: open(os.path.join(cache, folder, f"{n}.bin"), "rb").read() for n in ("val", "train")}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("saves", ["after each batch", "at the end"])
@pytest.mark.parametrize("point", ["read", "pack", "save"])
def test_a_cache_interrupted_anywhere_goes_on_byte_for_byte(
    at, tokenizer, monkeypatch, saves, point
):
    ticks = itertools.count(step=10 if saves == "after each batch" else 0)
    monkeypatch.setattr(token_cache, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(text_files, "DOCUMENTS_AT_A_TIME", 2)
    path = write(at / "x.jsonl", texts())
    everything = {"TOKENS": 30 * CONTEXT}
    wanted = trained_on(prepare(tokenizer, path, CACHE="whole", **everything))
    owner = text_files.Documents if point == "read" else token_cache.TokenCache
    plain, calls = getattr(owner, point), 0

    def read(self, *args):
        for i, batch in enumerate(plain(self, *args)):
            if i == after:
                raise Killed
            yield batch

    def call(self, *args):
        nonlocal calls
        result = plain(self, *args)  # the files hold more than the state knows
        calls += 1
        if calls > after:
            raise Killed
        return result

    for after in range(20):
        calls = 0
        with monkeypatch.context() as patched:
            patched.setattr(owner, point, read if point == "read" else call)
            try:
                prepare(tokenizer, path, CACHE=f"c{after}", **everything)
                break
            except Killed:
                pass
        found = prepare(tokenizer, path, CACHE=f"c{after}", **everything)
        assert np.array_equal(trained_on(found), wanted) and bins(f"c{after}") == bins("whole")
    assert after >= (1 if (point, saves) == ("save", "at the end") else 3)


def test_what_the_state_says_is_on_disk_before_it_says_so(at, tokenizer, monkeypatch):
    monkeypatch.setattr(text_files, "DOCUMENTS_AT_A_TIME", 2)
    ticks = itertools.count(step=10)
    monkeypatch.setattr(token_cache, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
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


def test_what_lies_beyond_the_durable_length_is_cut_off(at, tokenizer, monkeypatch):
    monkeypatch.setattr(text_files, "DOCUMENTS_AT_A_TIME", 2)
    path = write(at / "x.jsonl", texts())
    prepare(tokenizer, path, CACHE="whole", TOKENS=30 * CONTEXT)
    wanted = trained_on(prepare(tokenizer, path))
    (folder,) = (at / "cache").iterdir()
    for name in ("val.bin", "train.bin"):
        with open(folder / name, "ab") as f:
            f.write(b"half a context")
    assert np.array_equal(trained_on(prepare(tokenizer, path)), wanted)
    prepare(tokenizer, path, TOKENS=30 * CONTEXT)
    assert bins() == bins("whole")


@pytest.mark.parametrize("name", ["val.bin", "train.bin"])
def test_a_cache_shorter_than_its_state_is_refused_not_filled_with_zeros(at, tokenizer, name):
    path = write(at / "x.jsonl", texts())
    prepare(tokenizer, path)
    (folder,) = (at / "cache").iterdir()
    os.truncate(folder / name, 3 * CONTEXT * 4)
    for tokens in (8, 30):
        with pytest.raises(UserError, match=f"{name} has 192 bytes"):
            prepare(tokenizer, path, TOKENS=tokens * CONTEXT)


def test_a_second_run_reads_nothing_again(at, tokenizer, monkeypatch):
    path = write(at / "x.jsonl", texts())
    for changes in ({}, {"SEED": 1}):
        first = prepare(tokenizer, path, **changes)
        with monkeypatch.context() as patched:
            again = {(text_files.Documents, "open"): "read again"}
            again |= {(token_cache.TokenCache, "save"): "written again"}
            for (owner, name), problem in again.items():
                patched.setattr(owner, name, lambda *a, problem=problem: pytest.fail(problem))
            second = prepare(tokenizer, path, **changes)
        assert np.array_equal(trained_on(first), trained_on(second))


def test_more_tokens_later_are_only_appended(at, tokenizer, monkeypatch):
    path = write(at / "x.jsonl", texts())
    prepare(tokenizer, path, CACHE="whole", SEED=1)
    monkeypatch.setattr(text_files, "DOCUMENTS_AT_A_TIME", 2)
    before = {}
    for n in (2, 8, 20, 34):
        found = prepare(tokenizer, path, TOKENS=n * CONTEXT)
        after = bins()
        assert all(after[name].startswith(before.get(name, b"")) for name in after)
        assert len(after["train"]) > len(before.get("train", b""))
        assert np.array_equal(found.val_SL, np.frombuffer(after["val"], np.uint32).reshape(4, -1))
        before = after
    prepare(tokenizer, path, SEED=1)
    assert bins() == bins("whole")


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
    found = set()
    for tokenizer, path, change in cases:
        c = setting(path, **change)
        kind, n_val = text_files.kind_of(c.DATASET), c.VAL_TOKENS // c.CONTEXT
        found.add(data._open_cache(c, tokenizer, kind, n_val).folder)
    assert len(found) == len(cases)


def test_the_same_text_elsewhere_shares_its_cache(at, tokenizer):
    one = prepare(tokenizer, write(at / "x.jsonl", texts()))
    two = prepare(tokenizer, write(at / "moved.jsonl", texts()))
    assert one.fingerprint == two.fingerprint and len(os.listdir("cache")) == 1


# ---- documents without text, and fields beside it ------------------------------------------


def test_documents_without_text_are_skipped_and_counted(at, tokenizer, capsys):
    nothing = [None, "", " \n\t", []]
    sound = [text for text in texts() if text]
    val_SL, train_SL = packing(tokenizer, sound, 4, bos=True)
    mixed = [part for i, text in enumerate(sound) for part in (text, nothing[i % 4])]
    found = prepare(tokenizer, write(at / "x.jsonl", mixed), SEED=1)  # which reads it to its end
    assert np.array_equal(found.val_SL, val_SL) and np.array_equal(found.train_SL, train_SL)
    assert found.skipped == len(sound)  # run.json has it
    assert capsys.readouterr().out.endswith(
        f"held out, {len(sound)} documents without text skipped\n"
    )
    one = write(at / "y.jsonl", [*sound[:1], None, *sound[1:]])
    prepare(tokenizer, one, CACHE="other")
    assert capsys.readouterr().out.endswith("held out, 1 document without text skipped\n")
    prepare(tokenizer, write(at / "z.jsonl", sound))
    assert capsys.readouterr().out.endswith("held out\n")


def test_a_row_that_lacks_the_field_is_a_document_without_text(at, tokenizer, capsys):
    val_SL, _ = packing(tokenizer, texts(), 4, bos=True)
    rows = [json.dumps(row) for text in texts() if text for row in ({"text": text}, {"id": 1})]
    (at / "x.jsonl").write_text("\n".join(rows))
    assert np.array_equal(prepare(tokenizer, at / "x.jsonl").val_SL, val_SL)
    assert "documents without text skipped" in capsys.readouterr().out


def test_the_count_of_skipped_documents_survives_an_interruption(streamed, tokenizer, capsys):
    rows = [part for text in texts() for part in (text, None)]
    whole = streamed(Stream(rows), TOKENS=30 * CONTEXT, CACHE="whole")
    said = capsys.readouterr().out
    broken = Stream(rows, faulty={8}, fault=ValueError)
    with pytest.raises(UserError, match="after 8 documents"):
        streamed(broken, TOKENS=30 * CONTEXT)
    again = streamed(Stream(rows), TOKENS=30 * CONTEXT)
    assert np.array_equal(trained_on(again), trained_on(whole))
    assert capsys.readouterr().out == said and "documents without text skipped" in said


def test_a_cache_that_counted_no_skipped_documents_is_continued(at, tokenizer, capsys):
    path = write(at / "x.jsonl", texts())
    wanted = trained_on(prepare(tokenizer, path, CACHE="whole", TOKENS=30 * CONTEXT))
    prepare(tokenizer, path)
    (folder,) = (at / "cache").iterdir()
    state = json.loads((folder / "state.json").read_text())
    del state["skipped"]
    (folder / "state.json").write_text(json.dumps(state))
    assert np.array_equal(trained_on(prepare(tokenizer, path, TOKENS=30 * CONTEXT)), wanted)


def rows_beside(kind):
    """Texts in two parts, whose other field differs in that way."""
    half = len(texts()) // 2
    further = {
        "presence": ({}, {"id": 3}),
        "type": ({"id": 3}, {"id": "x"}),
        "null": ({"id": None}, {"id": "x"}),
        "nesting": ({"id": {"a": 1}}, {"id": {"b": [{"a": 1}]}}),
        "kind": ({"id": [1]}, {"id": {"a": 1}}),
    }[kind]
    parts = texts()[:half], texts()[half:]
    return [[{"text": text} | more for text in part] for part, more in zip(parts, further)]


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("kind", ["presence", "type", "null", "nesting", "kind"])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst", "parquet"])
def test_another_field_may_differ_between_files(at, tokenizer, monkeypatch, ending, kind, within):
    import pyarrow.parquet
    import zstandard

    if within and ending == "parquet":
        pytest.skip("a column of a file has one type")
    monkeypatch.setattr(text_files, "DOCUMENTS_AT_A_TIME", 2)
    one, two = rows_beside(kind)
    for i, part in enumerate([one + two] if within else [one, two]):
        path, body = at / f"{i}.{ending}", "\n".join(map(json.dumps, part)).encode()
        if ending == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)
        else:
            path.write_bytes(zstandard.compress(body) if ending.endswith("zst") else body)
    val_SL, train_SL = packing(tokenizer, texts(), 4, bos=True)
    for n in range(2, len(train_SL), 6):  # each goes on where the one before stopped
        found = prepare(tokenizer, at / f"*.{ending}", TOKENS=n * CONTEXT)
        assert np.array_equal(found.val_SL, val_SL)
        assert np.array_equal(trained_on(found), train_SL[:n])


def test_a_cache_begun_before_lines_were_read_goes_on_at_the_same_document(
    at, tokenizer, monkeypatch
):
    """Its state counts rows, of which blank lines are none."""
    monkeypatch.setattr(text_files, "DOCUMENTS_AT_A_TIME", 2)
    path = at / "x.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text}) for text in texts()))
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    prepare(tokenizer, path)
    (folder,) = (at / "cache").iterdir()
    state = json.loads((folder / "state.json").read_text())
    state["stream"] = state["stream"].pop("lines")
    place = state["stream"]
    while "shard_idx" not in place:
        place = place["examples_iterable"]
    assert place["shard_example_idx"] > state["documents"]
    place["shard_example_idx"] = state["documents"]
    (folder / "state.json").write_text(json.dumps(state))
    found = prepare(tokenizer, path, TOKENS=30 * CONTEXT)
    assert np.array_equal(trained_on(found), train_SL[:30])


def test_a_json_array_is_read_as_its_rows(at, tokenizer):
    (at / "x.jsonl").write_text(json.dumps([{"text": text} for text in texts()]))
    _, train_SL = packing(tokenizer, texts(), 4, bos=True)
    assert np.array_equal(trained_on(prepare(tokenizer, at / "x.jsonl")), train_SL[:8])


def test_a_text_of_dates_is_text_and_half_a_surrogate_pair_is_replaced(at, tokenizer):
    dates = [f"2020-01-{day:02}" for day in range(1, 31)] * 9
    found = prepare(tokenizer, write(at / "x.jsonl", dates))
    assert np.array_equal(found.val_SL, packing(tokenizer, dates, 4, bos=True)[0])
    broken = [text + " \ud83d" for text in texts()]
    found = prepare(tokenizer, write(at / "y.jsonl", broken))
    wanted = [text + " \ufffd" for text in texts()]
    assert np.array_equal(found.val_SL, packing(tokenizer, wanted, 4, bos=True)[0])


def test_a_file_of_texts_whose_name_looks_like_a_pattern_is_read(at, tokenizer):
    val_SL, _ = packing(tokenizer, texts(), 4, bos=True)
    found = prepare(tokenizer, write(at / "x[1].jsonl", texts()))
    assert np.array_equal(found.val_SL, val_SL)


# ---- kinds of files --------------------------------------------------------------------------


def jsonl(at, documents):
    return write(at / "x.jsonl", documents)


def zst(at, documents):
    import zstandard

    (at / "x.jsonl.zst").write_bytes(
        zstandard.compress("".join(json.dumps({"text": d}) + "\n" for d in documents).encode())
    )
    return at / "x.jsonl.zst"


def parquet(at, documents):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), at / "x.parquet")
    return at / "x.parquet"


def txt(at, documents):
    for i, text in enumerate(documents):
        (at / f"{i:03}.txt").write_text(text)
    return at / "*.txt"  # a file is a document


@pytest.mark.parametrize("make", [jsonl, zst, parquet, txt])
def test_every_kind_of_file_gives_the_tokens_of_its_documents(at, tokenizer, make):
    val_SL, train_SL = packing(tokenizer, texts(), 4, bos=True)
    found = prepare(tokenizer, make(at, texts()))
    assert np.array_equal(found.val_SL, val_SL) and np.array_equal(trained_on(found), train_SL[:8])


def test_a_zst_cut_between_two_blocks_is_noticed_also_before_another_file(at, tokenizer):
    import zstandard

    if sys.version_info < (3, 14):
        pytest.importorskip("backports.zstd")  # fsspec reads with it where it is there
    half = zstandard.ZstdCompressor().compressobj()
    lines = [json.dumps({"text": d}).encode() + b"\n" for d in texts(200)]
    whole = half.compress(b"".join(lines[:100])) + half.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (at / "a.jsonl.zst").write_bytes(whole)
    (at / "b.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[100:])))
    with pytest.raises(UserError, match="before the end-of-stream marker"):
        prepare(tokenizer, at / "*.jsonl.zst", TOKENS=150 * CONTEXT)


def test_a_text_keeps_its_blank_lines_and_spaces(at, tokenizer):
    documents = [" a\n\n b  \n" + "c d\te\n" * 200, "\n\n f " * 200]
    found = prepare(tokenizer, txt(at, documents))
    val_SL, train_SL = packing(tokenizer, documents, 4, bos=True)
    assert np.array_equal(found.val_SL, val_SL) and np.array_equal(trained_on(found), train_SL[:8])


def test_a_file_whose_name_looks_like_a_pattern_is_read(at, tokenizer):
    rows_SL = np.arange(20 * CONTEXT, dtype=np.uint16).reshape(20, -1) % 300
    np.save(at / "x[1].npy", rows_SL)
    assert np.array_equal(prepare(tokenizer, at / "x[1].npy").val_SL, rows_SL[:4])


@pytest.mark.parametrize("dtype", ["uint8", "int64", ">i4", "uint16", "uint64"])
def test_a_pretokenised_array_is_taken_as_it_stands(at, tokenizer, dtype):
    rows_SL = np.random.default_rng(0).integers(0, 256, (20, CONTEXT)).astype(dtype)
    np.save(at / "x.npy", rows_SL)
    found = prepare(tokenizer, at / "x.npy", SKIP_TOKENS=2 * CONTEXT)
    assert np.array_equal(found.val(0, 4), rows_SL[:4])
    assert np.array_equal(trained_on(found), rows_SL[6:14])
    other = prepare(tokenizer, at / "x.npy", SEED=1)
    assert np.array_equal(trained_on(other), rows_SL[4:][other.order_S])
    assert not (at / "cache").exists()


@pytest.mark.parametrize("bos", [True, False])
def test_whether_pretokenised_contexts_start_with_bos_is_seen_in_them(at, tokenizer, bos):
    rows_SL = np.full((20, CONTEXT), 7)
    if bos:
        rows_SL[:, 0] = tokenizer.bos_token_id
    np.save(at / "x.npy", rows_SL)
    assert prepare(tokenizer, at / "x.npy").bos == bos


def test_a_long_document_is_one_document(at, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "model_max_length", 1000)  # of which transformers would warn
    long = "lorem ipsum " * 90_000
    documents = ["held out " * 40, long, "after"]
    found = prepare(tokenizer, write(at / "x.jsonl", documents), TOKENS=20_000 * CONTEXT)
    ids = tokenizer(long, add_special_tokens=False, verbose=False)["input_ids"]
    assert found.train_SL[:20_000, 1:].flatten().tolist() == ids[: 20_000 * (CONTEXT - 1)]
    assert "longer than" not in capsys.readouterr().err


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


def test_a_bos_that_marks_turns_stays_where_contexts_have_none_or_turns_have_many(at, tokenizer):
    chats = [[{"role": "user", "content": t}] * 2 for t in texts()]
    marked = with_template(tokenizer, MARKED.replace("<s>", "<bos>").replace("</s>", "<eos>"))
    first = marked("<bos>user", add_special_tokens=False)["input_ids"]
    for bos in ("always", "never"):
        assert chat_ids(at, marked, chats, BOS=bos, CACHE=f"cache-{bos}")[: len(first)] == first


def test_a_chat_that_ends_its_turn_gets_no_further_eos(at, tokenizer):
    chats = [[{"role": "user", "content": t}] for t in texts()]
    marked = with_template(tokenizer, MARKED.replace("<s>", "").replace("</s>", "<eos>"))
    eos = tokenizer.eos_token_id
    ids = chat_ids(at, marked, chats, VAL_TOKENS=20 * CONTEXT)
    plain = "".join(f"user {t}<eos>\n" for t in texts())
    wanted = tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert ids == wanted[: len(ids)] and eos in ids


def test_content_in_parts_is_one_text_and_other_parts_are_refused(at, tokenizer):
    parts = [{"type": "text", "text": "ba "}, {"type": "text", "text": "be"}]
    one = chat_ids(at, tokenizer, [[{"role": "user", "content": parts}]] * 60, CACHE="a")
    two = chat_ids(at, tokenizer, [[{"role": "user", "content": "ba be"}]] * 60, CACHE="b")
    assert one == two
    image = [{"type": "image", "url": "x"}]
    with pytest.raises(UserError, match="content is no text"):
        chat_ids(at, tokenizer, [[{"role": "user", "content": image}]] * 60, CACHE="c")


def test_a_template_with_the_date_gives_the_same_tokens_on_any_day(at, tokenizer):
    chats = [[{"role": "user", "content": t}] for t in texts()]
    for said in ("{{ strftime_now('%d %b %Y %H:%M:%S') }}", "{{ date_string }}"):  # Mistral, Llama
        dated = with_template(tokenizer, said + MARKED.replace("<s>", "").replace("</s>", ""))
        ids = chat_ids(at, dated, chats, CACHE=f"cache{len(said)}")
        assert tokenizer.decode(ids).startswith("26 Jul 2024")


def test_a_padded_array_is_warned_of(at, tokenizer, capsys):
    tokens_SL = np.full((20, CONTEXT), 5, np.uint16)
    for pad, warned in ((5, False), (tokenizer.pad_token_id, True)):
        tokens_SL[:, CONTEXT // 2 :] = pad
        np.save(at / "x.npy", tokens_SL)
        prepare(tokenizer, at / "x.npy", VAL_TOKENS=4 * CONTEXT, TOKENS=8 * CONTEXT)
        assert ("DATASET is padded (50% of it" in capsys.readouterr().out) == warned


GOOD = {"role": "user", "content": "a"}
BAD_CHATS = {
    "no role": [[{"content": "a"}]],
    "no content": [[{"role": "user"}]],
    "one of two without role": [[GOOD, {"content": "a"}]],
    "a null role": [[GOOD, {"role": None, "content": "a"}]],
    "null content": [[GOOD, {"role": "user", "content": None}]],
    "texts": [["a", "b"]],
    "lists": [[["user", "a"]]],
}


@pytest.mark.parametrize("case", BAD_CHATS)
@pytest.mark.parametrize("make", ["jsonl", "parquet"])
def test_a_message_without_role_or_content_is_refused(at, tokenizer, case, make):
    write(at / "x.jsonl", BAD_CHATS[case], "messages")
    if make == "parquet":  # where a missing field is None
        import pyarrow.json
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.json.read_json(at / "x.jsonl"), at / "x.parquet")
    with pytest.raises(UserError, match="without role or content") as e:
        prepare(tokenizer, at / f"x.{make}", TEXT_KEY="messages")
    assert e.value.code == 2


def test_a_chat_template_that_refuses_or_is_missing_is_named(at, tokenizers, monkeypatch):
    path = write(at / "x.jsonl", [[GOOD]], "messages")
    monkeypatch.setattr(tokenizers[True], "chat_template", "{{ raise_exception('no user') }}")
    for tokenizer in tokenizers.values():
        with pytest.raises(UserError, match="chat template of tiny refused document 0:"):
            prepare(tokenizer, path, TEXT_KEY="messages")


# ---- refused ---------------------------------------------------------------------------------


def test_a_bad_line_is_named_with_its_file_line_and_column(at, tokenizer):
    good = [json.dumps({"text": text}) for text in texts()]
    (at / "a.jsonl").write_text("\n".join(good))
    (at / "b.jsonl").write_text("\n".join(["", *good[:5], '{"text": "a" "b"}']))
    refused(tokenizer, at / "*.jsonl", "b.jsonl, line 7: .* column 14", TOKENS=10**6)


def test_the_whole_cause_of_another_library_is_shown(at, streamed):
    said = "\n".join([f"first line {'x' * 50} {'y' * 50}", "", *map(str, range(2, 40))])
    with pytest.raises(UserError) as e:
        streamed(Stream(texts(), faulty={0}, fault=lambda _: OSError(said)))
    head, *lines = e.value.what.split("\n")
    assert head.endswith("could not be read from the start:")
    assert lines[:2] == [f"       OSError: first line {'x' * 50} {'y' * 50}", "       2"]
    assert len(lines) == 12


def refused(tokenizer, dataset, words, code=2, **changes):
    with pytest.raises(UserError, match=words) as e:
        prepare(tokenizer, dataset, **changes)
    assert e.value.code == code and "\n" not in e.value.what and len(e.value.what) < 400


def test_a_text_shorter_than_wanted_is_refused_with_both_lengths(at, tokenizer):
    path = write(at / "x.jsonl", texts())
    have = sum(map(len, packing(tokenizer, texts(), 4, bos=True))) * CONTEXT
    for changes in ({"TOKENS": have}, {"SKIP_TOKENS": have}, {"TOKENS": have, "SEED": 2}):
        total = 4 * CONTEXT + changes["TOKENS" if "TOKENS" in changes else "SKIP_TOKENS"]
        total += 8 * CONTEXT * ("TOKENS" not in changes)
        refused(tokenizer, path, f"has {have:,} tokens.*wanted {total // 32 * 32:,}", **changes)
    refused(tokenizer, path, "wanted", VAL_TOKENS=have + 160)


BAD_ARRAYS = {
    "too narrow": (np.zeros((20, CONTEXT - 1), int), r"\(20, 15\)"),
    "one dimension": (np.zeros(20 * CONTEXT, int), "holds"),
    "three dimensions": (np.zeros((5, 4, CONTEXT), int), "holds"),
    "floating point": (np.zeros((20, CONTEXT)), "float64"),
    "truth values": (np.zeros((20, CONTEXT), bool), "bool"),
    "negative": (np.full((20, CONTEXT), -100), "negative"),
    "objects": (np.full((20, CONTEXT), "a", object), "pickle|Python objects"),
    "beyond the vocabulary": (np.full((20, CONTEXT), 300), "token 300"),
    "beyond int64": (np.full((20, CONTEXT), 2**64 - 1, np.uint64), f"token {2**64 - 1}"),
    "too short": (np.zeros((11, CONTEXT), int), "has 176 tokens"),
    "nothing": (np.zeros((0, CONTEXT), int), "has 0 tokens"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_an_array_of_anything_but_token_ids_is_refused(at, tokenizer, case):
    rows_SL, words = BAD_ARRAYS[case]
    np.save(at / "x.npy", rows_SL)
    refused(tokenizer, at / "x.npy", words)


def test_a_token_that_only_another_seed_would_meet_is_refused_too(at, tokenizer):
    rows_SL = np.zeros((40, CONTEXT), int)
    rows_SL[-1, -1] = 300
    np.save(at / "x.npy", rows_SL)
    refused(tokenizer, at / "x.npy", "token 300", SEED=1)


BAD_FILES = {
    "empty": b"",
    "text": b"<html>not an array</html>",
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
    "a zip": b"PK\x03\x04" + bytes(40),
    "a header alone": b"\x93NUMPY\x01\x00",
    "a bad header": b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8',((",
    "more than the file holds": (
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<i8', 'fortran_order': False, 'shape': (999999999, 16), }".ljust(118)
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_array_is_refused(at, tokenizer, case):
    (at / "x.npy").write_bytes(BAD_FILES[case])
    refused(tokenizer, at / "x.npy", "is not a readable .npy")
    assert not (at / "canary").exists()


def test_an_archive_and_several_arrays_are_refused(at, tokenizer):
    np.savez(at / "x.npz", a=np.zeros((20, CONTEXT), int))
    os.replace(at / "x.npz", at / "x.npy")
    refused(tokenizer, at / "x.npy", "archive")
    for name in "ab":
        np.save(at / f"{name}.npy", np.zeros((20, CONTEXT), int))
    refused(tokenizer, at / "[ab].npy", "names 2 .npy files")


LINE = json.dumps({"text": "a b c"}) + "\n"
BAD_TEXTS = {
    "another key": ("x.jsonl", b'{"txt": "a", "meta": 1}\n', "no 'text'; they have txt, meta"),
    "null": ("x.jsonl", b'{"text": null}\n', "has no text in any of its documents"),
    "a number": ("x.jsonl", b'{"text": 3}\n', "document 0 .* int"),
    "an object": ("x.jsonl", b'{"text": {"a": 1}}\n', "document 0 .* dict"),
    "no JSON": ("x.jsonl", LINE.encode() + b"no JSON\n", "could not be read"),
    "a list": ("x.jsonl", b"[1, 2]\n", "document 0 .* int"),
    "nothing": ("x.jsonl", b"", "could not be read|has 0 tokens"),
    "no bytes of text": ("x.txt", b"", "has no text in any of its documents"),
    "latin-1": ("x.txt", "é".encode("latin-1") * 999, "could not be read"),
    "latin-1 in JSON": ("x.jsonl", b'{"text": "\xe9\xe8"}\n', "could not be read"),
    "no parquet": ("x.parquet", b"PAR1 but not", "could not be read"),
    "no zst": ("x.jsonl.zst", b"\x28\xb5\x2f\xfd but not", "could not be read|has 0 tokens"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_file_without_text_is_refused_by_name_and_position(at, tokenizer, case):
    name, content, words = BAD_TEXTS[case]
    (at / name).write_bytes(content)
    refused(tokenizer, at / name, words)


def test_a_number_in_the_middle_is_refused_with_its_position(at, tokenizer):
    path = write(at / "x.jsonl", [*texts(100)[:70], 3])
    refused(tokenizer, path, "document 70", code=1, TOKENS=10**6)


@pytest.mark.parametrize(
    "name",
    [
        "none.jsonl",
        "no/*.txt",
        "./none",
        "~/none.npy",
        "here.csv",
        ".",
        "folder.txt",
        "my/own/texts",
    ],
)
def test_a_path_that_cannot_be_read_is_refused(at, tokenizer, name):
    (at / "here.csv").write_text("a,b")
    (at / "folder.txt").mkdir()
    refused(tokenizer, name, "no such file|kind not read|cannot be read")


def test_a_cache_that_cannot_be_written_is_refused(at, tokenizer, monkeypatch):
    path = write(at / "x.jsonl", texts())
    (at / "file").write_text("")
    refused(tokenizer, path, "CACHE = 'file' cannot be written", CACHE="file")

    def full(self, files):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.TokenCache, "save", full)
    refused(tokenizer, path, "CACHE = 'cache' cannot be written: No space left")


def test_a_tokeniser_without_eos_is_refused(at, tokenizers):
    bare = AutoTokenizer.from_pretrained(tokenizers[True].name_or_path)
    bare.eos_token = None
    refused(bare, write(at / "x.jsonl", texts()), "no EOS")
