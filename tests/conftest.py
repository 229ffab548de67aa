import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def x64():
    """float64, in which golden values and closed forms are compared."""
    with jax.enable_x64(True):
        yield
