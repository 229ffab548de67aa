"""Train an image classifier with SGD, SAM or bSAM and leave a run folder for test.py.

python train.py --dataset cifar10 --model resnet18 --optim bsam --alpha 0.5 --priorprec 40 --rho 0.01 --dafactor 4
"""

import os
import sys
import time

import flags

DATASETS = ('cifar10', 'cifar100', 'tinyimagenet', 'mnist', 'fashion', 'digits')
MODELS = ('resnet18', 'resnet20', 'mlp', 'lenet')
OPTIMIZERS = ('sgd', 'sam', 'bsam')
PRECISIONS = ('float32', 'bfloat16')


def parse_args(argv=None):
    """The flags of the reference, with its defaults. Needs neither JAX nor the tables that it lists the names of."""
    parser = flags.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add('--randomseed', type=flags.integer(0, below=2**32), default=0, help='seed of everything that is random')
    parser.add_choice('--optim', OPTIMIZERS, default='sgd', help='optimizer')
    add('--alpha', type=flags.number(above=0), default=1.0, help='learning rate α, before the schedule')
    add('--rho', type=flags.number(minimum=0), default=0.1, help='ρ: sam evaluates at w + ρ g/‖g‖, bsam at w + ρ g/s')
    beta = flags.number(minimum=0, below=1)
    add('--beta1', type=beta, default=0.9, help='β₁: m ← β₁m + g + δw (sgd, sam), m ← β₁m + (1−β₁)(g + δw) (bsam)')
    add('--beta2', type=beta, default=0.999, help='β₂: s ← β₂s + (1−β₂)(√s|g| + γ + δ) (bsam)')
    help = 'prior precision: the weight decay is δ = priorprec / N'
    add('--priorprec', type=flags.number(minimum=0), default=25.0, help=help)
    help = 'data augmentation factor: N = training images × dafactor'
    add('--dafactor', type=flags.number(above=0), default=1.0, help=help)
    add('--batchsize', type=flags.integer(1), default=200, help='images per training step')
    add('--testbatchsize', type=flags.integer(1), default=200, help='images per batch of the test set')
    add('--epochs', type=flags.integer(0), default=180, help='epochs; as in the reference one more is run')
    help = 'epochs e with learning rate α (e+1)/warmup; then α ½(1 + cos(π (e−warmup)/(epochs+1−warmup)))'
    add('--warmup', type=flags.integer(0), default=5, help=help)
    help = 'data set; tfds/NAME is one that TensorFlow Datasets prepared in the folder of the data sets'
    parser.add_choice('--dataset', DATASETS, also='tfds/', default='cifar10', help=help)
    help = 'sub-batches m of a batch, each with a perturbation of its own (sam, bsam)'
    add('--batchsplit', type=flags.integer(1), default=8, help=help)
    add('--noaugment', action='store_true', help='no random crops and flips')
    parser.add_choice('--model', MODELS, default='resnet18', help='network')
    add('--datasetfolder', default='datasets', help='folder of the data sets')
    help = 'the run is kept in RESULTSFOLDER/DATASET_MODEL/OPTIM/run_K'
    add('--resultsfolder', default='results', help=help)
    help = 'what networks compute in; weights, optimizer state, statistics and loss are float32'
    parser.add_choice('--precision', PRECISIONS, default='float32', help=help)
    flags.add_compilecache(parser)
    add('--custominit', type=flags.number(above=0), default=1.0, help='initial precision s (bsam)')
    add('--damping', type=flags.number(minimum=0), default=0.1, help='damping γ of the precision (bsam)')
    args = parser.parse_args(argv)
    if args.optim != 'sgd' and args.batchsize % args.batchsplit:
        parser.error(f'--batchsize {args.batchsize} does not divide into --batchsplit {args.batchsplit} sub-batches')
    if args.optim == 'bsam' and args.damping == args.priorprec == 0:
        parser.error('bsam needs --damping or --priorprec above 0: without both, the precision can decay to 0')
    return args


def main(argv=None):
    args = parse_args(argv)

    # Not before the flags are read: JAX takes most of a second, and --help and usage errors should not.
    import jax
    import numpy as np

    import data
    import experiments
    import metrics
    import models
    import optimizers
    import runs
    import training

    flags.use_compilecache(args.compilecache)
    args.datasetfolder = os.path.abspath(args.datasetfolder)  # test.py may be run elsewhere
    with flags.one_line_errors('train.py', data.DataError, models.ModelError, runs.RunError):
        dataset = data.dataset(args.dataset, args.datasetfolder)
        images, labels = dataset.read('train')
        test_images, test_labels = dataset.read('test')
        if args.batchsize > len(images):
            raise data.DataError(f'--batchsize {args.batchsize} exceeds the {len(images)} training images')
        config = {'flags': vars(args), 'dataset': data.describe(dataset, images)}
        experiment = experiments.create(config)
        init_key, data_key, _ = experiments.keys(args.randomseed)
        state = jax.jit(experiment.init)(init_key)
        run = runs.create(args.resultsfolder, args.dataset, args.model, args.optim)
        runs.write_json(run / 'config.json', config | {'num_data': experiment.num_data} | runs.environment())
    print(f'{run}: {len(images)} training and {len(test_images)} test images', flush=True)

    def prepare(key, batch):
        batch = data.augment(key, batch) if dataset.augment and not args.noaugment else batch
        return experiment.normalise(batch)

    step = training.step_function(experiment.optimizer, prepare)
    images, labels, test_images = jax.device_put((images, labels, test_images))
    steps = len(images) // args.batchsize
    report = Report(args.epochs + 1, steps, args.batchsize)
    with runs.open_checkpoints(run) as checkpoints:
        for number in range(args.epochs + 1):
            start = time.perf_counter()
            lr_factor = optimizers.lr_factor(number, args.epochs, args.warmup)
            sent = jax.device_put({'number': np.int32(number), 'lr_factor': np.float32(lr_factor)})
            epoch = training.start_epoch(data_key, sent['number'], len(images), args.batchsize)
            for i in range(steps):
                state, epoch = step(state, epoch, images, labels, sent['lr_factor'])
                report.step(i + 1, epoch.loss)
            loss = float(jax.device_get(epoch.loss)) / steps  # waits until the device has done the epoch
            seconds = time.perf_counter() - start
            runs.save(checkpoints, number, state)

            probs = experiment.probs(state.params, state.batch_stats, test_images, args.testbatchsize)
            record = {
                'epoch': number,
                'loss': loss,
                'test_accuracy': metrics.accuracy(probs, test_labels),
                'learning_rate': args.alpha * lr_factor,
                'seconds': round(seconds, 3),
                'images_per_second': round(steps * args.batchsize / seconds, 1),
            }
            runs.append_log(run, record)
            report.epoch(record)
    report.close()
    print(f'evaluate it with: python test.py --resultsfolder {run} --testmc 32')
    return run


class Report:
    """Progress of a run: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, num_epochs, steps, batch_size):
        from tqdm import tqdm

        self.num_epochs, self.steps, self.batch_size = num_epochs, steps, batch_size
        total = num_epochs * steps * batch_size
        self.bar = tqdm(total=total, unit=' images', disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.accuracy, self.steps_before, self.refreshed = '', 0, time.monotonic()

    def step(self, steps_done, loss_sum):
        if self.bar.disable or time.monotonic() - self.refreshed < 1:
            return
        # Waits for the device, once a second, so that the bar tells the truth.
        self._show(steps_done, float(loss_sum) / steps_done)

    def epoch(self, record):
        self.accuracy = f', test accuracy {record["test_accuracy"]:.2%}'
        if self.bar.disable:
            print(
                f'epoch {record["epoch"] + 1}/{self.num_epochs}: loss {record["loss"]:.4f}{self.accuracy}, '
                f'{record["seconds"]:.1f} s, {record["images_per_second"]:.0f} images/s',
                flush=True,
            )
        else:
            self._show(self.steps, record['loss'])
        self.steps_before += self.steps

    def close(self):
        self.bar.close()

    def _show(self, steps_done, loss):
        self.bar.set_postfix_str(f'loss {loss:.4f}{self.accuracy}', refresh=False)
        self.bar.update((self.steps_before + steps_done) * self.batch_size - self.bar.n)
        self.refreshed = time.monotonic()


if __name__ == '__main__':
    main()
