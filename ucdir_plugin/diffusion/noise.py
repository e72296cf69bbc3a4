"""Stateless randomness: every random number is a function of a key, never of what was drawn before.

A key is (seed, image's relative path or sample number, draw, ...). So results do not depend on batch, tile, rank,
worker or on being resumed.
"""

from __future__ import annotations

import hashlib
from typing import Callable, Optional, Sequence, Tuple, Union

import torch

KeyPart = Union[int, str]


def key_to_seed(*key: KeyPart) -> int:
    """A 63-bit seed from a key; equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: KeyPart) -> torch.Generator:
    """A CPU generator seeded by ``key``."""
    return torch.Generator("cpu").manual_seed(key_to_seed(*key))


def normal(
    shape: Sequence[int],
    *key: KeyPart,
    device: torch.device | str = "cpu",
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Standard normal noise of ``shape``, float32, the same on every device (drawn on the CPU, then moved).

    Args:
        out: where it goes, a tensor of that shape; else a new one on ``device``.
    """
    if out is not None and out.device.type == "cpu":
        return torch.randn(tuple(shape), generator=generator(*key), out=out)
    drawn = torch.randn(tuple(shape), generator=generator(*key))
    return drawn.to(device) if out is None else out.copy_(drawn)


Noise = Callable[..., torch.Tensor]
"""(shape of a batch, draw number, further parts of the key) -> standard normal noise."""


def image_noise(
    seed: int,
    keys: Sequence[str],
    device: torch.device | str = "cpu",
    sample: int = 0,
    empty: Callable[..., torch.Tensor] = torch.empty,
) -> Noise:
    """The noise of images: a function of the seed, the image's key and the number of the sample.

    Args:
        keys: one for each image of the batch; its relative path.
        sample: 0 is what validation and test draw.
        empty: allocates it, called as torch.empty.
    """
    more: Tuple[KeyPart, ...] = ("of", sample) if sample else ()

    def noise(shape: Sequence[int], draw: int, *key: KeyPart) -> torch.Tensor:
        result = empty(tuple(shape), device=device)
        for image, name in zip(result, keys):
            normal(shape[1:], seed, "sample", name, draw, *key, *more, out=image)
        return result

    return noise
