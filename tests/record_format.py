"""Records a run in the current format in tests/runs, for test_formats.py.

Run it with PYTHONPATH=. python tests/record_format.py.
"""

import shutil
import tempfile
from pathlib import Path

import jax
from flax import linen as nn

import models
import test as evaluate
import train
from runs import folders

RUNS = Path(__file__).parent / 'runs'


class FourFeatures(nn.Module):
    """A network whose checkpoints are small."""

    num_classes: int

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Dense(4, name='first')(images.mean(axis=2).reshape(images.shape[0], -1)))
        return nn.Dense(self.num_classes, name='head')(x)


def main():
    models.MODELS['mlp'] = FourFeatures
    jax.config.update('jax_default_matmul_precision', 'float32')  # as in the tests
    flags = '--dataset=digits --trainimages=100 --validation=0.2 --model=mlp --optim=bsam --alpha=0.5 --rho=0.01'
    flags += (
        ' --priorprec=1 --batchsize=20 --batchsplit=4 --epochs=7 --warmup=1 --compilecache=off --datasetfolder=/data'
    )
    with tempfile.TemporaryDirectory() as folder:
        run = train.main([*flags.split(), f'--resultsfolder={folder}'])
        evaluate.main([f'--resultsfolder={run}', '--testmc=3', '--testimages=40', '--compilecache=off'])
        config = folders.read_config(run)
        folders.write_config(run, config | {'flags': config['flags'] | {'resultsfolder': 'results'}})
        (run / 'lock').unlink()
        shutil.copytree(run, RUNS / f'format_{folders.FORMAT}')


if __name__ == '__main__':
    main()
