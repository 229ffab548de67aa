"""Starts the scripts that use JAX: imports and configures JAX.

Scripts import this module before anything that imports JAX.
"""

import contextlib
import os
import sys
import time
import warnings
from importlib import metadata

import errors
from runs.scripts import one_line_errors, script  # noqa: F401, before JAX, because of Ctrl-C

if metadata.version('jaxlib') == '0.10.1':  # logs an error for each cached function, because it misreads CPU features
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
try:
    import jax
except ValueError as error:  # an environment variable that JAX does not understand
    print(f'{os.path.basename(sys.argv[0])}: error: JAX cannot start: {errors.first_line(error)}', file=sys.stderr)
    sys.exit(2)

# JAX settings that change the numbers of a run, or that the scripts depend on.
_CONFIGURATION = {
    'jax_default_prng_impl': 'threefry2x32',
    'jax_threefry_partitionable': True,
    'jax_threefry_gpu_kernel_lowering': False,
    'jax_high_dynamic_range_gumbel': False,
    'jax_accurate_erf_inv': False,
    'jax_random_seed_offset': 0,
    'jax_enable_x64': False,
    'jax_numpy_dtype_promotion': 'standard',
    'jax_softmax_custom_jvp': False,
    'jax_disable_jit': False,
    'jax_debug_key_reuse': False,
    'jax_transfer_guard': 'allow',
    'jax_transfer_guard_host_to_device': 'allow',
    'jax_transfer_guard_device_to_device': 'allow',
    'jax_transfer_guard_device_to_host': 'allow',
}
for _name, _value in _CONFIGURATION.items():  # overrides the environment variables of JAX
    if _name in jax.config.values:
        jax.config.update(_name, _value)


def use_compilecache(folder: str) -> None:
    """Turns on JAX's persistent compilation cache, unless folder is 'off'. Warns once if the folder is not writable."""
    if folder != 'off':
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            print(f'warning: --compilecache {folder} is not writable: compiled functions are not kept', file=sys.stderr)
            warnings.filterwarnings('ignore', 'Error writing persistent compilation cache')
        folder = folder if os.path.isdir(folder) else 'off'
    jax.config.update('jax_enable_compilation_cache', folder != 'off')
    if folder != 'off':
        _remove_empty_entries(folder)
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def _remove_empty_entries(folder):
    """Removes entries that a full disk left empty, because JAX would warn at every start and never replace them."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.endswith('-cache') and entry.is_file(follow_symlinks=False):
                status = entry.stat()
                if status.st_size == 0 and time.time() - status.st_mtime > 60:  # newer files may still be written
                    os.unlink(entry)
