"""Weights and training states: atomic, safe, and one clear line when something does not fit."""

import os
import pickle

import pytest
import torch
from conftest import assert_one_line_error
from test_parity import formula_state

from ucdir_plugin.archs import SIDUNet
from ucdir_plugin.utils import checkpoints, training_states
from ucdir_plugin.utils.errors import UserError


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_atomic_save_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.pth"
    training_states.atomic_save({"x": torch.ones(2)}, path)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        training_states.atomic_save({"x": lambda: None}, path)
    torch.testing.assert_close(checkpoints.read_checkpoint(path)["x"], torch.ones(2))
    training_states.remove_leftovers(str(tmp_path))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_nothing_but_a_rename_touches_the_target(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    training_states.atomic_save({"x": torch.zeros(2)}, path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_states.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training_states.atomic_save({"x": torch.ones(2)}, path)
    torch.testing.assert_close(checkpoints.read_checkpoint(path)["x"], torch.zeros(2))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_failed_save_names_the_path_and_the_space(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/a.pth: .*"):
        training_states.atomic_save({}, tmp_path / "file" / "a.pth")


def test_a_hostile_pickle_is_refused(tmp_path):
    bomb, mark = tmp_path / "bomb.pth", tmp_path / "mark"
    torch.save({"params": Hostile(str(mark))}, bomb)
    with pytest.raises(UserError, match=r"bomb.pth is refused: .*run code"):
        checkpoints.read_checkpoint(bomb)
    bomb.write_bytes(pickle.dumps(Hostile(str(mark))))
    with pytest.raises(UserError, match=r"bomb.pth"):
        checkpoints.read_checkpoint(bomb)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04" + b"\0" * 50])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"checkpoint .*{name} cannot be read: it is damaged"):
        checkpoints.read_checkpoint(tmp_path / name)


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.arange(3.0)}, tmp_path / "a.safetensors")
    torch.testing.assert_close(checkpoints.read_checkpoint(tmp_path / "a.safetensors")["x"], torch.arange(3.0))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.read_checkpoint(tmp_path / "a.pth")


def test_another_architecture_is_named():
    net, other = SIDUNet(width=2, levels=2), SIDUNet(width=4, levels=2)
    with pytest.raises(
        UserError, match=r"x.pth is of another architecture than SIDUNet: has other shapes for 15 \(conv"
    ):
        checkpoints.load_state_dict(net, other.state_dict(), "x.pth")
    deeper = SIDUNet(width=2, levels=3).state_dict()
    with pytest.raises(UserError, match=r"has unknown \d+ \("):
        checkpoints.load_state_dict(net, deeper, "x.pth")
    with pytest.raises(UserError, match="holds no weights"):
        checkpoints.load_state_dict(net, {"a": 1}, "x.pth")


def test_not_strict_loads_what_fits():
    net, other = SIDUNet(width=2, levels=2), SIDUNet(width=2, levels=2, out_channel=4)
    before = net.conv4_1.weight.clone()
    checkpoints.load_state_dict(net, other.state_dict(), "x.pth", strict=False)
    torch.testing.assert_close(net.conv1_1.weight, other.conv1_1.weight)
    torch.testing.assert_close(net.conv4_1.weight, before)


def test_convert_released_checkpoint(workplace):
    state = formula_state()
    buffers = {"betas": torch.zeros(4), "posterior_mean_coef2": torch.zeros(4)}
    torch.save({**state, **buffers}, workplace.folder / "gen.pth")
    done = workplace.run("convert_weights.py", "--from", "ucdir", "gen.pth", "out.pth")
    assert done.returncode == 0, done.stderr
    assert "dropped the schedule buffers betas, posterior_mean_coef2" in done.stdout
    assert "105.11 M parameters" in done.stdout
    converted = checkpoints.read_checkpoint(workplace.folder / "out.pth")
    for key in ("params", "params_ema"):
        assert converted[key].keys() == state.keys()
    torch.testing.assert_close(converted["params_ema"]["predictor.conv5_2.bias"], state["predictor.conv5_2.bias"])
    assert (workplace.folder / "out.pth").stat().st_size < 1.01 * 4 * 105114862  # stored once

    torch.save({**state, "mystery": torch.zeros(1)}, workplace.folder / "odd.pth")
    done = workplace.run("convert_weights.py", "--from", "ucdir", "odd.pth", "odd_out.pth")
    assert_one_line_error(done, "odd.pth", "unknown 1 (mystery)")
    assert not (workplace.folder / "odd_out.pth").exists()


def resume_options(folder, **path):
    folders = {"training_states": str(folder / "training_states"), "models": str(folder / "models")}
    return {"auto_resume": True, "network_g": {}, "path": {**folders, "param_key_g": "params_ema", **path}}


def write_state(folder, iteration):
    training_states.atomic_save({"iter": iteration, "epoch": 0}, folder / "training_states" / f"{iteration}.state")
    training_states.atomic_save({"params": {}}, folder / "models" / f"net_g_{iteration}.pth")


def test_the_newest_readable_state_wins(tmp_path, capsys):
    for iteration in (8, 100, 20):
        write_state(tmp_path, iteration)
    (tmp_path / "training_states" / "notes.txt").write_text("")
    opt = resume_options(tmp_path)
    assert training_states.find_resume_state(opt)["iter"] == 100
    assert opt["path"]["pretrain_network_g"] == str(tmp_path / "models" / "net_g_100.pth")
    assert opt["path"]["param_key_g"] == "params"
    (tmp_path / "training_states" / "100.state").write_bytes(b"cut short")
    assert training_states.find_resume_state(resume_options(tmp_path))["iter"] == 20
    (tmp_path / "models" / "net_g_20.pth").unlink()
    assert training_states.find_resume_state(resume_options(tmp_path))["iter"] == 8
    identity = {**resume_options(tmp_path, ignore_resume_networks=["network_i"]), "network_i": {}}
    assert training_states.find_resume_state(identity)["iter"] == 8  # a network that is never saved
    (tmp_path / "training_states" / "8.state").unlink()
    with pytest.raises(UserError, match="no training state in .* can be read; move that folder away"):
        training_states.find_resume_state(resume_options(tmp_path))
    out = capsys.readouterr().out
    assert "passed over" in out
    assert "100.state" in out
    assert "net_g_20.pth does not exist" in out


def test_nothing_to_resume(tmp_path):
    assert training_states.find_resume_state(resume_options(tmp_path)) is None
    named = {**resume_options(tmp_path, resume_state=str(tmp_path / "7.state")), "auto_resume": False}
    with pytest.raises(UserError, match=r"7.state does not exist"):
        training_states.find_resume_state(named)
