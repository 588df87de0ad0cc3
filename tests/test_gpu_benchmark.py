"""What `benchmarks/gpu.py` counts by hand, against our models; and which pieces it runs again."""

import json
import pathlib
import sys
import types

import jax
import pytest

from peftjax._flops import flops

HOME = pathlib.Path(__file__).parents[1] / 'benchmarks'
if not (HOME / 'gpu.py').is_file():
    pytest.skip('the benchmarks are not here', allow_module_level=True)
sys.path.insert(0, str(HOME))
import gpu  # noqa: E402
import gpu_cases as cases  # noqa: E402
import gpu_sides as sides  # noqa: E402

PARAMETERS = {
    'llama-3.1-8b': 8_030_261_248,
    'qwen3-1.7b': 1_720_574_976,
    'qwen3-0.6b': 596_049_920,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_what_a_token_takes_is_what_our_step_computes(name):
    options = types.SimpleNamespace(tiny=False, tokens=8192, chunk=1024, windows=1, device='cpu')
    told = cases.Piece(name, 4096, 'peftjax', 'none').told(options)
    shapes, ids, peft, loss, _ = sides.our_parts(told)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]
    phi = jax.eval_shape(peft.init, jax.random.key(0), shapes)
    traced = jax.jit(jax.grad(loss, argnums=1)).trace(shapes, phi, ids, jax.random.key(0))
    counts = cases.count(told['fields'], 4096)
    assert counts.phi == peft.count()
    # Of causal attention half of the pairs count; in eight blocks, an eighth of that is computed
    # besides.
    assert flops(traced.jaxpr) == 8192 * (counts.minimum + 3 * counts.attention // 8)


def test_a_piece_is_done_once_for_a_device_and_a_batch():
    options = types.SimpleNamespace(tokens=8192, chunk=1024)
    piece = cases.PIECES[0]
    row = {'piece': piece.name, 'device': 'H100', 'batch': [2, 4096], 'chunk': 1024}
    assert gpu.same(row, piece, 'H100', options)
    assert not gpu.same(row, cases.PIECES[1], 'H100', options)
    assert not gpu.same(row, piece, 'H200', options)
    assert not gpu.same(row | {'batch': [4, 4096]}, piece, 'H100', options)
    assert not gpu.same(row | {'chunk': 256}, piece, 'H100', options)
    tests = {'piece': 'tests/kernel', 'device': 'H100', 'failed': []}
    assert gpu.same(tests, 'tests/kernel', 'H100', options)
    assert not gpu.same(tests | {'failed': ['FAILED a']}, 'tests/kernel', 'H100', options)


def test_ours_is_reported_over_the_faster_peer_with_checkpointing(tmp_path, capsys):
    def row(piece, speed, peak, goals=()):
        return {'piece': f'qwen3-0.6b/4096/{piece}', 'device': 'H100', 'tokens_per_s': speed,
                'mfu': 0.4, 'ceiling_tflops': 790.0, 'peak_bytes': peak, 'first_step_s': 60.0,
                'goals': dict(goals)}  # fmt: skip

    rows = [
        row('torch/full', 100, 8),
        row('torch-bfloat16/full', 200, 10),
        row('torch/none', 900, 90),
    ]
    rows += [row('peftjax/names', 1, 1), row('peftjax/names', 300, 5, {'mfu': 0.4})]
    rows += [{'piece': 'qwen3-0.6b/4096/peftjax/none', 'device': 'H100', 'does_not_fit': 'memory'}]
    file = tmp_path / 'gpu.jsonl'
    file.write_text(''.join(json.dumps(one) + '\n' for one in rows))
    gpu.report(types.SimpleNamespace(results=file))
    told = capsys.readouterr().out
    assert 'speed × 1.50, memory × 0.50' in told and told.count('beside torch') == 1
    assert 'does not fit' in told
