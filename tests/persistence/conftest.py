"""What the tests of files share."""

import pytest
import torch
from reference_quantizers import NORM_CODEBOOK, STATIC_FLOAT8

from kvq.evaluation.embedded_model import load_embedded_model
from kvq.registry import register_backend


@pytest.fixture(autouse=True)
def _reference_backends():
    for spec in (NORM_CODEBOOK, STATIC_FLOAT8):
        register_backend(spec, replace=True)


@pytest.fixture(scope="session")
def recall_model():
    return load_embedded_model()[0]


@pytest.fixture(scope="session")
def other_recall_model():
    """The same model with one element of each weight changed by a little."""
    model = load_embedded_model()[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return model


def pytest_terminal_summary(terminalreporter):
    """Say how many mutated files were tried; the tests have recorded them."""
    reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    counts = [value for report in reports for name, value in report.user_properties if name == "mutated files"]
    if counts:
        terminalreporter.write_line(f"{sum(counts):,} mutated files")
