"""The climate of all tests: eight host devices, quick compilation, no silent promotion of dtypes.

Two thirds of the time of all tests were the compiler's, and most programs run once, on a few
numbers: they are compiled without most of its optimizations, in processes that tests start too.
What is claimed of bits is compiled as users compile it, in modules marked `optimized`. With
`JAX_DISABLE_MOST_OPTIMIZATIONS=0` in the environment everything is.
"""

import gc
import importlib.metadata
import os

import jax
import pytest

QUICK = os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1') != '0'
FLAGS = ['--xla_force_host_platform_device_count=8']
if QUICK and importlib.metadata.version('jaxlib').startswith('0.10.'):
    # later compilers do not know the first of these, and end on what they do not know
    FLAGS += ['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1']
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS]).strip()
jax.config.update('jax_disable_most_optimizations', QUICK)


def pytest_configure(config: pytest.Config) -> None:
    """Tells of the mark."""
    config.addinivalue_line('markers', 'optimized: its programs are compiled as users compile them')


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
    quick = QUICK and request.node.get_closest_marker('optimized') is None
    jax.config.update('jax_disable_most_optimizations', quick)
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(int(quick))  # for processes that it starts
    yield
    jax.clear_caches()
