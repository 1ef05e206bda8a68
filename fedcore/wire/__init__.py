"""What passes between coordinator, sites and operators: frames, their limits, and the list of calls.

- `federation.proto`: the calls and frames, for a reader and for other languages.
- `frames.py`: each frame as a frozen dataclass with its limits; bytes to frame and back.
- `records.py`: the protocol's own messages inside `Record` frames, in the bytes that are signed.
- `chunks.py`: a long vector as parts, from any offset.
- `calls.py`: which calls exist, what they take and give, and who may make them.
- `refusals.py`: an error of the other side as a status, with its hint.
- `codec.py`, `limits.py`: how frames become bytes; what a field may hold.
- `_generated/`: what `scripts/gen-proto` makes of `federation.proto`; imported by `frames.py` alone.

Invariant: whatever bytes arrive, either one frame within its limits comes out, or `MalformedMessage`.
Nothing here opens a connection: grpc stands in `server/` and `clients/`, which hand over bytes.
"""
