"""What may be skipped: a GPU test where there is no GPU, and outside CI a test of kernels where Triton is missing, or
one of hosts where no namespaces can be made.

In CI a run that skipped anything but GPU tests fails."""

import importlib.util
import os

import pytest

from tests.namespaces import what_is_missing


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu`, `triton` or `hosts` where there is none. torch is imported only if such a test was
    chosen."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    if item.get_closest_marker("triton") and not importlib.util.find_spec("triton"):
        pytest.skip("Triton is not installed: pip install -c constraints.txt 'nanomoe[triton]'")
    if item.get_closest_marker("hosts") and (missing := what_is_missing()) is not None:
        pytest.skip(f"no hosts can be made without {missing}")


class NoSilentSkips:
    """Fails a CI run in which something other than a GPU test was skipped."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and "gpu" not in report.keywords:
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("skipped in CI without being a GPU test", red=True)
            for nodeid in self.skipped:
                terminalreporter.line(nodeid)


def pytest_configure(config: pytest.Config) -> None:
    if "CI" in os.environ:
        config.pluginmanager.register(NoSilentSkips())
