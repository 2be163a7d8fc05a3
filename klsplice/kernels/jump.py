"""A JumpReLU whose thresholds can learn: straight-through gradients.

Shapes: N tokens, F latents.
"""

import torch


class JumpSTE(torch.autograd.Function):
    """z = relu(pre (pre > threshold)); the threshold's gradient as in arXiv 2407.14435, eq. 11.

    The relu is in here: after it, the gradient would miss what lies just under the threshold.
    """

    @staticmethod
    def forward(ctx, pre_NF, threshold_F, width):
        ctx.save_for_backward(pre_NF, threshold_F)
        ctx.width = width
        return pre_NF * (pre_NF > threshold_F.clamp(min=0))

    @staticmethod
    def backward(ctx, g_NF):
        pre_NF, threshold_F = ctx.saved_tensors
        g_pre_NF, g_threshold_F = g_NF * (pre_NF > threshold_F.clamp(min=0)), None
        if ctx.needs_input_grad[1]:
            band_F = ctx.width * threshold_F.clamp(min=1e-6)
            near_NF = (pre_NF - threshold_F).abs() < band_F / 2
            g_threshold_F = (-g_NF * near_NF).sum(0) * threshold_F / band_F
            g_threshold_F = g_threshold_F.to(threshold_F.dtype)
        return g_pre_NF, g_threshold_F, None
