"The loss against PyTorch's and against loops, whole and by pieces, values and gradients, on random sizes; its units; evaluation; and everything that must be refused."
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook import loss as module
from llmbook.core import set_seed
from llmbook.data import make_dataloader
from llmbook.generate import quantize_int8
from llmbook.gpt import GPT, GPTConfig
from llmbook.loss import bits_per_byte, evaluate_loss, linear_cross_entropy, model_loss, next_token_loss, perplexity
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)                      # of the places: from a single one without a dimension to three dimensions
SEEDS = st.integers(0, 2**31)
TINY = GPTConfig(13, 6, 2, 2, 8)


def drawn(shape, V, seed, C=None, dtype=torch.float32, ids=torch.int64):
    "Logits, or vectors and a head, and targets."
    set_seed(seed)
    scored = [torch.randn(*shape, V if C is None else C, dtype=torch.double)] + ([] if C is None else [torch.randn(V, C, dtype=torch.double)])
    return *(t.to(dtype).requires_grad_() for t in scored), torch.randint(V, shape, dtype=ids)


def twin(*tensors): return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def plain(hidden, weight, targets): return F.cross_entropy((hidden @ weight.T).reshape(-1, len(weight)), targets.long().reshape(-1))


class Largest(TorchDispatchMode):
    "The most numbers that any tensor has, and how many products of matrices and softmaxes there were."
    most, products, softmaxes = 0, 0, 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        result = f(*args, **(kwargs or {}))
        self.products += f.overloadpacket.__name__ in ('mm', 'addmm', 'addmm_', 'bmm', 'matmul')
        self.softmaxes += f.overloadpacket.__name__ == 'div_'
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor): self.most = max(self.most, t.numel())
        return result


# ---- from logits

@settings(max_examples=200)
@given(SHAPES, st.integers(1, 9), SEEDS, st.sampled_from([torch.int64, torch.int32]))
@example((), 5, 0, torch.int32)
def test_equal_to_pytorchs_and_to_a_loop(shape, V, seed, ids):
    logits, targets = drawn(shape, V, seed, ids=ids)
    (theirs,) = twin(logits)
    loss, reference = next_token_loss(logits, targets), F.cross_entropy(theirs.reshape(-1, V), targets.long().reshape(-1))
    by_loop = [math.log(sum(math.exp(z) for z in row)) - row[y] for row, y in zip(logits.reshape(-1, V).tolist(), targets.flatten().tolist())]
    assert loss.shape == () and math.isclose(loss.item(), sum(by_loop) / len(by_loop), rel_tol=1e-5, abs_tol=1e-6)
    for result in (loss, reference): result.backward()
    assert_close(loss, reference)
    assert_close(logits.grad, theirs.grad)
    assert_close(logits.grad, ((logits.softmax(-1) - F.one_hot(targets.long(), V)) / targets.numel()).detach())


def test_the_gradient_is_the_slope():
    logits, targets = drawn((2, 3), 4, 0, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda z: next_token_loss(z, targets), logits) and torch.autograd.gradgradcheck(lambda z: next_token_loss(z, targets), logits)


@given(SHAPES, st.integers(2, 9), SEEDS, st.floats(-1e3, 1e3))
def test_only_differences_of_logits_count(shape, V, seed, shift):
    logits, targets = drawn(shape, V, seed, dtype=torch.double)
    assert_close(next_token_loss(logits + shift, targets), next_token_loss(logits, targets), rtol=1e-9, atol=1e-9)
    assert_close(next_token_loss(torch.full_like(logits, shift), targets).item(), math.log(V))


def test_wild_logits():
    logits, y = torch.tensor([[0., 500.], [1e30, -1e30]]), torch.tensor([0, 0])
    assert next_token_loss(logits[:1], y[:1]) == 500 and next_token_loss(logits[1:], y[:1]) == 0
    banned = torch.tensor([0., -torch.inf, 0.])
    assert_close(next_token_loss(banned, torch.tensor(2)).item(), math.log(2))
    assert next_token_loss(banned, torch.tensor(1)) == torch.inf


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_widened(dtype):
    logits, targets = drawn((50,), 2000, 0, dtype=dtype)
    loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, F.cross_entropy(logits.float(), targets))
    loss.backward()
    assert logits.grad.dtype == dtype and next_token_loss(logits.double(), targets).dtype == torch.double


# ---- by pieces

@settings(max_examples=300)
@given(SHAPES, st.integers(1, 9), st.integers(1, 6), st.integers(1, 40), SEEDS, st.sampled_from([(True, True), (True, False), (False, True)]), st.sampled_from([torch.int64, torch.int32]))
@example((), 5, 3, 1, 0, (True, True), torch.int32)
@example((4, 5), 7, 3, 6, 0, (True, True), torch.int64)                          # the last piece is short
def test_by_pieces_is_the_whole(shape, V, C, chunk_size, seed, wants, ids):
    hidden, weight, targets = drawn(shape, V, seed, C, torch.double, ids)
    for t, want in zip((hidden, weight), wants): t.requires_grad_(want)
    theirs = twin(hidden, weight)
    loss, reference = linear_cross_entropy(hidden, weight, targets, chunk_size), plain(*theirs, targets)
    assert loss.shape == () and loss.requires_grad
    for result in (3 * loss, 3 * reference): result.backward()
    assert_close(loss, reference)
    for ours, other in zip((hidden, weight), theirs):
        assert (ours.grad is None) == (other.grad is None)
        if other.grad is not None: assert_close(ours.grad, other.grad)


@pytest.mark.parametrize('wants', [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize('chunk_size', [1, 3, 5, 99])
def test_the_gradient_by_pieces_is_the_slope(wants, chunk_size):
    hidden, weight, targets = drawn((5,), 4, 1, 3, torch.double)
    for t, want in zip((hidden, weight), wants): t.requires_grad_(want)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, chunk_size), (hidden, weight))


@pytest.mark.skipif(not hasattr(F, 'linear_cross_entropy'), reason='this PyTorch has none')
def test_by_pieces_is_pytorchs_own():
    hidden, weight, targets = drawn((10,), 7, 2, 4)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=3)
    for settings_ in ({}, {'options': options}):
        ours, theirs = twin(hidden, weight), twin(hidden, weight)
        a, b = linear_cross_entropy(*ours, targets, 3), F.linear_cross_entropy(*theirs, targets, **settings_)
        for result in (a, b): result.backward()
        assert_close(a, b)
        for x, y in zip(ours, theirs): assert_close(x.grad, y.grad)


def test_the_default_piece_and_a_long_text():
    hidden, weight, targets = drawn((3, 100), 50, 3, 8)
    theirs = twin(hidden, weight)
    assert_close(linear_cross_entropy(hidden, weight, targets), plain(*theirs, targets))
    with Largest() as mode: linear_cross_entropy(hidden, weight, targets).backward()
    plain(*theirs, targets).backward()
    assert_close(hidden.grad, theirs[0].grad)
    assert_close(weight.grad, theirs[1].grad)
    assert mode.most <= 128 * 50 < 300 * 50                                      # never all logits


@pytest.mark.parametrize('wants', [(True, True), (True, False), (False, True), (False, False)])
def test_no_more_is_made_than_is_wanted(wants):
    hidden, weight, targets = drawn((40,), 60, 3, 2)
    for t, want in zip((hidden, weight), wants): t.requires_grad_(want)
    with Largest() as mode: loss = linear_cross_entropy(hidden, weight, targets, 4)
    assert mode.most <= max(4 * 60, 60 * 2) and mode.products == 10 * (1 + sum(wants)) and mode.softmaxes == 10 * any(wants)
    assert loss.requires_grad == any(wants)


@pytest.mark.parametrize('without', [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_made(without):
    hidden, weight, targets = drawn((40,), 60, 3, 2)
    with without(), Largest() as mode: loss = linear_cross_entropy(hidden, weight, targets, 4)
    assert mode.products == 10 and mode.softmaxes == 0 and not loss.requires_grad
    assert_close(loss, plain(hidden, weight, targets).detach())


def test_asked_twice():
    "The gradients are handed out once, scaled in place; who asks again gets them again, and unspoilt."
    hidden, weight, targets = drawn((7,), 5, 4, 3)
    theirs = twin(hidden, weight)
    loss, reference = linear_cross_entropy(hidden, weight, targets, 2), plain(*theirs, targets)
    for factor in (1.0, 5.0, -2.0):
        for result in (loss, reference): result.backward(torch.tensor(factor), retain_graph=True)
        for ours, other in zip((hidden, weight), theirs): assert_close(ours.grad, other.grad)
    first, again = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
    loss.backward()
    with pytest.raises(RuntimeError, match='second time'): loss.backward()


def test_one_call_may_follow_another():
    "The same vectors and the same head in two losses."
    hidden, weight, targets = drawn((6,), 5, 5, 3)
    theirs = twin(hidden, weight)
    f = lambda loss_of, x, w: loss_of(x, w, targets) + 2 * loss_of(x[:4].tanh(), w, targets[:4])
    for result in (f(lambda *args: linear_cross_entropy(*args, 4), hidden, weight), f(plain, *theirs)): result.backward()
    for ours, other in zip((hidden, weight), theirs): assert_close(ours.grad, other.grad)


def test_second_derivatives_are_refused():
    hidden, weight, targets = drawn((6,), 5, 5, 3)
    with pytest.raises(RuntimeError, match='^linear_cross_entropy gives no gradient of its gradient.*next_token_loss'): torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)


def test_a_weight_changed_before_the_way_back_is_noticed():
    hidden, weight, targets = drawn((6,), 5, 5, 3)
    loss = linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad(): weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


def test_inputs_are_left_as_they_are():
    hidden, weight, targets = drawn((2, 5), 7, 6, 3)
    before = [t.detach().clone() for t in (hidden, weight, targets)]
    linear_cross_entropy(hidden, weight, targets, 3).backward()
    for t, old in zip((hidden, weight, targets), before): assert torch.equal(t, old)


def test_views_and_strides():
    "Tensors that do not lie in a row in memory."
    base, head = torch.randn(8, 5, 3, dtype=torch.double, requires_grad=True), torch.randn(4, 7, dtype=torch.double, requires_grad=True)
    targets, found = torch.randint(7, (10, 3))[::2].T, []                        # (3, 5)
    for loss_of in (lambda *args: linear_cross_entropy(*args, 2), plain):
        hidden = base.transpose(0, 2)[..., ::2]                                  # (3, 5, 4)
        assert not any(t.is_contiguous() for t in (hidden, head.T, targets))
        found.append(torch.autograd.grad(loss_of(hidden, head.T, targets), (base, head)))
    for ours, theirs in zip(*found): assert_close(ours, theirs)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sixteen_bits_by_pieces(dtype):
    "As good as the plain way in 16 bits, measured by 64; the pieces are added up in 32."
    hidden, weight, targets = drawn((400,), 30, 7, 16, dtype)
    wide, narrow = [t.detach().double().requires_grad_() for t in (hidden, weight)], twin(hidden, weight)
    loss = linear_cross_entropy(hidden, weight, targets, 10)
    for result in (loss, plain(*wide, targets), plain(*narrow, targets)): result.backward()
    assert loss.dtype == torch.float32 and abs(loss - plain(*wide, targets)) < 0.01
    for ours, exact, theirs in zip((hidden, weight), wide, narrow):
        assert ours.grad.dtype == dtype
        ours_off, theirs_off = ((t.grad.double() - exact.grad).norm() / exact.grad.norm() for t in (ours, theirs))
        assert ours_off < 1.5 * theirs_off < 0.03


def test_small_gradients_in_sixteen_bits_are_not_lost():
    "A scale of the loss, as used with float16, reaches the gradient before it is rounded."
    hidden, weight, targets = drawn((4096,), 400, 8, 2, torch.float16)
    (2.0**16 * linear_cross_entropy(hidden, weight, targets)).backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (2.0**16 * plain(*wide, targets)).backward()
    for ours, exact in zip((hidden, weight), wide): assert (ours.grad.double() - exact.grad).norm() / exact.grad.norm() < 3e-3


def test_under_autocast():
    hidden, weight, targets = drawn((40,), 30, 7, 16)
    theirs = twin(hidden, weight)
    for loss_of, (x, w) in ((lambda *args: linear_cross_entropy(*args, 7), (hidden, weight)), (plain, theirs)):
        with torch.autocast('cpu', torch.bfloat16): loss = loss_of(x, w, targets)
        assert loss.dtype == torch.float32 and abs(loss - plain(hidden, weight, targets)) < 0.02
        loss.backward()
    for ours, other in zip((hidden, weight), theirs):
        assert ours.grad.dtype == torch.float32 and (ours.grad - other.grad).norm() < 0.02 * other.grad.norm()


def test_wild_logits_by_pieces():
    hidden, weight = torch.tensor([[300.], [-300.]], requires_grad=True), torch.tensor([[1.], [2.], [-1.]], requires_grad=True)
    targets = torch.tensor([0, 0])
    theirs = twin(hidden, weight)
    for result in (linear_cross_entropy(hidden, weight, targets, 1), plain(*theirs, targets)): result.backward()
    for ours, other in zip((hidden, weight), theirs): assert other.grad.isfinite().all() and torch.equal(ours.grad, other.grad)


def test_peak_memory():
    "A fifth of the plain way's, in a process of its own: the gradient of the head, and a strip."
    code = '''
import os
os.environ["KINETO_LOG_LEVEL"] = "99"
import torch
from torch.nn import functional as F
from torch.profiler import profile
from llmbook.loss import linear_cross_entropy
torch.set_num_threads(1)
N, C, V = 640, 8, 20_000
x, w, y = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True), torch.randint(V, (N,))
for f in (lambda: F.cross_entropy(x @ w.T, y), lambda: linear_cross_entropy(x, w, y, 64)):
    with profile(profile_memory=True) as record: f().backward()
    x.grad = w.grad = None
    now = most = 0
    for _, n in sorted((e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"):
        now += n; most = max(most, now)
    print(most / (4 * N * V))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    whole, pieces = map(float, done.stdout.split())
    assert whole > 2.9 and pieces < 0.16, (whole, pieces)                        # tables of all logits; a strip is a tenth, the head's gradient a hundredth and a half


# ---- what is refused

@settings(max_examples=100)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), st.integers(1, 9), SEEDS, st.sampled_from([-100, -1, None, 50_257, 2**40]), st.data())
def test_a_target_without_a_score_is_named(shape, V, seed, bad, data):
    hidden, weight, targets = drawn(shape, V, seed, 3)
    bad = V if bad is None else bad
    targets.view(-1)[data.draw(st.integers(0, targets.numel() - 1))] = bad
    for loss_of in (lambda: next_token_loss(hidden @ weight.T, targets), lambda: linear_cross_entropy(hidden, weight, targets)):
        with pytest.raises(ValueError) as caught: loss_of()
        message = str(caught.value)
        assert message.startswith(f'targets holds {bad}; there are scores for the ids 0 to {V - 1}; ')
        assert ('a mark for places to leave out' if bad < 0 else 'another tokenizer') in message


def both(hidden, weight, targets): return (lambda: next_token_loss(hidden @ weight.T, targets)), (lambda: linear_cross_entropy(hidden, weight, targets))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bool, torch.uint8, torch.int16, torch.complex64])
def test_what_cannot_be_targets(dtype):
    hidden, weight, targets = drawn((2, 3), 5, 0, 4)
    for loss_of in both(hidden, weight, targets.to(dtype)):
        with pytest.raises(TypeError, match=rf'^targets has dtype {dtype}; allowed are torch.int64 and torch.int32.*targets\.long\(\)'): loss_of()
    for other in (targets.tolist(), targets.numpy(), None, 3):
        for loss_of in both(hidden, weight, other):
            with pytest.raises(TypeError, match=rf'^targets is a {type(other).__name__}; give a tensor: torch\.tensor\(targets\)'): loss_of()


@pytest.mark.parametrize('shape', [(6,), (3, 2), (2, 1), (1, 3), (2, 3, 1), (2,), ()])
def test_every_place_has_one_target(shape):
    "Also where broadcasting would have gone through."
    hidden, weight, _ = drawn((2, 3), 5, 0, 4)
    for loss_of in both(hidden, weight, torch.zeros(shape, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r'^targets has shape \(.*\), and there are scores for \(2, 3\); every place needs one target'): loss_of()


def test_nothing_to_score():
    hidden, weight, targets = drawn((0, 3), 5, 0, 4)
    for loss_of in both(hidden, weight, targets):
        with pytest.raises(ValueError, match='^targets is empty.*give at least one token'): loss_of()


def test_sizes_of_the_head_and_of_a_piece():
    hidden, weight, targets = drawn((2, 3), 5, 0, 4)
    for bad in (weight.T, weight[0], weight[None], weight[:, :3]):
        with pytest.raises(ValueError, match=r'^hidden has shape \(2, 3, 4\) and weight \(.*\); they must be \(..., C\) and \(V, C\)'): linear_cross_entropy(hidden, bad, targets)
    with pytest.raises(ValueError, match=r'^hidden has shape \(\) and weight \(3,\)'): linear_cross_entropy(torch.tensor(1.0), torch.ones(3), torch.tensor(0))
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f'^chunk_size={bad} is too small'): linear_cross_entropy(hidden, weight, targets, bad)
    for bad in (2.0, True, '3', None):
        with pytest.raises(TypeError, match=f'^chunk_size={bad!r} is not a whole number'): linear_cross_entropy(hidden, weight, targets, bad)
    assert_close(linear_cross_entropy(hidden, weight, targets, np.int64(2)), plain(hidden, weight, targets))


def test_where_nobody_looks_first():
    "On a graphics card to look would mean to wait; on `meta` there is nothing to see."
    assert module._LOOK_LATE == {'cuda', 'meta'}
    hidden, weight, targets = (t.to('meta') for t in drawn((2, 3), 5, 0, 4))
    assert next_token_loss(hidden @ weight.T, targets).is_meta and linear_cross_entropy(hidden, weight, targets).is_meta


@pytest.mark.parametrize('bad', [-1, -100, 5])
def test_a_card_would_refuse_too(monkeypatch, bad):
    "Where nobody looks first, no id is read backwards from the end: the kernel refuses."
    monkeypatch.setattr(module, '_LOOK_LATE', {'cpu'})
    hidden, weight, targets = drawn((6,), 5, 0, 4)
    targets[4] = bad
    for loss_of in both(hidden, weight, targets):
        with pytest.raises((RuntimeError, IndexError), match='out of bounds'): loss_of()


# ---- units

@given(st.floats(0, 700), st.integers(1, 10**6), st.integers(1, 10**6))
def test_units(loss, n_tokens, n_bytes):
    assert math.isclose(perplexity(loss), math.e**loss, rel_tol=1e-9) and perplexity(torch.tensor(loss, dtype=torch.double)) == perplexity(loss)
    assert math.isclose(bits_per_byte(loss, n_tokens, n_bytes), loss * math.log2(math.e) * n_tokens / n_bytes, rel_tol=1e-9)
    assert bits_per_byte(torch.tensor(loss, dtype=torch.double, requires_grad=True), n_tokens, n_bytes) == bits_per_byte(loss, n_tokens, n_bytes)


@given(st.integers(2, 60_000))
def test_one_who_knows_nothing(V):
    loss = next_token_loss(torch.zeros(3, V, dtype=torch.double), torch.tensor([0, V - 1, V // 2])).item()
    assert math.isclose(perplexity(loss), V, rel_tol=1e-9) and math.isclose(bits_per_byte(loss, 7, 7), math.log2(V), rel_tol=1e-9)


def test_units_at_the_ends(recwarn):
    assert perplexity(0) == 1 and perplexity(1e4) == perplexity(math.inf) == math.inf and math.isnan(perplexity(math.nan))
    assert perplexity(torch.tensor(2.0, requires_grad=True)) == math.exp(2)
    assert isinstance(bits_per_byte(1, 2, 3), float) and isinstance(perplexity(torch.tensor(1)), float)
    assert not recwarn.list
    for args, words in (((1.0, 0, 3), 'n_tokens=0'), ((1.0, 3, 0), 'n_bytes=0')):
        with pytest.raises(ValueError, match=words): bits_per_byte(*args)
    for args, words in (((1.0, 2.5, 3), 'n_tokens=2.5'), ((1.0, 3, None), 'n_bytes=None')):
        with pytest.raises(TypeError, match=words): bits_per_byte(*args)


# ---- of a model

@settings(max_examples=25)
@given(SEEDS, st.integers(1, 20), st.booleans())
def test_a_model_by_pieces_has_the_plain_gradients(seed, chunk_size, tied):
    "With a tied head two gradients meet in one table."
    set_seed(seed)
    model = GPT(GPTConfig(13, 6, 2, 2, 8, tied=tied)).double()
    for p in model.parameters(): nn.init.normal_(p, std=0.3)
    inputs, targets = torch.randint(13, (2, 3, 6))
    found = []
    for loss in (model_loss(model, inputs, targets, chunk_size), next_token_loss(model(inputs), targets)):
        model.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found): assert_close(ours, theirs)


def counting(monkeypatch):
    calls = []
    monkeypatch.setattr(module, 'linear_cross_entropy', lambda *args: calls.append(args[3]) or linear_cross_entropy(*args))
    return calls


def test_which_way_a_model_goes(monkeypatch):
    calls, (inputs, targets) = counting(monkeypatch), torch.randint(13, (2, 3, 6))
    set_seed(0)
    model = GPT(TINY)
    reference = next_token_loss(model(inputs), targets)
    assert_close(model_loss(model, inputs, targets), reference)
    assert_close(model_loss(model, inputs, targets, 5), reference)
    assert calls == [128, 5]
    class Wrapped(nn.Module):                                                    # as for many devices
        def __init__(self, model):
            super().__init__()
            self.module = model
        def forward(self, ids): return self.module(ids)
        def __getattr__(self, name):
            try: return super().__getattr__(name)
            except AttributeError: return getattr(super().__getattr__('module'), name)
    wrapped = Wrapped(model)
    assert wrapped.hidden_states is not None
    assert_close(model_loss(wrapped, inputs, targets), reference)
    assert_close(model_loss(nn.Sequential(model), inputs, targets), reference)
    with_bias = GPT(TINY)
    with_bias.lm_head = nn.Linear(8, 13)
    assert_close(model_loss(with_bias, inputs, targets), next_token_loss(with_bias(inputs), targets))
    small = quantize_int8(model)
    assert_close(model_loss(small, inputs, targets), next_token_loss(small(inputs), targets))
    assert calls == [128, 5]


def test_compiled():
    torch._dynamo.reset()
    set_seed(0)
    model, (inputs, targets) = GPT(TINY), torch.randint(13, (2, 3, 6))
    reference = model_loss(model, inputs, targets)
    reference.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    compile_ = lambda f: torch.compile(f, backend='aot_eager', fullgraph=True)
    for f in (compile_(model_loss), lambda *args: model_loss(compile_(model), *args[1:]), compile_(lambda *args: next_token_loss(model(args[1]), args[2]))):
        model.zero_grad()
        loss = f(model, inputs, targets)
        loss.backward()
        assert_close(loss, reference)
        for p, g in zip(model.parameters(), expected): assert_close(p.grad, g)
    torch._dynamo.reset()


def test_a_compiled_model_is_called_as_a_whole():
    torch._dynamo.reset()
    runs = []
    def backend(graph, _): runs.append(graph); return graph.forward
    model_loss(torch.compile(GPT(TINY), backend=backend), *torch.randint(13, (2, 3, 6)))
    assert runs
    torch._dynamo.reset()


def test_a_compiler_does_not_unroll_the_pieces():
    torch._dynamo.reset()
    nodes, (hidden, weight, targets) = [], drawn((40,), 5, 0, 4)
    def backend(graph, _): nodes.extend(str(n.target) for n in graph.graph.nodes); return graph.forward
    assert_close(torch.compile(linear_cross_entropy, backend=backend, fullgraph=True)(hidden, weight, targets, 1), plain(hidden, weight, targets))
    assert nodes and len(nodes) < 20 and not any('autograd_function' in name for name in nodes)
    torch._dynamo.reset()


def test_to_import_it_loads_no_compiler():
    code = 'import sys, llmbook.loss; sys.exit("torch._dynamo" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_untrained():
    set_seed(123)
    model, ids = GPT(GPTConfig(5000, 32)), torch.randint(5000, (4, 33))
    assert abs(model_loss(model, ids[:, :-1], ids[:, 1:]).item() - math.log(5000)) < 0.1
    assert model_loss(model, ids[:, :-1], ids[:, :-1]) < math.log(5000) - 0.5    # it can see its target


# ---- over many batches

class Table(nn.Module):
    "Logits that depend on the last id alone."
    def __init__(self, V=13):
        super().__init__()
        self.table, self.dropout, self.calls = nn.Embedding(V, V), nn.Dropout(0.5), []

    def forward(self, ids):
        self.calls.append((self.training, torch.is_grad_enabled(), len(ids)))
        return self.dropout(self.table(ids))


@settings(max_examples=60)
@given(st.integers(7, 60), st.integers(1, 6), st.integers(1, 9), SEEDS)
def test_every_token_counts_the_same(n, T, batch_size, seed):
    set_seed(seed)
    model, ids = Table().double(), torch.randint(13, (n,))
    batches = list(make_dataloader(ids, T, batch_size, shuffle=False, drop_last=False))
    inputs, targets = (torch.cat([batch[i].flatten() for batch in batches]) for i in (0, 1))
    whole = F.cross_entropy(model.table(inputs), targets).item()
    assert math.isclose(evaluate_loss(model, batches), whole, rel_tol=1e-12)
    assert math.isclose(evaluate_loss(model, [(i.flatten(), t.flatten()) for i, t in batches]), whole, rel_tol=1e-12)       # of any shape


def test_unequal_batches_by_hand():
    model = Table(2)
    with torch.no_grad(): model.table.weight.copy_(torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]))
    batch = lambda i, t: (torch.tensor([i]), torch.tensor([t]))
    loss = evaluate_loss(model, [batch([0, 0, 0], [1, 1, 1]), batch([1], [0])])
    assert math.isclose(loss, (3 * math.log(4 / 3) + math.log(2)) / 4, rel_tol=1e-6)


def test_a_model_is_left_as_it_was():
    model, batches = GPT(GPTConfig(13, 6, 2, 2, 8, dropout=0.5)), [tuple(torch.randint(13, (2, 3, 6)))]
    for train in (True, False):
        model.train(train)
        model.blocks[1].eval()
        before, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
        torch.manual_seed(3)
        random = torch.get_rng_state()
        assert evaluate_loss(model, batches) == evaluate_loss(model, batches)
        assert [m.training for m in model.modules()] == before and torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and all(p.grad is None for p in model.parameters())
        with pytest.raises(ValueError, match='targets holds 99'): evaluate_loss(model, [*batches, (batches[0][0], torch.full((3, 6), 99))])
        assert [m.training for m in model.modules()] == before and torch.is_grad_enabled()


def test_dropout_rests_and_no_gradients_are_kept():
    model, batch = Table(), tuple(torch.randint(13, (2, 3, 6)))
    loss = evaluate_loss(model, [batch, batch])
    assert isinstance(loss, float) and model.calls == [(False, False, 3)] * 2 and model.training
    assert math.isclose(loss, F.cross_entropy(model.table(batch[0]).flatten(0, 1), batch[1].flatten()).item(), rel_tol=1e-6)


def test_no_more_batches_are_read_than_wanted():
    model, read = Table(), []
    def batches():
        for k in range(5):
            read.append(k)
            yield tuple(torch.randint(13, (2, k + 1, 6)))
    evaluate_loss(model, batches(), max_batches=2)
    assert read == [0, 1] and [n for *_, n in model.calls] == [1, 2]
    read.clear()
    evaluate_loss(model, batches(), np.int64(99))
    assert read == [0, 1, 2, 3, 4]
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match='max_batches'): evaluate_loss(model, batches(), bad)


def test_no_batches():
    model = Table()
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match='^batches is empty.*give at least one batch'): evaluate_loss(model, empty)
    assert model.training


def test_a_model_without_parameters_and_batches_elsewhere():
    class Even(nn.Module):
        def forward(self, ids): return torch.zeros(*ids.shape, 4)
    assert math.isclose(evaluate_loss(Even(), [(torch.zeros(1, 3).long(),) * 2]), math.log(4), rel_tol=1e-6)
    with torch.device('meta'): model = Table()
    seen = []
    model.forward = lambda ids: seen.append(ids.device.type) or torch.zeros(*ids.shape, 13, device='meta')
    with pytest.raises(RuntimeError, match='meta'): evaluate_loss(model, [tuple(torch.randint(13, (2, 3, 6)))])      # a meta tensor has no number
    assert seen == ['meta']
