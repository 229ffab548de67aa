"""Scripts at start-up: JAX's configuration, paths, environment variables, and signals during imports."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import children
import errors
import sweep
import train
from children import ROOT
from conftest import read_log, restore
from runs import devices, folders, launch, provenance, training_flags

SCRIPTS = ('train.py', 'test.py', 'sweep.py', 'demo2d.py', 'setup_tinyimagenet.py')


def call(*command, folder=ROOT, **environment):
    """Runs a separate process, because Python and JAX read most of the environment at start-up."""
    given = os.environ | {name: str(value) for name, value in environment.items()}
    given.pop('TF_CPP_MIN_LOG_LEVEL', None)  # JAX has set it in this process
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=300)


# JAX.


def test_numbers_do_not_depend_on_the_configuration_of_jax(flags_of, tmp_path):
    """The numbers of a resumed run do not depend on it either."""
    odd = {
        'JAX_DEFAULT_PRNG_IMPL': 'rbg', 'JAX_THREEFRY_PARTITIONABLE': 0, 'JAX_RANDOM_SEED_OFFSET': 7,
        'JAX_ENABLE_X64': 1, 'JAX_NUMPY_DTYPE_PROMOTION': 'strict', 'JAX_TRANSFER_GUARD': 'disallow',
    }  # fmt: skip
    run = train.main(flags_of(epochs=2))
    done = call('train.py', *flags_of(epochs=1, resultsfolder=tmp_path / 'odd'), **odd)
    assert (done.returncode, done.stderr) == (0, '')
    other = tmp_path / 'odd' / 'mnist_mlp' / 'bsam' / 'run_0'
    train.main([f'--resume={other}', '--epochs=2'])
    for record, found in zip(read_log(run)[:1], read_log(other)[:1], strict=True):
        assert record['loss'] == found['loss'] and record['test_accuracy'] == found['test_accuracy']
    assert restore(other)[0] == restore(run)[0]
    tested = call('test.py', f'--resultsfolder={other}', '--corruptions', '--testmc=2', **odd)
    assert (tested.returncode, tested.stderr) == (0, '')
    assert json.loads((other / 'metrics.json').read_text())['corruptions']


def test_a_jaxlib_that_computes_wrong_numbers_ends_a_script(monkeypatch, flags_of, capsys):
    devices.require_right_numbers()
    monkeypatch.setattr(devices, '_squared_norms', lambda rows: 0.99 * rows[:, 0] ** 2)
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert f'jaxlib {jax.lib.__version__} computes wrong numbers' in error and 'pip install' in error


def test_a_resume_in_another_precision_is_refused(flags_of, monkeypatch, capsys):
    run = train.main(flags_of())
    before = provenance.environment()
    monkeypatch.setattr(provenance, 'environment', lambda: before | {'matmul_precision': 'bfloat16'})
    with pytest.raises(SystemExit) as stop:
        train.main([f'--resume={run}', '--epochs=2'])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f'JAX_DEFAULT_MATMUL_PRECISION is bfloat16, but {run} began with float32: set the same precision' in error
    monkeypatch.setattr(provenance, 'environment', lambda: before | {'xla_flags': '--another=1'})
    train.main([f'--resume={run}', '--epochs=2'])
    assert "XLA_FLAGS is '--another=1'" in capsys.readouterr().err


@pytest.mark.parametrize('script', ['train.py', 'test.py', 'demo2d.py', 'setup_tinyimagenet.py'])
def test_variables_that_jax_does_not_understand(script, tmp_path):
    arguments = {'train.py': [], 'test.py': [f'--resultsfolder={tmp_path}'], 'demo2d.py': ['--epochs=1']}
    done = call(f'{ROOT}/{script}', *arguments.get(script, []), folder=tmp_path, JAX_ENABLE_X64='maybe')
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith(f'{script}: error: JAX cannot start: ') and 'maybe' in done.stderr


# Paths.


def test_home_folders_in_path_flags(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    args = training_flags.parse_args(['--datasetfolder=~/data', '--resultsfolder=~', '--compilecache=~/cc'])
    assert args.datasetfolder == f'{tmp_path}/data' and args.resultsfolder == str(tmp_path)
    assert args.compilecache == f'{tmp_path}/cc'
    assert training_flags.parse_args(['--resume=~/run']).resume == tmp_path / 'run'
    assert sweep.parse_args(['~/s.toml', '--output=~/out']).output == tmp_path / 'out'
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '~/jax')
    assert training_flags.parse_args([]).compilecache == f'{tmp_path}/jax'


def test_a_home_folder_that_is_no_path(monkeypatch, capsys):
    monkeypatch.setenv('HOME', 'relative')
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert training_flags.parse_args([]).compilecache == 'off'
    with pytest.raises(SystemExit):
        training_flags.parse_args(['--datasetfolder=~/data'])
    assert 'this home folder is unknown' in capsys.readouterr().err


def test_names_that_are_too_long_for_the_system(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(['--dataset=cifar10', f'--datasetfolder={tmp_path / ("x" * 300)}', f'--resultsfolder={tmp_path}'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1 and 'File name too long' in error


@pytest.mark.parametrize(('text', 'message'), [('~nobody-here/x', 'this home folder is unknown'), ('a\0b', 'NUL')])
def test_paths_that_cannot_be(text, message, capsys):
    for flag in ('--datasetfolder', '--resultsfolder', '--resume', '--compilecache'):
        with pytest.raises(SystemExit) as stop:
            training_flags.parse_args([flag, text])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and '\0' not in error


def test_compiled_functions_without_a_home_folder(monkeypatch):
    for name in ('HOME', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # as for a user that the system does not know
    assert training_flags.parse_args([]).compilecache == 'off'


@pytest.mark.parametrize(
    ('variables', 'expected'),
    [
        ({'JAX_COMPILATION_CACHE_DIR': '/somewhere'}, '/somewhere'),
        ({'JAX_COMPILATION_CACHE_DIR': '/somewhere', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}, 'off'),
        ({'JAX_ENABLE_COMPILATION_CACHE': '1'}, f'{os.sep}bayesian-sam'),
    ],
)
def test_variables_of_jax_choose_the_compile_cache(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert training_flags.parse_args([]).compilecache.endswith(expected)
    assert training_flags.parse_args(['--compilecache=/own']).compilecache == '/own'


def test_empty_entries_of_a_compile_cache_are_removed(tmp_path, compilecache):
    """Only entries older than a minute are removed, because newer ones may still be written."""
    for name, age in (('old-cache', 100), ('new-cache', 0), ('old-atime', 100)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / 'full-cache').write_bytes(b'x')
    os.utime(tmp_path / 'full-cache', (0, 0))
    try:
        launch.use_compilecache(str(tmp_path))
    finally:
        launch.use_compilecache(str(compilecache))
    assert {path.name for path in tmp_path.iterdir()} == {'new-cache', 'old-atime', 'full-cache'}


# Python and the working folder.


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize(('options', 'variables'), [(['-OO'], {}), ([], {'PYTHONSAFEPATH': '1'})])
def test_options_of_python(script, options, variables):
    done = call(*options, script, '--help', **variables)
    assert (done.returncode, done.stderr) == (0, '') and f'usage: {script}' in done.stdout


def test_a_working_folder_that_was_removed(tmp_path):
    folder = tmp_path / 'gone'
    folder.mkdir()
    command = ['sh', '-c', 'rmdir "$PWD" && exec "$0" "$1"', sys.executable, str(ROOT / 'train.py')]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == 'train.py: error: the working folder no longer exists: cd to an existing folder\n'


@pytest.mark.parametrize('script', SCRIPTS)
def test_ctrl_c_while_a_script_imports(script):
    """The signal comes just before JAX is imported. For later signals see test_resume."""
    code = f"""if True:
        import builtins, os, runpy, signal, sys
        def interrupted(name, *rest, imported=builtins.__import__):
            if name == 'jax':
                os.kill(os.getpid(), signal.SIGINT)
            return imported(name, *rest)
        builtins.__import__ = interrupted
        sys.argv = ['{script}', '--help']
        runpy.run_path('{script}', run_name='__main__')
    """
    done = call('-c', code)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, '', '')


# Signals.


@pytest.mark.parametrize('ignored', [False, True])
def test_a_closed_terminal_ends_what_nohup_does_not_protect(ignored):
    def handler(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    from runs import signals

    try:
        handlers = signals.handle(handler)
        assert (signal.getsignal(signal.SIGHUP) is handler) != ignored
        assert all(signal.getsignal(n) is handler for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        signals.restore(handlers)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_middle_of_a_print(monkeypatch, capfd):
    """Streams are not reentrant. The line goes directly to the file descriptor, and the handler raises nothing."""
    from runs import signals

    class Entered:
        def write(self, text):
            raise RuntimeError('reentrant call inside')

    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stderr', Entered())
        signals.say('SIGTERM: waiting')
    assert capfd.readouterr().err == '\nSIGTERM: waiting\n'


# Git.


def git(folder, *arguments):
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
    subprocess.run(['git', *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_never_that_of_another_repository(tmp_path, monkeypatch):
    outer, inner = tmp_path / 'outer', tmp_path / 'outer' / 'inner'
    inner.mkdir(parents=True)
    git(outer, 'init')
    git(outer, 'commit', '--allow-empty', '-m', 'x')
    (inner / 'runs').mkdir()
    (inner / 'runs' / 'provenance.py').touch()
    monkeypatch.setattr(provenance, '__file__', str(inner / 'runs' / 'provenance.py'))
    assert provenance._git_commit() is None
    monkeypatch.setenv('GIT_DIR', str(outer / '.git'))
    assert provenance._git_commit() is None
    git(inner, 'init') if monkeypatch.delenv('GIT_DIR') is None else None
    git(inner, 'commit', '--allow-empty', '-m', 'y')
    monkeypatch.setenv('GIT_DIR', str(outer / '.git'))
    commit = provenance._git_commit()
    assert commit and len(commit.removesuffix('-dirty')) == 40


# Texts.


def test_errors_do_not_steer_the_terminal():
    assert str(errors.UserError('a\x1b[2Jb\nc é')) == r'a\x1b[2Jb\nc é'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'\xef\xbb\xbf[flags]\nvalidation = 0.1\n[grid]\nrho = [0.1]\n', None),
        ('[flags]\nvalidation = 0.1\n[grid]\nresultsfold\u00e9r = [0.1]\n'.encode('latin-1'), 'utf-8'),
        (b'x = ' + b'[' * 5000, 'cannot be read'),
        (b'[flags]\nvalidation = 0.1\n[random]\nalpha = [1, 1' + b'0' * 400 + b']\n', 'two numbers, 0 < low < high'),
        (b'[flags]\nvalidation = 0.1\n[random]\nalpha = [true, 3]\n', 'two numbers, 0 < low < high'),
        (b'[flags]\nvalidation = 0.1\nepochs = false\n', "--epochs: 'False' is not a whole number"),
    ],
    ids=['BOM', 'latin-1', 'nested', '400 digits', 'bool', 'no switch'],
)
def test_sweep_files(text, message, tmp_path, capsys):
    path = tmp_path / 'sweep.toml'
    path.write_bytes(text)
    if message is None:
        assert sweep.read(path) == ({'validation': 0.1}, [{'rho': 0.1}])
        return
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(path), f'--output={tmp_path / "out"}'])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count('\n') == 1


@pytest.mark.parametrize('name', ['config.json', 'log.jsonl'])
def test_a_pipe_in_place_of_a_file_of_a_run(name, flags_of, capsys):
    """Reading the pipe must not wait for a writer."""
    run = train.main(flags_of())
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(errors.UserError, match=f'{name} is damaged or cannot be read: it is not a regular file'):
        folders.read_config(run) if name == 'config.json' else folders.read_log(run)


@pytest.mark.parametrize(
    'line',
    [
        '{"epoch": Infinity, "loss": 1, "learning_rate": 1, "test_accuracy": 1}',
        '{"epoch": 0, "loss": 1e999, "learning_rate": 1, "test_accuracy": 1}',
        '{"epoch": 0, "loss": {}, "learning_rate": 1, "test_accuracy": 1}',
        '{"epoch": 0, "loss": 1, "learning_rate": "x", "test_accuracy": 1}',
        '{"epoch": 0, "loss": 1, "learning_rate": 1, "test_accuracy": true}',
        '{"epoch": 1' + '0' * 400 + ', "loss": 1, "learning_rate": 1, "test_accuracy": 1}',
        '[' * 100_000,
    ],
)
def test_a_log_of_what_is_no_number(line, tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"epoch": 0, "loss": null, "learning_rate": 1, "test_accuracy": 1}\n')
    assert len(folders.read_log(tmp_path)) == 1
    (tmp_path / 'log.jsonl').write_text(line + '\n')
    with pytest.raises(folders.RunError, match=r'log\.jsonl is damaged'):
        folders.read_log(tmp_path)


def test_printed_commands_can_be_copied(tmp_path, flags_of, capsys):
    run = train.main(flags_of(resultsfolder=tmp_path / 'a [b]'))
    printed = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(printed.partition('--resultsfolder ')[2])[0] == str(run)
    assert np.isfinite(read_log(run)[0]['loss']) and restore(run)[0] == 4
    assert children.run(['test.py', f'--resultsfolder={run}']).returncode == 0
