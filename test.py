"""Evaluate a run: accuracy, NLL, ECE and AUROC at the mean of its posterior and averaged over samples of it.

python test.py --resultsfolder results/cifar10_resnet18/bsam/run_0 --testmc 32
"""

import os
from functools import partial
from pathlib import Path

import flags
from train import flags_of


def parse_args(argv=None):
    parser = flags.Parser(__doc__.splitlines()[0])
    parser.add_argument('--resultsfolder', type=Path, required=True, help='the run folder run_K that train.py printed')
    help = 'samples from the posterior over which probabilities are averaged; SGD and SAM only have its mean'
    parser.add_argument('--testmc', type=flags.integer(1), default=1, help=help)
    parser.add_argument('--testbatchsize', type=flags.integer(1), default=200, help='images per batch')
    parser.add_argument('--datasetfolder', help='folder of the data sets, where it is not the one of the training')
    help = 'the checkpoint after so many steps, instead of the newest'
    parser.add_argument('--checkpoint', type=flags.integer(0), metavar='STEP', help=help)
    flags.add_compilecache(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    # Not before the flags are read: JAX takes most of a second, and --help and usage errors should not.
    import jax

    import checkpoints
    import data
    import evaluation
    import experiments
    import metrics
    import models
    import runs

    flags.use_compilecache(args.compilecache)
    with flags.one_line_errors('test.py', data.DataError, models.ModelError, runs.RunError):
        run = args.resultsfolder
        config = runs.read_config(run)
        trained_with = flags_of(config, run)
        config['flags'] = vars(trained_with)
        data.check_description(config['dataset'], run / 'config.json')
        if not os.access(run, os.W_OK):
            raise runs.RunError(f'{run} cannot be written, so metrics.json has no place')
        experiment = experiments.create(config)
        like = jax.eval_shape(experiment.init, jax.random.key(0))
        _, state, progress = checkpoints.restore(run, like, args.checkpoint)
        dataset = data.dataset(trained_with.dataset, args.datasetfolder or trained_with.datasetfolder)
        images, labels = dataset.read('test')
        if list(images.shape[1:]) != config['dataset']['image_shape']:
            raise data.DataError(
                f'the test images are {images.shape[1:]}, not {config["dataset"]["image_shape"]} as in training'
            )

    images = jax.device_put(images)
    sample = partial(jax.jit(experiment.optimizer.sample), state)
    _, _, sample_key = experiments.keys(trained_with.randomseed)

    def predict(params):
        return experiment.probs(params, state.batch_stats, images, args.testbatchsize)

    at_mean = metrics.summary(predict(state.params), labels)
    print('results at mean of distribution:')
    print_metrics(at_mean)
    averaged = metrics.summary(evaluation.posterior_probs(predict, sample, sample_key, args.testmc), labels)
    print(f'results at model average ({args.testmc} samples):')
    print_metrics(averaged)

    trained = {'epoch': progress.epoch, 'steps_of_epoch': progress.step}
    results = {'trained': trained, 'testmc': args.testmc, 'mean': at_mean, 'average': averaged}
    with flags.one_line_errors('test.py', runs.RunError):
        runs.write_json(run / 'metrics.json', results | runs.environment())


def print_metrics(summary):
    """The reference's line, whose auroc is that of the grid, and the exact one."""
    line = '  > testacc={accuracy:.2%}, nll={nll:.4f}, ece={ece:.4f}, auroc={auroc_grid:.4f} (exact {auroc:.4f})'
    print(line.format(**summary), flush=True)


if __name__ == '__main__':
    main()
