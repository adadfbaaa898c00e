"""One example after another, so that the programs of each are made once and dropped."""

import jax
import pytest

from atom_jax.session import laid_out
from tests.contract import cells


@pytest.fixture(scope="module", params=cells.EXAMPLES)
def name(request):
    """The name of every example."""
    yield request.param
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def scanned():
    """Layers as accelerators have them, which compile in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laid_out, "unrolls", lambda lm: False)
        yield
