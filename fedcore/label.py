"""The label of a run: who can see what, computed from its plan and never typed by hand (PROTOCOL L).

The same text is on the screen, in the report, in `plan.json` and in `fedcore plan`.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedcore.plan import RoundPlan


def label_of(plan: RoundPlan, single_site_features: Sequence[str] = ()) -> str:
    """At most eight lines; the first says what it protects against, the second what not."""
    lines = list(_PROTECTED[plan.protection])
    if single_site_features:
        names = ", ".join(single_site_features)
        lines.append(
            f"Statistics of {names} come from fewer than 3 sites: their sums show those sites' rows."
        )
    lines.append(
        "Not bounded by any of this: what the released model itself reveals about training rows; "
        "only differential privacy bounds that."
    )
    return "\n".join(lines)


_PROTECTED = {
    "plain": (
        "Protects against: nobody. The coordinator sees every site's update and the model.",
        "Does not protect against: anyone who can read the coordinator's memory or traffic. "
        "For simulation and tests only.",
    ),
    "encrypted": (
        "Protects against: the coordinator alone. It sees no site's update, not their sum and not the model.",
        "Does not protect against: one site together with the coordinator. All sites share one key, "
        "which opens every site's update.",
        "A sum is accepted only with a tag that proves it is of exactly the listed sites, this round, "
        "each once; the result is right if no site lies.",
    ),
}
