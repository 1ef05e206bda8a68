"""Certificates and keys: authentication, roles, and refusals with a hint.

    peer.py         who a certificate names, and which role, federation and roster it is good for
    authority.py    the development authority of `fedcore up`: its own key, certificates for each role
    kit.py          the three files of one party: its certificate, its key, the authority
    revocation.py   the list of revoked certificates, reloaded while a coordinator runs
    identities.py   signing keys on disk and the roster that pins them
    explain.py      one certificate against every check, so that a TLS failure is one clear line

Invariant: a certificate counts only after every check: issued by the authority, valid at this time, of
this federation, of a role the call is meant for, on the roster, not withdrawn. Nothing here opens a
socket; `server/tls.py` and `clients/tls.py` do. Certificates say who is connected; what a site signs
in a round is signed with its identity key, which the roster pins (PROTOCOL C).
"""
