"""Draws tables of `clinc_table.py` as one picture: accuracy against steps, a field for each shape.

    python benchmarks/clinc_picture.py results/clinc.json results/clinc_10_10.json \
        --out results/clinc.png

Where two have the same method on the same shape, the first one's is drawn.
"""

import argparse
import json
import pathlib

from peftjax.cli.meta import _curves
from peftjax.cli.meta._methods import WAYS


def main() -> None:
    parser = argparse.ArgumentParser(description='tables of CLINC150 as one picture')
    parser.add_argument('tables', nargs='+', type=pathlib.Path, help='of clinc_table.py')
    parser.add_argument('--out', type=pathlib.Path, required=True, help='the PNG file')
    options = parser.parse_args()
    found, place = {}, list(WAYS).index
    tables = [json.loads(path.read_text(encoding='utf-8')) for path in options.tables]
    for record in (record for table in tables for record in table['results']):
        key = record['ways'], record['shots'], place(record['method'])
        found.setdefault(key, record)
    title = f'{tables[0]["options"]["queries"]} queries a label, 95 % confidence'
    _curves.draw(options.out, [found[key] for key in sorted(found)], title)


if __name__ == '__main__':
    main()
