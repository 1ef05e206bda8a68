"""A coordinator that lies in its requests: each lie is refused, and the same round without it is released."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.by_request import lying, one_round, run_of, said

from fedcore.errors import Abandoned, RoundAbandoned
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.protocol.messages import sign
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.secagg.scheme import EpochSecrets
from fedcore.store import container


def begun(change, **terms):
    run, link, _ = run_of(**terms)
    run.begin()
    link.change = change
    return run, link


def told_and_outcome(change, **terms):
    """What became of a round with a lie in it: how often it was told, and the link."""
    run, link = begun(change, **terms)
    with pytest.raises((RoundAbandoned, Abandoned)):
        one_round(run)
    assert change.told > 0
    return run, link


KINDS = [
    "Announce", "KeyBundle", "Delivery", "SurvivorList", "Confirmations", "Aggregate", "Certificate",
]  # fmt: skip


def test_the_same_round_with_every_message_edited_to_itself_is_released():
    edits = [lying(kind, lambda message, request: (message, request)) for kind in KINDS]

    def change(node, request):
        for edit in edits:
            request = edit(node, request)
        return request

    run, _ = begun(change)
    assert len(one_round(run).survivors) == 4
    assert [edit.told for edit in edits] == [4] * len(KINDS)


def test_keys_of_another_identity_in_the_bundle_make_every_site_leave():
    stranger = IdentityKey()

    def swap(bundle, request):
        last = sign(replace(bundle.keys[-1], self_seed_hash=b"x" * 32), stranger)
        return replace(bundle, keys=(*bundle.keys[:-1], last)), request

    _, link = told_and_outcome(lying("KeyBundle", swap))
    assert not any("Shares" in said(link, site) for site in link.members)


def test_a_site_that_is_shown_another_survivor_list_does_not_unmask():
    def shorter(asked, request):
        return replace(asked, submissions=asked.submissions[:3]), request

    lie = lying("SurvivorList", shorter, only="va")
    run, link = begun(lie)
    assert "va" in one_round(run).survivors  # the others agreed on one list, va on another
    assert lie.told
    assert "Unmask" not in said(link, "va")
    assert all("Unmask" in said(link, other) for other in ("oslo", "rome", "bern"))


def test_a_second_survivor_list_after_a_signed_one_gets_no_signature():
    run, link = begun(None)
    kept = []

    def twice(asked, request):
        other = replace(asked, submissions=asked.submissions[:3])
        kept.append(link.site("va").answer(replace(request, messages=[encode(asked)])))
        return other, request

    link.change = lying("SurvivorList", twice, only="va")
    one_round(run)
    (first,) = kept
    assert [type(decode(data, object)).__name__ for data in first.messages] == ["Confirm"]
    assert "Confirm" not in said(link, "va")
    assert "Unmask" not in said(link, "va")


def test_confirmations_that_sites_did_not_sign_open_nothing():
    def forged(asked, request):
        confirms = tuple(replace(each, signature=b"s" * 64) for each in asked.confirms)
        return replace(asked, confirms=confirms), request

    _, link = told_and_outcome(lying("Confirmations", forged))
    assert not any("Unmask" in said(link, site) for site in link.members)


@pytest.mark.parametrize("protection", ["masked", "layered"])
def test_a_forged_sum_is_stated_by_no_site(protection):
    def forge(asked, request):
        chunks = container.from_bytes(request.body)
        first = bytearray(chunks[0])
        first[64:320] = bytes(
            each ^ 0x55 for each in first[64:320]
        )  # one bit of a ciphertext could be lost in its noise
        chunks = [bytes(first), *chunks[1:]]
        digest = container.vector_digest(chunks)
        return replace(asked, digest=digest), replace(request, body=container.to_bytes(chunks))

    _, link = told_and_outcome(lying("Aggregate", forge), protection=protection)
    assert not any("Statement" in said(link, site) for site in link.members)


def test_a_certificate_of_another_state_changes_no_state():
    def other(certificate, request):
        return replace(certificate, state_mac=b"m" * 32), request

    run, link = begun(lying("Certificate", other))
    before = {site: memory["state"] for site, memory in link.memories.items()}
    with pytest.raises(Abandoned, match="no sum that at least 3 sites agree on"):
        one_round(run)
    assert {site: memory["state"] for site, memory in link.memories.items()} == before
    assert not any(reply.body and reply.state for _, reply in link.replies)


def test_another_model_than_the_announced_one_is_not_trained():
    trained = []

    def other(delivery, request):
        return delivery, replace(request, training=b"z" * 32)

    lie = lying("Delivery", other, only="va")
    run, link = begun(lie)
    before = link.trains["va"]
    link.trains["va"] = lambda: trained.append(1) or before()
    assert one_round(run).survivors == ("oslo", "rome", "bern")
    assert lie.told == 1
    assert trained == []


def test_a_site_that_was_announced_another_model_is_in_no_sum():
    def other(announce, request):
        return announce, replace(request, model=b"z" * 32)

    run, link = begun(lying("Announce", other, only="va"))
    assert one_round(run).survivors == ("oslo", "rome", "bern")
    assert "Submit" not in said(link, "va")


def test_a_site_that_gives_another_sum_than_was_released_is_not_believed():
    run, link = begun(None)
    first = []

    def ask(requests, real=link.ask):
        for node, reply in real(requests):
            if reply is not None and reply.state and reply.body:
                first.append(node)
                if node == "va":
                    about, fields = container.from_bytes(reply.body)
                    fields = fields[:-1] + bytes([fields[-1] ^ 1])
                    reply.body = container.to_bytes([about, fields])
            yield node, reply

    link.ask = ask
    assert len(one_round(run).mean) == 7
    assert first[:2] == ["va", "oslo"]


def test_a_vector_of_malformed_chunks_is_left_out_and_the_sum_of_the_others_is_exact(stand_in):
    real = EpochSecrets.protect

    def protect(self, slots, layout, asked, site, entropy):
        chunks, salt = real(self, slots, layout, asked, site, entropy)
        if site == "oslo":
            chunks = [bytes([255]) * len(chunk) for chunk in chunks]
        return chunks, salt

    stand_in(EpochSecrets, protect=protect)
    run, _, content = run_of(protection="layered")
    run.begin()
    found = one_round(run)
    others = ("va", "rome", "bern")
    assert found.survivors == others
    assert np.abs(found.mean - np.mean([content[site] for site in others], axis=0)).max() < 1e-4
