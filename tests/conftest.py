import jax
import pytest

import flags

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session', autouse=True)
def compilecache(tmp_path_factory):
    """Commands in tests share a cache of compiled functions that is not the user's."""
    folder = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(folder))
        flags.use_compilecache(str(folder / 'bayesian-sam'))
        yield folder / 'bayesian-sam'


@pytest.fixture
def x64():
    """float64, in which golden values and closed forms are compared."""
    with jax.enable_x64(True):
        yield
