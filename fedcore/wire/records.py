"""Messages of the protocol inside `Record` frames, in the one byte form that is signed and hashed.

A table made by `travelling` lists the types of one direction and their maximal length; anything else is
refused by its name before it is decoded. Invariant: no type of a table has a field, at any depth, that can
hold a secret; `travelling` raises TypeError for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from fedcore.errors import MalformedMessage
from fedcore.secagg.crypto.secret import Secret
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol import epoch, job_messages, messages
from fedcore.secagg.protocol.wire_form import decode, encode_message, type_name
from fedcore.wire.frames import Record
from fedcore.wire.limits import GRANT, KIB, MAX_RECORD, MOST_ITEMS, SITE_RECORD, SITE_WORDS

METRICS_RECORD = 32 * KIB
"""Bytes of a site's public metrics: 64 of them, with names of 64 characters of four bytes, are 20 KiB."""

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Entry(Generic[T_co]):
    """A record type of one direction. most: its maximal length in bytes.

    each: bytes allowed per site of the roster where the length grows with the roster, else 0. under: the plans
    under which a site may send it; None: any, and before there is one.
    """

    kind: type[T_co]
    most: int
    each: int = 0
    under: Callable[[RoundPlan], bool] | None = None

    def limit(self, sites: int | None) -> int:
        """Maximal length in bytes for a roster of this size."""
        if sites is None or not self.each:
            return self.most
        return min(self.most, SITE_WORDS + self.each * sites)


T = TypeVar("T")
Table = Mapping[str, Entry[T]]
"""{record name: entry}"""


def travelling(
    *types: type[T], most: int, each: int = 0, under: Callable[[RoundPlan], bool] | None = None
) -> Table[T]:
    """A table of record types of at most `most` bytes each. Raises TypeError for one that may hold a secret."""
    for kind in types:
        _refuse_secrets(kind, type_name(kind), set())
    return MappingProxyType({type_name(kind): Entry(kind, most, each, under) for kind in types})


def _refuse_secrets(hint: Any, where: str, seen: set[Any]) -> None:
    secret = isinstance(hint, type) and issubclass(hint, Secret)
    if secret or hint is Any or isinstance(hint, TypeVar):
        raise TypeError(f"{where} may hold a secret: it cannot travel")
    for each in get_args(hint):
        _refuse_secrets(each, where, seen)
    if is_dataclass(hint) and hint not in seen:
        seen.add(hint)
        hints = get_type_hints(hint)
        for each in fields(hint):
            _refuse_secrets(hints[each.name], f"{where}.{each.name}", seen)


FROM_SITES: Table[messages.SiteMessage | epoch.SiteEpochMessage] = {
    **travelling(*get_args(messages.SiteMessage), most=SITE_RECORD),
    **travelling(
        messages.Keys,
        messages.Shares,
        messages.Confirm,
        messages.NextKeys,
        messages.Unmask,
        most=SITE_RECORD,
        under=lambda plan: plan.layers.masks,
    ),
    **travelling(epoch.EpochKey, epoch.KeyHeld, most=SITE_WORDS),
    **travelling(epoch.Grant, most=GRANT),
    **travelling(epoch.Grants, most=MAX_RECORD, each=GRANT),
}
FROM_COORDINATOR: Table[messages.CoordinatorMessage | epoch.CoordinatorEpochMessage] = travelling(
    *get_args(messages.CoordinatorMessage),
    *get_args(epoch.CoordinatorEpochMessage),
    most=MAX_RECORD,
)
"""The records of rounds and key epochs, without those of jobs."""

TO_COORDINATOR: Table[job_messages.ToCoordinator] = {
    **FROM_SITES,
    **travelling(*get_args(job_messages.SiteJobMessage), most=SITE_RECORD),
    **travelling(
        job_messages.PublicMetrics, most=METRICS_RECORD, under=lambda plan: plan.public_metrics
    ),
    **travelling(
        job_messages.TrainingOver,
        most=SITE_RECORD,
        under=lambda plan: plan.server.judge is not None and plan.server.judge.ends,
    ),
    **travelling(
        job_messages.ModelMade, most=SITE_RECORD, under=lambda plan: plan.release == "coordinator"
    ),
}
FROM_ANY_SITE: Table[job_messages.ToCoordinator] = {
    name: entry for name, entry in TO_COORDINATOR.items() if entry.kind is not epoch.Grants
}
"""Without `Grants`, which only an epoch's maker sends: the one record of a site that may be long."""

TO_SITE: Table[job_messages.ToSite] = {
    **FROM_COORDINATOR,
    **travelling(*get_args(job_messages.CoordinatorJobMessage), most=MAX_RECORD),
}


def pack_record(job: str, message: object, allowed: Table[object]) -> Record:
    """A message as a frame. Raises TypeError for a type that is not in the table, and MalformedMessage
    (fault: this site) for a message that is too long."""
    name = type_name(type(message))
    entry = allowed.get(name)
    if entry is None or entry.kind is not type(message):
        raise TypeError(f"{name} does not travel this way")
    return Record(job, _fitting(encode_message(message), entry, entry.most, "this site"))


def unpack_record(record: Record, allowed: Table[T], *, sender: str, sites: int | None = None) -> T:
    """The message in a frame. Raises MalformedMessage (fault: sender).

    sites: size of the roster, at the coordinator: a message longer than this roster allows is refused
    before it is decoded, and so is a list of more than MOST_ITEMS in it.

    A message names its own site; the machines check by signature that it is the sender.
    """
    entry = allowed.get(_name(record.body))
    if entry is None:
        raise MalformedMessage("record", "another one", "a message that travels this way", sender)
    body = _fitting(record.body, entry, entry.limit(sites), sender)
    most = None if sites is None else max(sites, MOST_ITEMS)
    return decode(body, entry.kind, sender=sender, most_items=most)


def _fitting(body: bytes, entry: Entry[object], most: int, sender: str) -> bytes:
    if len(body) > most:
        found, expected = f"{len(body)} bytes", f"at most {most} bytes"
        raise MalformedMessage(type_name(entry.kind), found, expected, sender)
    return body


def _name(body: bytes) -> str:
    """The type name at the head of a record, or "" for bytes of another form."""
    if body[:2] != b"RS" or len(body) < 6:
        return ""
    size = int.from_bytes(body[2:6], "big")
    return body[6 : 6 + min(size, 64)].decode(errors="replace")
