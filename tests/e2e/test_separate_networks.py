"""A new federation whose parties are each in a network of their own: what they need to reach, and what they do not.

The coordinator and every site have a network namespace, with one link from each site to the coordinator and no other.
Where namespaces cannot be made the test is skipped; the whole story without them is in `test_new_federation.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
from support.networks import Socket, needs_namespaces, program_in, sockets_of
from support.scripts import load_script

from fedcore.bench.wan import HUB, LinkSpeed, links
from fedcore.types import SiteId

Commands = load_script("demo_deployed.py").Commands

SITES = tuple(map(SiteId, "abc"))
PORT, ENROL_PORT = 7443, 7444
CONFIG = "--config fed/federation.toml"

TASK = """
import numpy as np
import torch

import fedcore


def data(source):
    rows = np.loadtxt(source, delimiter=",", dtype=np.float32)
    return rows[:, :3], rows[:, 3].astype(np.int64)


def loss(outputs, targets):
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float())


task = fedcore.Task(
    name="small", data=data, model=lambda: torch.nn.Linear(3, 1), loss=loss, metrics=("accuracy",)
)
"""
JOB = """\
task = "small.py"
[train]
batch_size = 64
[round]
rounds = 2
[protect]
max_examples = 64
"""

REACHES = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
"""
LISTENS = """
import socket
with socket.create_server(("0.0.0.0", 9000)) as server:
    print("listens", flush=True)
    input()
"""


def reaches(command, host, port):
    """Why a connection is not made, in one line; "" where it is."""
    line = command([sys.executable, "-ISS", "-c", REACHES, host, str(port)])
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def found(commands):
    """The operator's federation, with a running coordinator."""
    folder = commands.folder
    (folder / "passphrase").touch(0o600)
    (folder / "passphrase").write_text("a passphrase of this test only")
    commands.run(
        f"fed-coordinator init town --out fed --host {HUB} --port {PORT} --passphrase-file passphrase"
    )
    with (folder / "fed" / "federation.toml").open("a") as file:
        file.write('passphrase_file = "../passphrase"\n')
    commands.begin("coordinator", f"fed-coordinator serve {CONFIG}", "listening on")


def join(commands, site):
    """A site joins from its own network, and runs there."""
    folder, random = commands.folder, np.random.default_rng(ord(site))
    rows = random.normal(size=(40, 3))
    np.savetxt(folder / f"{site}.csv", np.column_stack([rows, rows[:, 0] > 0]), delimiter=",")
    line = commands.run(f"fed-coordinator invite {site} {CONFIG}").strip()
    more = f"--task small.py --source {site}.csv"
    commands.run(f"site-{site} join --out {site} {more}", line=f"{line}\n")
    settings, policy = folder / site / "site.toml", folder / site / "policy.toml"
    settings.write_text(f'sandbox = "none"\n{settings.read_text()}')
    policy.write_text(f'{policy.read_text()}roster = "any"\n')


def over(commands, job):
    return all(commands.job_at(site, job).get("stage") == "over" for site in SITES)


@needs_namespaces
def test_sites_in_separate_networks_reach_the_coordinators_ports_and_nothing_else(tmp_path):
    (tmp_path / "small.py").write_text(TASK)
    (tmp_path / "job.toml").write_text(JOB)
    env = {"FEDCORE_OPERATOR": "fed/operator/operator.toml"}
    with links(SITES, LinkSpeed(delay_ms=2, mbit=1000)) as network:
        here = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
        programs = {"fed-coordinator": program_in(here, "fedcore_server.cli")}
        for site, (process, _) in network.ends.items():
            there = f"/proc/{process}/ns/net"
            programs[f"site-{site}"] = program_in(there, "fedcore_clients.cli")
        commands = Commands(tmp_path, programs, env)
        try:
            found(commands)
            hub = {Socket(True, port, "", 0) for port in (PORT, ENROL_PORT)}
            assert sockets_of(commands.running["coordinator"].pid) == hub
            for site in SITES:
                join(commands, site)
            for site in SITES:
                commands.begin(site, f"site-{site} run --config {site}/site.toml", "connected to")
            commands.run("site-a check --config a/site.toml")
            job = commands.run("fed-coordinator submit job.toml").strip()
            seen = {name: set() for name in commands.running}

            def looked():
                for name in commands.running:
                    seen[name] |= sockets_of(network_of(network, name))
                return over(commands, job)

            commands.until(looked, f"{job} over at every site")
            models = {commands.job_at(site, job)["model_sha256"] for site in SITES}
            assert len(models) == 1 and None not in models
            for site in SITES:
                ends = {(each.listens, each.remote, each.remote_port) for each in seen[site]}
                assert ends == {(False, HUB, PORT)}, "one connection out, and nothing that listens"
            at_hub = {each for each in seen["coordinator"] if not each.listens}
            assert {each.port for each in at_hub if each.remote != HUB} == {PORT}
            assert {each for each in seen["coordinator"] if each.listens} == hub

            a, b = (lambda line, site=site: network.command(site, line) for site in "ab")
            line = b([sys.executable, "-ISS", "-c", LISTENS])
            with subprocess.Popen(line, stdin=-1, stdout=-1, text=True) as listener:
                assert listener.stdout.readline() == "listens\n"
                assert reaches(lambda line: line, "10.77.1.2", 9000) == "", (
                    "control: it can be reached"
                )
                assert "unreachable" in reaches(a, "10.77.1.2", 9000)
                listener.communicate("\n")
            assert reaches(a, HUB, PORT) == "" == reaches(a, HUB, ENROL_PORT)
            assert "refused" in reaches(a, HUB, 9443)
        finally:
            commands.end()


def network_of(network, name):
    """A process in the namespace of a party."""
    return network.ends[SiteId(name)][0] if name in network.ends else os.getpid()
