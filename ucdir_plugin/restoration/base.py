"""What restorers have in common, and what one gives for an image."""

from __future__ import annotations

import abc
from typing import Any, Callable, Dict, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from ucdir_plugin.diffusion.conditions import Condition
from ucdir_plugin.restoration.learned import Learned
from ucdir_plugin.utils.errors import UserError, at_least_one
from ucdir_plugin.utils.image_reading import Photo

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
    """Refuse numbers of samples that no file can be made of.

    Raises:
        UserError: for less than one sample of an image, or more than 10000.
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


class Restorer(abc.ABC):
    """What restores images: a trained network, or BIR-D with its prior.

    Attributes:
        device: that it computes on.
        scale: output size / input size.
        steps: of sampling.
        seed: where none is given.
        about: name, weights and their SHA-256, for the record.
        notes: what its user should be told, such as a licence.
        conditions: auxiliary scalar conditions that it takes (name -> value in :meth:`run`).
        diffusion: whether it samples; else it restores in one pass.
        extra_suffixes: ends of the names of further files that an image gives.
        input_files: files besides the images that results must not be written over.
    """

    device: torch.device
    scale: int
    steps: int
    seed: int
    about: Dict[str, Any]
    notes: Mapping[str, str]
    conditions: Tuple[Condition, ...] = ()
    diffusion: bool = True
    extra_suffixes: Sequence[str] = ()
    input_files: Sequence[str] = ()

    @abc.abstractmethod
    def run(
        self,
        lq: torch.Tensor,
        key: str,
        *,
        seed: Optional[int] = None,
        samples: int = 1,
        blend: float = 1.0,
        condition: Optional[Mapping[str, Any]] = None,
        empty: Callable[..., torch.Tensor] = torch.empty,
        progress: Optional[Progress] = None,
        callback: Optional[Callable[..., None]] = None,
    ) -> Drawn:
        """Restore one image.

        Args:
            lq: (1, 3, H, W) RGB in [0, 1]; it is used up (overwritten).
            key: names the image to the noise; with one key and seed the result is the same in every run.
            seed: default: the restorer's.
            samples: how many to draw.
            blend: lambda of initial + lambda * residual (paper, figure 1): 0 the initial prediction, 1 the sample.
            condition: name -> value of :attr:`conditions`.
            empty: allocates tensors of the images' size, called as torch.empty.
            progress: see :data:`Progress`.
            callback: called after each step with its number, x_t and x_0, as by the samplers.

        Returns:
            prediction and samples, each computed when asked for.

        Raises:
            UserError: for arguments that :meth:`check` refuses.
        """

    @abc.abstractmethod
    def plan(self, height: int, width: int) -> Plan:
        """What restoring an image of this size once will cost."""

    @abc.abstractmethod
    def check(self, samples: int, blend: float, condition: Optional[Mapping[str, Any]] = None) -> None:
        """Look at the arguments of :meth:`run` before any image is read.

        Raises:
            UserError: for what has no meaning here, or is out of range. A condition that a file may tell is not
                missing yet.
        """

    @abc.abstractmethod
    def state_bytes(self, height: int, width: int, samples: int = 1) -> int:
        """Memory for what is as large as the image: what grows with it where patches are of one size."""

    @abc.abstractmethod
    def record_settings(
        self,
        seed: Optional[int] = None,
        samples: int = 1,
        blend: float = 1.0,
        condition: Optional[Mapping[str, Any]] = None,
    ) -> Dict[str, Any]:
        """All that decides what comes out, besides the image and its key."""

    def condition_values(self, photo: Photo, condition: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
        """Values of the conditions for a photo: what the user gives, and what the file shows.

        Args:
            photo: as it was read.
            condition: name -> value, as for :meth:`run`.
        """
        return dict(condition or {})

    def output_photo(self, photo: Photo) -> Photo:
        """The photo whose kind (gray, alpha, profile) the result has: the input's."""
        return photo

    def warning(self, photo: Photo) -> Optional[str]:
        """Why a photo is not of the kind that the network was trained on; None if it is, as far as known."""
        return None
