"""Brings an SAE that SAELens can load into a folder that SAE= reads: `make saelens RELEASE= ID=`.

python -m klsplice.formats.from_saelens RELEASE ID   with requirements/formats.txt

RELEASE and ID as SAELens lists them, or a repository and a folder in it.
"""

import os
import sys

from sae_lens import SAE

from klsplice.formats import read

if __name__ == "__main__":
    folder = os.path.join("saes", *sys.argv[1:])
    SAE.from_pretrained(*sys.argv[1:]).save_model(folder)  # what it refuses it says itself
    source = read.open_sae(folder, "")
    print(f"a {source.architecture} SAE of {source.d_sae:,} latents, {source.lm_name}")
    print(f"SAE={folder}")
