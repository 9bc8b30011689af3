"""WIDEHEAD_TEST_REQUIRE names libraries whose tests must not be skipped, as pip knows them."""

import importlib
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config):
    # Not this user's: a profile of the machine changes what plans choose and estimate.
    cache = tempfile.TemporaryDirectory()
    config.add_cleanup(cache.cleanup)
    os.environ["XDG_CACHE_HOME"] = cache.name
    for requirement in os.environ.get("WIDEHEAD_TEST_REQUIRE", "").split():
        name = re.match(r"\w+", requirement)[0]  # without extras and versions
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise pytest.UsageError(
                f"WIDEHEAD_TEST_REQUIRE names {name}, which cannot be imported: {error}"
            ) from error
