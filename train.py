"""Train an image classifier with SGD, SAM, bSAM or one of their kin and leave a run folder for test.py.

python train.py --dataset cifar10 --model resnet18 --optim bsam --alpha 0.5 --priorprec 40 --rho 0.01 --dafactor 4
python train.py --resume results/cifar10_resnet18/bsam/run_0
"""

import os
import signal
import sys

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH=1 leaves it out
if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback

import contextlib
import shlex
import time

from runs import launch, processes, signals
from runs.training_flags import OF_START, WITH_POSTERIOR, continued, create_parser, flags_of, parse_args

LESS_MEMORY = '--stream takes less, and so do --atonce 1, a smaller --batchsize or --precision bfloat16'


@launch.script('train.py')
def main(argv=None):
    args = parse_args(argv)
    if args.seeds:
        values = {name: value for name, value in create_parser().given(argv).items() if name != 'seeds'}
        sys.exit(processes.train_seeds(values, args.seeds))
    with signals.Stop() as stop, contextlib.ExitStack() as held:
        # Not before the flags are read: JAX takes most of a second, and --help and usage errors should not.
        launch.use_jax(args.compilecache)
        import sessions
        from runs import devices, hosts

        held.enter_context(hosts.ended_together('train.py', 'go on with --resume when all are back'))
        held.enter_context(launch.one_line_errors('train.py'))
        held.enter_context(devices.enough_memory(LESS_MEMORY))
        of_start = {name: vars(args).pop(name) for name in OF_START}
        if of_start['coordinator']:
            address = (of_start[name] for name in ('coordinator', 'processes', 'processid', 'jointimeout'))
            hosts.join('train.py', *address, stops_by_step=True)
        devices.require()
        hosts.wait_for_all()  # before they read data: it may take one of them longer than the others would wait
        if not hosts.is_first():
            held.enter_context(contextlib.redirect_stdout(None))
        args.datasetfolder = os.path.abspath(args.datasetfolder)  # test.py may be run elsewhere
        if of_start['resume']:
            given = create_parser().given(argv)
            given['compilecache'] = args.compilecache  # the run's own may be anybody's: machine code is run from there
            session = resumed(of_start['resume'], of_start['checkpoint'], given, held)
        else:
            session = sessions.begin(args, held)
        print_sizes(session, with_devices=bool(of_start['coordinator']))
        if hosts.is_first():
            warn_of_long_warmup(session.args)
        with Report(session) as report:
            trainer = sessions.Trainer(session, stop, report)
            stop.begin()
            all_saved = trainer.run()
        exit_unless_complete(session, stop, all_saved)
        samples = ' --testmc 32' if session.args.optim in WITH_POSTERIOR else ''
        print(f'evaluate it with: python test.py --resultsfolder {shlex.quote(str(session.run))}{samples}')
    return session.run


def resumed(run, checkpoint, given, held):
    """The sessions.Session that goes on from a run's newest checkpoint, or the one named, with the flags given now."""
    import sessions
    from runs import folders, hosts

    config = hosts.from_first(lambda: folders.read_config(run))
    if 'coordinator' in given:
        given.setdefault('devices', None)
    args = continued(flags_of(config, run), given, run)
    return sessions.resume(run, args, config, held, checkpoint)


def print_sizes(session, with_devices):
    images = session.images
    sizes = f'{len(images.train)} training and {len(images.held_out)} {session.split} images'
    if with_devices:
        sizes += f', {session.mesh.size} devices'
    print(f'{session.run}: {sizes}', flush=True)


def warn_of_long_warmup(args):
    """The default is for long runs; of a short one it takes all."""
    if args.warmup > max(args.epochs, 1):
        what = f'with --warmup {args.warmup} and --epochs {args.epochs} the learning rate only rises'
        print(f'train.py: warning: {what}: try --warmup 1', file=sys.stderr)


def exit_unless_complete(session, stop, all_saved):
    """Ends the process of a run that a signal stopped, or whose end could not be saved, and says how to go on."""
    from runs import hosts

    if not all_saved:
        print(f'train.py: error: the last state or log of {session.run} could not be saved', file=sys.stderr)
        sys.exit(128 + stop.signal if stop.signal else 1)
    if stop.signal:
        if hosts.is_first():
            print(f'{signals.SAVED} {shlex.quote(str(session.run))}', file=sys.stderr)
        sys.exit(128 + stop.signal)


class Report:
    """Progress of a run: a bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, session):
        from tqdm import tqdm

        from runs import hosts

        self.num_epochs, self.batch_size = session.args.epochs + 1, session.args.batchsize
        self.split = session.split
        self.steps = len(session.images.train) // self.batch_size
        self.steps_before = session.progress.epoch * self.steps
        total = self.num_epochs * self.steps * self.batch_size
        begun = (self.steps_before + session.progress.step) * self.batch_size
        hidden = not (sys.stderr.isatty() and hosts.is_first())
        self.bar = tqdm(total=total, initial=begun, unit=' images', disable=hidden, dynamic_ncols=True)
        self.accuracy, self.refreshed = '', time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def step(self, steps_done, loss_sum):
        if self.bar.disable or time.monotonic() - self.refreshed < 1:
            return
        # Waits for the device, once a second, so that the bar tells the truth.
        self._show(steps_done, float(loss_sum) / steps_done)

    def epoch(self, record):
        self.accuracy = f', {self.split} accuracy {record[f"{self.split}_accuracy"]:.2%}'
        if self.bar.disable:
            print(
                f'epoch {record["epoch"] + 1}/{self.num_epochs}: loss {record["loss"]:.4f}{self.accuracy}, '
                f'{record["seconds"]:.1f} s, {record["images_per_second"]:.0f} images/s',
                flush=True,
            )
        else:
            self._show(self.steps, record['loss'])
        self.steps_before += self.steps

    def warn(self, message):
        self.bar.clear()
        print(f'train.py: warning: {message}', file=sys.stderr, flush=True)

    def _show(self, steps_done, loss):
        self.bar.set_postfix_str(f'loss {loss:.4f}{self.accuracy}', refresh=False)
        self.bar.update((self.steps_before + steps_done) * self.batch_size - self.bar.n)
        self.refreshed = time.monotonic()


if __name__ == '__main__':
    main()
