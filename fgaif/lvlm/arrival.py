"""How much of a policy's update really is where the policy is sampled from, or in what is shipped.

An adapter changes a weight by ``D = scaling * B @ A``. Rounding ``W0 + D`` to bfloat16 moves a
weight by half a step of its own size at least or not at all, so a small ``D`` is lost. The share
that arrived is the projection of what is held on what was meant, ``<H - W0, D> / <D, D>``: 1 is all
of it, 0 none, and other values mean that something else was loaded.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fgaif.types import Arrived

Sums = Mapping[str, tuple[float, float]]
"""Per layer ``<H - W0, D>`` and ``<D, D>``; both add up over the parts of a sharded layer."""


def merged_sums(base: Tensor, held: Tensor, update: Tensor) -> tuple[float, float]:
    """Compare the weight ``held`` with ``base + update``; all (out, in), ``update`` in float32."""
    moved = held.float() - base.float()
    return float((moved * update).sum()), float(update.square().sum())


def factor_sums(
    a: Tensor, b: Tensor, held_a: Tensor, held_b: Tensor, scaling: float
) -> tuple[float, float]:
    """Compare ``held_b @ held_a`` with ``scaling * b @ a``, without forming either product.

    ``a`` (r, in) and ``b`` (out, r) are the factors as published; those held by an engine may have
    more rows and columns of zeros, and ``held_b`` has the scaling in it.
    """
    a, b, held_a, held_b = (t.double() for t in (a, b, held_a, held_b))
    dot = scaling * float(((b.T @ held_b) * (a @ held_a.T)).sum())
    norm = scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())
    return dot, norm


def add_sums(workers: Iterable[Sums]) -> Sums:
    """Add up what the workers of a sharded engine hold of each layer."""
    total: dict[str, tuple[float, float]] = {}
    for sums in workers:
        for layer, (dot, norm) in sums.items():
            before = total.get(layer, (0.0, 0.0))
            total[layer] = before[0] + dot, before[1] + norm
    return total


def arrived(sums: Sums) -> Arrived:
    """The share over all layers, and the layers with the smallest and the largest share.

    Where nothing was to arrive, as with the first version of a fresh adapter, the share is 1.
    """
    shares = {layer: dot / norm for layer, (dot, norm) in sums.items() if norm > 0}
    if not shares:
        return Arrived()
    norm = sum(norm for _, norm in sums.values())
    weakest = min(shares, key=shares.__getitem__)
    strongest = max(shares, key=shares.__getitem__)
    return Arrived(
        share=sum(dot for dot, _ in sums.values()) / norm,
        weakest=shares[weakest],
        weakest_layer=weakest,
        strongest=shares[strongest],
        strongest_layer=strongest,
    )


@torch.no_grad()
def lora_update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``scaling * B @ A`` in float32: (r, in) and (out, r) -> (out, in)."""
    return scaling * (b.float() @ a.float())
