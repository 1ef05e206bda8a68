"""The coordinator's shell: everything that touches a network, a clock or a disk on its behalf.

It installs as `fedcore_server`; `fed-coordinator` is its command. `service.py` takes calls, `job_runner.py`
runs a job by the protocol's machines, `folding.py` adds vectors in processes of its
own (`fold_worker.py`).

Invariant: this package imports `fedcore` and never `fedcore_clients`, and nothing imports it. The
coordinator's decisions live in `fedcore`, where they need neither network nor disk; what stands here
only carries them out, in order.
"""
