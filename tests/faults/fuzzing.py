"""How many random examples a test has: the same few in every run, many more by make faults."""

import os

from hypothesis import HealthCheck, Phase, settings

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def few(examples: int) -> settings:
    """So many examples, without the search for a smaller one where a test fails."""
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
