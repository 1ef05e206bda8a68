"""Sites and a coordinator whose messages are requests and replies, in one process: no engine between them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedcore.secagg.by_request.coordinator import CoordinatorByRequest
from fedcore.secagg.by_request.site import Membership, SiteByRequest
from fedcore.secagg.by_request.terms import RunTerms, Trained
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.protocol.wire_form import decode, encode

LAYOUT = "1" * 64
MODEL = b"m" * 32
SITES = ("va", "oslo", "rome", "bern")


def updates(sites, parameters):
    """One update a site, within a range of 1."""
    rng = np.random.default_rng(0)
    return {site: rng.uniform(-0.9, 0.9, parameters) for site in sites}


@dataclass
class LocalLink:
    """Every request makes a new object of its site, with nothing but the bytes of its memory.

    change: what a dishonest coordinator makes of a request, by (site, request); None for no request at all.
    """

    members: dict
    trains: dict
    memories: dict = field(default_factory=dict)
    answered: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    replies: list = field(default_factory=list)
    silent: set = field(default_factory=set)
    change: object = None

    def nodes(self):
        return [name for name in self.members if name not in self.silent]

    def ask(self, requests):
        for node, request in requests.items():
            self.asked.append((node, request))
            sent = request if self.change is None else self.change(node, request)
            if node in self.silent or sent is None:
                yield node, None
                continue
            if sent.training is not None:
                sent = replace(sent, model=sent.training)
            reply = self.site(node).answer(sent)
            self.replies.append((node, reply))
            yield node, reply

    def site(self, node):
        memory = self.memories.setdefault(node, {})
        counts = Counts(self.answered, node)
        return SiteByRequest("run-1", self.members[node], memory, self.trains[node], counts)


@dataclass
class Counts:
    """The count of replies of one site, as if on its disk."""

    kept: dict
    node: object

    def count(self):
        return self.kept.get(self.node, 0)

    def write(self, count):
        self.kept[self.node] = count


def run_of(count=4, protection="masked", *, names=SITES, parameters=7, rounds=3, **changes):
    """(coordinator, link, updates) of a run of so many sites, whose key epoch has not begun."""
    identities = {site: IdentityKey() for site in names[:count]}
    pins = {site: key.public for site, key in identities.items()}
    content = updates(names[:count], parameters)
    members = {s: Membership("hospitals", s, key, pins) for s, key in identities.items()}
    trains = {s: (lambda s=s: Trained(content[s], 40, {"train_loss": 0.5})) for s in content}
    link = LocalLink(members, trains)
    values = {"value_range": 1.0, "max_examples": 64, "metrics": {"train_loss": (0.0, 2.0)}}
    terms = RunTerms.make(
        "hospitals", "run-1", tuple(pins), parameters=parameters, layout=LAYOUT, rounds=rounds,
        protection=protection, **values | changes,
    )  # fmt: skip
    return CoordinatorByRequest(terms, pins, link), link, content


def one_round(run, number=1):
    return run.round(PlannedRound("update", number), MODEL, MODEL)


def said(link, site):
    """Names of all messages that a site replied with, in order."""
    replies = (reply for node, reply in link.replies if node == site)
    return [type(decode(data, object)).__name__ for reply in replies for data in reply.messages]


def kinds_of(request):
    """Names of the messages in a request."""
    return [type(decode(data, object)).__name__ for data in request.messages]


def without(site, kind):
    """`LocalLink.change` that never delivers a message of this kind to one site, as long as `on` is set."""

    def change(node, request):
        return None if change.on and node == site and kind in kinds_of(request) else request

    change.on = True
    return change


def lying(kind, edit, only=None):
    """`LocalLink.change` that edits messages of one kind: edit(message, request) gives both anew."""

    def change(node, request):
        sent = []
        for data in request.messages:
            message = decode(data, object)
            if type(message).__name__ == kind and only in {None, node}:
                message, request = edit(message, request)
                change.told += 1
            sent.append(encode(message))
        return replace(request, messages=sent)

    change.told = 0
    return change
