"""The fleet's files in deploy/: what they name exists."""

from __future__ import annotations

import ast
import importlib
import json
import re
from typing import Any

import yaml

from cluster.routing import PATIENCE_SECONDS
from tests.paths import PROJECT


def defined_metrics() -> set[str]:
    """As Prometheus sees them: Ray puts its prefix before, and a histogram's parts behind."""
    names = set()
    for node in ast.walk(ast.parse((PROJECT / "cluster" / "metrics.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and isinstance(node.args[0], ast.Constant):
            name = f"ray_{node.args[0].value!s}"
            names |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if node.func.id == "Histogram" else {name}
    return names


def test_the_dashboard_names_only_metrics_that_exist() -> None:
    dashboard = json.loads((PROJECT / "deploy" / "grafana" / "fleet.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for expression in expressions for name in re.findall(r"ray_\w+", expression)}
    assert named
    assert named <= defined_metrics()


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((PROJECT / "deploy" / "kuberay" / "fleet.yaml").read_text()))


def test_kuberays_application_is_in_the_tree_and_its_versions_are_the_pinned_ones() -> None:
    service = documents()[0]["spec"]
    serve = yaml.safe_load(service["serveConfigV2"])
    (application,) = serve["applications"]
    module, name = application["import_path"].split(":")
    tree = ast.parse((PROJECT / f"{module.replace('.', '/')}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(application["args"]) == {"replicas", "queue", "fronts", "patience", "limit", "idle"}
    assert application["args"]["patience"] >= PATIENCE_SECONDS
    pinned = (PROJECT / "cluster" / "requirements.txt").read_text()
    assert f"ray=={service['rayClusterConfig']['rayVersion']}" in pinned
    group = service["rayClusterConfig"]["workerGroupSpecs"][0]
    assert application["args"]["replicas"] == f"{group['minReplicas']}:{group['maxReplicas']}"


def test_nothing_of_the_fleet_is_imported_or_installed_by_the_predictor() -> None:
    importlib.import_module("cluster.routing")  # the test's own path works
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert not re.search(r"^(ray|gradio)\b", (PROJECT / name).read_text(), re.MULTILINE)
    for path in PROJECT.glob("*.py"):
        assert "cluster" not in path.read_text()
