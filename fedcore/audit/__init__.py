"""The audit trail of one party: an append-only file of signed JSON lines, each with the hash of the line before it.

- `keys.py`: who signs a trail, and how a signature is checked.
- `lines.py`: one line, its one byte form, and the events that have a name.
- `trail.py`: the file while its process runs: `AuditTrail.record`.
- `verification.py`: what was changed, deleted, reordered, inserted or cut off, and at which line.
- `receipt.py`, `evidence.py`: what the coordinator and others confirm of a trail.
- `siem.py`: lines in words, and for log collectors.

Invariant: a line has no value, key, key share, token or number of rows: facts are names, words, digests, sizes, times.
What a trail proves and what it does not is in docs/audit.md.
"""
