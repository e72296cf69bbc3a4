"""Adaptive kernel convolution: equal to eq. 2 written out, in all its gradients, within its memory."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ucdir_plugin.archs.akgm import compiled as akgm_compiled
from ucdir_plugin.archs.akgm import convolution
from ucdir_plugin.archs.akgm import tiled as akgm_tiled
from ucdir_plugin.archs.akgm.convolution import adaptive_kernel_conv

# (B, C, N, H, W): tiny, one channel per group, one base; strips of rows, several images in a tile, rows beyond a tile; wide.
SHAPES = [
    (1, 16, 4, 5, 7),
    (2, 8, 8, 1, 1),
    (3, 16, 8, 1, 9),
    (2, 6, 1, 4, 3),
    (1, 64, 8, 33, 300),
    (9, 16, 8, 30, 31),
    (2, 24, 8, 70, 129),
    (1, 8, 2, 3, 5000),
    (2, 256, 8, 4, 5),
]


def operands(batch, channels, bases, height, width, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (batch, channels, height, width),
        (channels * bases, channels // bases, 3, 3),
        (channels * bases,),
        (batch, bases, height, width),
    )
    scales = (1, (9 * channels // bases) ** -0.5, 1, bases**-0.5)
    return [
        torch.randn(s, generator=generator, dtype=dtype).mul_(k).requires_grad_(requires_grad)
        for s, k in zip(shapes, scales)
    ]


def literal(x, weight, bias, mix):
    """Eq. 2: fuse the bases into one kernel and bias per position, then apply them to the neighbourhood."""
    batch, channels, height, width = x.shape
    bases = mix.shape[1]
    c = channels // bases
    kernel = torch.einsum("bnp,gcnk->bgckp", mix.flatten(2), weight.view(bases, c, bases, 9 * c))
    offset = torch.einsum("bnp,gcn->bgcp", mix.flatten(2), bias.view(bases, c, bases))
    neighbours = F.unfold(x, 3, padding=1).view(batch, bases, 9 * c, height * width)
    return (torch.einsum("bgckp,bgkp->bgcp", kernel, neighbours) + offset).reshape(x.shape)


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(params=["compiled", "tiled", "loop"])
def implementation(request, monkeypatch):
    """Each implementation in turn, in whatever way the inputs would be sent."""
    if request.param == "compiled" and not akgm_compiled.available():
        pytest.skip("the compiled AKGM cannot be built here: no compiler, or neither AVX2 nor AVX-512")
    module = {"compiled": akgm_compiled, "tiled": akgm_tiled, "loop": None}[request.param]
    monkeypatch.setattr(convolution, "choose", lambda x, bases: module)
    return request.param


@pytest.fixture
def tiled(monkeypatch):
    monkeypatch.setattr(convolution, "choose", lambda x, bases: akgm_tiled)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several strips, several images and uneven chunks of groups on small inputs."""
    monkeypatch.setattr(akgm_tiled, "TILE_POSITIONS", 20)
    monkeypatch.setattr(akgm_tiled, "TILE_ELEMENTS", 1500)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_equation_2(shape, implementation):
    inputs = operands(*shape)
    torch.testing.assert_close(adaptive_kernel_conv(*inputs), literal(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_those_of_equation_2(shape, implementation):
    inputs = operands(*shape, requires_grad=True)
    grad_y = torch.randn(shape[0], shape[1], *shape[3:], generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(adaptive_kernel_conv(*inputs), inputs, grad_y)
    expected = torch.autograd.grad(literal(*inputs), inputs, grad_y)
    for name, a, b in zip(("x", "weight", "bias", "mix"), found, expected):
        assert relative_error(a, b) < 1e-4, name


@pytest.mark.parametrize("shape", [(1, 8, 8, 5, 7), (2, 16, 4, 3, 5), (3, 16, 4, 1, 1), (5, 8, 8, 2, 3)], ids=str)
def test_gradcheck(shape, implementation, small_tiles):
    inputs = operands(*shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(adaptive_kernel_conv(*inputs), literal(*inputs), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(adaptive_kernel_conv, inputs, fast_mode=True)


def test_second_derivative():
    """Also where one input depends on another, as the weights M on the same features."""
    inputs = operands(1, 4, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(function, x, weight, bias, mix):
        return function(x, weight, bias, mix * x[:, :2].sin())

    found, expected = (
        torch.autograd.grad(call(function, *inputs).square().sum(), inputs, create_graph=True)
        for function in (adaptive_kernel_conv, literal)
    )
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradgradcheck(lambda *inputs: call(adaptive_kernel_conv, *inputs), inputs)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=4))[1:], ids=str)
def test_only_the_gradients_asked_for(needs, implementation, small_tiles):
    inputs = operands(3, 8, 4, 5, 7)
    for tensor, need in zip(inputs, needs):
        tensor.requires_grad_(need)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = torch.autograd.grad(adaptive_kernel_conv(*inputs).square().sum(), wanted)
    expected = torch.autograd.grad(literal(*inputs).square().sum(), wanted)
    for a, b in zip(found, expected):
        assert relative_error(a, b) < 1e-4


def test_any_strides(implementation, small_tiles):
    """Channels-last x and gradient, transposed weight and mix."""
    x, weight, bias, mix = operands(2, 16, 4, 6, 9)
    strided = [
        x.to(memory_format=torch.channels_last),
        weight.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack((bias, bias), 1)[:, 0],
        mix.transpose(1, 3).contiguous().transpose(1, 3),
    ]
    assert not any(t.is_contiguous() for t in strided)
    grad_y = torch.randn_like(strided[0])
    assert not grad_y.is_contiguous()
    results = []
    for inputs in ((x, weight, bias, mix), strided):
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = adaptive_kernel_conv(*inputs)
        assert implementation == "loop" or y.stride() == inputs[0].stride()
        results.append((y, *torch.autograd.grad(y, inputs, grad_y)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_images_do_not_touch(implementation):
    """Several small images share a tile."""
    inputs = operands(5, 16, 8, 6, 6)
    x, weight, bias, mix = inputs
    single = torch.cat([adaptive_kernel_conv(x[i : i + 1], weight, bias, mix[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(adaptive_kernel_conv(*inputs), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, implementation):
    inputs = operands(2, 16, 4, 12, 11, requires_grad=True)
    reference = literal(*inputs)
    grad_y = torch.randn_like(reference)
    expected = torch.autograd.grad(reference, inputs, grad_y)
    x, weight, bias, mix = inputs
    with torch.autocast("cpu", torch.bfloat16):
        y = adaptive_kernel_conv(x.to(dtype), weight, bias, mix.bfloat16())
    assert y.dtype == dtype
    assert relative_error(y.float(), reference) < 0.02
    for a, b in zip(torch.autograd.grad(y, inputs, grad_y.to(dtype)), expected):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 0.02


def test_bfloat16_is_computed_in_float32():
    inputs = [t.bfloat16().requires_grad_() for t in operands(2, 16, 4, 12, 11)]
    exact = literal(*(t.float() for t in inputs))
    y = adaptive_kernel_conv(*inputs)
    assert torch.equal(y, exact.bfloat16()) or relative_error(y.float(), exact) < 2**-8
    y.sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 for t in inputs)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("train", [False, True])
def test_memory(train, tiled):
    """Nothing is larger than the input or one tile's scratch, and nothing but the inputs is kept for backward."""
    shape = (2, 16, 8, 256, 200)
    inputs = operands(*shape, requires_grad=train)
    size = inputs[0].numel()
    assert 8 * size > 5 * akgm_tiled.TILE_ELEMENTS
    saved = set()

    def keep(tensor):
        saved.add(tensor.data_ptr())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = adaptive_kernel_conv(*inputs)
        if train:
            y.sum().backward()
    assert size <= largest.elements <= max(size, akgm_tiled.TILE_ELEMENTS)
    assert saved == ({t.data_ptr() for t in inputs} if train else set())


@pytest.mark.parametrize(
    ("shape", "loop"), [((1, 256, 8, 32, 64), True), ((1, 256, 8, 33, 64), False), ((1, 248, 8, 9, 9), False)], ids=str
)
def test_loop_for_wide_small_inputs(shape, loop, monkeypatch):
    monkeypatch.setattr(akgm_compiled, "available", lambda: False)
    calls = []
    monkeypatch.setattr(convolution, "adaptive_kernel_conv_loop", lambda *inputs: calls.append(inputs))
    adaptive_kernel_conv(*operands(*shape))
    assert bool(calls) == loop


def test_torch_compile(implementation, small_tiles):
    inputs = operands(2, 16, 8, 5, 6, requires_grad=True)
    compiled = torch.compile(adaptive_kernel_conv, backend="aot_eager", fullgraph=True)
    y, expected = compiled(*inputs), literal(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), inputs) for t in (y, expected))):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_each_instruction_set(capability):
    """In a process of its own, which builds for this capability unless the library is cached."""
    if not akgm_compiled.available():
        pytest.skip("the compiled AKGM cannot be built here: no compiler, or neither AVX2 nor AVX-512")
    if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX-512")
    script = """
import torch
from test_akgm import SHAPES, literal, operands, relative_error
from ucdir_plugin.archs.akgm import compiled as akgm_compiled
assert akgm_compiled.available()
for shape in SHAPES:
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = operands(*shape, requires_grad=True)
        expected = literal(*inputs)
        grad_y = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, inputs, grad_y)
        x, weight, bias, mix = (t.detach() for t in inputs)
        x, mix = x.to(memory_format=layout), mix.to(memory_format=layout)
        assert relative_error(akgm_compiled.forward(x, weight, bias, mix), expected) < 1e-5
        found = akgm_compiled.backward(grad_y, x, weight, bias, mix, (True,) * 4)
        assert max(map(relative_error, found, gradients)) < 1e-4
print(torch.backends.cpu.get_cpu_capability().lower(), "equal")
"""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout == f"{capability} equal\n", done.stderr


def test_two_processes_build_at_once(tmp_path):
    """As the ranks of a training do: both get the library, one file stays, and it is not built again."""
    if not akgm_compiled.available():
        pytest.skip("the compiled AKGM cannot be built here: no compiler, or neither AVX2 nor AVX-512")
    script = "from ucdir_plugin.archs.akgm import compiled as akgm_compiled; print(akgm_compiled.available())"
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    both = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert out.endswith("True\n"), err
    (library,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert library.suffix == ".so" and len(list((tmp_path / "ucdir_plugin").iterdir())) == 1
    built = library.stat().st_mtime_ns
    assert subprocess.run([sys.executable, "-c", script], **pipes).stdout == "True\n"
    assert library.stat().st_mtime_ns == built


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "needs Linux and one of AVX2, AVX512"),
        ({"TORCH_EXTENSIONS_DIR": "/dev/null"}, "Not a directory"),
        ({"UCDIR_COMPILE": "0"}, ""),
    ],
    ids=lambda v: "",
)
def test_without_a_compiler(environment, reason, tmp_path):
    """The plain path, one line that says why (none if it was asked for), and nothing left behind."""
    script = """
import torch
from test_akgm import literal, operands
from ucdir_plugin.archs.akgm.convolution import adaptive_kernel_conv
inputs = operands(2, 16, 8, 5, 6)
for _ in range(2):
    torch.testing.assert_close(adaptive_kernel_conv(*inputs), literal(*inputs), rtol=1e-5, atol=1e-5)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TORCH_EXTENSIONS_DIR": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "plain PyTorch" in line]
    assert len(warnings) == bool(reason)
    assert all(reason in line for line in warnings)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name != "ucdir_plugin"]


def test_an_implementation_that_is_wrong_is_found_out(monkeypatch):
    """The check that Triton's has to pass on a GPU before it is used."""
    assert convolution._disagreement(akgm_tiled, torch.device("cpu"), torch.float32) is None
    backward = akgm_tiled.backward

    def wrong(*args):
        grad_x, *others = backward(*args)
        return grad_x.flip(3), *others

    monkeypatch.setattr(akgm_tiled, "backward", wrong)
    assert "grad x is wrong" in convolution._disagreement(akgm_tiled, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("which", range(4))
def test_the_compiled_one_refuses_what_does_not_fit(which):
    """It would read past the end of a tensor."""
    inputs = operands(2, 16, 8, 5, 6)
    inputs[which] = inputs[which][:-1]
    with pytest.raises(ValueError, match="do not fit together"):
        akgm_compiled.forward(*inputs)


def test_empty_batch(implementation):
    inputs = operands(0, 16, 8, 5, 5, requires_grad=True)
    y = adaptive_kernel_conv(*inputs)
    assert y.shape == inputs[0].shape
    y.sum().backward()
    assert all(not t.grad.any() for t in inputs)


def test_transforms_and_tracing():
    x, weight, bias, mix = inputs = operands(2, 8, 4, 5, 6)
    expected = literal(*inputs)

    mapped = torch.func.vmap(lambda x, m: adaptive_kernel_conv(x[None], weight, bias, m[None])[0])(x, mix)
    torch.testing.assert_close(mapped, expected, rtol=1e-5, atol=1e-5)

    tangents = [torch.randn_like(t) for t in inputs]
    _, found = torch.func.jvp(adaptive_kernel_conv, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(found, torch.func.jvp(literal, tuple(inputs), tuple(tangents))[1], rtol=1e-4, atol=1e-4)

    traced = torch.jit.trace(adaptive_kernel_conv, inputs)
    larger = operands(3, 8, 4, 7, 9)
    torch.testing.assert_close(traced(*larger), literal(*larger), rtol=1e-5, atol=1e-5)


# Bases that are not grouped


def test_full_bases_are_a_kernel_for_each_position():
    """Each position has its own kernel, the mix of the bases there, written out."""
    batch, channels, bases, height, width, size = 2, 6, 3, 5, 7, 3
    shapes = ((batch, channels, height, width), (channels * bases, channels, size, size), (channels * bases,))
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    mix = torch.randn((batch, bases, height, width), generator=generator, dtype=torch.float64)
    kernels = torch.einsum("bnhw,cnikl->bhwcikl", mix, weight.view(channels, bases, channels, size, size))
    biases = torch.einsum("bnhw,cn->bchw", mix, bias.view(channels, bases))
    windows = F.unfold(x, size, padding=1).view(batch, channels, size, size, height, width)
    expected = torch.einsum("bhwcikl,biklhw->bchw", kernels, windows) + biases
    torch.testing.assert_close(convolution.adaptive_full_kernel_conv(x, weight, bias, mix), expected)


def test_grouped_bases_are_full_ones_with_zeros():
    x, weight, bias, mix = operands(2, 8, 4, 5, 6)
    full = torch.zeros(8 * 4, 8, 3, 3)
    for row in range(8 * 4):
        group = (row // 4) // 2  # of output channel row // 4, two channels a group
        full[row, group * 2 : group * 2 + 2] = weight[row]
    expected = adaptive_kernel_conv(x, weight, bias, mix)
    torch.testing.assert_close(convolution.adaptive_full_kernel_conv(x, full, bias, mix), expected)


def test_a_network_with_full_bases_has_n_times_their_parameters():
    from ucdir_plugin.archs import UCDIRDenoiser
    from ucdir_plugin.utils.errors import UserError

    small = {"inner_channel": 8, "channel_mults": [1, 2], "res_blocks": 1, "attn_res": [], "num_bases": 4}
    nets = [UCDIRDenoiser(**small, grouped_bases=grouped) for grouped in (True, False)]
    counts = [sum(v.numel() for k, v in net.named_parameters() if k.endswith("spdyconv.weight")) for net in nets]
    assert counts[1] == 4 * counts[0] > 0
    x, level, guide = torch.rand(1, 6, 12, 12), torch.tensor([0.5]), torch.rand(1, 3, 12, 12)
    y = nets[1](x, level, guide)
    assert y.shape == (1, 3, 12, 12) and y.isfinite().all()
    y.sum().backward()
    with pytest.raises(UserError, match="grouped_bases has no meaning for integration adain"):
        UCDIRDenoiser(**small, integration="adain", grouped_bases=False)
