"""Certificates and keys: who may speak to whom, and what a refusal means to a person.

    peer.py         who a certificate names, and which role, federation and roster it is good for
    authority.py    the development authority of `fedcore up`: its own key, certificates for each role
    kit.py          the three files one party holds: its certificate, its key, the authority
    revocation.py   the list of withdrawn certificates, read again while a coordinator runs
    identities.py   signing keys on disk and the roster that pins them
    explain.py      one certificate against every check, so that a TLS failure is one clear line

Invariant: a certificate counts only after every check: issued by the authority, valid at this time, of
this federation, of a role the call is meant for, on the roster, not withdrawn. Nothing here opens a
socket; `server/tls.py` and `clients/tls.py` do. Certificates say who is connected; what a site signs
in a round is signed with its identity key, which the roster pins (PROTOCOL C).
"""
