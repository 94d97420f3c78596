"The formulas against real models and PyTorch's counter, on random sizes; time, cost and bytes against plain arithmetic; and everything that must be refused."
import math
import subprocess
import sys
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook.budget import GPT_SIZES, PEAK_FLOPS, count_gpt_parameters, forward_flops, memory_bytes, training_cost, training_flops, training_time
from llmbook.core import count_parameters
from llmbook.gpt import GPT, GPT2_SIZES, GPTConfig
from torch.utils.flop_counter import FlopCounterMode

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 17), st.integers(1, 4), st.integers(1, 3), st.integers(1, 7)).map(
    lambda s: dict(vocab_size=s[0], context_length=s[1], n_layer=s[2], n_head=s[3], n_embd=s[3] * s[4]))
SWITCHES = st.fixed_dictionaries({'bias': st.booleans(), 'qkv_bias': st.none() | st.booleans(), 'tied': st.booleans()})
POSITIVE = st.floats(1e-3, 1e24)


def build(**config):
    with torch.device('meta'): return GPT(GPTConfig(**config))


def counted(run, backward=False):
    with FlopCounterMode(display=False) as counter, torch.device('meta'):
        logits = run()
        if backward: logits.sum().backward()
    return counter.get_total_flops()


# ---- parameters

@settings(max_examples=80, deadline=None)
@given(SIZES, SWITCHES)
@example(dict(vocab_size=1, context_length=1, n_layer=1, n_head=1, n_embd=1), dict(bias=False, qkv_bias=True, tied=False))
def test_parameters_equal_those_of_a_model(sizes, switches):
    assert count_gpt_parameters(**sizes, **switches) == count_parameters(build(**sizes, **switches))
    without = {k: v for k, v in sizes.items() if k != 'n_head'}
    assert count_gpt_parameters(**without, **switches) == count_gpt_parameters(**sizes, **switches)


def test_sizes_are_those_of_the_models():
    names = {f.name for f in fields(GPTConfig)}
    assert all(set(size) <= names for size in GPT_SIZES.values())
    ours = [GPTConfig(**size) for name, size in GPT_SIZES.items() if name.startswith('GPT-2')]
    assert ours == list(GPT2_SIZES.values())
    assert list(GPT_SIZES)[:4] == [f'GPT-2 {name}' for name in GPT2_SIZES]
    assert [count_gpt_parameters(**size) for size in GPT_SIZES.values()] == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200, 174_604_259_328]
    assert GPT_SIZES['GPT-3 175B'] == dict(vocab_size=50_257, context_length=2048, n_layer=96, n_head=96, n_embd=12_288)


def test_numpys_numbers_will_do():
    size = {k: np.int64(v) for k, v in GPT_SIZES['GPT-3 175B'].items()}
    assert count_gpt_parameters(**size) == 174_604_259_328 and forward_flops(**size) == forward_flops(**GPT_SIZES['GPT-3 175B'])
    assert type(count_gpt_parameters(**size)) is int


# ---- operations

@settings(max_examples=60, deadline=None)
@given(SIZES, SWITCHES, st.integers(1, 3))
def test_operations_equal_pytorchs_count(sizes, switches, B):
    "Exactly, forward and, three times as many, forward and back."
    model, T = build(**sizes, **switches), sizes['context_length']
    ids = torch.zeros(B, T, dtype=torch.int64, device='meta')
    assert counted(lambda: model(ids)) == B * T * forward_flops(**sizes)
    assert counted(lambda: model(ids), backward=True) == 3 * B * T * forward_flops(**sizes)


def test_a_shorter_text():
    sizes = dict(vocab_size=11, context_length=9, n_layer=2, n_head=3, n_embd=12)
    ids = torch.zeros(1, 4, dtype=torch.int64, device='meta')
    assert counted(lambda: build(**sizes)(ids)) == 4 * forward_flops(**{**sizes, 'context_length': 4})


def test_the_rule_comes_close_for_wide_models():
    for name, size in GPT_SIZES.items():
        assert 0.85 < training_flops(count_gpt_parameters(**size), 1) / (3 * forward_flops(**size)) < 1, name
    short = {**GPT_SIZES['GPT-3 175B'], 'context_length': 1}
    assert math.isclose(training_flops(count_gpt_parameters(**short), 1), 3 * forward_flops(**short), rel_tol=1e-3)


@given(st.integers(1, 10**15), st.integers(1, 10**15))
def test_whole_numbers_stay_exact(parameters, tokens):
    assert training_flops(parameters, tokens) == 6 * parameters * tokens and type(training_flops(parameters, tokens)) is int
    assert memory_bytes(parameters) == 16 * parameters


def test_known_answers():
    assert math.isclose(training_flops(175e9, 300e9), 3.15e23)
    flops = training_flops(count_gpt_parameters(**GPT_SIZES['GPT-3 175B']), 300e9)
    assert round(flops / 1e21) == 314                                             # Brown et al. 2020, table D.1
    assert int(training_time(flops, 28e12) / (365 * 86400)) == 355               # Li 2020
    assert int(training_cost(flops, 28e12, 1.50) / 1e5) == 46
    assert round(training_time(flops * 8 / 6, 140e12, devices=1024) / 86400) == 34       # Narayanan et al. 2021
    assert PEAK_FLOPS == {'V100': 125e12, 'A100': 312e12, 'H100': 989e12}


# ---- time, money, bytes

@given(POSITIVE, POSITIVE, st.floats(0.01, 1), st.integers(1, 10**5), st.floats(0, 100))
def test_time_and_cost(flops, speed, share, devices, price):
    seconds = training_time(flops, speed, share, devices)
    assert math.isclose(seconds * devices * speed * share, flops, rel_tol=1e-9)
    assert math.isclose(training_cost(flops, speed, price, share), seconds * devices / 3600 * price, rel_tol=1e-9)


def test_one_second_and_one_hour():
    assert training_time(10, 10) == 1 and training_time(10, 10, 0.5) == 2 and training_time(10, 10, 0.5, 4) == 0.5
    assert training_cost(3600, 1, 2.5) == 2.5 and training_cost(3600, 1, 2.5, 0.25) == 10 and training_cost(3600, 1, 0) == 0


@settings(max_examples=30, deadline=None)
@given(SIZES, SWITCHES)
def test_bytes_equal_those_of_a_training(sizes, switches):
    "Weights, gradients and what PyTorch's AdamW keeps, but for its counts of steps."
    model = GPT(GPTConfig(**sizes, **switches))
    model(torch.zeros(1, 1, dtype=torch.int64)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    optimizer.step()
    n = count_gpt_parameters(**sizes, **switches)
    weights = sum(p.nbytes for p in model.parameters())
    means = sum(state[k].nbytes for state in optimizer.state.values() for k in ('exp_avg', 'exp_avg_sq'))
    assert memory_bytes(n, training=False) == weights
    assert memory_bytes(n) == weights + sum(p.grad.nbytes for p in model.parameters()) + means


def test_bytes_of_each_kind():
    assert memory_bytes(10, weight=1, gradient=0, mean=0) == 10
    assert memory_bytes(10, weight=1, gradient=2, mean=0) == 30
    assert memory_bytes(10, weight=1, gradient=0, mean=4) == 90
    assert memory_bytes(10, weight=1, gradient=0, mean=0, master=7) == 80
    assert memory_bytes(10, training=False, weight=Fraction(1, 2), gradient=9, mean=9, master=9) == 5
    assert memory_bytes(1e9 / 8) == 2e9                                           # the share of one of eight devices


# ---- what is refused

GOOD = {
    count_gpt_parameters: dict(vocab_size=9, context_length=8, n_layer=2, n_embd=6),
    forward_flops: dict(vocab_size=9, context_length=8, n_layer=2, n_embd=6),
    training_flops: dict(parameters=5, tokens=7),
    memory_bytes: dict(parameters=5),
    training_time: dict(flops=1e20, flops_per_second=1e12),
    training_cost: dict(flops=1e20, flops_per_second=1e12, price_per_hour=2),
}
COUNTS = ('vocab_size', 'context_length', 'n_layer', 'n_embd', 'n_head')
BAD = [(f, name, value, error) for f in (count_gpt_parameters, forward_flops) for name in COUNTS
       for value, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), ('2', TypeError), (True, TypeError), *([] if name == 'n_head' else [(None, TypeError)]))]
BAD += [(count_gpt_parameters, name, value, TypeError) for name in ('bias', 'qkv_bias', 'tied') for value in (1, 'no', *([] if name == 'qkv_bias' else [None]))]
BAD += [(memory_bytes, 'training', value, TypeError) for value in (1, None, 'no')]
ABOVE_0 = [(training_flops, 'parameters'), (training_flops, 'tokens'), (memory_bytes, 'parameters'), (memory_bytes, 'weight'), (training_time, 'flops'), (training_time, 'flops_per_second'),
           (training_time, 'utilisation'), (training_cost, 'flops'), (training_cost, 'flops_per_second'), (training_cost, 'utilisation')]
FROM_0 = [(memory_bytes, 'gradient'), (memory_bytes, 'mean'), (memory_bytes, 'master'), (training_cost, 'price_per_hour')]
BAD += [(f, name, value, error) for f, name in ABOVE_0 + FROM_0 for value, error in (
    (-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), (-math.inf, ValueError), ('5', TypeError), (None, TypeError), (True, TypeError), (1j, TypeError))]
BAD += [(f, name, 0, ValueError) for f, name in ABOVE_0]
BAD += [(f, 'utilisation', 40, ValueError) for f in (training_time, training_cost)]
BAD += [(training_time, 'devices', value, error) for value, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError))]


@pytest.mark.parametrize('f, name, value, error', BAD, ids=lambda x: getattr(x, '__name__', repr(x)))
def test_refused_by_name(f, name, value, error):
    f(**GOOD[f])
    with pytest.raises(error) as caught: f(**{**GOOD[f], name: value})
    assert str(caught.value).startswith(f'{name}={value!r}') and any(way in str(caught.value) for way in ('give', 'smallest that is allowed')), caught.value


@pytest.mark.parametrize('f', [count_gpt_parameters, forward_flops])
def test_heads_must_fit(f):
    with pytest.raises(ValueError, match='n_embd=6 is not a multiple of n_head=4; leave n_head out'): f(**GOOD[f], n_head=4)


def test_zero_is_allowed_where_it_makes_sense():
    for f, name in FROM_0: assert f(**{**GOOD[f], name: 0}) >= 0
    assert training_time(1, 1, utilisation=1) == 1


def test_the_import_is_light():
    "Neither PyTorch nor anything else that takes a second."
    done = subprocess.run([sys.executable, '-c', 'import sys, llmbook.budget; print(sorted({"torch", "numpy", "matplotlib"} & set(sys.modules)))'], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr
