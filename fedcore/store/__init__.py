"""What a party keeps on disk: its journal of typed records, and vectors as chunk containers.

- `journal.py`: the records of the protocol's machines, durable before `append` returns.
- `spool.py`: uploads, sums and checkpoints, each stored completely or not at all.
- `container.py`: the file format of a vector, and the digest that sites sign.
- `disk.py`: folders, fsync, and errors of the system with a hint.

Invariant: what a call reported as done survives `kill -9` and a power cut; what it did not report is absent
or harmless. Both roles use this package; their callers decide what to keep.
"""
