"""pytest's set-up: --history."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--history", action="store_true", help="replay every step of the history, and nothing else")


def pytest_configure(config):
    config.addinivalue_line("markers", "history: replays a step of the history (minutes; only with --history)")


def pytest_collection_modifyitems(config, items):
    wanted = [item for item in items if ("history" in item.keywords) == config.getoption("--history")]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
