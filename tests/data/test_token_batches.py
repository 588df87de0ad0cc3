"""Token arrays: truncation, padding, static shapes, exact weights."""

import numpy as np
import pytest
import tokenizers

from peftjax.data import Tokens, default_messages, encode, epochs, take

VOCAB = {'[PAD]': 7, '[UNK]': 1, '[CLS]': 2, '[SEP]': 3, 'a': 4, 'b': 5, 'c': 6}


def backend():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCAB, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    return tokenizer


def fast():
    transformers = pytest.importorskip('transformers')
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend(), pad_token='[PAD]')


@pytest.mark.parametrize('make', [backend, fast])
def test_encode_cuts_before_the_last_special_token_and_pads(make):
    tokens = encode(make(), ['a b', 'a b c c', 'a b c a b c'], max_tokens=6, lengths=(4, 8))
    expected = [[2, 4, 5, 3, 7, 7], [2, 4, 5, 6, 6, 3], [2, 4, 5, 6, 4, 3]]
    np.testing.assert_array_equal(tokens.input_ids, expected)
    np.testing.assert_array_equal(tokens.attention_mask, np.array(expected) != 7)
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == np.int32


@pytest.mark.parametrize(('count', 'length'), [(2, 4), (3, 8), (6, 8), (7, 11), (30, 11)])
def test_encode_pads_to_the_smallest_length_that_fits(count, length):
    tokens = encode(backend(), [' '.join('a' * count)], max_tokens=11, lengths=(4, 8, 16))
    assert tokens.input_ids.shape == (1, length)


def test_pad_id_can_be_given():
    assert encode(backend(), ['a'], pad_id=9, lengths=(4,)).input_ids[0, -1] == 9


def test_the_tokenizer_is_left_as_it_is():
    tokenizer = backend()
    before = tokenizer.to_str()
    encode(tokenizer, ['a b c'], max_tokens=4)
    assert tokenizer.to_str() == before


def test_what_encode_refuses():
    with pytest.raises(TypeError, match="received one: put 'a b' in a list"):
        encode(backend(), 'a b')
    with pytest.raises(ValueError, match='at least one text'):
        encode(backend(), [])
    with pytest.raises(ValueError, match='room beside 2 special tokens: received 2'):
        encode(backend(), ['a'], max_tokens=2)
    padding = backend()
    padding.enable_padding(pad_id=7)
    with pytest.raises(ValueError, match=r'neither pad nor truncate.*no_padding\(\)'):
        encode(padding, ['a'])
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0, '?': 1}, unk_token='?'))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match='names no padding token: pass pad_id'):
        encode(bare, ['a'])
    with pytest.raises(ValueError, match="every text needs a token, this has none: ' '"):
        encode(bare, ['a', ' '], pad_id=0)


def tokens_of(lengths):
    mask = (np.arange(16) < np.array(lengths)[:, None]).astype(np.int32)
    return Tokens(np.arange(mask.size, dtype=np.int32).reshape(mask.shape) * mask, mask)


def test_take_pads_rows_with_weight_zero_and_valid_input():
    tokens = tokens_of([3, 5, 2, 4])
    batch = take(tokens, np.array([2, 1]), size=4, lengths=(6, 10))
    np.testing.assert_array_equal(batch.index, [2, 1, 2, 2])
    np.testing.assert_array_equal(batch.weights, np.array([1, 1, 0, 0], np.float32))
    assert batch.weights.dtype == np.float32
    np.testing.assert_array_equal(batch.input_ids, tokens.input_ids[batch.index, :6])
    np.testing.assert_array_equal(batch.attention_mask.sum(1), [2, 5, 2, 2])


@pytest.mark.parametrize(('index', 'length'), [([0], 4), ([0, 1], 8), ([2], 16)])
def test_take_cuts_to_the_smallest_length_that_loses_nothing(index, length):
    batch = take(tokens_of([4, 5, 12]), np.array(index), size=2, lengths=(4, 8))
    assert batch.input_ids.shape == batch.attention_mask.shape == (2, length)


@pytest.mark.parametrize('index', [[], [0, 1, 0]])
def test_take_refuses_a_batch_that_does_not_fit(index):
    with pytest.raises(ValueError, match=f'holds 1 to 2 examples: got {len(index)}'):
        take(tokens_of([4, 5]), np.array(index), size=2)


def test_an_epoch_has_few_shapes_and_sums_exactly():
    train, _ = default_messages()
    tokens = encode(backend(), train.texts)
    batches = [take(tokens, i, 16) for i in epochs(330, batch=16, seed=0, epochs=1)]
    assert len({batch.input_ids.shape for batch in batches}) <= 2
    assert {len(batch.weights) for batch in batches} == {16}
    assert sum(batch.weights.sum() for batch in batches) == 330
    per_example = np.arange(336.0)
    total = sum((batch.weights * per_example[batch.index]).sum() for batch in batches)
    assert total == per_example[:330].sum()
