"""The degradation model: convolutions, known operators, starts, constraints, and the kernel steps on a known x_0."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from ucdir_plugin.diffusion.bird import kernel_steps as steps
from ucdir_plugin.diffusion.bird.degradation import Degradation, convolve, project_simplex, start_kernel
from ucdir_plugin.diffusion.bird.operators import BlockMean, ChannelMean, Compose, HoleMask, Operator
from ucdir_plugin.utils.errors import UserError


def kernels(batch, size, mixing=False):
    return torch.rand(batch, 3, 3 if mixing else 1, size, size)


@pytest.mark.parametrize("mixing", [False, True], ids=["depthwise", "mixing"])
@pytest.mark.parametrize("padding", ["reflect", "zeros", "valid"])
def test_each_image_has_its_own_kernel(padding, mixing):
    x, k = torch.rand(2, 3, 9, 7), kernels(2, 5, mixing)
    found = convolve(x, k, padding)
    for i in range(2):
        image = x[i : i + 1]
        if padding == "reflect":
            image = F.pad(image, (2,) * 4, mode="reflect")
        pads = 2 if padding == "zeros" else 0
        expected = F.conv2d(image, k[i], padding=pads, groups=1 if mixing else 3)
        torch.testing.assert_close(found[i : i + 1], expected)


def test_reflection_where_the_image_is_too_small():
    assert convolve(torch.rand(1, 3, 3, 9), kernels(1, 9)).shape == (1, 3, 3, 9)


KNOWN = (torch.rand(2, 1, 8, 12) > 0.25).float()
OPERATORS = {
    "identity": Operator(),
    "block mean": BlockMean(4),
    "hole mask": HoleMask(KNOWN),
    "channel mean": ChannelMean(),
    "gray and small": Compose([BlockMean(2), ChannelMean()]),
    "gray with holes": Compose([ChannelMean(), HoleMask(KNOWN)]),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("padding", ["reflect", "valid"])
def test_adjoint(operator, padding):
    """<D x, y> = <x, D^T y>, of the linear part; and what D gives has the observed size."""
    border = 2 if padding == "valid" else 0
    x = torch.rand(2, 3, 8 + 2 * border, 12 + 2 * border, dtype=torch.float64)
    d = Degradation(kernels(2, 5).double(), torch.rand(2, 1, 8, 12), operator, padding)
    seen = d.linear()(x)
    y = torch.rand_like(seen)
    torch.testing.assert_close((seen * y).sum(), (x * d.adjoint(x)(y)).sum())
    assert not torch.allclose(d(x), seen)  # the mask counts
    assert operator.lift(y, 3).shape == (2, 3, 8, 12)


def test_operators_by_hand():
    x = torch.arange(32.0).view(1, 1, 4, 8).expand(1, 3, 4, 8)
    torch.testing.assert_close(BlockMean(4)(x)[0, 0], torch.tensor([[13.5, 17.5]]))
    torch.testing.assert_close(ChannelMean()(x * torch.tensor([0.0, 1, 5]).view(1, 3, 1, 1)), 2 * x[:, :1])
    known = torch.ones(1, 1, 4, 8)
    known[..., 2:, 3] = 0
    hole = HoleMask(known)
    assert hole(x)[..., 2:, 3].eq(0).all()
    torch.testing.assert_close(hole(x)[..., :3], x[..., :3])


def test_the_loss_is_over_what_was_observed():
    known = torch.ones(1, 1, 4, 4)
    known[..., :2] = 0
    d = Degradation(start_kernel(1, 1), None, HoleMask(known))
    y = torch.rand(1, 3, 4, 4)
    x = y + torch.where(known == 0, torch.tensor(9.0), torch.tensor(0.5))
    torch.testing.assert_close(d.loss(x, y), torch.tensor([0.25]))


def test_holes_are_filled_from_their_borders():
    known = torch.ones(1, 1, 12, 12)
    known[..., 3:9, 3:9] = 0
    y = torch.full((1, 3, 12, 12), 0.7)
    torch.testing.assert_close(HoleMask(known).lift(y * known, 3), y)


def test_differentiable_to_second_input():
    d = Degradation(
        kernels(1, 3).double().requires_grad_(), torch.rand(1, 1, 6, 6).double().requires_grad_(), ChannelMean()
    )
    x = torch.rand(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k, m, x: d.learned(k, m)(x), (d.kernel, d.mask, x))


def test_simplex_is_the_nearest_point():
    k = torch.randn(4, 3, 1, 3, 3)
    p = project_simplex(k)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum((2, 3, 4)), torch.ones(4, 3))
    torch.testing.assert_close(project_simplex(p), p)
    # Optimality: the residual has one value on the support and is below it elsewhere.
    residual, support = (k - p).flatten(3), p.flatten(3) > 0
    top = residual.masked_fill(~support, -math.inf).amax(-1, keepdim=True)
    torch.testing.assert_close(residual[support], top.expand_as(residual)[support])
    assert (residual <= top + 1e-6).all()
    mixed = project_simplex(torch.randn(2, 3, 3, 3, 3))
    torch.testing.assert_close(mixed.sum((2, 3, 4)), torch.ones(2, 3))  # a row of channels together
    assert project_simplex(torch.tensor([[[0.95, 0.03], [0.02, 0.0]]]), 0.05).tolist() == [[[1, 0], [0, 0]]]


def test_starts():
    delta = start_kernel(2, 5)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(convolve(x, delta), x)
    torch.testing.assert_close(convolve(x, start_kernel(2, 5, mixing=True)), x)
    gaussian = start_kernel(1, 9, "gaussian", sigma=1.0)[0, 0, 0]
    assert float(gaussian[4, 5] / gaussian[4, 4]) == pytest.approx(math.exp(-0.5))
    for start in ("delta", "gaussian", "edges", "random"):
        torch.testing.assert_close(start_kernel(1, 7, start).sum((2, 3, 4)), torch.ones(1, 3))
    raw = start_kernel(2, 3, "random", total=None, key=(5, "a.png"))
    assert 0 <= float(raw.min()) < float(raw.max()) < 0.01
    torch.testing.assert_close(raw, start_kernel(2, 3, "random", total=None, key=(5, "a.png")))
    assert not torch.equal(raw, start_kernel(2, 3, "random", total=None, key=(6, "a.png")))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: start_kernel(1, 4), "got 4, take 3 or 5"),
        (lambda: Degradation(torch.rand(1, 3, 1, 4, 4)), "odd size"),
        (lambda: start_kernel(1, 3, "box"), "box"),
        (lambda: Degradation(start_kernel(1, 3), padding="circular"), "circular"),
        (lambda: HoleMask(torch.full((1, 1, 4, 4), 0.5)), "0 .hole. and 1"),
        (lambda: HoleMask(torch.zeros(1, 1, 4, 4)), "leaves nothing"),
        (lambda: HoleMask(torch.ones(1, 1, 4, 5))(torch.rand(1, 3, 4, 4)), "5x4, the image 4x4"),
        (lambda: BlockMean(4)(torch.rand(1, 3, 6, 8)), "8x6 has no whole blocks of 4"),
        (lambda: BlockMean(0), "factor"),
        (lambda: Compose([HoleMask(torch.ones(1, 1, 4, 4)), ChannelMean()]), "last"),
        (lambda: Degradation(start_kernel(1, 3), torch.zeros(1, 1, 4, 5))(torch.rand(1, 3, 4, 4)), "must agree"),
        (lambda: steps.Gradient(rate=-1.0), "rate"),
        (lambda: steps.Gradient(iterations=0), "iterations"),
        (
            lambda: steps.LeastSquares().check(None, Degradation(start_kernel(1, 3), None, BlockMean(2))),
            "without holes",
        ),
        (lambda: steps.LeastSquares().check(None, Degradation(start_kernel(1, 3, mixing=True))), "mixing"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize("mixing", [False, True], ids=["depthwise", "mixing"])
@pytest.mark.parametrize("colour", [(1, 1, 1), (1, 0.1, 0.1)], ids=["gray", "red"])
def test_a_rate_beyond_the_bound_is_warned_of_and_indeed_diverges(colour, mixing):
    """The bound is that of the strongest channel, and of all together where they are mixed."""
    x = torch.rand(1, 3, 24, 24) * torch.tensor(colour).view(1, 3, 1, 1)
    truth = start_kernel(1, 5, "gaussian", sigma=1.0, mixing=mixing)
    y = Degradation(truth)(x)
    d = Degradation(start_kernel(1, 5, mixing=mixing))
    bound = float(steps.Gradient.bound(x, d))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.Gradient(rate=0.9 * bound).check(x, d)
    with pytest.warns(UserWarning, match=f"{bound:.3g}"):
        steps.Gradient(rate=1.5 * bound).check(x, d)
    inside, beyond = d, d
    for _ in range(80):
        inside = steps.Gradient(rate=0.95 * bound, simplex=False)(x, [y], inside, 0, 0)
        beyond = steps.Gradient(rate=2 * bound, simplex=False)(x, [y], beyond, 0, 0)
    assert float(inside.loss(x, y)) < float(d.loss(x, y)) < 1 < float(beyond.loss(x, y))
    power = x.square().mean((0, 2, 3))
    assert bound == pytest.approx(3 / (25 * float(power.sum() if mixing else power.max())), rel=1e-5)


def test_nothing_is_learned_above_a_noise():
    """An x_0 of much noise is no image yet."""
    x = torch.rand(1, 3, 16, 16)
    y = Degradation(start_kernel(1, 3, "gaussian"))(x)
    d = Degradation(start_kernel(1, 3))
    step = steps.Gradient(below=0.5)
    assert step(x, [y], d, 0.51, 0) is d
    assert torch.equal(step(x, [y], d, 0.5, 0).kernel, steps.Gradient()(x, [y], d, 0.51, 0).kernel)
    with pytest.raises(UserError, match="below must be a number"):
        steps.Gradient(below=-1.0)


@pytest.mark.parametrize("padding", ["reflect", "zeros", "valid"])
@pytest.mark.parametrize("mixing", [False, True], ids=["depthwise", "mixing"])
def test_kernel_converges_where_x0_is_the_truth(padding, mixing):
    x = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    truth = project_simplex(kernels(2, 3, mixing).double())
    y = Degradation(truth, padding=padding)(x)
    found = Degradation(start_kernel(2, 3, mixing=mixing).double(), padding=padding)
    found = steps.Gradient(iterations=1500 if mixing else 600)(x, [y], found, 0, 0)
    torch.testing.assert_close(found.kernel, truth, rtol=0, atol=1e-3)


def test_kernel_and_mask_converge_together():
    """The gain and the mask of low light: no constraint on the sum, the mask pixel by pixel."""
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    truth = 0.2 * start_kernel(1, 3, "gaussian", sigma=0.7).double()
    ramp = torch.linspace(0, 0.1, 16, dtype=torch.float64).expand(1, 1, 16, 16)
    y = Degradation(truth, ramp)(x)
    found = Degradation(start_kernel(1, 3, total=0.5).double(), torch.zeros(1, 1, 16, 16, dtype=torch.float64))
    found = steps.Gradient(mask_rate=0.3, simplex=False, iterations=2500)(x, [y], found, 0, 0)
    torch.testing.assert_close(found.kernel, truth, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.mask, ramp, rtol=0, atol=1e-3)


def test_the_mask_hardly_moves_at_the_papers_rate():
    x, truth = torch.rand(1, 3, 16, 16), torch.full((1, 1, 16, 16), 0.1)
    d = Degradation(start_kernel(1, 3), torch.zeros(1, 1, 16, 16))
    y = Degradation(d.kernel, truth)(x)
    slow = steps.Gradient(rate=0.0, mask_rate=1.0, mask_per_pixel=False, simplex=False)(x, [y], d, 0, 0)
    quick = steps.Gradient(rate=0.0, mask_rate=0.25, simplex=False)(x, [y], d, 0, 0)
    assert float(slow.mask.mean()) < 0.01 * 0.1
    torch.testing.assert_close(quick.mask, truth / 2)


def natural(batch, size, seed=0):
    from ucdir_plugin.diffusion.noise import normal
    from ucdir_plugin.diffusion.prior import GaussianPrior

    return (GaussianPrior.natural(size, size, 0.35).sample(normal((batch, 3, size, size), seed, "x")) + 1) / 2


def test_least_squares_finds_the_kernel_of_a_known_image():
    x = natural(2, 72).double()
    truth = torch.cat((start_kernel(1, 9, "gaussian", sigma=1.5), start_kernel(1, 9, "gaussian", sigma=2.0))).double()
    truth = truth[:, :1].expand(2, 3, 1, 9, 9)
    y = Degradation(truth, padding="valid")(x)
    found = Degradation(start_kernel(2, 9).double(), padding="valid")
    for _ in range(5):
        found = steps.LeastSquares(quantile=0.0, threshold=0.0)(x, [y], found, 0.0, 0.0)
    error = (found.kernel - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    assert float(error.max()) < 0.1, error
    torch.testing.assert_close(found.kernel.sum((2, 3, 4)), torch.ones(2, 3, dtype=torch.float64))


def test_least_squares_knows_left_from_right():
    """The orientation of correlation: a kernel without symmetry, from an exact image."""
    x = natural(1, 60).double()
    truth = torch.zeros(5, 5, dtype=torch.float64)
    truth[1, 2], truth[2, 2], truth[3, 3] = 0.5, 0.3, 0.2
    truth = truth.expand(1, 3, 1, 5, 5)
    y = Degradation(truth, padding="valid")(x)
    found = steps.LeastSquares(quantile=0.0, threshold=0.0, centroid=0.0)(
        x, [y], Degradation(start_kernel(1, 5).double(), padding="valid"), 0.0, 0.0
    )
    assert float((found.kernel - truth).norm() / truth.norm()) < 0.15


def test_least_squares_of_gray_observations():
    x = natural(1, 60).double()
    truth = start_kernel(1, 5, "gaussian", sigma=1.0).double()
    colour = Degradation(truth, padding="valid")
    gray = Degradation(truth, None, ChannelMean(), "valid")
    step = steps.LeastSquares(quantile=0.0)
    start = start_kernel(1, 5).double()
    found = step(x, [gray(x)], Degradation(start, None, ChannelMean(), "valid"), 0.0, 0.0)
    expected = step(
        x.mean(1, keepdim=True).expand_as(x),
        [colour(x.mean(1, keepdim=True).expand_as(x))],
        Degradation(start, padding="valid"),
        0.0,
        0.0,
    )
    torch.testing.assert_close(found.kernel, expected.kernel)


@pytest.mark.parametrize("step", [steps.Gradient(), steps.LeastSquares()], ids=["gradient", "least squares"])
def test_a_batch_equals_single_images(step):
    x = natural(3, 40)
    truth = kernels(3, 5)
    y = Degradation(project_simplex(truth), padding="valid")(x)
    start = Degradation(start_kernel(3, 5), padding="valid")
    together = step(x, [y], start, 0.1, 0.03).kernel
    for i in range(3):
        one = slice(i, i + 1)
        alone = step(x[one], [y[one]], start.learned(start.kernel[one], None), 0.1, 0.03).kernel
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-6)
