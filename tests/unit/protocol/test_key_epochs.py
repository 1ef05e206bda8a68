"""Key epochs (PROTOCOL E): everybody ends with the maker's payload, or a typed error says who lied.

Each attack stands beside the same message unaltered, which the same site accepts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.parties import HUB, PAYLOAD, Epochs, granted_by, secrets_in, with_late_joiner
from support.records import forgetful

from fedcore.errors import (
    Conflicting,
    EnvelopeRefused,
    HeaderRefused,
    KeyRefused,
    ListRefused,
    OutOfOrder,
    ProtocolRefused,
    RosterRefused,
    SignatureRefused,
    StaleEpoch,
    StateDiffers,
    ThresholdRefused,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import key_id
from fedcore.secagg.protocol import epoch, messages
from fedcore.secagg.protocol.messages import sign
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import decode, encode


def test_everybody_ends_with_the_maker_s_payload():
    epochs = Epochs()
    epochs.begin().pump()
    name = key_id(PAYLOAD.reveal())
    for site_id in epochs.sites:
        assert isinstance(epochs.stages[site_id], epoch.Holding)
        (install,) = epochs.installed[site_id]
        assert (install.epoch, install.key_id) == (1, name)
        assert install.payload.reveal() == PAYLOAD.reveal()
    assert epochs.stages[HUB].holders == epochs.sites
    assert {held.key_id for held in epochs.stages[HUB].held} == {name}


def test_the_coordinator_sees_neither_the_payload_nor_a_secret():
    """Its journal and everything it carries; the control: the sites' journals hold both."""
    epochs = Epochs()
    epochs.begin().pump()
    own = {secret for s in epochs.sites for secret in secrets_in(epochs.stages[s])}
    assert PAYLOAD.reveal() in own and len(own) == 5
    assert not secrets_in(epochs.stages[HUB])
    carried = [encode(message) for message in epochs.log] + [encode(epochs.stages[HUB])]
    assert not any(secret in data for secret in own for data in carried)
    assert not any(PAYLOAD.reveal()[:16] in data for data in carried)


def test_a_second_epoch_replaces_the_first_with_fresh_keys():
    epochs = Epochs()
    epochs.begin().pump()
    keys = {s: epochs.stages[s].key.key for s in epochs.sites}
    epochs.payload = SecretBytes(b"another")
    epochs.begin(2, "s01").pump()
    for s in epochs.sites:
        assert [i.epoch for i in epochs.installed[s]] == [1, 2]
        assert epochs.stages[s].payload.reveal() == b"another"
        assert epochs.stages[s].key.key.x25519 != keys[s].x25519
        assert epochs.stages[s].key.key.mlkem != keys[s].mlkem


def test_stages_and_messages_survive_their_bytes():
    epochs = Epochs()
    epochs.begin()
    stages = dict.fromkeys(map(type, epochs.stages.values()))
    while epochs.queue:
        sender, to, message = epochs.queue.popleft()
        again = decode(encode(message), type(message))
        epochs.step(
            to, epoch.FromSite(sender, again) if to == HUB else epoch.FromCoordinator(again)
        )
        for stage in epochs.stages.values():
            stages[type(stage)] = None
            assert encode(forgetful(decode(encode(stage), type(stage)))) == encode(stage)
    assert set(stages) >= {epoch.NoKey, epoch.Offered, epoch.Holding, epoch.Spreading}
    assert epochs.stages[HUB].holders == epochs.sites


def test_the_round_machine_takes_the_epoch_and_no_older_one():
    epochs = Epochs(3)
    epochs.begin().pump()
    (install,) = epochs.installed["s01"]
    stages = epochs.parties.stages
    epochs.parties.first["s01"] = stages["s01"] = site.Idle(site.SiteProgress(0, b""))
    epochs.parties.step("s01", site.NewEpoch(install.epoch, install.key_id))
    assert (stages["s01"].standing.epoch, stages["s01"].standing.key_id) == (1, install.key_id)
    with pytest.raises(StaleEpoch):
        epochs.parties.step("s01", site.NewEpoch(1, install.key_id))


# --------------------------------------------------------------------------------- the call


HEADERS = {
    "federation": {"federation": "other"},
    "job": {"job": "other"},
    "protocol version": {"version": 99},
    "roster": {"roster": ("s00", "s01", "s02")},
    "pinned keys": {"pins": "0" * 64},
    "plan digest": {"plan_digest": "0" * 64},
    "threshold": {"threshold": 2},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_call_that_differs_from_what_the_operator_approved_is_refused(what):
    epochs = Epochs()
    call = epoch.FromCoordinator(epoch.EpochCall(epochs.header(**HEADERS[what])))
    assert epochs.refused("s01", call, HeaderRefused, match=what) == HUB
    epochs.step("s01", epoch.FromCoordinator(epoch.EpochCall(epochs.header())))
    assert isinstance(epochs.stages["s01"], epoch.Offered)


def test_a_call_with_a_stranger_as_maker_is_refused():
    epochs = Epochs()
    call = epoch.FromCoordinator(epoch.EpochCall(epochs.header(maker="eve")))
    epochs.refused("s01", call, RosterRefused, match="eve")


def test_an_epoch_number_is_used_once():
    """An identical call gets the identical key; another one of the same or a lower number none."""
    epochs = Epochs()
    epochs.begin(5).pump()
    (same,) = epochs.step("s01", epoch.FromCoordinator(epoch.EpochCall(epochs.header(5))))
    assert encode(same.message) == encode(epochs.stages["s01"].key)
    for header in (epochs.header(5, "s02"), epochs.header(4), epochs.header(1)):
        epochs.refused("s01", epoch.FromCoordinator(epoch.EpochCall(header)), StaleEpoch)
        epochs.refused(HUB, epoch.StartEpoch(header), StaleEpoch)
    epochs.step("s01", epoch.FromCoordinator(epoch.EpochCall(epochs.header(6))))


# -------------------------------------------------------------------------------- the maker


def at_maker():
    epochs = Epochs().begin()
    return epochs, epochs.until(epoch.EpochKeys, "s00")


def test_the_maker_makes_for_the_keys_of_the_epoch():
    epochs, request = at_maker()
    epochs.step("s00", epoch.FromCoordinator(request))
    assert isinstance(epochs.stages["s00"], epoch.Holding)
    (grants,) = [m for m in epochs.log if isinstance(m, epoch.Grants)]
    assert [g.recipient for g in grants.grants] == ["s01", "s02", "s03"]


def test_the_maker_refuses_keys_that_are_not_the_sites_own():
    epochs, request = at_maker()
    eve, mine = Epochs(), epochs.members["s01"].identity
    eve.begin().pump(lambda to, message: isinstance(message, epoch.EpochKeys))
    theirs = {key.site: key for key in eve.stages[HUB].keys}
    first, second, *rest = request.keys
    unsigned = replace(second, key=theirs["s01"].key)
    shared = sign(replace(second, key=first.key), mine)
    stale = sign(replace(second, header=b"0" * 32), mine)
    weak = sign(replace(second, key=replace(second.key, x25519=bytes(32))), mine)
    short = sign(replace(second, key=replace(second.key, mlkem=b"short")), mine)
    for keys, error, fault in (
        ((first, unsigned, *rest), SignatureRefused, "s01"),
        ((first, shared, *rest), KeyRefused, "s01"),
        ((first, stale, *rest), StaleEpoch, "s01"),
        ((first, weak, *rest), KeyRefused, "s01"),
        ((first, short, *rest), KeyRefused, "s01"),
        ((first, second), ThresholdRefused, HUB),
        ((first, first, second, *rest), ListRefused, HUB),
        ((second, first, *rest), ListRefused, HUB),
    ):
        wrong = epoch.FromCoordinator(replace(request, keys=keys))
        assert epochs.refused("s00", wrong, error) == fault
    other = epoch.FromCoordinator(replace(request, header=b"0" * 32))
    assert epochs.refused("s00", other, StaleEpoch) == HUB
    epochs.step("s00", epoch.FromCoordinator(request))  # the control


def test_only_the_maker_makes():
    epochs, request = at_maker()
    epochs.refused("s01", epoch.FromCoordinator(request), OutOfOrder, match="s00")
    assert "s01" not in epochs.installed
    whole = Epochs()
    whole.begin().pump()
    stage = whole.stages["s01"]
    again = epoch.EpochKeys(stage.header.digest, whole.stages[HUB].keys)
    whole.refused("s01", epoch.FromCoordinator(again), OutOfOrder, match="s00")


def test_a_silent_maker_is_followed_by_the_next_under_a_new_number():
    """Silent from the start, silent when asked, and two of them one after the other."""
    epochs = Epochs(5)
    epochs.silent = {"s00"}
    epochs.begin().pump()
    assert isinstance(epochs.stages[HUB], epoch.Calling)
    epochs.now = 99.0
    assert epochs.step(HUB, coordinator.Tick()) == ()
    epochs.now = 100.0
    epochs.step(HUB, coordinator.Tick())
    header = epochs.stages[HUB].header
    assert (header.epoch, header.maker) == (2, "s01")
    epochs.silent = {"s00", "s01"}  # now the next one is asked, and falls silent as well
    epochs.pump()
    epochs.step(
        "s01", epoch.FromCoordinator(epoch.EpochCall(header))
    )  # its key arrives, and no grants
    epochs.pump()
    assert isinstance(epochs.stages[HUB], epoch.Granting), "s00 is not waited for a second time"
    epochs.now = 200.0
    epochs.step(HUB, coordinator.Tick())
    header = epochs.stages[HUB].header
    assert (header.epoch, header.maker) == (3, "s02")
    epochs.silent = set()
    epochs.pump()
    assert epochs.stages[HUB].holders == epochs.sites
    assert all(epochs.stages[s].epoch == 3 for s in epochs.sites)


def test_who_is_not_there_is_not_waited_for_and_joins_late():
    epochs = Epochs(4)
    epochs.silent = {"s02"}
    present = ("s00", "s01", "s03")
    epochs.step(HUB, epoch.StartEpoch(epochs.header(), present))
    assert epoch.awaited_in(epochs.stages[HUB]) == present
    epochs.until(epoch.EpochKeys, "s00")
    assert isinstance(epochs.stages[HUB], epoch.Granting)
    assert epoch.awaited_in(epochs.stages[HUB]) == ("s00",), "a person sees that the maker is asked"
    request = epoch.EpochKeys(epochs.header().digest, epochs.stages[HUB].keys)
    epochs.step("s00", epoch.FromCoordinator(request))
    epochs.pump()
    assert epochs.stages[HUB].holders == present and epoch.awaited_in(epochs.stages[HUB]) == ()
    epochs.silent = set()
    epochs.step(HUB, coordinator.SiteReconnected("s02"))
    epochs.pump()
    assert epochs.stages[HUB].holders == epochs.sites


@pytest.mark.parametrize("present", [("s01", "s02", "s03"), ("s00", "s01")])
def test_the_maker_and_a_threshold_are_waited_for_whoever_is_named(present):
    """`present` spares a wait; it makes no epoch of fewer sites, and none without its maker."""
    epochs = Epochs(4)
    missing = "s00" if "s00" not in present else "s02"
    epochs.silent = {missing, "s03"} if missing == "s02" else {missing}
    epochs.step(HUB, epoch.StartEpoch(epochs.header(), present))
    epochs.pump()
    assert isinstance(epochs.stages[HUB], epoch.Calling)


def test_too_few_sites_make_no_epoch():
    epochs = Epochs(4)
    epochs.silent = {"s01", "s02"}
    epochs.begin().pump()
    epochs.now = 100.0
    epochs.refused(HUB, coordinator.Tick(), ThresholdRefused, match="found 2 sites")


# ------------------------------------------------------------------------------- the grants


def at_grant(to="s02"):
    epochs = Epochs().begin()
    return epochs, epochs.until(epoch.Granted, to)


def by_maker(epochs, granted, **changes):
    """The maker's own grant, altered and signed by it again: a lying maker, no forger."""
    grant = sign(replace(granted.grant, **changes), epochs.members["s00"].identity)
    return epoch.FromCoordinator(replace(granted, grant=grant))


def test_a_maker_that_names_another_key_id_is_caught():
    """It seals one payload and signs the id of another, in the envelope's context as well."""
    epochs, granted = at_grant()
    name, maker = key_id(PAYLOAD.reveal()), epochs.stages["s00"]
    to = next(key for key in epochs.stages[HUB].keys if key.site == "s02")
    member = epochs.members["s00"]
    lie = epoch.seal_grant(member, maker, to, SecretBytes(b"another payload"), name)
    fault = epochs.refused(
        "s02",
        epoch.FromCoordinator(replace(granted, grant=lie)),
        KeyRefused,
        match="another payload",
    )
    assert fault == "s00" and "s02" not in epochs.installed
    honest = epoch.seal_grant(member, maker, to, PAYLOAD, name)
    epochs.step("s02", epoch.FromCoordinator(replace(granted, grant=honest)))
    assert epochs.stages["s02"].payload.reveal() == PAYLOAD.reveal()


def test_a_key_id_that_the_envelope_is_not_bound_to_is_caught():
    epochs, granted = at_grant()
    wrong = by_maker(epochs, granted, key_id=b"i" * 32)
    assert epochs.refused("s02", wrong, EnvelopeRefused) == "s00"


def test_a_maker_with_a_payload_for_each_is_found_out_by_the_signed_key_ids():
    """Each grant holds for itself; a round's key bundle then shows two ids, and sites leave."""
    epochs, granted = at_grant()
    to = next(key for key in epochs.stages[HUB].keys if key.site == "s02")
    other = SecretBytes(b"another payload")
    lie = epoch.seal_grant(
        epochs.members["s00"], epochs.stages["s00"], to, other, key_id(other.reveal())
    )
    epochs.step("s02", epoch.FromCoordinator(replace(granted, grant=lie)))
    epochs.pump()
    ids = {held.site: held.key_id for held in epochs.stages[HUB].held}
    assert len(set(ids.values())) == 2
    parties = epochs.parties
    for name, mine in ids.items():
        parties.first[name] = parties.stages[name] = site.Idle(site.SiteProgress(1, mine))
    parties.begin()
    keys = []
    while parties.queue:
        _, to, event = parties.queue.popleft()
        if to != HUB:
            parties.deliver(to, event)
        elif isinstance(event.message, messages.Keys):
            keys.append(event.message)
    bundle = messages.KeyBundle(keys[0].header, tuple(keys))
    for name in epochs.sites:
        with pytest.raises(StateDiffers, match="key id"):
            parties.step(name, site.MessageFromCoordinator(bundle))
    alike = messages.KeyBundle(keys[0].header, tuple(k for k in keys if k.site != "s02"))
    parties.step("s00", site.MessageFromCoordinator(alike))  # the control
    assert isinstance(parties.stages["s00"], site.Shared)


def test_a_grant_for_another_site_or_another_key_is_refused():
    epochs, granted = at_grant("s01")
    other = epochs.until(epoch.Granted, "s02")
    assert (
        epochs.refused("s01", epoch.FromCoordinator(other), KeyRefused, match="recipient") == "s00"
    )
    renamed = by_maker(epochs, other, recipient="s01")
    epochs.refused("s01", renamed, KeyRefused, match="recipient or key")
    mine = granted.grant.recipient_key
    moved = by_maker(epochs, other, recipient="s01", recipient_key=mine)
    assert epochs.refused("s01", moved, EnvelopeRefused) == "s00"
    epochs.step("s01", epoch.FromCoordinator(granted))
    assert "s01" in epochs.installed


@pytest.mark.parametrize("place", [0, 500, 1088, -1])
def test_a_tampered_envelope_is_refused(place):
    """By its signature on the way; by the envelope itself if the maker signs what it tampered with."""
    epochs, granted = at_grant()
    changed = bytearray(granted.grant.envelope)
    changed[place] ^= 1
    tampered = replace(granted, grant=replace(granted.grant, envelope=bytes(changed)))
    assert epochs.refused("s02", epoch.FromCoordinator(tampered), SignatureRefused) == "s00"
    signed = by_maker(epochs, granted, envelope=bytes(changed))
    assert epochs.refused("s02", signed, EnvelopeRefused) == "s00"
    for envelope in (b"", bytes(1088), bytes(1200)):
        epochs.refused("s02", by_maker(epochs, granted, envelope=envelope), EnvelopeRefused)
    epochs.step("s02", epoch.FromCoordinator(granted))


def test_a_granter_s_key_must_be_signed_and_its_own():
    epochs, granted = at_grant()
    others = {key.site: key for key in epochs.stages[HUB].keys}
    wrong = epoch.FromCoordinator(replace(granted, granter=others["s01"]))
    epochs.refused("s02", wrong, KeyRefused)
    unsigned = replace(others["s01"], site="s00")
    epochs.refused(
        "s02", epoch.FromCoordinator(replace(granted, granter=unsigned)), SignatureRefused
    )


def test_a_grant_of_an_earlier_epoch_is_not_taken_again():
    epochs, old = at_grant()
    epochs.pump()
    epochs.payload = SecretBytes(b"the second payload")
    epochs.begin(2)
    new = epochs.until(epoch.Granted, "s02")
    assert epochs.refused("s02", epoch.FromCoordinator(old), StaleEpoch) == "s00"
    late = replace(
        old, granter=new.granter
    )  # a maker that dresses its old envelope up as a new one
    header, mine = new.grant.header, new.grant.recipient_key
    epochs.refused("s02", by_maker(epochs, late, header=header), KeyRefused)
    dressed = by_maker(epochs, late, header=header, recipient_key=mine)
    epochs.refused("s02", dressed, EnvelopeRefused)
    epochs.step("s02", epoch.FromCoordinator(new))
    assert epochs.installed["s02"][-1].payload.reveal() == b"the second payload"


def test_a_grant_heard_twice_installs_once():
    epochs, granted = at_grant()
    epochs.step("s02", epoch.FromCoordinator(granted))
    held = epochs.stages["s02"].held
    (again,) = epochs.step("s02", epoch.FromCoordinator(granted))
    assert encode(again.message) == encode(held) and len(epochs.installed["s02"]) == 1
    other = by_maker(epochs, granted, key_id=b"i" * 32)
    epochs.refused("s02", other, OutOfOrder)


# -------------------------------------------------------------------------- the late joiner


def test_a_late_joiner_gets_the_same_payload_from_any_holder():
    for holder in ("s00", "s01", "s02"):
        epochs = with_late_joiner()
        granted = granted_by(epochs, holder)
        assert granted.grant.site == holder
        epochs.step("s03", epoch.FromCoordinator(granted))
        epochs.pump()
        assert epochs.installed["s03"][0].payload.reveal() == PAYLOAD.reveal()
        assert epochs.stages[HUB].holders == epochs.sites


def test_a_late_joiner_asks_for_a_threshold_of_signed_key_ids():
    epochs = with_late_joiner()
    granted = granted_by(epochs, "s01")
    first, second, third = granted.held
    identity = epochs.members["s02"].identity
    forged = replace(third, site="s03")
    another = sign(replace(third, key_id=b"i" * 32), identity)
    stale = sign(replace(third, header=b"0" * 32), identity)
    for held, error in (
        ((), ThresholdRefused),
        ((first, second), ThresholdRefused),
        ((first, second, second), ListRefused),
        ((second, first, third), ListRefused),
        ((first, second, forged), SignatureRefused),
        ((first, second, another), KeyRefused),
        ((first, second, stale), StaleEpoch),
    ):
        epochs.refused("s03", epoch.FromCoordinator(replace(granted, held=held)), error)
    assert "s03" not in epochs.installed
    epochs.step("s03", epoch.FromCoordinator(granted))
    assert "s03" in epochs.installed


def test_a_holder_that_hands_on_another_payload_is_caught():
    """It signs its own payload's id, which no t sites signed."""
    epochs = with_late_joiner()
    granted = granted_by(epochs, "s01")
    to, other = epochs.stages["s03"].key, SecretBytes(b"another payload")
    lie = epoch.seal_grant(
        epochs.members["s01"], epochs.stages["s01"], to, other, key_id(other.reveal())
    )
    wrong = epoch.FromCoordinator(replace(granted, grant=lie))
    epochs.refused("s03", wrong, KeyRefused, match="key id")
    assert "s03" not in epochs.installed


def test_a_holder_checks_the_key_it_seals_to():
    epochs = with_late_joiner()
    epochs.pump(lambda to, message: isinstance(message, epoch.GrantRequest))
    _, _, request = epochs.queue.popleft()
    eve = replace(request.key, key=epochs.stages["s01"].key.key)
    epochs.refused("s01", epoch.FromCoordinator(epoch.GrantRequest(eve)), SignatureRefused)
    stale = sign(replace(request.key, header=b"0" * 32), epochs.members["s03"].identity)
    epochs.refused("s01", epoch.FromCoordinator(epoch.GrantRequest(stale)), StaleEpoch)


# ------------------------------------------------------------------------- the coordinator


def test_the_coordinator_takes_one_key_of_a_site_and_only_from_itself():
    epochs = Epochs().begin()
    key = epochs.until(epoch.EpochKey, HUB)
    sender = key.site
    epochs.step(HUB, epoch.FromSite(sender, key))
    assert epochs.step(HUB, epoch.FromSite(sender, key)) == ()
    identity = epochs.members[sender].identity
    other = sign(replace(key, key=replace(key.key, x25519=b"\x09" * 32)), identity)
    assert epochs.refused(HUB, epoch.FromSite(sender, other), Conflicting) == sender
    epochs.refused(HUB, epoch.FromSite("s03", key), RosterRefused)
    epochs.refused(HUB, epoch.FromSite("s03", replace(key, site="s03")), SignatureRefused)


def test_the_coordinator_takes_grants_of_the_maker_for_everybody():
    epochs = Epochs().begin()
    grants = epochs.until(epoch.Grants, HUB)
    fewer = replace(grants, grants=grants.grants[:-1])
    epochs.refused(HUB, epoch.FromSite("s00", fewer), KeyRefused)
    epochs.refused(HUB, epoch.FromSite("s01", replace(grants, site="s01")), KeyRefused)
    epochs.refused(HUB, epoch.FromSite("s00", replace(grants, header=b"0")), StaleEpoch)
    first, *rest = grants.grants
    forged = replace(grants, grants=(replace(first, key_id=b"i" * 32), *rest))
    epochs.refused(HUB, epoch.FromSite("s00", forged), SignatureRefused)
    epochs.step(HUB, epoch.FromSite("s00", grants))
    epochs.pump()
    assert epochs.stages[HUB].holders == epochs.sites


def test_the_coordinator_carries_grants_between_sites_with_keys_of_the_epoch_only():
    epochs = with_late_joiner()
    granted_by(epochs, "s01")
    grant = next(message for message in epochs.log if isinstance(message, epoch.Grant))
    identity = epochs.members["s01"].identity
    for changes, error in (
        ({"recipient": "eve"}, KeyRefused),
        ({"header": b"0" * 32}, StaleEpoch),
    ):
        wrong = sign(replace(grant, **changes), identity)
        assert epochs.refused(HUB, epoch.FromSite("s01", wrong), error) == "s01"
    epochs.step(HUB, epoch.FromSite("s01", grant))  # the control
    early = with_late_joiner()  # s03 has no key there yet, and grants all the same
    grant = sign(
        replace(grant, header=early.header().digest, site="s03", recipient="s01"),
        early.members["s03"].identity,
    )
    early.refused(HUB, epoch.FromSite("s03", grant), KeyRefused)


def test_whatever_else_a_site_says_is_refused_by_name():
    """At every stage of both roles, with every message of the epoch; nothing untyped comes out."""
    epochs = with_late_joiner()
    epochs.step("s03", epoch.FromCoordinator(granted_by(epochs, "s01")))
    epochs.pump()
    kinds = {type(message): message for message in epochs.log}
    assert len(kinds) == 8
    fresh = Epochs(4)
    early = [fresh.stages[HUB], fresh.begin().stages[HUB]]
    for sender in fresh.sites:
        for message in [*kinds.values(), kinds[epoch.Grant], "anything", None]:
            for stage in (*early, epochs.stages[HUB]):
                try:
                    epoch.step_hub(epochs.hub, stage, epoch.FromSite(sender, message), 0.0)
                except ProtocolRefused:
                    continue
                assert getattr(message, "site", "") == sender and stage is epochs.stages[HUB]
