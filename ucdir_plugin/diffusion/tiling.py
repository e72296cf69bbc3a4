"""Images of any size through a network that takes patches: inter-step patch splitting (UCDIR, section 3.3).

The state of sampling is the whole image. At each step the denoiser runs on overlapping patches, and the overlap is
dropped, or blended, when their results are merged; the noise of the step is drawn once for the image:

    grid = Grid.aligned(*lq.shape[-2:], tile=1024, overlap=64, stride=net.stride)
    residual = samplers.ddpm(split(net.denoise, grid, (lq, initial)), schedule, noise)

A local network is evaluated exactly, once the overlap is its receptive field:

    radius = receptive_field(net.predict, 3, stride)
    initial = tiled(net.predict, Grid.aligned(*lq.shape[-2:], tile=512, overlap=radius, stride=stride), lq)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

from ucdir_plugin.diffusion.samplers import Denoiser
from ucdir_plugin.utils.errors import UserError, at_least_one

MERGES = ("drop", "blend")


@dataclass(frozen=True)
class Span:
    """A patch along one axis, in pixels of the image.

    Attributes:
        start, stop: what the network sees, [start, stop); it may reach beyond the image, which is reflected there.
        keep_start, keep_stop: what is kept of the result where the overlap is dropped.
    """

    start: int
    stop: int
    keep_start: int
    keep_stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Grid:
    """The patches of an image: every one of ``rows`` with every one of ``columns``.

    What they keep covers each pixel exactly once. Make one with :meth:`aligned` or :meth:`released`.
    """

    height: int
    width: int
    overlap: int
    rows: Tuple[Span, ...]
    columns: Tuple[Span, ...]

    @classmethod
    def aligned(cls, height: int, width: int, tile: int, overlap: int, stride: int = 1) -> Grid:
        """Patches that start at multiples of the network's total stride, as few as possible, of equal size.

        They shrink until they just cover the image. The last of an axis ends with the image, where the network pads as
        it does for the whole, and may be up to ``stride - 1`` pixels shorter. So a local network computes what it
        would in the whole image.

        Args:
            height, width: of the image.
            tile: the longest side of a patch (its multiple of ``stride`` is taken).
            overlap: pixels to drop at each inner border of a patch, at least.
            stride: total stride of the network.

        Raises:
            UserError: if ``tile`` is below ``stride``, or ``overlap`` leaves too little of it.
        """
        _check(tile, overlap, stride)
        units, double = tile // stride, -(-2 * overlap // stride)  # in strides; neighbours share `double`
        if units <= double:
            raise UserError(
                f"tile {tile} is too small for overlap {overlap} at the network's stride {stride}:"
                f" take a tile of at least {(double + 1) * stride}"
            )

        def axis(size: int) -> Tuple[Span, ...]:
            if size <= tile:
                return (Span(0, size, 0, size),)
            whole = -(-size // stride)
            count = -(-(whole - double) // (units - double))
            length = -(-(whole + (count - 1) * double) // count)
            starts = [(whole - length) * i // (count - 1) * stride for i in range(count)]
            stops = [min(start + length * stride, size) for start in starts]
            cuts = [0, *((a + b) // 2 for a, b in zip(starts[1:], stops)), size]
            return tuple(map(Span, starts, stops, cuts, cuts[1:]))

        return cls(height, width, overlap, axis(height), axis(width))

    @classmethod
    def released(cls, height: int, width: int, tile: int, overlap: int) -> Grid:
        """The grid of UCDIR's released code: patches of exactly ``tile`` in the reflected image.

        The image is padded by ``overlap``, by more if its shorter side is below ``tile``; the step is
        tile - 2 * overlap, and the last patch of an axis ends with the padded image.

        Raises:
            UserError: if ``overlap`` leaves nothing of ``tile``.
        """
        _check(tile, overlap, 1)
        padding = overlap + max(0, tile - min(height, width))

        def axis(size: int) -> Tuple[Span, ...]:
            last = size + padding - tile
            starts = [*range(-padding, last, tile - 2 * overlap), last]
            ends = [*(start + overlap for start in starts[1:]), size]  # a later patch overwrites an earlier one
            spans = [Span(s, s + tile, max(s + overlap, 0), min(end, size)) for s, end in zip(starts, ends)]
            return tuple(span for span in spans if span.keep_start < span.keep_stop)

        return cls(height, width, overlap, axis(height), axis(width))

    @property
    def tiles(self) -> List[Tuple[Span, Span]]:
        """(row, column) of each patch, row by row."""
        return list(itertools.product(self.rows, self.columns))

    @property
    def computed_ratio(self) -> float:
        """Pixels that the network computes for one of the image."""
        return sum(map(len, self.rows)) * sum(map(len, self.columns)) / (self.height * self.width)

    @property
    def borders(self) -> Tuple[List[int], List[int]]:
        """Rows and columns at which the kept part of another patch begins."""
        return [row.keep_start for row in self.rows[1:]], [column.keep_start for column in self.columns[1:]]

    def batches(self, images: int, tile_batch: int) -> Iterator[List[Tuple[int, Span, Span]]]:
        """(image, row, column) of each patch of each image, in lists of up to ``tile_batch`` of one size."""
        sizes: Dict[Tuple[int, int], List[Tuple[int, Span, Span]]] = {}
        for image, (row, column) in itertools.product(range(images), self.tiles):
            sizes.setdefault((len(row), len(column)), []).append((image, row, column))
        for patches in sizes.values():
            for i in range(0, len(patches), tile_batch):
                yield patches[i : i + tile_batch]


def grid_of(
    height: int, width: int, tile: int, overlap: int, stride: int = 1, border: int = 0, kind: str = "aligned"
) -> Optional[Grid]:
    """The patches of an image that is sampled with a border; None for one that is a single patch.

    Args:
        height, width: of the image without its border.
        border: pixels around the image, over which the grid lies too. An aligned grid splits none for its sake alone.
        kind: ``aligned`` or ``released``.
    """
    longest = max(height, width) + (0 if kind == "aligned" else 2 * border)
    if longest <= tile:
        return None
    size = height + 2 * border, width + 2 * border
    if kind == "aligned":
        return Grid.aligned(*size, tile, overlap, stride)
    return Grid.released(*size, tile, overlap)


def borders_in_image(grid: Grid, height: int, width: int, border: int = 0) -> Tuple[List[int], List[int]]:
    """``grid.borders`` as rows and columns of the image within its border."""
    rows, columns = (
        [at - border for at in borders if 0 < at - border < size]
        for borders, size in zip(grid.borders, (height, width))
    )
    return rows, columns


def _check(tile: int, overlap: int, stride: int) -> None:
    at_least_one(tile=tile, stride=stride)
    if tile < stride:
        raise UserError(f"tile {tile} is smaller than the network's stride: take at least {stride}")
    if not 0 <= 2 * overlap < tile:
        raise UserError(
            f"overlap {overlap} must be at least 0 and smaller than half the tile ({tile}):"
            f" take at most {(tile - 1) // 2}, or a larger tile"
        )


def tiled(
    function: Callable[..., torch.Tensor],
    grid: Grid,
    image: torch.Tensor,
    *inputs: Any,
    tile_batch: int = 1,
    merge: str = "drop",
    empty: Callable[..., torch.Tensor] = torch.empty,
) -> torch.Tensor:
    """``function(image, *inputs)``, computed on patches.

    Args:
        function: keeps the batch of its patches, and their size or enlarges it by a whole factor s, as networks for
            super-resolution do; any number of channels comes out.
        grid: of the image's size.
        image: (B, C, H, W).
        inputs: split like the image if they are tensors (B, c, H, W); taken for the patch's image if they are tensors
            with B first and not four dimensions, such as a noise level (B,); passed on if they are anything else.
        tile_batch: patches in one call, of one size.
        merge: ``drop`` the overlap, so that each pixel comes from one patch (the paper), or ``blend`` all of the
            patches with windows that rise as sin^2 over the width of two overlaps: without seams, but for a local
            function never exact there, as the windows take in what ``drop`` leaves out.
        empty: allocates the result, called as torch.empty; for instance in a memory-mapped file.

    Returns:
        (B, channels of the function's result, s * H, s * W), of the image's dtype and device. With ``drop`` equal to
        the whole to rounding, if the function is local, the grid aligned and its overlap at least the
        :func:`receptive_field`.

    Raises:
        UserError: if the function changes the size otherwise, or patches by different factors.
        ValueError: if an input has not the image's batch or the grid's size, or at an unknown ``merge``.
    """
    at_least_one(tile_batch=tile_batch)
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
    for value in (image, *inputs):
        if isinstance(value, torch.Tensor) and value.dim() and len(value) != len(image):
            raise ValueError(f"an input of {len(value)} in a batch of {len(image)}")
        if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[-2:] != (grid.height, grid.width):
            raise ValueError(f"an input of {tuple(value.shape[-2:])} in a grid for {(grid.height, grid.width)}")
    blend = merge == "blend"
    result: Optional[torch.Tensor] = None
    scale = 0
    for patches in grid.batches(len(image), tile_batch):
        outs = function(*(_gather(value, patches) for value in (image, *inputs)))
        size = len(patches[0][1]), len(patches[0][2])
        scale = scale or max(outs.shape[-2] // size[0], 1)  # what the first patches say
        _check_size(outs, size, scale, "keeps the size, or enlarges height and width of all by one whole factor")
        if result is None:
            rows = _parts(grid.rows, grid.height, grid.overlap, blend, scale, image)
            columns = _parts(grid.columns, grid.width, grid.overlap, blend, scale, image)
            shape = (len(image), outs.shape[1], scale * grid.height, scale * grid.width)
            result = empty(shape, dtype=image.dtype, device=image.device)
            if blend:
                result.zero_()
        for (number, row, column), out in zip(patches, outs):
            (top, bottom, row_window), (left, right, column_window) = rows[row], columns[column]
            y, x = scale * row.start, scale * column.start
            part = out[:, top - y : bottom - y, left - x : right - x]
            target = result[number, :, top:bottom, left:right]
            if blend:
                target.add_(part * row_window.unsqueeze(1) * column_window)
            else:
                target.copy_(part)
    return result


def _check_size(outs: torch.Tensor, size: Tuple[int, int], scale: int, need: str) -> None:
    if outs.shape[-2:] != (scale * size[0], scale * size[1]):
        raise UserError(
            f"the network turns a patch of {size[0]}x{size[1]} into {outs.shape[-2]}x{outs.shape[-1]}:"
            f" patches need one that {need}"
        )


def _parts(
    spans: Sequence[Span], size: int, overlap: int, blend: bool, scale: int, like: torch.Tensor
) -> Dict[Span, Tuple[int, int, Optional[torch.Tensor]]]:
    """Which pixels of the result each patch gives, [start, stop), and with which weight."""
    if not blend:
        return {span: (scale * span.keep_start, scale * span.keep_stop, None) for span in spans}
    windows = []
    total = torch.zeros(scale * size, dtype=torch.float64)
    for span in spans:
        position = (torch.arange(scale * len(span), dtype=torch.float64) + 0.5) / scale
        ramp = (torch.minimum(position, len(span) - position) / max(2 * overlap, 1)).clamp(max=1)
        start, stop, origin = (scale * i for i in (max(span.start, 0), min(span.stop, size), span.start))
        window = (ramp * torch.pi / 2).sin().square()[start - origin : stop - origin]
        total[start:stop] += window
        windows.append((start, stop, window))
    return {s: (a, b, (w / total[a:b]).to(like.device, like.dtype)) for s, (a, b, w) in zip(spans, windows)}


def _gather(value: Any, patches: Sequence[Tuple[int, Span, Span]]) -> Any:
    """What a batch of patches sees of one input."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.dim() != 4:
        return value[[image for image, _, _ in patches]]
    return torch.cat([_cut(_cut(value[i : i + 1], row, -2), column, -1) for i, row, column in patches])


def _cut(image: torch.Tensor, span: Span, dim: int) -> torch.Tensor:
    """The span along one axis, reflected (again and again) beyond the image."""
    size = image.shape[dim]
    if span.start >= 0 and span.stop <= size:
        return image.narrow(dim, span.start, len(span))
    period = max(2 * (size - 1), 1)
    index = torch.arange(span.start, span.stop, device=image.device).remainder(period)
    return image.index_select(dim, torch.minimum(index, period - index) if size > 1 else index)


def split(
    denoise: Callable[..., torch.Tensor],
    grid: Grid,
    conditions: Sequence[Any] = (),
    *,
    tile_batch: int = 1,
    merge: str = "drop",
    prepare: Optional[Callable[..., Any]] = None,
    cache_bytes: int = 2**30,
    empty: Callable[..., torch.Tensor] = torch.empty,
) -> Denoiser:
    """Inter-step patch splitting: a denoiser of whole images from one of patches (UCDIR, section 3.3).

    Args:
        denoise: ``denoise(x_t, level, *conditions)`` -> eps, of a batch of patches.
        grid, tile_batch, merge, empty: as for :func:`tiled`.
        conditions: what does not change between steps, such as the degraded image and the initial prediction, each
            split or passed on as an input of :func:`tiled`.
        prepare: ``prepare(*conditions)`` of a batch of patches -> what can be computed of them once for all steps,
            nested tuples, lists and dicts of tensors. It becomes the last argument of ``denoise``.
        cache_bytes: results of ``prepare`` are kept up to this size, the others computed anew at each step.

    Returns:
        ``(x_t, level) -> eps`` for any sampler: (B, C, H, W) and (B,) -> (B, C, H, W).

    Raises:
        UserError, ValueError: as :func:`tiled`, when called; UserError if the denoiser changes the size.
    """
    cache = None if prepare is None else _Cache(prepare, cache_bytes)

    def whole(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        calls = itertools.count()  # the batches of patches are the same at every step

        def patch(x: torch.Tensor, level: torch.Tensor, *conditions: Any) -> torch.Tensor:
            state = () if cache is None else (cache(next(calls), conditions),)
            eps = denoise(x, level, *conditions, *state)
            _check_size(eps, x.shape[-2:], 1, "keeps the size (scale 1)")
            return eps

        return tiled(patch, grid, x, level, *conditions, tile_batch=tile_batch, merge=merge, empty=empty)

    return whole


class _Cache:
    """Results by number, up to a number of bytes. As all are asked for in turn, to evict one would gain nothing."""

    def __init__(self, prepare: Callable[..., Any], room: int):
        self.prepare, self.room = prepare, room
        self.kept: Dict[int, Any] = {}

    def __call__(self, number: int, conditions: Sequence[Any]) -> Any:
        if number in self.kept:
            return self.kept[number]
        state = self.prepare(*conditions)
        size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(state)}.values())
        if size <= self.room:
            self.room -= size
            self.kept[number] = state
        return state


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (tuple, list, dict)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def per_patch(
    sample: Callable[..., torch.Tensor], grid: Grid, conditions: Sequence[Any], *, merge: str = "drop"
) -> torch.Tensor:
    """Each patch sampled to its end on its own, and only then merged: what the paper argues against (figure 6).

    For comparison: neighbours know nothing of each other's noise, so that seams show.

    Args:
        sample: ``sample(number, *conditions)`` of one patch -> its x_0. Each patch has another number, the same in
            every run, for the key of its noise.
        grid, merge: as for :func:`tiled`.
        conditions: of one image: the first is (1, C, H, W), the others as the inputs of :func:`tiled`.

    Returns:
        (1, C, H, W).

    Raises:
        UserError, ValueError: as :func:`tiled`; ValueError for more than one image.
    """
    if len(conditions[0]) != 1:
        raise ValueError(f"per_patch takes one image at a time, got {len(conditions[0])}")
    numbers = itertools.count()
    return tiled(lambda *patch: sample(next(numbers), *patch), grid, *conditions, merge=merge)


@torch.no_grad()
def receptive_field(
    function: Callable[[torch.Tensor], torch.Tensor],
    channels: int,
    stride: int = 1,
    limit: int = 1024,
    start: int = 32,
) -> Optional[int]:
    """Radius in pixels: how far the result looks beyond a cut at a multiple of the stride. The overlap for exactness.

    Measured with NaN, which every operation passes on whatever the weights: a band of rows, then of columns, is NaN,
    and the furthest NaN of the result is looked for. As a network of this stride commutes with shifts by it, one cut
    stands for all. Exact where every weight counts. Products with a constant zero, and convolutions by Winograd's
    method (not torch's on x86), can make it too large; what hides NaN (nan_to_num, a comparison) too small.

    Args:
        function: (1, channels, H, W) -> (1, any, s * H, s * W), in evaluation mode and on the CPU.
        channels: of the input; join several inputs and let the function take them apart.
        stride: total stride of the network.
        limit: the largest radius to look for.
        start: the radius to look for first, doubled until it is enough; a good guess saves time. What a layer looks
            at beyond twice of it, and nothing nearer, is missed (a dilation above 64).

    Returns:
        The radius, in pixels of the input; None if it is above ``limit`` or, as with GroupNorm or attention, without
        bound.
    """
    radii = [_reach(function, channels, stride, limit, start, dim) for dim in (2, 3)]
    return None if None in radii else max(radii)


def _reach(function: Callable, channels: int, stride: int, limit: int, margin: int, dim: int) -> Optional[int]:
    """:func:`receptive_field` along one axis, in images that grow until the NaN ends before they do."""
    while True:
        margin = -(-min(margin, limit + 1) // stride) * stride
        across = stride * max(2, -(-16 // stride))  # enough for the padding of most layers
        shape = [1, channels, across, across]
        shape[dim] = 3 * margin
        x = torch.linspace(-1, 1, math.prod(shape)).view(shape)
        x.narrow(dim, margin, margin).fill_(float("nan"))
        hit = function(x).isnan().movedim(dim, 0).flatten(1).any(1)
        hit = hit.view(3 * margin, -1).any(1).nonzero()  # of pixels of the input
        radius = max(margin - int(hit[0]), int(hit[-1]) + 1 - 2 * margin, 0)
        if radius < margin:
            return radius if radius <= limit else None
        if margin > limit:
            return None
        margin *= 2
