"""Integration tests compile without a key."""

import pytest


@pytest.mark.compile
def test_placeholder() -> None:
    """Run with `pytest -m compile` to see that the integration tests import."""
