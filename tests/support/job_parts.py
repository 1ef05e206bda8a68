"""Parts of a coordinator's job, for tests that feed them events and compare effects."""

from __future__ import annotations

from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol.effects import Send
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, Limits, Moment
from fedcore.secagg.protocol.job_messages import JobOffer

SITES = ("a", "b", "c", "d")
LIMITS = Limits(stage=100.0, gather=10.0, minimum=3, grace=5.0, enough=1000.0)
OFFER = JobOffer("job", "t", "0" * 64, canonical({}))


def facts_of(plan=None, limits=LIMITS, sites=SITES, **fields):
    """What a job knows: with a plan, as after its agreement."""
    found = JobFacts("clinics", OFFER, {name: IdentityKey().public for name in sites}, limits)
    if plan is not None:
        found.plan, found.threshold = plan, plan.threshold
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def at(now=0.0, here=SITES):
    """A moment; seconds since 1970 are 1000 more than those of the clock."""
    return Moment(now, now + 1000.0, here)


def sent(effects, kind=object):
    """(site, message) of every message of this kind, in order."""
    return [
        (e.to, e.message) for e in effects if isinstance(e, Send) and isinstance(e.message, kind)
    ]
