"""Tests run in two processes of one thread each, on the CPU, also where there is a GPU. CUDA and
OpenMP read their variables when torch is imported."""
import os
import pickle
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

from model import YoloNasPose, load_weights
from reference import official_state, running_stats_n

BESIDE = ("test_distributed", "test_export", "test_faults")  # half of the time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run tests that take half an hour")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: runs with --long only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """Let a second process run the files of BESIDE, then count and show its reports here."""
    hook, config = session.config.hook, session.config
    beside = [item for item in session.items if item.path.stem in BESIDE]
    others = [item for item in session.items if item.path.stem not in BESIDE]
    options = config.option
    if not (beside and others) or options.collectonly or options.usepdb or options.maxfail:
        return (yield)
    with tempfile.TemporaryFile(buffering=0) as file:
        child = os.fork()
        session.items = others if child else beside
        if child == 0:
            config.pluginmanager.unregister(name="terminalreporter")
            capture = config.pluginmanager.getplugin("capturemanager")
            capture.stop_global_capturing()  # its file is the parent's
            capture.start_global_capturing()
            config.pluginmanager.register(Reports(config, file))
            return (yield)
        try:
            result = yield
        finally:
            os.waitpid(child, 0)
        size, missing = file.seek(0, os.SEEK_END), {item.nodeid for item in beside}
        file.seek(0)
        while file.tell() < size:
            report = hook.pytest_report_from_serializable(config=config, data=pickle.load(file))
            hook.pytest_runtest_logreport(report=report)
            missing -= {report.nodeid} if report.when == "teardown" else set()
    assert not missing, f"the second process ended before {sorted(missing)}"
    return result


class Reports:
    """Writes each report into a file."""

    def __init__(self, config: pytest.Config, file):
        self.config, self.file = config, file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        pickle.dump(data, self.file)


@pytest.fixture(scope="session")
def official_n(tmp_path_factory) -> str:
    """A file as the reference writes it, size n, weights made from their names."""
    path = tmp_path_factory.mktemp("official") / "n.pth"
    torch.save({"net": official_state("n", running_stats_n()), "epoch": 3, "acc": 0.5}, path)
    return str(path)


@pytest.fixture(scope="session")
def model_n(official_n) -> YoloNasPose:
    """Size n with the weights of official_n, float64, eval. Copy it before you change it."""
    model = YoloNasPose("n")
    report = load_weights(model, official_n)
    assert not (report["skipped"] or report["missing"] or report["unused"])
    return model.double().eval()
