"""ReLU SAEs (Standard, April update): KL + MSE with L1 steered toward the L0 they had."""

SAE = (
    "canrager/saebench_gemma-2-2b_width-2pow16_date-0107/"
    "gemma-2-2b_standard_new_width-2pow16_date-0107/resid_post_layer_12/trainer_2"
)
SCHEDULE = "constant"
