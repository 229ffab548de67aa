"""train.py, test.py and demo2d.py as users run them, on a few artificial images."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageColor

import archives
import children
import demo2d
import experiment
import optimizers
import test as evaluate
import train
from conftest import read_log, restore
from evaluation import plots, posteriors
from runs import folders, launch, training_flags

ROOT = Path(__file__).parent.parent
LINE = re.compile(
    r'  > testacc=(\d+\.\d\d)%, nll=(\d+\.\d{4}), ece=(\d\.\d{4}), auroc=(\d\.\d{4}|nan) \(exact (\d\.\d{4}|nan)\)'
)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize(
    ('optim', 'dataset', 'model'),
    [
        *((optim, 'mnist', 'mlp') for optim in optimizers.OPTIMIZERS),
        ('sgd', 'mnist', 'lenet'),
        ('sgd', 'cifar10', 'mlp'),
        pytest.param('bsam', 'cifar10', 'resnet18', marks=pytest.mark.slow),
    ],
)
def test_train_then_evaluate(optim, dataset, model, flags_of, tmp_path, capsys):
    """Training makes no implicit transfer to the device, such as a scalar or a batch in each step."""
    with jax.transfer_guard('disallow'):
        train.main(flags_of(dataset=dataset, model=model, optim=optim))
    run = tmp_path / 'results' / f'{dataset}_{model}' / optim / 'run_0'
    log = read_log(run)
    assert [record['epoch'] for record in log] == [0, 1]
    assert [record['learning_rate'] for record in log] == ([0.1 * 0.2] * 2 if optim == 'swag' else [0.1, 0.05])
    assert all(np.isfinite(record['loss']) and record['images_per_second'] > 0 for record in log)
    config = json.loads((run / 'config.json').read_text())
    assert (
        config['num_data'] == 4000 and config['versions']['jax'] == jax.__version__ and config['flags']['alpha'] == 0.1
    )
    assert sorted(path.name for path in run.iterdir()) == ['checkpoints', 'config.json', 'lock', 'log.jsonl']

    before = contents(run)
    capsys.readouterr()
    evaluate.main(['--resultsfolder', str(run), '--testmc', '3'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'results at mean of distribution:' and lines[2] == 'results at model average (3 samples):'
    assert LINE.fullmatch(lines[1]) and LINE.fullmatch(lines[3]) and max(map(len, lines)) <= 100
    results = json.loads((run / 'metrics.json').read_text())
    assert results['mean']['accuracy'] == log[-1]['test_accuracy']
    assert results['trained'] == {'epoch': 1, 'steps_of_epoch': 2}
    nlls = [results[of]['nll'] for of in ('mean', 'average')]
    assert (nlls[0] == pytest.approx(nlls[1], rel=1e-12)) == (optim not in ('bsam', 'swag', 'ivon'))
    after = contents(run)
    assert after.pop(run / 'metrics.json') and after.pop(run / 'predictions.npz') and after == before


@pytest.mark.parametrize(('optim', 'updates_a_step'), [('sgd', 1), ('sam', 2), ('bsam', 2)])
def test_batch_statistics_move_at_every_gradient(optim, updates_a_step, flags_of, small_resnet18):
    run = train.main(flags_of(model='resnet18', optim=optim))
    assert restore(run)[1].batch_stats['stem']['norm']['count'] == 2 * 2 * updates_a_step


def test_every_batch_size_gives_the_same_metrics(flags_of):
    """A smaller last batch has the right weight, as with batches of 7 for the 20 test images."""
    run = train.main(flags_of())
    results = []
    for size in (1, 7, 20, 1000):
        evaluate.main([f'--resultsfolder={run}', '--testmc=4', f'--testbatchsize={size}'])
        metrics = json.loads((run / 'metrics.json').read_text())
        results.append([metrics[at][name] for at in ('mean', 'average') for name in ('accuracy', 'nll', 'brier')])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5)


def test_same_flags_same_run_and_another_seed_another_run(flags_of):
    def losses(**changes):
        return [record['loss'] for record in read_log(train.main(flags_of(**changes)))]

    first = losses(randomseed=1)
    assert losses(randomseed=1) == first and losses(randomseed=2) != first


def test_noaugment_changes_the_images(flags_of):
    def losses(*more):
        run = train.main([*flags_of(dataset='cifar10', model='mlp', optim='sgd', alpha=0.01), *more])
        return [record['loss'] for record in read_log(run)]

    assert losses() != losses('--noaugment')


def test_digits_are_learned(flags_of):
    run = train.main(
        flags_of(dataset='digits', model='mlp', alpha=0.5, rho=0.01, priorprec=1, epochs=5, batchsize=50, batchsplit=5)
    )
    assert read_log(run)[-1]['test_accuracy'] > 0.9


@pytest.mark.parametrize(('epochs', 'warmup', 'warns'), [(1, 2, True), (1, 1, False), (0, 1, False)])
def test_a_warmup_that_takes_all_epochs(epochs, warmup, warns, flags_of, capsys):
    train.main(flags_of(epochs=epochs, warmup=warmup))
    warning = 'warning: with --warmup 2 and --epochs 1 the learning rate only rises: try --warmup 1'
    assert (warning in capsys.readouterr().err) == warns


@pytest.mark.parametrize('optim', optimizers.OPTIMIZERS)
def test_bfloat16_trains_and_keeps_float32_state(optim, flags_of, small_resnet18):
    run = train.main(flags_of(dataset='cifar10', model='resnet18', optim=optim, precision='bfloat16'))
    _, state, _ = restore(run)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state._replace(key=()))} - {'int32'}
    assert dtypes == {'float32'} and np.isfinite(read_log(run)[0]['loss'])


def test_compiled_functions_are_kept_where_the_flag_says(flags_of, tmp_path):
    for folder, exists in (('off', False), (str(tmp_path / 'compiled'), True)):
        children.run(['train.py', *flags_of(epochs=0), f'--compilecache={folder}']).check_returncode()
        assert (tmp_path / 'compiled').exists() == exists
    assert any((tmp_path / 'compiled').iterdir()) and not (ROOT / 'off').exists()


def test_compiled_functions_that_have_no_place(flags_of, compilecache, tmp_path, monkeypatch, capsys):
    """Training goes on without keeping them."""
    (tmp_path / 'file').touch()
    monkeypatch.chdir(tmp_path)
    try:
        run = train.main(flags_of(compilecache='file'))
        error = capsys.readouterr().err
        assert error == f'warning: --compilecache {tmp_path}/file is not writable: compiled functions are not kept\n'
        assert not jax.config.jax_enable_compilation_cache
        assert folders.read_config(run)['flags']['compilecache'] == f'{tmp_path}/file'
        monkeypatch.setattr(os, 'access', lambda path, mode: False)  # as for a folder of another user
        launch.use_compilecache(str(tmp_path))
        assert jax.config.jax_enable_compilation_cache and 'is not writable' in capsys.readouterr().err
    finally:
        launch.use_compilecache(str(compilecache))


def test_runs_started_together_get_different_folders(tmp_path):
    script = """if True:
        import os, sys
        from runs import folders
        pids = []
        for _ in range(20):
            pid = os.fork()
            if not pid:
                run = folders.create(sys.argv[1], 'tfds/toy', 'mlp', 'sgd')
                (run / f'{os.getpid()}').touch()
                os._exit(0)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 20
    """
    subprocess.run([sys.executable, '-c', script, tmp_path], cwd=ROOT, check=True, capture_output=True)
    owners = {str(owner.relative_to(tmp_path).parent) for owner in tmp_path.rglob('*') if owner.is_file()}
    assert owners == {f'tfds_toy_mlp/sgd/run_{k}' for k in range(20)}
    assert len([owner for owner in tmp_path.rglob('*') if owner.is_file()]) == 20


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'dataset': 'cifar'}, "--dataset: unknown: 'cifar'; did you mean cifar10? choose from cifar10, cifar100"),
        ({'dataset': 'tfds/'}, "unknown: 'tfds/'"),
        ({'model': 'resnet-18'}, "--model: unknown: 'resnet-18'; did you mean resnet18?"),
        ({'model': 'wrn16x'}, "'wrn16x'; choose from resnet18, preactresnet18, wrn28x10, resnet20, mlp, lenet, wrnDxK"),
        ({'model': 'WRN29x10'}, 'wrn29x10: the depth of a wide ResNet is 6n + 4, such as 28'),
        ({'optim': 'bsm'}, "--optim: unknown: 'bsm'; did you mean bsam? choose from sgd, sam, bsam"),
        (
            {'batchsplit': 3},
            '20 does not divide into --batchsplit 3 sub-batches: use --batchsize 18 or 21, or --batchsplit 2 (',
        ),
        ({'batchsize': 60}, '--batchsize 60 exceeds the 40 training images'),
        ({'batchsize': 0}, "--batchsize: '0' is not a whole number of 1 or more"),
        ({'alpha': -1}, "--alpha: '-1' is not a number > 0"),
        ({'alpha': 'nan'}, "--alpha: 'nan' is not a number > 0"),
        ({'alpha': 3.41e38}, "--alpha: '3.41e+38' is not a number > 0 that float32 holds"),
        ({'custominit': 1e-50}, "--custominit: '1e-50' is not a number > 0 that float32 holds"),
        ({'compilecache': ''}, "--compilecache: '' is not a folder: name one, or give off"),
        ({'beta1': 1}, "--beta1: '1' is not a number >= 0 and < 1"),
        ({'rho': 'inf'}, "--rho: 'inf' is not a number >= 0"),
        ({'custominit': 0}, "--custominit: '0' is not a number > 0"),
        ({'damping': 0, 'priorprec': 0}, 'bsam needs --damping or --priorprec above 0'),
        (
            {'randomseed': 2**32},
            "--randomseed: '4294967296' is not a whole number of 0 or more and less than",
        ),
        ({'epochs': 1.5}, "--epochs: '1.5' is not a whole number of 0 or more"),
        ({'model': 'resnet20'}, 'resnet20 needs images of 29×29 pixels or more for its 8×8 pool, not 28×28'),
        ({'dataset': 'tinyimagenet'}, 'run python setup_tinyimagenet.py --datasetfolder'),
        ({'resultsfolder': '/proc/results'}, 'cannot make a run folder in /proc/results/mnist_mlp/bsam: '),
    ],
)
def test_bad_flags(changes, message, flags_of, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(**changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and message in error
    assert not (tmp_path / 'results').exists()


def test_results_without_a_place_are_refused_before_data_are_read(flags_of, tmp_path, capsys):
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(resultsfolder=tmp_path / 'file' / 'results', datasetfolder=tmp_path / 'nowhere'))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f'{tmp_path / "file"} is not a folder, or is read-only' in error


def test_names_in_any_case(flags_of):
    args = training_flags.parse_args(flags_of(dataset='CIFAR10', model='ResNet18', optim='bSAM'))
    assert (args.dataset, args.model, args.optim) == ('cifar10', 'resnet18', 'bsam')
    assert training_flags.parse_args(['--model=WRN16x8']).model == 'wrn16x8'


@pytest.mark.parametrize('optim', optimizers.OPTIMIZERS)
def test_optimizers_take_the_arguments_of_their_flags(optim):
    arguments = experiment.optimizer_arguments(vars(training_flags.parse_args([f'--optim={optim}'])), num_train=2000)
    assert {'loss', *arguments} == set(inspect.signature(optimizers.OPTIMIZERS[optim]).parameters)
    assert arguments['weight_decay'] == (10 if optim == 'ivon' else 25) / 2000


@pytest.mark.parametrize(
    ('model', 'batchsize', 'num_pieces'),
    [('resnet20', 200, 20), ('resnet20', 128, 8), ('resnet20', 7, 1), ('resnet18', 200, 1), ('mlp', 200, 1)],
)
def test_resnet20_takes_its_gradient_in_pieces(model, batchsize, num_pieces):
    assert experiment.num_pieces(model, batchsize) == num_pieces


def test_flags_of_other_optimizers_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        training_flags.parse_args(['--optim=sgd', '--rho=0.1'])
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and '--rho does not apply to --optim sgd (sgd takes --alpha, --beta1, --priorprec)' in error
    )
    with pytest.raises(SystemExit):
        training_flags.parse_args(['--optim=swag', '--epochs=1'])
    assert 'swag needs two epochs or more after --swagstart 0.5 of 2' in capsys.readouterr().err
    assert (
        training_flags.parse_args(['--optim=ivon']).beta2 == 0.99999
        and training_flags.parse_args(['--optim=sgd']).beta2 is None
    )


def test_defaults_are_those_of_the_reference():
    args = vars(training_flags.parse_args(['--optim=bsam']))
    others = {
        'coordinator',
        'processes',
        'processid',
        'jointimeout',
        'devices',
        'eta',
        'swagstart',
        'swagrate',
        'swagrank',
        'hessinit',
        'clip',
        'trainmc',
        'trainimages',
        'imagesize',
        'init',
    }
    assert all(args.pop(name) is None for name in others)
    assert training_flags.parse_args([]).optim == 'sgd'
    assert args == {
        'randomseed': 0, 'alpha': 1.0, 'rho': 0.1, 'optim': 'bsam', 'beta1': 0.9, 'beta2': 0.999, 'priorprec': 25.0,
        'dafactor': 1.0, 'batchsize': 200, 'testbatchsize': 200, 'epochs': 180, 'warmup': 5, 'dataset': 'cifar10',
        'batchsplit': 8, 'noaugment': False, 'model': 'resnet18', 'datasetfolder': 'datasets',
        'resultsfolder': 'results', 'custominit': 1.0, 'damping': 0.1, 'precision': 'float32',
        'compilecache': os.path.join(os.environ['XDG_CACHE_HOME'], 'bayesian-sam'), 'resume': None, 'checkpoint': None,
        'checkpointevery': None, 'keepbest': False, 'keepgoing': False,
        'bnupdate': 'both', 'validation': 0.0, 'stream': False, 'seeds': [], 'atonce': None, 'code': [],
        'logcalibration': False,
    }  # fmt: skip


@pytest.mark.parametrize('script', ['train', 'test', 'setup_tinyimagenet'])
def test_help_and_usage_errors_touch_no_device(script):
    """They do not import slow and rarely needed packages either."""
    code = f'import sys, {script}\ntry: {script}.main(sys.argv[1:])\nexcept SystemExit as stop: print(stop.code)\n'
    code += "print([name for name in ('matplotlib', 'sklearn', 'tensorflow_datasets') if name in sys.modules])"
    code += '\nfrom jax._src import xla_bridge\nprint(xla_bridge.backends_are_initialized())'
    for arguments, status in ((['--help'], 0), (['--nonsense'], 2)):
        output = subprocess.run(
            [sys.executable, '-c', code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert output.endswith(f'{status}\n[]\nFalse\n')


def evaluation_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    return error


def test_bad_evaluations(flags_of, tmp_path, capsys):
    assert "--testmc: '0' is not a whole number of 1 or more" in evaluation_error(
        ['--resultsfolder=x', '--testmc=0'], capsys
    )
    assert '--ensemble needs several run folders' in evaluation_error(['--resultsfolder=x', '--ensemble'], capsys)
    assert 'nowhere is not a run folder: it holds no config.json' in evaluation_error(
        [f'--resultsfolder={tmp_path}/nowhere'], capsys
    )

    run = train.main(flags_of())
    (run / 'checkpoints').rename(run / 'elsewhere')
    error = evaluation_error([f'--resultsfolder={run}', '--ood', 'digit'], capsys)
    assert "unknown: 'digit'; did you mean digits?" in error
    error = evaluation_error([f'--resultsfolder={run}'], capsys)
    assert 'holds no checkpoint: training has not saved one yet' in error
    assert not (run / 'metrics.json').exists()


def test_output_that_nobody_reads_ends_no_script(flags_of, monkeypatch, capsys):
    """Standard output is a closed pipe, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as stream:
        monkeypatch.setattr(sys, 'stdout', stream)
        run = train.main(flags_of(epochs=1))
        assert len(read_log(run)) == 2
        warning = 'train.py: warning: further output is lost (Broken pipe)\n'
        assert capsys.readouterr().err == warning


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a device of Linux')
def test_streams_that_cannot_be_written_end_no_evaluation(flags_of, monkeypatch):
    run = train.main(flags_of())
    with open('/dev/full', 'w') as stdout, open('/dev/full', 'w') as stderr:
        monkeypatch.setattr(sys, 'stdout', stdout)
        monkeypatch.setattr(sys, 'stderr', stderr)
        evaluate.main([f'--resultsfolder={run}'])
    assert (run / 'metrics.json').exists()


def test_streams_that_are_closed(tmp_path):
    command = f'{shlex.quote(sys.executable)} sweep.py nowhere.toml --output {shlex.quote(str(tmp_path))}'
    closed = subprocess.run(f'{command} 2>&-', cwd=ROOT, shell=True, capture_output=True)
    assert closed.returncode == 2 and closed.stdout == b''
    help = subprocess.run(f'{command} --help >&-', cwd=ROOT, shell=True, capture_output=True)
    assert help.returncode == 0 and help.stderr == b''


def test_formulas_on_a_terminal_of_ascii():
    environment = os.environ | {'PYTHONIOENCODING': 'ascii'}
    help = subprocess.run(
        [sys.executable, 'train.py', '--help'], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert help.returncode == 0 and 'learning rate ?' in help.stdout and not help.stderr


def test_ctrl_c_ends_an_evaluation_without_a_traceback(flags_of, monkeypatch, capsys):
    run = train.main(flags_of())

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, 'measurements', interrupt)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f'--resultsfolder={run}'])
    assert stop.value.code == 130 and capsys.readouterr().err == ''


def test_commands_that_are_printed_have_quotes(flags_of, tmp_path, capsys):
    run = train.main(flags_of(resultsfolder=tmp_path / 'my runs'))
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix('evaluate it with: python test.py'))
    assert evaluate.parse_args(command).resultsfolder == [run]


def test_evaluation_where_the_data_moved(flags_of, datasets, tmp_path, capsys):
    moved = tmp_path / 'moved'
    archives.write_idx_set(moved / 'mnist', num_train=40, num_test=20)
    run = train.main(flags_of(datasetfolder=moved))
    (moved / 'mnist' / 't10k-images-idx3-ubyte.gz').write_bytes(b'')
    assert 't10k-images-idx3-ubyte.gz is damaged' in evaluation_error([f'--resultsfolder={run}'], capsys)
    evaluate.main([f'--resultsfolder={run}', f'--datasetfolder={datasets}'])
    assert LINE.fullmatch(capsys.readouterr().out.splitlines()[1])


def test_animation(tmp_path, capsys):
    output = tmp_path / 'moons.gif'
    demo2d.main([f'--output={output}', '--epochs=6'])
    assert [path.name for path in tmp_path.iterdir()] == ['moons.gif'] and '3 frames' in capsys.readouterr().out
    with Image.open(output) as animation:
        assert animation.n_frames == 3 and animation.info['duration'] == 50 and animation.info['loop'] == 0
        colours = {colour for _, colour in animation.convert('RGB').getcolors()}
    drawn = {ImageColor.getrgb(colour) for colour in demo2d.colours().values()}
    assert len(drawn) == 4 and {(255, 255, 255), *drawn} <= colours
    assert demo2d.colours()['mean'] == plots.STYLES['bsam']['color']
    assert not jax.config.jax_enable_x64


def test_help_of_the_animation_needs_neither_matplotlib_nor_docstrings():
    """The help works even if MPLBACKEND names a notebook backend that is not installed."""
    code = 'import sys, demo2d\ntry: demo2d.main(["--help"])\nexcept SystemExit as stop: print(stop.code)\n'
    code += "print([name for name in ('matplotlib', 'contourpy') if name in sys.modules])"
    environment = os.environ | {'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}
    command = [sys.executable, '-OO', '-c', code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert 'Animate bSAM' in done.stdout and done.stdout.endswith('0\n[]\n')


@pytest.mark.parametrize(
    ('output', 'message'),
    [
        ('nowhere/a.gif', 'nowhere is not a folder: create it first'),
        ('a.png', 'a.png: the name of the animation must end in .gif'),
        ('.', 'is a folder: give the path of a file'),
    ],
)
def test_animation_that_cannot_be_written(output, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo2d.main([f'--output={tmp_path / output}'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and message in error


@pytest.mark.parametrize('command', [['train.py'], ['test.py', '--resultsfolder=run_0']])
def test_jax_without_a_device(command, tmp_path):
    """JAX for GPUs is in this state on a machine without a GPU."""
    environment = os.environ | {'JAX_PLATFORMS': 'nowhere'}
    done = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert f'{command[0]}: error: JAX finds no device: ' in done.stderr


@pytest.mark.parametrize('message', ['RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.', 'INTERNAL'])
def test_device_without_enough_memory(message, flags_of, monkeypatch, capsys):
    """Training and evaluation report it with advice. Other errors of JAX pass through unchanged."""
    run = train.main(flags_of())

    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(posteriors, 'logits', fail)
    for main, flags, advice in (
        (train.main, flags_of(), '--stream, --atonce 1, a smaller --batchsize or --precision bfloat16 need less'),
        (evaluate.main, [f'--resultsfolder={run}'], 'a smaller --testbatchsize'),
    ):
        with pytest.raises((SystemExit, jax.errors.JaxRuntimeError)) as stop:
            main(flags)
        if message == 'INTERNAL':
            assert str(stop.value) == message
        else:
            error = capsys.readouterr().err
            assert stop.value.code == 2 and f'error: a device ran out of memory: {advice}' in error
