"The ladder of attention with several heads: loops = single heads side by side = one matrix = the fused kernel = PyTorch's module, values and gradients, on random unequal sizes; and everything that must be refused."
import copy, io, math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook import multihead
from llmbook.attention import CausalSelfAttention, causal_mask
from llmbook.core import count_parameters, set_seed
from llmbook.multihead import MultiHeadAttention
from torch import nn
from torch.nn import functional as F

SEEDS = st.integers(0, 2**31)
BIASES = st.sampled_from([(True, None), (False, None), (True, False), (False, True), (True, True)])
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(1, 6))           # B, T, H, D
UNEQUAL = SIZES.filter(lambda s: len({*s, s[2] * s[3]}) == 5)                      # and C: a wrong transpose cannot hide
LEADING = st.lists(st.integers(0, 3), max_size=2).map(tuple)                       # none, one or two dimensions before T
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def drawn(sizes, seed, biases=(True, None), leading=None, spare=0):
    "A module in double precision, a batch of vectors, and a gradient for what comes out."
    B, T, H, D = sizes
    set_seed(seed)
    module = MultiHeadAttention(H * D, H, T + spare, 0.0, *biases).double()
    shape = (*((B,) if leading is None else leading), T, H * D)
    return module, torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)


def by_loop(module, x):
    "One text, (T, C), number by number: straight from the formula, without a matrix product."
    T, C = x.shape
    H, D = module.n_head, C // module.n_head
    linear = lambda layer, row: [sum(a * b for a, b in zip(row, w)) + (layer.bias[i] if layer.bias is not None else 0) for i, w in enumerate(layer.weight)]
    rows = [linear(module.qkv, row) for row in x]
    part = lambda t, kind, h: rows[t][kind * C + h * D:kind * C + (h + 1) * D]
    contexts, weights = [], torch.zeros(H, T, T, dtype=x.dtype)
    for t in range(T):
        joined = []
        for h in range(H):
            scores = [sum(a * b for a, b in zip(part(t, 0, h), part(s, 1, h))) / math.sqrt(D) for s in range(t + 1)]
            powers = [torch.exp(a) for a in scores]
            shares = [p / sum(powers) for p in powers]
            for s, share in enumerate(shares): weights[h, t, s] = share.item()
            joined += [sum(share * part(s, 2, h)[d] for s, share in enumerate(shares)) for d in range(D)]
        contexts.append(torch.stack(linear(module.projection, joined)))
    return torch.stack(contexts), weights


def single_heads(module):
    "The same as single heads, with the rows of the one matrix given back to them."
    C, H, D = module.n_embd, module.n_head, module.n_embd // module.n_head
    has_bias = module.qkv.bias is not None
    heads = nn.ModuleList(CausalSelfAttention(C, D, module.context_length, bias=has_bias) for _ in range(H)).double()
    with torch.no_grad():
        for i, kind in enumerate(('query', 'key', 'value')):
            for h, head in enumerate(heads):
                rows = slice(i * C + h * D, i * C + (h + 1) * D)
                getattr(head, kind).weight.copy_(module.qkv.weight[rows])
                if has_bias: getattr(head, kind).bias.copy_(module.qkv.bias[rows])
    return heads


def pytorchs(module):
    "PyTorch's module with the weights moved over; without learned vectors, they are zeros there."
    theirs = nn.MultiheadAttention(module.n_embd, module.n_head, batch_first=True).double()
    zeros = lambda layer: torch.zeros(len(layer.weight), dtype=torch.float64) if layer.bias is None else layer.bias
    theirs.load_state_dict({'in_proj_weight': module.qkv.weight, 'in_proj_bias': zeros(module.qkv),
                            'out_proj.weight': module.projection.weight, 'out_proj.bias': zeros(module.projection)})
    return theirs


# ---- the ladder

@settings(max_examples=30, deadline=None)
@given(st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)), SEEDS, BIASES)
@example((1, 5, 3, 2), 0, (True, None))
def test_number_by_number(sizes, seed, biases):
    module, x, sent_back = drawn(sizes, seed, biases, leading=())
    expected, weights = by_loop(module, x)
    result, shares = module.attend(x)
    close(result, expected), close(module(x), expected), close(shares.detach(), weights)
    leaves = [x, *module.parameters()]
    theirs = torch.autograd.grad(expected, leaves, sent_back)
    close(torch.autograd.grad(result, leaves, sent_back), theirs)
    close(torch.autograd.grad(module(x), leaves, sent_back), theirs)


@settings(max_examples=100, deadline=None)
@given(UNEQUAL, SEEDS, BIASES)
@example((2, 5, 3, 4), 0, (True, None))
def test_single_heads_side_by_side(sizes, seed, biases):
    module, x, sent_back = drawn(sizes, seed, biases)
    heads, C, D = single_heads(module), module.n_embd, sizes[3]
    for way in (module, lambda x: module.attend(x)[0]):
        module.zero_grad(), heads.zero_grad()
        stacked = module.projection(torch.cat([head(x) for head in heads], dim=-1))
        result = way(x)
        close(result, stacked)
        stacked.backward(sent_back)
        module.projection.zero_grad()
        through_heads, x.grad = x.grad, None
        result.backward(sent_back)
        close(x.grad, through_heads)
        for name in ('weight', 'bias') if module.qkv.bias is not None else ('weight',):
            close(getattr(module.qkv, name).grad, torch.cat([getattr(getattr(head, kind), name).grad for kind in ('query', 'key', 'value') for head in heads]))
        x.grad = None
    for h, head in enumerate(heads): close(module.attend(x)[1][:, h], head.attend(x)[1])
    without = sum(head(x) @ module.projection.weight[:, h * D:(h + 1) * D].T for h, head in enumerate(heads))
    close(without + (0 if module.projection.bias is None else module.projection.bias), module(x))           # heads add up


@settings(max_examples=100, deadline=None)
@given(UNEQUAL, SEEDS, BIASES)
@example((2, 5, 3, 4), 0, (True, None))
def test_pytorchs_module(sizes, seed, biases):
    module, x, sent_back = drawn(sizes, seed, biases)
    theirs, forbidden = pytorchs(module), ~causal_mask(sizes[1])
    expected, weights = theirs(x, x, x, attn_mask=forbidden, average_attn_weights=False)
    result, shares = module.attend(x)
    close(result, expected), close(module(x), expected), close(shares, weights)
    pairs = [(module.qkv.weight, theirs.in_proj_weight), (module.qkv.bias, theirs.in_proj_bias),
             (module.projection.weight, theirs.out_proj.weight), (module.projection.bias, theirs.out_proj.bias)]
    ours, other = zip(*[(a, b) for a, b in pairs if a is not None])
    for way in (module(x), result):
        close(torch.autograd.grad(way, [x, *ours], sent_back), torch.autograd.grad(expected, [x, *other], sent_back, retain_graph=True))


@settings(max_examples=100, deadline=None)
@given(SIZES, SEEDS, BIASES, LEADING)
@example((0, 5, 3, 4), 0, (True, None), ())
@example((0, 5, 3, 4), 0, (True, None), (2, 3))
@example((0, 5, 3, 4), 0, (True, None), (0,))
def test_both_ways_are_one(sizes, seed, biases, leading):
    module, x, sent_back = drawn(sizes, seed, biases, leading, spare=2)
    result, weights = module.attend(x)
    assert result.shape == x.shape and weights.shape == (*leading, sizes[2], sizes[1], sizes[1])
    close(module(x), result)
    leaves = [x, *module.parameters()]
    close(torch.autograd.grad(module(x), leaves, sent_back), torch.autograd.grad(result, leaves, sent_back))
    assert weights.triu(1).eq(0).all() and weights.ge(0).all()
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if 0 not in leading:                                                           # every text by itself
        flat = x.reshape(-1, *x.shape[-2:])
        close(module(x).reshape(flat.shape), torch.stack([module(text) for text in flat]))


def test_no_tokens():
    module = MultiHeadAttention(12, 3, 5)
    for x in (torch.randn(0, 12), torch.randn(2, 0, 12)):
        assert module(x).shape == module.attend(x)[0].shape == x.shape


@pytest.mark.parametrize('dtype, room', [(torch.float32, 5e-7), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_precisions(dtype, room):
    set_seed(123)
    module, x = MultiHeadAttention(12, 3, 5).to(dtype), torch.randn(2, 5, 12, dtype=dtype)
    exact = copy.deepcopy(module).double()(x.double())
    for way in (module(x), module.attend(x)[0]):
        assert way.dtype == dtype
        torch.testing.assert_close(way.double(), exact, rtol=0, atol=room)


# ---- what it may see, and what it cannot

@settings(max_examples=100, deadline=None)
@given(UNEQUAL, SEEDS, st.data())
def test_a_token_changes_itself_and_what_comes_after(sizes, seed, data):
    module, x, _ = drawn(sizes, seed)
    at = data.draw(st.integers(0, sizes[1] - 1))
    other = x.detach().clone()
    other[:, at] += 1
    for way in (module, lambda x: module.attend(x)[0]):
        before, after = way(x), way(other)
        close(before[:, :at], after[:, :at])
        assert (before[:, at:] - after[:, at:]).abs().amax(-1).gt(1e-9).all()      # and all of these do see it
    reached = torch.autograd.grad(module(x)[:, at].sum(), x)[0]
    assert reached[:, at + 1:].eq(0).all()


@settings(max_examples=100, deadline=None)
@given(UNEQUAL, SEEDS, st.data())
def test_a_beginning_is_what_it_is_alone(sizes, seed, data):
    module, x, _ = drawn(sizes, seed)
    T = data.draw(st.integers(1, sizes[1]))
    close(module(x)[:, :T], module(x[:, :T]))
    close(module.attend(x)[1][..., :T, :T], module.attend(x[:, :T])[1])


@settings(max_examples=100, deadline=None)
@given(UNEQUAL, SEEDS, st.randoms())
def test_order_is_seen_through_the_mask_alone(sizes, seed, random):
    "Without it, tokens in another order get the same vectors; with it, the last token still sees a bag."
    module, x, _ = drawn(sizes, seed)
    order = list(range(sizes[1]))
    random.shuffle(order)
    context = lambda x: module._join(F.scaled_dot_product_attention(*module._heads(x)))
    close(context(x[:, order]), context(x)[:, order])
    before = [i for i in order if i != sizes[1] - 1]
    close(module(x[:, [*before, sizes[1] - 1]])[:, -1], module(x)[:, -1])


def test_with_the_mask_order_is_seen():
    module, x, _ = drawn((2, 5, 3, 4), 123)
    assert (module(x.flip(1)) - module(x).flip(1)).abs().max() > 0.01


@settings(max_examples=100, deadline=None)
@given(UNEQUAL, SEEDS, st.data())
def test_a_head_has_its_own_rows_and_columns(sizes, seed, data):
    "Cleared columns of the projection take out one head, and only its rows of the matrix lose their gradient."
    module, x, _ = drawn(sizes, seed)
    _, _, H, D = sizes
    C, h = H * D, data.draw(st.integers(0, H - 1))
    with torch.no_grad(): module.projection.weight[:, h * D:(h + 1) * D] = 0
    module(x).square().sum().backward()
    idle = torch.zeros(3, H, D, dtype=torch.bool)
    idle[:, h] = True
    grad = module.qkv.weight.grad
    assert grad[idle.flatten()].eq(0).all()
    if H > 1: assert grad.view(3, H, D, C)[2, [i for i in range(H) if i != h]].abs().amax(-1).gt(0).all()


def test_heads_change_places():
    "Heads in another order, with their rows and columns, are the same module."
    module, x, _ = drawn((2, 5, 3, 4), 123)
    other, order = copy.deepcopy(module), [2, 0, 1]
    with torch.no_grad():
        other.qkv.weight.copy_(module.qkv.weight.view(3, 3, 4, 12)[:, order].flatten(0, 2))
        other.qkv.bias.copy_(module.qkv.bias.view(3, 3, 4)[:, order].flatten())
        other.projection.weight.copy_(module.projection.weight.view(12, 3, 4)[:, order].flatten(1))
    close(other(x), module(x))
    close(other.attend(x)[1], module.attend(x)[1][:, order])


# ---- dropout

def test_dropout_in_training_only():
    set_seed(123)
    module, x = MultiHeadAttention(12, 3, 7, dropout=0.5), torch.randn(2, 7, 12)
    for way in (module, lambda x: module.attend(x)[0]):
        module.train()
        assert not torch.equal(way(x), way(x))
        module.eval()
        assert torch.equal(way(x), way(x))
    plain = MultiHeadAttention(12, 3, 7)
    plain.load_state_dict(module.state_dict())
    for whole in (plain.train(), plain.eval()): assert torch.equal(whole(x), module(x))


@pytest.mark.parametrize('dropout', [0.1, 0.5])
def test_the_share_that_is_dropped(dropout):
    "With values of 1 and no mixing, a head brings the sum of what is left of its weights; for the first token that is all or nothing."
    set_seed(123)
    module = MultiHeadAttention(12, 3, 2, dropout=dropout, bias=False)
    with torch.no_grad():
        module.qkv.weight.zero_()
        module.qkv.weight[24:, 0] = 1                                              # every value is the first number of x
        module.projection.weight.copy_(torch.eye(12))
    x = torch.ones(4000, 2, 12)
    for way in (module, lambda x: module.attend(x)[0]):
        kept = way(x)[:, 0, ::4].flatten()                                         # the first token in each head
        torch.testing.assert_close(kept.unique(), torch.tensor([0, 1 / (1 - dropout)]))
        assert abs(kept.eq(0).double().mean().item() - dropout) < 0.03
        assert abs(way(x).mean().item() - 1) < 0.03                                # what is left is scaled up
    assert module.attend(x)[1][:, :, 0, 0].eq(1).all()                             # the weights are shown before dropout


# ---- sizes and parameters

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.sampled_from([None, True, False]))
def test_parameters(H, D, bias, qkv_bias):
    C = H * D
    module = MultiHeadAttention(C, H, 5, 0.0, bias, qkv_bias)
    has = bias if qkv_bias is None else qkv_bias
    assert count_parameters(module) == 4 * C * C + 3 * C * has + C * bias
    names = ['qkv.weight', *['qkv.bias'] * has, 'projection.weight', *['projection.bias'] * bias]
    assert list(module.state_dict()) == names
    assert module.qkv.weight.shape == (3 * C, C) and module.projection.weight.shape == (C, C)


def test_what_later_pages_rely_on():
    with torch.device('meta'): module = MultiHeadAttention(768, 12, 1024)
    assert count_parameters(module) == 2_362_368 == 4 * 768**2 + 4 * 768
    assert module(torch.empty(2, 5, 768, device='meta')).shape == (2, 5, 768)
    context, weights = module.attend(torch.empty(2, 5, 768, device='meta'))
    assert context.is_meta and context.shape == (2, 5, 768) and weights.shape == (2, 12, 5, 5)
    assert (module.n_embd, module.n_head, module.context_length, module.dropout) == (768, 12, 1024, 0.0)
    assert repr(module).startswith('MultiHeadAttention(\n  n_embd=768, n_head=12, context_length=1024, dropout=0.0\n  (qkv): Linear')
    assert (MultiHeadAttention(np.int64(6), np.int32(2), 3)(torch.zeros(3, 6))).shape == (3, 6)
    assert not list(module.buffers())                                              # a mask is made when it is needed


def test_saved_loaded_and_copied():
    set_seed(123)
    module, other, file, x = MultiHeadAttention(12, 3, 5), MultiHeadAttention(12, 3, 9), io.BytesIO(), torch.randn(2, 5, 12)
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(torch.load(file, weights_only=True))                     # another context length has the same weights
    assert torch.equal(other(x), module(x)) and torch.equal(copy.deepcopy(module)(x), module(x))
    with pytest.raises(RuntimeError, match='size mismatch'): MultiHeadAttention(15, 3, 5).load_state_dict(module.state_dict())


@pytest.mark.parametrize('dynamic', [None, True])
def test_compiled_in_one_piece(dynamic):
    torch._dynamo.reset()
    set_seed(123)
    module = MultiHeadAttention(12, 3, 11)
    forward = torch.compile(module, backend='eager', fullgraph=True, dynamic=dynamic)
    attend = torch.compile(module.attend, backend='eager', fullgraph=True, dynamic=dynamic)
    for shape in ((2, 5, 12), (3, 7, 12), (3, 11, 12), (2, 3, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(forward(x), module(x))
        for ours, theirs in zip(attend(x), module.attend(x)): torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


def test_the_fused_kernel_is_used_without_a_mask(monkeypatch):
    original, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(multihead.F, 'scaled_dot_product_attention', lambda *args, **more: calls.append((args, more)) or original(*args, **more))
    module, x = MultiHeadAttention(12, 3, 5, dropout=0.25), torch.randn(2, 5, 12)
    module.attend(x)
    assert not calls
    module(x), module.eval()(x)
    assert [more for _, more in calls] == [{'attn_mask': None, 'is_causal': True, 'dropout_p': p} for p in (0.25, 0.0)]
    assert all(part.shape == (2, 3, 5, 4) for args, _ in calls for part in args)


def test_the_fused_kernel_keeps_no_table():
    module, kept = MultiHeadAttention(12, 3, 256), {}
    x = torch.randn(1, 256, 12)
    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    def bytes_kept(way):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor): result = way(x)
        return sum(kept.values()), result
    table = 3 * 256 * 256 * 4
    assert bytes_kept(lambda x: module.attend(x)[0])[0] > table > 5 * bytes_kept(module)[0]


# ---- what is refused

@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 12))
@example(10, 4)
@example(3, 5)
def test_a_width_that_the_heads_cannot_share(C, H):
    if C % H == 0:
        assert MultiHeadAttention(C, H, 2).n_head == H
        return
    with pytest.raises(ValueError, match=rf'^n_embd={C} is not a multiple of n_head={H}.*try n_embd=(\d+)$') as caught: MultiHeadAttention(C, H, 2)
    near = int(str(caught.value).rsplit('=', 1)[1])
    assert near > 0 and near % H == 0 and abs(near - C) == min(abs(H * k - C) for k in range(1, 42))


def test_arguments():
    for name, position in (('n_embd', 0), ('n_head', 1), ('context_length', 2)):
        def make(bad):
            sizes = [12, 3, 5]
            sizes[position] = bad
            return MultiHeadAttention(*sizes)
        for bad in (0, -3):
            with pytest.raises(ValueError, match=f'^{name}={bad} is too small'): make(bad)
        for bad in (2.0, True, '3', None):
            with pytest.raises(TypeError, match=f'^{name}={bad!r} is not a whole number'): make(bad)
    for bad in (-0.1, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r'^dropout=.* is not in \[0, 1\)'): MultiHeadAttention(12, 3, 5, bad)
    for bad in (True, '0.1', None):
        with pytest.raises(TypeError, match='^dropout='): MultiHeadAttention(12, 3, 5, bad)


@pytest.mark.parametrize('way', ['forward', 'attend'])
def test_inputs(way):
    run = getattr(MultiHeadAttention(12, 3, 5), way)
    run(torch.randn(2, 5, 12))
    with pytest.raises(ValueError, match=r'x has 6 tokens, and context_length=5'): run(torch.randn(2, 6, 12))
    with pytest.raises(ValueError, match=r'x has shape \(2, 5, 4\).*n_embd=12'): run(torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match=r'x has shape \(12,\)'): run(torch.randn(12))
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(TypeError, match=f'x has dtype {dtype}'): run(torch.ones(2, 5, 12, dtype=dtype))
    with pytest.raises(TypeError, match='x is a list'): run([[0.0] * 12])
