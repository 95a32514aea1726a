"""What is refused before a run is started."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from autoflip_flwr import Exploration
from autoflip_flwr.experiment import preflight
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.idle import idle
from autoflip_flwr.experiment.rules import ConfigError
from autoflip_flwr.storage.exploration_file import write_exploration

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is to see none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def refused(**settings: bool | int | float | str) -> str:
    with pytest.raises(ConfigError) as caught:
        preflight.check(Config(**settings), 0.0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_loads_nothing_heavy():
    code = (
        "import sys, autoflip_flwr.launch.cli; "
        "print(sorted({'torch', 'flwr', 'ray', 'numpy', 'rich', 'matplotlib', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_device_that_is_not_here(no_gpu: None, tmp_path: Path):
    output = str(tmp_path)
    assert refused(device="cuda", output_dir=output).startswith("device = 'cuda': no GPU that CUDA can see; auto takes")
    if sys.platform != "darwin":
        assert refused(device="mps", output_dir=output).startswith("device = 'mps': only macOS has it")
    preflight.check(Config(output_dir=output), 0.0)


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", None), ("0,1", None)], ids=["none", "minus one", "one", "two"]
)
def test_gpus_that_are_hidden_are_not_there(visible, count, monkeypatch):
    there = preflight.cuda_devices()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    expected = count if count is not None or there is None else min(there, len(visible.split(",")))
    assert preflight.cuda_devices() == expected


def test_more_than_the_machine_has(no_gpu: None):
    with pytest.raises(ConfigError, match=r"--gpus 0\.5: this machine has no GPU that CUDA can see; leave --gpus out"):
        preflight.check_resources(1, 0.5)
    count = os.cpu_count()
    with pytest.raises(ConfigError, match=rf"--cpus 4096: this machine has {count}, and each client would wait"):
        preflight.check_resources(4096, 0.0)
    preflight.check_resources(1, 0.0)


def test_pytorch_says_what_it_is_built_for():
    import torch

    assert preflight.torch_without_cuda() == (torch.version.cuda is None and torch.version.hip is None)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for wanted in (tmp_path / "file", tmp_path / "file" / "runs"):
        assert refused(output_dir=str(wanted)) == (
            f"output-dir = '{wanted}': {tmp_path / 'file'} is in the way, and is no folder"
        )
    (tmp_path / "away").symlink_to(tmp_path / "nowhere")
    assert "is in the way" in refused(output_dir=str(tmp_path / "away" / "runs"))
    if sys.platform == "linux":
        assert refused(output_dir="/proc/runs").startswith("output-dir = '/proc/runs': cannot write to /proc: ")
    preflight.check_writable(tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "file"]


def test_a_tracker_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    preflight.check_trackers(Config(trackers="tensorboard,wandb,mlflow"))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    assert refused(trackers="wandb", output_dir=str(tmp_path)) == (
        "trackers = 'wandb': the package wandb is not installed: pip install 'autoflip-flwr[wandb]'"
    )


def test_data_that_are_not_at_hand(tmp_path: Path, data_dir: str):
    message = refused(dataset="mnist", data_dir=str(tmp_path), output_dir=str(tmp_path))
    assert message.startswith(f"data-dir = '{tmp_path}': holds no mnist; looked for x_train.npy, ")
    for dataset in ("digits", "mnist", "cifar10"):
        preflight.check_data(Config(dataset=dataset, data_dir=data_dir))


def test_data_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("AUTOFLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AUTOFLIP_DATA", raising=False)
    for name in ("https_proxy", "http_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("no_proxy", "")
    for dataset in ("mnist", "fashion_mnist", "cifar10"):
        message = refused(dataset=dataset, output_dir=str(tmp_path))
        assert message == (
            f"dataset = '{dataset}': it is not here, and cannot be downloaded (127.0.0.1: Connection refused); "
            "give data-dir, or $AUTOFLIP_DATA, a folder that has it"
        )


def test_a_host_that_answers_is_reachable():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert preflight.unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") == ""


def test_an_exploration_of_another_kind_or_start(tmp_path: Path):
    other, ours = tmp_path / "other.safetensors", tmp_path / "ours.safetensors"
    save_file({"w": np.zeros(2)}, other)
    arrays = {"w": np.zeros(2)}
    settings = {"model": "cnn", "dataset": "digits", "seed": 7}
    write_exploration(ours, Exploration(arrays, arrays, {}, 3), arrays, settings=settings)
    output = str(tmp_path)
    (tmp_path / "text").write_text("no tensors")
    for path in (other, tmp_path / "text"):
        told = refused(exploration=str(path), output_dir=output)
        assert told.startswith(f"exploration = '{path}': damaged, or not an exploration (")
    assert refused(exploration=str(ours), output_dir=output).startswith(
        f"exploration = '{ours}': seed was 7, and is now 1"
    )
    preflight.check(Config(exploration=str(ours), output_dir=output, seed=7), 0.0)


def test_a_run_that_cannot_go_on(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"name": "something else"}')
    assert "not the record of a run" in refused(resume=str(tmp_path), output_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"lr": 0.5}}))
    assert refused(resume=str(tmp_path), output_dir=str(tmp_path)) == (
        f"resume = '{tmp_path}': lr was 0.5 there, and is now 0.003"
    )


def test_a_superlink_that_nobody_has_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    preflight.check_superlink("local")  # Flower's own, before it has made its file
    with pytest.raises(ConfigError, match=r"has no \[superlink.site\]; it has local, supergrid"):
        preflight.check_superlink("site")
    (tmp_path / "config.toml").write_text('[superlink]\ndefault = "site"\n[superlink.site]\naddress = "x:1"\n')
    preflight.check_superlink("site")
    with pytest.raises(ConfigError, match=r"--superlink default: .* has no \[superlink.default\]; it has site"):
        preflight.check_superlink("default")
    (tmp_path / "config.toml").write_text("[superlink")
    with pytest.raises(ConfigError, match="cannot be read"):
        preflight.check_superlink("site")


def test_settings_that_do_nothing_are_named():
    config = Config(method="fedavg", split="iid", optimizer="adam")
    given = ["sparsity", "scope", "alpha", "momentum", "lr"]
    assert idle(config, given) == [
        "alpha does nothing with split = 'iid', only with 'dirichlet'",
        "momentum does nothing with optimizer = 'adam', only with 'sgd'",
        "sparsity does nothing with method = 'fedavg'",
        "scope does nothing with method = 'fedavg'",
    ]
    assert idle(Config(), ["sparsity", "alpha"]) == []
    assert idle(config, []) == []
