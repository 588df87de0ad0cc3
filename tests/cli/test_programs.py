"""Programs compiled ahead, and batches of like length: nothing but the time may show them."""

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import data
from peftjax.cli._programs import Programs
from peftjax.cli._task import EVALUATE, Task


def test_each_shape_of_batch_is_compiled_once():
    programs = Programs(jax.jit(lambda scale, batch: scale * batch['x'].sum()))
    assert programs.peak_bytes == 0
    short, long = ({'x': jnp.ones(size)} for size in (4, 4000))
    assert [float(programs(jnp.float32(2), batch)) for batch in (short, long)] == [8, 8000]
    seconds, peak = programs.seconds, programs.peak_bytes
    assert seconds > 0 and peak >= 16000
    assert float(programs(jnp.float32(3), short)) == 12
    assert (programs.seconds, programs.peak_bytes) == (seconds, peak)
    assert programs.prepare(jnp.float32(1), short) is not programs.prepare(jnp.float32(1), long)


def test_rows_come_back_in_the_order_of_the_texts():
    count = 2 * EVALUATE + 5
    lengths = np.random.default_rng(0).integers(1, 60, count)
    mask = (np.arange(60) < lengths[:, None]).astype(np.int32)
    tokens = data.Tokens(mask * np.arange(1, count + 1, dtype=np.int32)[:, None], mask)
    task, widths = Task(*(None,) * len(Task.__dataclass_fields__)), []  # pyright: ignore

    def program(batch):
        widths.append(batch['ids'].shape[1])
        return np.stack([batch['ids'].max(1), batch['mask'].sum(1)], 1)

    found = task.each(program, tokens)
    np.testing.assert_array_equal(found, np.stack([np.arange(1, count + 1), lengths], 1))
    assert widths == sorted(widths) and widths[0] < widths[-1]
