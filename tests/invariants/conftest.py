"""Profiles of hypothesis for the invariants, chosen by KVQ_EXAMPLES: "ci" (the default), "soak" or "first_failure"."""

import os

from hypothesis import HealthCheck, Phase, settings

# What an example costs depends on the machine, what it proves does not: time is bounded by the number of examples.
settings.register_profile(
    "kvq_ci", derandomize=True, deadline=None, print_blob=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("kvq_soak", parent=settings.get_profile("kvq_ci"), derandomize=False, print_blob=True)
# For mutants: that something fails is all that is asked, so nothing is shrunk.
settings.register_profile(
    "kvq_first_failure", parent=settings.get_profile("kvq_ci"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(f"kvq_{os.environ.get('KVQ_EXAMPLES', 'ci')}")


def pytest_terminal_summary(terminalreporter):
    """Say how many steps the state machines took; the tests have recorded them."""
    reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    steps = [(report.nodeid, value) for report in reports for name, value in report.user_properties if name == "steps"]
    for test, count in steps:
        terminalreporter.write_line(f"{test}: {count:,} steps")
    if steps:
        terminalreporter.write_line(f"{sum(count for _, count in steps):,} steps of state machines")
