"""The Grafana dashboard: its expressions parse, and name metrics and labels that the code exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from ray.serve.metrics import Counter, Gauge, Histogram

from serve_app.metrics import PREFIX, FrontMetrics, ScorerMetrics

DASHBOARD = json.loads((Path(__file__).parents[2] / "configs" / "grafana" / "score-serve.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
RAYS = {"application", "deployment", "replica"}
"""Labels that Serve puts on a replica's metrics."""


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of each metric, by its name in Prometheus."""
    made: dict[str, set[str]] = {}
    held = [*vars(ScorerMetrics("m")).values(), *vars(FrontMetrics()).values()]
    for metric in (getattr(each, "_counter", each) for each in held):
        assert isinstance(metric, Counter | Gauge | Histogram)
        name, labels = "ray_" + metric.info["name"], {*metric.info["tag_keys"], *RAYS}
        if isinstance(metric, Counter):
            made[f"{name}_total"] = labels
        elif isinstance(metric, Gauge):
            made[name] = labels
        else:
            made |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
    assert all(name.startswith(PREFIX) for name in made)
    return made


def parsed(expression: str) -> Any:
    """Parse by Prometheus' own grammar, with values in place of Grafana's variables."""
    return promql_parser.parse(expression.replace("$__rate_interval", "1m").replace("$model", ".*"))


def used(expression: str) -> tuple[set[str], set[str]]:
    """The metrics that an expression selects, and the labels that it matches or groups by."""
    names: set[str] = set()
    labels: set[str] = set()

    def visit(node: Any) -> None:
        match node:
            case promql_parser.VectorSelector():
                names.add(node.name)
                labels.update(matcher.name for matcher in node.matchers.matchers)
            case promql_parser.MatrixSelector():
                visit(node.vector_selector)
            case promql_parser.AggregateExpr():
                labels.update(node.modifier.labels if node.modifier else ())
                visit(node.expr)
            case promql_parser.BinaryExpr():
                visit(node.lhs)
                visit(node.rhs)
            case promql_parser.Call():
                for argument in node.args:
                    visit(argument)
            case promql_parser.NumberLiteral():
                pass
            case _:
                raise AssertionError(f"unexpected node {node}")

    visit(parsed(expression))
    return names, labels


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=[f"{panel}-{each['refId']}" for panel, each in TARGETS])
def test_a_panel_uses_exported_metrics(panel: str, target: dict[str, Any], exported: dict[str, set[str]]):
    names, labels = used(target["expr"])
    assert names
    assert names <= exported.keys(), panel
    assert all(labels <= exported[name] for name in names), panel
    shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    assert shown <= labels, "a legend may only show labels that the expression groups by"
    assert "model" in labels, "every panel must follow the choice of the model"


def test_every_metric_is_on_a_panel(exported: dict[str, set[str]]):
    def family(name: str) -> str:
        return re.sub("_(bucket|sum|count)$", "", name)

    shown = {family(name) for _, target in TARGETS for name in used(target["expr"])[0]}
    assert shown == {family(name) for name in exported}


def test_a_wrong_expression_would_be_found():
    with pytest.raises(ValueError, match="unclosed"):
        parsed("sum(rate(ray_score_items_total[$__rate_interval])")


def test_panels_do_not_overlap_and_all_are_explained():
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_choice_of_models_comes_from_a_metric_that_has_them(exported: dict[str, set[str]]):
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", "model"}
    (name, label) = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["model"]["query"]["query"]).groups()  # type: ignore[union-attr]
    assert label in exported[name]
