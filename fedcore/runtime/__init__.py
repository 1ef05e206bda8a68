"""The event loop's side of both shells: the only package of fedcore that uses asyncio.

- `mailbox.py`: a queue of events handled one at a time, a timer, supervised background work, and the retry of a
  job after a fault, from disk.
- `pipes.py`: frames between a process and its child.

Invariant: the protocol's machines use none of this; they get events and a clock as arguments.
"""
