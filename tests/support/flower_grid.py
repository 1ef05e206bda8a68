"""Flower's grid in one process: every message and every context goes through its protobuf form, and each message
finds a ClientApp that knows nothing but its context, as in a new process."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from fedcore_clients.flower_identities import write_identities
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

NAMES = ("va", "oslo", "rome", "bern")


class InProcessGrid(Grid):
    """apps: {node id: ClientApp}. Every message is answered when it is pulled. silent: nodes that answer nothing;
    change: what a dishonest ServerApp makes of the content of a message, by (node id, content)."""

    def __init__(self, apps, node_configs, run_id=7):
        self.apps, self._run = apps, SimpleNamespace(run_id=run_id)
        self.contexts = {
            node: Context(run_id, node, config, RecordDict(), {})
            for node, config in node_configs.items()
        }
        self.waiting: dict[str, Message] = {}
        self.silent: set[int] = set()
        self.change = None
        self.replies: list[Message] = []
        self.sent = 0

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return [node for node in self.apps if node not in self.silent]

    def push_messages(self, messages):
        tickets = []
        for message in messages:
            self.sent += 1
            tickets.append(str(self.sent))
            self.waiting[tickets[-1]] = message
        return tickets

    def pull_messages(self, message_ids) -> Iterable[Message]:
        return [self._answered(self.waiting.pop(each)) for each in message_ids]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def _answered(self, message):
        node = message.metadata.dst_node_id
        sent = message_from_proto(message_to_proto(message))
        if node in self.silent:
            return Message(Error(5, "node unavailable"), reply_to=sent)
        if self.change is not None:
            sent.content = self.change(node, sent.content)
        context = context_from_proto(context_to_proto(self.contexts[node]))
        reply = self.apps[node](sent, context)
        self.contexts[node] = context_from_proto(context_to_proto(context))
        self.replies.append(reply)
        return message_from_proto(message_to_proto(reply))


class SimulatedGrid(InProcessGrid, InMemoryGrid):
    """As the nodes of a simulation by `flwr run`: the node config has a node's place and nothing else."""

    def __init__(self, app, places):
        configs = {
            100 + place: {"partition-id": place, "num-partitions": places}
            for place in range(places)
        }
        super().__init__(dict.fromkeys(configs, app), configs)


def grid_of(folder, app_of, names=NAMES):
    """(grid, sites.toml) of a federation of these sites. app_of: the ClientApp of a site's name."""
    sites = write_identities(folder / "identities", "hospitals", names)
    nodes = dict(enumerate(names, start=100))
    configs = {n: {"fedcore": str(sites.parent / name / "site.toml")} for n, name in nodes.items()}
    return InProcessGrid({n: app_of(name) for n, name in nodes.items()}, configs), sites
