"""The coordinator's shell: everything that touches a network, a clock or a disk for it.

It installs as `fedcore_server`; `fed-coordinator` is its command. `grpc_service.py` admits every call and passes
it to `site_api.py` or `operators_api.py`; `coordinator.py` has the jobs and `sessions.py` the open
sessions; `job_runner.py` runs one job by the protocol's machines; `folding.py` adds vectors in worker processes
(`fold_worker.py`).

Invariant: this package imports `fedcore` and never `fedcore_clients`, and nothing imports it. The
coordinator's decisions are made in `fedcore`, without network or disk; the code here carries them out in
order.
"""

import os

# gRPC's own resolver knows no nsswitch.conf, and of several addresses in /etc/hosts takes one. The system's finds what
# every other program here finds, `check` too. gRPC reads the variable when it is imported, which it is not before.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
