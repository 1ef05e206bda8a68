"""Which effects of a job at a site are events of its audit trail, and the facts of each.

Invariant: an event is recorded before its effect is carried out, so that nothing leaves that no line has. Of a message
the line has name, size and digest, never its content; of a refusal the word that the coordinator is told, and what the
policy says of settings.
"""

from collections.abc import Iterator

from fedcore.audit.lines import Fact
from fedcore.audit.round_facts import place, release
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import epoch, job_messages, messages
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.site.machine import SiteJob
from fedcore.secagg.protocol.job.site.rounds import header_of
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.wire_form import decode, digest, encode_message, type_name

Event = tuple[str, dict[str, Fact]]


def events_of(effect: effects.SiteEffect, found: SiteJob) -> Iterator[Event]:
    """The events of an effect, in order."""
    job = found.offer.job
    match effect:
        case effects.Send(message=message):
            yield from _decision(message, found)
            header = _round_of(message, found)
            where = {} if header is None else place(header)
            yield "sent", {"job": job, **where, **message_facts(message)}
        case effects.EnterRelease(certificate=certificate):
            yield "released", {"job": job, **release(certificate)}
        case effects.EndJob(ended=ended):
            about = {"outcome": ended.outcome, "text": ended.text}
            yield "ended", {"job": job, "certificate_hash": ended.certificate, **about}
        case effects.PutValues(values=values) if "epoch" in values:
            keys = decode(values["epoch"], object)
            if isinstance(keys, epoch.Holding):
                yield "key", {"job": job, "word": "held", "epoch": keys.epoch}
        case effects.EraseKeys():
            yield "key", {"job": job, "word": "erased"}
        case _:
            pass


def _round_of(message: job_messages.ToCoordinator, found: SiteJob) -> RoundHeader | None:
    """The round that a message is of: the one under way, or for keys and shares that are sent ahead the next."""
    stage = found.stage
    if (
        isinstance(message, messages.Keys | messages.Shares)
        and isinstance(stage, site.Stated)
        and stage.ahead is not None
    ):
        return stage.ahead.header
    return header_of(stage)


def vector_event(submit: messages.Submit, found: SiteJob) -> Event:
    """A vector that is about to be uploaded. model: the digest of the one it starts from."""
    state, header = found.state, header_of(found.stage)
    where = {} if header is None else place(header) | {"plan": header.plan_digest}
    model = {} if state is None else {"model": state.model_sha256}
    event, facts = file_event(found.offer.job, "vector", submit.size, submit.digest)
    return event, {**facts, **where, **model}


def file_event(job: str, what: str, size: int, digest: bytes) -> Event:
    """A file that is about to be uploaded: a vector, a sealed checkpoint, a model."""
    return "sent", {"job": job, "what": what, "bytes": size, "sha256": digest.hex()}


def message_facts(message: job_messages.ToCoordinator) -> dict[str, Fact]:
    """Name, size and SHA-256 of a message."""
    size, found = len(encode_message(message)), digest(message).hex()
    return {"what": type_name(type(message)), "bytes": size, "sha256": found}


def _decision(message: job_messages.ToCoordinator, found: SiteJob) -> Iterator[Event]:
    """The answer to an offer or to a plan, where the message is one."""
    job = found.offer.job
    match message:
        case job_messages.SiteSurvey():
            yield "decision", {"job": job, "on": "offer", "word": "accepted"}
        case job_messages.PlanAgreed(plan_digest=plan):
            yield "decision", {"job": job, "on": "plan", "word": "agreed", "plan": plan}
        case job_messages.SiteUnavailable(reason=word):
            refused = found.part.refused
            why = str(refused) if refused is not None else job_messages.REASONS[word]
            yield "decision", {"job": job, "on": "job", "word": word, "reason": why}
        case _:
            pass
