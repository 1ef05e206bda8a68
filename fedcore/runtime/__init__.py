"""What both shells run on: the only package of fedcore with an event loop.

- `mailbox.py`: a queue of events handled one at a time, a timer, and supervised background work.
- `driver.py`: serving a job again after a fault that it survives.
- `pipes.py`: frames between a process and its child, and the end of a child by name.

Invariant: the protocol's machines stay free of all this; they are handed events and a clock.
"""
