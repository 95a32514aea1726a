"""The commands of docs/deployment.md and docker/, run as they stand there, on this machine's loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from apps import NO_FAILURES
from replay import ROOT, Replay, replaying, write_data
from test_docker import entrypoint, healthcheck, image_environment, interpolate
from test_docs import FENCE, section

from autoflip_flwr.launch import superlink

pytestmark = pytest.mark.slow

GUIDE = (ROOT / "docs" / "deployment.md").read_text("utf-8")
NODES = 3


@pytest.fixture
def replay(tmp_path: Path):
    for node in range(NODES):
        write_data(tmp_path / "data" / f"node-{node}", node, NODES + 1)
    write_data(tmp_path / "data" / "server", NODES, NODES + 1)
    with replaying(tmp_path) as running:
        running.said["/data/"] = f"{tmp_path}/data/"
        running.said["/path/to/"] = f"{running.folder}/"
        yield running


def lines(text: str) -> list[str]:
    return [line for kind, block in FENCE.findall(text) if kind == "bash" for line in block.splitlines()]


def connections(text: str) -> list[str]:
    return [block for kind, block in FENCE.findall(text) if kind == "toml"]


def the_record(folder: Path, nodes: int) -> None:
    (run,) = (folder / "runs").iterdir()
    told = json.loads((run / "summary.json").read_text())
    assert told["rounds"] == 2
    assert told["failures"] == NO_FAILURES
    assert told["bytes_by_node"].keys() == {str(node) for node in range(nodes)}


def test_three_nodes_with_data_of_their_own_and_what_the_command_exits_with(replay: Replay) -> None:
    text = section(GUIDE, "On one machine")
    replay.connect("".join(connections(text)))
    for line in lines(text):
        replay.line(line)
    the_record(replay.folder, NODES)

    command = ["autoflip", "run", "--superlink", "loopback", "--nodes", "3", "-c"]
    code, output = replay.call([*command, "dataset='mnist' data-dir='/no/such/folder'"])
    assert code == 1, output
    assert "autoflip: the run failed: data-dir = '/no/such/folder': must be an existing folder" in output
    code, output = replay.call([*command, "model='nope'"])
    assert code == 2, output
    assert "model = 'nope': must be one of" in output
    code, output = replay.call(["autoflip", "run", "--superlink", "nowhere"])
    assert code == 2, output
    assert "has no [superlink.nowhere]" in output


def test_the_same_with_tls_and_authentication(replay: Replay) -> None:
    for line in lines(section(GUIDE, "On one machine"))[:3]:
        replay.line(line)
    text = section(GUIDE, "With TLS and authentication")
    replay.connect("".join(connections(text)))
    for line in lines(text):
        replay.line(line)
        if line.startswith("docker/certificates.sh"):
            replay.line("docker/certificates.sh certificates --node stranger")
    the_record(replay.folder, NODES)

    node = next(line for line in lines(text) if line.startswith("flower-supernode"))
    port = superlink._free_port()
    for given in ("--auth-supernode-private-key certificates/stranger", ""):  # a key that is not registered, or none
        line = re.sub("--auth-supernode-private-key [^ ]+", given, node).replace("18094", str(port))
        replay.line(line)
        assert replay.started[-1].wait(120) != 0, replay.tail()
        said = replay.log(len(replay.started) - 1).read_text()
        print(f"refused with exit code {replay.started[-1].returncode}: {said}")
    code, output = replay.call(["flwr", "supernode", "list", "secure", "--format", "json"])
    assert code == 0, output
    assert [each["status"] for each in json.loads(output)["nodes"]] == ["online"] * NODES


def test_the_services_of_the_compose_file_natively(replay: Replay, tmp_path: Path) -> None:
    text = (ROOT / "docker" / "README.md").read_text("utf-8")
    docker, compose = replay.folder / "docker", yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    (docker / "data").mkdir()
    for number, name in enumerate(("server", "client-1", "client-2")):
        (docker / "data" / name).symlink_to(tmp_path / "data" / ("server" if not number else f"node-{number}"))
    port, health = str(superlink._free_port()), str(superlink._free_port())
    replay.said |= {r":8000\b": f":{port}"}
    replay.said.pop("/data/")
    replay.connect("".join(connections(text)))
    up = lines(section(text, "One machine: a SuperLink and two clients"))
    ports: dict[str, str] = {}
    private: dict[str, Path] = {}  # what is /tmp in a container

    def serve(name: str) -> None:
        service = compose["services"][name]
        target = service["build"]["target"]
        private[name] = tmp_path / name
        private[name].mkdir()
        words = [*entrypoint(target), *(interpolate(word) for word in service["command"])]
        ports[name] = port if name == "superlink" else health if name == "serverapp" else str(superlink._free_port())
        mounts = {each["target"]: docker / each["source"] for each in service.get("volumes", ())}
        for kind in ("configs", "secrets"):
            mounts |= {each["target"]: docker / compose[kind][each["source"]]["file"] for each in service.get(kind, ())}
        assert all(path.exists() for path in mounts.values()), mounts
        given = " \n".join(words)
        for mounted, path in mounts.items():
            given = given.replace(mounted, str(path.resolve()))
        given = given.replace("0.0.0.0", "127.0.0.1").replace("superlink:8000", f"localhost:{port}")
        given = given.replace("--port=8000", f"--port={port}").replace(":8099", f":{health}")
        words = given.split(" \n")
        if name.startswith("client"):
            words.append(f"--port={ports[name]}")  # they share this machine's loopback
        environment = image_environment(target) | service.get("environment", {})
        for key, value in environment.items():
            value = interpolate(value).replace("/venv/bin:$PATH", replay.environment["PATH"])
            environment[key] = value.replace("/tmp", str(private[name])).replace("/data", str(mounts.get("/data")))
        environment["PYTHONPATH"] = str(ROOT)  # the package is installed in the images
        replay.start(words, docker, environment)
        places = mounts | {"/usr/local/lib/healthcheck.py": ROOT / "docker" / "healthcheck.py"}
        check = [str(places.get(word, word)) for word in healthcheck(target)]
        check = [re.sub(r":(8000|8099|9094)\b", f":{ports[name]}", word) for word in check]
        replay.wait(lambda: replay.call(check)[0] == 0)

    for line in up:
        words = replay.here(line)
        if "docker compose up -d --wait" in line:
            for name in ("superlink", "serverapp"):
                serve(name)
        elif line == "docker compose up -d":
            for name in ("client-1", "client-2"):
                serve(name)
        elif not line.startswith(("docker compose", "echo")):
            short = words.replace("'dataset", "'num-server-rounds=2 dataset")
            code, output = replay.call(["bash", "-c", short], cwd=docker)
            assert code == 0, output + replay.tail()
    the_record(docker, 2)
    assert (docker / "state" / "superlink.db").stat().st_size > 0
    # one that does not know the secret gets no server app to run
    (docker / "certificates" / "superexec.secret").write_text("another")
    words = ["flower-superexec", f"--runtime-api-address=localhost:{port}"]
    words += [f"--root-certificates={docker}/certificates/ca.crt"]
    stranger = replay.start([*words, f"--superexec-auth-secret-file={docker}/certificates/superexec.secret"])
    stranger.wait(60)
    assert "SuperExec authentication failed" in replay.log(0).read_text()
