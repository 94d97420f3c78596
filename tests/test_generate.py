"Filters against brute force, the cache against a model without one, a batch against each of its rows alone, and everything that must be refused."
import copy, itertools, math, threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook import generate as module
from llmbook.core import set_seed
from llmbook.generate import (Int8Linear, KVCache, apply_temperature, draw, filter_top_k, filter_top_p, generate, generate_batch, next_probabilities,
                              quantize_int8, stream, stream_batch)
from llmbook.gpt import GPT, GPTConfig
from torch import nn

SEEDS = st.integers(0, 2**31)
ROWS = st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=1, max_size=12)      # few different values, so ties are frequent


pytestmark = pytest.mark.usefixtures('one_thread')


def wild(V=11, L=9, N=2, H=2, D=3, seed=0, dropout=0.4, dtype=torch.double, **more):
    "An untrained model with large weights, so that what it writes depends on all it reads."
    torch.manual_seed(seed)
    model = GPT(GPTConfig(V, L, N, H, H * D, dropout=dropout, **more)).to(dtype)
    for p in model.parameters(): nn.init.normal_(p, std=0.5)
    return model


CONFIGS = st.builds(lambda V, L, N, H, D, seed, bias, tied: wild(V, L, N, H, D, seed, bias=bias, tied=tied),
                    st.integers(2, 13), st.integers(2, 11), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), SEEDS, st.booleans(), st.booleans())


# ---- filters and probabilities

@settings(max_examples=300)
@given(ROWS, st.integers(1, 15))
def test_top_k_by_hand(row, k):
    kept = filter_top_k(torch.tensor([row, row[::-1]]), k)
    least = sorted(row, reverse=True)[min(k, len(row)) - 1]
    want = [x if x >= least else -math.inf for x in row]
    assert kept.tolist() == [want, want[::-1]]
    assert sum(x > -math.inf for x in want) >= min(k, len(row))


@settings(max_examples=300)
@given(ROWS, st.floats(0.01, 1))
@example([0.0] * 10, 0.35)
def test_top_p_by_hand(row, p):
    "The fewest tokens, the likeliest first and of equals the first, that reach p."
    exps = [math.exp(x) for x in row]
    order = sorted(range(len(row)), key=lambda i: -row[i])
    kept, total = set(), 0.0
    for i in order:
        if abs(total / sum(exps) - p) < 1e-9: return                  # at the border rounding may decide
        if total / sum(exps) >= p: break
        kept.add(i)
        total += exps[i]
    want = [x if i in kept or p == 1 else -math.inf for i, x in enumerate(row)]
    assert filter_top_p(torch.tensor(row, dtype=torch.double), p).tolist() == want
    assert filter_top_p(torch.tensor([[row], [row]]), p)[1, 0].tolist() == want


@given(ROWS, st.integers(1, 30))
def test_no_smaller_set_reaches_p(row, hundredths):
    p = hundredths / 31
    kept = filter_top_p(torch.tensor(row, dtype=torch.double), p) > -math.inf
    shares = torch.tensor(row, dtype=torch.double).softmax(0)
    size = int(kept.sum())
    assert shares[kept].sum() >= p - 1e-9
    assert all(sum(s) < p + 1e-9 for s in itertools.islice(itertools.combinations(shares.tolist(), size - 1), 2000))


@settings(max_examples=200)
@given(ROWS, st.floats(0.05, 20), st.one_of(st.none(), st.integers(1, 14)), st.one_of(st.none(), st.floats(0.01, 1)))
def test_probabilities_are_filters_in_order(row, temperature, k, p):
    logits = torch.tensor(row)
    got = next_probabilities(logits, temperature, k, p)
    assert got.dtype == torch.double and math.isclose(got.sum().item(), 1, rel_tol=1e-12) and torch.equal(logits, torch.tensor(row))
    x = [v / temperature for v in row]
    if k is not None: x = [v if v >= sorted(x)[-min(k, len(x))] else -math.inf for v in x]
    if p is not None: x = filter_top_p(torch.tensor(x, dtype=torch.double), p).tolist()
    exps = [math.exp(v - max(x)) for v in x]
    torch.testing.assert_close(got, torch.tensor([e / sum(exps) for e in exps], dtype=torch.double), rtol=1e-9, atol=1e-12)
    assert next_probabilities(logits, 0).tolist() == [float(i == row.index(max(row))) for i in range(len(row))]


def test_the_worked_example():
    logits = torch.tensor([8, 4, 2, 1, 1], dtype=torch.double).log()
    as_parts = lambda x, of: [round(v * of, 9) for v in x.tolist()]
    assert as_parts(next_probabilities(logits), 16) == [8, 4, 2, 1, 1]
    assert as_parts(next_probabilities(logits, 0.5), 86) == [64, 16, 4, 1, 1]
    assert as_parts(next_probabilities(logits, top_k=2), 3) == [2, 1, 0, 0, 0]
    assert as_parts(next_probabilities(logits, top_k=4), 16) == [8, 4, 2, 1, 1]        # the fourth and the fifth are equal
    assert as_parts(next_probabilities(logits, top_p=0.8), 14) == [8, 4, 2, 0, 0]
    assert as_parts(next_probabilities(logits, top_k=3, top_p=0.8), 3) == [2, 1, 0, 0, 0]     # of 14, 12 are enough
    assert as_parts(next_probabilities(logits, 0.5, top_p=0.9), 5) == [4, 1, 0, 0, 0]         # temperature comes first
    assert filter_top_k(logits, 100).equal(logits) and filter_top_p(logits, 1).equal(logits)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.double])
@pytest.mark.parametrize('temperature', [5e-324, 1e-300, 1e-30, 1e-3, 1e30, 1e308])
def test_extreme_temperatures_and_logits(dtype, temperature):
    for scale in (1, 1e4):
        p = next_probabilities(torch.tensor([1., 3, 2, 3], dtype=dtype) * scale, temperature)
        assert p.isfinite().all() and math.isclose(p.sum().item(), 1)
        assert p.tolist() == [0, 0.5, 0, 0.5] if temperature < 1e-2 else (p - 0.25).abs().max() < 1e-6


# ---- drawing

@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9).filter(any), SEEDS)
def test_a_draw_is_where_the_dart_hits(parts, seed):
    p = torch.tensor(parts, dtype=torch.double) / sum(parts)
    dart = torch.rand((), dtype=torch.double, generator=torch.Generator().manual_seed(seed)).item()
    ends = list(itertools.accumulate(parts))
    got = draw(p, torch.Generator().manual_seed(seed))
    assert type(got) is int and parts[got] > 0
    if all(abs(dart * sum(parts) - e) > 1e-9 for e in ends): assert got == next(i for i, e in enumerate(ends) if dart * sum(parts) < e)


def test_the_ends_of_the_line(monkeypatch):
    p = torch.tensor([0, 0.3, 0, 0.7, 0, 0], dtype=torch.double)
    for dart, want in ((0.0, 1), (0.3, 3), (1 - 2**-53, 3), (1.0, 3), (0.29999, 1)):
        monkeypatch.setattr(module.torch, 'rand', lambda *a, **k: torch.tensor(dart, dtype=torch.double))
        assert draw(p, None) == want


def test_frequencies():
    p, generator = torch.tensor([0.5, 0.25, 0, 0.15, 0.1], dtype=torch.double), torch.Generator().manual_seed(123)
    counts = torch.bincount(torch.tensor([draw(p, generator) for _ in range(20_000)]), minlength=5) / 20_000
    assert (counts - p).abs().max() < 0.012 and counts[2] == 0


# ---- the cache

@settings(max_examples=60, deadline=None)
@given(CONFIGS, st.integers(1, 3), st.data())
def test_cached_is_uncached(model, B, data):
    "Any chunks, to the end of the context, twice with one cache; the second time from a place in the middle."
    model.eval()
    L, V = model.config.context_length, model.config.vocab_size
    cache = KVCache(model, B)
    with torch.no_grad():
        for again in range(2):
            T, kept = data.draw(st.integers(1, L)), 0
            ids = torch.randint(V, (B, T))
            if again:
                kept = data.draw(st.integers(0, min(T, cache.length)))
                ids[:, :kept] = before[:, :kept]
            cache.reset(kept)
            want = model(ids)
            cuts = sorted(data.draw(st.lists(st.integers(kept, T), max_size=5)))
            for a, b in zip([kept, *cuts], [*cuts, T]):
                assert cache.length == a
                if a == b: continue
                last = data.draw(st.booleans())
                got = model(ids[:, a:b], cache, last_only=last)
                torch.testing.assert_close(got, want[:, b - 1:b] if last else want[:, a:b], rtol=1e-9, atol=1e-9)
            assert cache.length == T
            before = ids


@settings(max_examples=40, deadline=None)
@given(CONFIGS, st.data())
def test_every_prefill(model, data):
    model.eval()
    L = model.config.context_length
    ids = torch.randint(model.config.vocab_size, (2, L))
    with torch.inference_mode():
        want = model(ids)
        for prefill in range(1, L + 1):
            cache = KVCache(model, 2)
            cache.numbers.fill_(math.nan)                                # nothing is read that was not written
            got = [model(ids[:, :prefill], cache), *(model(ids[:, t:t + 1], cache) for t in range(prefill, L))]
            torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(model(ids, last_only=True), want[:, -1:], rtol=1e-9, atol=1e-9)


def test_a_failed_call_leaves_the_cache_as_it_was():
    model = wild().eval()
    with torch.no_grad():
        cache = KVCache(model, 2)
        ids = torch.randint(11, (2, 9))
        model(ids[:, :4], cache)
        hook = model.blocks[1].register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError): model(ids[:, 4:7], cache)
        hook.remove()
        with pytest.raises(ValueError, match='position 9 has no vector'): model(torch.cat([ids, ids], 1)[:, :6], cache)
        assert cache.length == 4
        torch.testing.assert_close(model(ids[:, 4:], cache), model(ids)[:, 4:])


def test_what_a_cache_refuses():
    model = wild().eval()
    cache, ids = KVCache(model, 2, context_length=4), torch.zeros(2, 5, dtype=torch.int64)
    assert tuple(cache.numbers.shape) == (2, 2, 2, 2, 4, 3) and cache.numbers.dtype == torch.double and cache.context_length == 4
    with pytest.raises(ValueError, match=r'no gradient through it; call the model under torch\.inference_mode'): model(ids[:, :2], cache)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r'room for 4 tokens, and holds 0; 5 more do not fit: cache\.reset'): model(ids, cache)
        model(ids[:, :3], cache)
        with pytest.raises(ValueError, match='room for 4 tokens, and holds 3; 2 more'): model(ids[:, :2], cache)
        with pytest.raises(ValueError, match=r'\(3, 2, 1, 3\), and this cache was made for \(B, H, T, D\) = \(2, 2, T, 3\)'): model(ids[:1, :1].expand(3, 1), cache)
    assert cache.length == 3
    with pytest.raises(ValueError, match='length=4 is more than the cache holds, which is 3'): cache.reset(4)
    with pytest.raises(ValueError, match='length=-1 is too small'): cache.reset(-1)
    cache.reset(2)
    assert cache.length == 2
    cache.reset()
    assert cache.length == 0
    with pytest.raises(ValueError, match='context_length=10 is more than the model can read, which is 9'): KVCache(model, 2, 10)
    for bad in (0, -1):
        with pytest.raises(ValueError, match='batch_size'): KVCache(model, bad)
        with pytest.raises(ValueError, match='context_length'): KVCache(model, 1, bad)


# ---- writing

SETTINGS = st.fixed_dictionaries({}, optional={'temperature': st.sampled_from([0, 0.3, 1.0, 2]), 'top_k': st.integers(1, 15), 'top_p': st.floats(0.1, 1),
                                               'stop': st.lists(st.integers(0, 12), max_size=2), 'slide': st.just(True), 'seed': st.integers(0, 99)})


def by_hand(model, ids, new, temperature=1.0, top_k=None, top_p=None, stop=(), seed=123, slide=True):
    "One text, one token at a time, nothing kept."
    ids, L, generator = list(ids), model.config.context_length, torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).eval()
    for _ in range(new):
        if not slide and len(ids) > L: break
        with torch.no_grad(): logits = model(torch.tensor([ids[-L:]]))[0, -1]
        ids.append(draw(next_probabilities(logits, temperature, top_k, top_p), generator) if temperature else int(logits.argmax()))
        if ids[-1] in stop: break
    return ids


@settings(max_examples=60, deadline=None)
@given(CONFIGS, st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(0, 15), SETTINGS, st.data())
def test_a_batch_is_each_of_its_rows_alone(model, lengths, new, how, data):
    "With and without cache, past the end of the context, whatever the settings."
    prompts = [torch.randint(model.config.vocab_size, (n,)) for n in lengths]
    seed = how.pop('seed', 123)
    want = [by_hand(model, p.tolist(), new, seed=seed + i, **how) for i, p in enumerate(prompts)]
    for cached in (True, False):
        assert generate_batch(model, prompts, new, seed=seed, use_cache=cached, **how) == want
        alone = [generate(model, p, new, seed=seed + i, use_cache=cached, **how) for i, p in enumerate(prompts)]
        assert alone == want


@settings(max_examples=40, deadline=None)
@given(CONFIGS, st.integers(0, 20), st.data())
def test_without_sliding_it_ends_with_the_context(model, new, data):
    L = model.config.context_length
    prompts = [torch.randint(model.config.vocab_size, (data.draw(st.integers(1, L)),)).tolist() for _ in range(3)]
    for cached in (True, False):
        got = generate_batch(model, prompts, new, slide=False, use_cache=cached)
        assert got == [by_hand(model, p, new, seed=123 + i, slide=False) for i, p in enumerate(prompts)]
        assert [len(g) for g in got] == [min(len(p) + new, L + 1) for p in prompts]


def test_float32_writes_the_same_with_and_without_cache():
    "Logits differ in the last digits; a draw differs only where a dart falls between."
    for seed in range(15):
        model = wild(30, 40, 3, 2, 8, seed=seed, dtype=torch.float32)
        assert generate(model, [1, 2, 3], 60, seed=seed) == generate(model, [1, 2, 3], 60, seed=seed, use_cache=False)


def test_stop_is_written_and_ends_only_its_row():
    model = wild(L=30)
    free = generate_batch(model, [[1], [2, 3], [4] * 5], 20)
    stop = free[0][4]
    for form in (stop, [stop], {stop}, torch.tensor(stop), np.int64(stop), iter([stop, 10**9])):
        cut = generate_batch(model, [[1], [2, 3], [4] * 5], 20, stop=form)
        for whole, part, n in zip(free, cut, (1, 2, 5)):
            end = next((i + 1 for i in range(n, len(whole)) if whole[i] == stop), len(whole))
            assert part == whole[:end]
    assert len(cut[0]) <= 5


def test_the_loop_ends_when_all_rows_have():
    calls = []
    def model(ids):
        calls.append(ids.shape)
        return torch.nn.functional.one_hot((ids + 1) % 9, 9).double() * 50
    assert generate_batch(model, [[5], [1, 2, 3]], 50, temperature=0, stop=8) == [[5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]]
    assert calls == [(2, t) for t in range(1, 8)]
    calls.clear()
    assert generate_batch(model, [[8], [1] * 9], 1, stop=0) == [[8, 0], [1] * 9 + [2]]
    assert calls == [(2, 1), (2, 9)]                                     # nothing is computed where no row writes


def test_no_work_is_done_twice():
    model, seen = wild(L=50).eval(), []
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    head = []
    model.lm_head.register_forward_pre_hook(lambda m, args: head.append(args[0].shape[1]))
    generate(model, [1] * 7, 5)
    assert seen == [7, 1, 1, 1, 1] and head == [1] * 5
    seen.clear(); generate(model, [1] * 7, 5, use_cache=False)
    assert seen == [7, 8, 9, 10, 11]
    seen.clear(); generate_batch(model, [[1] * 3, [2] * 9], 2)
    assert seen == [3, 1, 5, 1]
    full, seen = wild(L=9), []
    full.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    generate(full, [1] * 7, 4)
    assert seen == [7, 1, 1, 9]                                          # to the last place of the context, and then the cropped window


# ---- streams, generators, modes

def test_a_stream_can_be_interrupted_and_goes_on():
    model = wild(L=8)
    whole = generate(model, [1, 2], 30)[2:]
    written = stream(model, [1, 2], 30)
    first = list(itertools.islice(written, 11))
    torch.rand(5); generate(model, [3], 9); set_seed(1)                  # other draws do not matter
    assert torch.is_inference_mode_enabled() is False and torch.is_grad_enabled()
    assert first + list(written) == whole
    generator = torch.Generator().manual_seed(123)                       # or later, from the ids and the generator
    part = generate(model, [1, 2], 11, seed=generator)
    assert generate(model, part, 19, seed=generator)[2:] == whole


def test_tokens_come_as_soon_as_they_are_written():
    calls = []
    def model(ids): calls.append(1); return torch.zeros(*ids.shape, 4)
    written = stream(model, [0], 5)
    for n in range(1, 6):
        next(written)
        assert len(calls) == n
    pairs = list(stream_batch(model, [[1], [2, 3]], 2, temperature=0))
    assert pairs == [(0, 0), (0, 0), (1, 0), (1, 0)]


def test_the_global_generator_is_left_alone():
    model = wild()
    set_seed(5)
    before = torch.get_rng_state()
    a = generate(model, [1], 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert generate(model, [1], 20) == a != generate(model, [1], 20, seed=124)
    own = [torch.Generator().manual_seed(9), 4]
    assert generate_batch(model, [[1], [2]], 9, seed=own) == [generate(model, [1], 9, seed=9), generate(model, [2], 9, seed=4)]
    assert generate_batch(model, [[1], [1]], 9, seed=[7, 7])[0] == generate(model, [1], 9, seed=7)


@pytest.mark.parametrize('cached', [True, False])
def test_dropout_does_not_act_and_modes_return(cached):
    model = wild(dropout=0.5)
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    written = stream(model, [1, 2], 20, use_cache=cached)
    for _ in range(3): next(written); assert [m.training for m in model.modules()] == modes
    written.close()
    assert generate(model, [1, 2], 20, use_cache=cached) == by_hand(model, [1, 2], 20)
    model.lm_head.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): generate(model, [1], 2, use_cache=cached)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Other(nn.Module):
    "A model of another kind, with a length and without a cache."
    context_length = 3
    def __init__(self): super().__init__(); self.table = nn.Parameter(torch.eye(7).roll(1, 1) * 9)
    def forward(self, ids): assert ids.shape[1] <= 3; return self.table[ids]


def test_any_model_will_do():
    assert generate(Other(), [2], 8, temperature=0) == [2, 3, 4, 5, 6, 0, 1, 2, 3]
    assert generate(lambda ids: Other().table[ids], [2] * 9, 2, temperature=0) == [2] * 9 + [3, 4]
    seen = []
    def model(ids): seen.append(ids.shape[1]); return torch.zeros(*ids.shape, 2)
    generate(model, [1] * 6, 3, context_length=4)
    assert seen == [4, 4, 4]
    gpt = wild(L=9)
    assert generate(gpt, [1, 2, 3], 9, context_length=4) == generate(gpt, [1, 2, 3], 9, context_length=4, use_cache=False)
    with pytest.raises(ValueError, match='context_length=4 is more than the model can read'): generate(Other(), [1], 2, context_length=4)


# ---- what is refused

def test_prompts():
    model = wild()
    assert generate(model, torch.tensor([1, 2]), 0) == [1, 2] == generate(model, (np.int64(1), 2), 0)
    assert generate_batch(model, [], 5) == [] and list(stream(model, [1], 0)) == [] and generate_batch(model, torch.tensor([[1], [2]]), 0) == [[1], [2]]
    for call in (generate, stream): 
        with pytest.raises(ValueError, match='^ids is empty, and a model continues what is there; begin with one token'): call(model, [])
        with pytest.raises(TypeError, match=r"^ids='abc' is not a row of token ids; for a text: tokenizer\.encode"): call(model, 'abc')
        with pytest.raises(TypeError, match=r'^ids has shape \(1, 2\) and dtype torch.int64; give one row.*generate_batch'): call(model, torch.tensor([[1, 2]]))
        with pytest.raises(TypeError, match='dtype torch.float32'): call(model, torch.tensor([1., 2]))
        with pytest.raises(TypeError, match=r'not a row of token ids.*generate_batch'): call(model, [[1, 2]])
        with pytest.raises(TypeError, match='not a row'): call(model, 3)
    for call in (generate_batch, stream_batch):
        with pytest.raises(ValueError, match=r'^prompts\[1\] is empty'): call(model, [[1], []])
    with pytest.raises(ValueError, match='ids.* is 11.*allowed are 0 to 10'): generate(model, [1, 11], 2)
    with pytest.raises(ValueError, match='a prompt has 10 tokens, and the model reads 9; with slide=True only its last 9'): generate(model, [1] * 10, 2, slide=False)
    assert generate(model, [5] * 3 + [1] * 9, 9) == [5] * 3 + generate(model, [1] * 9, 9)


@pytest.mark.parametrize('name, value, error, words', [
    ('temperature', -0.1, ValueError, 'temperature=-0.1 is not allowed; give 0 for the likeliest'), ('temperature', math.nan, ValueError, 'temperature=nan'),
    ('temperature', math.inf, ValueError, 'temperature=inf'), ('temperature', '1', TypeError, "temperature='1' is not a number"), ('temperature', True, TypeError, 'temperature=True'),
    ('temperature', None, TypeError, 'temperature=None'), ('top_k', 0, ValueError, 'top_k=0 is too small; the smallest that is allowed is 1'), ('top_k', -1, ValueError, 'top_k=-1'),
    ('top_k', 2.0, TypeError, 'top_k=2.0 is not a whole'), ('top_p', 0, ValueError, r'top_p=0 is not allowed; give a number in \(0, 1\]'), ('top_p', 1.01, ValueError, 'top_p=1.01'),
    ('top_p', -0.5, ValueError, 'top_p=-0.5'), ('top_p', math.nan, ValueError, 'top_p=nan'), ('top_p', '0.9', TypeError, "top_p='0.9' is not a number"),
    ('max_new_tokens', -1, ValueError, 'max_new_tokens=-1 is too small'), ('max_new_tokens', 1.5, TypeError, 'max_new_tokens=1.5'), ('seed', -1, ValueError, 'seed=-1'),
    ('seed', 1.0, TypeError, 'seed=1.0'), ('seed', [1, 2], ValueError, 'seed is for 2 rows, and there are 1 prompts'), ('context_length', 0, ValueError, 'context_length=0'),
    ('context_length', 10, ValueError, 'context_length=10 is more than the model can read')])
def test_settings_are_refused_before_anything_is_written(name, value, error, words):
    with pytest.raises(error, match=words): stream(wild(), [1], **{'max_new_tokens': 5, name: value})


def test_filters_refuse_too():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match='top_k=0'): filter_top_k(x, 0)
    with pytest.raises(ValueError, match='top_p=2'): filter_top_p(x, 2)
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r'temperature=.* for 0, take logits\.argmax'): apply_temperature(x, bad)


@pytest.mark.parametrize('temperature', [0, 1.0])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_logits_that_are_no_scores(temperature, bad):
    def model(ids): return torch.where(torch.arange(5) == 3, bad, 0.0).expand(*ids.shape, 5)
    with pytest.raises(ValueError, match=f'the largest of the logits is {bad}, so they are no scores'): generate(model, [1], 3, temperature=temperature)
    with pytest.raises(ValueError, match='largest of the logits is -inf'): next_probabilities(torch.full((4,), -math.inf), temperature)
    assert next_probabilities(torch.tensor([-math.inf, 1.0]), temperature).tolist() == [0, 1]


@pytest.mark.parametrize('wrong', [lambda ids: ids, lambda ids: None, lambda ids: (torch.zeros(1, 1, 4),), lambda ids: torch.zeros(4)])
def test_what_is_no_model(wrong):
    with pytest.raises(TypeError, match=r'the model gave .* for ids of shape \(1, 1\); it must give logits of shape \(B, T, V\)'): generate(wrong, [1], 2)


# ---- eight bits

@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 3, 16, 31, 32, 64, 96, 128, 33]), st.integers(1, 40), st.lists(st.integers(1, 4), max_size=3), st.booleans(), SEEDS)
def test_an_int8_layer_is_nearly_the_layer(n_in, n_out, shape, bias, seed):
    set_seed(seed)
    linear = nn.Linear(n_in, n_out, bias=bias)
    small = Int8Linear(linear)
    assert small.weight.dtype == torch.int8 and small.weight.abs().max() <= 127
    off = (small.weight * small.scale[:, None] - linear.weight).abs()
    assert (off <= small.scale[:, None] * 0.5001).all()                  # rounded to the nearest
    x = torch.randn(*shape, n_in)
    y = small(x)
    assert y.shape == linear(x).shape and y.dtype == x.dtype
    reference = torch.nn.functional.linear(x, small.weight * small.scale[:, None], linear.bias)
    room = 2**-7 * (x.abs() @ (small.weight * small.scale[:, None]).abs().T)
    assert ((y - reference).abs() <= room + 1e-5).all()


def test_a_model_in_eight_bits():
    model = wild(V=50, L=16, H=2, D=16, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = quantize_int8(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and all(type(m) is not Int8Linear for m in model.modules())
    assert [n for n, m in small.named_modules() if type(m) is Int8Linear] == [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert small.token_embedding.weight is not model.token_embedding.weight
    model.eval(); small.eval()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad(): error = (small(ids) - model(ids)).std() / model(ids).std()
    assert 0 < error < 0.1
    assert len(generate(small, [1], 20)) == 21
    zero = nn.Linear(32, 4)
    nn.init.zeros_(zero.weight)
    assert torch.equal(Int8Linear(zero)(torch.ones(32)), zero.bias)


# ---- found by attack: each of these once failed, or no other test would have noticed

def test_numbers_of_every_kind():
    for bad in (b'x', torch.tensor([0.5, 0.5]), 10**400):
        with pytest.raises(TypeError, match='temperature=.* is not a number'): stream(wild(), [1], temperature=bad)
    assert apply_temperature(torch.tensor([0., 1]), Fraction(1, 2)).tolist() == [-2, 0]
    assert next_probabilities(torch.zeros(3), 0).dtype == torch.double


def test_each_row_by_itself():
    assert apply_temperature(torch.tensor([[1., 3], [7, 5]]), 2).tolist() == [[-1, 0], [0, -1]]
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match='largest of the logits is nan'): next_probabilities(torch.tensor([[0., 1], [math.nan, 0]]), temperature)


def test_top_p_at_its_borders():
    assert filter_top_p(torch.tensor([0., -1000]), 1).tolist() == [0, -1000]
    for n in (4, 10, 49, 4096):
        for k in {1, n // 3, n // 2, 4 * n // 5, n - 1}:
            kept = filter_top_p(torch.zeros(n), k / n) > -math.inf
            assert kept.tolist() == [i < k for i in range(n)]      # the first of equals, and no more, whatever sums are rounded to


def test_a_cache_of_other_heads_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match='this cache was made for'): wild(H=3, D=2).eval()(torch.tensor([[1]]), KVCache(wild(H=2, D=3)))


def test_a_cache_is_where_the_model_is():
    with torch.device('meta'): model = GPT(GPTConfig(11, 9, 2, 2, 6))
    assert KVCache(model).numbers.is_meta


def test_products_are_used_only_if_they_are_right_and_faster(monkeypatch):
    assert module._onednn_pays.cache_info()
    pays = module._onednn_pays.__wrapped__
    kept = {}
    def quick(layer, x):
        if layer not in kept: kept[layer] = nn.Linear.forward(layer, x)
        return kept[layer]
    def slow(layer, x):
        nn.Linear.forward(layer, x)
        return nn.Linear.forward(layer, x)
    before = torch.get_rng_state()
    for product, used in ((quick, True), (slow, False), (lambda l, x: quick(l, x) + 1, False), (lambda l, x: torch.ops.mkldnn.no_such_thing(x), False)):
        monkeypatch.setattr(module, '_onednn_linear', product)
        assert pays() is used
    assert torch.equal(torch.get_rng_state(), before)      # a race draws nothing


def test_which_layers_get_the_fast_product(monkeypatch):
    monkeypatch.setattr(module, '_onednn_pays', lambda: True)
    class Half(nn.Linear):
        def forward(self, x): return super().forward(x) / 2
    own = nn.Linear(512, 512)
    own.forward = lambda x, f=own.forward: f(x) / 2
    compiled = nn.Linear(512, 512)
    compiled.compile(backend='eager')
    for layer in (Half(512, 512), own, compiled, torch.compile(nn.Linear(512, 512), backend='eager'), nn.Linear(9, 9), nn.Linear(512, 512).double()):
        before = [vars(m).get('forward') for m in layer.modules()]
        with module._at_rest(layer): assert [vars(m).get('forward') for m in layer.modules()] == before
        assert [vars(m).get('forward') for m in layer.modules()] == before


def test_the_fast_product_leaves_nothing_and_loses_no_gradient(monkeypatch):
    monkeypatch.setattr(module, '_MANY', 1)
    monkeypatch.setattr(module, '_onednn_pays', lambda: True)
    model = wild(V=30, L=20, D=8, dtype=torch.float32)
    want = generate(model, [1], 12, temperature=0)
    assert not any('forward' in vars(m) for m in model.modules())
    with module._at_rest(model):                 # as another thread would find it
        assert sum('forward' in vars(m) for m in model.modules()) == 9
        model(torch.tensor([[1, 2]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast('cpu', torch.bfloat16): assert len(generate(model, [1], 12)) == 13
    monkeypatch.setattr(module, '_onednn_pays', lambda: False)
    assert generate(model, [1], 12, temperature=0) == want


def test_two_threads_on_one_model():
    model = wild(V=30, L=40, D=8, dropout=0.5)
    want = generate(model, [1], 20)
    first_inside, second_inside, first_done = (threading.Event() for _ in range(3))
    def inside(*_):
        if threading.current_thread() is second:
            second_inside.set()
            first_done.wait(1)
        elif not first_inside.is_set():
            first_inside.set()
            second.start()
            second_inside.wait(1)
    got = []
    second = threading.Thread(target=lambda: got.append(generate(model, [1], 20)))
    model.blocks[0].register_forward_pre_hook(inside)
    generate(model, [5], 1)
    first_done.set()
    second.join()
    assert got == [want]


def test_interrupted_on_the_way_in():
    class Late(nn.Dropout):
        def __setattr__(self, name, value):
            if name == 'training' and not value and '_parameters' in vars(self): raise KeyboardInterrupt
            super().__setattr__(name, value)
    model = nn.Sequential(nn.Embedding(4, 4), nn.Dropout(), Late())
    with pytest.raises(KeyboardInterrupt): generate(model, [1], 2)
    assert all(m.training for m in model.modules())


def test_room_is_made_as_it_is_needed():
    assert next(stream(wild(), [1], 10**12)) in range(11)
    assert next(stream(wild(), [1], 10**30, slide=False)) in range(11)


def test_stop_in_every_form():
    free = generate(wild(L=30), [1], 20)
    for stop in (free[4], [free[4]], {free[4]}, torch.tensor([free[4], 99]), torch.tensor(free[4]), np.array([free[4]]), np.array(free[4])):
        assert generate(wild(L=30), [1], 20, stop=stop) == free[:free.index(free[4], 1) + 1]
    for bad in (None, 'a', '', 3.0, [2.5]):
        with pytest.raises(TypeError, match='^stop='): stream(wild(), [1], stop=bad)


def test_seeds_in_every_form():
    prompts, want = [[1], [2]], generate_batch(wild(), [[1], [2]], 9, seed=[4, 2**64 + 5])
    for seeds in (np.array([4, 5]), torch.tensor([4, 5]), (4, 5), 4): assert generate_batch(wild(), prompts, 9, seed=seeds) == want
    assert generate_batch(wild(), iter(prompts), 9, seed=4) == want and generate(wild(), iter([1]), 9, seed=4) == want[0]


def test_another_default_device():
    torch.set_default_device('meta')
    try: assert draw(torch.tensor([0., 1], device='cpu'), torch.Generator('cpu')) == 1
    finally: torch.set_default_device(None)


def test_the_head_reads_one_place_past_the_context_too():
    model, seen = wild(L=5), []
    model.lm_head.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    generate(model, [1] * 4, 5)
    assert seen == [1] * 5


def test_models_that_have_half_of_it():
    gpt = wild().eval()
    class WithoutLastOnly(nn.Module):
        config = gpt.config
        def forward(self, ids, cache=None): assert cache is None; return gpt(ids)
    class WithoutConfig(nn.Module):
        context_length = 9
        def forward(self, ids, cache=None, last_only=False): assert cache is None; return gpt(ids)
    for model in (WithoutLastOnly(), WithoutConfig()): assert generate(model, [1], 15) == generate(gpt, [1], 15)


def test_8_bits_use_their_whole_range():
    layer = nn.Linear(16, 5)
    with torch.no_grad(): layer.weight[0] *= 1000
    small = Int8Linear(layer)
    assert small.weight.abs().amax(dim=1).tolist() == [127] * 5 and not small.scale.requires_grad and repr(small) == 'Int8Linear(16, 5)'
    for dtype, size in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        layer = nn.Linear(64, 200, bias=False).to(dtype)
        with torch.no_grad(): layer.weight *= size
        small = Int8Linear(layer)
        assert small.weight.min() >= -127 and ((small.weight.sign() * layer.weight.sign()) >= 0).all()
        assert small(torch.ones(2, 64, dtype=dtype)).dtype == dtype


def test_the_fast_product_of_8_bits(monkeypatch):
    calls, real = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, '_weight_int8pack_mm', lambda *args: calls.append(1) or real(*args))
    for width in (64, 33): Int8Linear(nn.Linear(width, 3))(torch.ones(width))
    assert calls == [1]
    assert Int8Linear(nn.Linear(64, 3))(torch.ones(64, 2).T).shape == (2, 3) and Int8Linear(nn.Linear(33, 3))(torch.ones(0, 33)).shape == (0, 3)


def test_a_rounded_copy_shares_nothing():
    class Other(nn.Linear): pass
    assert type(quantize_int8(nn.Sequential(Other(4, 4)))[0]) is Other
    quantize_int8(nn.MultiheadAttention(32, 2, batch_first=True))(*[torch.ones(1, 3, 32)] * 3)
    model = wild(V=50, L=16, D=16, dtype=torch.float32).eval()
    small = quantize_int8(model)
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not any(m.training for m in small.modules())
    small.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
