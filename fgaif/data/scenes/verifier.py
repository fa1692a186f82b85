"""Make the competent model a fallible judge: one whose eyes are poor.

Random flips would average out when reward models train on the verdicts, so the verifier's mistakes
must be systematic: noise on the vision tower's weights makes it misjudge the same things in the
same images every time, some shapes and colours more than others.
"""

import torch
from transformers import LlavaForConditionalGeneration


@torch.no_grad()
def blur_vision(model: LlavaForConditionalGeneration, strength: float, seed: int) -> None:
    """Add Gaussian noise of ``strength`` standard deviations to each weight matrix of the tower."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.model.vision_tower.parameters():
        if weight.dim() > 1:
            noise = torch.randn(weight.shape, generator=generator)
            weight += strength * weight.std() * noise
