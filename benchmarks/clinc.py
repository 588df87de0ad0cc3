"""Makes the three files that `peftjax meta` takes of CLINC150, split by domain.

    python benchmarks/clinc.py --data ../shared/data/clinc150 --out runs/clinc
    peftjax meta --train runs/clinc/train.jsonl --valid runs/clinc/valid.jsonl \\
        --test runs/clinc/test.jsonl --max-tokens 24 …

Six domains are to meta-train on, two to validate, two to test: no domain and so no intent is in two
files. To test are a domain of errands (travel) and one of talk (small talk); to validate, likewise,
work and meta, which is about the assistant itself. All 150 texts of each intent are taken: train,
val and test of the original, whose split is within intents and of no use here. What is out of scope
is left out.

Larson et al., An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction, 2019,
arXiv:1909.02027.
"""

import argparse
import json
import pathlib

TRAIN = (
    'banking', 'credit_cards', 'kitchen_and_dining', 'home', 'auto_and_commute', 'utility',
)  # fmt: skip
VALID = ('work', 'meta')
TEST = ('travel', 'small_talk')


def main() -> None:
    parser = argparse.ArgumentParser(description='CLINC150 as the three files of peftjax meta')
    parser.add_argument('--data', type=pathlib.Path, required=True, help='folder of CLINC150')
    parser.add_argument('--out', type=pathlib.Path, required=True, help='folder for the files')
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in split(options.data).items():
        path = options.out / f'{name}.jsonl'
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
        print(f'{path}: {len(rows)} texts, {len({row["label"] for row in rows})} labels')


def split(folder: pathlib.Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each file.

    Raises:
      ValueError: the domains are not those that were chosen among.
    """
    intents = json.loads((folder / 'domains.json').read_text(encoding='utf-8'))
    if set(intents) != {*TRAIN, *VALID, *TEST}:
        raise ValueError(f'{folder} must have the ten domains of CLINC150: received {set(intents)}')
    rows = []
    for name in ('train', 'val', 'test'):
        lines = (folder / f'{name}.jsonl').read_text(encoding='utf-8').splitlines()
        rows += [json.loads(line) for line in lines]
    found = {}
    for name, domains in (('train', TRAIN), ('valid', VALID), ('test', TEST)):
        own = {intent for domain in domains for intent in intents[domain]}
        found[name] = [row for row in rows if row['label'] in own]
    return found


if __name__ == '__main__':
    main()
