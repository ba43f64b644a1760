"""Counters of the server, in Prometheus' text format."""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping

# Upper bounds of the latency histogram, in seconds.
LATENCY_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class ServerMetrics:
    """Counts requests, their latencies, tokens and images. Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._latencies: dict[str, list[int]] = {}  # path: requests of each bucket, and above all
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._totals: collections.Counter[str] = collections.Counter()

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts an answered request. `path` must be a route, so that their number is bounded."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds[path] += seconds
            buckets = self._latencies.setdefault(path, [0] * (len(LATENCY_SECONDS) + 1))
            buckets[sum(seconds > bound for bound in LATENCY_SECONDS)] += 1

    def add(self, name: str, count: int = 1) -> None:
        """Adds to the total `name`."""
        with self._lock:
            self._totals[name] += count

    def text(self, gauges: Mapping[str, float]) -> str:
        """Returns all counters, and `gauges`, the present values of others."""
        with self._lock:
            lines = ["# TYPE emu_jax_requests_total counter"]
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'emu_jax_requests_total{{path="{path}",status="{status}"}} {count}')
            lines.append("# TYPE emu_jax_request_seconds histogram")
            for path, buckets in sorted(self._latencies.items()):
                total = 0
                for bound, count in zip((*LATENCY_SECONDS, "+Inf"), buckets, strict=True):
                    total += count
                    labels = f'path="{path}",le="{bound}"'
                    lines.append(f"emu_jax_request_seconds_bucket{{{labels}}} {total}")
                seconds = self._seconds[path]
                lines.append(f'emu_jax_request_seconds_sum{{path="{path}"}} {seconds:.6f}')
                lines.append(f'emu_jax_request_seconds_count{{path="{path}"}} {total}')
            for name, count in sorted(self._totals.items()):
                lines += [f"# TYPE emu_jax_{name}_total counter", f"emu_jax_{name}_total {count}"]
        for name, value in gauges.items():
            lines += [f"# TYPE emu_jax_{name} gauge", f"emu_jax_{name} {value}"]
        return "\n".join(lines) + "\n"
