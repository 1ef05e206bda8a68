"""Strategies of flwr that need more than one mean: why no protected sum serves them, and what to use in their place.

For both directions (a Flower app here, and our protection inside a Flower app); without flwr and torch.
"""

from collections.abc import Mapping

from fedcore.errors import PlanRefused

_ROBUST = (
    "compares the updates of single sites, which nobody sees under a protected sum",
    "FedAvg; the range of updates (protect.range, value_range) bounds what one site can add to the sum",
)
_SERVER_NOISE = (
    "clips single updates or adds noise at the server, which sees no single update here",
    "FedAvg, with LocalDpMod among the ClientApp's mods, which acts at the site",
)
_TREES = (
    "adds trees, and a protected sum is of arrays of one shape",
    "a model of arrays: PyTorch, or a linear model of scikit-learn",
)
NEEDS_SINGLE_UPDATES: Mapping[str, tuple[str, str]] = {
    "Krum": _ROBUST,
    "MultiKrum": _ROBUST,
    "Bulyan": _ROBUST,
    "FedMedian": _ROBUST,
    "FedTrimmedAvg": _ROBUST,
    "QFedAvg": (
        "weights each update by the loss of its site, which nobody sees under a protected sum",
        "FedAvg; `fedcore simulate` reports every site's own metrics in result.json",
    ),
    "FedXgbBagging": _TREES,
    "FedXgbCyclic": _TREES,
    "FedXgbNnAvg": _TREES,
    "DifferentialPrivacyServerSideFixedClipping": _SERVER_NOISE,
    "DifferentialPrivacyServerSideAdaptiveClipping": _SERVER_NOISE,
    "DifferentialPrivacyClientSideFixedClipping": _SERVER_NOISE,
    "DifferentialPrivacyClientSideAdaptiveClipping": _SERVER_NOISE,
    "DPFedAvgFixed": _SERVER_NOISE,
    "DPFedAvgAdaptive": _SERVER_NOISE,
}
"""{name of the class, in either API of flwr: (why not, what to use here)}."""


def of_flwr(kind: type) -> bool:
    """Whether flwr ships the class."""
    return kind.__module__.partition(".")[0] == "flwr"


def refuse_single_updates(strategy: object, where: str) -> None:
    """Raise PlanRefused for a strategy of the list, and for one that is derived from one. where: it was found."""
    kind = type(strategy)
    for each in kind.__mro__:
        if of_flwr(each) and each.__name__ in NEEDS_SINGLE_UPDATES:
            why, instead = NEEDS_SINGLE_UPDATES[each.__name__]
            of = "" if each is kind else f" (a {each.__name__})"
            raise PlanRefused(
                f"strategy {kind.__name__}{of}: found it in {where}; it {why}", remedy=instead
            )
