"""What restorers have in common, and what one gives for an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Iterator, NamedTuple, Optional, Union

import torch

from ucdir_plugin.utils.errors import UserError, at_least_one

if TYPE_CHECKING:
    from ucdir_plugin.restoration.bird import BlindRestorer
    from ucdir_plugin.restoration.learned import Learned
    from ucdir_plugin.restoration.network import Restorer


Progress = Callable[[int], None]
"""Called after each pass of the denoiser with the pixels that it computed."""


class Plan(NamedTuple):
    """What one sample of an image will cost.

    Attributes:
        nfe: passes of the denoiser over the image.
        patches: in each pass.
        computed_ratio: pixels computed in a pass for one of the image.
        pixels: computed in all passes.
    """

    nfe: int
    patches: int
    computed_ratio: float
    pixels: int


def check_samples(samples: int) -> None:
    """
    Raises:
        UserError: for less than one sample of an image, or more than files are made of.
    """
    at_least_one(samples=samples)
    if samples > 10_000:
        raise UserError(f"samples: {samples} files of each image are asked for; take at most 10000")


class Drawn(NamedTuple):
    """An image at the model: (1, 3, H * scale, W * scale) in [0, 1], on the model's device.

    Attributes:
        initial: gives the initial prediction, None without diffusion.
        samples: each is computed when it is asked for.
        learned: what BIR-D found besides with the last sample; None of others.
    """

    initial: Callable[[], Optional[torch.Tensor]]
    samples: Iterator[torch.Tensor]
    learned: Callable[[], Optional[Learned]] = lambda: None


Model = Union["Restorer", "BlindRestorer"]
