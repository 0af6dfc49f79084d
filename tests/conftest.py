"""What holds for all tests: no network, one thread a worker, few collections of garbage, the shared fixtures."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker; what a test starts inherits it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest

# Collections after the usual 700 objects take a tenth of the time of all tests; runs ask for some themselves.
gc.set_threshold(50_000, 20, 20)


def pytest_configure(config):
    """Load the fixtures, and torch and transformers with them, unless other processes run the tests."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.helpers.fixtures")


def pytest_collection_finish():
    spare_collections()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    done = yield
    if nextitem is not None and nextitem.path != item.path:
        spare_collections()
    return done


def spare_collections():
    """Spare each collection of garbage, which runs ask for, a search through all that was imported."""
    gc.collect()
    gc.freeze()
