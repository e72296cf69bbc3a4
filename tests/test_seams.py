"""The seam score, and that inter-step patch splitting leaves no seams where sampling per patch does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data
from torch import nn

from ucdir_plugin.diffusion import samplers
from ucdir_plugin.diffusion.noise import normal
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.diffusion.tiling import Grid, per_patch, split
from ucdir_plugin.metrics import seam_score


def test_score_of_known_images():
    ramp = np.add.outer(np.arange(8.0), np.arange(12.0))  # every neighbour differs by 1
    assert seam_score(ramp, [4], [6]) == pytest.approx(1)
    step = ramp.copy()
    step[:, 6:] += 4
    assert seam_score(step, [], [6]) == pytest.approx(5)
    # 12 differences of 1 across the row, 8 of 5 across the column
    assert seam_score(step, [4], [6]) == pytest.approx((12 + 8 * 5) / 20)
    assert seam_score(step, [4], [3]) == pytest.approx(1 / ((72 * 1 + 72 * 1 + 8 * 5) / 152), rel=1e-6)
    assert seam_score(np.stack([step, step], -1), [], [6]) == pytest.approx(5)  # channels
    falling = 60 - 2 * step
    assert seam_score(falling.astype(np.uint8), [4], [6]) == seam_score(falling, [4], [6])  # unsigned numbers


def test_score_of_flat_images():
    flat = np.zeros((4, 6))
    assert seam_score(flat, [2], []) == 1
    flat[2:] = 1
    assert seam_score(flat, [2], []) == float("inf")


@pytest.mark.parametrize(
    "rows, columns, words",
    [([], [], "leave no seam"), ([4], [], "must be between 1 and 3"), ([], [0], "must be between 1 and 5"), ([1, 2, 3], [1, 2, 3, 4, 5], "or nothing else")],
)  # fmt: skip
def test_impossible_borders(rows, columns, words):
    with pytest.raises(ValueError, match=words):
        seam_score(np.zeros((4, 6)), rows, columns)


class HighPass(nn.Module):
    """Takes the fine part of x_t for the noise, normalized over the patch: all else of the noise becomes image."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, x, level):
        coarse = F.avg_pool2d(F.pad(x, (4,) * 4, mode="reflect"), 9, 1)
        return self.norm(x - coarse)


@torch.no_grad()
@pytest.mark.parametrize("grid", [Grid.aligned(160, 192, 64, 12), Grid.released(160, 192, 64, 12)])
def test_inter_step_splitting_leaves_no_seams(grid):
    photo = torch.from_numpy(data.astronaut()[100:260, 100:292]).permute(2, 0, 1)[None] / 127.5 - 1
    initial = F.avg_pool2d(F.pad(photo, (4,) * 4, mode="reflect"), 9, 1)
    net, schedule = HighPass(), NoiseSchedule.linear(2000, 1e-6, 1e-2).respace(10, "trailing")

    def sample(number, initial):
        return samplers.ddpm(net, schedule, lambda draw: normal(initial.shape, "seams", number, draw))

    def score(residual):
        return seam_score((initial + residual)[0].permute(1, 2, 0).numpy(), *grid.borders)

    def inter_step(**options):
        denoise = split(net, grid, tile_batch=4, **options)
        return samplers.ddpm(denoise, schedule, lambda draw: normal(initial.shape, "seams", "whole", draw))

    whole, split_up = sample("whole", initial), inter_step()
    assert whole.std() > 0.2  # much was made up
    assert (split_up - whole).abs().max() > 1e-3  # and the statistic did differ between patches
    assert score(split_up) == pytest.approx(score(whole), abs=0.05)
    assert score(split_up) < 1.15
    assert score(inter_step(merge="blend")) < 1.15
    assert score(per_patch(sample, grid, (initial,))) > 5
