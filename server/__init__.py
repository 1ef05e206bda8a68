"""The coordinator's shell: everything that touches a network, a clock or a disk on its behalf.

It installs as `fedcore_server`. Empty in this version: the gRPC service, the journal, the spool of
running sums and the `fed-coordinator` command come here, and until then a federation exists only in
`fedcore simulate`, in one process.

Invariant: this package imports `fedcore` and never `fedcore_clients`, and nothing imports it. The
coordinator's decisions live in `fedcore`, where they need neither network nor disk; what stands here
only carries them out, in order.
"""
