"""The dashboard asks for exactly the metrics that a run exports."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.monitoring.metrics import METRICS

DASHBOARD = json.loads(
    (Path(__file__).parents[1] / "cluster" / "monitoring" / "grafana.json").read_text(
        encoding="utf-8"
    )
)
PANELS: list[dict[str, Any]] = [
    panel for panel in DASHBOARD["panels"] if panel["type"] == "timeseries"
]


def test_every_metric_has_a_panel_and_every_panel_has_metrics() -> None:
    asked = {
        name
        for panel in PANELS
        for target in panel["targets"]
        for name in re.findall(r"ray_(fgaif_\w+)", target["expr"])
    }
    assert asked == set(METRICS)
    assert all(panel["targets"] for panel in PANELS)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_queries_use_labels_that_the_metric_has_and_treat_counters_as_such(
    panel: dict[str, Any],
) -> None:
    for target in panel["targets"]:
        expression = target["expr"]
        (name,) = re.findall(r"ray_(fgaif_\w+)", expression)
        assert f'ray_{name}{{run=~"$run"}}' in expression
        labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert labels <= {"run", *METRICS[name].labels}
        grouped = re.search(r"by \(([\w, ]+)\)", expression)
        assert set(grouped[1].split(", ") if grouped else ()) <= set(METRICS[name].labels)
        assert name.endswith("_total") == (METRICS[name].type == "counter")
        if "rate(" in expression or "increase(" in expression:
            assert METRICS[name].type == "counter"


def test_panels_lie_side_by_side() -> None:
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
