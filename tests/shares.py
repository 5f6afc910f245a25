"""Which tests go to which process where several run side by side (pytest-xdist), and in which order.

A file is never parted, since its tests share servers and models; and the longest files go first, so that all processes
end together. The order matters to nothing else, and it's no harm when a file is missing below.
"""

from __future__ import annotations

from typing import Any

import pytest

# By seconds on an idle machine with two cores. What is not among them takes less.
LONGEST = (
    "test_shards.py",
    "test_kafka.py",
    "test_tap.py",
    "test_audit.py",
    "test_cli.py",
    "test_report.py",
    "faults/test_faults.py",
    "test_stack.py",
    "test_metrics.py",
    "test_dashboards.py",
    "test_api_schema.py",
    "test_end_to_end.py",
    "test_operators_live.py",
    "test_api.py",
    "test_redis.py",
    "test_logs.py",
)
# One run under one Prometheus is looked at by both.
TOGETHER = {"test_dashboards.py": "test_metrics.py"}


def _file(nodeid: str) -> str:
    return nodeid.split("::", 1)[0].removeprefix("tests/")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(_file(item.nodeid), len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadfile` does it, files of one run together; None leaves any other way to pytest-xdist."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Shares(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = _file(nodeid)
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False  # by their number of tests
    return Shares(config, log)
