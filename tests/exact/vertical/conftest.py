"""Comparisons without commits, and no thread that stays."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = {thread.name for thread in threading.enumerate()}
    yield
    after = {thread.name for thread in threading.enumerate()}
    assert not {name for name in after - before if "micro-batch" in name}


@pytest.fixture
def compare(compare: Any) -> Any:
    """As everywhere, without the flush of a commit behind each step."""

    def run(*arguments: Any, **options: Any) -> Any:
        return compare(*arguments, commit="never", **options)

    return run
