"""Properties of the networks beyond parity: sizes, batches, ranges, nested architectures."""

import typing

import pytest
import torch
from conftest import TINY_DENOISER, TINY_PREDICTOR

from ucdir_plugin.archs import UCDIR, SIDUNet, UCDIRDenoiser
from ucdir_plugin.archs.padding import pad_to_multiple
from ucdir_plugin.archs.ucdir_blocks import (
    ACTIVATIONS,
    NORMS,
    Activation,
    AKGBlock,
    Guidance,
    Integration,
    Level,
    Norm,
    make_norm,
)
from ucdir_plugin.registry import build_arch
from ucdir_plugin.utils.errors import UserError


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 31), (16, 16), (7, 50)])
def test_any_size(size):
    net = UCDIR(
        denoiser={**TINY_DENOISER, "channel_mults": [1, 2, 2]}, predictor={**TINY_PREDICTOR, "levels": 3}
    ).eval()
    x = torch.randn(2, 3, *size)
    eps, initial = net(x, x, torch.tensor([0.3, 0.9]), x)
    assert eps.shape == initial.shape == x.shape
    assert eps.isfinite().all()


def test_padding():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    padded = pad_to_multiple(x, 4)
    assert padded.shape[-2:] == (4, 4)
    torch.testing.assert_close(padded[..., 3, :], x[..., 1, :])  # reflected
    assert pad_to_multiple(padded, 4) is padded
    assert pad_to_multiple(padded, 2, always=True).shape[-2:] == (6, 6)
    assert pad_to_multiple(x, 32).shape[-2:] == (32, 32)


@torch.no_grad()
def test_padding_of_the_release_adds_to_aligned_sizes():
    x = torch.randn(1, 3, 64, 64)
    padded = torch.nn.functional.pad(x, (0, 32, 0, 32), mode="reflect")
    for make in (
        lambda **padding: SIDUNet(width=2, levels=3, **padding),
        lambda **padding: small_denoiser(in_channel=3, **padding).eval(),
    ):
        net, released = make(), make(released_padding=True)
        released.load_state_dict(net.state_dict())
        assert torch.equal(released(x), net(padded)[..., :64, :64])
        assert not torch.equal(released(x), net(x))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    net = UCDIRDenoiser(**{k: v for k, v in TINY_DENOISER.items() if k != "type"}).eval()
    x, level, guide = torch.randn(3, 6, 12, 12), torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 3, 12, 12)
    together = net(x, level, guide)
    for i in range(3):
        one = net(x[i : i + 1], level[i : i + 1], guide[i : i + 1])
        torch.testing.assert_close(one, together[i : i + 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_level_and_guide_matter():
    net = UCDIRDenoiser(**{k: v for k, v in TINY_DENOISER.items() if k != "type"}).eval()
    x, level, guide = torch.randn(1, 6, 12, 12), torch.tensor([0.5]), torch.randn(1, 3, 12, 12)
    base = net(x, level, guide)
    assert (net(x, level * 0.5, guide) - base).abs().max() > 1e-4
    assert (net(x, level, guide * 0) - base).abs().max() > 1e-4


def small_denoiser(**changes):
    torch.manual_seed(0)
    cfg = {**TINY_DENOISER, "channel_mults": [1, 2, 2], "attn_res": [64], **changes}
    return UCDIRDenoiser(**{k: v for k, v in cfg.items() if k != "type"})


# Norms

FORMATS = [torch.contiguous_format, torch.channels_last]


def trained(norm):
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


@torch.no_grad()
@pytest.mark.parametrize("memory_format", FORMATS)
def test_layernorm2d_is_that_of_nafnet(memory_format):
    norm = trained(make_norm("layernorm2d", 5))
    x = (torch.randn(2, 5, 6, 7) * torch.logspace(-4, 1, 7)).contiguous(memory_format=memory_format)
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    expected = (x - mean) / (variance + 1e-6).sqrt() * norm.weight.view(1, 5, 1, 1) + norm.bias.view(1, 5, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("memory_format", FORMATS)
def test_layernorm_is_that_of_the_release(memory_format):
    norm = trained(make_norm("layernorm", 6))
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=memory_format)
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, unbiased=False)
    expected = (x - mean) / (variance + 1e-5).sqrt() * norm.weight.view(1, 6, 1, 1) + norm.bias.view(1, 6, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


def test_layernorm2d_copies_nothing_that_is_channels_last():
    norm = make_norm("layernorm2d", 8)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        assert norm(x).is_contiguous(memory_format=torch.channels_last)
    assert x.data_ptr() in kept  # for the backward pass: what it normalised is x itself


def test_every_choice_can_be_named_in_the_options():
    assert typing.get_args(Norm) == tuple(NORMS)
    assert typing.get_args(Activation) == tuple(ACTIVATIONS)


def test_layernorm2d_replaces_layernorm_everywhere():
    """In the blocks, the attention and the head; with the same keys, so that one can be trained on from the other."""
    net, default = small_denoiser(norm="layernorm2d"), small_denoiser()
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in net.modules())
    assert sum(isinstance(m, torch.nn.LayerNorm) for m in net.modules()) == 2 * 11 + 4 + 1
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in default.state_dict().items()}


def test_attention_in_the_middle_can_be_left_out():
    keys, without = (set(small_denoiser(mid_attn=mid_attn, attn_res=[]).state_dict()) for mid_attn in (True, False))
    assert without < keys
    assert {key.split(".attn.")[0] for key in keys - without} == {"mid.0"}


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("released_padding", [False, True])
def test_guide_features_stand_for_the_guide(released_padding, norm):
    net = small_denoiser(released_padding=released_padding, norm=norm).eval()
    guide = torch.randn(2, 3, 19, 30)
    features = net.guide_features(guide)
    for level in (torch.tensor([0.2, 0.9]), torch.tensor([0.5, 0.1])):
        x = torch.randn(2, 6, 19, 30)
        torch.testing.assert_close(net(x, level, features), net(x, level, guide), rtol=0, atol=0)
    assert not torch.equal(net(x, level, net.guide_features(guide + 1)), net(x, level, guide))


def test_sampling_computes_the_guide_once(monkeypatch):
    net = UCDIR(denoiser=TINY_DENOISER, predictor=TINY_PREDICTOR).eval()
    calls = []
    guide_features = net.denoise_fn.guide_features
    monkeypatch.setattr(net.denoise_fn, "guide_features", lambda g: calls.append(1) or guide_features(g))
    lq, initial, x_t, level = (*torch.randn(3, 1, 3, 8, 8), torch.tensor([0.5]))
    guide = net.prepare(initial)
    for _ in range(3):
        torch.testing.assert_close(net.denoise(x_t, level, lq, guide), net.denoise(x_t, level, lq, initial))
    assert len(calls) == 1 + 3  # once, and by each of the calls to compare with


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS)
def test_channels_last_through_the_whole_network(norm):
    net = small_denoiser(num_bases=4, norm=norm).eval()
    layouts = {}

    def look(name):
        def hook(module, args, out):
            if out.dim() == 4 and out.shape[1] > 1:
                layouts[name] = out.is_contiguous(memory_format=torch.channels_last)

        return hook

    for name, module in net.named_modules():
        if not name.endswith("attn") and ".attn." not in name and "noise" not in name and ".conv2" not in name:
            module.register_forward_hook(look(name))
    net(torch.randn(2, 6, 16, 16), torch.tensor([0.5, 0.5]), torch.randn(2, 3, 16, 16))
    assert len(layouts) > 30
    assert [name for name, good in layouts.items() if not good] == []


def gradients(net):
    x, level, guide = torch.randn(2, 6, 16, 16), torch.tensor([0.2, 0.7]), torch.randn(2, 3, 16, 16)
    net.zero_grad()
    out = net(x, level, guide)
    out.square().mean().backward()
    return out, [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("norm", NORMS)
def test_checkpointing_changes_nothing_but_memory(norm):
    results, kept = [], []
    for use_checkpoint in (False, True):
        net = small_denoiser(use_checkpoint=use_checkpoint, dropout=0.0, norm=norm)
        torch.manual_seed(1)
        elements = 0

        def count(tensor):
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            net(torch.randn(2, 6, 16, 16), torch.tensor([0.2, 0.7]), torch.randn(2, 3, 16, 16))
        kept.append(elements)
        torch.manual_seed(1)
        out, grads = gradients(net)
        results.append((out, *grads))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.5 * kept[0]


def test_torch_compile():
    """With inductor, without a graph break: the same output and gradients; and in sampling, with cached features."""
    net = small_denoiser(channel_mults=[1, 2], res_blocks=1, attn_res=[], dropout=0.0)
    torch.manual_seed(1)
    out, grads = gradients(net)
    net.compile(fullgraph=True)
    torch.manual_seed(1)
    compiled_out, compiled_grads = gradients(net)
    torch.testing.assert_close(compiled_out, out, rtol=1e-4, atol=1e-5)
    for a, b in zip(compiled_grads, grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    net.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        x, level, guide = torch.randn(1, 6, 16, 16), torch.tensor([0.5]), torch.randn(1, 3, 16, 16)
        eager = UCDIRDenoiser.forward(net, x, level, guide)
        torch.testing.assert_close(net(x, level, net.guide_features(guide)), eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_torch_compile_of_a_level_with_each_norm(norm):
    level = Level(4, 8, True, norm, emb_dim=6)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 6, 6), (2, 6), (2, 8, 6, 6))]
    wanted = [*inputs, *(p for name, p in level.named_parameters() if ".conv2." not in name)]  # that makes features
    out = level(*inputs)
    grads = torch.autograd.grad(out.square().mean(), wanted)
    level.compile(fullgraph=True, backend="aot_eager")
    compiled_out = level(*inputs)
    compiled_grads = torch.autograd.grad(compiled_out.square().mean(), wanted)
    for a, b in zip((compiled_out, *compiled_grads), (out, *grads)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# The paper's ablations (Table 4)

INTEGRATIONS, GUIDANCES = typing.get_args(Integration), typing.get_args(Guidance)


@torch.no_grad()
@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_a_block_is_its_formula(integration, guidance):
    """What each integration does with M = G * S, written out; G of the guide, of the block's own h, or 1."""
    block = AKGBlock(4, 8, emb_dim=6, num_bases=2, integration=integration, guidance=guidance)
    x, emb, guide = torch.randn(2, 4, 7, 9), torch.randn(2, 6), torch.randn(2, 3, 7, 9)
    features = block.guide_features(guide) if guidance in ("initial", "degraded") else None
    found = block(x, emb, features)
    silu, conv = torch.nn.functional.silu, torch.nn.functional.conv2d
    h = block.norm2(silu(block.conv1(block.norm1(x))))
    scalars = block.noise_func(emb)[:, :, None, None]
    spatial = {"none": torch.ones(2, 2, 7, 9), "internal": h}.get(guidance, guide)
    mix = scalars * (spatial if guidance == "none" else block.conv2(spatial))
    if integration == "akgm":
        z = conv(h, block.spdyconv.weight, block.spdyconv.bias, padding=1, groups=2).view(2, 8, 2, 7, 9)
        expected = (z * mix.unsqueeze(1)).sum(2)
    else:
        told, weight, bias = block.spread(mix), block.plainconv.weight, block.plainconv.bias
        if integration == "addition":
            expected = conv(h + told, weight, bias, padding=1)
        elif integration == "concatenation":
            assert told.shape[1] == 8
            expected = conv(h, weight[:, :8], bias, padding=1) + conv(told, weight[:, 8:], padding=1)
        else:
            expected = conv(h * (1 + told[:, :8]) + told[:, 8:], weight, bias, padding=1)
    torch.testing.assert_close(found, silu(expected) + block.res_conv(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_guide_is_what_the_guidance_says():
    """An image as guide changes the noise if it is the one that guides; of two that do not, neither does."""
    lq, initial, x_t, level = (*torch.randn(3, 2, 3, 12, 12), torch.tensor([0.3, 0.8]))
    for guidance in GUIDANCES:
        net = UCDIR(denoiser={**TINY_DENOISER, "guidance": guidance}, predictor=TINY_PREDICTOR).eval()
        guide = net.guide(lq, initial)
        assert guide is (lq if guidance == "degraded" else initial)
        out = net.denoise(x_t, level, lq, guide)
        torch.testing.assert_close(net.denoise(x_t, level, lq, net.prepare(guide)), out)
        changed = (net.denoise(x_t, level, lq, guide + 1) - out).abs().max() > 1e-5
        assert changed == (guidance in ("initial", "degraded"))
        eps, predicted = net(lq, lq, level, x_t)
        noisy = level[:, None, None, None] * (lq - predicted) + (1 - level**2).sqrt()[:, None, None, None] * x_t
        torch.testing.assert_close(eps, net.denoise(noisy, level, lq, net.guide(lq, predicted)), rtol=1e-4, atol=1e-5)


CHOICES = [
    {"activation": "relu"}, {"norm": "none"}, {"norm": "groupnorm"}, {"kernel_size": 5}, {"kernel_size": 1}, {"num_bases": 2},
    *({"integration": i, "guidance": g} for i in INTEGRATIONS for g in GUIDANCES if (i, g) != ("akgm", "initial")),
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_every_choice_trains_and_changes_the_result(choice):
    net, default = small_denoiser(dropout=0.0, **choice), small_denoiser(dropout=0.0)
    torch.manual_seed(1)
    out, grads = gradients(net)
    assert all(grad.isfinite().all() for grad in grads)
    assert sum(grad.abs().sum() == 0 for grad in grads) == 0
    torch.manual_seed(1)
    same = torch.allclose(out, gradients(default)[0], atol=1e-4)
    assert same == (choice == {"integration": "akgm", "guidance": "degraded"})  # only UCDIR hands over another image


@torch.no_grad()
def test_relu_replaces_swish_in_blocks_and_head():
    net = small_denoiser(activation="relu").eval()
    assert isinstance(net.final_conv[1], torch.nn.ReLU)
    block = AKGBlock(4, 4, emb_dim=6, num_bases=2, norm="none", activation="relu", guidance="none")
    with torch.no_grad():
        block.spdyconv.bias.fill_(-100)
    x = torch.randn(1, 4, 5, 5)
    block.noise_func[2].weight.zero_()
    block.noise_func[2].bias.fill_(1)
    assert torch.equal(block(x, torch.randn(1, 6), None), x)  # all of the branch is below 0


@torch.no_grad()
def test_groupnorm_has_32_groups():
    assert make_norm("groupnorm", 64).num_groups == 32 and make_norm("groupnorm", 48).num_groups == 16
    assert isinstance(make_norm("none", 8), torch.nn.Identity)


@torch.no_grad()
@pytest.mark.parametrize("choice", [{"norm": "none"}, {"kernel_size": 5}, {"integration": "adain"},
                                    {"integration": "addition", "guidance": "internal"}], ids=str)  # fmt: skip
def test_local_networks_know_how_far_they_look(choice):
    """A change right outside of the receptive field changes nothing; the field is no smaller than the default's."""
    local = {"norm": "layernorm2d", "attn_res": [], "mid_attn": False, "channel_mults": [1, 2], "inner_channel": 4, "num_bases": 2}  # fmt: skip
    net, default = small_denoiser(**{**local, **choice}).eval(), small_denoiser(**local).eval()
    radius = net.receptive_field
    further = (
        "kernel_size" in choice or choice.get("guidance") == "internal"
    )  # the guide's one more is within x's field
    assert (radius > default.receptive_field) == further and radius >= default.receptive_field
    width = 2 * radius + 8
    x, guide = torch.randn(1, 6, 8, width), torch.randn(1, 3, 8, width)
    level, edge = torch.tensor([0.5]), width // 2 // 2 * 2
    other_x, other_guide = x.clone(), guide.clone()
    other_x[..., edge:] += 1
    other_guide[..., edge:] += 1
    a, b = net(x, level, guide), net(other_x, level, other_guide)
    torch.testing.assert_close(a[..., : edge - radius], b[..., : edge - radius], rtol=0, atol=1e-6)
    assert not torch.allclose(a[..., edge:], b[..., edge:], atol=1e-4)


@torch.no_grad()
def test_without_a_predictor_the_image_itself_is_diffused():
    net = UCDIR(denoiser={**TINY_DENOISER, "guidance": "none"}, predictor=None).eval()
    lq, hr, noise, level = (*torch.randn(3, 1, 3, 8, 8), torch.tensor([0.6]))
    eps, initial = net(lq, hr, level, noise)
    assert not initial.any() and not any("predictor" in key for key in net.state_dict())
    torch.testing.assert_close(eps, net.denoise(0.6 * hr + 0.8 * noise, level, lq, initial), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_residual_scale_multiplies_what_is_diffused():
    torch.manual_seed(0)
    net = UCDIR(denoiser=TINY_DENOISER, predictor=TINY_PREDICTOR, residual_scale=12).eval()
    lq, hr, noise, level = (*torch.randn(3, 1, 3, 8, 8), torch.tensor([0.6]))
    eps, initial = net(lq, hr, level, noise)
    x_t = 0.6 * 12 * (hr - initial) + 0.8 * noise
    torch.testing.assert_close(eps, net.denoise(x_t, level, lq, initial), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_denoiser_is_a_regression_network():
    net = UCDIRDenoiser(
        **{**{k: v for k, v in TINY_DENOISER.items() if k != "type"}, "in_channel": 3, "residual": True}
    )
    x = torch.rand(1, 3, 12, 12)
    torch.testing.assert_close(net(x), x)  # starts from the identity
    torch.nn.init.ones_(net.final_conv[3].weight)
    torch.testing.assert_close(net(x), net(x, torch.ones(1), x))  # a clean image's level, its own guide


@torch.no_grad()
def test_any_basicsr_arch_can_predict():
    predictor = {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "scale": 1, "num_feat": 4, "num_block": 1}
    net = UCDIR(denoiser=TINY_DENOISER, predictor=predictor)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = net.predictor((x + 1) / 2) * 2 - 1  # BasicSR's networks work in [0, 1]
    torch.testing.assert_close(net.predict(x), expected)


def test_a_predictor_that_changes_the_size_is_named():
    predictor = {"type": "SRVGGNetCompact", "num_in_ch": 3, "num_out_ch": 3, "upscale": 2, "num_feat": 4, "num_conv": 1}
    net = UCDIR(denoiser=TINY_DENOISER, predictor=predictor)
    with pytest.raises(UserError, match="SRVGGNetCompact turns .* keeps the image size"):
        net.predict(torch.zeros(1, 3, 16, 16))


def test_predictor_range_is_converted():
    class Identity(SIDUNet):
        def forward(self, x):
            self.seen = x
            return x

    net = UCDIR(denoiser=TINY_DENOISER, predictor=TINY_PREDICTOR, predictor_range=(0, 255))
    net.predictor = Identity(levels=1, width=1)
    x = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    torch.testing.assert_close(net.predict(x), x)
    torch.testing.assert_close(net.predictor.seen[0, 0, 0], torch.tensor([0.0, 127.5, 255.0]))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"width": 3}, "'type' .* is missing"),
        ({"type": "SIDUnet"}, "there is no arch 'SIDUnet'; did you mean 'SIDUNet'"),
        ({"type": "SIDUNet", "widht": 3}, "unexpected keyword argument 'widht'"),
        ({"type": "UCDIRDenoiser", "norm": "layer_norm"}, "there is no norm 'layer_norm'; did you mean 'layernorm' or"),
        ({"type": "UCDIRDenoiser", "guidance": "intial"}, "there is no guidance 'intial'; did you mean 'initial'"),
        ({"type": "UCDIRDenoiser", "integration": "adin"}, "there is no integration 'adin'; did you mean 'adain'"),
        ({"type": "UCDIRDenoiser", "activation": "swsh"}, "there is no activation 'swsh'; did you mean 'swish'"),
        ({"type": "UCDIRDenoiser", "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"type": "UCDIR", "predictor": None, "denoiser": TINY_DENOISER}, "set the denoiser's guidance to none"),
        (
            {"type": "UCDIR", "predictor": TINY_PREDICTOR, "denoiser": TINY_DENOISER, "residual_scale": 0},
            "residual_scale: 0 is not a positive number",
        ),
        ({"type": "UCDIRDenoiser", "inner_channel": 12}, "12 channels is no multiple of num_bases 8"),
    ],
)
def test_wrong_configurations(cfg, message):
    with pytest.raises(UserError, match=message):
        build_arch(cfg)
