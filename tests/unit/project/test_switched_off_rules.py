"""The rules that e2e tests switch off at a site are named by strings, which no rename follows."""

from __future__ import annotations

from functools import reduce
from importlib import import_module

import pytest
from support.unguarded_site import RULES


@pytest.mark.parametrize("rule", RULES)
def test_the_functions_that_hold_a_rule_exist(rule):
    for module, name, _ in RULES[rule]:
        assert reduce(getattr, name.split("."), import_module(module))
