"""A site's policy for tests of something else: every protection, and the stand-in task of the benchmark."""

from __future__ import annotations

from fedcore_clients.policy import PolicySection, SitePolicy

BENCH = {"bench": "0" * 64}
WIDE = {"protections": ("layered", "masked", "encrypted"), "jobs_per_month": 1000}
"""Beside the defaults: one folder runs many jobs, under each protection."""


def policy_of(sites=4, tasks=None, **rules):
    """rules: keys of [policy], beside WIDE."""
    return SitePolicy(PolicySection(**{**WIDE, **rules}), sites, BENCH if tasks is None else tasks)
