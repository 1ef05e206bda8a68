from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromSite(_message.Message):
    __slots__ = ("hello", "record", "doing", "pong", "upload", "goodbye", "roster", "trail")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    DOING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    TRAIL_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    record: Record
    doing: Doing
    pong: Pong
    upload: SmallUpload
    goodbye: Goodbye
    roster: RosterSeen
    trail: TrailHead
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., record: _Optional[_Union[Record, _Mapping]] = ..., doing: _Optional[_Union[Doing, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., upload: _Optional[_Union[SmallUpload, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., roster: _Optional[_Union[RosterSeen, _Mapping]] = ..., trail: _Optional[_Union[TrailHead, _Mapping]] = ...) -> None: ...

class ToSite(_message.Message):
    __slots__ = ("welcome", "record", "ping", "receipt", "download", "goodbye", "waiting", "roster", "job_roster", "confirmed", "second")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    JOB_ROSTER_FIELD_NUMBER: _ClassVar[int]
    CONFIRMED_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    record: Record
    ping: Ping
    receipt: UploadReceipt
    download: SmallDownload
    goodbye: Goodbye
    waiting: Waiting
    roster: Roster
    job_roster: JobRoster
    confirmed: TrailReceipt
    second: SecondProcess
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., record: _Optional[_Union[Record, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., receipt: _Optional[_Union[UploadReceipt, _Mapping]] = ..., download: _Optional[_Union[SmallDownload, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., roster: _Optional[_Union[Roster, _Mapping]] = ..., job_roster: _Optional[_Union[JobRoster, _Mapping]] = ..., confirmed: _Optional[_Union[TrailReceipt, _Mapping]] = ..., second: _Optional[_Union[SecondProcess, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "software", "pins", "tasks", "held", "instance")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    version: int
    software: str
    pins: str
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    held: _containers.RepeatedCompositeFieldContainer[Held]
    instance: bytes
    def __init__(self, version: _Optional[int] = ..., software: _Optional[str] = ..., pins: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., held: _Optional[_Iterable[_Union[Held, _Mapping]]] = ..., instance: _Optional[bytes] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("name", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("job", "certificate", "epoch", "round")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    job: str
    certificate: str
    epoch: int
    round: int
    def __init__(self, job: _Optional[str] = ..., certificate: _Optional[str] = ..., epoch: _Optional[int] = ..., round: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "software", "federation", "time_ms", "roster")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    version: int
    software: str
    federation: str
    time_ms: int
    roster: int
    def __init__(self, version: _Optional[int] = ..., software: _Optional[str] = ..., federation: _Optional[str] = ..., time_ms: _Optional[int] = ..., roster: _Optional[int] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("job", "body")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    job: str
    body: bytes
    def __init__(self, job: _Optional[str] = ..., body: _Optional[bytes] = ...) -> None: ...

class Doing(_message.Message):
    __slots__ = ("job", "what", "percent")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    job: str
    what: str
    percent: int
    def __init__(self, job: _Optional[str] = ..., what: _Optional[str] = ..., percent: _Optional[int] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("document",)
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    def __init__(self, document: _Optional[bytes] = ...) -> None: ...

class JobRoster(_message.Message):
    __slots__ = ("job", "number", "digest")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    job: str
    number: int
    digest: str
    def __init__(self, job: _Optional[str] = ..., number: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class RosterSeen(_message.Message):
    __slots__ = ("number", "word")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    number: int
    word: str
    def __init__(self, number: _Optional[int] = ..., word: _Optional[str] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("job", "sites", "of", "until_ms", "then", "least", "in_round")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    OF_FIELD_NUMBER: _ClassVar[int]
    UNTIL_MS_FIELD_NUMBER: _ClassVar[int]
    THEN_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    IN_ROUND_FIELD_NUMBER: _ClassVar[int]
    job: str
    sites: _containers.RepeatedCompositeFieldContainer[Awaited]
    of: int
    until_ms: int
    then: int
    least: int
    in_round: bool
    def __init__(self, job: _Optional[str] = ..., sites: _Optional[_Iterable[_Union[Awaited, _Mapping]]] = ..., of: _Optional[int] = ..., until_ms: _Optional[int] = ..., then: _Optional[int] = ..., least: _Optional[int] = ..., in_round: _Optional[bool] = ...) -> None: ...

class Awaited(_message.Message):
    __slots__ = ("site",)
    SITE_FIELD_NUMBER: _ClassVar[int]
    site: str
    def __init__(self, site: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("code", "text")
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    code: str
    text: str
    def __init__(self, code: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class TrailHead(_message.Message):
    __slots__ = ("number", "hash")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    number: int
    hash: bytes
    def __init__(self, number: _Optional[int] = ..., hash: _Optional[bytes] = ...) -> None: ...

class TrailReceipt(_message.Message):
    __slots__ = ("number", "hash", "time_ms", "own_number", "own_hash", "certificate", "signature")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    OWN_NUMBER_FIELD_NUMBER: _ClassVar[int]
    OWN_HASH_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    number: int
    hash: bytes
    time_ms: int
    own_number: int
    own_hash: bytes
    certificate: bytes
    signature: bytes
    def __init__(self, number: _Optional[int] = ..., hash: _Optional[bytes] = ..., time_ms: _Optional[int] = ..., own_number: _Optional[int] = ..., own_hash: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SecondProcess(_message.Message):
    __slots__ = ("address", "time_ms")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    address: str
    time_ms: int
    def __init__(self, address: _Optional[str] = ..., time_ms: _Optional[int] = ...) -> None: ...

class UploadStart(_message.Message):
    __slots__ = ("job", "header", "digest", "size", "offset")
    JOB_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job: str
    header: bytes
    digest: bytes
    size: int
    offset: int
    def __init__(self, job: _Optional[str] = ..., header: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., size: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("start", "data")
    START_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    start: UploadStart
    data: bytes
    def __init__(self, start: _Optional[_Union[UploadStart, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadReceipt(_message.Message):
    __slots__ = ("digest", "offset", "complete")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    complete: bool
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., complete: _Optional[bool] = ...) -> None: ...

class DownloadStart(_message.Message):
    __slots__ = ("job", "what", "digest", "offset")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job: str
    what: str
    digest: bytes
    offset: int
    def __init__(self, job: _Optional[str] = ..., what: _Optional[str] = ..., digest: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class DownloadHead(_message.Message):
    __slots__ = ("digest", "size", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    size: int
    offset: int
    def __init__(self, digest: _Optional[bytes] = ..., size: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr",)
    CSR_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    def __init__(self, csr: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...

class DownloadPart(_message.Message):
    __slots__ = ("head", "data")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    head: DownloadHead
    data: bytes
    def __init__(self, head: _Optional[_Union[DownloadHead, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SmallUpload(_message.Message):
    __slots__ = ("start", "data")
    START_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    start: UploadStart
    data: bytes
    def __init__(self, start: _Optional[_Union[UploadStart, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SmallDownload(_message.Message):
    __slots__ = ("start", "data")
    START_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    start: DownloadStart
    data: bytes
    def __init__(self, start: _Optional[_Union[DownloadStart, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("version", "toml", "task", "task_sha256", "about")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOML_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_SHA256_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    version: int
    toml: bytes
    task: str
    task_sha256: str
    about: bytes
    def __init__(self, version: _Optional[int] = ..., toml: _Optional[bytes] = ..., task: _Optional[str] = ..., task_sha256: _Optional[str] = ..., about: _Optional[bytes] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class JobsRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class JobsReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("version", "job")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    version: int
    job: str
    def __init__(self, version: _Optional[int] = ..., job: _Optional[str] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class JobRequest(_message.Message):
    __slots__ = ("version", "job")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    version: int
    job: str
    def __init__(self, version: _Optional[int] = ..., job: _Optional[str] = ...) -> None: ...

class SiteRequest(_message.Message):
    __slots__ = ("version", "site", "undo")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    version: int
    site: str
    undo: bool
    def __init__(self, version: _Optional[int] = ..., site: _Optional[str] = ..., undo: _Optional[bool] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class FilePart(_message.Message):
    __slots__ = ("name", "offset", "data", "last")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    data: bytes
    last: bool
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...
