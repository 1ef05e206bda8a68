"""The institution's shell: everything that touches a network, a clock or a disk for a site.

It installs as `fedcore_clients`, because the name `clients` is taken on the package index; `fed-site` is its
command. `session.py` has the one connection, `job_runner.py` runs a job by the protocol's machines, `worker.py`
is the process in which the site's task trains.

Invariant: this package imports `fedcore` and never `fedcore_server`, and nothing imports it. No code
is received over the network: a site runs only tasks that are installed at the site.
"""

import os

# gRPC's own resolver knows no nsswitch.conf, and of several addresses in /etc/hosts takes one. The system's finds what
# every other program here finds, `check` too. gRPC reads the variable when it is imported, which it is not before.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")
