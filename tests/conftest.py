from runs import launch  # before JAX is imported elsewhere

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
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup, which processes of tests would inherit
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
gc.set_threshold(10_000)  # JAX's traces are many objects that stay

os.environ |= processes.share_of_cores(int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1)))
# LLVM's further optimizations, and unrolled loops, take longer than they save in short tests; GPUs are to sum in one
# order.
XLA_FLAGS = (
    '--xla_backend_optimization_level=1 --xla_gpu_deterministic_ops=true '
    '--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer'
)
if jax.__version_info__ < (0, 11):  # which on CPUs can make loops in another way, that compiles in half the time
    XLA_FLAGS += ' --xla_cpu_use_fusion_emitters=false'
# Of processes that take few steps.
XLA_FLAGS_OF_FEW_STEPS = f'{XLA_FLAGS} --xla_backend_optimization_level=0'
os.environ['XLA_FLAGS'] = f'{XLA_FLAGS} {os.environ.get("XLA_FLAGS", "")}'
# What is compared to the last digits is not for TensorFloat-32, which GPUs would multiply in.
os.environ['JAX_DEFAULT_MATMUL_PRECISION'] = 'float32'
jax.config.update('jax_default_matmul_precision', 'float32')


@pytest.fixture(scope='session', autouse=True)
def compilecache(tmp_path_factory):
    """Commands in tests share a cache of compiled functions that is not the user's, those of parallel workers too."""
    folder = tmp_path_factory.getbasetemp().parent / f'cache-{os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())}'
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(folder))
        launch.use_compilecache(str(folder / 'bayesian-sam'))
        yield folder / 'bayesian-sam'


@pytest.fixture(autouse=True)
def handlers():
    """A run that a signal stopped leaves its handlers to the end of its process, which is this one."""
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fails at once what would fetch a file."""

    def refuse(url, timeout=None):
        raise OSError('no network in tests')

    monkeypatch.setattr('urllib.request.urlopen', refuse)


@pytest.fixture
def x64():
    """float64, in which golden values and closed forms are compared."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope='session')
def datasets(tmp_path_factory):
    """A folder with 40 training and 20 test images as MNIST, and 40 and 8 as CIFAR-10."""
    folder = tmp_path_factory.mktemp('datasets')
    archives.write_idx_set(folder / 'mnist', num_train=40, num_test=20)
    archives.write_tar(folder / 'cifar-10-binary.tar.gz', archives.cifar10_record_files(n=8)[0])
    return folder


class SmallResNet(nn.Module):
    """The stem and the head of ResNet-18 with four channels: batch statistics without the minute of compilation."""

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
    """Of 32 features, enough for tiles on CPUs, with filter response normalisation; and a head."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        x = models._ConvFRN(32, name='first')(images)
        x = models._ConvFRN(32, name='second')(x)
        return nn.Dense(self.num_classes, name='head')(x.mean(axis=(1, 2)))


@pytest.fixture
def small_resnet18(monkeypatch):
    """Lets this process take SmallResNet for ResNet-18."""
    monkeypatch.setitem(models.MODELS, 'resnet18', SmallResNet)


@pytest.fixture
def traced_anew():
    """Forgets what was traced before the test, and in it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=['own', 'gpu'])
def platform(request, monkeypatch):
    """Lets this platform compute what it does, or what GPUs do."""
    if request.param == 'gpu':
        request.getfixturevalue('traced_anew')
        monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *arguments, default, **_: default(*arguments))


@pytest.fixture(scope='module')
def forked_jobs():
    """Lets this process fork what runs, seeds and sweeps start side by side."""

    def start(environment, command):
        return children.Child(command[1:], environment=environment, errors_to_output=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, '_start', start)
        yield


@pytest.fixture
def flags_of(datasets, tmp_path):
    """The flags of a short run, with others added or in place of them."""

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


def read_log(run):
    return [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]


def restore(run, step=None):
    """What checkpoints.restore returns for a run: (step, state, progress)."""
    functions = experiment.create(folders.read_config(run))
    return checkpoints.restore(run, functions.state_shapes(), step)


def arrays(state):
    """The leaves of a state as NumPy arrays, keys as their data."""
    leaves = jax.tree.leaves(state)
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, is_key, strict=True)]
