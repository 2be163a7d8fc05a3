"""A stand-in of the Hugging Face hub on a loopback port, and small repositories to put in it.

`with Hub(root) as url:` serves the folders root/models/<owner>/<name> and
root/datasets/<owner>/<name>. Set HF_ENDPOINT=<url> and an empty HF_HOME in the environment of a
subprocess (the libraries read them when imported), and HF_UPDATE_DOWNLOAD_COUNTS=0, for without it
datasets calls another host. Served, read only, everything else being a 404:

  GET HEAD  [/datasets]/<repo>/resolve/<rev>/<file>            a file, or a range of its bytes
  GET       /api/{models,datasets}/<repo>[/revision/<rev>]     what model_info and dataset_info read
  GET       /api/{models,datasets}/<repo>/tree/<rev>[/<dir>]   a listing, ?recursive=true or not

Every revision exists: 40 hex digits stand for themselves, any other name for SHA. Refusals are the
hub's: the files of a gated repository (not its listings) 401 GatedRepo, 403 with a token; an
unknown repository 401 RepoNotFound, 404 with a token; an unknown file 404 EntryNotFound.
"""

import hashlib
import json
import random
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "5eed" * 10
API = r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?"
FILE = r"/(?:(datasets)/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)"
LFS = {".bin", ".npz", ".pt", ".safetensors", ".zst"}  # named by sha256, other files by git's sha1


class Hub:
    """The server.

    fault(path, count), when set, is asked about each GET of a dataset's file, count being how often
    that was asked for. None lets it pass; "500" answers so; "truncate" hangs up halfway through
    the body.
    """

    def __init__(self, root, gated=(), fault=None):
        self.root, self.gated, self.fault = Path(root), set(gated), fault
        self.lock, self.counts = threading.Lock(), Counter()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        match = re.fullmatch(API, url.path) or re.fullmatch(FILE, url.path)
        if not match:
            return self.refuse(404, "Not found")
        kind, repo, verb, revision, path = (unquote(part or "") for part in match.groups())
        folder, token = self.hub.root / (kind or "models") / repo, "Authorization" in self.headers
        self.sha = revision if re.fullmatch("[0-9a-f]{40}", revision) else SHA
        if not folder.is_dir():
            return self.refuse(404 if token else 401, "No such repository", "RepoNotFound")
        if verb == "resolve" and repo in self.hub.gated:
            return self.refuse(403 if token else 401, f"{repo} is restricted", "GatedRepo")
        if verb == "resolve":
            return self.send_file(folder, folder / path, self.fault(kind))
        if not (folder / path).is_dir():
            return self.refuse(404, "No such folder", "EntryNotFound")
        if verb == "tree":
            deep = parse_qs(url.query).get("recursive", [""])[0].lower() == "true"
            found = (folder / path).rglob("*") if deep else (folder / path).iterdir()
            return self.send_json([entry(folder, p) for p in sorted(found)])
        files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
        info = {"id": repo, "sha": self.sha, "private": False, "disabled": False, "tags": []}
        info |= {"gated": "manual" if repo in self.hub.gated else False, "downloads": 0, "likes": 0}
        self.send_json({**info, "siblings": [{"rfilename": name} for name in files]})

    do_HEAD = do_GET

    def fault(self, kind):
        """What is to go wrong with a file of a dataset."""
        if not self.hub.fault or kind != "datasets" or self.command != "GET":
            return None
        with self.hub.lock:
            self.hub.counts[self.path] += 1
            return self.hub.fault(self.path, self.hub.counts[self.path])

    def send_file(self, folder, path, fault):
        if fault == "500":
            return self.refuse(500, "A fault asked for")
        if not path.is_file():
            return self.refuse(404, "No such file", "EntryNotFound")
        body, meta = path.read_bytes(), entry(folder, path)
        status, headers = 200, {"ETag": f'"{meta["oid"]}"', "Accept-Ranges": "bytes"}
        if lfs := meta.get("lfs"):
            headers["ETag"] = headers["X-Linked-Etag"] = f'"{lfs["oid"]}"'
            headers["X-Linked-Size"] = lfs["size"]
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, size = int(asked[1]), len(body)
            body = body[first : int(asked[2]) + 1 if asked[2] else size]
            if not body:
                return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
            status = 206
            headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{size}"
        self.close_connection = fault == "truncate"
        self.answer(status, body, headers, len(body) // 2 if fault == "truncate" else None)

    def send_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, message, code=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def answer(self, status, body, headers, sent=None):
        """Send the headers and the first `sent` bytes of the body, by default all of them."""
        headers |= {"Content-Length": len(body), "X-Repo-Commit": getattr(self, "sha", SHA)}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])


def entry(folder, path):
    """A file or folder as the hub's listings show it."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": SHA, "size": 0, "path": name}
    body = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    found = {"type": "file", "oid": oid, "size": len(body), "path": name}
    if path.suffix in LFS:
        sha256 = hashlib.sha256(body).hexdigest()
        found["lfs"] = {"oid": sha256, "size": len(body), "pointerSize": 134}
    return found


def vocabulary():
    """The 400 words of make_pile's documents, the commonest first."""
    rng, words = random.Random(0), ["naïve"]
    syllables = [a + b for a in "bdfklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    while len(words) < 400:
        word = "".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 4))))
        words += [word] if word not in words else []
    return words


def make_gemma(folder, *, seed, layers=3, context=32):
    """A random Gemma-2 and its tokenizer; every other block's window is half the context."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    special, words = ["<pad>", "<eos>", "<bos>", "<unk>"], [f" {w}" for w in vocabulary()]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(words, 300, special_tokens=special, show_progress=False)
    bpe.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {f"{name.strip('<>')}_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names).save_pretrained(folder)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    spans = {"max_position_embeddings": context, "sliding_window": context // 2}
    model = Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=layers, **sizes, **heads, **spans))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3, generator=rng)
    model.save_pretrained(folder)


def make_pile(folder, *, documents, seed):
    """The Pile's shards; returns the texts of the `documents` of train in the stream's order."""
    import zstandard

    rng, words, train = random.Random(seed), vocabulary(), []
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    few = max(1, documents // 10)
    shards = {"train/00": documents - documents // 2, "train/01": documents // 2}
    for shard, count in {**shards, "val": few, "test": few}.items():
        lines = []
        for _ in range(count):
            drawn = rng.choices(words, weights, k=min(1000, int(rng.lognormvariate(4, 1)) + 1))
            text = re.sub(r"((?:\S+ ){12})", r"\1\n", " ".join(drawn))
            meta = {"pile_set_name": rng.choice(["Pile-CC", "Github", "Wikipedia (en)"])}
            lines.append(json.dumps({"text": text, "meta": meta}, ensure_ascii=False) + "\n")
            train += [text] if shard in shards else []
        path = Path(folder, f"{shard}.jsonl.zst")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.compress("".join(lines).encode()))
    Path(folder, "README.md").write_text("---\nlicense: other\n---\n", encoding="utf-8")
    return train


def make_sae(folder, *, d_in, d_sae, k, layer, lm_name, seed):
    """A TopK autoencoder in the two files of an SAE Bench folder; returns what ae.pt holds."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(d_in, d_sae, generator=rng), dim=0)
    state = {
        "encoder.weight": torch.randn(d_sae, d_in, generator=rng) * 0.05 + decoder.T,
        "encoder.bias": torch.randn(d_sae, generator=rng) * 0.1,
        "decoder.weight": decoder,
        "b_dec": torch.randn(d_in, generator=rng) * 0.1,
        "k": torch.tensor(k, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),
    }
    trainer = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", "lr": 0.0003}
    trainer |= {"activation_dim": d_in, "dict_size": d_sae, "k": k, "layer": layer}
    trainer |= {"lm_name": lm_name, "submodule_name": f"resid_post_layer_{layer}"}
    buffer = {"d_submodule": d_in, "io": "out", "ctx_len": 1024, "refresh_batch_size": 4}
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(state, Path(folder, "ae.pt"))
    config = json.dumps({"trainer": trainer, "buffer": buffer}, indent=4)
    Path(folder, "config.json").write_text(config, encoding="utf-8")
    return state
