"""policy.toml: the policy's own file, read again while the site's process runs.

Invariant: a file that cannot be read, or that is wrong, never widens and never narrows anything: the rules read last
stay in force, and the problem is logged once for each change of the file, and shown in the status.
"""

import logging
from dataclasses import replace
from pathlib import Path

from fedcore_clients.policy import PolicySection, SitePolicy

from fedcore.errors import BadInput
from fedcore.files import WatchedFile
from fedcore.files.toml import read_tables, read_toml

LOG = logging.getLogger("fedcore.site.policy")


def read_policy(path: Path) -> PolicySection:
    """The rules of a file. Raises BadInput and UnknownName, which name the file and the key."""
    if path.is_file() and "policy" in read_tables(path):
        raise BadInput(
            f"{path.name}: found a table [policy], expected its keys at the top of this file",
            remedy="remove the line [policy]",
        )
    return read_toml(PolicySection, path, paths=())


class PolicyFile:
    """The file of a policy that is in force."""

    def __init__(self, policy: SitePolicy, path: Path | None) -> None:
        """path: None where the rules are in site.toml, which is read at the start only."""
        self._policy, self._file = policy, WatchedFile(path)
        self._file.known()
        self.problem = ""
        """Why the file as it is now is not in force, in one line; "" where it is."""

    def refresh(self) -> bool:
        """Read the file if it changed; True if other rules are in force since. Costs one stat."""
        path = self._file.path
        if path is None or not self._file.changed():
            return False
        before = self._policy.rules
        try:
            rules = read_policy(path)
            replace(self._policy, rules=rules)  # checked against the roster
        except BadInput as error:
            self.problem = f"{error}; the rules read before stay in force"
            LOG.error("policy: %s; hint: %s", self.problem, error.remedy or "correct it")  # noqa: TRY400 - one line
            return False
        self.problem, self._policy.rules = "", rules
        if rules == before:
            return False
        changed = [k for k in PolicySection.model_fields if getattr(rules, k) != getattr(before, k)]
        LOG.warning("policy: %s was read again: %s changed", path.name, ", ".join(changed))
        return True
