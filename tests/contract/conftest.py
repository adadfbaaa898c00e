"""One example after another, so that the programs of each are made once and dropped."""

import jax
import pytest

from tests.contract import cells


@pytest.fixture(scope="module", params=cells.EXAMPLES)
def name(request):
    """The name of every example."""
    yield request.param
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def every_test(scanned):
    """All of them."""
