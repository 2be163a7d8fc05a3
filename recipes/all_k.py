"""Which k? The paper's loop over SAE Bench's TopK SAEs of 65k latents, k = 20 to 320."""

SAE = [
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_0",
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_1",
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_2",
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_3",
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_4",
]
