"""The wire format between coordinator, sites and operators: frames, their limits, and the list of calls.

- `federation.proto`: the calls and frames, for a reader and for other languages.
- `frames.py`: each frame as a frozen dataclass with its limits; bytes to frame and back.
- `records.py`: the protocol's own messages inside `Record` frames, in the bytes that are signed.
- `chunks.py`: a long vector as parts, resumable from any offset.
- `calls.py`: the calls, their request and reply frames, and the roles that may make them.
- `refusals.py`: an error of the other side as a status, with its hint.
- `codec.py`, `limits.py`: serialisation of frames; limits of fields.
- `_generated/`: generated from `federation.proto` by `scripts/gen-proto`; imported by `frames.py` alone.

Invariant: decoding any bytes gives one frame within its limits or raises `MalformedMessage`.
Nothing here opens a connection: grpc is used in `server/` and `clients/`, which pass bytes.
"""
