"""Checks of the kernels of lent experts in the interpreter. Run as a module in its own process: the switch is read on
import."""

import torch

from tests.kernels.lent_experts_cases import check

if __name__ == "__main__":
    for seed in range(10):
        check(seed, torch.float32 if seed % 2 else torch.float16, torch.device("cpu"))
    print("ok")
