"""Identities for the sites of a Flower federation on one machine: a key and a file each, and the sites' public keys.

`python -m fedcore_clients.flower_identities FOLDER FEDERATION SITE SITE SITE ...`
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedcore.errors import AlreadyExists, BadInput, FedcoreError
from fedcore.files import write_atomic
from fedcore.secagg.crypto.identity_key import IdentityKey


def write_identities(folder: Path, federation: str, sites: Sequence[str]) -> Path:
    """Write FOLDER/SITE/site.toml and its key for each site, and FOLDER/sites.toml with the public keys.

    For development: in a real federation each site makes its own key and gives out the public one. Returns
    FOLDER/sites.toml. Raises AlreadyExists, and BadInput for fewer than 3 names or one twice.
    """
    if len(set(sites)) != len(sites) or len(sites) < 3:
        raise BadInput(
            f"sites: found {', '.join(sites) or 'none'}, expected at least 3 distinct names"
        )
    if not all(name.isascii() and name.replace("-", "").isalnum() for name in (federation, *sites)):
        raise BadInput("names: found other characters, expected letters, digits and '-'")
    if folder.exists():
        raise AlreadyExists(f"{folder}: it exists already, expected a new folder")
    folder.mkdir(parents=True, mode=0o700)
    keys = {name: os.urandom(32) for name in sites}
    pins = "".join(f'{name} = "{IdentityKey(key).public.hex()}"\n' for name, key in keys.items())
    for name, key in keys.items():
        place = folder / name
        place.mkdir(mode=0o700)
        (place / "site.key").touch(mode=0o600)
        write_atomic(place / "site.key", key.hex().encode())
        (place / "site.key").chmod(0o600)
        about = f'federation = "{federation}"\nsite = "{name}"\nkey = "site.key"\n\n[sites]\n{pins}'
        write_atomic(place / "site.toml", about.encode())
    write_atomic(folder / "sites.toml", f"[sites]\n{pins}".encode())
    return folder / "sites.toml"


def main(arguments: Sequence[str]) -> int:
    """The command of the module's docstring."""
    if len(arguments) < 2:
        sys.stderr.write(f"{(__doc__ or '').strip()}\n")
        return 2
    try:
        found = write_identities(Path(arguments[0]), arguments[1], arguments[2:])
    except FedcoreError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
