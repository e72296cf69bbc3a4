"""The Triton kernels of the adaptive kernel convolution: equal to eq. 2 in Triton's interpreter, and accepted by its compiler.

The interpreter has to be on before Triton is imported, so all calculations are made in a process of their own.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from test_akgm import literal, operands, relative_error

triton = pytest.importorskip("triton", reason="there is no Triton for this platform")

without_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter is on in this process"
)

NAMES = ("y", "x", "weight", "bias", "mix")
ALL = (True, True, True, True)

# ((B, C, N, H, W), PROGRAMS, TILE_BASES): many programs for small tiles and split sums, one for the largest tiles.
CASES = [
    ((1, 8, 8, 5, 7), 512, 16),  # c = 1; more rows than a tile has
    ((3, 8, 4, 20, 21), 40, 16),  # c = 2; all sums split, no number of positions fits
    ((3, 8, 4, 6, 8), 1, 16),  # a tile of several images and one cut by the end
    ((1, 9, 3, 4, 6), 512, 16),  # nothing is a power of two
    ((1, 64, 8, 5, 7), 1, 16),  # c = 8
    ((2, 16, 2, 1, 9), 512, 16),
    ((5, 4, 4, 1, 1), 512, 16),
    ((2, 6, 1, 4, 3), 512, 16),  # one base
    ((1, 80, 4, 3, 5), 1, 16),  # c = 20; two tiles of a group's channels
    ((1, 34, 1, 3, 5), 512, 16),  # c = 34; two tiles of a group's gradients
    ((1, 10, 5, 4, 3), 512, 4),  # two tiles of bases
]


def result(shape, programs=512, tile_bases=16, dtype=torch.float32, layout="contiguous", needs=ALL):
    """(found, expected): y and the four gradients, by Triton, and by the formula in float32 on the same inputs."""
    from ucdir_plugin.archs.akgm import triton as akgm_triton

    akgm_triton.PROGRAMS, akgm_triton.TILE_BASES = programs, tile_bases
    inputs = [t.to(dtype) for t in operands(*shape)]
    grad_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = [t.float().requires_grad_() for t in inputs]
    y = literal(*exact)
    expected = (y.detach(), *torch.autograd.grad(y, exact, grad_y.float()))

    x, weight, bias, mix = inputs
    if layout == "channels_last":
        x, weight, mix, grad_y = (t.to(memory_format=torch.channels_last) for t in (x, weight, mix, grad_y))
    elif layout == "strided":  # every other element of transposed memory
        x, weight, mix = (t.mT.repeat_interleave(2, 3)[..., ::2].mT for t in (x, weight, mix))
        bias = bias.repeat_interleave(2)[::2]
    found = akgm_triton.forward(x, weight, bias, mix), *akgm_triton.backward(grad_y, x, weight, bias, mix, needs)
    return found, expected


def mixed_result():
    """(found, expected) with every input in another dtype, and the gradient of a sum."""
    from ucdir_plugin.archs.akgm import triton as akgm_triton

    x, weight, bias, mix = operands(1, 8, 4, 3, 4)
    mix, grad_y = mix.bfloat16(), torch.ones(1, 1, 1, 1, dtype=torch.float16).expand_as(x)
    exact = [t.float().requires_grad_() for t in (x, weight, bias, mix)]
    y = literal(*exact)
    expected = (y.detach(), *torch.autograd.grad(y.sum(), exact))
    weight = weight.double()
    found = (
        akgm_triton.forward(x, weight, bias, mix),
        *akgm_triton.backward(grad_y, x, weight, bias, mix, ALL),
    )
    return found, expected


def imported():
    return "ucdir_plugin.archs.akgm.triton" in sys.modules


def available():
    from ucdir_plugin.archs.akgm import triton as akgm_triton

    return akgm_triton.available()


def refused():
    from ucdir_plugin.archs.akgm import triton as akgm_triton

    akgm_triton.forward(*operands(1, 4, 4, 2, 2, dtype=torch.float64))


@pytest.fixture(scope="module")
def interpreter():
    """A process with Triton's interpreter on."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert not pool.submit(imported).result()  # not by ucdir_plugin
        yield pool


def assert_equal(found, expected, names=NAMES, forward=1e-5, backward=1e-4):
    for name, a, b in zip(names, found, expected):
        assert a.shape == b.shape, name
        error = relative_error(a.float(), b)
        assert error < (forward if name == "y" else backward), (name, error)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_equation_2(interpreter, case):
    assert_equal(*interpreter.submit(result, *case).result())


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_any_strides(interpreter, layout):
    found, expected = interpreter.submit(result, (2, 16, 4, 5, 6), layout=layout).result()
    assert_equal(found, expected)
    if layout == "channels_last":
        y, grad_x, _, _, grad_mix = found
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, grad_x, grad_mix))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=str)
def test_half_precision(interpreter, dtype, tolerance):
    """Four units in the last place: operands and results are rounded, sums are not. c = 17 has the longer steps."""
    found, expected = interpreter.submit(result, (1, 34, 2, 4, 5), dtype=dtype).result()
    assert all(t.dtype == dtype for t in found)
    assert_equal(found, expected, forward=tolerance, backward=tolerance)


@pytest.mark.parametrize(
    "needs", [(True, False, False, False), (False, True, False, True), (False, False, True, False)]
)
def test_only_the_gradients_asked_for(interpreter, needs):
    found, expected = interpreter.submit(result, (1, 4, 2, 3, 3), needs=needs).result()
    assert tuple(t is not None for t in found[1:]) == needs
    asked = [(t, e, n) for t, e, n in zip(found, expected, NAMES) if t is not None]
    assert_equal(*zip(*asked))


def test_mixed_dtypes(interpreter):
    """As under autocast: each gradient has the dtype of its tensor."""
    found, expected = interpreter.submit(mixed_result).result()
    assert [t.dtype for t in found] == [torch.float32, torch.float32, torch.float64, torch.float32, torch.bfloat16]
    assert_equal(found, expected, backward=2**-8)


def test_empty_batch(interpreter):
    found, _ = interpreter.submit(result, (0, 8, 4, 5, 5)).result()
    assert [t.shape for t in found] == [(0, 8, 5, 5), (0, 8, 5, 5), (32, 2, 3, 3), (32,), (0, 4, 5, 5)]
    assert not any(t.any() for t in found)


def test_float64_is_refused(interpreter):
    with pytest.raises(TypeError, match="float64"):
        interpreter.submit(refused).result()


def test_available_in_the_interpreter(interpreter):
    assert interpreter.submit(available).result()


@without_interpreter
def test_available_on_a_gpu():
    assert available() == (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def test_tf32_only_where_torch_allows_it():
    from ucdir_plugin.archs.akgm import triton as akgm_triton

    assert akgm_triton._precision() == "ieee"
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert akgm_triton._precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@without_interpreter
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((1, 64, 8, 256, 256), torch.bfloat16, torch.channels_last),
        ((2, 9, 3, 1, 1), torch.float32, torch.contiguous_format),
    ],
    ids=str,
)
def test_compiles_for_a_gpu(shape, dtype, layout, monkeypatch, tmp_path):
    """The interpreter accepts more than the compiler does. No GPU is needed for this."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this test speaks to the compiler as of Triton 3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ucdir_plugin.archs.akgm import triton as akgm_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = []
    monkeypatch.setattr(akgm_triton, "_launch", lambda *launch: launches.append(launch))
    batch, channels, bases, height, width = shape
    with torch.device("meta"):
        x, mix = (torch.empty(batch, n, height, width, dtype=dtype, memory_format=layout) for n in (channels, bases))
        inputs = x, torch.empty(channels * bases, channels // bases, 3, 3), torch.empty(channels * bases), mix
        akgm_triton.forward(*inputs)
        akgm_triton.backward(x, *inputs, ALL)
    assert len(launches) == 4
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    for kernel, _, args, const in launches:
        signature = dict.fromkeys(const, "constexpr")
        constants = dict(const)
        for name, value in zip(kernel.arg_names, args):
            if isinstance(value, torch.Tensor):
                signature[name] = pointers[value.dtype]
            elif value == 1:  # as Triton does at a call
                signature[name] = "constexpr"
                constants[name] = 1
            else:
                signature[name] = "i32"
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 80, 32), options={"num_warps": akgm_triton._warps(const)}
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 48 * 1024
