"""Which tests go to which process where several run side by side (pytest-xdist), and in which order.

A file is never parted, since its tests share servers and models; and the longest files go first, so that all processes
end together. Nothing else depends on the order: a file that is missing below comes last.
"""

from __future__ import annotations

from typing import Any

import pytest

# By seconds, from three minutes to ten seconds. The last one leaves a run under Prometheus going on, until the end.
LONGEST = (
    "test_kafka.py",
    "test_shards.py",
    "test_tap.py",
    "faults/test_faults.py",
    "test_cli.py",
    "test_end_to_end.py",
    "test_audit.py",
    "test_report.py",
    "test_api.py",
    "test_stack.py",
    "test_spool.py",
    "test_bundle.py",
    "test_redis.py",
    "test_fleet.py",
    "test_watch.py",
    "test_witness.py",
    "test_log.py",
    "test_dispatch.py",
    "test_conversation.py",
    "test_logs.py",
    "test_store.py",
    "test_budget.py",
    "test_api_schema.py",
    "test_worker.py",
    "test_build.py",
    "test_operators_live.py",
    "test_demo.py",
    "test_traffic.py",
    "test_house.py",
    "test_models.py",
    "test_page.py",
    "test_metrics.py",
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
