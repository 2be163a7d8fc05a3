"""Starts a Triton kernel on its tensors' own device, and chooses the size of its blocks."""

import torch
import triton


def launch(kernel, grid, *tensors_and_numbers, **constants):
    """Run `kernel` on the device of its first tensor."""
    with torch.cuda.device_of(tensors_and_numbers[0]):
        kernel[grid](*tensors_and_numbers, **constants)


def block_size(size: int, largest: int = 2**30) -> int:
    """How many columns a program has before it at a time: a power of 2."""
    return min(triton.next_power_of_2(size), largest)
