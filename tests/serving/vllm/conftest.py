"""Tests with vLLM: run where it is installed, on what tests/serving/golden.py wrote.

    VLTOK_GOLDEN=FOLDER python -m pytest tests/serving/vllm

Where vLLM is not installed and VLTOK_GOLDEN is not set these files are none of the suite's; if one of both is missing
that is an error.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

WANTED = "VLTOK_GOLDEN" in os.environ
collect_ignore_glob = [] if WANTED or find_spec("vllm") is not None else ["test_*.py"]

if not collect_ignore_glob:
    if not WANTED or find_spec("vllm") is None:
        missing = "VLTOK_GOLDEN" if not WANTED else "vllm"
        raise pytest.UsageError(f"{missing} is missing, see {__file__}")
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # everything in this process, where tests can look
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",  # else it asks for a route to another machine
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have tests that share an engine run in one process, and each model's answers in any, with `--dist loadgroup`."""
    for item in items:
        call = getattr(item, "callspec", None)
        name = call.params.get("name") if call is not None and item.path.name == "test_answers.py" else None
        item.add_marker(pytest.mark.xdist_group(name or item.path.name))
