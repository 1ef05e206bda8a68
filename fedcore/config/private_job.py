"""What a job may not set beside [privacy], and what it may not set without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedcore.errors import BadInput
from fedcore.secagg.judge_plan import is_judged
from fedcore.secagg.privacy.privacy_plan import EACH_SITE

if TYPE_CHECKING:
    from fedcore.config import PrivacySection, ProtectSection, RoundSection


def require_privacy(
    section: PrivacySection, given: Mapping[str, Any], protect: ProtectSection, each: RoundSection
) -> None:
    """Raise BadInput for settings that do not go with [privacy]. given: its keys that the job sets."""
    if section.epsilon is None:
        if set_ := [name for name, value in given.items() if value is not None]:
            raise BadInput(
                f"privacy.{set_[0]}: found it without privacy.epsilon, expected both",
                remedy="--epsilon 3 is the budget; without one there is no privacy",
            )
        return
    if protect.range is not None:
        raise BadInput(
            f"protect.range: found {protect.range} with privacy.epsilon, expected none",
            remedy="privacy fixes the range, by privacy.clip and protect.max_examples",
        )
    if (
        section.noise == EACH_SITE
        and section.colluders != type(section).model_fields["colluders"].default
    ):
        raise BadInput(
            f"privacy.colluders: found {section.colluders} with privacy.noise 'site', expected none",
            remedy="the noise of one site is enough there, whatever all others hand over",
        )
    for key in ("keep", "patience") if not is_judged(each) else ():
        if (found := getattr(each, key)) not in (None, "last"):
            raise BadInput(
                f"round.{key}: found {found!r} with privacy.epsilon, expected none",
                remedy="a round that is chosen by exact scores tells of the rows that it was judged by, without noise: "
                'metric_share = 0.2 and judge = "released" choose by metrics with noise',
            )
