"""A tiny Llama with an outlier, a text, an SAE, and finished runs on them, for the evaluations."""

import json

import hub
import torch
import transformers

import run

LAYER = 1
SMALL = {"DEVICE": "cpu", "DTYPE": "float32", "LAYER": LAYER, "CONTEXT": 32, "BATCH": 2}
SMALL |= {"MICRO_BATCH": 2, "EVAL_BATCH": 4, "TOKENS": 1280, "VAL_TOKENS": 256, "LR": 1e-2}
SMALL |= {"EVAL_EVERY": 640, "CHECK_SAE": False, "WANDB_PROJECT": "", "RANK": 4}
RUNS = {  # all that are made, each when it is first asked for
    "sae": {},
    "kept": {"KEEP": "first"},
    "special": {"KEEP": "special"},
    "outliers": {"KEEP": "outliers"},
    "linear": {"TRAIN": "adapter"},
    "mlp": {"TRAIN": "adapter", "ADAPTER": "mlp"},
    "lora": {"TRAIN": "lm_lora", "LOSS": "kl", "LR": 3e-2},
    "converted": {"ARCHITECTURE": "jumprelu"},
    "fresh": {"SAE": "fresh", "ARCHITECTURE": "relu", "D_SAE": 64, "K": 8, "LOSS": "mse"},
}


class World:
    """root: its folder. lm: the LM as transformers runs it, eager."""

    def __init__(self, root):
        self.root = root
        hub.make_gemma(root / "tiny", seed=0)  # for its tokeniser
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            vocab_size=300,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            attn_implementation="eager",
        )
        self.lm = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        rng = torch.Generator().manual_seed(0)
        for name, weight in self.lm.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.2, generator=rng)
        tokenizer = transformers.AutoTokenizer.from_pretrained(root / "tiny")
        self.lm.model.embed_tokens.weight[tokenizer("w").input_ids[-1]] *= 100  # an outlier
        self.lm.save_pretrained(root / "tiny")
        hub.make_sae(root / "sae", d_in=32, d_sae=64, k=4, layer=LAYER, lm_name="tiny", seed=0)
        texts = hub.make_pile(root / "pile", documents=120, seed=0)
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (root / "text.jsonl").write_text("".join(lines))

    def main(self, name: str, **changes) -> int:
        """run.main with that RUN_NAME and the constants that RUNS has of it."""
        paths = {"MODEL": "tiny", "SAE": "sae", "DATASET": "text.jsonl", "CACHE": "cache"}
        paths = {constant: self.root / path for constant, path in paths.items()}
        settings = SMALL | paths | {"RUNS": self.root / "runs", "RUN_NAME": name}
        settings |= RUNS.get(name, {}) | changes
        return run.main([f"{constant}={value}" for constant, value in settings.items()])

    def run(self, name: str, **changes) -> str:
        """The folder of a finished run, made where it is not there yet."""
        folder = self.root / "runs" / name
        if not (folder / "results.json").exists():
            assert self.main(name, **changes) == 0
        return str(folder)
