"""The climate of all tests: eight host devices, quick compilation, no silent promotion of dtypes.

Most programs of tests run once, on a few numbers, and compiling them would take most of the time:
they are compiled without most optimizations, in processes that tests start too. Modules marked
`optimized` are compiled as users compile (but for the flags below, which hold for a whole
process). With `JAX_DISABLE_MOST_OPTIMIZATIONS=0` in the environment everything is.

Many commands compile the same step, in this process and in others: what took long is kept on disk
for the length of the run.
"""

import gc
import importlib.metadata
import os
import shutil
import tempfile

import jax
import pytest

QUICK = os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS', '1').lower() not in ('0', 'false')
FLAGS = ['--xla_force_host_platform_device_count=8']
# by version: a compiler that meets a flag it does not know ends the process
QUICKLY = {
    '0.10.': ['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1'],
    '0.12.': ['--xla_cpu_opt_preset=FAST_COMPILE', '--xla_cpu_parallel_codegen_split_count=1'],
}
if QUICK:
    FLAGS += QUICKLY.get(importlib.metadata.version('jaxlib')[:5], [])
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS]).strip()


def compile_quickly(quick: bool) -> None:
    """How this process compiles from here on, and those that it starts."""
    jax.config.update('jax_disable_most_optimizations', quick)
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(int(quick))


compile_quickly(QUICK)


def pytest_configure(config: pytest.Config) -> None:
    """Tells of the marks, and keeps programs for all processes of this run."""
    config.addinivalue_line('markers', 'optimized: its programs are compiled as users compile them')
    config.addinivalue_line('markers', 'slow: long, and of other versions others say the same')
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # a worker has that of who started it
        folder = tempfile.mkdtemp(prefix='peftjax-programs-')
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
        os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'
    jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def strict_dtypes():
    """No operand changes its dtype in silence; examples in docstrings know no such rule."""
    with jax.numpy_dtype_promotion('strict'):
        yield


@pytest.fixture(autouse=True, scope='module')
def programs(request: pytest.FixtureRequest):
    """Compiled as the module asks, and gone with the module whose tests made them.

    Each holds mappings of memory, of which Linux gives a process 65,530; a compiler that gets no
    more crashes, and one process runs two thousand tests.
    """
    compile_quickly(QUICK and request.node.get_closest_marker('optimized') is None)
    yield
    jax.clear_caches()
    compile_quickly(QUICK)
