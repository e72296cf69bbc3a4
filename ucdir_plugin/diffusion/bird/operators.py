"""Known linear operators A of a degradation: means of blocks and channels, hole masks, and their compositions."""

from __future__ import annotations

import math
from typing import Callable, Optional, Sequence

import torch
import torch.nn.functional as F

from ucdir_plugin.utils.errors import UserError, at_least_one


class Operator:
    """A known linear operator, here the identity: (B, C, H, W) -> (B, c, h, w).

    Attributes:
        shrinks: H / h and W / w.
        commutes: with a convolution that is the same for all channels.
    """

    shrinks = 1
    commutes = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def observed(self, y: torch.Tensor) -> Optional[torch.Tensor]:
        """Which values of y were observed, as 0 or 1 in a shape that broadcasts to it; None if all were.

        Raises:
            UserError: if y has a size that this operator does not give.
        """
        return None

    def shown(self, x: torch.Tensor) -> torch.Tensor:
        """What y would look like, to be compared with it by eye."""
        return self(x)

    def seen(self, y: torch.Tensor) -> torch.Tensor:
        """y (in [0, 1]) as ``shown`` shows it: black where nothing was observed."""
        known = self.observed(y)
        return y if known is None else y * known

    def lift(self, y: torch.Tensor, channels: int) -> torch.Tensor:
        """A simple guess at x from y, to start from: (B, c, h, w) -> (B, channels, H, W)."""
        return y

    def adjoint(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Its adjoint, by automatic differentiation: v like y -> like x (B, C, H, W), which says the shape."""
        with torch.enable_grad():
            point = torch.zeros_like(x).requires_grad_()
            y = self(point)
        if y is point:
            return lambda v: v
        return lambda v: torch.autograd.grad(y, point, v, retain_graph=True)[0]

    def for_image(self, image: int) -> Operator:
        """The operator of one image of the batch."""
        return self


class BlockMean(Operator):
    """Super-resolution by ``factor``: the mean of blocks."""

    def __init__(self, factor: int):
        at_least_one(factor=factor)
        self.shrinks = factor
        self.commutes = factor == 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] % self.shrinks or x.shape[-1] % self.shrinks:
            raise UserError(f"an image of {x.shape[-1]}x{x.shape[-2]} has no whole blocks of {self.shrinks}")
        return F.avg_pool2d(x, self.shrinks)

    def lift(self, y: torch.Tensor, channels: int) -> torch.Tensor:
        return F.interpolate(y, scale_factor=self.shrinks, mode="bicubic", align_corners=False).clamp(0, 1)


class HoleMask(Operator):
    """Inpainting: only where ``known`` is 1 was anything observed.

    Args:
        known: (1 or B, 1, H, W) of 0 and 1.

    Raises:
        UserError: if it has other values, or nothing is known; when called, if it is of another size than the image.
    """

    commutes = False

    def __init__(self, known: torch.Tensor):
        if known.dim() != 4 or known.shape[1] != 1 or not bool(((known == 0) | (known == 1)).all()):
            raise UserError(f"a hole mask is (B, 1, H, W) of 0 (hole) and 1 (known), got {tuple(known.shape)}")
        if not bool(known.flatten(1).any(1).all()):
            raise UserError("the hole mask leaves nothing of the image: 0 marks holes, 1 what is known")
        self.known = known.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.observed(x)

    def observed(self, y: torch.Tensor) -> torch.Tensor:
        if y.shape[-2:] != self.known.shape[-2:]:
            raise UserError(
                f"the hole mask is {self.known.shape[-1]}x{self.known.shape[-2]},"
                f" the image {y.shape[-1]}x{y.shape[-2]}: they must have one size"
            )
        return self.known.to(y)

    def lift(self, y: torch.Tensor, channels: int) -> torch.Tensor:
        """Holes filled with the mean of their surroundings, from their borders inwards."""
        known = self.observed(y).expand(len(y), 1, *y.shape[-2:])
        filled, weight = y * known, known
        while bool((weight == 0).any()):
            pads = (1, 1, 1, 1)
            near = F.avg_pool2d(F.pad(filled * (weight > 0), pads), 3, 1)
            count = F.avg_pool2d(F.pad((weight > 0).to(y), pads), 3, 1)
            filled = torch.where(weight > 0, filled, near / count.clamp(min=1e-6))
            weight = ((weight > 0) | (count > 0)).to(y)
        return filled

    def for_image(self, image: int) -> HoleMask:
        return self if len(self.known) == 1 else HoleMask(self.known[image : image + 1])


class Unsaturated(HoleMask):
    """An exposure: pixels at the upper end of the range (known 0) say nothing, but are seen. There may be no others."""

    def __init__(self, known: torch.Tensor):
        self.known = known.float()

    def seen(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def shown(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def lift(self, y: torch.Tensor, channels: int) -> torch.Tensor:
        return y


class ChannelMean(Operator):
    """Colorization: the mean of the channels."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True)

    def lift(self, y: torch.Tensor, channels: int) -> torch.Tensor:
        return y.expand(-1, channels, -1, -1)


class Compose(Operator):
    """Several operators, the first first.

    Raises:
        UserError: for a hole mask that is not the last, as what it hides cannot be averaged.
    """

    def __init__(self, operators: Sequence[Operator]):
        self.operators = tuple(operators)
        if any(isinstance(op, HoleMask) for op in self.operators[:-1]):
            raise UserError("a hole mask must be the last of several operators")
        self.shrinks = math.prod(op.shrinks for op in self.operators)
        self.commutes = all(op.commutes for op in self.operators)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for op in self.operators:
            x = op(x)
        return x

    def observed(self, y: torch.Tensor) -> Optional[torch.Tensor]:
        return self.operators[-1].observed(y) if self.operators else None

    def lift(self, y: torch.Tensor, channels: int) -> torch.Tensor:
        for op in reversed(self.operators):
            y = op.lift(y, channels)
        return y

    def for_image(self, image: int) -> Compose:
        return Compose([op.for_image(image) for op in self.operators])
