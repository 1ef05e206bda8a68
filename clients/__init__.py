"""The institution's shell: everything that touches a network, a clock or a disk on a site's behalf.

It installs as `fedcore_clients`, because the package index has a `clients` of somebody else's. Empty
in this version: the site's connection, its keystore, its policy and the `fed-site` command come here,
and until then a site exists only in `fedcore simulate`, in one process.

Invariant: this package imports `fedcore` and never `fedcore_server`, and nothing imports it. No code
comes over the wire, ever: a site runs tasks installed at the site.
"""
