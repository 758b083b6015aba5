"""Batches of varying length, as a data loader with padding gives them."""

import torch
from torch import Tensor

from workloads.base import Target, Workload, register
from workloads.gpt import gpt, tokens

EXAMPLES = 2


def batches(tiny: bool) -> list[tuple[Tensor, ...]]:
    """60 batches, each as long as its longest example."""
    random = torch.Generator().manual_seed(0)
    count, low, high, vocabulary = (4, 3, 6, 20) if tiny else (60, 64, 512, 1000)
    lengths = torch.randint(low, high + 1, (count, EXAMPLES), generator=random).amax(1)
    torch.manual_seed(1)
    return [tokens(EXAMPLES, length, vocabulary) for length in lengths.tolist()]


register(
    Workload(
        "W9-lengths",
        f"the GPT of width 768: 60 batches of B={EXAMPLES} with T drawn from 64 to 512",
        "lengths",
        lambda tiny: gpt(EXAMPLES, 6 if tiny else 512, tiny=tiny),
        (Target("first over again", 1.10),),
        batches,
    )
)
