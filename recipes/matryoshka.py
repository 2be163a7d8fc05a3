"""Matryoshka BatchTopK: does the nested SAE gain as much, with every prefix in the MSE?"""

SAE = (
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_matryoshka_batch_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_2"
)
ARCHITECTURE = "matryoshka"
