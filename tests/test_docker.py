"""Images, compose files and the script for certificates: what can be held to without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from autoflip_flwr.launch.superlink import TOOLS

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
COMPOSE = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in sorted(DOCKER.glob("compose*.yaml"))}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
GIVEN = {"AUTOFLIP_USER": "1000:1000", "SUPERLINK": "host:8000", "PARTITION_ID": "0", "DATA": "/d", "KEY": "./key"}

VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def interpolate(text: str) -> str:
    """A value of a compose file, with its variables at their defaults; those without one at `GIVEN`."""
    return VARIABLE.sub(lambda found: found[3] if found[2] == "-" else GIVEN[found[1]], text)


def pins() -> dict[str, str]:
    lines = (DOCKER / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def stage(name: str) -> str:
    """The instructions of one stage of the Dockerfile."""
    (found,) = (
        each for each in re.split(r"(?m)^(?=FROM )", DOCKERFILE)[1:] if each.split("\n")[0].endswith(f" {name}")
    )
    return found


def entrypoint(target: str) -> list[str]:
    return json.loads(re.search(r"(?m)^ENTRYPOINT (.*)$", stage(target))[1])


def healthcheck(target: str) -> list[str]:
    return json.loads(re.search(r"(?m)^HEALTHCHECK .*?CMD (.*)$", stage(target))[1])


def image_environment(target: str) -> dict[str, str]:
    lines = re.findall(r"(?m)^ENV (.*)$", stage("runtime") + stage(target))
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


@cache
def options(command: str) -> set[str]:
    help_ = subprocess.run([TOOLS / command, "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z-]+", help_.stdout))


def services() -> list[tuple[str, str, dict]]:
    """Services that are whole; an override file adds to those of another."""
    return [
        (file, name, service)
        for file, content in COMPOSE.items()
        for name, service in content["services"].items()
        if "image" in service
    ]


each_service = pytest.mark.parametrize(
    ("file", "name", "service"), services(), ids=lambda value: value if isinstance(value, str) else ""
)


def test_compose_files_keep_to_the_published_schema():
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, *(DOCKER / name for name in COMPOSE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@each_service
def test_a_service_has_no_more_rights_than_it_needs(file, name, service):
    assert interpolate(service["user"]) == "1000:1000"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & service.keys()
    for volume in service.get("volumes", ()):
        assert volume["bind"] == {"create_host_path": False}
        assert volume.get("read_only", False) == (volume["target"] == "/data")
    assert all(bind.startswith("127.0.0.1:") for bind in map(interpolate, service.get("ports", ())))


@each_service
def test_images_are_built_here_at_the_version_of_the_project(file, name, service):
    build = service["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
    backend = "" if build["target"] == "superlink" else "-cpu"
    assert interpolate(service["image"]) == f"autoflip-{build['target']}:{PROJECT['version']}{backend}"


@pytest.mark.runs
@each_service
def test_commands_have_options_that_flower_knows(file, name, service):
    (command,) = entrypoint(service["build"]["target"])
    used = {interpolate(word).split("=")[0] for word in service["command"]}
    assert used <= options(command)
    assert "--insecure" not in used


@each_service
def test_what_a_service_mounts_is_declared(file, name, service):
    for kind in ("configs", "secrets"):
        for each in service[kind]:
            assert each["source"] in COMPOSE[file][kind]
            given = [word.split("=", 1)[1] for word in service["command"] if each["target"] in word]
            assert given == [each["target"]]


def test_clients_reach_the_superlink_alone():
    content = COMPOSE["compose.yaml"]
    networks = {name: set(service["networks"]) for name, service in content["services"].items()}
    for client in ("client-1", "client-2"):
        (own,) = networks[client]
        assert {name for name, joined in networks.items() if own in joined} == {client, "superlink"}
        assert content["networks"][own] == {"internal": True}
    assert networks["serverapp"] == {"server"}
    assert content["networks"]["server"] == {"internal": True}


def test_clients_have_a_key_a_number_and_data_each():
    clients = [COMPOSE["compose.yaml"]["services"][f"client-{number}"] for number in (1, 2)]
    for number, client in enumerate(clients):
        assert [each["source"] for each in client["secrets"]] == [f"client-{number + 1}"]
        assert [each["source"] for each in client["volumes"]] == [f"./data/client-{number + 1}"]
        assert f'--node-config=partition-id={number} data-dir="/data" ' in map(interpolate, client["command"])


def test_gpu_files_name_services_that_are_there():
    for base, gpu in (("compose.yaml", "compose.cuda.yaml"), ("compose.client.yaml", "compose.client.cuda.yaml")):
        clients = {name for name in COMPOSE[base]["services"] if name.startswith("client")}
        assert COMPOSE[gpu]["services"].keys() == clients
        for service in COMPOSE[gpu]["services"].values():
            (device,) = service["deploy"]["resources"]["reservations"]["devices"]
            assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_no_image_is_root_and_each_has_a_health_check():
    assert re.findall(r"(?m)^USER (.*)$", DOCKERFILE) == ["10001:10001"]
    for target in ("superlink", "serverapp", "client"):
        assert stage(target).startswith("FROM runtime AS ")
        assert healthcheck(target)[:2] == ["python", "/usr/local/lib/healthcheck.py"]
    assert "\nUSER " in stage("runtime")
    assert "COPY docker/healthcheck.py /usr/local/lib/healthcheck.py" in stage("runtime")
    assert re.search(r"(?m)^ARG PYTHON_VERSION=3\.11\.\d+$", DOCKERFILE)
    bases = {each.split("@")[0] for each in re.findall(r"(?m)^FROM (\S*/?\S*:\S*) ", DOCKERFILE)}  # @: a digest
    assert bases == {"python:${PYTHON_VERSION}-slim-bookworm"}


def test_versions_are_pinned_within_the_projects_and_as_the_readme_says():
    pinned = pins()
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["app"]]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement
    tested = (ROOT / "README.md").read_text("utf-8").split("## Tested on")[1]
    for name in ("flwr", "torch", "torchvision", "numpy"):
        assert f"{name} {pinned[name]}" in tested
    if metadata.version("flwr") == pinned["flwr"]:
        uv = next(each for each in map(Requirement, metadata.requires("flwr") or ()) if each.name == "uv")
        assert uv.specifier.contains(pinned["uv"])
    assert pinned["uv"] == re.search(r"ARG UV_VERSION=(\S+)", DOCKERFILE)[1]


def test_all_that_the_images_hold_is_pinned():
    """From what the Dockerfile names down to the last requirement; CUDA's libraries differ between its builds."""
    pinned = pins()
    cuda = re.compile("(cuda|nvidia)-")
    assert all(re.fullmatch(r"[a-z0-9-]+", name) and not cuda.match(name) for name in pinned)
    assert all(re.fullmatch(r"[0-9]+(\.[0-9]+)+(\.post[0-9]+)?", version) for version in pinned.values())
    named = {
        name
        for line in re.findall(r"uv pip install --python /venv (.*)", DOCKERFILE)
        for name in shlex.split(line)
        if re.fullmatch(r"[a-z][a-z-]*", name)
    }
    builds = (Requirement(each).name for each in PYPROJECT["build-system"]["requires"])
    ahead = [(name, "") for name in (*named, *builds, *(Requirement(each).name for each in PROJECT["dependencies"]))]
    seen = set()
    while ahead:
        name, extra = ahead.pop()
        if (name, extra) in seen or cuda.match(name):
            continue
        seen.add((name, extra))
        assert name in pinned
        if metadata.version(name) != pinned[name]:
            continue  # another version's requirements tell nothing of those of the pinned one
        for each in map(Requirement, metadata.requires(name) or ()):
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                ahead += [(canonicalize_name(each.name), extra) for extra in ("", *each.extras)]
    assert {"flwr", "torch", "hatchling"} <= {name for name, _ in seen}


def test_what_the_images_copy_is_not_ignored():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"(?m)^COPY (?!--from)(.*) \S+$", DOCKERFILE)
    names = {name for line in copied for name in line.split()}
    assert names == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in names)


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_the_health_check_tells_the_truth():
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    codes = []
    for path in ("health", "other"):
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        codes.append(subprocess.run([sys.executable, DOCKER / "healthcheck.py", url], capture_output=True).returncode)
    server.shutdown()
    server.server_close()
    url = f"grpc://127.0.0.1:{server.server_port}"
    codes.append(subprocess.run([sys.executable, DOCKER / "healthcheck.py", url], capture_output=True).returncode)
    assert codes == [0, 1, 1]


def certificates(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DOCKER / "certificates.sh", *arguments], capture_output=True, text=True)


def test_certificates_and_keys(tmp_path: Path):
    folder = tmp_path / "certificates"
    hosts = ["--host", "superlink", "--host", "192.0.2.7", "--host", "localhost", "--host", "2001:db8::1"]
    done = certificates(folder, *hosts, "--node", "a", "--node", "b", "--days", "30")
    assert done.returncode == 0, done.stderr
    assert folder.stat().st_mode & 0o777 == 0o700
    public = {"ca.crt", "server.crt", "a.pub", "b.pub"}
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == (0o644 if path.name in public else 0o600), path
    assert {path.name for path in folder.iterdir()} == public | {"ca.key", "server.key", "superexec.secret", "a", "b"}
    verified = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", folder / "ca.crt", folder / "server.crt"], capture_output=True
    )
    assert verified.returncode == 0, verified.stderr
    server = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "superlink"]
    assert [*map(str, names.get_values_for_type(x509.IPAddress))] == ["127.0.0.1", "192.0.2.7", "2001:db8::1"]
    assert (server.not_valid_after_utc - server.not_valid_before_utc).days == 30
    keys = [load_ssh_private_key((folder / node).read_bytes(), None).public_key() for node in "ab"]
    assert keys == [load_ssh_public_key((folder / f"{node}.pub").read_bytes()) for node in "ab"]
    assert keys[0] != keys[1]


def test_certificates_add_and_renew_but_overwrite_nothing(tmp_path: Path):
    assert certificates(tmp_path, "--host", "one", "--node", "a").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments in (["--host", "two"], ["--node", "a"], ["--node", "b", "--node", "a"]):
        done = certificates(tmp_path, *arguments)
        assert done.returncode == 2
        assert "is there already; nothing is overwritten" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert certificates(tmp_path, "--node", "b").returncode == 0
    for name in ("server.crt", "server.key", "superexec.secret"):
        (tmp_path / name).unlink()
    assert certificates(tmp_path, "--host", "two").returncode == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys() | {"b", "b.pub"}
    assert {name for name in before if after[name] != before[name]} == {"server.crt", "server.key", "superexec.secret"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage"),
        (["."], "nothing to make"),
        ([".", "--node"], "--node needs a value"),
        ([".", "--node", "../a"], "--node: letters"),
        ([".", "--node", "a", "--node", "a"], "twice"),
        ([".", "--host", "a,IP:192.0.2.1"], "--host: a DNS name"),
        ([".", "--host", "a", "--days", "0"], "--days: a number"),
        ([".", "b", "--node", "a"], "one folder"),
        ([".", "--force"], "no such option"),
    ],
)
def test_certificates_refuse(arguments: list[str], message: str, tmp_path: Path):
    done = subprocess.run([DOCKER / "certificates.sh", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert os.listdir(tmp_path) == []
