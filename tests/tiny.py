"""A tiny language model, a text and SAEs of every architecture on disk, and whole runs on them.

The text has documents of one word and some of twenty, so contexts have unequal numbers of EOS; the
empty ones are skipped.
"""

import json
import random
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import hub
import naive
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

import run

D, F, K, LAYER, CONTEXT, BATCH = 32, 64, 6, 1, 16, 4
PAD, EOS, BOS = 0, 1, 2
SPECIAL = [PAD, EOS, BOS]
HELD_OUT = 8  # contexts
GROUPS = [4, 4, 8, 16, 32]
L1 = 0.05
DICT_CLASSES = {  # architecture: class of dictionary_learning
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "relu": "AutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
}
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
SMALL = {
    "MODEL_REVISION": "",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "LAYER": LAYER,
    "CHECK_SAE": False,
    "KEEP": "special",
    "CONTEXT": CONTEXT,
    "BATCH": BATCH,
    "MICRO_BATCH": BATCH,
    "TOKENS": 3 * BATCH * CONTEXT,
    "VAL_TOKENS": HELD_OUT * CONTEXT,
    "LR": 1e-2,
    "LOG_EVERY": 1,
    "RUN_NAME": "x",
    "WANDB_PROJECT": "",
}


def make(root: Path) -> SimpleNamespace:
    """The files -> their paths."""
    hub.make_gemma(root / "gem", seed=0, layers=4)
    world = SimpleNamespace(root=root, model=root / "gem", text=root / "text.jsonl", saes={})
    rng, words = random.Random(15), hub.vocabulary()
    lengths = [rng.choice((0, 0, 1, 1, 1, 2, 3, 9, 20)) for _ in range(300)]
    texts, others = ([" ".join(rng.choices(words, k=n)) for n in lengths] for _ in range(2))
    rows = [json.dumps({"text": text, "other": other}) for text, other in zip(texts, others)]
    world.text.write_text("\n".join(rows) + "\n")
    for architecture in DICT_CLASSES:
        world.saes[architecture] = root / architecture
        write_sae(root / architecture, architecture, given(architecture))
    return world


def given(architecture: str) -> dict:
    """An SAE's tensors under the plain names; rows of norm 1 where that is the rule."""
    rng = torch.Generator().manual_seed(1)
    W_dec = torch.randn(F, D, generator=rng)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    t = {"W_enc": W_dec + 0.05 * torch.randn(F, D, generator=rng)}
    t |= {"b_enc": 0.1 * torch.randn(F, generator=rng), "b_dec": torch.randn(D, generator=rng)}
    if architecture in ("relu", "jumprelu"):
        W_dec = W_dec * (0.8 + 0.4 * torch.rand(F, 1, generator=rng))
    t["W_dec"] = W_dec
    if architecture == "relu":
        t["b_enc"] -= 2.0
    elif architecture == "jumprelu":
        t["threshold"] = torch.linspace(1.0, 5.0, F)
    elif architecture != "topk":
        t["threshold"] = torch.tensor(3.0)
    return t


def write_sae(folder: Path, architecture: str, t: dict) -> None:
    """As dictionary_learning writes it."""
    if architecture in ("topk", "batchtopk", "relu"):
        state = {"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"]}
        state |= {"decoder.weight": t["W_dec"].T.contiguous()}
        state["bias" if architecture == "relu" else "b_dec"] = t["b_dec"]
    else:
        state = {"W_enc": t["W_enc"].T.contiguous(), **{n: t[n] for n in WEIGHTS[1:]}}
    trainer = {"trainer_class": "X", "dict_class": DICT_CLASSES[architecture], "layer": LAYER}
    trainer |= {"activation_dim": D, "dict_size": F, "lm_name": "gem"}
    if architecture in ("topk", "batchtopk", "matryoshka"):
        state["k"], trainer["k"] = torch.tensor(K, dtype=torch.int32), K
        state["threshold"] = t.get("threshold", torch.tensor(-1.0))
    if architecture == "jumprelu":
        state["threshold"] = t["threshold"]
    if architecture == "matryoshka":
        state["group_sizes"] = torch.tensor(GROUPS)
    if architecture == "relu":
        trainer["l1_penalty"] = L1
    folder.mkdir()
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))


def read_sae(folder: Path) -> SimpleNamespace:
    """ae.pt + config.json -> architecture, trainer, and tensors under the plain names."""
    trainer = read(folder / "config.json")["trainer"]
    state = torch.load(folder / "ae.pt", weights_only=True)
    names = {cls: name for name, cls in DICT_CLASSES.items()}
    architecture = names[trainer["dict_class"]]
    if "encoder.weight" in state:
        t = {"W_enc": state["encoder.weight"], "b_enc": state["encoder.bias"]}
        t |= {"W_dec": state["decoder.weight"].T.contiguous()}
        t["b_dec"] = state["bias" if architecture == "relu" else "b_dec"]
    else:
        t = {"W_enc": state["W_enc"].T.contiguous(), **{n: state[n] for n in WEIGHTS[1:]}}
    if "threshold" in state:
        t["threshold"] = state["threshold"]
    return SimpleNamespace(architecture=architecture, trainer=trainer, tensors=t)


def plain_sae(sae: SimpleNamespace, **options):
    """The plain module of what read_sae read; `options` go to its class."""
    t, architecture = sae.tensors, sae.architecture
    if architecture == "relu":
        still = {"l1": sae.trainer["l1_penalty"], "scale": 1.0, "target_l0": 0.0}
        return naive.ReLU(t, **still | options)
    if architecture == "jumprelu":
        return naive.JumpReLU(t, **options)
    k = {"k": sae.trainer["k"]}
    if architecture == "topk":
        return naive.TopK(t, **k, **options)
    model = naive.BatchTopK(t, **k)
    if architecture == "matryoshka":
        model = naive.Matryoshka(t, **k, groups=GROUPS)
    model.threshold = t["threshold"].item()
    return model


@cache
def lm_of(folder: Path, dtype: torch.dtype = torch.float32):
    """The LM as transformers runs it, eager."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return lm.to(dtype).eval().requires_grad_(False)


@cache
def packed(world_root: Path, held_out: int = HELD_OUT, key: str = "text") -> tuple:
    """The text as contexts of the LM -> (held out, the others), int64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world_root / "gem")
    rows, left = [], []
    for line in (world_root / "text.jsonl").read_text().splitlines():
        if text := json.loads(line)[key]:
            left += [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
        while len(left) >= CONTEXT - 1:
            rows.append([BOS, *left[: CONTEXT - 1]])
            left = left[CONTEXT - 1 :]
            if len(rows) == held_out:
                left = []  # no document on both sides
                break
    tokens_SL = torch.tensor(rows)
    return tokens_SL[:held_out], tokens_SL[held_out:]


def kept(keep: str, tokens_BL: torch.Tensor) -> torch.Tensor:
    """True where KEEP leaves the residual as it is."""
    kept_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    if keep == "special":
        kept_BL = torch.isin(tokens_BL, torch.tensor(SPECIAL))
    kept_BL[:, 0] |= keep == "first"
    return kept_BL


# ---- runs ------------------------------------------------------------------------------------


def words(world, runs: Path, **changes) -> list[str]:
    paths = {"MODEL": world.model, "SAE": world.saes["topk"], "DATASET": world.text}
    settings = SMALL | paths | {"CACHE": world.root / "cache", "RUNS": runs} | changes
    return [f"{name}={value}" for name, value in settings.items()]


def main(world, runs: Path, **changes) -> int:
    """run.main with small constants, without its words on the screen."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return run.main(words(world, runs, **changes))


def finished(world, runs: Path, **changes) -> Path:
    """A whole run -> its folder."""
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = run.main(words(world, runs, **changes))
    assert code == 0, said.getvalue()[-2000:]
    return runs / changes.get("RUN_NAME", "x")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def lines(folder: Path, part: str) -> list[dict]:
    """The lines of metrics.jsonl that have train/ or val/ -> step and those numbers, bare."""
    found = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        mine = {n.partition("/")[2]: v for n, v in line.items() if n.startswith(f"{part}/")}
        if mine:
            found.append({"step": line["step"]} | mine)
    return found


def arrays(path: Path) -> dict:
    with np.load(path) as found:
        return dict(found)


def tensors(folder: Path) -> dict:
    """Every tensor that a run leaves: of the SAE, of an adapter beside it and of LoRA."""
    found = {n: t for n, t in read_sae(folder / "sae").tensors.items()}
    for path in (folder / "sae" / "adapter.safetensors", folder / "lora/adapter_model.safetensors"):
        if path.is_file():
            found |= {f"{path.parent.name}/{n}": t for n, t in load_file(path).items()}
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
