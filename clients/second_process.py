"""Another process came to the coordinator with this site's certificate: what its operator is told, and the trail.

The coordinator refused it, since this process has the session. It is a copy of this site's folder that was started, or
somebody who has its keys.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from fedcore.audit.seldom import Seldom
from fedcore.wire.frames import SecondProcess

LOG = logging.getLogger("fedcore.site")


class SecondProcesses:
    """Those that came while this process runs. note: records an event in the audit trail."""

    def __init__(self, note: Callable[..., None]) -> None:
        self._note, self._seldom = note, Seldom()
        self.text = ""
        """The last one, in one line for the operator; "" while none came."""

    def take(self, frame: SecondProcess) -> None:
        """The coordinator refused one."""
        when = f"{datetime.fromtimestamp(frame.time_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
        self.text = (
            f"a second process came as this site from {frame.address} at {when}, and was refused: if it is not yours, "
            "somebody has this site's keys; have the operator revoke this site, and join again with new ones"
        )
        LOG.error("%s", self.text)
        if self._seldom.allows(frame.address):
            about = {"address": frame.address, "at": when}
            self._note("refused", what="a second process of this site", word="cloned", **about)
