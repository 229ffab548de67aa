"""A user's own data, network and start: docs/your_own_data.md, dropout, --init, and what may be executed."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import experiment
import models
import test as evaluate
import train
from children import ROOT
from conftest import arrays, read_log, restore, slow_except
from evaluation import trained as trained_run
from readers import python_files
from runs import folders, training_flags

PAGE = (ROOT / 'docs/your_own_data.md').read_text()
EXAMPLES = ROOT / 'docs/examples'
SMALL = f'{EXAMPLES}/own_network.py:Small'
EVEN_OR_ODD = f'{EXAMPLES}/own_data.py:even_or_odd'
CODE = ['--code', str(EXAMPLES / 'own_network.py'), str(EXAMPLES / 'own_data.py')]


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    """Makes each test begin like a new process, in which no file of a user has run."""
    monkeypatch.setattr(python_files, '_allowed', {})


def own_file(folder, text, name='mine.py'):
    (folder / name).write_text(text)
    return f'{folder / name}'


def error_of(capsys, script, arguments):
    """Runs a script that must end with status 2, and returns its last line."""
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and 'Traceback' not in ''.join(lines)
    return lines[-1]


@pytest.fixture
def trained(flags_of):
    """Returns a run of bSAM with the example's data and network."""
    return train.main(flags_of(dataset=EVEN_OR_ODD, model=SMALL, batchsize=50, epochs=1))


@pytest.mark.parametrize('name', ['own_data.py', 'own_network.py'])
def test_page_shows_the_examples(name):
    indented = ''.join(f'    {line}\n' if line else '\n' for line in (EXAMPLES / name).read_text().splitlines())
    assert indented in PAGE


def test_examples_train_and_are_evaluated(trained):
    assert trained.parent.parent.name == 'even_or_odd_Small'
    assert read_log(trained)[-1]['test_accuracy'] > 0.6
    described = folders.read_config(trained)['dataset']
    assert described['class_names'] == ['even', 'odd'] and described['image_shape'] == [8, 8, 1]
    evaluate.main([f'--resultsfolder={trained}', '--testmc=2', *CODE])
    measured = json.loads((trained / 'metrics.json').read_text())
    assert measured['num_images'] == 397 and measured['mean']['accuracy'] == read_log(trained)[-1]['test_accuracy']


# What is executed.


def test_a_run_folder_executes_nothing(trained, monkeypatch, capsys, tmp_path):
    """A run that names a user's code needs --code, also for --resume, and also if the file is beside the run."""
    monkeypatch.setattr(python_files, '_allowed', {})
    shutil.copy(EXAMPLES / 'own_network.py', trained)
    message = 'is Python code that a run folder names: if you trust it, add --code'
    network, data = f'{SMALL} {message} {CODE[1]}', f'{EVEN_OR_ODD} {message} {CODE[2]}'
    assert error_of(capsys, evaluate, [f'--resultsfolder={trained}']).endswith(network)
    assert error_of(capsys, evaluate, [f'--resultsfolder={trained}', '--code', CODE[1]]).endswith(data)
    assert error_of(capsys, train, [f'--resume={trained}', '--epochs=2']).endswith(data)
    capsys.readouterr()
    assert train.main([f'--resume={trained}', '--epochs=2', *CODE]) == trained
    assert f'--code {EXAMPLES}/own_data.py {EXAMPLES}/own_network.py' in capsys.readouterr().out


def test_a_file_that_has_moved_is_named_by_code(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(python_files, '_allowed', {})
    moved = [shutil.copy(path, tmp_path) for path in CODE[1:]]
    evaluate.main([f'--resultsfolder={trained}', '--code', *moved])
    assert (trained / 'metrics.json').exists()


@pytest.mark.parametrize(
    ('code', 'message'),
    [
        ('f = 1 +', 'line 1: SyntaxError: invalid syntax'),
        ('import nothing_of_this_name', "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ('g = 1', 'defines no f'),
        ('def f(folder, split):\n    return undefined', "line 2: NameError: name 'undefined' is not defined"),
        ('def f(folder, split):\n    return [[0.5]], [0]', 'images are float64 [1, 1], not uint8 [N, H, W, C]'),
        (
            'import numpy as np\ndef f(folder, split): return np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, int)',
            'labels are int64 [3], not whole numbers [4]',
        ),
        (
            'import numpy as np\ndef f(folder, split): return np.zeros((2, 8, 8, 1), np.uint8), np.array([0, -1])',
            'has labels from -1 to 0, not 0 to 0',
        ),
        (
            'import numpy as np\ndef f(folder, split):\n'
            '    size = 8 if split == "train" else 9\n'
            '    return np.zeros((40, size, 8, 1), np.uint8), np.arange(40) % 2',
            'the test images are 9×8×1, but the training images are 8×8×1: make them equal',
        ),
    ],
)
def test_wrong_data_functions(code, message, flags_of, capsys, tmp_path):
    name = f'{own_file(tmp_path, code)}:f'
    assert message in error_of(capsys, train, flags_of(dataset=name))


NETWORK = """
from flax import linen as nn

class Net(nn.Module):
    num_classes: int
    sizes: object = ()

    @nn.compact
    def __call__(self, images, train):
        x = images.reshape(len(images), -1)
        {}
        return nn.Dense({})(x)

def with_list(num_classes):
    return Net(num_classes, [1])

def number(num_classes):
    return 3
"""


@pytest.mark.parametrize(
    ('name', 'line', 'width', 'message'),
    [
        ('Net', '', 3, 'Net returns logits [2, 3] for 2 images, not [2, 10]'),
        ('Net', 'x = x @ x', 10, 'line 11: TypeError: dot_general requires contracting dimensions'),
        ('Net', 'self.sow("seen", "x", x)', 10, "has the collections ['params', 'seen']: use params and batch_stats"),
        ('number', '', 10, 'is int, not a network: name a class of flax.linen.Module'),
        ('with_list', '', 10, 'has an attribute that is not hashable: use tuples instead of lists'),
        ('Other', '', 10, 'defines no Other'),
    ],
)
def test_wrong_networks(name, line, width, message, flags_of, capsys, tmp_path):
    file = own_file(tmp_path, NETWORK.format(line, width))
    assert message in error_of(capsys, train, flags_of(model=f'{file}:{name}'))


def test_a_missing_file(flags_of, capsys, tmp_path):
    assert 'is not a file' in error_of(capsys, train, flags_of(model=f'{tmp_path}/none.py:Net'))


# Dropout.


def functions_of(*flags):
    dataset = {'num_train': 40, 'num_classes': 10, 'image_shape': [8, 8, 1], 'mean': [0.5], 'std': [0.2]}
    python_files.allow([EXAMPLES / 'own_network.py'])
    args = training_flags.parse_args([f'--model={SMALL}', '--alpha=0.1', '--batchsize=20', *flags])
    return experiment.create({'flags': vars(args), 'dataset': dataset})


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 8, 8, 1)).astype(np.float32), np.arange(20, dtype=np.int32) % 10


@pytest.mark.parametrize('precision', slow_except(['float32', 'bfloat16'], 'bfloat16'))
def test_dropout_in_training_follows_the_seeds(precision, batch):
    functions = functions_of('--optim=sgd', f'--precision={precision}')
    assert functions.has_dropout
    state = jax.jit(functions.init)(jax.random.key(0))
    step = jax.jit(functions.optimizer.step)
    loss = {seed: float(step(state, (*batch, np.full(20, seed, np.uint32)), 1.0)[1]) for seed in (1, 2)}
    again = float(step(state, (*batch, np.full(20, 1, np.uint32)), 1.0)[1])
    assert loss[1] == again != loss[2]


def test_sub_batches_have_dropout_of_their_own(batch):
    """The seed of each sub-batch is its first one: the others do not matter."""
    functions = functions_of('--optim=sam', '--batchsplit=2')
    state = jax.jit(functions.init)(jax.random.key(0))
    step = jax.jit(functions.optimizer.step)

    def loss(*seeds):
        return float(step(state, (*batch, np.repeat(np.array(seeds, np.uint32), 20 // len(seeds))), 1.0)[1])

    assert loss(1, 2) == loss(1, 9, 2, 9) != loss(1, 1)


def test_a_thinned_network_drops_the_same_for_all_images():
    functions = functions_of('--optim=sgd')
    state = jax.jit(functions.init)(jax.random.key(0))
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), np.uint8), 6, axis=0)

    def logits(seed):
        return np.asarray(functions.apply(experiment.Thinned(state.params, np.uint32(seed)), state.batch_stats, images))

    one, other, whole = logits(1), logits(2), np.asarray(functions.apply(state.params, state.batch_stats, images))
    assert np.ptp(one, axis=0).max() == 0 and not np.allclose(one, other) and not np.allclose(one, whole)


def test_thinned_networks_average_to_the_whole_network():
    """The head is linear, and dropout keeps the mean of its inputs."""
    functions = functions_of('--optim=sgd')
    state = jax.jit(functions.init)(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    whole = functions.apply(state.params, state.batch_stats, images)
    seeds = np.arange(4000, dtype=np.uint32)
    thinned = jax.jit(
        jax.vmap(lambda s: functions.apply(experiment.Thinned(state.params, s), state.batch_stats, images))
    )
    logits = np.asarray(thinned(seeds))
    deviation = logits.std(axis=0).max() / np.sqrt(len(seeds))
    np.testing.assert_allclose(logits.mean(axis=0), whole, atol=5 * deviation)


def test_dropout_gives_a_point_estimate_a_posterior(flags_of, capsys):
    run = train.main(flags_of(model=SMALL, optim='sgd'))
    evaluate.main([f'--resultsfolder={run}', '--testmc=4', '--dropout', *CODE])
    thinned = json.loads((run / 'metrics-dropout.json').read_text())
    assert '4 samples' in capsys.readouterr().out and thinned['average']['mutual_information'] > 0
    evaluate.main([f'--resultsfolder={run}', '--testmc=4', '--dropout', '--testbatchsize=7', *CODE])
    again = json.loads((run / 'metrics-dropout.json').read_text())
    assert again['average']['nll'] == pytest.approx(thinned['average']['nll'], rel=1e-5)
    evaluate.main([f'--resultsfolder={run}', '--testmc=4', *CODE])
    plain = json.loads((run / 'metrics.json').read_text())
    assert plain['mean'] == thinned['mean'] and plain['average']['mutual_information'] == 0
    assert '--dropout cannot be combined with --bnrefresh' in error_of(
        capsys, evaluate, [f'--resultsfolder={run}', '--dropout', '--bnrefresh=1']
    )


def test_dropout_needs_a_network_with_dropout(flags_of, capsys):
    run = train.main(flags_of(epochs=0))
    message = error_of(capsys, evaluate, [f'--resultsfolder={run}', '--dropout'])
    assert message.endswith('its network mlp has no dropout')


# A convolution for a user's network.


def test_conv_takes_what_convolve_does_not():
    images, key = np.random.default_rng(0).normal(size=(2, 9, 9, 4)).astype(np.float32), jax.random.key(0)
    for options in (
        {'feature_group_count': 2}, {'kernel_dilation': 2}, {'padding': 'VALID'}, {'padding': 1},
        {'padding': 'CIRCULAR'},
    ):  # fmt: skip
        ours, flax = models.Conv(6, (3, 3), **options), models.nn.Conv(6, (3, 3), **options)
        params = flax.init(key, images)
        np.testing.assert_allclose(ours.apply(params, images), flax.apply(params, images), rtol=1e-4, atol=1e-5)


# Trained weights.


@pytest.mark.parametrize('optim', slow_except(['sgd', 'bsam', 'ivon'], 'bsam'))
def test_init_takes_the_weights_of_a_run(optim, flags_of, small_resnet18, tmp_path):
    """Weights and batch statistics are those of the run, the head too because the classes are the same."""
    before = train.main(flags_of(model='resnet18'))
    after = train.main(flags_of(model='resnet18', optim=optim, alpha=1e-30, init=before))
    old, new = restore(before)[1], restore(after)[1]
    for one, other in zip(arrays(old.params), arrays(new.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert int(new.batch_stats['stem']['norm']['count']) > int(old.batch_stats['stem']['norm']['count'])
    assert folders.read_config(after)['flags']['init'] == str(before)


def test_init_with_other_classes_begins_a_new_head(flags_of, small_resnet18, tmp_path):
    """From a run, from an export, from its file, and from the file alone, which does not name the classes."""
    run = train.main(flags_of(model='resnet18', epochs=0))
    evaluate.main([f'--resultsfolder={run}', f'--export={tmp_path / "export"}'])
    beside, alone = tmp_path / 'export/posterior.safetensors', tmp_path / 'alone.safetensors'
    shutil.copy(beside, alone)
    config, state = folders.read_config(run), restore(run)[1]
    others = {'names': {'class_names': list('abcdefghij')}, 'number': {'num_classes': 4, 'class_names': None}, '': {}}
    for differing, changes in others.items():
        description = config['dataset'] | changes
        functions = experiment.create(config | {'dataset': description})
        for start in (run, tmp_path / 'export', beside, alone):
            weights = trained_run.initial_weights(start, functions, description)
            is_new = differing == 'number' or (differing == 'names' and start != alone)
            assert ('params.head.kernel' in weights) != is_new, (differing, start)
            begun = functions.init(jax.random.key(7), weights)
            np.testing.assert_array_equal(
                begun.params['stem']['conv']['kernel'], state.params['stem']['conv']['kernel']
            )
            assert begun.params['head']['kernel'].shape == (4, description['num_classes'])


def test_init_refuses_another_network(flags_of, capsys, tmp_path):
    before = train.main(flags_of(epochs=0))
    message = error_of(capsys, train, flags_of(model='lenet', init=before))
    assert f'--init {before} is of another network: params.conv1' in message and 'the same --model' in message
    assert 'is not a run folder' in error_of(capsys, train, flags_of(init=tmp_path / 'none'))
    assert 'cannot be read' in error_of(capsys, train, flags_of(init=tmp_path / 'none.safetensors'))
    (tmp_path / 'bad.safetensors').write_bytes(b'\xff' * 100)
    assert 'bad.safetensors is damaged' in error_of(capsys, train, flags_of(init=tmp_path / 'bad.safetensors'))
    assert '--init' in error_of(capsys, train, [f'--resume={before}', f'--init={before}'])


# Image folders and NumPy files through the scripts.


@pytest.fixture
def images_of_three_classes(tmp_path):
    """Returns a folder of images of different sizes: three classes, in train and test."""
    rng, folder = np.random.default_rng(0), tmp_path / 'shapes'
    for split, number in (('train', 14), ('test', 5)):
        for name in ('circle', 'square', 'star shape'):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (20 + i, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{i}.png')
    return folder


def test_image_folder_trains_and_is_evaluated(images_of_three_classes, flags_of, monkeypatch, capsys, tmp_path):
    """The run is found again if the folder has moved to the folder of the data sets."""
    flags = flags_of(dataset=f'folder:{images_of_three_classes}', imagesize=16, datasetfolder=tmp_path / 'sets')
    run = train.main([*flags, '--logcalibration'])
    assert run.parent.parent.name == 'shapes_mlp'
    described = folders.read_config(run)['dataset']
    assert described['class_names'] == ['circle', 'square', 'star shape'] and described['image_shape'] == [16, 16, 3]
    assert {'test_accuracy', 'test_nll', 'test_ece'} <= read_log(run)[0].keys()
    evaluate.main([f'--resultsfolder={run}', '--all'])
    assert '| star shape  ' in capsys.readouterr().out
    shutil.move(images_of_three_classes, tmp_path / 'sets' / 'shapes')
    evaluate.main([f'--resultsfolder={run}', '--testmc=2'])
    assert train.main([f'--resume={run}', '--epochs=2']) == run
    (tmp_path / 'sets/shapes/train/star shape').rename(tmp_path / 'sets/shapes/train/star')
    (tmp_path / 'sets/shapes/test/star shape').rename(tmp_path / 'sets/shapes/test/star')
    assert 'does not hold the images' in error_of(capsys, evaluate, [f'--resultsfolder={run}'])


def test_image_size_is_for_folders(flags_of, capsys):
    assert '--imagesize does not apply to --dataset mnist' in error_of(capsys, train, flags_of(imagesize=16))


def test_npz_file_trains_and_is_evaluated(flags_of, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f'x_{split}': rng.integers(0, 256, (n, 9, 9), np.uint8) for split, n in (('train', 40), ('test', 10))}
    arrays |= {f'y_{split}': np.arange(n)[:, None] % 4 for split, n in (('train', 40), ('test', 10))}
    np.savez(tmp_path / 'mine.npz', **arrays)
    run = train.main(flags_of(dataset=f'npz:{tmp_path / "mine.npz"}'))
    assert run.parent.parent.name == 'mine_mlp' and folders.read_config(run)['dataset']['num_classes'] == 4
    evaluate.main([f'--resultsfolder={run}', '--ood', EVEN_OR_ODD])
    assert re.fullmatch(r'.*even_or_odd', *json.loads((run / 'metrics.json').read_text())['ood'])
