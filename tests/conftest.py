"""What the whole suite shares: tests that need Prometheus, and the figures that tests measured on the way."""

from __future__ import annotations

import pytest

from dflash_serve.monitoring.prometheus import PrometheusError, program


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        program("prometheus"), program("promtool")
    except PrometheusError as error:
        for item in items:
            if item.get_closest_marker("prometheus"):
                item.add_marker(pytest.mark.skip(reason=str(error)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what tests gave to `record_property`: pytest shows no prints of a test that passes."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.user_properties]
    if reports:
        terminalreporter.section("measured")
    for report in reports:
        if report.when == "call":
            terminalreporter.write_line(report.nodeid)
            for name, value in report.user_properties:
                terminalreporter.write_line(f"  {name}: {value}")
