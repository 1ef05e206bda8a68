"""A whole job as a machine without input or output: offer, survey, plan, key epochs, rounds, end.

The parts of a role are handed events and the moment at which they happen, and answer with the effects of
`effects.py`, which a runner with disk, sockets and an event loop obeys.
"""
