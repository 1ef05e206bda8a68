"""The institution's shell: everything that touches a network, a clock or a disk on a site's behalf.

It installs as `fedcore_clients`, because the package index has a `clients` of somebody else's;
`fed-site` is its command. `session.py` holds the one connection, `jobs.py` runs a job by the protocol's
machines, `worker.py` is the process in which the site's task trains.

Invariant: this package imports `fedcore` and never `fedcore_server`, and nothing imports it. No code
comes over the wire, ever: a site runs tasks installed at the site.
"""
