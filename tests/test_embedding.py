"Both tables against the one-hot product and PyTorch's own, values and gradients, on random sizes; and everything that must be refused."
import copy, io, math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook import embedding
from llmbook.bpe import gpt2_tokenizer
from llmbook.core import count_parameters, load_text, set_seed
from llmbook.embedding import PositionEmbedding, TokenEmbedding
from torch import nn
from torch.nn import functional as F

SIZES = st.tuples(st.integers(1, 13), st.integers(1, 7))                         # rows, columns
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)                      # from one id without a dimension to three dimensions
SEEDS = st.integers(0, 2**31)


class Input(nn.Module):
    "What a GPT does with ids first."
    def __init__(self, vocab_size=7, context_length=11, n_embd=3):
        super().__init__()
        self.token_embedding, self.position_embedding = TokenEmbedding(vocab_size, n_embd), PositionEmbedding(context_length, n_embd)

    def forward(self, ids, start=0): return self.token_embedding(ids) + self.position_embedding(ids.shape[-1], start)


def drawn(sizes, shape, seed, dtype=torch.int64):
    "A table, ids of some shape and a gradient for each of their vectors."
    set_seed(seed)
    table = TokenEmbedding(*sizes)
    return table, torch.randint(sizes[0], shape, dtype=dtype), torch.randn(*shape, sizes[1])


# ---- tokens

@settings(max_examples=300)
@given(SIZES, SHAPES, SEEDS, st.sampled_from([torch.int64, torch.int32]))
@example((3, 2), (4, 5), 0, torch.int64)                                         # few rows, each used often
@example((13, 2), (), 0, torch.int32)
def test_look_up_is_the_one_hot_product(sizes, shape, seed, dtype):
    table, ids, sent_back = drawn(sizes, shape, seed, dtype)
    one_hot, weight = F.one_hot(ids.long(), sizes[0]).float(), table.weight.detach().clone().requires_grad_()
    theirs = table.weight.detach().clone().requires_grad_()
    product, reference = one_hot @ weight, F.embedding(ids, theirs)
    vectors = table(ids)
    assert vectors.shape == (*shape, sizes[1])
    assert torch.equal(vectors, product) and torch.equal(vectors, reference)
    for result in (vectors, product, reference): result.backward(sent_back)
    assert torch.equal(table.weight.grad, theirs.grad)
    torch.testing.assert_close(table.weight.grad, weight.grad, rtol=1e-5, atol=1e-5)


@settings(max_examples=200)
@given(SIZES, SHAPES, SEEDS)
def test_a_row_gets_the_sum_of_its_places_and_nothing_else(sizes, shape, seed):
    table, ids, sent_back = drawn(sizes, shape, seed)
    table(ids).backward(sent_back)
    by_hand = [[0.0] * sizes[1] for _ in range(sizes[0])]
    for i, row in zip(ids.flatten().tolist(), sent_back.reshape(-1, sizes[1]).tolist()):
        for j, g in enumerate(row): by_hand[i][j] += g
    torch.testing.assert_close(table.weight.grad, torch.tensor(by_hand), rtol=1e-5, atol=1e-5)
    unused = [i for i in range(sizes[0]) if i not in set(ids.flatten().tolist())]
    assert table.weight.grad[unused].eq(0).all()


@given(SIZES, SEEDS)
def test_the_start_is_pytorchs(sizes, seed):
    set_seed(seed)
    theirs = nn.Embedding(*sizes)
    for ours in (TokenEmbedding, PositionEmbedding):
        set_seed(seed)
        assert torch.equal(ours(*sizes).weight, theirs.weight)


def test_the_numbers_of_the_page():
    set_seed(123)
    weight = TokenEmbedding(6, 3).weight.detach()
    torch.testing.assert_close(weight[0], torch.tensor([0.3374, -0.1778, -0.1690]), rtol=0, atol=5.1e-5)
    torch.testing.assert_close(weight[3], torch.tensor([-0.4015, 0.9666, -1.1481]), rtol=0, atol=5.1e-5)


def test_std_of_the_start():
    set_seed(123)
    for table in (TokenEmbedding(400, 50, std=0.02), PositionEmbedding(400, 50, std=0.02)):
        assert math.isclose(table.weight.std().item(), 0.02, rel_tol=0.03) and abs(table.weight.mean().item()) < 1e-3
    assert TokenEmbedding(5, 2, std=0.0).weight.eq(0).all()


def test_gpt2_sized_input():
    set_seed(123)
    tokenizer = gpt2_tokenizer()
    ids = torch.tensor(tokenizer.encode(load_text())[:32]).reshape(8, 4)
    assert ids[0].tolist() == [40, 367, 2885, 1464] and ids[-1].tolist() == [284, 3285, 326, 11]
    model = Input(tokenizer.vocab_size, 4, 256)
    assert model.token_embedding(ids).shape == model(ids).shape == (8, 4, 256)
    assert model.position_embedding(4).shape == (4, 256)
    assert torch.equal(model(ids)[5, 2], model.token_embedding.weight[ids[5, 2]] + model.position_embedding.weight[2])


# ---- positions

@settings(max_examples=300)
@given(SIZES, st.data())
def test_positions_are_rows_and_their_gradients(sizes, data):
    table = PositionEmbedding(*sizes)
    start = data.draw(st.integers(0, sizes[0]))
    T = data.draw(st.integers(0, sizes[0] - start))
    rows = table(T, start)
    assert rows.shape == (T, sizes[1])
    assert torch.equal(rows, F.embedding(torch.arange(start, start + T), table.weight))
    sent_back = torch.randn(2, T, sizes[1])                                      # broadcast over two texts
    (torch.zeros(2, T, sizes[1]) + rows).backward(sent_back)
    expected = torch.zeros(sizes)
    expected[start:start + T] = sent_back.sum(0)
    torch.testing.assert_close(table.weight.grad, expected)


@given(st.integers(1, 11), st.data())
def test_a_text_in_parts_gets_the_same_vectors_as_in_one(T, data):
    "What generation with a cache relies on."
    model, ids = Input(), torch.randint(7, (2, T))
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4)))
    parts = [model(ids[:, a:b], start=a) for a, b in zip([0, *cuts], [*cuts, T])]
    assert torch.equal(torch.cat(parts, dim=1), model(ids))


def test_order_is_seen_with_positions_only():
    set_seed(123)
    model, ids = Input(), torch.tensor([2, 5, 0])
    mix = lambda x: (x @ x.T).softmax(-1) @ x
    torch.testing.assert_close(mix(model.token_embedding(ids.flip(0))), mix(model.token_embedding(ids)).flip(0))
    assert (mix(model(ids.flip(0))) - mix(model(ids)).flip(0)).abs().max() > 0.1


# ---- what is refused

@settings(max_examples=200)
@given(SIZES, SHAPES.filter(lambda shape: math.prod(shape)), SEEDS, st.data())
def test_the_first_id_without_a_row_is_named(sizes, shape, seed, data):
    table, ids, _ = drawn(sizes, shape, seed)
    at = sorted(data.draw(st.sets(st.integers(0, ids.numel() - 1), min_size=1)))
    bad = data.draw(st.lists(st.sampled_from([-100, -1, sizes[0], sizes[0] + 1, 50_257, 2**40]), min_size=len(at), max_size=len(at)))
    ids.view(-1)[at] = torch.tensor(bad)
    place = np.unravel_index(at[0], shape)
    with pytest.raises(ValueError) as caught: table(ids)
    message = str(caught.value)
    where = f"ids[{', '.join(map(str, place))}]" if shape else 'ids'
    more = f' ({len(at) - 1} more like it)' if len(at) > 1 else ''
    assert message.startswith(f'{where} is {bad[0]}{more}; allowed are 0 to {sizes[0] - 1}, because vocab_size={sizes[0]}; ')
    assert ('a mark, for padding' if bad[0] < 0 else 'vocab_size=tokenizer.vocab_size') in message
    assert caught.value.__suppress_context__


def test_a_device_that_refuses_nothing_is_looked_at_first(monkeypatch):
    "Some devices return zeros for an id without a row; here PyTorch does, on the CPU."
    table = TokenEmbedding(5, 2)
    monkeypatch.setattr(embedding.F, 'embedding', lambda ids, weight: torch.zeros(*ids.shape, weight.shape[1]))
    assert table(torch.tensor([5])).eq(0).all()                                  # this is how it would go wrong
    monkeypatch.setattr(embedding, '_REFUSE_THEMSELVES', {'cuda', 'meta'})
    with pytest.raises(ValueError, match=r'ids\[0\] is 5; allowed are 0 to 4'): table(torch.tensor([5]))
    assert table(torch.tensor([4])).shape == (1, 2)


def test_no_look_where_it_costs():
    "On the CPU nothing is looked at unless PyTorch has refused; on a graphics card never, because it would have to wait."
    assert {'cpu', 'cuda', 'meta'} == embedding._REFUSE_THEMSELVES
    original, calls = embedding._refuse_strangers, []
    embedding._refuse_strangers = lambda *args: calls.append(args) or original(*args)
    try:
        TokenEmbedding(5, 2)(torch.tensor([0, 4]))
        assert not calls
        with pytest.raises(ValueError, match='is 5'): TokenEmbedding(5, 2)(torch.tensor([5]))
        assert len(calls) == 1
    finally: embedding._refuse_strangers = original


def test_an_index_error_with_another_cause_is_passed_on(monkeypatch):
    def fails(*args): raise IndexError('another cause')
    monkeypatch.setattr(embedding.F, 'embedding', fails)
    with pytest.raises(IndexError, match='another cause'): TokenEmbedding(5, 2)(torch.tensor([4]))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bool, torch.uint8, torch.int16, torch.uint16, torch.complex64])
def test_what_cannot_be_ids(dtype):
    with pytest.raises(TypeError, match=rf'ids has dtype {dtype}; allowed are torch.int64 and torch.int32.*ids\.long\(\)'):
        TokenEmbedding(5, 2)(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize('ids', [[1, 2], (1,), 3, np.array([1, 2]), None])
def test_what_is_no_tensor(ids):
    with pytest.raises(TypeError, match=rf'ids is a {type(ids).__name__}; give a tensor: torch\.tensor\(ids\)'): TokenEmbedding(5, 2)(ids)


@pytest.mark.parametrize('make, first', [(TokenEmbedding, 'vocab_size'), (PositionEmbedding, 'context_length')])
def test_sizes(make, first):
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f'^{first}={bad} is too small'): make(bad, 4)
        with pytest.raises(ValueError, match=f'^n_embd={bad} is too small'): make(4, bad)
    for bad in (2.0, True, '3', None, math.nan):
        with pytest.raises(TypeError, match=f'^{first}={bad!r} is not a whole number'): make(bad, 4)
        with pytest.raises(TypeError, match=f'^n_embd={bad!r} is not a whole number'): make(4, bad)
    assert make(np.int64(5), np.int32(2)).weight.shape == (5, 2)


@given(st.integers(1, 20), st.integers(0, 25), st.integers(0, 25))
@example(4, 1, 4)
@example(4, 5, 0)
@example(4, 4, 0)
@example(4, 0, 5)
def test_positions_beyond_the_context(context_length, T, start):
    table = PositionEmbedding(context_length, 2)
    if start + T <= context_length:
        assert table(T, start).shape == (T, 2)
        return
    with pytest.raises(ValueError) as caught: table(T, start)
    message = str(caught.value)
    assert message.startswith(f'position {max(start, context_length)} has no vector: T={T} and start={start} ask for {start} to {start + T - 1}, ')
    for part in (f'context_length={context_length} allows 0 to {context_length - 1}', f'ids[..., -{context_length}:]', f'context_length={start + T}'): assert part in message


def test_what_is_no_position():
    table = PositionEmbedding(5, 2)
    for bad in (torch.tensor([1, 2]), torch.tensor(2), 2.0, True, '2', None, torch.Size([2, 3])):
        with pytest.raises(TypeError, match=rf'^T is a {type(bad).__name__}; give an int, such as T=ids\.shape\[-1\]'): table(bad)
        with pytest.raises(TypeError, match=rf'^start is a {type(bad).__name__}; give an int'): table(2, bad)
    for T, start, name in ((-1, 0, 'T=-1'), (2, -1, 'start=-1'), (-2, 3, 'T=-2')):
        with pytest.raises(ValueError, match=f'^{name} is negative; positions are counted from 0'): table(T, start)


# ---- as parts of a model

def test_what_later_pages_rely_on():
    model = Input()
    assert sorted(model.state_dict()) == ['position_embedding.weight', 'token_embedding.weight']
    assert isinstance(model.token_embedding.weight, nn.Parameter) and isinstance(model.position_embedding.weight, nn.Parameter)
    assert (model.token_embedding.vocab_size, model.token_embedding.n_embd) == (7, 3)
    assert (model.position_embedding.context_length, model.position_embedding.n_embd) == (11, 3)
    model.head = nn.Linear(3, 7, bias=False)
    model.head.weight = model.token_embedding.weight                             # shared, not copied
    assert count_parameters(model) == 7 * 3 + 11 * 3
    assert repr(model.token_embedding) == 'TokenEmbedding(vocab_size=7, n_embd=3)'
    assert repr(model.position_embedding) == 'PositionEmbedding(context_length=11, n_embd=3)'


def test_saved_loaded_and_copied():
    model, file = Input(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, ids = Input(), torch.randint(7, (2, 5))
    assert not torch.equal(other(ids), model(ids))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(ids), model(ids)) and torch.equal(copy.deepcopy(model)(ids), model(ids))
    wide = Input(n_embd=4)
    with pytest.raises(RuntimeError, match='size mismatch'): wide.load_state_dict(model.state_dict())


def test_without_memory():
    with torch.device('meta'):
        model = Input(50_257, 1024, 768)
        x = model(torch.zeros(2, 5, dtype=torch.int64))
    assert x.is_meta and x.shape == (2, 5, 768)
    assert count_parameters(model) == (50_257 + 1024) * 768


@pytest.mark.parametrize('dynamic', [None, True])
def test_compiled_in_one_piece(dynamic):
    torch._dynamo.reset()
    model = Input()
    compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=dynamic)
    for T, start in ((4, 0), (5, 1), (1, 7), (2, 9), (11, 0)):
        ids = torch.randint(7, (2, T))
        assert torch.equal(compiled(ids, start), model(ids, start))
    compiled = torch.compile(model, backend='eager', dynamic=dynamic)
    with pytest.raises(ValueError, match='position 11 has no vector'): compiled(torch.randint(7, (2, 12)))
    torch._dynamo.reset()
