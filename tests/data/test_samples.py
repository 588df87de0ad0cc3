"""Which tokens are learned, and when their limits cannot be told."""

from typing import Any

import numpy as np
import pytest
import talk

from peftjax.data import Record, Sample, encode_records

TURNS = (
    {'role': 'system', 'content': 'be brief'},
    {'role': 'user', 'content': 'what is the answer'},
    {'role': 'assistant', 'content': 'forty two'},
    {'role': 'user', 'content': 'the question'},
    {'role': 'assistant', 'content': 'ab ab'},
)
TALK = Record(where='f.jsonl, line 1', messages=TURNS)


def encode(record: Record, template: str | None = talk.CHATML, **how: Any) -> Sample:
    how = {'max_tokens': 200, **how}
    (sample,) = encode_records(talk.tokenizer(template), [record], **how)
    return sample


def runs(sample: Sample) -> list[str]:
    """The stretches of text that are learned."""
    cuts = np.flatnonzero(np.diff(sample.learned)) + 1
    pieces = np.split(sample.ids, cuts), np.split(sample.learned, cuts)
    say = talk.backend().decode
    return [
        say(list(ids), skip_special_tokens=False)
        for ids, learned in zip(*pieces, strict=True)
        if learned[0]
    ]


@pytest.mark.parametrize(
    ('template', 'end'), [(talk.CHATML, '<|im_end|>\n'), (talk.LLAMA, '<|eot_id|>')]
)
def test_the_answers_of_a_conversation_are_found_exactly(template: str, end: str):
    sample = encode(TALK, template)
    assert runs(sample) == [f'forty two{end}', f'ab ab{end}']
    tokenizer = talk.tokenizer(template)
    whole = tokenizer.apply_chat_template([*TURNS], tokenize=False)
    assert tokenizer.decode(sample.ids) == whole
    assert runs(encode(TALK, template, answers_only=False)) == [whole]
    asked = tokenizer.apply_chat_template([*TURNS[:2]], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(asked, add_special_tokens=False)['input_ids']
    assert sample.ids[: len(ids)].tolist() == ids and sample.learned[len(ids)]


def test_a_template_of_ones_own_comes_first():
    assert runs(encode(TALK, None, chat_template=talk.LLAMA))[0] == 'forty two<|eot_id|>'


def test_completions_and_texts_end_with_the_end_of_text():
    pair = Record(where='', prompt='what is', completion=' forty two')
    sample = encode(pair)
    assert runs(sample) == [' forty two<|end_of_text|>']
    assert sample.ids[0] == talk.backend().token_to_id('<|begin_of_text|>')
    everything = '<|begin_of_text|>what is forty two<|end_of_text|>'
    assert runs(encode(pair, answers_only=False)) == [everything]
    text = Record(where='', text='what is forty two')
    assert runs(encode(text)) == [everything]
    eos = talk.backend().token_to_id('<|end_of_text|>')
    (bare,) = encode_records(talk.backend(), [text], max_tokens=50, eos_id=eos)
    assert bare.ids.tolist() == encode(text).ids.tolist()


def test_a_completion_of_nothing_has_what_begins_a_text():
    alone = encode(Record(where='', prompt='', completion='forty two'))
    assert alone.ids.tolist() == encode(Record(where='', text='forty two')).ids.tolist()
    assert alone.learned.tolist() == [False, *[True] * (len(alone.ids) - 1)]


def test_tokens_that_change_with_what_follows_are_refused():
    with pytest.raises(ValueError, match='line 7: the tokens of a prompt must not change.*space'):
        encode(Record(where='f.jsonl, line 7', prompt='a', completion='b ab'))
    with pytest.raises(ValueError, match='line 1: the chat template renders message 2 in another'):
        encode(TALK, talk.FORGETFUL)
    last = Record(where='', messages=TURNS[:3])  # nothing comes after its answer
    with pytest.raises(ValueError, match='message 2'):
        encode(last, talk.FORGETFUL)
    glued = ({'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'})
    with pytest.raises(ValueError, match='another chat template'):
        encode(Record(where='', messages=glued), talk.GLUED)


def test_what_is_too_long():
    pair = Record(where='f.jsonl, line 3', prompt='what is', completion=' forty two')
    count = len(encode(pair).ids)
    assert len(encode(pair, max_tokens=count).ids) == count
    with pytest.raises(ValueError, match=f'line 3 has {count} tokens, max_tokens is {count - 1}'):
        encode(pair, max_tokens=count - 1)
    cut = encode(pair, max_tokens=count - 1, too_long='cut')
    assert cut.ids.tolist() == encode(pair).ids[:-1].tolist() and cut.learned[-1]
    with pytest.raises(ValueError, match=f'within the first 2 of its {count} tokens'):
        encode(pair, max_tokens=2, too_long='cut')
    short = Record(where='', text='ab')
    how = {'max_tokens': 4, 'too_long': 'drop'}
    assert len(encode_records(talk.tokenizer(), [pair, short], **how)) == 1
    with pytest.raises(ValueError, match='all 1 examples have more than max_tokens=4'):
        encode(pair, **how)


@pytest.mark.parametrize(
    ('record', 'template', 'how', 'message'),
    [
        (TALK, None, {}, 'line 1 is a conversation.*pass chat_template'),
        (TALK, "{{ raise_exception('no system') }}", {}, 'line 1: .*refuses.*no system'),
        (Record(where='l', messages=TURNS[:2]), talk.CHATML, {}, 'l has nothing to learn'),
        (TALK, talk.CHATML, {'too_long': 'trim'}, "'refuse', 'cut' or 'drop': received 'trim'"),
    ],
)
def test_errors(record: Record, template: str | None, how: dict, message: str):
    with pytest.raises(ValueError, match=message):
        encode(record, template, **how)


def test_a_bare_tokenizer_needs_an_end_of_text_token_and_no_conversation():
    with pytest.raises(ValueError, match='pass eos_id'):
        encode_records(talk.backend(), [Record(where='', text='a')], max_tokens=9)
    with pytest.raises(ValueError, match='needs a transformers tokenizer'):
        encode_records(talk.backend(), [TALK], max_tokens=9, chat_template=talk.CHATML)
    with pytest.raises(ValueError, match='at least one record'):
        encode_records(talk.backend(), [], max_tokens=9)
