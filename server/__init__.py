"""The coordinator's shell: everything that touches a network, a clock or a disk for it.

It installs as `fedcore_server`; `fed-coordinator` is its command. `grpc_service.py` admits every call and passes
it to `site_api.py` or `operators_api.py`; `coordinator.py` has the jobs and `sessions.py` the open
sessions; `job_runner.py` runs one job by the protocol's machines; `folding.py` adds vectors in worker processes
(`fold_worker.py`).

Invariant: this package imports `fedcore` and never `fedcore_clients`, and nothing imports it. The
coordinator's decisions are made in `fedcore`, without network or disk; the code here carries them out in
order.
"""
