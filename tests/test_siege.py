"""The report of tools/siege.py."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "siege.py"


@pytest.fixture(scope="module")
def siege():
    spec = importlib.util.spec_from_file_location("siege", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(siege, latencies: list[float]) -> dict:
    figures = siege.latency_figures(latencies)
    return {"requests": len(latencies), "errors": [], "rss_anon_mib": 100.0, **figures}


def test_a_server_that_slows_down_does_not_pass(siege):
    fast, slow = ran(siege, [1.0] * 30), ran(siege, [3.0] * 30)
    assert siege.judge(fast, fast)["passed"] and siege.judge(fast, fast)["p95_ratio"] == 1
    assert not siege.judge(fast, slow)["passed"]


@pytest.mark.parametrize("answered", [[], [1.0]])
def test_a_server_that_hardly_answers_does_not_pass_and_the_report_says_so(siege, answered):
    fast, hardly = ran(siege, [1.0] * 30), ran(siege, answered)
    for peace, war, name in ((fast, hardly, "under attack"), (hardly, fast, "in peace")):
        report = siege.judge(peace, war)
        assert not report["passed"] and report["p95_ratio"] is None
        assert report["problem"] == f"{len(answered)} requests were answered {name}, 2 are needed"
