"""What a run starts from: an SAE that is read, converted or fresh, and the learner around it.

Apart from the files at the top level this is the only module that reads the constants (cfg).
"""

from functools import partial

import torch

import data
import eval as evaluation  # eval is a builtin too
from klsplice import distributed, hub, machine, site
from klsplice.errors import UserError, first_line, out_of_resources
from klsplice.formats import read
from klsplice.formats.source import check_fits, check_site, check_text, several
from klsplice.lm import load
from klsplice.lm.activations import read_at_sites
from klsplice.lm.check import check, contexts
from klsplice.lm.splice import Splice, places_of
from klsplice.settings import FREE
from klsplice.train import TRAIN
from learners import convert
from learners.adapter import AdapterLearner
from learners.base import SAELearner
from learners.checks import check_rows, check_saves
from learners.joint import Joint, JointLearner
from learners.lora import LMLoRALearner, SAELoRALearner
from sae import ARCHITECTURES, SAE, BatchTopK, JumpReLU, KSparse, ReLU, build

LEARNERS = {
    "sae": SAELearner,
    "adapter": AdapterLearner,
    "sae_lora": SAELoRALearner,
    "lm_lora": LMLoRALearner,
}
# What may differ among runs that share a World; of these each brings its own.
OWN = {"SAE", "SAE_REVISION", "CHECK_SAE", "ARCHITECTURE", "D_SAE", "K", "TRAIN", "LOSS", "LR"}
OWN |= {"SCHEDULE", "WARMUP", "WEIGHT_DECAY", "CLIP", "L1", "AUXK", "DEAD_AFTER", "MSE_WEIGHT"}
OWN |= {"FREEZE", "JUMPRELU_THRESHOLD", "EVAL_EVERY", "RUN_NAME"} | FREE - {"RUNS", "CACHE"}
OWN |= {name for row in TRAIN.values() for name in row.constants}


class World:
    """What is frozen in a run, and shared by several: the LM, its text, and what is made of them.

    configs: constants of the runs. opened: lm.load.Opened. After `load`, tokens, splice and
    evaluation. Raises UserError.
    """

    def __init__(self, configs: list):
        self.cfg, self.losses = configs[0], [cfg.LOSS for cfg in configs]
        options = {"device": self.cfg.DEVICE, "layer": self.cfg.LAYER, "context": self.cfg.CONTEXT}
        self.opened = load.open_lm(self.cfg.MODEL, self.cfg.MODEL_REVISION, **options)
        self.tokens = self.splice = self.evaluation = None

    def load(self, source) -> None:
        """What takes minutes: tokenise the text, load the LM and check its passes.

        source: formats.source.Source of one of the runs; all read and write at its sites."""
        cfg, opened = self.cfg, self.opened
        self.tokens = data.prepare(cfg, opened.tokenizer, opened.config)
        compiles = torch.device(cfg.DEVICE).type == "cuda" and cfg.COMPILE
        compiling = ", and compiling it: a minute or two" if compiles else ""
        print(f"loading {cfg.MODEL}, checking it against its own code{compiling}", flush=True)
        lm = load.load_lm(opened, dtype=cfg.DTYPE, device=cfg.DEVICE)
        learns = cfg.TOKENS > 0 and {*self.losses} != {"mse"}  # through the LM
        self.splice = open_splice(cfg, lm, self.tokens, learns=learns, source=source)
        sites = self.splice.sites
        self.evaluation = evaluation.Evaluation(cfg, self.tokens, opened.identity, sites)


def worlds(configs: list) -> list[list]:
    """The runs that share a World, together. One whose LM learns has its own."""
    groups = {}
    for i, cfg in enumerate(configs):
        own = OWN - {"SAE"} if len(cfg.saes) > 1 else OWN  # several have sites of their own
        shared = {n: v for n, v in cfg.constants().items() if n not in own}
        key = i if cfg.TRAIN == "lm_lora" else repr(shared)
        groups.setdefault(key, []).append(cfg)
    return list(groups.values())


@distributed.main_process_first
def find_source(cfg) -> read.Source:
    """The SAE that the constants name, with its config read but not its weights; or a fresh one.

    Raises UserError in seconds."""
    machine.check_device(cfg.DEVICE, cfg.DTYPE)  # before anything is downloaded
    hub.prefer_cache_if_unreachable(cfg.MODEL, *cfg.saes, cfg.DATASET)
    if cfg.SAE == "fresh":
        architecture = cfg.ARCHITECTURE or "topk"
        k = cfg.K if ARCHITECTURES[architecture].has_k else None
        return read.Source("fresh", architecture, None, cfg.D_SAE, k=k, l1=cfg.L1)
    names, sites = cfg.saes, cfg.SITE.split(",")
    if len(names) > 1:
        parts = [read.open_sae(name, cfg.SAE_REVISION) for name in names]
        for part, name in zip(parts, sites * len(parts) if len(sites) == 1 else sites):
            if part.site.reads is None:
                part.site = site.at(name, part.site.layer)
            check_site(part, name)
        found = several(cfg.SAE, parts)
        if found.site.layer != cfg.LAYER:  # each says its block: there is nothing to insist on
            what = f"LAYER = {cfg.LAYER}, the SAE is of layer {found.site.layer}"
            raise UserError(what, f"set LAYER={found.site.layer}, that of the lowest one")
        return found
    # ARCHITECTURE and K are of a file that does not say them
    found = read.open_sae(cfg.SAE, cfg.SAE_REVISION, architecture=cfg.ARCHITECTURE, k=cfg.K)
    if "K" in cfg.said and found.k != cfg.K:
        has = f"has k = {found.k}" if found.k else f"is a {found.architecture}, without k"
        raise UserError(f"K = {cfg.K}: the SAE {has}", "leave K out")
    return found


@distributed.main_process_first
def read_source(cfg, source: read.Source, lm_config) -> None:
    """Check that `source` is of this LM and can learn what TRAIN asks, and read its weights.

    Raises UserError, before any LM is loaded."""
    check_adapts(cfg, source)
    text = lm_config.get_text_config()
    if source.fresh:
        source.d_in, source.site = width_at(cfg.SITE, text), site.at(cfg.SITE, cfg.LAYER)
        return
    for part in source.parts or [source]:
        if part.architecture == "relu" and not part.l1:  # SAELens files have none
            part.l1 = cfg.L1
        where, layer = cfg.SITE, cfg.LAYER
        if source.parts:
            where, layer = part.site.name, part.site.layer
        given = {"model": cfg.MODEL, "layer": layer, "where": where, "strict": cfg.CHECK_SAE}
        check_fits(part, width_at(where, text), **given)
        part.site = site.at(where, layer)
        weights = part.read_weights()
        part.weights = partial(dict, weights)


def width_at(where: str, config) -> int:
    """Of what is read at SITE. config: of the LM's text part."""
    if where != "attn.hook_z":
        return config.hidden_size
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head * config.num_attention_heads


def check_adapts(cfg, source: read.Source) -> None:
    """Raises UserError where TRAIN or ARCHITECTURE asks what this SAE's architecture cannot do."""
    wanted = cfg.ARCHITECTURE or source.architecture
    if not cfg.TOKENS and wanted != source.architecture:
        what = f"TOKENS = 0 measures an SAE as it is, and this one is a {source.architecture}"
        raise UserError(what, f"leave ARCHITECTURE empty (it is {wanted})")
    if cfg.TRAIN in ("adapter", "sae_lora") and not ARCHITECTURES[wanted].adapts:
        what = f"TRAIN = {cfg.TRAIN}: the reconstruction of a {wanted} SAE is not z W_dec + b_dec"
        raise UserError(what, "an adapter or LoRA could not be saved with it; use TRAIN=sae")
    if wanted != source.architecture and site.at(cfg.SITE, None).is_transcoder:
        what = f"ARCHITECTURE = {wanted}: a transcoder is not converted"
        raise UserError(what, f"leave it empty; it is {source.architecture}")
    known = [name for name, row in ARCHITECTURES.items() if row.from_topk]
    converts = source.architecture == "topk" and wanted in known
    if wanted != source.architecture and not converts:
        what = f"ARCHITECTURE = {cfg.ARCHITECTURE}, the SAE is a {source.architecture}"
        raise UserError(what, f"leave it empty; a topk alone is converted, to {', '.join(known)}")


@distributed.main_process_first
def open_splice(cfg, lm, tokens, *, learns: bool, source=None) -> Splice:
    """The LM's clean and spliced passes, held against the LM itself, those that a gradient is
    taken through if something learns by them. source: of several SAEs. Raises UserError."""
    speed = {"compiled": cfg.COMPILE and lm.device.type == "cuda", "checkpointed": cfg.LOW_MEMORY}
    try:
        parts = source.parts if source else []
        sites = [part.site for part in parts] or [site.at(cfg.SITE, cfg.LAYER)]
        splice = Splice(lm, cfg.LAYER, sites=sites, head_chunk=cfg.HEAD_CHUNK, **speed)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        if out_of_resources(e, {}, 2):
            raise
        what = f"{type(lm).__name__} cannot be run in {cfg.DTYPE}: {first_line(e)}"
        raise UserError(what, "if transformers alone can run it, try the other DTYPE") from None
    # compiled blocks are checked in the shape that an evaluation gives them
    few = contexts(tokens, cfg.EVAL_BATCH if splice.compiled else 1)
    splice.checked = check(splice, few, cfg.MICRO_BATCH * learns) | {"places": places_of(splice)}
    return splice


def open_learner(cfg, source: read.Source, splice: Splice, tokens) -> SAELearner:
    """The learner of TRAIN around the SAE of `source`: read, converted or fresh."""
    saes = [_open_sae(cfg, *part, splice, tokens) for part in enumerate(source.parts or [source])]
    if source.parts:
        return JointLearner(Joint(saes, [part.site.short for part in source.parts]), splice)
    options = {name.lower(): getattr(cfg, name) for name in TRAIN[cfg.TRAIN].constants}
    if cfg.TRAIN != "sae":  # it starts at random
        options["seed"] = cfg.SEED
    return LEARNERS[cfg.TRAIN](saes[0], splice, **options)


def _open_sae(cfg, m: int, source: read.Source, splice: Splice, tokens) -> SAE:
    """m: the number of its site."""
    check_text(source, starts_with_bos=tokens.bos, keep=cfg.KEEP, context=cfg.CONTEXT)
    sae = _fresh(cfg, source, splice, tokens) if source.fresh else build(source, source.weights())
    if cfg.ARCHITECTURE not in ("", source.architecture):
        print(f"note: the TopK SAE is converted to {cfg.ARCHITECTURE}; its k was {sae.k}")
        kind = ARCHITECTURES[cfg.ARCHITECTURE]
        sae = convert.from_topk(kind, sae, _first_residuals(cfg, splice, tokens, m)[0])
    if isinstance(sae, BatchTopK) and sae.threshold < 0 and not source.fresh:
        print(f"note: the SAE's files have no threshold; it is fitted to L0 = {sae.k}")
        convert.fit_threshold(sae, _first_residuals(cfg, splice, tokens, m)[0])
    if isinstance(sae, JumpReLU):
        sae.threshold_F.requires_grad_(cfg.JUMPRELU_THRESHOLD == "ste")
    sae.freeze(cfg.FREEZE)
    check_saves(sae, source)
    if cfg.TRAIN == "sae" and cfg.TOKENS:
        check_rows(sae)
    return sae


def _first_residuals(cfg, splice, tokens, m: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x_ND and o_ND of site m, float32, at the active positions of the first training contexts (64
    at most); of held-out ones where nothing is trained."""
    some_SL = tokens.sequences(0, min(64, len(tokens.order_S))) if cfg.TOKENS else tokens.val(0, 64)
    parts, device = some_SL.split(cfg.EVAL_BATCH), splice.head.W_VD.device
    x_ND, o_ND = read_at_sites(splice, tokens, parts, device)[m]
    return x_ND.float().cpu(), o_ND.float().cpu()


def _fresh(cfg, source, splice, tokens) -> SAE:
    """Tied random rows and a decoder bias at the mean residual; a transcoder starts from zero."""
    means = [t_ND.mean(0) for t_ND in _first_residuals(cfg, splice, tokens)]
    sizes = {"d_in": source.d_in, "d_sae": source.d_sae}
    generator = torch.Generator().manual_seed(cfg.SEED)
    weights = convert.fresh_weights(**sizes, mean_D=means[0], generator=generator)
    if source.site.is_transcoder:
        weights = convert.transcoder_of(weights, mean_out_D=means[1])
    sae = build(source, weights)
    if isinstance(sae, KSparse):
        sae.auxk, sae.dead_after = cfg.AUXK, cfg.DEAD_AFTER
    if isinstance(sae, ReLU):
        sae.wanted_l0 = cfg.K
    return sae
