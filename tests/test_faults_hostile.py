"""Hostile weights and options: nothing that came in with a file runs, leaves its folder, or takes the memory."""

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import RESTORING, TINY, assert_one_line_error, merged
from safetensors.torch import save, save_file
from test_faults_files import forked

from ucdir_plugin.archs.sizing import check_network
from ucdir_plugin.options.check import check_options, load_options
from ucdir_plugin.options.reading import apply_overrides, read_options, read_yaml
from ucdir_plugin.registry import names
from ucdir_plugin.restoration import bird_options
from ucdir_plugin.restoration.load import load_model
from ucdir_plugin.training.setup import check_options_fit
from ucdir_plugin.utils.checkpoints import read_checkpoint
from ucdir_plugin.utils.errors import UserError, printable
from ucdir_plugin.utils.training_states import find_resume_state
from ucdir_plugin.zoo import convert
from ucdir_plugin.zoo.model_files import HEADER
from ucdir_plugin.zoo.priors import load_diffusers, load_prior

CANARY = "canary"
"""A file that hostile code would make in the working directory."""


class Hostile:
    """Makes the canary when it is unpickled."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        command = f"open({CANARY!r}, 'w').close()"
        return {
            "os.system": (os.system, (f"touch {CANARY}",)),
            "exec": (exec, (command,)),
            "eval": (eval, (command,)),
            "open": (open, (CANARY, "w")),
            "runpy": (__import__("runpy").run_path, ("hostile.py",)),
            "torch.load": (torch.load, ("inner.pth", None, None)),
            "torch.hub": (torch.hub.load, (".", "f")),
            "getattr": (getattr, (__import__("os"), "system")),
            "numpy": (np.load, ("inner.npy", None, True)),
        }[self.how]


HOW = ("os.system", "exec", "eval", "open", "runpy", "torch.load", "torch.hub", "numpy")


def raw(how):
    return pickle.dumps({"params": Hostile(how), "iter": 1}, protocol=2)


def torch_zip(how):
    buffer = io.BytesIO()
    torch.save({"params": Hostile(how), "iter": 1}, buffer)
    return buffer.getvalue()


def torch_legacy(how):
    buffer = io.BytesIO()
    torch.save({"params": Hostile(how), "iter": 1}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def opcodes(how):
    """By hand: a global and a call, as no pickler writes them."""
    return b"\x80\x02cos\nsystem\nX" + struct.pack("<I", 12) + b"touch canary\x85R."


FORMS = {"pickle": raw, "zip": torch_zip, "legacy": torch_legacy, "opcodes": opcodes}


def loaders(path):
    """Every way by which a file of weights or of a run's state comes in."""
    resume = {"auto_resume": False, "path": {"resume_state": path, "models": "."}, "network_g": {}}
    return {
        "read_checkpoint": lambda: read_checkpoint(path),
        "prior": lambda: load_prior(path),
        "model with options": lambda: load_model("options.yml", path),
        "resume": lambda: find_resume_state(resume),
        "conversion": lambda: convert.convert_ucdir(path, "out.pth"),
        "conversion of a prior": lambda: convert.convert_adm(path, "out.safetensors"),
    }


def errors_of(functions):
    """What each raises, or returns."""
    found = []
    for function in functions:
        try:
            found.append(str(function()))
        except UserError as err:
            found.append(err)
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("options.yml").write_text(yaml.safe_dump(merged(RESTORING, {"path": {"pretrain_network_g": None}})))
    Path("hostile.py").write_text(f"open({CANARY!r}, 'w').close()")
    return tmp_path


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", HOW)
def test_pickles_run_no_code(here, how, form):
    for extension in (".pth", ".pt", ".state", ".safetensors"):
        Path(f"evil{extension}").write_bytes(FORMS[form](how))
        for name, load in loaders(f"evil{extension}").items():
            with pytest.raises(UserError):
                load()
            assert not os.path.exists(CANARY), (name, extension)
    Path("k.npy").write_bytes(FORMS[form](how))
    np.save("objects.npy", np.array([[Hostile(how)]], dtype=object), allow_pickle=True)
    for name in ("k.npy", "objects.npy"):
        with pytest.raises(UserError, match="cannot be read|real numbers"):
            bird_options.known_kernel({"file": name})
    assert not os.path.exists(CANARY)


def test_the_canary_would_be_there(here):
    """These pickles do run, where nobody minds."""
    pickle.loads(raw("exec"))
    assert os.path.exists(CANARY)


# ----------------------------------------------------------------------------------------------- lies about sizes
def small_zip(**parts):
    """A file of torch.save with parts replaced and packed."""
    buffer, result = io.BytesIO(), io.BytesIO()
    torch.save({"params": {"a": torch.zeros(4)}}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, parts.get(os.path.basename(part), old.read(part)))
    return result.getvalue()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def safetensors(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape, begin, end, dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def repeating():
    item = (0,)
    for _ in range(60):
        item = (item, item)
    return item


LIES = {
    "a.pth: packed 200 MB": lambda: small_zip(**{"0": bytes(200_000_000)}),
    "b.pth: packed pickle": lambda: small_zip(**{"data.pkl": bytes(200_000_000)}),
    "c.pth: one number repeated": lambda: saved({"params": {"a": torch.zeros(1).expand(10**6, 10**6)}}),
    "d.pth: no numbers": lambda: saved({"params": {"a": torch.empty(10**6, 10**6, device="meta")}}),
    "e.pth: sparse": lambda: saved({"params": {"a": torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6))}}),
    "f.pth: tuples without end": lambda: saved({"params": repeating()}),
    "g.safetensors: header of 2^60 bytes": lambda: safetensors({}, length=2**60),
    "h.safetensors: header of 2^64 - 1": lambda: safetensors({}, length=2**64 - 1),
    "i.safetensors: header longer than the file": lambda: safetensors({}, length=10**6),
    "j.safetensors: no header": lambda: bytes(8),
    "k.safetensors: shape overflows": lambda: safetensors(entry([2**40, 2**40], 0, 4), bytes(4)),
    "l.safetensors: shape larger than its data": lambda: safetensors(entry([10**9], 0, 4), bytes(4)),
    "m.safetensors: negative offsets": lambda: safetensors(entry([1], -4, 0), bytes(4)),
    "n.safetensors: offsets behind the end": lambda: safetensors(entry([1], 2**62, 2**62 + 4), bytes(4)),
    "o.safetensors: offsets backwards": lambda: safetensors(entry([1], 4, 0), bytes(4)),
    "p.safetensors: overlapping": lambda: safetensors({**entry([2], 0, 8), "b": entry([2], 4, 12)["a"]}, bytes(12)),
    "q.safetensors: unknown type": lambda: safetensors(entry([1], 0, 4, "X9"), bytes(4)),
    "r.safetensors: brackets": lambda: safetensors(b"[" * 10**6),
    "s.safetensors: no JSON": lambda: safetensors(b"\xff" * 100),
    "t.safetensors: twice": lambda: safetensors(b'{"a":1,"a":2}'),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie_about_their_sizes(here, name):
    file = name.split(":")[0]
    Path(file).write_bytes(LIES[name]())
    errors, peak, _ = forked(errors_of, loaders(file).values())
    for err in errors:
        assert isinstance(err, UserError) and file in str(err) and len(str(err).splitlines()) == 1, err
    assert peak < 2**27


@pytest.mark.parametrize("extension", [".pth", ".safetensors", ".state"])
def test_weights_cut_and_flipped(here, extension, record_property):
    """Cut at every tenth: refused. With flipped bytes: refused, or tensors of those names and shapes."""
    torch.manual_seed(0)
    state = {f"layer.{n}.weight": torch.randn(8, 4) for n in range(5)}
    content = save(state) if extension == ".safetensors" else saved({"params": state, "iter": 3})
    path = f"w{extension}"
    for tenth in range(10):
        Path(path).write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(UserError, match=f"checkpoint {path} cannot be read"):
            read_checkpoint(path)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), 2):
            damaged[at] ^= 1 << rng.integers(8)
        Path(path).write_bytes(bytes(damaged))
        try:
            read_checkpoint(path)
        except UserError:
            refused += 1
    record_property(f"weights ({extension}) with flipped bits: refused of 150", refused)


def test_state_of_a_model_that_no_memory_holds(here):
    """A model file of some bytes that asks for a network of 10^12 parameters."""
    options = merged(RESTORING, {"network_g": {"denoiser": {"inner_channel": 100_000}}, "path": None, "datasets": None})
    options = {k: options[k] for k in ("name", "model_type", "network_g")}
    for key, header in {
        "big": {"options": options, "notes": {}},
        "deep": {"options": json.loads("[" * 400 + "]" * 400), "notes": {}},
        "prior": {"network": {"num_channels": 100_000}},
        "outside": {"options": {**options, "name": "../../x"}, "notes": {}},
    }.items():
        save_file({"a": torch.zeros(1)}, f"{key}.safetensors", {HEADER: json.dumps(header)})
        for load in (lambda f=f"{key}.safetensors": load_model(f), lambda f=f"{key}.safetensors": load_prior(f)):
            err, peak, _ = forked(load)
            assert isinstance(err, UserError) and peak < 2**29, (key, err)
            assert key != "big" or "parameters" in str(err) or "no prior" in str(err), err


DIFFUSERS = {
    "no JSON": b"{",
    "brackets": b"[" * 10**5,
    "a list": b"[]",
    "other class": b'{"_class_name": "os.system"}',
    "absurd": json.dumps({"_class_name": "UNet2DModel", "block_out_channels": [10**5] * 4}).encode(),
    "text for numbers": b'{"_class_name": "UNet2DModel", "block_out_channels": "x"}',
    "code": json.dumps({"_class_name": "UNet2DModel", "auto_map": {"AutoModel": "hostile.Model"}}).encode(),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_folders_of_diffusers(here, name):
    pytest.importorskip("diffusers")
    os.mkdir("prior")
    Path("prior/config.json").write_bytes(DIFFUSERS[name])
    Path("prior/diffusion_pytorch_model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    Path("prior/diffusion_pytorch_model.bin").write_bytes(raw("exec"))
    err, peak, _ = forked(load_diffusers, "prior")
    assert isinstance(err, UserError) and "prior" in str(err) and peak < 2**30, err
    assert not os.path.exists(CANARY)


@pytest.mark.parametrize(
    "scheduler",
    [{"num_train_timesteps": 10**12}, {"num_train_timesteps": "x"}, {"beta_start": "x"}, {"trained_betas": {"a": 1}},
     {"num_train_timesteps": float("inf")}, {"beta_start": float("nan")}, {"beta_schedule": ["x"]}],
)  # fmt: skip
def test_schedules_of_diffusers(scheduler):
    from ucdir_plugin.zoo.priors import schedule_of

    with pytest.raises(UserError):
        schedule_of(scheduler, "here")


KERNELS = {
    "of 10^12 numbers": lambda: npy("<f8", (10**6, 10**6)),
    "of text": lambda: npy("|S8", (3, 3), bytes(72)),
    "of objects": lambda: npy("|O", (3, 3), bytes(72)),
    "of brackets": lambda: b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
    "cut short": lambda: npy("<f8", (3, 3), bytes(70)),
    "of no size": lambda: npy("<f8", (0, 0)),
    "negative": lambda: npy("<f8", (-3, -3), bytes(72)),
    "not finite": lambda: npy("<f8", (3, 3), np.full(9, np.nan).tobytes()),
    "a zip": lambda: small_zip(),
    "a zip of nothing": lambda: b"PK\x03\x04" + bytes(50),
}


def npy(kind, shape, body=b""):
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_files(here, name):
    Path("k.npy").write_bytes(KERNELS[name]())
    err, peak, _ = forked(bird_options.known_kernel, {"file": "k.npy"})
    assert isinstance(err, UserError) and len(str(err).splitlines()) == 1 and peak < 2**28, err


TABLES = {
    "brackets": b"[" * 10**5,
    "a number": b"1" * 5000,
    "a list": b"[]",
    "no metrics": b'{"images": [{"image": "a"}]}',
    "names of another kind": b'{"images": [{"image": 1, "metrics": {}}], "sets": {}, "protocols": {}, "unavailable": {}, "about": {}}',
    "text for numbers": b'{"images": [{"image": "a", "metrics": {"restored": {"psnr": {}}}}]}',
    "no text": b"\xff\xfe",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_to_compare(here, name):
    from ucdir_plugin.evaluation.compare import read_runs

    for run in ("a", "b"):
        os.mkdir(run)
        Path(run, "metrics.json").write_bytes(TABLES[name])
    with pytest.raises(UserError, match=r"metrics\.json"):
        read_runs(["a", "b"])


@pytest.mark.parametrize("content", [b"[" * 10**5, b"[]", b"1" * 5000, b"{", b"\xff"])
def test_settings_of_a_prepared_folder(here, content):
    from ucdir_plugin.data.preparation import same_settings

    Path("prepared.json").write_bytes(content)
    with pytest.raises(UserError, match="prepare it again"):
        same_settings(".", crop=3)


# ------------------------------------------------------------------------------------------------------------- YAML
def laughs(levels=9, width=9):
    lines = ["a0: &a0 [x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


TEXTS = {
    "python/object": "!!python/object/apply:os.system ['touch canary']",
    "python/name": "a: !!python/name:os.system",
    "python/module": "a: !!python/module:os",
    "python/object/new": "!!python/object/new:subprocess.Popen [[touch, canary]]",
    "own tag": "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\n!os.system ['touch canary']",
    "laughs": laughs(),
    "laughing mappings": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}" for n in range(1, 40)),
    "merge keys": "a0: &a0 {"
    + ", ".join(f"k{n}: 1" for n in range(50))
    + "}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 3000)}]}}\n" for n in (1, 2, 3)),
    "itself": "a: &a [*a]",
    "itself as a mapping": "a: &a {b: *a}",
    "twice": "name: a\nname: b",
    "brackets": "[" * 10_000,
    "braces": "{a: " * 10_000,
    "dashes": "- " * 10_000,
    "a big number": "a: " + "9" * 5000,
    "2^63": f"a: {2**63}",
    "no hexadecimal": "a: 0x_",
    "no month": "a: 2001-99-99",
    "no date": "!!timestamp 2001-13-45 or so",
    "no hour": "a: 2001-01-01 99:00:00",
    "no number": "a: !!int x",
    "no truth": "a: !!bool x",
    "no character": 'a: "\\UFFFFFFFF"',
    "half a character": 'a: "\\ud800"',
    "escapes": 'a: "\\e[2J"',
    "zero": "a: \0",
    "tab": "a:\n\tb: 1",
    "1e999": "a: 1e999",
    "nan": "a: .nan",
    "-inf": "a: [1, {b: -.inf}]",
    "number as key": "1: a",
    "nothing as key": "~: a",
    "list as key": "? [a]\n: b",
    "two documents": "a: 1\n---\nb: 2",
    "large": "a: " + "x" * 2**20,
}


@pytest.mark.parametrize("name", TEXTS)
def test_yaml_of_any_kind_is_one_line(here, name):
    Path("o.yml").write_text(TEXTS[name])
    errors, peak, _ = forked(errors_of, [lambda: read_options("o.yml"), lambda: load_model("o.yml")])
    for err in errors:
        assert isinstance(err, UserError) and len(str(err).splitlines()) == 1 and "o.yml" in str(err), err
    assert peak < 2**28
    if "\n" not in TEXTS[name] and name not in ("large",):
        with pytest.raises(UserError):
            value = TEXTS[name].removeprefix("a: ")
            opt = dict(TINY)
            apply_overrides(opt, [f"a={value}"])
            check_options(opt, True)
    assert not os.path.exists(CANARY)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x80", bytes(range(256)), "a: ä".encode("utf-16")])
def test_options_that_are_no_text(here, content):
    Path("o.yml").write_bytes(content)
    with pytest.raises(UserError, match=r"o\.yml"):
        load_options("o.yml")


@pytest.mark.parametrize("base", ["/dev/zero", "o.yml", "b.yml", "none.yml", "\0", "."])
def test_bases_without_end(here, base):
    Path("o.yml").write_text(yaml.safe_dump({"_base_": base}))
    Path("b.yml").write_text("_base_: o.yml")
    err, peak, _ = forked(load_options, "o.yml")
    assert isinstance(err, UserError) and len(str(err).splitlines()) == 1 and peak < 2**28, err


def test_plain_yaml_is_still_read():
    assert read_yaml("a: &a {b: [1, 2.5e-3, x]}\nc: *a", "x") == {"a": (a := {"b": [1, 0.0025, "x"]}), "c": a}
    with pytest.raises(UserError, match="key:subkey=value"):
        apply_overrides({}, [":".join("a" * 100) + "=1"])


# ---------------------------------------------------------------------------------------------------- out of the folder
NAMES = [
    "..",
    ".",
    "../x",
    "a/../../x",
    "/tmp/x",
    "C:\\x",
    "C:x",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\x1b[2J",
    "",
    " a",
    "x" * 151,
    "\u202ea",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_runs_stay_in_their_folder(name):
    """``name: ..`` made ``experiments/..`` the run's folder, which an earlier run's is moved away from."""
    for change in ({"name": name}, {"datasets": {"val": {"name": name}}}, {"val": {"suffix": name}}):
        with pytest.raises(UserError, match="option"):
            check_options(merged(TINY, change), True)
    with pytest.raises(UserError, match="option datasets"):
        check_options(merged(TINY, {"datasets": {f"val_{name}/": TINY["datasets"]["val"]}}), True)


def test_usual_names_are_taken():
    for name in ("demo", "a b", "x4-2.1", "Gänse", "lr=1e-4", "run:b"):
        assert check_options(merged(TINY, {"name": name}), True)["name"] == name


def test_what_is_printed_steers_no_terminal():
    assert printable("a\nb\x1b[2J\u202e\udcff鳥 é") == "a\\nb\\x1b[2J\\u202e\\udcff鳥 é"
    assert str(UserError("image \x1b]0;x\x07.png")) == "image \\x1b]0;x\\x07.png"


def test_a_report_runs_no_script_of_a_name(tmp_path):
    from ucdir_plugin.evaluation import report, tables

    key = "</script><script>alert(1)</script>.png"
    results = tables.Results([{"image": key, "metrics": {"restored": {"psnr": 1.0}}}], {}, {}, {}, {})
    report.write_report(results, tmp_path / "r.html", {"name": key, "dataset": "<b>"})
    text = (tmp_path / "r.html").read_text()
    assert (
        "alert(1)" in text
        and "<script>alert" not in text
        and text.count("</script>") == (Path(report.__file__).parent / "report.html").read_text().count("</script>")
    )


# ------------------------------------------------------------------------------------------------------ absurd sizes
U = TINY["network_g"]
SWIN = {"type": "SwinIR", "img_size": 56, "embed_dim": 12, "depths": [2], "num_heads": [2]}
NETWORKS = {
    "100,000 channels": merged(U, {"denoiser": {"inner_channel": 100_000}}),
    "10^12 channels": merged(U, {"denoiser": {"inner_channel": 10**12}}),
    "a wide predictor": merged(U, {"predictor": {"width": 100_000}}),
    "a deep predictor": merged(U, {"predictor": {"levels": 10**9}}),
    "EDSR": {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 100_000},
    "RRDBNet": {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 100_000, "num_block": 1},
    "SwinIR": {"type": "SwinIR", "img_size": 64, "embed_dim": 96_000, "depths": [2], "num_heads": [6]},
    "RIDNet": {"type": "RIDNet", "in_channels": 3, "mid_channels": 100_000, "out_channels": 3},
    "ADMUNet": {"type": "ADMUNet", "num_channels": 100_000},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_no_memory_holds(name):
    err, peak, _ = forked(check_network, NETWORKS[name], "network_g")
    assert isinstance(err, UserError) and peak < 2**29, err
    for word in ("network_g", "parameters", "GB of weights", "GB of memory are free"):
        assert word in str(err)


def test_the_estimate_is_the_networks_size(monkeypatch):
    from ucdir_plugin.registry import build_arch
    from ucdir_plugin.utils import memory

    state = torch.get_rng_state()
    for cfg in (U, {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8}, SWIN):
        net = build_arch(cfg)
        count = sum(t.numel() for t in [*net.parameters(), *net.buffers()])
        monkeypatch.setattr(memory, "available", lambda n=count: 4 * 5 * n)
        torch.set_rng_state(state)
        check_network(cfg, "network_g", 5)
        assert torch.equal(torch.get_rng_state(), state)  # nothing random is used up
        monkeypatch.setattr(memory, "available", lambda n=count: 4 * 5 * n - 20)
        with pytest.raises(UserError, match=r"weights, gradients, optimizer and average"):
            check_network(cfg, "network_g", 5)


@pytest.mark.campaign
@pytest.mark.parametrize(
    "cfg", [merged(U, {"denoiser": {"res_blocks": 10**6}}), {**NETWORKS["EDSR"], "num_feat": 8, "num_block": 10**7}]
)
def test_networks_of_a_million_layers(cfg, record_property):
    err, peak, took = forked(check_network, cfg, "network_g")
    assert isinstance(err, UserError) and "layers" in str(err) and peak < 2**30 and took < 10
    record_property("refused after, s", f"{took:.1f}")


ABSURD = {
    "steps": ({"val": {"sampling": {"steps": 10**6}}}, "val:sampling:steps"),
    "levels of noise": ({"diffusion": {"timesteps": 10**9}}, "diffusion:timesteps"),
    "border": ({"val": {"sampling": {"border": 10**9}}}, "val:sampling:border"),
    "scale": ({"scale": 10**9}, "scale"),
    "workers": ({"datasets": {"train": {"num_worker_per_gpu": 10**6}}}, "num_worker_per_gpu"),
    "port": ({"dist_params": {"port": 10**6}}, "dist_params:port"),
    "timeout": ({"dist_params": {"timeout": 1e15}}, "dist_params:timeout"),
    "iterations": ({"train": {"total_iter": 10**400}}, "total_iter"),
    "iterations as 1e30": ({"train": {"total_iter": 1e30}}, "total_iter"),
    "learning rate": ({"train": {"optim_g": {"lr": float("nan")}}}, "train:optim_g:lr"),
    "loss weight": ({"train": {"initial_opt": {"loss_weight": float("inf")}}}, "loss_weight"),
    "dropout": ({"network_g": {"denoiser": {"dropout": float("nan")}}}, "dropout"),
    "clipping": ({"train": {"grad_clip": float("inf")}}, "grad_clip"),
    "batch": ({"datasets": {"train": {"batch_size_per_gpu": 10**9}}}, "datasets:train"),
    "crop": ({"datasets": {"train": {"gt_size": 10**6}}}, "datasets:train"),
    "width": ({"network_g": {"denoiser": {"inner_channel": 100_000}}}, "network_g"),
}


def complete(change):
    opt = check_options(merged(TINY, change), True)
    for phase, dataset in opt["datasets"].items():
        dataset["phase"] = phase
    check_options_fit(opt, True)


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_options(name):
    change, option = ABSURD[name]
    err, peak, _ = forked(complete, change)
    assert isinstance(err, UserError) and option in str(err) and len(str(err)) < 1000 and peak < 2**28, err


def test_sensible_options_pass():
    complete({})


TOOLS = {
    "train.py": [
        (("network_g:denoiser:inner_channel=100000",), "would have"),
        (("datasets:train:batch_size_per_gpu=1000000000",), "crops of 16x16 pixels need"),
        (("name=..",), "option name"),
    ],
    "restore.py": [
        (("--steps", "1000000"), "steps"),
        (("--samples", "1000000000"), "samples"),
        (("--max-pixels", "nan"), "--max-pixels"),
        (("--max-pixels", "inf"), "--max-pixels"),
        (("--set", "border=1000000000"), "border"),
        (("--set", "a" + ":a" * 100 + "=1"), "--set"),
    ],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_absurd_arguments_of_the_tools(place, tool):
    for args, word in TOOLS[tool]:
        if tool == "train.py":
            call = ("-opt", place.write(TINY, "train.yml"), "--force_yml", *args)
        else:
            call = ("-opt", "options.yml", "-i", "photos", "-o", "out", *args)
        assert_one_line_error(place.run(tool, *call), word)
    left = set(os.listdir(place.folder))
    assert not left & {"experiments", "results", "out", "canary", "tb_logger"}


@pytest.mark.campaign
def test_every_arch_can_be_estimated_or_is_built_as_it_is(record_property):
    """Which of the registered archs the meta device takes, with their defaults."""
    import inspect

    from ucdir_plugin.archs.sizing import count_parameters
    from ucdir_plugin.registry import lookup

    known = {"num_in_ch": 3, "num_out_ch": 3, "in_channels": 3, "mid_channels": 8, "out_channels": 3, "num_feat": 8,
             "out_size": 64, "denoiser": {"type": "UCDIRDenoiser"}, "predictor": {"type": "SIDUNet"}}  # fmt: skip
    counted, tried = 0, 0
    for name in names("arch"):
        needed = [p.name for p in inspect.signature(lookup("arch", name)).parameters.values() if p.default is p.empty]
        if set(needed) <= known.keys():
            tried += 1
            counted += count_parameters({"type": name, **{key: known[key] for key in needed}}, name, 10**10) is not None
    assert counted == tried
    record_property("archs whose size is estimated", f"{counted} of {tried}")


def test_nothing_here_left_a_canary():
    assert not os.path.exists(CANARY) and "subprocess.Popen" not in sys.modules
