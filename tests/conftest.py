"""One thread of the CPU, also where there is a GPU, and the folder of the modules. CUDA and OpenMP
read their variables when torch is imported."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

from model import YoloNasPose, load_weights
from reference import official_state, running_stats_n

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run tests that take half an hour")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: runs with --long only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]


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
