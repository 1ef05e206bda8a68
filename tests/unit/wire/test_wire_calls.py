"""The calls over a real connection: grpc.aio on loopback, TLS with certificates on both sides.

The connection is made in a process of its own (this file, run as a program): grpc's threads would stay
in the tests' process and make every later fork unsafe.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedcore.errors import MalformedMessage
from fedcore.secagg.protocol.messages import Leave
from fedcore.wire import calls, chunks, frames, records, refusals
from fedcore.wire._generated import federation_pb2 as pb
from fedcore.wire.limits import PART

CALLS = [each for each in vars(calls).values() if isinstance(each, calls.Call)]
ROLES = {"site", "operator", "observer"}


def test_the_calls_are_those_of_the_proto():
    described = {}
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            shape = (method.client_streaming, method.server_streaming)
            described[f"/{service.full_name}/{method.name}"] = (
                method.input_type.name, method.output_type.name, *shape,
            )  # fmt: skip
    ours = {
        call.path: (call.takes.envelope, call.gives.envelope, call.takes_stream, call.gives_stream)
        for call in CALLS
    }
    assert ours == described


def test_every_call_has_its_roles():
    for call in CALLS:
        assert call.roles and call.roles <= ROLES, call.path
        assert ("site" in call.roles) == (call.service == calls.COORDINATOR)
        reads = call.name in {"Jobs", "Watch", "Result"}
        assert ("observer" in call.roles) == reads, "an observer changes nothing"


def test_over_a_real_connection():
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=300, cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {
        "welcome": "hospitals",
        "record": "left",
        "goodbye": "malformed",
        "receipts": [[PART, False], [3 * PART, True]],
        "download": True,
        "refused": ["job: found none", "look at `fed-coordinator jobs`", 2],
        "without a certificate": "UNAVAILABLE",
    }
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------ the program

DATA = random.Random(5).randbytes(3 * PART)
START = frames.UploadStart("job", b"h" * 32, hashlib.sha256(DATA).digest(), len(DATA))
HELLO = frames.Hello("0f" * 32, (frames.Task("heart", "0a" * 32),))


def certificate():
    """A self-signed P-256 certificate for localhost and its key, as PEM; thrown away at the end."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(minutes=5))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return made.public_bytes(serialization.Encoding.PEM), private


class Service:
    """A coordinator of few lines: it answers as the real one does, without rounds."""

    def __init__(self):
        self.disk = b""

    async def session(self, requests, context):
        try:
            async for data in requests:
                frame = frames.FROM_SITE.unpack(data, sender="va")
                if isinstance(frame, frames.Hello):
                    yield frames.TO_SITE.pack(frames.Welcome("hospitals", 1))
                if isinstance(frame, frames.Record):
                    message = records.unpack_record(frame, records.FROM_SITES, sender="va")
                    yield frames.TO_SITE.pack(frames.Goodbye("stopping", message.code))
        except MalformedMessage:
            yield frames.TO_SITE.pack(frames.Goodbye("malformed"))

    def receipt(self):
        complete = hashlib.sha256(self.disk).digest() == START.digest
        return calls.UPLOAD.gives.pack(frames.UploadReceipt(START.digest, len(self.disk), complete))

    async def upload(self, requests, context):
        incoming = None
        async for data in requests:
            frame = frames.UPLOAD.unpack(data, sender="va")
            if incoming is None:
                assert isinstance(frame, frames.UploadStart) and frame.offset == len(self.disk)
                incoming = chunks.Incoming(frame, sender="va")
            else:
                self.disk += incoming.take(frame)
        return self.receipt()

    async def upload_offset(self, request, context):
        assert calls.UPLOAD_OFFSET.takes.unpack(request, sender="va").digest == START.digest
        return self.receipt()

    async def download(self, request, context):
        want = calls.DOWNLOAD.takes.unpack(request, sender="va")
        head = frames.DownloadHead(want.digest, len(DATA), want.offset)
        for data in chunks.download(head, io.BytesIO(DATA)):
            yield data

    async def stop(self, request, context):
        from fedcore.errors import BadInput

        error = BadInput("job: found none", remedy="look at `fed-coordinator jobs`")
        code, details = refusals.status_of(error)
        await context.abort(getattr(grpc.StatusCode, code), details)


def handler(call, behaviour):
    """What a server registers for one call: bytes in, bytes out."""
    shape = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return shape[call.takes_stream, call.gives_stream](behaviour)


async def main():
    """Serve, connect, and print what each call gave."""
    here, there = certificate(), certificate()
    server = grpc.aio.server(options=[*calls.LENGTHS, ("grpc.so_reuseport", 0)])
    service = Service()
    served = {
        calls.SESSION: service.session,
        calls.UPLOAD: service.upload,
        calls.UPLOAD_OFFSET: service.upload_offset,
        calls.DOWNLOAD: service.download,
        calls.STOP: service.stop,
    }
    for name in (calls.COORDINATOR, calls.OPERATORS):
        mine = {c.name: handler(c, f) for c, f in served.items() if c.service == name}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, mine),))
    credentials = grpc.ssl_server_credentials(
        [(here[1], here[0])], root_certificates=there[0], require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    known = grpc.ssl_channel_credentials(here[0], there[1], there[0])
    async with grpc.aio.secure_channel(
        f"localhost:{port}", known, options=calls.LENGTHS
    ) as channel:
        told = await asyncio.wait_for(conversation(channel), 240)
    stranger = grpc.ssl_channel_credentials(here[0])
    async with grpc.aio.secure_channel(f"localhost:{port}", stranger) as channel:
        try:
            await channel.unary_unary(calls.STOP.path)(b"", timeout=120)
        except grpc.aio.AioRpcError as error:
            told["without a certificate"] = error.code().name
    await server.stop(None)
    print(json.dumps(told))  # noqa: T201


async def conversation(channel):
    """Every kind of call once, and a malformed frame."""
    told = {}
    session = channel.stream_stream(calls.SESSION.path)()
    await session.write(frames.FROM_SITE.pack(HELLO))
    welcome = frames.TO_SITE.unpack(await session.read(), sender="coordinator")
    told["welcome"] = welcome.federation
    leave = records.pack_record("job", Leave(b"h" * 32, "va", "left"), records.FROM_SITES)
    await session.write(frames.FROM_SITE.pack(leave))
    told["record"] = frames.TO_SITE.unpack(await session.read(), sender="coordinator").text
    await session.write(b"\x00 no frame")
    told["goodbye"] = frames.TO_SITE.unpack(await session.read(), sender="coordinator").code
    assert await session.read() is grpc.aio.EOF

    told["receipts"] = []
    offset = 0
    for many in (2, 5):  # the first connection breaks after the start and one part
        start = frames.UploadStart("job", START.header, START.digest, START.size, offset)
        sent = list(chunks.upload(start, io.BytesIO(DATA)))[:many]
        await channel.stream_unary(calls.UPLOAD.path)(iter(sent))
        request = calls.UPLOAD_OFFSET.takes.pack(START)
        answer = await channel.unary_unary(calls.UPLOAD_OFFSET.path)(request)
        receipt = calls.UPLOAD.gives.unpack(answer, sender="coordinator")
        told["receipts"].append([receipt.offset, receipt.complete])
        offset = receipt.offset

    want = calls.DOWNLOAD.takes.pack(frames.DownloadStart("job", "sum", START.digest, PART + 7))
    incoming, got = None, b""
    async for data in channel.unary_stream(calls.DOWNLOAD.path)(want):
        frame = frames.DOWNLOAD.unpack(data, sender="coordinator")
        if isinstance(frame, frames.DownloadHead):
            incoming = chunks.Incoming(frame, sender="coordinator")
        else:
            got += incoming.take(frame)
    told["download"] = got == DATA[PART + 7 :] and incoming.offset == len(DATA)

    try:
        request = calls.STOP.takes.pack(frames.JobRequest("job"))
        await channel.unary_unary(calls.STOP.path)(request)
    except grpc.aio.AioRpcError as error:
        back = refusals.error_of(error.details())
        told["refused"] = [str(back), back.remedy, back.exit_code]
    return told


if __name__ == "__main__":
    asyncio.run(main())
