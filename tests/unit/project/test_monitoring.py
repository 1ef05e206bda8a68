"""deploy/prometheus and deploy/grafana: every metric and label that they name is one that a coordinator exposes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from fedcore_server.probes import Counts, Seen, _Collector
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
STATES = {"waiting", "running", "finished", "abandoned", "stopped", "failed"}
OUTSIDE = {"instance", "job"}
"""Labels that Prometheus adds."""


def exposed():
    """{sample: {label: values}} of a coordinator that has jobs of every state."""
    registry = CollectorRegistry()
    registry.register(_Collector(Counts(), lambda: Seen(4, 3, Counter(STATES), Counter())))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def rules():
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard():
    return json.loads((DEPLOY / "grafana" / "fedcore.json").read_text())


def expressions():
    found = [rule["expr"] for rule in rules()]
    return found + [each["expr"] for panel in dashboard()["panels"] for each in panel["targets"]]


def unknown(expression, known):
    """What an expression names that is not exposed."""
    found = []
    for metric, _, selector in re.findall(r"\b(fedcore_\w+|up)\b(\{([^}]*)\})?", expression):
        if metric == "up":
            continue
        if metric not in known:
            found.append(metric)
            continue
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', selector):
            values = known[metric].get(label)
            if label not in OUTSIDE and not (values and {*value.split("|")} <= values):
                found.append(f"{metric}{{{label}={value}}}")
    return found


def test_every_metric_that_is_named_is_exposed():
    known = exposed()
    assert len(expressions()) > 20
    assert not [each for expression in expressions() for each in unknown(expression, known)]


@pytest.mark.parametrize(
    ("expression", "finding"),
    [
        ("rate(fedcore_rounds[5m])", "fedcore_rounds"),
        ('fedcore_rounds_total{outcome="lost"}', "fedcore_rounds_total{outcome=lost}"),
        ('fedcore_jobs{stat="running"}', "fedcore_jobs{stat=running}"),
        ('fedcore_jobs{state=~"failed|broken"}', "fedcore_jobs{state=failed|broken}"),
    ],
)
def test_a_name_that_is_not_exposed_is_found(expression, finding):
    assert unknown(expression, exposed()) == [finding]


def test_every_metric_is_shown_on_the_dashboard():
    shown = " ".join(each["expr"] for panel in dashboard()["panels"] for each in panel["targets"])
    assert not [name for name in exposed() if name not in shown]


def test_every_alert_says_what_and_what_to_do():
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len({*names}) and all(name.startswith("Fedcore") for name in names)
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_the_panels_of_the_dashboard_do_not_overlap():
    found = dashboard()
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    cells = Counter()
    for panel in found["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells.update(
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        )
        assert panel["datasource"]["uid"] == "${datasource}"
    assert max(cells.values()) == 1
    assert {each["name"] for each in found["templating"]["list"]} == {"datasource", "instance"}


def test_the_scrape_is_of_the_job_and_port_that_the_rest_names():
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus" / "scrape.yaml").read_text())[
        "scrape_configs"
    ]
    assert scrape["job_name"] == "fedcore"
    assert scrape["static_configs"] == [{"targets": ["127.0.0.1:9443"]}]
    assert ":9443/metrics" in (DEPLOY / "Dockerfile.coordinator").read_text()
    assert any('up{job="fedcore"}' in rule["expr"] for rule in rules())


@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "alerts.yaml"),
        ("test", "rules", "alerts.test.yaml"),
        ("check", "config", "scrape.yaml"),
    ],
)
def test_promtool_accepts_the_rules(command):
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    done = subprocess.run(
        [program, *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
