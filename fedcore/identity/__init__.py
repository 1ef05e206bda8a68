"""Certificates and keys: authentication, roles, and refusals with a hint.

    peer.py         the party that a certificate names, and checks of its role, federation and roster
    authority.py    the development authority of `fedcore up`: its own key, certificates for each role
    kit.py          the three files of one party: its certificate, its key, the authority
    revocation.py   the list of revoked certificates, reloaded while a coordinator runs
    identities.py   signing keys on disk and the roster that pins them
    signed_roster.py  the roster as the authority signs and numbers it
    join_messages.py  the join line, the request and the answer of a site that joins
    roster.py       the roster of a job, and the newest one, reloaded while a process runs
    verify.py       one certificate against every check, so that a TLS failure is one clear line
    addresses.py    host:port, as people write it
    proxies.py      which proxy a connection goes through, and where its password is
    tunnel.py       a TCP connection, direct or through HTTP CONNECT or SOCKS5
    forwarder.py    the socket through which gRPC reaches a proxy
    preflight.py    one handshake with the coordinator, with the reason of a failure

Invariant: a certificate counts only after every check: issued by the authority, valid at this time, of
this federation, of a role that the call allows, on the roster, not revoked. Certificates authenticate
connections; what a site signs in a round is signed with its identity key, which the roster pins (PROTOCOL C).
"""
