"""Evaluate runs: how good their predictions are, and how sure, at the mean of the posterior and averaged over samples.

python test.py --resultsfolder results/cifar10_resnet18/bsam/run_0 --testmc 32
python test.py --resultsfolder results/cifar10_resnet18/*/run_* --testmc 32
"""

import os
import signal
import sys

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH=1 leaves it out
if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

import contextlib
import glob
from pathlib import Path

from runs import launch, parsing
from runs.training_flags import DATASETS

# Flags that may differ between the processes of one evaluation.
OF_PROCESS = (
    'resultsfolder', 'output', 'datasetfolder', 'corruptions', 'compilecache', 'coordinator', 'processid',
    'jointimeout',
)  # fmt: skip


def parse_args(argv=None):
    parser = create_parser()
    args = parser.parse_args(argv)
    parsing.require_whole_address(parser, args)
    args.testmc = sorted(set(args.testmc))
    try:
        args.resultsfolder = _expanded(args.resultsfolder)
        _require_consistency(args, parser.given(argv))
    except ValueError as error:
        parser.error(str(error))
    return args


def create_parser():
    parser = parsing.Parser(__doc__)
    add = parser.add_argument
    help = 'run folders run_K that train.py printed; several are also compared with each other'
    add('--resultsfolder', type=parsing.folder, nargs='+', required=True, metavar='RUN', help=help)
    help = 'samples from the posterior over which probabilities are averaged; several numbers give a curve'
    add('--testmc', type=parsing.integer(1), nargs='+', default=[1], metavar='N', help=help)
    add('--testbatchsize', type=parsing.integer(1), default=200, help='images per batch, on each device')
    add('--datasetfolder', type=parsing.folder, help='folder of the data sets, where it is not the one of the training')
    help = 'the checkpoint after so many steps, instead of the newest'
    add('--checkpoint', type=parsing.integer(0), metavar='STEP', help=help)
    help = 'evaluate on the test set, or on what train.py --validation kept out of training'
    parser.add_choice('--split', ('test', 'validation'), default='test', help=help)
    help = 'evaluate so many images of each set, a random part that is the same for all runs; all by default'
    add('--testimages', type=parsing.integer(1), metavar='N', help=help)
    add(
        '--bins', type=parsing.integer(1, below=10_001), default=20, help='bins of ECE, MCE and the reliability diagram'
    )
    help = 'estimate batch statistics of the mean and of every sample again, over K training batches'
    add('--bnrefresh', type=parsing.integer(1), metavar='K', help=help)
    help = 'also the metrics at the temperature that is best for what train.py --validation kept out of training'
    add('--temperature', action='store_true', help=help)
    help = 'test sets of other data, to be told from the known'
    parser.add_choice('--ood', DATASETS, also='tfds/', nargs='+', default=[], help=help)
    help = 'evaluate corrupted test images: built-in corruptions, or those of a folder CIFAR-10-C or CIFAR-100-C'
    builtin_or_folder = lambda text: text and parsing.folder(text)  # noqa: E731
    add('--corruptions', type=builtin_or_folder, nargs='?', const='', metavar='FOLDER', help=help)
    help = 'sample from a Laplace approximation of the last layer, of runs whose optimizer has no posterior'
    add('--laplace', action='store_true', help=help)
    add('--plots', action='store_true', help='pictures, as PNG and PDF in the folder plots of a run')
    add('--ensemble', action='store_true', help='also the averages over the runs of each method and over all')
    add('--reuse', action='store_true', help='compare what was predicted before, without evaluating the runs again')
    help = 'folder of the tables of several runs; without it the one that all of them are in'
    add('--output', type=parsing.path, help=help)
    help = 'devices that share the samples, or the images of a batch; all that there are by default'
    add('--devices', type=parsing.integer(1), help=help)
    parsing.add_coordinator(parser)
    parsing.add_compilecache(parser)
    return parser


def _require_consistency(args, given):
    """Raises a ValueError for flags that do not go together; given: those of the command line."""
    several = len(args.resultsfolder) > 1
    if args.split == 'validation' and args.temperature:
        raise ValueError('--temperature is fitted on the images of --split validation: evaluate it on others')
    if args.split == 'validation' and args.corruptions:
        raise ValueError(
            '--split validation goes without a folder of corrupted images, which are those of the test set'
        )
    if args.testimages and args.corruptions:
        raise ValueError('--testimages goes without a folder of corrupted images, which are those of all test images')
    if args.laplace and args.bnrefresh:
        raise ValueError('--laplace goes without --bnrefresh: it is fitted with the batch statistics of the training')
    for flag in ('ensemble', 'reuse', 'output'):
        if getattr(args, flag) and not several:
            raise ValueError(f'--{flag} goes with several run folders')
    if args.checkpoint is not None and several:
        raise ValueError('--checkpoint goes with one run folder')
    effective = {'resultsfolder', 'reuse', 'ensemble', 'output', 'split', 'bins', 'compilecache', 'devices'}
    if args.reuse and given.keys() - effective:
        raise ValueError(f'--reuse evaluates nothing, so --{min(given.keys() - effective)} goes without it')


def _expanded(patterns):
    """Folders of names and patterns, those that a shell left alone; each once. Raises a ValueError if there is none.

    A pattern also matches the tables that an evaluation before has left beside its runs: files are passed over.
    """
    found = []
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
        if not matches and set(pattern) & set('*?['):
            raise ValueError(f'--resultsfolder {pattern} matches nothing')
        found += matches or [pattern]
    folders = [path for path in found if not os.path.isfile(path)]
    if not folders:
        raise ValueError(f'--resultsfolder {found[0]} is a file: name the folder run_K that train.py printed')
    return list({os.path.realpath(folder): Path(folder) for folder in folders}.values())


@launch.script('test.py')
def main(argv=None):
    args = parse_args(argv)

    # Not before the flags are read: JAX takes most of a second, and --help and usage errors should not.
    launch.use_jax(args.compilecache)
    import jax

    import assessment
    from runs import devices, hosts

    with contextlib.ExitStack() as held:
        held.enter_context(hosts.ended_together('test.py', 'start them again'))
        held.enter_context(launch.one_line_errors('test.py'))
        held.enter_context(devices.enough_memory('a smaller --testbatchsize takes less'))
        if args.coordinator:
            hosts.join('test.py', args.coordinator, args.processes, args.processid, args.jointimeout)
        devices.require()
        hosts.wait_for_all()  # before they read data: it may take one of them longer than the others would wait
        if not hosts.is_first():
            held.enter_context(contextlib.redirect_stdout(None))
        same = {name: value for name, value in vars(args).items() if name not in OF_PROCESS}
        same['corruptions'] = args.corruptions is not None
        hosts.require_same({'flags': same, 'number of runs': len(args.resultsfolder)})
        with jax.set_mesh(devices.create_mesh(args.devices)):
            assessment.assess(args)
        hosts.wait_for_all()  # the first process has written its files, and all may end


if __name__ == '__main__':
    main()
