"""Search for secrets in what a federation leaves behind: files, what commands printed, and running processes."""

from __future__ import annotations

import base64
from pathlib import Path

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

PEM_LINE = 64


def forms_of(secret):
    """How these bytes may be written: raw, hex, and base64 wherever they begin within a longer text."""
    forms = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret)
        inner = text[-(-before * 8 // 6) : (before + len(secret)) * 8 // 6]
        forms |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return forms


def forms_of_key(pem, password=None):
    """Those of a private key in PEM: of the secret number, and the lines of PEM files that have a part of it."""
    key = load_pem_private_key(pem, password)
    if hasattr(key, "private_numbers"):
        secret = key.private_numbers().private_value.to_bytes(32, "big")
        formats = PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL
    else:
        secret, formats = key.private_bytes_raw(), (PrivateFormat.PKCS8,)
    forms = forms_of(secret)
    for each in formats:
        der = key.private_bytes(Encoding.DER, each, NoEncryption())
        at, text = der.index(secret), base64.b64encode(der)
        first, last = at * 4 // 3 // PEM_LINE, (at + len(secret)) * 4 // 3 // PEM_LINE
        lines = [text[PEM_LINE * n : PEM_LINE * (n + 1)] for n in range(first, last + 1)]
        forms |= {line for line in lines if len(line) > 16}
    return forms


def files_below(folder):
    """{path within the folder: bytes} of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def processes_of(mark):
    """{which, of what number: bytes} of arguments and environment of each process with this in its environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environ, arguments = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
        except OSError:  # it ended, or is another user's
            continue
        if mark.encode() in environ:
            found |= {
                f"environment of {entry.name}": environ,
                f"arguments of {entry.name}": arguments,
            }
    return found


def places(secrets, artefacts):
    """{name of a secret: where one of its forms is}. secrets: {name: forms}; artefacts: {place: bytes}."""
    return {
        name: {place for place, data in artefacts.items() if any(form in data for form in forms)}
        for name, forms in secrets.items()
    }
