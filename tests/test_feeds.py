"""Streamed batches equal resident batches. Runs of several seeds equal runs of one seed."""

from functools import partial

import jax
import numpy as np
import pytest

import conftest
import data
import test
import train
from conftest import restore
from evaluation import posteriors
from ops import sharding
from runs import devices, folders, hosts, json_files


def weights(run):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(restore(run)[1].params)])


def as_read(images):
    return images


@pytest.mark.parametrize('done', [0, 3])
def test_streamed_batches_are_the_resident_ones(done, tmp_path):
    """The images come from a mapped file, each once per epoch, also if the epoch is resumed after some steps."""
    images = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1)
    np.save(tmp_path / 'images.npy', images)
    labels = np.arange(30, dtype=np.int32)
    mesh = devices.create_mesh(1)
    key = jax.random.key(0)
    sources = images, np.load(tmp_path / 'images.npy', mmap_mode='r')
    resident, streamed = (
        data.Feed(source, labels, 5, key, mesh, as_read, augmented=False, streamed=source is not images)
        for source in sources
    )
    seen = []
    for expected, found in zip(resident.batches(2, done), streamed.batches(2, done), strict=True):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0].ravel(), found[1])
        seen += found[1].tolist()
    assert len(seen) == len(set(seen)) == 5 * (6 - done)
    assert np.array_equal(seen, [label for _, labels in resident.batches(2) for label in labels.tolist()][5 * done :])


def test_batches_are_augmented_alike_wherever_an_epoch_begins():
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    mesh = devices.create_mesh(1)
    key = jax.random.key(0)
    plain, resident, streamed = (
        data.Feed(images, np.arange(12), 4, key, mesh, as_read, augmented=augmented, streamed=streamed)
        for augmented, streamed in ((False, False), (True, False), (True, True))
    )
    all_three = list(zip(plain.batches(1), resident.batches(1), streamed.batches(1), strict=True))
    for (plain_images, _), (augmented, labels), (sent, _) in all_three:
        np.testing.assert_array_equal(sent, augmented)
        np.testing.assert_array_equal(plain_images, images[np.asarray(labels)])
        assert not np.array_equal(augmented, plain_images)
    for feed in (resident, streamed):
        ((last, _),) = feed.batches(1, done=2)
        np.testing.assert_array_equal(last, all_three[2][1][0])


def test_streamed_run_is_the_resident_one(flags_of, monkeypatch):
    """Covers training, the evaluation after each epoch, and test.py, which streams images that would fill a device."""
    one = train.main(flags_of(testbatchsize=6))
    measured = evaluated(one)
    sizes = []
    monkeypatch.setattr(sharding, 'send', partial(note_size, sharding.send, sizes))
    monkeypatch.setattr(sharding, 'replicate', partial(refuse_images, sharding.replicate))
    monkeypatch.setattr(posteriors, 'PART', 13 * 28 * 28)
    other = train.main([*flags_of(testbatchsize=6), '--stream'])
    np.testing.assert_array_equal(weights(one), weights(other))
    assert [record['test_accuracy'] for record in conftest.read_log(one)] == [
        record['test_accuracy'] for record in conftest.read_log(other)
    ]
    assert sizes == [12, 8] * 2  # 20 test images after each of two epochs, two batches of 6 at a time
    monkeypatch.setattr(hosts, 'must_stream', lambda images: True)
    rounding = 0 if jax.default_backend() == 'cpu' else 1e-6  # GPUs sum batches of other sizes in another order
    for found, expected in zip(evaluated(other), measured, strict=True):
        assert found == pytest.approx(expected, rel=rounding, abs=0)
    assert sizes == [12, 8] * (2 + 1 + 3)  # at the mean, and three samples


def refuse_images(replicate, arrays, mesh):
    """Calls `replicate`, but fails if an array holds all training images."""
    assert not any(getattr(x, 'shape', ())[:1] == (40,) for x in jax.tree.leaves(arrays))
    return replicate(arrays, mesh)


def note_size(send, sizes, arrays):
    """Calls `send`, and adds the number of images to `sizes` if the array holds images."""
    if getattr(arrays, 'ndim', 0) == 4:
        sizes.append(len(arrays))
    return send(arrays)


def evaluated(run):
    test.main(['--resultsfolder', str(run), '--testmc', '3', '--testbatchsize', '6'])
    metrics = json_files.read_json(run / 'metrics.json')
    return metrics['mean'], metrics['average']


@pytest.mark.parametrize(('limit', 'streamed'), [(None, False), (250, False), (249, True)])
def test_images_too_large_for_a_device_are_streamed(limit, streamed, monkeypatch):
    """Resident images take at most 0.4 of a device: 100 bytes of 250."""

    class Device:
        def memory_stats(self):
            return None if limit is None else {'bytes_limit': limit}

    monkeypatch.setattr(jax, 'local_devices', lambda: [Device()])
    images = np.zeros((1, 10, 10, 1), np.uint8)
    assert hosts.must_stream(images) == streamed
    assert isinstance(posteriors.parts(images, 5)[0], jax.Array) != streamed


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
        (['--seeds', '1', '2', '--randomseed=3'], '--seeds cannot be combined with --randomseed'),
        (['--seeds', '1', '2', '--resume=run_0'], '--seeds cannot be combined with --resume'),
        (['--seeds', '1', '2', '--devices=2'], '--seeds cannot be combined with --devices'),
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
