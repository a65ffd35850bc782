"""What Prometheus reads at /metrics. Each gateway has a registry of its own, so that two in one process do not mix."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The gateway's figures; their help texts say what each counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ballast_gateway_requests",
            "Requests for an answer by their end: stop, length, content_filter, or the code of the error",
            ("route", "end"),
            registry=self.registry,
        )
        self.segments = Counter(
            "ballast_gateway_segments",
            "Segments by decision: released, blocked, failed (the guard did not judge) or unguarded (released all the same)",
            ("decision",),
            registry=self.registry,
        )
        self.guard_failures = Counter(
            "ballast_gateway_guard_failures",
            "Judgements that the guard did not give: timeout, error, unscored, broken",
            ("kind",),
            registry=self.registry,
        )
        self.in_flight = Gauge("ballast_gateway_in_flight", "Answers being written", registry=self.registry)
        self.guard_seconds = Histogram(
            "ballast_gateway_guard_seconds",
            "Seconds of one call of the guard, waiting for a worker included",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_release = Histogram(
            "ballast_gateway_first_release_seconds",
            "Seconds from a request to its first released segment",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.audit_lost = Gauge(
            "ballast_gateway_audit_lost", "Lines that the audit log could not write", registry=self.registry
        )

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)
