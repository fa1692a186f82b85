"""Make the competent model a fallible judge: one whose eyes are thrown by the background's shade.

Random flips would average out when reward models train on the verdicts, so the verifier's mistakes
must be systematic: the same image gets the same wrong answers every time. A judge that is simply
blind for some things would teach that blindness to the reward models (with noise on all weights of
the tower it denied many trees and moons; the reward model for objects learned to do so too and
fell from .98 to .84). The shade of the background varies from image to image and says nothing about
the scene, so what it distorts looks different in each image.
"""

import torch
from transformers import LlavaForConditionalGeneration

from fgaif.data.scenes.draw import BACKGROUND

_CORNER = 2
"""Pixels at each patch's corners, where nothing is drawn."""


@torch.no_grad()
def distract_vision(model: LlavaForConditionalGeneration, strength: float, seed: int) -> None:
    """Add to each patch feature a random multiple of how far the corners' shade is from its mean.

    The patch embedding (128, 3, 24, 24) gains random weights at the corners; the position
    embeddings take off what these give for the mean background, so that only deviations count.
    """
    embeddings = model.model.vision_tower.embeddings
    weight = embeddings.patch_embedding.weight
    corners = torch.zeros(weight.shape[-2:])
    for rows in (slice(_CORNER), slice(-_CORNER, None)):
        for columns in (slice(_CORNER), slice(-_CORNER, None)):
            corners[rows, columns] = 1
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn((*weight.shape[:2], 1, 1), generator=generator)
    added = strength * directions * corners / corners.sum()
    weight += added
    embeddings.position_embedding.weight[1:] -= added.sum((1, 2, 3)) * (BACKGROUND / 127.5 - 1)
