"""The coordinator's shell: everything that touches a network, a clock or a disk for it.

It installs as `fedcore_server`; `fed-coordinator` is its command. `service.py` serves calls, `job_runner.py`
runs a job by the protocol's machines, `folding.py` adds vectors in worker processes (`fold_worker.py`).

Invariant: this package imports `fedcore` and never `fedcore_clients`, and nothing imports it. The
coordinator's decisions are made in `fedcore`, without network or disk; the code here carries them out in
order.
"""
