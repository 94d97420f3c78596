"The word tokenizer on texts that nobody chose."
import re
from itertools import accumulate

import pytest
from hypothesis import example, given, settings, strategies as st
from llmbook.core import load_text
from llmbook.words import SPLIT_PATTERN, Vocabulary, WordTokenizer, split_words

STORY = load_text()
MARKS = ['<|endoftext|>', '<|unk|>']
LENIENT = WordTokenizer(Vocabulary(split_words(STORY), MARKS), '<|unk|>')
texts = st.text(st.sampled_from('ab \n\t.,--"\'()!?_:;é<|>')) | st.text()


@given(texts)
def test_splitting_loses_white_space_only(text):
    assert ''.join(split_words(text)) == ''.join(p for p in re.split(SPLIT_PATTERN, text) if p.strip())
    assert re.sub(r'\s', '', ''.join(split_words(text))) == re.sub(r'\s', '', text)


@given(st.lists(st.integers(0, LENIENT.vocab_size - 1)))
@example([8, 8])
def test_ids_survive_the_trip_through_text(ids):
    assert LENIENT.encode(LENIENT.decode(ids)) == ids


@settings(max_examples=300)
@given(texts)
def test_lenient_encodes_anything(text):
    ids = LENIENT.encode(text)
    assert all(0 <= i < LENIENT.vocab_size for i in ids)
    plain = text.replace('<|', '').replace('|>', '')
    assert len(LENIENT.encode(plain)) == len(split_words(plain))


def test_strict_names_the_word_and_its_place():
    strict = WordTokenizer(Vocabulary(split_words(STORY)))
    text = STORY[:500] + '\n  zebra!'
    with pytest.raises(ValueError, match=rf"the word 'zebra' at character {text.index('zebra')} .*specials=\['<\|unk\|>'\]"): strict.encode(text)
    for word, start in zip(split_words('a b'), accumulate((2, 2), initial=0)):
        with pytest.raises(ValueError, match=f'at character {start} '): WordTokenizer(Vocabulary('xyz')).encode(' ' * start + word)


def test_ids_outside_the_vocabulary():
    for bad in (-1, LENIENT.vocab_size):
        with pytest.raises(ValueError, match=f'id {bad} at place 2 .* 0 to {LENIENT.vocab_size - 1}'): LENIENT.decode([0, 1, bad])


def test_marks_are_never_cut_apart():
    ids = LENIENT.vocabulary.ids
    assert LENIENT.encode('the<|endoftext|>the') == [ids['the'], ids['<|endoftext|>'], ids['the']]
    assert WordTokenizer(Vocabulary(['a'], ['<a.b>', '<a.b>c'])).encode('a<a.b>a<a.b>ca') == [0, 1, 0, 2, 0]


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"give a list: \['<\|unk\|>'\]"): Vocabulary(['a'], '<|unk|>')
    assert Vocabulary(['a'], (mark for mark in MARKS)).words == ['a', *MARKS]
    for pattern in (r'((,)|\s)', r',', r'(,)|( )'):
        with pytest.raises(ValueError, match='groups; put it in one pair'): WordTokenizer(Vocabulary('ab'), pattern=pattern)
    for bad in ([0.9], '01', ['1']):
        with pytest.raises(TypeError): LENIENT.decode(bad)


def test_the_vocabulary_depends_on_the_text_alone():
    words = split_words(STORY)
    assert Vocabulary(words).words == Vocabulary(reversed(words)).words == Vocabulary(words * 2).words
