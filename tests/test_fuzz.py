"""Gives every reader damaged files, and files that were once read wrongly. `tests/fuzz.py` tries more."""

import resource
import time

import pytest

import fuzz
from errors import UserError

CASES = 100


@pytest.mark.parametrize('reader', fuzz.READERS)
def test_damaged_files(reader):
    run = fuzz.run_here if reader in fuzz.OF_RUNS else fuzz.run
    counts, failures = run(reader, CASES)
    assert not failures, next(iter(failures.items()))
    assert sum(counts.values()) == CASES + len(fuzz.corpus(reader)) and counts['refused'] > CASES / 4


def test_corpus_is_of_readers():
    assert {path.name for path in fuzz.CORPUS.iterdir()} <= set(fuzz.READERS) | {
        'tfds-record', 'tfds-features.json', 'tfds-dataset_info.json', 'tfds-shard',
    }  # fmt: skip


def test_damage_is_determined_by_the_seed():
    payload = bytes(range(200))
    assert [fuzz.damage(payload, seed) for seed in range(50)] == [fuzz.damage(payload, seed) for seed in range(50)]
    assert len({fuzz.damage(payload, seed) for seed in range(50)}) > 45


def refuse(folder, payload):
    raise UserError('damaged')


def take_memory(folder, payload):
    """Takes more memory than this process ever had before."""
    with open('/proc/self/statm') as file:
        resident = int(file.read().split()[1]) * resource.getpagesize() >> 20
    assert bytearray(b'x') * (int(fuzz._peak_megabytes() - resident + 400) << 20)


@pytest.mark.parametrize(
    ('read', 'expected'),
    [
        (lambda folder, payload: None, 'read'),
        (refuse, 'refused'),
        (lambda folder, payload: [][0], 'IndexError'),
        (lambda folder, payload: time.sleep(60), 'more than 0.2 s'),
        (take_memory, 'MB more memory, then: read'),
    ],
)
def test_outcomes(read, expected, monkeypatch):
    monkeypatch.setitem(fuzz.READERS, 'own', fuzz.Reader(lambda: b'', read))
    monkeypatch.setattr(fuzz, 'SECONDS', 0.2 if 'more than' in expected else 10)
    assert expected in fuzz.outcome('own', b'')
