"""Tile grids, patch splitting around any denoiser, receptive fields, memory."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import reference
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ucdir_plugin.archs import UCDIR, SIDUNet, UCDIRDenoiser, ucdir_arch
from ucdir_plugin.archs.padding import pad_to_multiple
from ucdir_plugin.diffusion import samplers, tiling
from ucdir_plugin.diffusion.noise import image_noise, normal
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.diffusion.tiling import Grid, per_patch, receptive_field, split, tiled
from ucdir_plugin.options.schema import SamplingOptions
from ucdir_plugin.restoration import sampling
from ucdir_plugin.utils.errors import UserError

LEVEL = torch.tensor([0.6])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Grids

CASES = [(32, 8, 1), (32, 8, 4), (33, 5, 8), (64, 0, 16), (48, 15, 16), (100, 49, 1), (17, 3, 2)]


@pytest.mark.parametrize("tile, overlap, stride", CASES)
def test_aligned_grid(tile, overlap, stride):
    for size in [*range(1, 130), 251, 509, 1021]:
        grid = Grid.aligned(size, 1, tile, overlap, stride)
        spans = grid.rows
        kept = [pixel for span in spans for pixel in range(span.keep_start, span.keep_stop)]
        assert kept == list(range(size))
        assert all(span.start % stride == 0 and len(span) <= tile for span in spans)
        assert spans[0].start == 0
        assert spans[-1].stop == size
        for a, b in zip(spans, spans[1:]):
            assert a.stop - a.keep_stop >= overlap
            assert b.keep_start - b.start >= overlap
        assert len({len(span) for span in spans[:-1]}) <= 1
        assert len(spans) == 1 or 0 <= len(spans[0]) - len(spans[-1]) < stride
        # as few patches as can be, and hardly more than these must compute
        step = tile // stride * stride - -(-2 * overlap // stride) * stride
        if size > tile:
            least = 1 + -(-(size - tile // stride * stride) // step)
            assert len(spans) == least
            assert sum(map(len, spans)) < size + (least - 1) * (2 * overlap + stride) + least * stride


@pytest.mark.parametrize("tile, overlap", [(32, 8), (33, 5), (64, 0), (100, 49)])
def test_released_grid(tile, overlap):
    for size in [*range(1, 130), 251, 509]:
        spans = Grid.released(size, 150, tile, overlap).rows
        assert [p for span in spans for p in range(span.keep_start, span.keep_stop)] == list(range(size))
        assert all(len(span) == tile for span in spans)
        assert all(s.keep_start - s.start >= overlap and s.stop - s.keep_stop >= overlap for s in spans)


def test_share_of_pixels_computed_twice():
    many = 128 + 100 * 896  # 100 patches of 1024 just fit
    assert Grid.aligned(many, many, 1024, 64, 16).computed_ratio == pytest.approx(1.31, abs=0.01)
    for size in ((14142, 14143), (2120, 1416), (4000, 3000)):
        assert Grid.aligned(*size, 1024, 64, 16).computed_ratio < 1.31
    assert Grid.aligned(1024, 1024, 1024, 64, 16).computed_ratio == 1
    # what balancing is for: one row of pixels too many costs little
    assert Grid.aligned(1025, 1024, 1024, 64, 16).computed_ratio < 1.16
    assert Grid.released(1025, 1024, 1024, 64).computed_ratio > 3


def test_borders():
    grid = Grid.aligned(100, 40, 40, 8, 4)
    rows, columns = grid.borders
    assert len(rows) == len(grid.rows) - 1 == 3
    assert columns == []
    assert len(grid.tiles) == 4


@pytest.mark.parametrize(
    "tile, overlap, stride, words",
    [
        (8, 0, 16, "tile 8 is smaller than the network's stride: take at least 16"),
        (32, 16, 1, "overlap 16 must be at least 0 and smaller than half the tile (32): take at most 15"),
        (32, -1, 1, "overlap -1"),
        (48, 20, 32, "tile 48 is too small for overlap 20 at the network's stride 32: take a tile of at least 96"),
        (0, 0, 1, "tile must be at least 1, got 0"),
    ],
)
def test_impossible_grids(tile, overlap, stride, words):
    with pytest.raises(UserError) as caught:
        Grid.aligned(5, 5, tile, overlap, stride)  # even where the image is small enough for one patch
    assert words in str(caught.value)
    if "at least 96" in words:
        Grid.aligned(500, 500, 96, 20, 32)
    if stride == 1:
        with pytest.raises(UserError):
            Grid.released(50, 50, tile, overlap)


# Parity with the release


@pytest.fixture(scope="module")
def released():
    arrays = reference("ucdir_reference.npz")
    config = json.loads(bytes(arrays["config_json"]))
    config.pop("norm_groups")
    net = UCDIRDenoiser(**config).eval()
    net.load_state_dict({k[len("denoiser/") :]: v for k, v in arrays.items() if k.startswith("denoiser/")})
    return arrays, net


@pytest.mark.parametrize("tile_batch", [1, 5])
def test_reproduces_the_released_patch_splitting(released, tile_batch):
    a, net = released
    x, guide, level = a["tile_x"], a["tile_guide"], a["tile_level"]
    grid = Grid.released(*x.shape[-2:], int(a["tile_size"]), int(a["tile_overlap"]))
    out = tiled(net, grid, x, level, guide, tile_batch=tile_batch)
    torch.testing.assert_close(out, a["tile_out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(72, 104), (25, 90), (40, 31)])
def test_released_grid_reflects_more_around_a_small_image(size):
    x, tile, overlap = normal((1, 2, *size), "small"), 32, 8
    padding = overlap + max(0, tile - min(size))
    padded = F.pad(x, (padding,) * 4, mode="reflect")
    function = lambda patch: patch - patch.mean((2, 3), keepdim=True)  # noqa: E731  (knows its patch)
    expected = torch.zeros_like(padded)
    starts = [[min(s, n - tile) for s in range(0, n, tile - 2 * overlap)] for n in padded.shape[-2:]]
    for top in starts[0]:
        for left in starts[1]:
            out = function(padded[..., top : top + tile, left : left + tile])
            expected[..., top + overlap : top + tile - overlap, left + overlap : left + tile - overlap] = out[
                ..., overlap:-overlap, overlap:-overlap
            ]
    inside = (..., slice(padding, padding + size[0]), slice(padding, padding + size[1]))
    result = tiled(function, Grid.released(*size, tile, overlap), x)
    torch.testing.assert_close(result, expected[inside], rtol=0, atol=1e-6)


def test_reflection_goes_on_where_the_image_is_tiny():
    row = torch.arange(3.0).view(1, 1, 1, 3)
    seen = []
    tiled(lambda patch: seen.append(patch) or patch, Grid.released(1, 3, 9, 1), row)
    assert seen[0][0, 0, 0].tolist() == [2, 1, 0, 1, 2, 1, 0, 1, 2]  # from -2
    assert (seen[0][0, 0] == seen[0][0, 0, :1]).all()


# Local networks: tiled = whole


class Convs(nn.Sequential):
    def __init__(self, channels=3):
        super().__init__(nn.Conv2d(channels, 6, 5, padding=2), nn.SiLU(), nn.Conv2d(6, 3, 3, padding=1))


class Strided(nn.Module):
    """Strided convolution down, nearest upsampling, a skip; pads itself."""

    def __init__(self, channels=3):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 6, 3, stride=2, padding=1), nn.Conv2d(6, 3, 3, padding=1)
        self.mid = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        h, w = x.shape[-2:]
        y = torch.tanh(self.mid(torch.tanh(self.down(pad_to_multiple(x, 2)))))
        return self.up(F.interpolate(y, scale_factor=2.0))[..., :h, :w] + x[:, :3]


LOCAL = {
    "type": "UCDIRDenoiser",
    "inner_channel": 8,
    "channel_mults": [1, 2],
    "res_blocks": 1,
    "attn_res": [],
    "mid_attn": False,
    "norm": "layernorm2d",
    "num_bases": 4,
    "dropout": 0.0,
}


def denoiser(**changes):
    return UCDIRDenoiser(**{k: v for k, v in {**LOCAL, **changes}.items() if k != "type"}).eval()


def joined(net):
    """Of one input: the lq image, x_t and the guide."""
    return lambda x: net(x[:, :6], LEVEL.to(x).expand(len(x)), x[:, 6:])


def build(kind):
    torch.manual_seed(1)
    released = {"released_padding": kind.endswith("released")}
    make, channels = {
        "convs": (lambda: (Convs(), 1), 3),
        "strided": (lambda: (Strided(), 2), 3),
        "sid": (lambda: (net := SIDUNet(width=4, levels=3, **released).eval(), net.stride), 3),
        "ucdir": (lambda: (joined(net := denoiser(**released)), net.stride), 9),
    }[kind.split("_")[0]]
    net, stride = make()
    return net, channels, stride


@pytest.mark.parametrize("size", [(97, 131), (64, 79), (83, 23)])
@pytest.mark.parametrize("kind", ["convs", "strided", "sid", "ucdir"])
def test_tiled_equals_whole(kind, size):
    net, channels, stride = build(kind)
    radius = receptive_field(net, channels, stride)
    grid = Grid.aligned(*size, 2 * radius + 16, radius, stride)
    assert len(grid.tiles) > 1
    x = normal((2, channels, *size), "image")
    whole = net(x)
    for tile_batch in (1, 4, 100):
        torch.testing.assert_close(tiled(net, grid, x, tile_batch=tile_batch), whole, rtol=0, atol=1e-5)
    less = tiled(net, Grid.aligned(*size, 2 * radius + 16, 0, stride), x)
    assert (less - whole).abs().max() > 1e-3  # the overlap is what does it


@pytest.mark.parametrize("kind", ["sid_released", "ucdir_released"])
def test_tiled_equals_whole_with_the_padding_of_the_release(kind):
    """To multiples of 32, at which patches then have to start, whatever the number of levels."""
    net, channels, stride = build(kind)
    assert stride == 32
    x = normal((1, channels, 159, 127), "image")  # padded by one pixel
    grid = Grid.aligned(159, 127, 96, 30, stride)
    assert len(grid.tiles) > 1
    torch.testing.assert_close(tiled(net, grid, x), net(x), rtol=0, atol=1e-5)
    misaligned = Grid.aligned(159, 127, 84, 30, 4)
    assert (tiled(net, misaligned, x) - net(x)).abs().max() > 1e-3


def pair():
    torch.manual_seed(1)
    return UCDIR(denoiser=LOCAL, predictor={"type": "SIDUNet", "width": 4, "levels": 3}).eval()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_restoring_in_patches_equals_restoring_the_whole(sampler):
    net, size = pair(), (99, 141)
    radius = net.denoise_fn.receptive_field
    lq = normal((2, 3, *size), "lq").clamp(-1, 1)
    schedule = NoiseSchedule.linear(100, 1e-4, 0.1)

    def restore(**tiles):
        options = SamplingOptions(sampler=sampler, steps=4, **tiles)
        assert (sampling.plan(net, *size, options).patches > 1) == bool(tiles)
        return sampling.restore(net, lq, schedule, options, image_noise(0, ("a", "b")))

    initial, whole = restore()
    assert (whole - initial).std() > 0.1
    exact = {"tile": 2 * radius + 30, "overlap": radius}
    for tile_batch in (1, 3):
        in_patches = restore(**exact, tile_batch=tile_batch)
        torch.testing.assert_close(in_patches[0], initial, rtol=0, atol=1e-5)
        torch.testing.assert_close(in_patches[1], whole, rtol=0, atol=1e-5)
    assert torch.equal(restore(**exact, tile_batch=3, cache_mb=0)[1], in_patches[1])  # nothing kept between steps
    less = restore(tile=exact["tile"], overlap=radius // 5)
    torch.testing.assert_close(less[0], initial, rtol=0, atol=1e-5)  # the predictor has an overlap of its own
    assert (less[1] - whole).abs().max() > 1e-3


def test_blending_is_exact_where_one_patch_gives_the_result_and_only_there():
    """It makes use of what dropping drops: of what a patch knows too little of."""
    net, channels, stride = build("ucdir")
    x = normal((1, channels, 99, 141), "image")
    grid = Grid.aligned(99, 141, 90, 30, stride)
    several = torch.zeros(99, 141)
    for row, column in grid.tiles:
        several[row.start : row.stop, column.start : column.stop] += 1
    error = (tiled(net, grid, x, merge="blend") - net(x)).abs().amax((0, 1))
    assert several.max() > 1
    assert error[several == 1].max() < 1e-5
    assert error[several > 1].max() > 1e-3


def test_alignment_matters():
    """Where patches do not start at multiples of the stride, a strided network sees another image."""
    net, channels, _ = build("strided")
    x = normal((1, channels, 63, 63), "image")
    grid = Grid.aligned(63, 63, 30, 9)
    assert any(span.start % 2 for span in grid.rows)
    assert (tiled(net, grid, x) - net(x)).abs().max() > 1e-3


def by_perturbation(net, channels, stride, size):
    """Which results change, bit by bit, when everything beyond a cut does: in float64, with weights that cannot cancel."""
    x, cut, radius = torch.rand(1, channels, size, size, dtype=torch.float64), size // 2 // stride * stride, 0
    for dim in (2, 3):
        for start, length in ((0, cut), (cut, size - cut)):
            other = x.clone()
            other.narrow(dim, start, length).mul_(100).add_(1)
            changed = (net(other) != net(x)).movedim(dim, 0).flatten(1).any(1).nonzero()
            radius = max(radius, int(changed[-1]) + 1 - cut if start == 0 else cut - int(changed[0]))
    return radius


@pytest.mark.parametrize("levels, size", [(1, 24), (2, 40), (3, 96), (4, 160)])
def test_receptive_field_of_the_predictor(levels, size):
    net, stride = SIDUNet(width=2, levels=levels).eval(), 2 ** (levels - 1)
    for parameter in net.parameters():
        parameter.abs_()
    radius = receptive_field(net, 3, stride)
    assert radius == by_perturbation(net.double(), 3, stride, size)
    assert receptive_field(net.float(), 3, stride, limit=radius) == radius
    assert receptive_field(net, 3, stride, limit=radius - 1) is None


@pytest.mark.parametrize("levels, res_blocks, size", [(1, 1, 40), (1, 2, 40), (2, 1, 80), (3, 1, 160)])
def test_receptive_field_of_the_denoiser(levels, res_blocks, size):
    net = denoiser(channel_mults=[1, 2, 1][:levels], res_blocks=res_blocks).double()
    assert net.receptive_field == by_perturbation(joined(net), 9, net.stride, size)
    guide_only = by_perturbation(lambda x: net(torch.ones(1, 6, size, size).to(x), guide=x), 3, net.stride, size)
    assert 0 < guide_only <= net.receptive_field


def test_receptive_field_of_deep_denoisers():
    """Beyond the limit of the general function; and its own bound is one."""
    assert denoiser(channel_mults=[1] * 5, res_blocks=2).receptive_field == 410  # the depth of the release
    assert denoiser(channel_mults=[1] * 6, res_blocks=3).receptive_field > 1024
    for levels in (1, 2, 3, 4):
        for res_blocks in (1, 3, 6):
            assert denoiser(channel_mults=[1] * levels, res_blocks=res_blocks).receptive_field


def test_receptive_field_of_the_denoiser_is_measured_once_without_a_trace():
    net = denoiser(channel_mults=[1, 1])
    ucdir_arch._receptive_field.cache_clear()
    state = torch.get_rng_state()
    radius = net.receptive_field
    assert torch.equal(torch.get_rng_state(), state)
    net = denoiser(
        channel_mults=[2, 1], norm="layernorm2d", attn_res=[5], released_padding=True
    )  # no level of 5 pixels
    assert net.receptive_field == radius
    assert ucdir_arch._receptive_field.cache_info().misses == 1


@pytest.mark.parametrize("changes", [{"norm": "layernorm"}, {"mid_attn": True}, {"attn_res": [64]}])
def test_global_denoisers_have_no_receptive_field(changes, monkeypatch):
    monkeypatch.setattr(tiling, "receptive_field", None)  # nor is there anything to measure
    net = denoiser(**changes)
    assert net.receptive_field is None
    monkeypatch.undo()
    assert receptive_field(joined(net), 9, 2, limit=100) is None


def test_receptive_field_known_by_hand():
    assert receptive_field(nn.Conv2d(1, 1, 1), 1) == 0
    assert receptive_field(nn.Conv2d(2, 1, 7, padding=3), 2) == 3
    assert receptive_field(nn.Conv2d(1, 1, (3, 9), padding=(1, 4)), 1) == 4
    assert receptive_field(nn.Conv2d(1, 1, 3, padding=40, dilation=40), 1) == 40
    assert receptive_field(lambda x: x, 3) == 0
    assert receptive_field(lambda x: F.pad(x, (0, 5, 0, 0))[..., 5:], 1) == 5  # looks to one side only
    assert receptive_field(lambda x: F.pad(x, (0, 0, 6, 0))[..., :-6, :], 1) == 6
    assert receptive_field(SIDUNet(width=2).eval(), 3, 16) == 94  # the released predictor's
    for start in (1, 3, 20, 21, 500):
        assert receptive_field(nn.Conv2d(1, 1, 41, padding=20), 1, start=start) == 20
        assert receptive_field(nn.Conv2d(1, 1, 41, padding=20), 1, limit=20, start=start) == 20
        assert receptive_field(nn.Conv2d(1, 1, 41, padding=20), 1, limit=19, start=start) is None
    for scale in (2, 3):  # in pixels of the input
        net = nn.Sequential(nn.Conv2d(1, scale**2, 5, padding=2), nn.PixelShuffle(scale))
        assert receptive_field(net, 1) == 2
        assert receptive_field(nn.Sequential(net, nn.Conv2d(1, 1, 3, padding=1)), 1) == 3


@pytest.mark.parametrize("layer", [nn.GroupNorm(1, 4), nn.AdaptiveAvgPool2d(1)])
def test_global_networks_have_no_receptive_field(layer):
    assert receptive_field(lambda x: x + layer(x), 4, limit=100) is None


# Splitting


def groupnorm_net():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(9, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    return lambda x, level, lq, initial: net(torch.cat((x, lq, initial), 1)) * level.view(-1, 1, 1, 1)


@pytest.mark.parametrize("merge", ["drop", "blend"])
@pytest.mark.parametrize("grid", [Grid.aligned(50, 71, 24, 5, 2), Grid.released(50, 71, 24, 5)])
def test_batches_of_tiles_equal_single_tiles_and_images(grid, merge):
    net = groupnorm_net()
    x, lq, initial = (normal((3, 3, 50, 71), "batch", i) for i in range(3))
    level = torch.tensor([0.2, 0.5, 0.9])
    one = torch.cat(
        [
            split(net, grid, (lq[i : i + 1], initial[i : i + 1]), merge=merge)(x[i : i + 1], level[i : i + 1])
            for i in range(3)
        ]
    )
    for tile_batch in (1, 3, 7, 1000):
        many = split(net, grid, (lq, initial), tile_batch=tile_batch, merge=merge)(x, level)
        torch.testing.assert_close(many, one, rtol=0, atol=1e-5)
    assert (one - net(x, level, lq, initial)).abs().max() > 1e-2  # GroupNorm sees the patch


def test_no_call_exceeds_the_tile_batch_and_each_has_one_size():
    sizes = []
    grid = Grid.aligned(101, 97, 40, 6, 4)
    tiled(lambda x: sizes.append(x.shape) or x, grid, torch.zeros(2, 1, 101, 97), tile_batch=3)
    assert sum(shape[0] for shape in sizes) == 2 * len(grid.tiles)
    assert max(shape[0] for shape in sizes) == 3
    assert max(shape[-1] for shape in sizes) <= 40


@pytest.mark.parametrize("merge", ["drop", "blend"])
@pytest.mark.parametrize("size", [(50, 71), (20, 90), (1, 1), (13, 7)])
def test_merging_what_was_split_gives_the_image(size, merge):
    x = normal((2, 3, *size), "merge")
    for grid in (Grid.aligned(*size, 24, 5, 2), Grid.aligned(*size, 24, 0, 2), Grid.released(*size, 24, 11)):
        out = tiled(lambda patch: patch, grid, x, tile_batch=2, merge=merge)
        torch.testing.assert_close(out, x, rtol=0, atol=0 if merge == "drop" else 1e-5)


@pytest.mark.parametrize("grid", [Grid.aligned(8, 100, 40, 10), Grid.aligned(8, 100, 64, 5, 32)])
def test_blending_is_smooth_where_dropping_jumps(grid):
    def steps(merge):
        values = iter(range(100))
        out = tiled(lambda patch: torch.full_like(patch, next(values)), grid, torch.zeros(1, 1, 8, 100), merge=merge)
        assert (out.min(), out.max()) == (0, len(grid.tiles) - 1)
        return out[0, 0, 0].diff()

    assert steps("drop").max() == 1
    assert steps("blend").max() < 0.16  # sin^2 over two overlaps: at most pi / 2 / 10 a pixel
    assert steps("blend").min() >= 0


def test_what_is_split_and_what_is_passed_on():
    x = normal((2, 3, 30, 30), "inputs")
    level, label = torch.tensor([0.1, 0.9]), torch.tensor([[1, 2], [3, 4]])
    seen = []

    def function(x, level, mask, label, scalar, strength, nothing):
        seen.append((x, level, mask, label))
        assert (scalar, strength, nothing) == (torch.tensor(3.0), 0.5, None)
        return x[:, :1]

    grid = Grid.aligned(30, 30, 20, 4)
    out = tiled(function, grid, x, level, x[:, :1] + 1, label, torch.tensor(3.0), 0.5, None, tile_batch=3)
    assert out.shape == (2, 1, 30, 30)
    for patch, levels, mask, labels in seen:
        assert torch.equal(mask, patch[:, :1] + 1)
        assert len(patch) == len(levels) == len(labels)
        assert torch.equal(labels[:, 0] == 3, levels > 0.5)
    assert sorted({float(v) for _, levels, _, _ in seen for v in levels}) == pytest.approx([0.1, 0.9])


def test_inputs_that_do_not_fit():
    grid = Grid.aligned(30, 30, 20, 4)
    x = torch.zeros(2, 3, 30, 30)
    with pytest.raises(ValueError, match=r"an input of \(15, 15\) in a grid for \(30, 30\)"):
        tiled(lambda x, guide: x, grid, x, torch.zeros(2, 3, 15, 15))
    with pytest.raises(ValueError, match="an input of 1 in a batch of 2"):
        tiled(lambda x, level: x, grid, x, LEVEL)
    with pytest.raises(ValueError, match="drop, blend, got 'mean'"):
        tiled(lambda x: x, grid, x, merge="mean")
    with pytest.raises(UserError, match="tile_batch must be at least 1, got 0"):
        tiled(lambda x: x, grid, x, tile_batch=0)
    with pytest.raises(ValueError, match="one image at a time, got 2"):
        per_patch(lambda number, x: x, grid, (x,))


# Networks that enlarge


def enlarging(scale):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2 * scale**2, 5, padding=2), nn.PixelShuffle(scale)
    )


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("size", [(50, 71), (1, 64)])
def test_patches_of_a_network_that_enlarges(scale, size):
    net, x = enlarging(scale), normal((2, 3, *size), "enlarged")
    whole = net(x)
    assert whole.shape[1:] == (2, scale * size[0], scale * size[1])
    for tile_batch in (1, 4):
        grid = Grid.aligned(*size, 24, 3)
        assert len(grid.tiles) > 1
        torch.testing.assert_close(tiled(net, grid, x, tile_batch=tile_batch), whole, rtol=0, atol=1e-5)
    assert (tiled(net, Grid.aligned(*size, 24, 0), x) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("merge", ["drop", "blend"])
@pytest.mark.parametrize("size", [(50, 71), (13, 7)])
def test_merging_what_was_split_and_enlarged(scale, merge, size):
    """What each pixel becomes does not depend on the patch, so that all grids and windows must give the same."""
    enlarge = lambda x: F.interpolate(x, scale_factor=scale, mode="nearest")  # noqa: E731
    x = normal((2, 3, *size), "merge")
    for grid in (Grid.aligned(*size, 24, 5, 2), Grid.aligned(*size, 24, 0, 2), Grid.released(*size, 24, 11)):
        out = tiled(enlarge, grid, x, tile_batch=2, merge=merge)
        torch.testing.assert_close(out, enlarge(x), rtol=0, atol=0 if merge == "drop" else 1e-5)


def test_blending_is_as_smooth_where_patches_are_enlarged():
    def result(scale):
        values = iter(range(100))
        paint = lambda x: torch.full((1, 1, scale * 8, scale * x.shape[-1]), next(values))  # noqa: E731
        return tiled(paint, Grid.aligned(8, 100, 40, 10), torch.zeros(1, 1, 8, 100), merge="blend")[0, 0, 0]

    assert result(4).diff().max() < 0.16 / 4  # the same ramps, over four times as many pixels
    torch.testing.assert_close(result(3)[1::3], result(1))  # the middle of three has its parent's weight


@pytest.mark.parametrize(
    "change, size",
    [
        (lambda x: F.interpolate(x, scale_factor=(2.0, 1.0)), "38x19"),
        (lambda x: F.interpolate(x, scale_factor=(1.0, 2.0)), "19x38"),
        (lambda x: F.interpolate(x, scale_factor=1.5), "28x28"),
        (lambda x: F.interpolate(x, scale_factor=0.5), "9x9"),
        (lambda x: x[..., 1:, :], "18x19"),
        (lambda x: x[..., :0, :0], "0x0"),
    ],
)
def test_patches_may_only_be_enlarged_by_a_whole_factor(change, size):
    x, made = torch.zeros(1, 3, 30, 30), []
    with pytest.raises(UserError, match=f"turns a patch of 19x19 into {size}: .* by one whole factor"):
        tiled(change, Grid.aligned(30, 30, 20, 4), x, empty=made.append)
    assert not made


def test_all_patches_must_be_enlarged_alike():
    factors = iter((2, 2, 3))
    with pytest.raises(UserError, match="turns a patch of 19x19 into 57x57: .* by one whole factor"):
        tiled(
            lambda x: F.interpolate(x, scale_factor=next(factors)),
            Grid.aligned(30, 30, 20, 4),
            torch.zeros(1, 3, 30, 30),
        )


def test_a_denoiser_must_keep_the_size():
    denoise = split(lambda x, level: F.interpolate(x, scale_factor=2.0), Grid.aligned(30, 30, 20, 4))
    with pytest.raises(UserError, match="turns a patch of 19x19 into 38x38: .*scale 1"):
        denoise(torch.zeros(1, 3, 30, 30), LEVEL)


def test_result_has_the_dtype_of_the_image():
    grid = Grid.aligned(30, 30, 20, 4)
    for merge in ("drop", "blend"):
        x = normal((1, 1, 30, 30), "dtype")
        out = tiled(lambda x: x.bfloat16(), grid, x, merge=merge)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, x, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_sampling_in_patches_equals_sampling_the_whole(name):
    torch.manual_seed(1)
    net = Strided(9)
    radius = receptive_field(net, 9, 2)
    size = (47, 53)
    lq, initial = (normal((1, 3, *size), "whole", i) for i in range(2))
    denoise = lambda x, level, lq, initial: net(torch.cat((x, lq, initial), 1)) * level.view(-1, 1, 1, 1)  # noqa: E731
    schedule = NoiseSchedule.linear(100, 1e-4, 0.1).respace(4, "trailing")
    sample = samplers.SAMPLERS[name].sample
    patches = split(denoise, Grid.aligned(*size, 30, radius, 2), (lq, initial), tile_batch=3)
    noise = lambda draw: normal((1, 3, *size), "noise", draw)  # noqa: E731
    whole = sample(lambda x, level: denoise(x, level, lq, initial), schedule, noise)
    torch.testing.assert_close(sample(patches, schedule, noise), whole, rtol=0, atol=1e-4)


# What does not change between steps


def prepared(cache_bytes, tile_batch=2):
    size, calls = (44, 44), []  # patches of 20 x 20
    lq = normal((1, 3, *size), "lq")

    def prepare(lq):
        calls.append(lq.shape)
        return {"features": [lq.exp()], "half": (lq[:, :1] / 2,)}

    def denoise(x, level, lq, state):
        assert torch.equal(state["features"][0], lq.exp())
        return x * level.view(-1, 1, 1, 1) + state["features"][0] + state["half"][0]

    grid = Grid.aligned(*size, 20, 4)
    run = split(denoise, grid, (lq,), tile_batch=tile_batch, prepare=prepare, cache_bytes=cache_bytes)
    for step in range(3):
        x = normal((1, 3, *size), "x", step)
        torch.testing.assert_close(run(x, LEVEL), x * 0.6 + lq.exp() + lq[:, :1] / 2)
    return len(grid.tiles), calls


def test_prepare_is_called_once_for_each_patch():
    tiles, calls = prepared(2**20)
    assert sum(shape[0] for shape in calls) == tiles


def test_prepare_is_called_anew_beyond_the_budget():
    tiles, calls = prepared(0, 1)
    assert len(calls) == 3 * tiles
    one = 4 * (3 + 1) * 20 * 20  # channels of the results of one patch
    _, calls = prepared(2 * one, 1)
    assert len(calls) == 2 + 3 * (tiles - 2)
    _, calls = prepared(2 * one - 1, 1)
    assert len(calls) == 1 + 3 * (tiles - 1)


# Each patch on its own


def test_per_patch_samples_each_patch_with_its_own_noise():
    grid = Grid.aligned(40, 50, 20, 4)
    schedule = NoiseSchedule.linear(100, 1e-4, 0.1).respace(3)
    lq = normal((1, 3, 40, 50), "lq")
    net = nn.Conv2d(6, 3, 3, padding=1)
    numbers = []

    def sample(number, lq):
        numbers.append(number)
        denoise = lambda x, level: net(torch.cat((x, lq), 1))  # noqa: E731
        return samplers.ddpm(denoise, schedule, lambda draw: normal(lq.shape, "patch", number, draw))

    result = per_patch(sample, grid, (lq,))
    assert numbers == list(range(len(grid.tiles)))
    row, column = grid.tiles[4]
    alone = sample(4, lq[..., row.start : row.stop, column.start : column.stop])
    kept = (slice(row.keep_start, row.keep_stop), slice(column.keep_start, column.keep_stop))
    inner = (slice(kept[0].start - row.start, kept[0].stop - row.start), slice(kept[1].start - column.start, kept[1].stop - column.start))  # fmt: skip
    torch.testing.assert_close(result[0, :, kept[0], kept[1]], alone[0, :, inner[0], inner[1]])


# Memory


class Peak(TorchDispatchMode):
    """The largest number of bytes that large tensors made within had at once."""

    def __init__(self, smallest):
        super().__init__()
        self.smallest, self.live, self.bytes = smallest, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.smallest:
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("name, images", [("ddpm", 2), ("ddim", 2), ("dpmpp_2m", 3), ("dpmpp_2m_sde", 3), ("heun", 3)])
def test_only_a_few_tensors_of_the_images_size(name, images, monkeypatch):
    """ddpm: the state, and eps that becomes x_0 and the next state; or the state and the noise of the step."""
    monkeypatch.setattr(samplers, "STRIP_ELEMENTS", 2**14)
    size = (1, 3, 256, 256)
    net = nn.Conv2d(3, 3, 3, padding=1)
    denoise = split(lambda x, level: net(x), Grid.aligned(256, 256, 64, 4))
    schedule = NoiseSchedule.linear(100, 1e-4, 0.1).respace(4)
    one = 4 * 3 * 256 * 256
    with Peak(one // 2) as peak:
        samplers.SAMPLERS[name].sample(denoise, schedule, lambda draw: normal(size, draw))
    assert peak.bytes == images * one


def test_the_result_can_live_elsewhere(tmp_path):
    """As in a memory-mapped file: the state is then what was allocated, at every step but the first."""
    made = []

    def empty(shape, dtype, device):
        path, count = str(tmp_path / str(len(made))), int(np.prod(shape))
        made.append(torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape))
        return made[-1]

    size = (1, 3, 40, 40)
    denoise = split(lambda x, level: x * 0.5, Grid.aligned(40, 40, 20, 2), empty=empty)
    schedule = NoiseSchedule.linear(100, 1e-4, 0.1).respace(3)
    result = samplers.ddpm(denoise, schedule, lambda draw: normal(size, draw))
    assert len(made) == 3
    assert result.data_ptr() == made[-1].data_ptr()
    expected = samplers.ddpm(lambda x, level: x * 0.5, schedule, lambda draw: normal(size, draw))
    assert torch.equal(result, expected)
