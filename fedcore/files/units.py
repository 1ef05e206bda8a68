"""Sizes of files and messages in words."""


def in_bytes(count: float) -> str:
    """Bytes in decimal units: `84 B`, `13.9 kB`, `3.53 MB`."""
    if count < 1000:
        return f"{count:.0f} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"
