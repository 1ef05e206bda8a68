"""What a party keeps on disk: its journal of typed records, and vectors as chunk containers.

- `journal.py`: the records of the protocol's machines, durable before `append` returns.
- `spool.py`: vectors on their way in, sums and checkpoints, each there whole or not at all.
- `container.py`: the file format of a vector, and the digest that sites sign.
- `disk.py`: folders and syncs, and what the system's refusals mean for a person.

Invariant: what a call here reported as done survives `kill -9` and a power cut; what it did not report
is not there, or harmless. Both roles use all of it; nothing here decides what is to be kept.
"""
