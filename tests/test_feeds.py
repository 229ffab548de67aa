"""Batches that are read from the host are those that lie on the device; runs of several seeds are those alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conftest
import feeds
import test
import train
import training
from conftest import restore
from ops import sharding
from runs import devices, folders, json_files


def weights(run):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(restore(run)[1].params)])


@pytest.mark.parametrize('done', [0, 3])
def test_streamed_batches_are_the_resident_ones(done, tmp_path):
    """From a file that is mapped, each image once an epoch, also where an epoch goes on after some steps."""
    images = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1)
    np.save(tmp_path / 'images.npy', images)
    labels = np.arange(30, dtype=np.int32)
    mesh = devices.create_mesh(1)
    epoch = training.start_epoch(jax.random.key(0), jnp.int32(2), 30, 5)
    resident = feeds.Resident(images, labels, mesh)
    streamed = feeds.Streamed(np.load(tmp_path / 'images.npy', mmap_mode='r'), labels, mesh)
    seen = []
    pairs = zip(resident.of_epoch(epoch, done), streamed.of_epoch(epoch, done), strict=True)
    for number, (held, sent) in enumerate(pairs, start=done):
        here = epoch._replace(step=jnp.int32(number))
        expected, found = resident.choose(here, *held), streamed.choose(here, *sent)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        seen += found[1].tolist()
    assert len(seen) == len(set(seen)) == 5 * (6 - done)


def test_streamed_run_is_the_resident_one(flags_of, monkeypatch):
    """In training, where the images of epochs are evaluated, and in test.py, which streams what would fill a device."""
    one = train.main(flags_of(testbatchsize=6))
    measured = evaluated(one)
    monkeypatch.delattr(feeds, 'Resident')  # a run that is not streamed would want it
    sizes = []
    monkeypatch.setattr(sharding, 'send', partial(note_size, sharding.send, sizes))
    monkeypatch.setattr(feeds, 'PART', 13 * 28 * 28)
    other = train.main([*flags_of(testbatchsize=6), '--stream'])
    np.testing.assert_array_equal(weights(one), weights(other))
    assert [record['test_accuracy'] for record in conftest.read_log(one)] == [
        record['test_accuracy'] for record in conftest.read_log(other)
    ]
    assert sizes == [12, 8] * 2  # the 20 test images of two epochs, two batches of 6 at once
    monkeypatch.setattr(feeds, '_too_large', lambda images: True)
    rounding = 0 if jax.default_backend() == 'cpu' else 1e-6  # GPUs sum batches of other sizes in another order
    for found, expected in zip(evaluated(other), measured, strict=True):
        assert found == pytest.approx(expected, rel=rounding, abs=0)
    assert sizes == [12, 8] * (2 + 1 + 3)  # at the mean, and three samples


def note_size(send, sizes, arrays):
    """`send`, but the number of images is noted, if it is images that are sent."""
    if getattr(arrays, 'ndim', 0) == 4:
        sizes.append(len(arrays))
    return send(arrays)


def evaluated(run):
    test.main(['--resultsfolder', str(run), '--testmc', '3', '--testbatchsize', '6'])
    metrics = json_files.read_json(run / 'metrics.json')
    return metrics['mean'], metrics['average']


@pytest.mark.parametrize(('limit', 'kind'), [(None, feeds.Resident), (250, feeds.Resident), (249, feeds.Streamed)])
def test_images_too_large_for_a_device_are_streamed(limit, kind, monkeypatch):
    """100 bytes of images are at most 0.4 of a device of 250."""

    class Device:
        def memory_stats(self):
            return None if limit is None else {'bytes_limit': limit}

    monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
    monkeypatch.setattr(sharding, 'replicate', lambda arrays, mesh: arrays)
    images = np.zeros((1, 10, 10, 1), np.uint8)
    assert type(feeds.create(images, np.zeros(1, np.int32), None, stream=False)) is kind
    assert isinstance(feeds.parts(images, 5)[0], jax.Array) == (kind is feeds.Resident)


def test_seeds_are_runs_of_their_own(forked_jobs, flags_of, capfd):
    alone = train.main(flags_of(randomseed=5))
    with pytest.raises(SystemExit) as stop:
        train.main([*flags_of(), '--seeds', '5', '6'])
    assert stop.value.code == 0
    together = [alone.with_name('run_1'), alone.with_name('run_2')]
    assert [folders.read_config(run)['flags']['randomseed'] for run in together] == [5, 6]
    assert folders.read_config(together[0])['flags'] == folders.read_config(alone)['flags']
    np.testing.assert_array_equal(weights(together[0]), weights(alone))
    assert not np.array_equal(weights(together[1]), weights(alone))
    assert f'seed 5: {together[0]}: 40 training and 20 test images' in capfd.readouterr().out


@pytest.mark.parametrize(
    ('flags', 'line'),
    [
        (['--seeds', '1', '1'], '--seeds names a seed twice'),
        (['--seeds', '1', '2', '--randomseed=3'], '--seeds does not go with --randomseed'),
        (['--seeds', '1', '2', '--resume=run_0'], '--seeds does not go with --resume'),
        (['--seeds', '1', '2', '--devices=2'], '--seeds does not go with --devices'),
    ],
)
def test_seeds_that_are_refused(flags, line, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and line in capsys.readouterr().err


def test_a_seed_that_fails_is_the_status_of_all(forked_jobs, flags_of, capfd):
    with pytest.raises(SystemExit) as stop:
        train.main([*flags_of(alpha=1e30), '--seeds', '5', '6'])
    assert stop.value.code == 1
    assert capfd.readouterr().out.count('train.py: error:') == 2
