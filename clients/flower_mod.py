"""`secure_mod`: a site of a protected run as a mod of a Flower ClientApp (Message API).

Each message is a new process whose only memory is `Context.state`, which a SuperNode keeps in RAM. A count of replies
on disk, in the folder `runs` beside the site's file, tells a memory that was lost: that site takes no further part in
the run. Identity, pinned keys and policy are in a file at the SuperNode, named by its node config:
`--node-config 'fedcore="/etc/fedcore/site.toml"'`. Only a simulated node, which is a worker of Ray, needs none.

The mod runs inside the app that is submitted: docs/flower.md says what that does and does not protect.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from pydantic import Field

from fedcore.errors import BadInput, FedcoreError, StoreProblem, with_hint
from fedcore.files import write_atomic
from fedcore.files.disk import refusals, sync_folder
from fedcore.files.toml import Section, read_toml
from fedcore.identity.kit import read_private
from fedcore.secagg import protections
from fedcore.secagg.by_request.named_arrays import Arrays, difference, digest_of_arrays
from fedcore.secagg.by_request.requests import BODY, RECORD, STYPE, Request, SiteReply
from fedcore.secagg.by_request.simulated import FEDERATION, simulated_identities
from fedcore.secagg.by_request.site import Membership, ReplyCount, SiteByRequest
from fedcore.secagg.by_request.terms import Trained
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest
from fedcore.types import SiteId

LOG = logging.getLogger("fedcore.site")

Next = Callable[[Message, Context], Message]

_FILES = "`python -m fedcore_clients.flower_identities` writes such files; docs/flower.md says what is in them"

NODE_KEY, WEIGHT = "fedcore", "num-examples"
"""The key of the node config, and of the metric with a site's training rows."""

PRECONDITION = 6
"""Flower's code of an error for a mod that does not run: `ErrorCode.MOD_FAILED_PRECONDITION`."""


class SiteFile(Section):
    """The file at a SuperNode. key: of a file with the 32 bytes of the private key, in hex. sites: {name: public key,
    in hex}, in the same order at every site."""

    federation: str
    site: str
    key: Path
    protections: tuple[str, ...] = ("layered", "masked")
    minimum_sites: int = Field(default=3, ge=3)
    sites: dict[str, str]

    def membership(self) -> Membership:
        """Raises BadInput and RosterRefused."""
        try:
            return self._membership()
        except FedcoreError as error:
            error.remedy = error.remedy or _FILES
            raise

    def _membership(self) -> Membership:
        pins = {SiteId(name): _hex(public, f"sites.{name}") for name, public in self.sites.items()}
        roster_digest(pins)
        for protection in self.protections:
            protections.refuse_unknown(protection)
        text = read_private(self.key).decode("ascii", errors="replace")
        identity = IdentityKey(_hex(text.strip(), str(self.key)))
        if pins.get(SiteId(self.site)) != identity.public:
            raise BadInput(
                f"site: found {self.site!r}, expected the one of [sites] whose public key belongs to {self.key}"
            )
        allowed = self.protections, self.minimum_sites
        return Membership(self.federation, SiteId(self.site), identity, pins, *allowed)


def _hex(text: str, what: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError as error:
        raise BadInput(f"{what}: found no hex, expected 64 hex digits") from error
    if len(found) != 32:
        raise BadInput(f"{what}: found {len(found)} bytes, expected 32, as 64 hex digits")
    return found


def secure_mod(message: Message, context: Context, call_next: Next) -> Message:
    """Take part in a protected run: the training function is called inside a round, and its update leaves protected.

    Give it to the training function or to the app: `ClientApp(mods=[secure_mod])`. Any message that is no request of
    `SecureAggregation` is refused, so that nobody gets a reply in clear by leaving the protection out.
    """
    try:
        return _answer(message, context, call_next)
    except FedcoreError as error:
        line = with_hint(error)
        LOG.warning("%s", line)
        return Message(Error(PRECONDITION, line), reply_to=message)


def _answer(message: Message, context: Context, call_next: Next) -> Message:
    if RECORD not in message.content:
        raise BadInput(
            f"secure_mod: found a {message.metadata.message_type} message without protection, expected a "
            "request of fedcore.flower.SecureAggregation",
            remedy="wrap the strategy in SecureAggregation, or give the mod to the training function only",
        )
    job = f"flower-{context.run_id}"
    memory = _Memory(context, job)
    membership, answered = _standing(context, memory)
    training = _Training(message, context, call_next)
    request = _request_of(message.content, training.digest)
    reply = SiteByRequest(job, membership, memory, training, answered).answer(request)
    memory.write(context)
    return Message(_content_of(reply), reply_to=message)


def _standing(context: Context, memory: _Memory) -> tuple[Membership, ReplyCount]:
    """Which site this node is, and its count of replies: by its own file, or in a simulation by its place. Nothing
    that a ServerApp or the submitter of a run chooses has a part in it. Raises BadInput."""
    where = context.node_config.get(NODE_KEY)
    if where is None and _is_simulated():
        return _simulated_membership(context), _AnsweredInMemory(memory)
    if not isinstance(where, str):
        raise BadInput(
            f"node config {NODE_KEY!r}: found none, expected the path of this site's file",
            remedy=f"flower-supernode --node-config '{NODE_KEY}=\"/path/site.toml\"'",
        )
    path = Path(where)
    if not path.is_file():
        raise BadInput(f"{path}: found no such file, expected that of this site", remedy=_FILES)
    membership = read_toml(SiteFile, path, paths=("key",)).membership()
    return membership, _AnsweredFile(path.resolve().parent / "runs", memory.job)


def _is_simulated() -> bool:
    """Whether this process is a worker of Ray, as every simulated node of `flwr run` is. The process of a deployed
    SuperNode is none, whatever is in its node config, the run config and the message."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return ray.get_runtime_context().get_actor_id() is not None


def _simulated_membership(context: Context) -> Membership:
    """The site of a simulated node. Raises BadInput."""
    place, places = (context.node_config.get(key) for key in ("partition-id", "num-partitions"))
    if not (isinstance(place, int) and isinstance(places, int) and 0 <= place < places):
        raise BadInput(
            f"node config: found partition-id {place} of num-partitions {places}, expected those of a simulated node"
        )
    identities = simulated_identities(places)
    site, identity = list(identities.items())[place]
    pins = {name: key.public for name, key in identities.items()}
    return Membership(FEDERATION, site, identity, pins)


class _AnsweredFile:
    """The count of answered requests of a run, in a file at the SuperNode: Flower sends a reply before it keeps the
    context that belongs to it."""

    def __init__(self, folder: Path, job: str) -> None:
        self._folder, self._path = folder, folder / job

    def count(self) -> int:
        try:
            return int(self._path.read_bytes())
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise StoreProblem(f"{self._path}: it cannot be read ({error})") from error

    def write(self, count: int) -> None:
        with refusals("answered requests", self._path):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_atomic(self._path, str(count).encode())
            sync_folder(self._folder)


class _AnsweredInMemory:
    """The count in the memory itself: a simulation keeps a reply and its context together or loses both."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory

    def count(self) -> int:
        return int(self._memory.get("answered", b"0"))

    def write(self, count: int) -> None:
        pass  # written with the rest of the memory


class _Training:
    """The ClientApp's own function, called with what the request carries beside our record."""

    def __init__(self, message: Message, context: Context, call_next: Next) -> None:
        self.message, self.context, self.call_next = message, context, call_next
        kept = {str(n): r for n, r in message.content.items() if n not in {RECORD, BODY}}
        self.content = RecordDict(kept)
        self.start: Arrays = {}
        self.digest = b""
        if kept:
            self.start = _arrays_of(self.content)
            self.digest = digest_of_arrays(self.start, dict(self.content.config_records))

    def __call__(self) -> Trained:
        """Train. Our memory is out of the state meanwhile, so that a function that prints or clears it does no harm."""
        before = self.message.content
        self.message.content = self.content
        ours = self.context.state.pop(RECORD, None)
        try:
            reply: object = self.call_next(self.message, self.context)
        finally:
            self.message.content = before
            if ours is not None:
                self.context.state[RECORD] = ours
        if not isinstance(reply, Message) or reply.has_error():
            error = isinstance(reply, Message) and f"the error {reply.error.reason!r}"
            raise BadInput(
                f"training: found {error or type(reply).__name__}, expected a Message with arrays",
                remedy="return Message(RecordDict({...}), reply_to=message)",
            )
        metrics = {
            str(name): value
            for record in reply.content.metric_records.values()
            for name, value in record.items()
        }
        examples = metrics.pop(WEIGHT, None)
        if not (
            isinstance(examples, int | float) and 1 <= examples < 1 << 53 and examples % 1 == 0
        ):
            raise BadInput(
                f"training: found {WEIGHT!r} = {examples}, expected a whole number of rows, at least 1",
                remedy=f'reply with MetricRecord({{"{WEIGHT}": len(train_rows), ...}})',
            )
        update = difference(_arrays_of(reply.content), self.start)
        return Trained(update, int(examples), metrics)


def _arrays_of(content: RecordDict) -> Arrays:
    """The arrays of the one ArrayRecord of a message. Raises BadInput."""
    records = list(content.array_records.values())
    if len(records) != 1:
        raise BadInput(
            f"message: found {len(records)} array records, expected one",
            remedy='RecordDict({"arrays": ArrayRecord(...), "metrics": MetricRecord(...)})',
        )
    try:
        return {name: array.numpy() for name, array in records[0].items()}
    except (TypeError, ValueError) as error:
        raise BadInput(f"arrays: found some that NumPy cannot read ({error})") from error


class _Memory(MutableMapping[str, bytes]):
    """The site's memory, in a record of `Context.state`. What another run of a series left there is dropped."""

    def __init__(self, context: Context, job: str) -> None:
        kept = context.state.array_records.get(RECORD) or ArrayRecord()
        values = {str(name): array.data for name, array in kept.items()}
        mine = values.get("job") == job.encode()
        self.job = job
        self._values = values if mine else {"job": job.encode()}

    def write(self, context: Context) -> None:
        """Into the context, which Flower keeps together with the reply."""
        context.state[RECORD] = ArrayRecord({n: _array(v) for n, v in self._values.items()})

    def __getitem__(self, name: str) -> bytes:
        return self._values[name]

    def __setitem__(self, name: str, value: bytes) -> None:
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _array(data: bytes) -> Array:
    return Array(dtype=np.dtype(np.uint8).name, shape=(len(data),), stype=STYPE, data=data)


def _request_of(content: RecordDict, digest: bytes) -> Request:
    body = content.array_records[BODY]["body"].data if BODY in content.array_records else b""
    return Request.of_parts(dict(content.config_records[RECORD]), body, digest)


def _content_of(reply: SiteReply) -> RecordDict:
    found = RecordDict({RECORD: ConfigRecord(dict(reply.parts()))})
    if reply.body:
        found[BODY] = ArrayRecord({"body": _array(reply.body)})
    return found
