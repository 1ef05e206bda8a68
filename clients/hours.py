"""The hours in which a site takes part in rounds: `hours` and `time_zone` of its policy.

    mon-fri 20:00-06:00; sat,sun 00:00-24:00

Parts are separated by semicolons; a part without days is for every day. A time that ends at or before its begin ends
on the next day, and belongs to the day on which it began.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_PART = re.compile(r"(?:([a-z,\- ]+?)\s+)?(\d\d):(\d\d)\s*-\s*(\d\d):(\d\d)")
_DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class _Window:
    """days: 0 is Monday; begin, end: minutes after the midnight at which the day begins."""

    days: frozenset[int]
    begin: int
    end: int


@dataclass(frozen=True)
class Hours:
    """When a site takes part. Without windows: always."""

    windows: tuple[_Window, ...] = ()
    zone: ZoneInfo | timezone = UTC

    @classmethod
    def of(cls, text: str | None, zone: str) -> Self:
        """Raises ValueError with what is expected."""
        if text is None:
            return cls()
        return cls(tuple(_window(part.strip().lower()) for part in text.split(";")), zone_of(zone))

    def closed_until(self, now: datetime) -> datetime | None:
        """When the next window begins, in the site's zone; None while one is open. now: with its zone."""
        today = now.astimezone(self.zone).date()
        following = []
        for day in range(
            -1, 9
        ):  # a window of yesterday may still be open, one of next week is the next
            date = today + timedelta(days=day)
            midnight = datetime(date.year, date.month, date.day)  # noqa: DTZ001 - the zone follows
            for each in self.windows:
                if date.weekday() not in each.days:
                    continue
                begin, end = (self._at(midnight, minutes) for minutes in (each.begin, each.end))
                if begin <= now < end:
                    return None
                following.append(begin)
        later = [begin for begin in following if begin > now]
        return min(later).astimezone(self.zone) if later else None

    def _at(self, midnight: datetime, minutes: int) -> datetime:
        """A time by the clock on the wall, also where the clock changes at night."""
        return (midnight + timedelta(minutes=minutes)).replace(tzinfo=self.zone).astimezone(UTC)


def _window(part: str) -> _Window:
    found = _PART.fullmatch(part)
    if found is None:
        raise ValueError("days and times such as 'mon-fri 20:00-06:00'")
    begin, end = (60 * int(found[i]) + int(found[i + 1]) for i in (2, 4))
    if begin >= _DAY_MINUTES or end > _DAY_MINUTES or int(found[3]) > 59 or int(found[5]) > 59:
        raise ValueError("times from 00:00 to 24:00, such as 'mon-fri 20:00-06:00'")
    return _Window(_days(found[1]), begin, end if end > begin else end + _DAY_MINUTES)


def _days(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = (each.strip() for each in part.partition("-"))
        try:
            a, b = DAYS.index(first), DAYS.index(last or first)
        except ValueError:
            raise ValueError(f"days of {', '.join(DAYS)}, such as 'mon-fri 20:00-06:00'") from None
        found |= {day % 7 for day in range(a, b + 1 if b >= a else b + 8)}
    return frozenset(found)


def zone_of(name: str) -> ZoneInfo:
    """Raises ValueError."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("the name of a time zone, such as 'Europe/Berlin'") from None


def when(moment: datetime) -> str:
    """A moment for the log and the status, in its own zone."""
    return f"{moment:%a %d %b %H:%M %Z}"
