"""Several SAEs, or transcoders, each at its own site, finetuned on what they do together.

In the spliced pass each reads what it gets there, below which the others stand in; the KL is of
that pass. The MSE is of the clean pass, where each reads what it would alone, over the variance of
what it stands in for: the mean over the sites, so that the deepest does not outweigh the others.
"""

import hashlib
import os

import torch
from torch import nn

from klsplice.formats import write
from klsplice.lm.splice import Pass
from learners.base import SAELearner
from sae import SAE, Trainable


class Joint(Trainable):
    """saes: in the order of the splice's sites, called by `names`."""

    def __init__(self, saes: list[SAE], names: list[str]):
        super().__init__()
        self.saes, self.names = nn.ModuleList(saes), names
        self.register_buffer("variance_M", torch.ones(len(saes)))  # set by `begin`

    @property
    def d_sae(self) -> int:
        return sum(sae.d_sae for sae in self.saes)

    def begin(self, before):
        for m, (sae, name) in enumerate(zip(self.saes, self.names)):
            own = {n: before[f"{n}_{name}"] for n in ("l0", "mean_square_norm", "mse", "fvu")}
            sae.begin(own)
            self.variance_M[m] = sae.entry() * own["mse"] / own["fvu"]

    def end(self, after):
        for sae, name in zip(self.saes, self.names):
            sae.end({n: after[f"{n}_{name}"] for n in ("l0", "smallest_active")})

    def before_clip(self):
        for sae in self.saes:
            sae.before_clip()

    def renormalise(self):
        for sae in self.saes:
            sae.renormalise()

    def after_step(self, l0, fired_F, tokens):
        fired = fired_F.split([sae.d_sae for sae in self.saes])
        for one in zip(self.saes, l0, fired):
            one[0].after_step(*one[1:], tokens)

    def problem(self):
        return next((found for sae in self.saes if (found := sae.problem())), None)


class JointLearner(SAELearner):
    """model: a Joint."""

    def reconstruct(self, x_ND, m: int = 0):
        with self.half_precision():
            return self.model.saes[m](x_ND)

    def losses_at(self, sites: list) -> tuple[torch.Tensor, torch.Tensor | None, list]:
        """Of the clean pass, sites: (x_ND, o_ND) each -> the MSE of each token (N,), what else the
        loss has (N,) or None, and the latents of each SAE."""
        mse_N, extra_N, latents = 0.0, None, []
        for m, (x_ND, o_ND) in enumerate(sites):
            y_ND, z_NF = self.reconstruct(x_ND, m)
            given, sae = (o_ND, y_ND.float(), z_NF), self.model.saes[m]
            with self.half_precision():
                error_N, more_N = sae.error(*given), sae.extra(x_ND, *given)
            mse_N = mse_N + error_N / self.model.variance_M[m] / len(sites)
            if more_N is not None:
                extra_N = more_N if extra_N is None else extra_N + more_N
            latents.append(z_NF)
        return mse_N, extra_N, latents

    def resumed(self, clean: Pass, active_N: torch.Tensor) -> Pass:
        """The LM with all of them spliced, each on what it reads there."""

        def stand_in(m: int):
            return lambda x_ND: self.reconstruct(x_ND, m)[0]

        ys = map(stand_in, range(len(self.model.saes)))
        return self.splice.spliced(clean, active_N, *ys)

    def spliced(self, clean, active_N):
        sites = clean.rows(active_N)
        found = [(o_ND, *self.reconstruct(x_ND, m)) for m, (x_ND, o_ND) in enumerate(sites)]
        return self.resumed(clean, active_N), found

    def each(self, source):
        for one, sae, name in zip(source.parts, self.model.saes, self.model.names):
            yield one, sae, f"_{name}"

    def identity(self):
        digests = [SAELearner(sae, self.splice).identity() for sae in self.model.saes]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def save(self, folder, source, constants, *, bos):
        """A folder each, named by its site; and a set for circuit-tracer where it can be one."""
        for one, sae, ending in self.each(source):
            own = constants | {"SAE": one.where, "SITE": one.site.name, "LAYER": one.site.layer}
            where, block = os.path.join(folder, ending.strip("_")), self.splice.block_of(one.site)
            write.save(where, sae, one, own, bos=bos, block=block)
        saes, sites = [*self.model.saes], self.splice.sites
        whole = [site.layer for site in sites] == [*range(len(self.splice.blocks))]
        alike = {(*site[1:], type(s), s.d_sae, getattr(s, "k", 0)) for site, s in zip(sites, saes)}
        if whole and len(alike) == 1 and saes[0].is_transcoder:
            write.save_set(folder, saes, *sites[0][1:], constants)
