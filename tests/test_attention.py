"Attention against loops, against PyTorch's own in values and gradients, on random unequal sizes; what a mask hides; and everything that must be refused."
import copy, io, math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from llmbook.attention import CausalSelfAttention, SelfAttention, causal_mask, scaled_dot_product_attention, softmax
from llmbook.core import set_seed
from torch import nn
from torch.nn import functional as F

SEEDS = st.integers(0, 2**31)
LEADING = st.lists(st.integers(1, 3), max_size=2).map(tuple)                     # no batch, one, or a batch of batches
same = torch.testing.assert_close
X = torch.tensor([[.43, .15, .89], [.55, .87, .66], [.57, .85, .64], [.22, .58, .33], [.77, .25, .10], [.05, .80, .55]])


@st.composite
def sizes(draw):
    "T, S, C, D, E, all different, so that a wrong transpose shows."
    return draw(st.lists(st.integers(1, 9), min_size=5, max_size=5, unique=True))


def drawn(shape, seed, n=1):
    set_seed(seed)
    return torch.randn(n, *shape, dtype=torch.float64)


# ---- softmax

@settings(max_examples=200)
@given(LEADING, st.integers(1, 9), SEEDS, st.sampled_from([0.1, 1, 50, 1e4]))
def test_softmax_is_pytorchs(leading, S, seed, spread):
    scores = (spread * drawn((*leading, S), seed)[0]).requires_grad_()
    weights, theirs = softmax(scores), scores.softmax(-1)
    same(weights, theirs)
    same(weights.sum(-1), torch.ones(leading, dtype=torch.float64))
    sent_back = torch.randn_like(weights)
    ours, = torch.autograd.grad(weights, scores, sent_back)
    other, = torch.autograd.grad(theirs, scores, sent_back)
    same(ours, other, atol=1e-9, rtol=1e-6)


def test_softmax_where_the_naive_one_fails():
    big = torch.tensor([1e4, 1e4 - 1, -1e4])
    assert (big.exp() / big.exp().sum()).isnan().any()
    same(softmax(big), torch.tensor([1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0]))
    assert softmax(torch.tensor([-torch.inf, 3.0])).tolist() == [0.0, 1.0]
    assert softmax(torch.full((2,), -torch.inf)).isnan().all() and torch.full((2,), -torch.inf).softmax(-1).isnan().all()      # nothing to share out: as in PyTorch
    same(softmax(torch.tensor([[0.0, 0.0], [5.0, 5.0]])), torch.full((2, 2), 0.5))


# ---- the function

def by_loops(q, k, v, allowed=None):
    "One place, one key, one number at a time."
    T, D, S, E = *q.shape, *v.shape
    weights, context = torch.zeros(T, S, dtype=q.dtype), torch.zeros(T, E, dtype=q.dtype)
    for t in range(T):
        powers = {s: math.exp(sum(q[t, d].item() * k[s, d].item() for d in range(D)) / math.sqrt(D)) for s in range(S) if allowed is None or allowed[t, s]}
        for s, p in powers.items():
            weights[t, s] = p / sum(powers.values())
            for e in range(E): context[t, e] += weights[t, s] * v[s, e]
    return context, weights


@settings(max_examples=100)
@given(sizes(), st.booleans(), SEEDS)
def test_matrices_are_loops(size, masked, seed):
    T, S, _, D, E = size
    q, k, v = drawn((T, D), seed)[0], drawn((S, D), seed + 1)[0], drawn((S, E), seed + 2)[0]
    allowed = None
    if masked:
        allowed = torch.rand(T, S) < 0.5
        allowed[torch.arange(T), torch.randint(S, (T,))] = True
    for ours, theirs in zip(scaled_dot_product_attention(q, k, v, allowed), by_loops(q, k, v, allowed)): same(ours, theirs)


@settings(max_examples=200)
@given(LEADING, sizes(), st.sampled_from(['none', 'any', 'per text', 'causal']), SEEDS)
def test_it_is_pytorchs_in_values_and_gradients(leading, size, kind, seed):
    T, S, _, D, E = size
    if kind == 'causal': S = T
    q, k, v = (drawn((*leading, *shape), seed + i)[0].requires_grad_() for i, shape in enumerate([(T, D), (S, D), (S, E)]))
    mask = None
    if kind == 'causal': mask = causal_mask(T)
    elif kind != 'none':
        mask = torch.rand(*(leading if kind == 'per text' else ()), T, S) < 0.6
        mask[..., 0] = True
    context, weights = scaled_dot_product_attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True) if kind == 'causal' else F.scaled_dot_product_attention(q, k, v, mask)
    assert context.shape == (*leading, T, E) and weights.shape == (*leading, T, S)
    same(context, theirs)
    same(weights @ v, context)
    same(weights.sum(-1), torch.ones(*leading, T, dtype=torch.float64))
    sent_back = torch.randn_like(context)
    for ours, other in zip(torch.autograd.grad(context, (q, k, v), sent_back), torch.autograd.grad(theirs, (q, k, v), sent_back)): same(ours, other)


@settings(max_examples=100)
@given(st.integers(1, 9), st.integers(1, 7), SEEDS)
def test_minus_infinity_is_zero_and_renormalise(T, D, seed):
    q, k, v = drawn((T, D), seed, 3).requires_grad_()
    weights = scaled_dot_product_attention(q, k, v, causal_mask(T))[1]
    zeroed = scaled_dot_product_attention(q, k, v)[1] * causal_mask(T)
    renormalised = zeroed / zeroed.sum(-1, keepdim=True)
    same(weights, renormalised)
    sent_back = torch.randn_like(weights)
    for ours, other in zip(torch.autograd.grad(weights, (q, k), sent_back), torch.autograd.grad(renormalised, (q, k), sent_back)): same(ours, other)


def test_a_far_larger_future_is_nothing():
    q, k = torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0], [200.0]])
    weights = scaled_dot_product_attention(q, k, k, torch.tensor([[True, True, False]]))[1]
    same(weights, torch.tensor([[1 / (1 + math.e), math.e / (1 + math.e), 0.0]]))


def test_what_is_hidden_gets_nothing_however_low_the_rest():
    q, k = torch.tensor([[1.0]]), torch.tensor([[-1e30], [0.0]])
    assert scaled_dot_product_attention(q, k, k, torch.tensor([[True, False]]))[1].tolist() == [[1.0, 0.0]]
    assert scaled_dot_product_attention(q, k, k, torch.tensor([[False, False]]))[1].isnan().all()      # nothing to share out


@given(st.integers(0, 9), st.integers(0, 9))
def test_the_mask(T, S):
    if T > S:
        with pytest.raises(ValueError, match=f'^T={T} and S={S}; the queries are the last T of the S places, so T must be from 0 to S'): causal_mask(T, S)
        return
    mask = causal_mask(T, S)
    assert mask.shape == (T, S) and mask.dtype == torch.bool
    for t in range(T):
        for s in range(S): assert mask[t, s].item() == (s <= S - T + t)
    assert torch.equal(causal_mask(S)[S - T:], mask)
    with pytest.raises(ValueError, match='T=-1'): causal_mask(-1)


def test_the_mask_is_made_where_it_is_used():
    assert causal_mask(3, device='meta').is_meta and causal_mask(2, 4, torch.device('cpu')).device.type == 'cpu'


@pytest.mark.parametrize('dtype', [torch.float32, torch.int64, torch.uint8])
def test_a_mask_of_another_kind(dtype):
    with pytest.raises(TypeError, match=rf'mask has dtype {dtype}; give torch\.bool, True where looking is allowed: mask\.bool\(\)'):
        scaled_dot_product_attention(X, X, X, torch.ones(6, 6, dtype=dtype))


# ---- the numbers of the page

def test_the_numbers_of_the_page():
    close = lambda values, expected: same(values, torch.tensor(expected), rtol=0, atol=5.1e-5)
    scores, weights = X @ X.T, softmax(X @ X.T)
    close(scores[1], [0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865])
    close(scores[1] / scores[1].sum(), [0.1455, 0.2278, 0.2249, 0.1285, 0.1077, 0.1656])
    close(weights[1], [0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581])
    close(weights[0], [0.2098, 0.2006, 0.1981, 0.1242, 0.1220, 0.1452])
    close((weights @ X)[1], [0.4419, 0.6515, 0.5683])
    same(scaled_dot_product_attention(X * math.sqrt(3), X, X)[0], weights @ X)


# ---- the layers

def layers(C, D, T, bias=False, dropout=0.0):
    set_seed(123)
    plain = SelfAttention(C, D, bias).double()
    causal = CausalSelfAttention(C, D, T, dropout, bias).double()
    causal.load_state_dict(plain.state_dict())
    return plain, causal


@settings(max_examples=100)
@given(LEADING, sizes(), st.booleans(), SEEDS)
def test_a_layer_is_three_matrices_and_the_function(leading, size, bias, seed):
    T, _, C, D, _ = size
    x = drawn((*leading, T, C), seed)[0]
    for layer, causal in zip(layers(C, D, T, bias), (False, True)):
        layer.zero_grad()
        q, k, v = (F.linear(x, part.weight, part.bias) for part in (layer.query, layer.key, layer.value))
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        context, weights = layer.attend(x)
        assert context.shape == (*leading, T, D) and weights.shape == (*leading, T, T)
        same(context, theirs)
        assert torch.equal(layer(x), context)
        sent_back, parameters = torch.randn_like(context), list(layer.parameters())
        assert len(parameters) == (6 if bias else 3)
        for ours, other in zip(torch.autograd.grad(context, parameters, sent_back), torch.autograd.grad(theirs, parameters, sent_back)): same(ours, other)


@settings(max_examples=50)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=2, unique=True), SEEDS)
def test_one_head_is_multihead_attention_of_pytorch(size, seed):
    "PyTorch's module has queries, keys and values as wide as the input, and a projection behind them."
    T, C = size
    plain, causal = layers(C, C, T, bias=True)
    theirs = nn.MultiheadAttention(C, 1, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([plain.query.weight, plain.key.weight, plain.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([plain.query.bias, plain.key.bias, plain.value.bias]))
        theirs.out_proj.weight.copy_(torch.eye(C)); theirs.out_proj.bias.zero_()
    x = drawn((2, T, C), seed)[0]
    for layer, forbidden in ((plain, None), (causal, ~causal_mask(T))):
        context, weights = theirs(x, x, x, attn_mask=forbidden)
        for ours, other in zip(layer.attend(x), (context, weights)): same(ours, other)


@settings(max_examples=100)
@given(st.integers(2, 9), SEEDS, st.data())
def test_the_future_is_hidden(T, seed, data):
    plain, causal = layers(4, 3, T)
    t = data.draw(st.integers(0, T - 2))
    x = drawn((2, T, 4), seed)[0]
    other = x.clone()
    other[:, t + 1:] = 5 * torch.randn_like(other[:, t + 1:])
    assert torch.equal(causal(x)[:, :t + 1], causal(other)[:, :t + 1])
    assert not torch.equal(plain(x)[:, :t + 1], plain(other)[:, :t + 1])
    same(causal(x[:, :t + 1]), causal(x)[:, :t + 1])                             # a text alone and as the beginning of another
    leaf = x[0].clone().requires_grad_()
    causal(leaf)[t].sum().backward()
    reach = leaf.grad.abs().sum(-1)
    assert reach[t + 1:].eq(0).all() and reach[:t + 1].gt(0).all()


@given(st.integers(1, 9), SEEDS)
def test_without_a_mask_order_is_not_seen(T, seed):
    plain, causal = layers(4, 3, T)
    x, order = drawn((T, 4), seed)[0], torch.randperm(T)
    same(plain(x[order]), plain(x)[order])
    same(causal(x)[-1], plain(x)[-1])                                            # the last place sees all


def test_dropout():
    _, causal = layers(4, 3, 50, dropout=0.3)
    x = drawn((50, 4), 1)[0]
    assert not torch.equal(causal(x), causal(x))
    causal.eval()
    assert torch.equal(causal(x), causal(x))
    same(causal(x), layers(4, 3, 50)[1](x))
    ones = torch.ones(400, 300, dtype=torch.float64)
    dropped, weights = scaled_dot_product_attention(torch.zeros(400, 2).double(), torch.zeros(300, 2).double(), torch.eye(300).double(), dropout=0.3)
    same(weights, ones / 300)                                                    # they are given as they were before
    same(dropped[dropped != 0], torch.full_like(dropped[dropped != 0], 1 / 300 / 0.7))
    assert math.isclose((dropped == 0).double().mean().item(), 0.3, abs_tol=0.01)


def test_dropout_takes_single_weights():
    q, k, v = torch.zeros(40, 2).double(), torch.zeros(30, 2).double(), torch.randn(30, 5).double()
    set_seed(1)
    dropped = scaled_dot_product_attention(q, k, torch.eye(30).double(), dropout=0.3)[0]
    set_seed(1)
    same(scaled_dot_product_attention(q, k, v, dropout=0.3)[0], dropped @ v)     # not numbers of the context
    assert dropped.ne(0).any(0).all() and dropped.ne(0).any(1).all()             # nor whole columns or rows


def test_nothing_is_added_unasked():
    for layer in (SelfAttention(4, 3), CausalSelfAttention(4, 3, 6)): assert len(list(layer.parameters())) == 3
    assert CausalSelfAttention(4, 3, 6).dropout == 0.0
    assert type(CausalSelfAttention(4, 3, 6, 0).dropout) is float


def test_a_state_from_a_file_and_a_copy():
    layer, file = SelfAttention(4, 3, bias=True), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    causal = CausalSelfAttention(4, 3, 5, bias=True)
    causal.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 4)
    assert torch.equal(causal(x)[-1:], layer(x)[-1:]) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert sorted(layer.state_dict()) == sorted(f'{n}.{p}' for n in ('query', 'key', 'value') for p in ('weight', 'bias'))      # no mask among them


def test_compiled_in_one_piece_and_without_memory():
    torch._dynamo.reset()
    layer = CausalSelfAttention(4, 3, 9)
    compiled = torch.compile(layer, backend='eager', fullgraph=True, dynamic=True)
    for T in (5, 7, 9):
        x = torch.randn(2, T, 4)
        same(compiled(x), layer(x))
    torch._dynamo.reset()
    with torch.device('meta'): assert CausalSelfAttention(4, 3, 9)(torch.empty(2, 5, 4)).shape == (2, 5, 3)


def test_the_mask_lies_where_x_lies():
    layer, x = CausalSelfAttention(4, 3, 9), torch.randn(2, 5, 4)
    expected = layer(x)
    with torch.device('meta'): assert torch.equal(layer(x), expected)            # whatever the default device
    assert layer.to('meta')(x.to('meta')).is_meta


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats(dtype):
    layer = CausalSelfAttention(4, 3, 5).to(dtype)
    assert layer(torch.randn(5, 4, dtype=dtype)).dtype == dtype


# ---- what is refused

@pytest.mark.parametrize('layer', [SelfAttention(4, 3), CausalSelfAttention(4, 3, 6)], ids=['plain', 'causal'])
def test_what_is_no_row_of_vectors(layer):
    for bad in (torch.int64, torch.int32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf'^x has dtype {bad}; attention takes vectors of floats.*TokenEmbedding does'): layer(torch.ones(5, 4, dtype=bad))
    for bad in (X.tolist(), None, 3):
        with pytest.raises(TypeError, match=rf'^x is a {type(bad).__name__}; give a tensor of shape \(\.\.\., T, 4\)'): layer(bad)
    for shape in ((5, 3), (4, 5), (4,), (), (2, 4, 1)):
        with pytest.raises(ValueError, match='^x has shape .*must be n_embd=4') as caught: layer(torch.ones(shape))
        assert str(shape) in str(caught.value)
    assert layer(torch.ones(0, 5, 4)).shape == (0, 5, 3)


def test_a_text_longer_than_the_context():
    layer = CausalSelfAttention(4, 3, 6)
    assert layer(torch.ones(2, 6, 4)).shape == (2, 6, 3)
    with pytest.raises(ValueError, match=r'^x has 7 tokens, and context_length=6 allows no more than that; cut the text, as ids\[\.\.\., -6:\].*context_length=7$'): layer(torch.ones(2, 7, 4))


def test_sizes_and_shares():
    for make, names in ((SelfAttention, ('n_embd', 'head_size')), (CausalSelfAttention, ('n_embd', 'head_size', 'context_length'))):
        for i, name in enumerate(names):
            args = [4] * len(names)
            for bad, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)):
                args[i] = bad
                with pytest.raises(error, match=f'^{name}={bad}'): make(*args)
    for bad in (1, 1.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf'^dropout={bad} is not in \[0, 1\)'): CausalSelfAttention(4, 3, 6, bad)
    for bad in (True, '0.1', None):
        with pytest.raises(TypeError, match=f'^dropout={bad!r} is not a number'): CausalSelfAttention(4, 3, 6, bad)
    assert CausalSelfAttention(4, 3, 6, 0).dropout == 0.0
