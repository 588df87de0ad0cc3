"""The table of plans in the docs is that of the results, and the results are of every row."""

import importlib.util
import json
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_the_docs_show_the_results():
    path = ROOT / 'benchmarks' / 'plan_table.py'
    spec = importlib.util.spec_from_file_location('plan_table', path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    results = json.loads(benchmark.RESULTS.read_text())
    names = ('model', 'mesh', 'remat')
    assert [{name: row[name] for name in names} for row in results] == [*benchmark.rows()]
    shown = (ROOT / 'docs' / 'planning.md').read_text()
    assert '\n'.join(benchmark.table(results)) in shown
