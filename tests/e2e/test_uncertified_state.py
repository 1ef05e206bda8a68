"""A state becomes a site's model only by its own certificate (PROTOCOL V).

Measured at 45ef960: a coordinator with one colluding site offered a forged checkpoint, let its download
finish while the victim waited for the certificate of a round of the same number, and the real certificate
then made the forged state the victim's model. Three rules are in the way; each of them alone is enough.
"""

from __future__ import annotations

import asyncio
import hashlib
import types
from dataclasses import replace

import fedcore_clients.jobs
import pytest
from town import SITES, scene

from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.messages import Certificate
from fedcore.secagg.protocol.round import site as site_machine

RULES = ("certificate", "state", "key")


def switch_off(monkeypatch, rules):
    """certificate: proved before anything is fetched; state: its HMAC is the certified one; key: it is
    held under the certificate's hash."""
    if "certificate" in rules:
        monkeypatch.setattr(site_machine, "check_missed", lambda *_: None)
    if "state" in rules:
        monkeypatch.setattr(fedcore_clients.jobs, "_require_certified", lambda *_: None)
    if "key" in rules:
        monkeypatch.setattr(fedcore_clients.jobs, "_key", lambda c: f"{c.header.round:064d}")


def forge(victim, colluder, header):
    """(offer, container) of a state that only the colluder made up, for a round of this number."""
    parameters = victim.state.server.parameters + 1000.0
    state = replace(victim.state, server=replace(victim.state.server, parameters=parameters))
    fake = Certificate(replace(header, purpose="metrics"), header.roster, b"s" * 32, b"t" * 32, ())
    data = colluder.secrets.group.to_bytes() + state.to_bytes()
    sealed = colluder.secrets.seal_state(data, fake, OsEntropy())
    digest = hashlib.sha256(sealed).digest()
    return job_messages.CheckpointOffer("job", fake, digest, len(sealed)), [sealed], state


def attack(found):
    """The coordinator's part, played on site a; returns what became of it."""
    victim, colluder, seen = found.sites["a"], found.sites["d"], {}
    offered, stated, held = asyncio.Event(), asyncio.Event(), asyncio.Event()
    invited, certified, fetch = victim._invited, victim._certified, victim._fetch
    state_step = victim._machine

    async def with_an_offer(self, announce):
        if not offered.is_set():
            offered.set()
            offer, chunks, state = forge(self, colluder, announce.header)
            seen.update(
                chunks=chunks, state=state, digest=offer.digest, round=announce.header.round
            )
            await self._on_message(offer)
            seen["task"] = next(reversed([*self._beside]))
            await asyncio.sleep(0)
        await invited(announce)

    async def late(self, what, digest, wanted):
        if digest != seen.get("digest"):
            return await fetch(what, digest, wanted)
        assert wanted()
        seen["fetched"] = True
        await stated.wait()
        return seen["chunks"]

    async def machine(self, event, **rest):
        await state_step(event, **rest)
        if isinstance(self.stage, site_machine.Stated):
            stated.set()

    async def after_the_forgery(self, certificate):
        if certificate.header.round == seen.get("round") and not held.is_set():
            held.set()
            stated.set()
            if not seen["task"].done():
                await asyncio.wait([seen["task"]])
        await certified(certificate)
        if certificate.header.round == seen.get("round"):
            seen["after"] = self.state

    for name, function in (
        ("_invited", with_an_offer), ("_fetch", late), ("_machine", machine),
        ("_certified", after_the_forgery),
    ):  # fmt: skip
        setattr(victim, name, types.MethodType(function, victim))
    return seen


@pytest.mark.parametrize("left", [*RULES, "none"])
def test_a_forged_checkpoint_does_not_become_the_model(tmp_path, pool, monkeypatch, left):
    """Each rule alone; with none of them, as a control, it does."""
    switch_off(monkeypatch, set(RULES) - {left})

    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: len(found.hub.rounds.known) >= 1)
        seen = attack(found)
        await found.run(until=lambda: "after" in seen or found.hub.outcome is not None)
        assert ("fetched" in seen) == (left != "certificate")
        forged = seen["after"].canonical() == seen["state"].canonical()
        assert forged == (left == "none")
        if not forged:
            await found.run()
            await found.check()

    scene(tmp_path, pool, play, rounds=6)


@pytest.mark.parametrize("rule", ["on", "off"])
def test_the_state_that_is_applied_is_measured_anew(tmp_path, pool, monkeypatch, rule):
    """What is held may not have changed since it was found: otherwise nothing is applied, uniformly."""
    if rule == "off":
        switch_off(monkeypatch, {"state"})

    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: len(found.hub.rounds.known) >= 1)
        victim, seen = found.sites["a"], {}
        certified = victim._certified

        async def spoiled(self, certificate):
            key = fedcore_clients.jobs._key(certificate)
            if "state" not in seen and key in self._candidates:
                kept, before = self._candidates[key], self.state
                server = kept.state.server
                other = replace(
                    kept.state, server=replace(server, parameters=server.parameters + 1.0)
                )
                self._candidates[key] = replace(kept, state=other, data=other.to_bytes())
                seen.update(state=other, before=before)
                await certified(certificate)
                seen["after"], seen["stage"] = self.state, type(self.stage).__name__
            else:
                await certified(certificate)

        victim._certified = types.MethodType(spoiled, victim)
        await found.run(until=lambda: "after" in seen)
        if rule == "off":
            assert seen["after"] is seen["state"], "control"
            return
        assert seen["after"] is seen["before"] and seen["stage"] == "Halted"
        await found.run()
        await found.check()
        assert found.hub.facts.epoch.epoch > 1, "the others released it, and go on with new keys"

    scene(tmp_path, pool, play, rounds=6)
