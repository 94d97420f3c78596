"Norm, activation, feed-forward layer and block against PyTorch's own and against loops, values and gradients, on random sizes; and what is refused."
import copy, io, math
from statistics import NormalDist

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook.core import count_parameters, set_seed
from llmbook.transformer import FeedForward, GELU, LayerNorm, TransformerBlock
from torch import nn
from torch.nn import functional as F

WIDTHS = st.integers(1, 13)
SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)                      # from a single vector to three dimensions of them
SEEDS = st.integers(0, 2**31)
BLOCKS = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda s: (s[0] * s[1], s[0]))      # (n_embd, n_head)
close = torch.testing.assert_close


def shaken(module, seed=0):
    "The module with all its parameters random, so that no 0 or 1 of the start hides anything; in double precision."
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters(): p.data = torch.randn(p.shape, generator=generator)
    return module.double()


def block_of(n_embd=6, n_head=2, context_length=7, dropout=0.0, bias=True, qkv_bias=None, seed=0):
    return shaken(TransformerBlock(n_embd, n_head, context_length, dropout, bias, qkv_bias), seed)


# ---- layer norm

@settings(max_examples=300)
@given(WIDTHS, SHAPES, SEEDS, st.booleans(), st.sampled_from([1e-5, 1e-2, 1.0]))
@example(1, (2,), 0, True, 1e-5)                                                 # a single column: only the shift is left
def test_norm_is_pytorchs_values_and_gradients(C, shape, seed, bias, eps):
    ours, theirs = shaken(LayerNorm(C, bias, eps), seed), nn.LayerNorm(C, eps, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*shape, C, dtype=torch.float64) * 3 + 1
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(torch.ones_like(y).cumsum(-1))
        results.append([y, leaf.grad, *(p.grad for p in norm.parameters())])
    for a, b in zip(*results, strict=True): close(a, b)


@settings(max_examples=200)
@given(WIDTHS, SEEDS, st.sampled_from([1e-5, 1e-2, 1.0]))
def test_norm_by_hand(C, seed, eps):
    norm = shaken(LayerNorm(C, eps=eps), seed)
    x, y = (x := torch.randn(2, C, dtype=torch.float64)), norm(x)
    for row, result in zip(x.tolist(), y.tolist()):
        mean = math.fsum(row) / C
        variance = math.fsum((v - mean)**2 for v in row) / C                     # by C, not by C - 1
        for v, w, b, r in zip(row, norm.weight.tolist(), norm.bias.tolist(), result):
            assert math.isclose(r, (v - mean) / math.sqrt(variance + eps) * w + b, rel_tol=1e-9, abs_tol=1e-9)


def test_the_norm_of_the_page():
    y = LayerNorm(4)(torch.tensor([[1., 2., 3., 6.], [15., 25., 35., 65.]]))
    close(y, torch.tensor([[-1.0690, -0.5345, 0.0, 1.6036]] * 2), atol=2e-4, rtol=0)
    assert LayerNorm(4)(torch.full((1, 4), 7.)).eq(0).all()


def test_norm_asks_nobody_but_the_token():
    norm, x = shaken(LayerNorm(5)), torch.randn(2, 3, 5, dtype=torch.float64)
    other = torch.randn(2, 3, 5, dtype=torch.float64)
    other[1, 1] = x[1, 1]
    assert torch.equal(norm(x)[1, 1], norm(other)[1, 1])
    close(norm(3 * x + 2), norm(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(norm(x), norm.eval()(x))


def test_norm_starts_as_nothing_but_a_norm():
    norm = LayerNorm(3)
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all() and norm.eps == 1e-5
    assert sorted(norm.state_dict()) == ['bias', 'weight'] and sorted(LayerNorm(3, bias=False).state_dict()) == ['weight']
    assert isinstance(norm.weight, nn.Parameter) and isinstance(norm.bias, nn.Parameter) and LayerNorm(3, bias=False).bias is None
    assert repr(LayerNorm(3, bias=False)) == 'LayerNorm(n_embd=3, bias=False)' and repr(norm) == 'LayerNorm(n_embd=3, bias=True)'


# ---- GELU

@settings(max_examples=300)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6))
@example([-1000.0, -5.0, -2.7, -0.75, 0.0, 0.75, 2.7, 5.0, 1000.0])
def test_gelu_by_hand(numbers):
    "The tanh form with the published constant, and within half a thousandth of x times the probability."
    for v, r in zip(numbers, GELU()(torch.tensor(numbers, dtype=torch.float64)).tolist(), strict=True):
        assert math.isclose(r, v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2, rel_tol=1e-9, abs_tol=1e-12)
        assert abs(r - v * NormalDist().cdf(v)) < 4.74e-4


def test_gelu_is_the_tanh_form_of_pytorch_and_not_the_exact_one():
    x = torch.linspace(-6, 6, 1201, dtype=torch.float64, requires_grad=True)
    theirs = x.detach().clone().requires_grad_()
    ours = GELU()(x)
    ours.sum().backward()
    F.gelu(theirs, approximate='tanh').sum().backward()
    close(ours, F.gelu(theirs, approximate='tanh'))
    close(x.grad, theirs.grad)
    off = (ours - F.gelu(x)).abs()
    assert 4.7e-4 < off.max() < 4.8e-4 and abs(abs(x[off.argmax()].item()) - 2.7) < 0.02
    assert not list(GELU().parameters())


# ---- feed-forward

@settings(max_examples=200)
@given(WIDTHS, SHAPES, SEEDS, st.booleans())
def test_feed_forward_by_hand(C, shape, seed, bias):
    layer = shaken(FeedForward(C, bias), seed)
    x = torch.randn(*shape, C, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    hidden = F.gelu(x @ layer.expand.weight.T + (layer.expand.bias if bias else zero), approximate='tanh')
    close(layer(x), hidden @ layer.contract.weight.T + (layer.contract.bias if bias else zero))
    assert layer.expand.weight.shape == (4 * C, C) and layer.contract.weight.shape == (C, 4 * C)
    assert count_parameters(layer) == 8 * C**2 + 5 * C * bias
    assert sorted(layer.state_dict()) == sorted(f'{part}.{p}' for part in ('expand', 'contract') for p in ('weight', *['bias'] * bias))


# ---- the block

def written_out(block, x):
    "The block from its parameters alone, with plain loops over texts and heads."
    p, H = dict(block.named_parameters()), block.attention.n_head
    def linear(x, name): return x @ p[f'{name}.weight'].T + p.get(f'{name}.bias', 0)
    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f'{name}.weight'] + p.get(f'{name}.bias', 0)
    texts = []
    for text in x:
        q, k, v = linear(norm(text, 'attention_norm'), 'attention.qkv').chunk(3, dim=-1)
        heads = []
        for a, b, c in zip(*(y.chunk(H, dim=-1) for y in (q, k, v))):
            scores = a @ b.T / a.shape[-1]**0.5
            heads.append(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1) @ c)
        text = text + linear(torch.cat(heads, dim=-1), 'attention.projection')
        hidden = linear(norm(text, 'feed_forward_norm'), 'feed_forward.expand')
        texts.append(text + linear(F.gelu(hidden, approximate='tanh'), 'feed_forward.contract'))
    return torch.stack(texts)


@settings(max_examples=150, deadline=None)
@given(BLOCKS, st.integers(1, 3), st.integers(1, 7), SEEDS, st.booleans(), st.sampled_from([None, True, False]))
@example((6, 3), 2, 5, 0, True, None)
def test_block_written_out_values_and_gradients(sizes, B, T, seed, bias, qkv_bias):
    block = block_of(*sizes, 7, 0.0, bias, qkv_bias, seed)
    x = torch.randn(B, T, sizes[0], dtype=torch.float64)
    sent_back, results = torch.randn_like(x), []
    for f in (block, lambda x: written_out(block, x)):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.backward(sent_back)
        results.append([y, leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for a, b in zip(*results, strict=True): close(a, b, rtol=1e-6, atol=1e-7)
    assert results[0][0].shape == x.shape


@settings(max_examples=100, deadline=None)
@given(BLOCKS, SEEDS, st.booleans(), st.sampled_from([None, True, False]))
def test_the_size_of_a_block(sizes, seed, bias, qkv_bias):
    C, qkv = sizes[0], bias if qkv_bias is None else qkv_bias
    names = dict(TransformerBlock(*sizes, 5, 0.0, bias, qkv_bias).named_parameters())
    assert sum(p.numel() for p in names.values()) == 12 * C**2 + 3 * C * qkv + 8 * C * bias + 2 * C
    assert ('attention.qkv.bias' in names) == qkv and all(bias == (f'{n}.bias' in names) for n in (
        'attention.projection', 'feed_forward.expand', 'feed_forward.contract', 'attention_norm', 'feed_forward_norm'))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 6), SEEDS)
def test_the_future_changes_nothing(at, seed):
    block, x = block_of(seed=seed), torch.randn(2, 7, 6, dtype=torch.float64)
    other = x.clone()
    other[:, at:] = torch.randn(2, 7 - at, 6, dtype=torch.float64)
    close(block(other)[:, :at], block(x)[:, :at])
    close(block(x[:, :at + 1]), block(x)[:, :at + 1])                            # nor does it matter whether there is one
    assert (block(other)[:, at] - block(x)[:, at]).abs().max() > 1e-3


def test_texts_do_not_meet():
    block, x = block_of(), torch.randn(3, 4, 6, dtype=torch.float64)
    close(block(x), torch.stack([block(text) for text in x]))
    close(block(x[[2, 0, 1]]), block(x)[[2, 0, 1]])


def test_one_block_sees_a_bag_of_earlier_tokens_and_two_do_not():
    one, two, x = block_of(seed=1), block_of(seed=2), torch.randn(1, 5, 6, dtype=torch.float64)
    swapped = x[:, [1, 0, 2, 3, 4]]
    close(one(swapped)[:, 2:], one(x)[:, 2:])
    assert (two(one(swapped)) - two(one(x)))[:, -1].abs().max() > 1e-3


def test_a_block_of_zeros_is_a_wire():
    "With nothing to add, the input and its gradient pass unchanged: no norm stands on the line."
    block, x = block_of(), torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    for layer in (block.attention.projection, block.feed_forward.contract):
        for p in layer.parameters(): nn.init.zeros_(p)
    y, sent_back = block(x), torch.randn(2, 4, 6, dtype=torch.float64)
    y.backward(sent_back)
    assert torch.equal(y, x) and torch.equal(x.grad, sent_back)


def test_gradients_reach_the_first_layer_only_with_shortcuts():
    def first_and_last(shortcut):
        set_seed(123)
        layers, gelu = [nn.Linear(32, 32).double() for _ in range(24)], GELU()
        x = torch.randn(8, 32, dtype=torch.float64)
        for linear in layers: x = x * shortcut + gelu(linear(x))
        F.layer_norm(x, (32,)).square().sum(-1).log().mean().backward()
        return [layers[i].weight.grad.norm().item() for i in (0, -1)]
    (lost, last), (arrived, top) = first_and_last(0), first_and_last(1)
    assert lost < 1e-8 * last and arrived > 0.01 * top


# ---- dropout

def test_dropout_is_in_three_places_and_only_in_training():
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    block, plain = block_of(dropout=0.5), block_of()
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    close(block(x), plain(x))
    block.train()
    block.attention.dropout = 0.0
    set_seed(3)
    y = block(x)
    set_seed(3)
    middle = x + F.dropout(block.attention(block.attention_norm(x)), 0.5)
    close(y, middle + F.dropout(block.feed_forward(block.feed_forward_norm(middle)), 0.5))
    block.dropout.p, block.attention.dropout = 0.0, 0.5
    assert not torch.equal(block(x), block(x))                                   # inside attention, too
    assert (block.attention.dropout, TransformerBlock(6, 2, 3).dropout.p, TransformerBlock(6, 2, 3, 0.25).attention.dropout) == (0.5, 0.0, 0.25)


def test_dropped_numbers_never_include_the_stream():
    block = block_of(dropout=0.9)
    for layer in (block.attention.projection, block.feed_forward.contract):
        for p in layer.parameters(): nn.init.zeros_(p)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.equal(block(x), x)


# ---- what is refused

@pytest.mark.parametrize('make', [LayerNorm, FeedForward, lambda n: TransformerBlock(n, 1, 4)])
def test_widths(make):
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f'^n_embd={bad} is too small'): make(bad)
    for bad in (2.0, True, '3', None):
        with pytest.raises(TypeError, match=f'^n_embd={bad!r} is not a whole number'): make(bad)


def test_what_a_block_refuses():
    with pytest.raises(ValueError, match='n_embd=10.*n_head=4'): TransformerBlock(10, 4, 8)
    with pytest.raises(ValueError, match='n_head=0'): TransformerBlock(8, 0, 8)
    with pytest.raises(ValueError, match='context_length=0'): TransformerBlock(8, 2, 0)
    for bad in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match=f'dropout={bad}'): TransformerBlock(8, 2, 4, bad)
    with pytest.raises(TypeError, match='dropout'): TransformerBlock(8, 2, 4, '0.1')
    with pytest.raises(ValueError, match='context_length=7'): block_of()(torch.randn(1, 8, 6, dtype=torch.float64))
    for wrong in (torch.randn(2, 3, 5), torch.randn(6, 3)):
        with pytest.raises((ValueError, RuntimeError)): TransformerBlock(6, 2, 7)(wrong)


# ---- as parts of a model

def test_what_later_pages_rely_on():
    block = TransformerBlock(6, 2, 7)
    assert [name for name, _ in block.named_children()] == ['attention_norm', 'attention', 'feed_forward_norm', 'feed_forward', 'dropout']
    assert [name for name, _ in block.feed_forward.named_children()] == ['expand', 'activation', 'contract']
    assert sorted(block.state_dict()) == sorted(f'{n}.{p}' for p in ('weight', 'bias') for n in (
        'attention_norm', 'attention.qkv', 'attention.projection', 'feed_forward_norm', 'feed_forward.expand', 'feed_forward.contract'))


def test_saved_loaded_and_copied():
    block, file, x = block_of(seed=4), io.BytesIO(), torch.randn(1, 3, 6, dtype=torch.float64)
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = block_of(seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), block(x)) and torch.equal(copy.deepcopy(block)(x), block(x))


def test_without_memory_and_in_half_precision():
    with torch.device('meta'): assert TransformerBlock(768, 12, 1024)(torch.randn(2, 5, 768)).shape == (2, 5, 768)
    set_seed(0)
    block, x = TransformerBlock(6, 2, 7), torch.randn(1, 4, 6)
    y = copy.deepcopy(block).bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    close(y.float(), block(x), rtol=0.1, atol=0.1)


def test_compiled_in_one_piece():
    torch._dynamo.reset()
    block = block_of()
    compiled = torch.compile(block, backend='eager', fullgraph=True)
    for T in (4, 1, 7): close(compiled(x := torch.randn(2, T, 6, dtype=torch.float64)), block(x))
    torch._dynamo.reset()
