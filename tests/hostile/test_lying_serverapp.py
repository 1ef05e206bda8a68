"""A ServerApp that lies to the mod of Flower's ClientApps, over Flower's own messages.

Every test takes an honest run up to one message, sends the lie in its place by hand, and then asks what the site
answered and what it remembers. The control of each is the same site's answer to the honest message: the lie is of the
same form, sent at the same moment, so only the named check stands between it and such an answer.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from support.flower_grid import NAMES, grid_of

from fedcore.secagg import protections
from fedcore.secagg.by_request.requests import BODY, RECORD, STYPE, Request
from fedcore.secagg.by_request.terms import RunTerms
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol.messages import Confirmations, sign
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.store import container
from tests.unit.clients.test_flower import app_of, record, secure

NODES = dict(zip(NAMES, range(100, 104), strict=True))


pytestmark = pytest.mark.usefixtures("flower_task")


class Stopped(Exception):
    """The honest ServerApp goes no further."""


def opened(content):
    """(request, its messages) of what a node is sent."""
    body = content[BODY]["body"].data if BODY in content else b""
    request = Request.of_parts(dict(content[RECORD]), body, b"")
    return request, [decode(data, object) for data in request.messages]


def closed(content, request):
    """The content with another request in it."""
    found = RecordDict({n: r for n, r in content.items() if n not in {RECORD, BODY}})
    found[RECORD] = ConfigRecord(dict(request.parts()))
    if request.body:
        body = Array(dtype="uint8", shape=(len(request.body),), stype=STYPE, data=request.body)
        found[BODY] = ArrayRecord({"body": body})
    return found


def names(messages):
    return [type(each).__name__ for each in messages]


class LyingServerApp:
    """A run of four sites up to a message of a kind, the nth of each site. honest: {site: what it would get now};
    before: (site, content) of all that was sent until then."""

    def __init__(self, folder, until, *, nth=1, **changes):
        self.grid, self.sites = grid_of(folder, app_of)
        self.before, self.honest = [], {}
        self._until, self._nth = until, nth
        self.grid.change = self._change
        with pytest.raises(Stopped):
            secure(self.sites, **changes).start(self.grid, record(), num_rounds=nth, timeout=0.2)
        self.grid.change = None

    def _change(self, node, content):
        if self._until in names(opened(content)[1]):
            self._nth -= node == NODES["va"]
            if self._nth == 0:  # a stage's messages are all made before the first is answered
                waiting = self.grid.waiting.values()
                sent = {m.metadata.dst_node_id: m.content for m in waiting} | {node: content}
                self.honest = {name: sent[number] for name, number in NODES.items()}
                raise Stopped
        self.before.append((NAMES[node - 100], copy.deepcopy(content)))
        return content

    def ask(self, name, content):
        """A site's reply: its messages, and the line of its refusal."""
        (reply,) = self.grid.send_and_receive([Message(content, NODES[name], "train")])
        parts = reply.content[RECORD]
        return [decode(data, object) for data in parts["messages"]], parts["refused"].decode()

    def lied(self, name, edit, **fields):
        """The honest content for a site with its messages edited, and other fields of the request."""
        request, messages = opened(self.honest[name])
        sent = [encode(edit(each)) for each in messages]
        return closed(self.honest[name], replace(request, messages=sent, **fields))

    def memory(self, name):
        kept = self.grid.contexts[NODES[name]].state[RECORD]
        return {key: kept[key].data for key in kept}


# --- Swapped keys ---------------------------------------------------------------------------------------------------


def of_a_stranger(bundle):
    """rome's keys, made and signed by the ServerApp: it would open every share that is sealed for rome."""
    stranger = IdentityKey()
    keys = [
        sign(replace(k, self_seed_hash=b"x" * 32), stranger) if k.site == "rome" else k
        for k in bundle.keys
    ]
    return replace(bundle, keys=tuple(keys))


def exchanged(bundle):
    """Each of two sites under the other's keys."""
    by_site = {each.site: each for each in bundle.keys}
    other = {"rome": "bern", "bern": "rome"}
    keys = [replace(by_site[other.get(k.site, k.site)], site=k.site) for k in bundle.keys]
    return replace(bundle, keys=tuple(keys))


def twice(bundle):
    """One site's keys at the place of another's as well."""
    return replace(bundle, keys=(*bundle.keys[:-1], bundle.keys[0]))


@pytest.mark.parametrize("lie", [of_a_stranger, exchanged, twice])
def test_swapped_keys_get_no_share(tmp_path, lie):
    """The signature in `round/site/sharing.py`, and what a bundle of keys must be."""
    liar = LyingServerApp(tmp_path, "KeyBundle")
    assert names(liar.ask("va", liar.lied("va", lie))[0]) == ["Leave"]
    assert names(liar.ask("oslo", liar.honest["oslo"])[0]) == ["Shares"]


# --- Split survivor lists, and two questions to unmask --------------------------------------------------------------


def shorter(asked):
    return replace(asked, submissions=asked.submissions[:3])


def confirmed(liar, lie=lambda asked: asked, lied_to=()):
    """Each site's signature under the survivor list that it is shown."""
    found = {}
    for name in NAMES:
        said, _ = liar.ask(name, liar.lied(name, lie) if name in lied_to else liar.honest[name])
        found[name] = said[0]
    assert {type(each).__name__ for each in found.values()} == {"Confirm"}
    return found


def asked_to_unmask(liar, name, confirms):
    _, (asked, *_) = opened(liar.honest[name])
    sent = Confirmations(asked.header, tuple(confirms))
    return liar.ask(name, closed(RecordDict(), Request(messages=[encode(sent)])))[0]


def test_split_survivor_lists_get_no_share_of_a_mask(tmp_path):
    """`_unmask` in `round/site/releasing.py`: t sites have signed this site's own list."""
    liar = LyingServerApp(tmp_path, "SurvivorList")
    confirms = confirmed(liar, shorter, ("va", "oslo"))
    for name in NAMES:
        assert "Unmask" not in names(asked_to_unmask(liar, name, confirms.values()))


def test_one_survivor_list_for_all_gets_a_share_of_every_mask(tmp_path):
    """The control, and one answer only: another list is signed by nobody, and the same question has the same answer."""
    liar = LyingServerApp(tmp_path, "SurvivorList")
    confirms = confirmed(liar)
    (first,) = asked_to_unmask(liar, "va", confirms.values())
    assert type(first).__name__ == "Unmask"
    assert {each.of for each in first.answers} == set(NAMES) - {"va"} or len(first.answers) == 4
    said, _ = liar.ask("va", liar.lied("va", shorter))
    assert "Confirm" not in names(said)
    again = asked_to_unmask(liar, "va", list(confirms.values())[:3])
    assert [each for each in again if type(each).__name__ == "Unmask"] in ([], [first])


def test_a_list_that_one_site_alone_signed_and_the_serverapp_for_the_others_opens_nothing(tmp_path):
    """The signature in `checks.confirm`: va's own list of three, under the names of two others."""
    liar = LyingServerApp(tmp_path, "SurvivorList")
    own = confirmed(liar, shorter, ("va",))["va"]
    forged = [sign(replace(own, site=name), IdentityKey()) for name in ("oslo", "rome")]
    assert "Unmask" not in names(asked_to_unmask(liar, "va", [own, *forged]))


# --- Forged sums and certificates -----------------------------------------------------------------------------------


def forged_sum(content, protection):
    """(edit, body): another sum under its own digest. masked: one bit of the first coordinate, so that canaries and
    marks hold; layered: of a ciphertext many, since one could be lost in its noise."""
    request, _ = opened(content)
    first, *rest = container.from_bytes(request.body)
    places = [3] if protection == "masked" else range(64, 320)
    chunks = [bytes(each ^ (0x55 if at in places else 0) for at, each in enumerate(first)), *rest]
    digest = container.vector_digest(chunks)
    return (lambda asked: replace(asked, digest=digest)), container.to_bytes(chunks)


@pytest.mark.parametrize("protection", ["masked", "layered"])
def test_a_forged_sum_is_signed_by_no_site(tmp_path, protection):
    """The tag of a sum: `tag.check` in `scheme.py`."""
    liar = LyingServerApp(tmp_path, "Aggregate", protection=protection)
    edit, body = forged_sum(liar.honest["va"], protection)
    assert "Statement" not in names(liar.ask("va", liar.lied("va", edit, body=body))[0])
    assert names(liar.ask("oslo", liar.honest["oslo"])[0]) == ["Statement"]


def of_strangers(certificate):
    signatures = tuple((name, IdentityKey().sign(b"x", b"y")) for name, _ in certificate.signatures)
    return replace(certificate, signatures=signatures)


CERTIFICATES = {
    "of another state": lambda c: replace(c, state_mac=b"m" * 32),
    "of another sum": lambda c: replace(c, sum_mac=b"m" * 32),
    "of other survivors": lambda c: replace(c, survivors=c.survivors[:3]),
    "signed by strangers": of_strangers,
    "signed by two": lambda c: replace(c, signatures=c.signatures[:2]),
    "signed by one twice": lambda c: replace(c, signatures=(c.signatures[0],) * 3),
}


@pytest.mark.parametrize("lie", CERTIFICATES.values(), ids=CERTIFICATES)
def test_a_forged_certificate_changes_no_state_and_gets_no_sum(tmp_path, lie):
    liar = LyingServerApp(tmp_path, "Certificate")
    before = liar.memory("va")["state"]
    said, _ = liar.ask("va", liar.lied("va", lie, give=True))
    assert liar.grid.replies[-1].content[RECORD]["state"] == b""
    assert BODY not in liar.grid.replies[-1].content
    assert liar.memory("va")["state"] == before
    assert names(said) in ([], ["Leave"])
    liar.ask("oslo", liar.lied("oslo", lambda each: each, give=True))
    assert len(liar.grid.replies[-1].content[RECORD]["state"]) == 32
    assert BODY in liar.grid.replies[-1].content
    assert liar.memory("oslo")["state"] != before


# --- What was said before -------------------------------------------------------------------------------------------


ANSWERS = {"Keys", "Shares", "Submit", "Confirm", "Unmask", "Statement"}


@pytest.mark.parametrize("until", ["KeyBundle", "SurvivorList"])
def test_a_request_of_an_earlier_round_gets_no_second_answer(tmp_path, until):
    """Every request of round 1 again, in the middle of round 2; each had an answer in its time.

    No single check stands here: a message names its round, a stage takes its own messages, a list has one answer."""
    liar = LyingServerApp(tmp_path, until, nth=2)
    of_first = [content for name, content in liar.before if name == "va"]
    of_first = of_first[
        : next(i for i, c in enumerate(of_first) if "Certificate" in names(opened(c)[1])) + 1
    ]
    in_time = {
        type(decode(d, object)).__name__
        for r in liar.grid.replies
        for d in r.content[RECORD]["messages"]
    }
    assert in_time >= ANSWERS
    for content in of_first:
        said, _ = liar.ask("va", content)
        assert not ANSWERS & set(names(said))
    answer = {"KeyBundle": ["Shares"], "SurvivorList": ["Confirm"]}[until]
    assert names(liar.ask("oslo", liar.honest["oslo"])[0]) == answer


def test_other_terms_in_the_middle_of_a_run_get_no_answer(tmp_path):
    """`_agree` in `by_request/site.py`: the terms count once."""
    liar = LyingServerApp(tmp_path, "Announce")
    known = liar.memory("va")["terms"]
    terms = RunTerms.from_bytes(known)
    wider = made_of(terms, metrics={"rows_of_patient_7": (0.0, 10.0)}).to_bytes()
    said, refused = liar.ask("va", liar.lied("va", lambda each: each, terms=wider))
    assert (said, refused[:30]) == ([], "site va: terms of the run: fou")
    assert liar.memory("va")["terms"] == known
    assert names(liar.ask("va", liar.lied("va", lambda each: each, terms=known))[0]) == ["Keys"]


# --- Terms that no site should begin with ---------------------------------------------------------------------------


def made_of(terms, sites=NAMES, **changes):
    """Terms of the same run that are consistent in themselves, changed."""
    values = {"protection": terms.plan.protection, "metrics": {}, "value_range": 0.0625} | changes
    return RunTerms.make(
        terms.federation, terms.job, sites, parameters=terms.plan.parameters, layout=terms.layout,
        rounds=terms.plan.rounds, max_examples=terms.plan.max_examples, **values,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "minimum", "line"),
    [
        ({"sites": NAMES[:3]}, 3, "sites: found va, oslo, rome, expected va, oslo, rome, bern"),
        ({"sites": NAMES[::-1]}, 3, "sites: found bern, rome, oslo, va"),
        ({}, 4, "threshold: found 3, expected at least 4"),
        ({"protection": "plain"}, 3, "protect.protection: found 'plain'"),
    ],
)
def test_terms_that_an_operator_does_not_allow_get_no_key(
    tmp_path, monkeypatch, changes, minimum, line
):
    liar = LyingServerApp(tmp_path, "EpochCall")
    path = liar.sites.parent / "va" / "site.toml"
    allowed = 'protections = ["layered", "masked", "plain"]\n'  # the operator's own word does not make it one
    path.write_text(f"minimum_sites = {minimum}\n{allowed}{path.read_text()}")
    terms = RunTerms.from_bytes(opened(liar.honest["va"])[0].terms)
    with monkeypatch.context() as patched:
        patched.setattr(
            protections, "refuse_plain", lambda name: None
        )  # the liar's own copy has no such check
        lie = made_of(terms, **changes).to_bytes()
    said, refused = liar.ask("va", liar.lied("va", lambda each: each, terms=lie))
    assert (said, refused.removeprefix("site va: ")[: len(line)]) == ([], line)
    assert names(liar.ask("oslo", liar.honest["oslo"])[0]) == ["EpochKey"]


def test_terms_under_which_a_serverapp_could_open_every_ciphertext_get_no_key(tmp_path):
    """`encrypted` has no masks: with one key of a site the ServerApp would have every update (PROTOCOL R)."""
    liar = LyingServerApp(tmp_path, "EpochCall", protection="layered")
    about = json.loads(opened(liar.honest["va"])[0].terms)
    about["plan"]["protection"] = "encrypted"
    said, refused = liar.ask("va", liar.lied("va", lambda each: each, terms=canonical(about)))
    assert said == []
    assert "protect.release: found 'coordinator' under 'encrypted'" in refused
    assert names(liar.ask("oslo", liar.honest["oslo"])[0]) == ["EpochKey"]
