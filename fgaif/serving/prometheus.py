"""Metrics of the service in Prometheus' text format."""

from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fgaif.serving.schema import TextResult

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one ingress replica."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fgaif_requests", "Answers by path and status.", ["path", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "fgaif_request_seconds", "Time to the end of the answer.", ["path"],
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self.score_seconds = Histogram(
            "fgaif_score_seconds", "Waiting for and running the models, per call.",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._texts = Counter("fgaif_texts", "Texts scored.", registry=self._registry)
        self._segments = Counter("fgaif_segments", "Segments scored.", registry=self._registry)
        self.working = Gauge(
            "fgaif_requests_in_work", "Requests being served.", registry=self._registry
        )
        self.streams = Gauge("fgaif_streams", "Streams that are open.", registry=self._registry)

    def request(self, scope: Any, status: int, seconds: float) -> None:
        """Count an answer; paths that are no route share one name."""
        path = getattr(scope.get("route"), "path", "other")
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def scored(self, results: Sequence[TextResult]) -> None:
        """Count scored texts."""
        self._texts.inc(len(results))
        self._segments.inc(sum(len(result.segments) for result in results))

    def text(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self._registry)
