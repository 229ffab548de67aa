from runs import launch  # before anything that imports JAX

# isort: split
import gc
import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import linen as nn

import archives
import children
import experiment
import models
from runs import checkpoints, folders, processes, signals

jax.config.update('jax_numpy_rank_promotion', 'raise')
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup; child processes would inherit it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
gc.set_threshold(10_000)  # JAX's traces are many long-lived objects

os.environ |= processes.share_of_cores(int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1)))
# LLVM's higher optimization levels and unrolled loops take longer to compile than they save in short tests. GPUs must
# sum in a fixed order.
XLA_FLAGS = (
    '--xla_backend_optimization_level=1 --xla_gpu_deterministic_ops=true '
    '--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer'
)
if jax.__version_info__ < (0, 11):  # older versions can compile loops on CPUs another way, in half the time
    XLA_FLAGS += ' --xla_cpu_use_fusion_emitters=false'
# For processes that take few training steps.
XLA_FLAGS_OF_FEW_STEPS = f'{XLA_FLAGS} --xla_backend_optimization_level=0'
os.environ['XLA_FLAGS'] = f'{XLA_FLAGS} {os.environ.get("XLA_FLAGS", "")}'
# Some tests compare to the last digits. TensorFloat-32, the default of GPUs, is too coarse for them.
os.environ['JAX_DEFAULT_MATMUL_PRECISION'] = 'float32'
jax.config.update('jax_default_matmul_precision', 'float32')


@pytest.fixture(scope='session', autouse=True)
def compilecache(tmp_path_factory):
    """Gives all commands in tests one cache of compiled functions, across parallel workers, apart from the user's."""
    folder = tmp_path_factory.getbasetemp().parent / f'cache-{os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())}'
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(folder))
        launch.use_compilecache(str(folder / 'bayesian-sam'))
        yield folder / 'bayesian-sam'


@pytest.fixture(autouse=True)
def handlers():
    """Restores the signal handlers after each test, because a stopped run leaves its handlers in place."""
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Makes every download fail at once."""

    def refuse(url, timeout=None):
        raise OSError('no network in tests')

    monkeypatch.setattr('urllib.request.urlopen', refuse)


@pytest.fixture
def x64():
    """Enables float64, for comparisons with golden values and closed forms."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope='session')
def datasets(tmp_path_factory):
    """Returns a folder with 40 training and 20 test images as MNIST, and 40 and 8 as CIFAR-10."""
    folder = tmp_path_factory.mktemp('datasets')
    archives.write_idx_set(folder / 'mnist', num_train=40, num_test=20)
    archives.write_tar(folder / 'cifar-10-binary.tar.gz', archives.cifar10_record_files(n=8)[0])
    return folder


class SmallResNet(nn.Module):
    """ResNet-18's stem and head with four channels. It has batch statistics, but does not take a minute to compile."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        x = models._ConvNorm(4, relu=True, name='stem')(images, train)
        return nn.Dense(self.num_classes, name='head')(x.mean(axis=(1, 2)))


class SmallResNet20(nn.Module):
    """A convolution with filter response normalisation, and a head."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        x = models._ConvFRN(4, name='stem')(images)
        return nn.Dense(self.num_classes, name='head')(x.mean(axis=(1, 2)))


class ShortResNet20(nn.Module):
    """ResNet-20 with one residual block, whose shortcut is a convolution, and few channels."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        x = models._ConvFRN(4, name='stem')(images)
        x = models._Block20(8, stride=2, name='block')(x)
        return nn.Dense(self.num_classes, name='head')(x.mean(axis=(1, 2)))


class TwoConvolutions(nn.Module):
    """Two convolutions with filter response normalisation, and a head. 32 features are enough for tiles on CPUs."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        x = models._ConvFRN(32, name='first')(images)
        x = models._ConvFRN(32, name='second')(x)
        return nn.Dense(self.num_classes, name='head')(x.mean(axis=(1, 2)))


@pytest.fixture
def small_resnet18(monkeypatch):
    """Replaces ResNet-18 by SmallResNet in this process."""
    monkeypatch.setitem(models.MODELS, 'resnet18', SmallResNet)


@pytest.fixture
def traced_anew():
    """Clears what JAX has traced, before and after the test."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=['own', 'gpu'])
def platform(request, monkeypatch):
    """Runs a test with this platform's code, and with the code for GPUs."""
    if request.param == 'gpu':
        request.getfixturevalue('traced_anew')
        monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *arguments, default, **_: default(*arguments))


@pytest.fixture(scope='module')
def forked_jobs():
    """Forks the parallel jobs of seeds, sweeps and studies, which would start new interpreters otherwise."""

    def start(environment, command):
        return children.Child(command[1:], environment=environment, errors_to_output=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, '_start', start)
        yield


@pytest.fixture
def flags_of(datasets, tmp_path):
    """Returns a function that builds the flags of a short run. Keyword arguments add or replace flags."""

    def build(**changes):
        flags = {
            'dataset': 'mnist', 'model': 'mlp', 'optim': 'bsam', 'alpha': 0.1, 'batchsize': 20,
            'dafactor': 100, 'epochs': 1, 'warmup': 0, 'datasetfolder': datasets, 'resultsfolder': tmp_path / 'results',
        } | changes  # fmt: skip
        if flags['optim'] not in ('sgd', 'adam', 'adamw', 'swag'):
            flags = {'batchsplit': 2} | flags
        if flags['optim'] == 'swag':  # needs two snapshots
            flags = {'swagstart': 0} | flags
        return [f'--{name}={value}' for name, value in flags.items()]

    return build


def slow_except(names, *quick):
    """Returns parameters of a test: all names. The quick ones run in make test, the others in make test-slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def read_log(run):
    return [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]


def restore(run, step=None):
    """Returns (step, state, progress) of a checkpoint, by default of the newest, as checkpoints.restore does."""
    functions = experiment.create(folders.read_config(run))
    return checkpoints.restore(run, functions.state_shapes(), step)


def arrays(state):
    """Returns the leaves of a state as NumPy arrays, and random keys as their data."""
    leaves = jax.tree.leaves(state)
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, is_key, strict=True)]
