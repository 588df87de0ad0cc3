"""The shipped data set: balanced, all different, no leak, not given away by one word."""

import collections
import itertools
import re

import numpy as np

from peftjax.data import default_messages, load_labelled
from peftjax.data._text import MESSAGES

TRAIN, TEST = default_messages()
FILES = {'train.jsonl': TRAIN, 'test.jsonl': TEST}
ACTS = ('booking', 'cancellation', 'complaint', 'praise', 'question', 'report', 'request')


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def test_acts_are_the_same_in_both_files():
    assert TRAIN.names == TEST.names == ACTS


def test_every_act_comes_four_times_in_every_topic():
    for file, examples in FILES.items():
        topics = load_labelled(MESSAGES / file, label='topic')
        assert len(topics.names) == 12
        cells = np.zeros((7, 12), int)
        np.add.at(cells, (examples.labels, topics.labels), 1)
        np.testing.assert_array_equal(cells, 4)


def test_all_messages_differ_within_and_across_the_files():
    assert len({' '.join(words(text)) for text in TRAIN.texts + TEST.texts}) == 672
    bags = [frozenset(words(text)) for text in TRAIN.texts + TEST.texts]
    assert max(len(a & b) / len(a | b) for a, b in itertools.combinations(bags, 2)) < 0.4


def test_messages_are_short_and_clean():
    for text in TRAIN.texts + TEST.texts:
        assert 5 <= len(text.split()) <= 25, text
        assert text == text.strip() and '  ' not in text, text


def test_no_single_word_gives_half_of_an_act_away():
    texts, labels = TRAIN.texts + TEST.texts, np.concatenate([TRAIN.labels, TEST.labels])
    for act in range(7):
        inside = collections.Counter(
            word
            for text, label in zip(texts, labels, strict=True)
            if label == act
            for word in set(words(text))
        )
        everywhere = collections.Counter(word for text in texts for word in set(words(text)))
        revealing = {w: n for w, n in inside.items() if n >= 48 and n > 0.7 * everywhere[w]}
        assert not revealing, ACTS[act]


def test_cancellations_mostly_do_without_the_word_and_questions_partly_without_the_mark():
    texts, labels = TRAIN.texts + TEST.texts, np.concatenate([TRAIN.labels, TEST.labels])
    with_cancel = np.array(['cancel' in text.lower() for text in texts])
    with_mark = np.array(['?' in text for text in texts])
    cancellation, question = (labels == ACTS.index(name) for name in ('cancellation', 'question'))
    assert with_cancel[cancellation].mean() < 0.5
    assert with_cancel[~cancellation].any()
    assert 0.1 < 1 - with_mark[question].mean() < 0.5
    assert with_mark[~question].sum() > with_mark[question].sum()


def test_the_readme_defines_every_act():
    readme = (MESSAGES / 'README.md').read_text(encoding='utf-8')
    assert all(f'| `{act}` |' in readme for act in ACTS)
