"""The start of a training process in namespaces of its own: hide the site's keys, drop all capabilities.

    unshare --user --map-root-user --mount ... python -P -m fedcore_clients.confine --hide PATH ... MODULE

It runs before anything of a task is imported, in a user and mount namespace that `unshare` made: mounts an empty
file system over each folder to hide and an empty file over each file, makes the code of the site's own process
read-only, drops all capabilities, and runs MODULE in the same process.

Invariant: when MODULE begins, no capability is left that could unmount them, in any namespace; a failure raises
OSError before MODULE begins. Sources: mount(2), capabilities(7), prctl(2).
"""

import argparse
import ctypes
import os
import runpy
import sys
from pathlib import Path

_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC = 1, 2, 4, 32, 4096, 16384
_KEPT = {
    os.ST_NOSUID: _NOSUID, os.ST_NODEV: _NODEV, os.ST_NOEXEC: 8, os.ST_NOATIME: 1024,
    os.ST_NODIRATIME: 2048, os.ST_RELATIME: 1 << 21,
}  # fmt: skip
"""{flag of statvfs: flag of mount}, of those that a user namespace may not remove."""

_CAPBSET_DROP, _NO_NEW_PRIVS, _AMBIENT, _AMBIENT_CLEAR = 24, 38, 47, 4
_CAPABILITIES_3 = 0x20080522


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: Path, kind: str | None, flags: int, data: str | None) -> None:
    """mount(2). Raises OSError."""
    raw = [None if text is None else os.fsencode(text) for text in (source, kind, data)]
    if _libc().mount(raw[0], os.fsencode(target), raw[1], ctypes.c_ulong(flags), raw[2]):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def hide(path: Path) -> None:
    """Mount an empty, read-only folder or file over this one. Raises OSError."""
    if path.is_dir():
        _mount("none", path, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k,mode=0500")
    else:
        _mount("/dev/null", path, None, _BIND, None)


def fix(path: Path) -> None:
    """Make a file or folder read-only. Raises OSError."""
    _mount(str(path), path, None, _BIND | _REC, None)
    now = os.statvfs(path).f_flag
    kept = sum(flag for known, flag in _KEPT.items() if now & known)
    _mount("none", path, None, _BIND | _REMOUNT | _RDONLY | kept, None)


def give_up_capabilities() -> None:
    """Drop all capabilities, so that no program that is started gets one back. Raises OSError."""
    libc = _libc()
    for number in range(64):
        libc.prctl(_CAPBSET_DROP, number, 0, 0, 0)  # those that this kernel does not know fail
    libc.prctl(_AMBIENT, _AMBIENT_CLEAR, 0, 0, 0)
    header, none = _CapHeader(_CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.capset(ctypes.byref(header), none):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "capabilities")


def readable(path: Path) -> bool:
    """Whether this process can read anything of a file or folder."""
    try:
        if path.is_dir():
            return any(path.iterdir())
        return bool(path.read_bytes())
    except OSError:
        return False


def main() -> int:
    """Confine this process, then run the module. The exit status is 1 where a --probe can be read, or a
    --need cannot."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--hide", "--fix", "--probe", "--need"):
        parser.add_argument(option, action="append", type=Path, default=[])
    parser.add_argument("module", nargs="?")
    asked = parser.parse_args()
    for path in asked.fix:
        fix(path)
    for path in asked.hide:
        hide(path)
    if asked.hide or asked.fix:
        give_up_capabilities()
    wrong = [f"{path} can be read" for path in asked.probe if readable(path)]
    wrong += [f"{path} cannot be read" for path in asked.need if not os.access(path, os.R_OK)]
    if wrong:
        sys.stderr.write("; ".join(wrong))
        return 1
    if asked.module is not None:
        sys.argv = [asked.module]
        runpy.run_module(asked.module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
