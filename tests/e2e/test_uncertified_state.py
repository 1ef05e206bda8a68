"""A state becomes a site's model only by its own certificate (PROTOCOL V).

Measured at 45ef960: a coordinator with one colluding site offered a forged checkpoint, let its download
finish while the victim waited for the certificate of a round of the same number, and the real certificate
then made the forged state the victim's model. Three rules are in the way; each of them alone is enough.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

import pytest
from town import SITES, scene

from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.site import states as site_states
from fedcore.secagg.protocol.job.site.events import MessageReceived
from fedcore.secagg.protocol.messages import Announce, Certificate
from fedcore.secagg.protocol.round import site as site_machine

RULES = ("certificate", "state", "key")


def switch_off(without, rules):
    """certificate: proved before anything is fetched; state: its HMAC is the certified one; key: it is
    held under the certificate's hash."""
    if "certificate" in rules:
        without(site_machine, "check_missed")
    if "state" in rules:
        without(site_states, "require_certified")
    if "key" in rules:
        without(site_states, name_of=lambda c: f"{c.header.round:064d}")


def forge(victim, colluder, header):
    """(offer, container) of a state that only the colluder made up, for a round of this number."""
    parameters = victim.state.server.parameters + 1000.0
    state = replace(victim.state, server=replace(victim.state.server, parameters=parameters))
    fake = Certificate(replace(header, purpose="metrics"), header.roster, b"s" * 32, b"t" * 32, ())
    secrets = colluder.parts.keys.secrets
    data = secrets.group.to_bytes() + state.to_bytes()
    sealed = secrets.seal_state(data, fake, OsEntropy())
    digest = hashlib.sha256(sealed).digest()
    return job_messages.CheckpointOffer("job", fake, digest, len(sealed)), [sealed], state


def attack(found):
    """The coordinator's part, played on site a; returns what became of it."""
    victim, colluder, seen = found.sites["a"], found.sites["d"], {}
    stated, forged = asyncio.Event(), asyncio.Event()
    handle, fetch, catch_up = victim.handle, victim.work.fetch, victim.work.catch_up

    async def late(what, digest, wanted, each, of=b""):
        if digest != seen.get("digest"):
            await fetch(what, digest, wanted, each, of)
            return
        assert wanted()
        seen["fetched"] = True
        await stated.wait()
        for place, chunk in enumerate(seen["chunks"]):
            each(place, chunk)

    async def caught_up(asked):
        event = await catch_up(asked)
        if asked.digest != seen["digest"]:
            return event
        await handle(event)  # before anything else that waits
        forged.set()
        return None

    async def offer_a_forgery(header):
        offer, chunks, state = forge(victim.job, colluder.job, header)
        seen.update(chunks=chunks, state=state, digest=offer.digest, round=header.round)
        await handle(MessageReceived(offer))
        for _ in range(3):
            await asyncio.sleep(0)

    async def told(event):
        message = getattr(event, "message", None)
        if isinstance(message, Announce) and "round" not in seen:
            await offer_a_forgery(message.header)
        certified = isinstance(message, Certificate) and message.header.round == seen.get("round")
        if certified:
            stated.set()
            if "fetched" in seen:
                await forged.wait()
        await handle(event)
        stage = victim.job.stage
        if isinstance(stage, site_machine.Stated) and stage.header.round == seen.get("round"):
            stated.set()
        if certified:
            seen["after"] = victim.job.state

    victim.handle, victim.work.fetch, victim.work.catch_up = told, late, caught_up
    return seen


@pytest.mark.parametrize("left", [*RULES, "none"])
def test_a_forged_checkpoint_does_not_become_the_model(tmp_path, pool, without, left):
    """Each rule alone; with none of them, as a control, it does."""
    switch_off(without, set(RULES) - {left})

    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        seen = attack(found)
        await found.run(until=lambda: "after" in seen or found.hub.facts.outcome is not None)
        assert ("fetched" in seen) == (left != "certificate")
        forged = seen["after"].canonical() == seen["state"].canonical()
        assert forged == (left == "none")
        if not forged:
            await found.run()
            await found.check()

    scene(tmp_path, pool, play, rounds=6)


@pytest.mark.parametrize("rule", ["on", "off"])
def test_the_state_that_is_applied_is_measured_anew(tmp_path, pool, without, rule):
    """What is held may not have changed since it was found: otherwise nothing is applied, uniformly."""
    if rule == "off":
        switch_off(without, {"state"})

    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        victim, seen = found.sites["a"], {}
        handle = victim.handle

        async def spoiled(event):
            certificate, states = getattr(event, "message", None), victim.job.states
            key = site_states.name_of(certificate) if isinstance(certificate, Certificate) else ""
            if "state" in seen or key not in states.candidates:
                await handle(event)
                return
            (kept, _), before = states.candidates[key], victim.job.state
            server = kept.server
            other = replace(kept, server=replace(server, parameters=server.parameters + 1.0))
            states.candidates[key] = other, other.to_bytes()
            seen.update(state=other, before=before)
            await handle(event)
            seen["after"], seen["stage"] = victim.job.state, type(victim.job.stage).__name__

        victim.handle = spoiled
        await found.run(until=lambda: "after" in seen)
        if rule == "off":
            assert seen["after"] is seen["state"], "control"
            return
        assert seen["after"] is seen["before"] and seen["stage"] == "Halted"
        await found.run()
        await found.check()
        assert found.hub.facts.epoch.epoch > 1, "the others released it, and go on with new keys"

    scene(tmp_path, pool, play, rounds=6)
