"""deploy/helm: both charts, rendered, against Kubernetes' restricted profile, their schemas and the examples."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import jsonschema
import pytest
from support import dockerfile, helm

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
ROLES = ("site", "coordinator")
DIGEST = "sha256:" + "0a" * 32
PEERS = [{"ipBlock": {"cidr": "192.0.2.0/24"}}]


def chart(role):
    return DEPLOY / "helm" / f"fedcore-{role}"


def given(role):
    """The values that somebody must give, and no others."""
    found = {"image": {"repository": "images.example/fedcore", "digest": DIGEST}}
    if role == "site":
        return {**found, "dataClaim": "tables", "allowedTo": PEERS}
    return {**found, "allowedFrom": PEERS}


def documents(role, **more):
    return {each["kind"]: each for each in helm.render(chart(role), {**given(role), **more})}


def pod(role, **more):
    return documents(role, **more)["StatefulSet"]["spec"]["template"]["spec"]


def validated(role, values):
    schema = json.loads((chart(role) / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(helm.values_of(chart(role), values), schema)


@pytest.mark.parametrize("role", ROLES)
def test_a_chart_grants_no_rights(role):
    found = documents(role)
    kinds = {"NetworkPolicy", "ServiceAccount", "StatefulSet"}
    assert {*found} == kinds | ({"Service"} if role == "coordinator" else set())
    assert found["ServiceAccount"]["automountServiceAccountToken"] is False
    assert pod(role)["automountServiceAccountToken"] is False
    assert not list(DEPLOY.rglob("*role*.yaml"))


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_fits_the_restricted_profile(role):
    """The profile of Kubernetes' pod security standards, and a root that cannot be written."""
    spec = pod(role)
    around = spec["securityContext"]
    assert around["runAsNonRoot"] is True
    assert around["seccompProfile"] == {"type": "RuntimeDefault"}
    uid = dockerfile.read((DEPLOY / f"Dockerfile.{role}").read_text())[1][-1].last("USER")
    assert f"{around['runAsUser']}:{around['runAsGroup']}" == uid
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & {*spec}
    kinds = {key for volume in spec["volumes"] for key in volume if key != "name"}
    assert kinds <= {"secret", "persistentVolumeClaim", "emptyDir"}
    assert container["resources"]["limits"]["memory"]
    writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
    assert writable == {"/var/lib/fedcore", "/tmp"}
    (claim,) = documents(role)["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "state"


@pytest.mark.parametrize(
    ("role", "more"), [(role, more) for role in ROLES for more in ({}, {"secret": "phrases"})]
)
def test_every_mount_has_its_volume(role, more):
    spec = pod(role, **more)
    mounts = {each["mountPath"]: each["name"] for each in spec["containers"][0]["volumeMounts"]}
    assert {*mounts.values()} == {each["name"] for each in spec["volumes"]} | {"state"}
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert ("/run/secrets" in mounts) == bool(more)
    if more:
        secret = volumes[mounts["/run/secrets"]]["secret"]
        assert secret == {"secretName": "phrases", "defaultMode": 0o440}
    if role == "site":
        assert volumes[mounts["/data"]]["persistentVolumeClaim"]["readOnly"] is True


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_that_is_set_up_waits_for_commands(role):
    (container,) = pod(role, setup=True)["containers"]
    assert container["command"] == ["sleep", "infinity"]
    assert not [key for key in container if key.endswith("Probe")]
    assert "command" not in pod(role)["containers"][0]


@pytest.mark.parametrize("role", ROLES)
def test_the_probes_are_those_of_the_image(role):
    (container,) = pod(role)["containers"]
    asked = dockerfile.health_command((DEPLOY / f"Dockerfile.{role}").read_text())
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == asked
    ready = shlex.join(container["readinessProbe"]["exec"]["command"])
    assert "/readyz" in ready if role == "site" else "/metrics" in ready


def test_only_the_federation_s_ports_are_open():
    ports = [{"protocol": "TCP", "port": 7443}, {"protocol": "TCP", "port": 7444}]
    policy = documents("coordinator")["NetworkPolicy"]["spec"]
    assert policy["egress"] == []
    assert policy["ingress"] == [{"from": PEERS, "ports": ports}]
    with_database = documents("coordinator", databaseAt=PEERS)["NetworkPolicy"]["spec"]
    assert with_database["egress"][0] == {"to": PEERS, "ports": [{"protocol": "TCP", "port": 5432}]}
    site = documents("site")["NetworkPolicy"]["spec"]
    assert site["ingress"] == []
    assert site["egress"][0] == {"to": PEERS, "ports": ports}
    for each in (policy, site):
        assert each["policyTypes"] == ["Ingress", "Egress"]
    served = documents("coordinator")["Service"]["spec"]["ports"]
    named = {
        each["name"]: each["containerPort"] for each in pod("coordinator")["containers"][0]["ports"]
    }
    assert [named[each["targetPort"]] for each in served] == [7443, 7444]


def test_what_is_set_appears_and_what_is_empty_does_not():
    assert not {"nodeSelector", "imagePullSecrets"} & {*pod("site")}
    more = {"nodeSelector": {"gpu": "yes"}, "imagePullSecrets": [{"name": "pull"}]}
    assert {key: pod("site", **more)[key] for key in more} == more
    state = {"size": "5Gi", "storageClass": "encrypted"}
    (claim,) = documents("site", state=state)["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "encrypted"
    assert claim["spec"]["resources"]["requests"]["storage"] == "5Gi"


@pytest.mark.parametrize("role", ROLES)
def test_the_schema_accepts_what_somebody_must_give_and_not_less(role):
    validated(role, given(role))
    for key in given(role):
        less = {name: value for name, value in given(role).items() if name != key}
        with pytest.raises(jsonschema.ValidationError):
            validated(role, less)


@pytest.mark.parametrize(
    ("role", "wrong"),
    [
        ("site", {"image": {"digest": "latest"}}),
        ("site", {"image": {"tag": "latest"}}),
        ("site", {"allowedTo": []}),
        ("site", {"coordinatorPort": 0}),
        ("site", {"setup": "yes"}),
        ("site", {"state": {"size": "lots"}}),
        ("site", {"privileged": True}),
        ("coordinator", {"resources": {"limits": {"memory": None}, "extra": 1}}),
        ("coordinator", {"service": {"type": "HostPort"}}),
    ],
)
def test_the_schema_refuses_other_values(role, wrong):
    with pytest.raises(jsonschema.ValidationError):
        validated(role, helm.merged(given(role), wrong))


@pytest.mark.parametrize("role", ROLES)
def test_kubernetes_schemas_accept_what_is_rendered(role):
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for each in helm.render(chart(role), given(role)):
        kubernetes.validate(each, "1.30", strict=True)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("a: {{ .Values.x | quote }}", 'a: "1"'),
        ("a:\n  {{- toYaml .Values.y | nindent 2 }}\nb: 1", "a:\n  z: 2\nb: 1"),
        ("{{- if .Values.x }}\nyes\n{{- end }}\nlast", "\nyes\nlast"),
        ("first{{- if .Values.no }}\nyes\n{{- end }}\nlast", "first\nlast"),
        ("{{- if .Values.no }}\na\n{{- else }}\nb\n{{- end }}", "\nb"),
    ],
)
def test_templates_are_rendered_as_helm_does(template, shown):
    assert helm.rendered(template, {"Values": {"x": 1, "y": {"z": 2}, "no": []}}) == shown


def test_a_value_that_the_chart_lacks_is_an_error():
    with pytest.raises(KeyError):
        helm.rendered("{{ .Values.nothing }}", {"Values": {}})
