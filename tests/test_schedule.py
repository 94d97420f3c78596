"The schedule at its borders and between, for random settings; that the trainer's optimiser uses it; clipping at every step; and accumulation against the big batch."
import dataclasses, inspect, math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook.core import set_seed
from llmbook.data import make_dataloader
from llmbook.gpt import GPT, GPTConfig
from llmbook.loss import model_loss
from llmbook.schedule import WarmupCosine
from llmbook.train import TrainConfig, Trainer, accumulate_gradients
from torch import nn
from torch.nn import functional as F

RATES = st.floats(1e-8, 10, allow_subnormal=False)
SEEDS = st.integers(0, 2**31)
close = torch.testing.assert_close


@st.composite
def schedules(draw, least=1, most=3000, rates=RATES):
    "Any that is allowed: often short, often with a warm-up that takes nearly all."
    T = draw(st.integers(least, 12) | st.integers(least, most))
    w = draw(st.sampled_from([0, min(1, T - 1), T // 2, T - 1]) | st.integers(0, T - 1))
    peak = draw(rates)
    return WarmupCosine(T, peak, w, draw(st.sampled_from([0.0, peak, peak / 10]) | st.floats(0, peak)))


def by_hand(s, step):
    "The rate by the formulas of the page, written another way: the rise as a fraction, the fall by the square of a sine."
    if step < s.warmup_steps: return float(Fraction(s.learning_rate) * (step + 1) / s.warmup_steps)
    start = max(s.warmup_steps, 1) - 1
    if step > s.max_steps - 1 or s.max_steps - 1 == step > 0: return s.min_learning_rate
    if s.max_steps == 1: return s.learning_rate
    down = math.sin(math.pi / 2 * (step - start) / (s.max_steps - 1 - start))**2
    return s.learning_rate - down * (s.learning_rate - s.min_learning_rate)


# ---- the borders

@settings(max_examples=500)
@given(schedules())
@example(WarmupCosine(1, 0.1, 0, 0.01))
@example(WarmupCosine(2, 0.1, 1, 0.01))
@example(WarmupCosine(2, 0.1, 0, 0.01))
@example(WarmupCosine(100, 0.1, 99, 0.01))
@example(WarmupCosine(60, 0.07, 49))                                             # 0.07 * 49 / 49 is not 0.07
def test_borders_are_exact(s):
    T, w, peak, least = s.max_steps, s.warmup_steps, s.learning_rate, s.min_learning_rate
    assert s(0) == peak / max(1, w)
    assert s(max(0, w - 1)) == peak
    if T > 1: assert s(T - 1) == least
    for beyond in (T, T + 1, 2 * T, 10**9): assert s(beyond) == least
    if 0 < w < T - 1 and least < 0.99 * peak: assert least < s(w) < peak         # just below, and not at the end at once
    if w > 1: assert s(w - 2) == pytest.approx(peak * (w - 1) / w, rel=1e-14)


@settings(max_examples=300)
@given(schedules(), st.integers(0, 4000))
def test_rates_are_those_of_the_formulas(s, step):
    assert math.isclose(s(step), by_hand(s, step), rel_tol=1e-9, abs_tol=1e-12 * s.learning_rate)


@settings(max_examples=200, deadline=None)
@given(schedules(most=400))
def test_it_rises_then_falls_and_stays_between(s):
    rates, w = [s(k) for k in range(s.max_steps + 3)], s.warmup_steps
    assert all(a < b for a, b in zip(rates[:w], rates[1:w]))                     # strictly up
    fall = rates[max(0, w - 1):]
    room = 4e-16 * s.learning_rate
    assert all(b <= a + room for a, b in zip(fall, fall[1:]))
    if s.min_learning_rate < 0.5 * s.learning_rate: assert all(b < a for a, b in zip(fall[:-3], fall[1:-3]))
    assert all(min(s.learning_rate / max(1, w), s.min_learning_rate) - room <= r <= s.learning_rate + room for r in rates)


@settings(max_examples=200, deadline=None)
@given(schedules(2, 400))
def test_the_fall_is_symmetric_about_its_middle_and_the_rise_is_straight(s):
    start, last, w = max(0, s.warmup_steps - 1), s.max_steps - 1, s.warmup_steps
    for k in range(last - start + 1):
        assert math.isclose(s(start + k) + s(last - k), s.learning_rate + s.min_learning_rate, rel_tol=1e-12)
    for k in range(w): assert math.isclose(s(k) - (s(k - 1) if k else 0), s.learning_rate / w, rel_tol=1e-9)


@settings(max_examples=100)
@given(schedules(2), RATES, st.integers(0, 3000))
def test_the_rates_scale_with_the_peak(s, peak, step):
    other = dataclasses.replace(s, learning_rate=peak, min_learning_rate=min(peak, s.min_learning_rate * (peak / s.learning_rate)))
    assert math.isclose(other(step) / peak, s(step) / s.learning_rate, rel_tol=1e-9, abs_tol=1e-12)


def test_the_fall_is_pytorchs():
    "PyTorch has the cosine without the warm-up; from our start on, it is the same."
    s, p = WarmupCosine(30, 0.5, 8, 0.01), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=22, eta_min=0.01)
    for k in range(7, 30):
        assert math.isclose(s(k), theirs.get_last_lr()[0], rel_tol=1e-9)
        optimizer.step(); theirs.step()


def test_known_rates():
    assert [round(WarmupCosine(9, 8.0, 4)(k), 4) for k in range(10)] == [2.0, 4.0, 6.0, 8.0, 7.2361, 5.2361, 2.7639, 0.7639, 0.0, 0.0]
    assert [WarmupCosine(5, 4.0, 0, 2.0)(k) for k in (0, 2, 4)] == [4.0, 3.0, 2.0]
    assert [WarmupCosine(1, 3.0, min_learning_rate=1.0)(k) for k in (0, 1)] == [3.0, 1.0]
    assert [WarmupCosine(3, 4.0, 2)(k) for k in range(3)] == [2.0, 4.0, 0.0]
    assert WarmupCosine(10, 1.0) == WarmupCosine(10, 1.0, 0, 0.0)


# ---- what is refused

@pytest.mark.parametrize('change, error, words', [
    (dict(max_steps=0), ValueError, 'max_steps=0 is too small'),
    (dict(max_steps=-3), ValueError, 'max_steps=-3'),
    (dict(max_steps=2.0), TypeError, 'max_steps=2.0 is not a whole number'),
    (dict(max_steps=True), TypeError, 'max_steps=True'),
    (dict(max_steps=None), TypeError, 'max_steps=None'),
    (dict(warmup_steps=-1), ValueError, 'warmup_steps=-1 is too small; the smallest that is allowed is 0'),
    (dict(warmup_steps=0.1), TypeError, 'warmup_steps=0.1 is not a whole number'),
    (dict(warmup_steps=20), ValueError, 'warmup_steps=20 leaves no step of max_steps=20 for the decay; give 19 at most, or a tenth: warmup_steps=2'),
    (dict(warmup_steps=21), ValueError, 'warmup_steps=21'),
    (dict(max_steps=1, warmup_steps=1), ValueError, 'give 0 at most'),
    (dict(learning_rate=0), ValueError, 'learning_rate=0 is not allowed; give a number above 0, such as 1e-3'),
    (dict(learning_rate=0.0), ValueError, 'learning_rate=0.0 is not allowed'),
    (dict(learning_rate=-1e-3), ValueError, 'learning_rate=-0.001 is not allowed; give a number above 0'),
    (dict(learning_rate=math.nan), ValueError, 'learning_rate=nan'),
    (dict(learning_rate=math.inf), ValueError, 'learning_rate=inf is not allowed; give a number above 0'),
    (dict(learning_rate='1e-3'), TypeError, "learning_rate='1e-3' is not a number; give a number above 0, such as 1e-3"),
    (dict(learning_rate=None), TypeError, 'learning_rate=None'),
    (dict(learning_rate=True), TypeError, 'learning_rate=True'),
    (dict(min_learning_rate=-1e-9), ValueError, 'min_learning_rate=-1e-09 is not allowed; give a number from 0 to 0.1, the learning_rate'),
    (dict(min_learning_rate=0.11), ValueError, 'min_learning_rate=0.11 is not allowed; give a number from 0 to 0.1, the learning_rate'),
    (dict(min_learning_rate=math.nan), ValueError, 'min_learning_rate=nan'),
    (dict(min_learning_rate='0'), TypeError, "min_learning_rate='0'"),
    (dict(min_learning_rate=None), TypeError, 'min_learning_rate=None')])
def test_settings_that_make_no_sense_are_refused(change, error, words):
    with pytest.raises(error, match=words): WarmupCosine(**dict(max_steps=20, learning_rate=0.1) | change)


@pytest.mark.parametrize('step, error', [(-1, ValueError), (0.5, TypeError), (2.0, TypeError), (True, TypeError), (None, TypeError), ('3', TypeError), (math.nan, TypeError)])
def test_steps_that_are_none_are_refused(step, error):
    for s in (WarmupCosine(9, 1.0, 3), WarmupCosine(9, 1.0)):
        with pytest.raises(error, match=f'step={step!r}'): s(step)


def test_numpys_numbers_are_numbers_and_the_result_is_a_float():
    s = WarmupCosine(np.int64(20), np.float64(0.1), np.int32(5), np.float32(0.01))
    assert type(s.max_steps) is type(s.warmup_steps) is int
    for step in (0, 4, 9, 19, 30): assert s(np.int64(step)) == s(np.uint8(step)) == s(torch.tensor(step)) == s(step)
    assert all(isinstance(WarmupCosine(20, 1, 5)(k), float) for k in (0, 4, 10, 25))                    # rates that are ints


def test_a_schedule_is_a_value():
    s = WarmupCosine(20, 0.1, 5)
    assert s == WarmupCosine(20, 0.1, 5) != WarmupCosine(20, 0.1, 6) and len({s, WarmupCosine(20, 0.1, 5)}) == 1
    assert dataclasses.replace(s, max_steps=30)(29) == 0.0 and WarmupCosine(**dataclasses.asdict(s)) == s
    with pytest.raises(dataclasses.FrozenInstanceError): s.learning_rate = 1.0
    assert [*inspect.signature(WarmupCosine).parameters] == ['max_steps', 'learning_rate', 'warmup_steps', 'min_learning_rate']
    assert [s(k) for k in (3, 15, 3)] == [s(3), s(15), s(3)]                     # no memory of the steps it was asked for


# ---- the optimiser uses it

def model_of(seed=0, V=11, T=6, **how):
    set_seed(seed)
    return GPT(GPTConfig(V, T, n_layer=1, n_head=2, n_embd=8, **how)).double()


def loader_of(n, batch_size, T=6, V=11, seed=1, **how):
    "n windows of random ids; a last batch may be short."
    ids = torch.randint(V, (n * T + 1,), generator=torch.Generator().manual_seed(seed))
    return make_dataloader(ids, T, batch_size, drop_last=False, seed=seed, **how)


@settings(max_examples=25, deadline=None)
@given(schedules(2, 12, st.floats(1e-6, 0.1)), SEEDS)
def test_a_trainer_uses_the_rate_of_every_step(s, seed):
    trainer, seen = Trainer(model_of(seed), loader_of(9, 2), TrainConfig(learning_rate=0.5, betas=(0.0, 0.0), weight_decay=0.0), schedule=s), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append([g['lr'] for g in optimizer.param_groups]))
    for step in range(s.max_steps + 2):
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.update()
        change = max((p.detach() - b).abs().max().item() for p, b in zip(trainer.model.parameters(), before))
        assert math.isclose(change, s(step), rel_tol=1e-3, abs_tol=1e-14)        # AdamW without memory changes a weight by the rate
    assert seen == [[s(k)] * len(trainer.optimizer.param_groups) for k in range(s.max_steps + 2)]
    assert trainer.history.rates == [s(k) for k in range(s.max_steps + 2)]
    assert trainer.optimizer.defaults['lr'] == 0.5                               # what a plot must not read


def test_without_a_schedule_the_rate_is_the_configs():
    trainer = Trainer(model_of(), loader_of(9, 2), TrainConfig(max_steps=3, learning_rate=0.02))
    trainer.run(report=None)
    assert trainer.history.rates == [0.02] * 3 and {g['lr'] for g in trainer.optimizer.param_groups} == {0.02}


def test_a_rate_of_zero_changes_nothing():
    trainer = Trainer(model_of(), loader_of(9, 2), schedule=WarmupCosine(3, 0.1))
    for _ in range(3): before = [p.detach().clone() for p in trainer.model.parameters()]; trainer.update()
    assert trainer.history.rates[-1] == 0 and all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before))
    trainer.update()                                                             # beyond the end
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before))


# ---- clipping

@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1e-3, 0.3, 1.0, 100.0, None]), st.integers(0, 7), st.integers(1, 3))
def test_clipping_acts_on_every_step_on_all_parameters_together(seed, limit, w, k):
    trainer = Trainer(model_of(seed), loader_of(11, 2), TrainConfig(grad_clip=limit, accumulate=k), schedule=WarmupCosine(8, 0.01, w))
    before, after, clip = [], [], nn.utils.clip_grad_norm_
    flat = lambda: torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).clone()
    trainer.optimizer.register_step_pre_hook(lambda *_: after.append(flat()))
    def watched(*args, **kwargs): before.append(flat()); return clip(*args, **kwargs)
    nn.utils.clip_grad_norm_ = watched
    try: trainer.run(8, report=None)
    finally: nn.utils.clip_grad_norm_ = clip
    assert len(before) == len(after) == 8
    for g, used, noted in zip(before, after, trainer.history.norms):
        norm = g.norm().item()
        assert math.isclose(norm, noted, rel_tol=1e-9)                           # the history has the norm before
        close(used, g * min(1, (limit or math.inf) / (norm + 1e-6)), rtol=1e-9, atol=0)
        assert math.isclose(F.cosine_similarity(used, g, dim=0).item(), 1, rel_tol=1e-9)


def test_a_bad_batch_does_no_more_than_another_when_clipped():
    def run(limit):
        trainer = Trainer(model_of(), loader_of(9, 3), TrainConfig(grad_clip=limit, weight_decay=0.0))
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
        trainer.schedule = lambda step: 1.0
        trainer.model.lm_head.weight.data *= 50                                 # an error in the model: gradients are huge
        before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        trainer.update()
        return (torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before).norm().item(), trainer.history.norms[0]
    moved, norm = run(None)
    assert norm > 2 and math.isclose(moved, norm, rel_tol=1e-9)
    assert run(1.0) == pytest.approx((1.0, norm), rel=1e-5)


# ---- accumulation

@settings(max_examples=60, deadline=None)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=5))
def test_pieces_of_any_sizes_add_up_to_the_mean_over_tokens(seed, sizes):
    model, generator = model_of(seed), torch.Generator().manual_seed(seed)
    pieces = [tuple(torch.randint(11, shape, generator=generator) for _ in range(2)) for shape in sizes]
    loss = accumulate_gradients(model, pieces)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    surprises = torch.cat([F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction='none') for x, y in pieces])
    surprises.mean().backward()
    assert math.isclose(loss, surprises.mean().item(), rel_tol=1e-10)
    for g, p in zip(found, model.parameters()): close(g, p.grad, rtol=1e-8, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 12), st.data())
def test_any_split_of_a_batch_is_the_batch(seed, B, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, B - 1)))) if B > 1 else []
    model, generator = model_of(seed), torch.Generator().manual_seed(seed)
    x, y = (torch.randint(11, (B, 5), generator=generator) for _ in range(2))
    whole = accumulate_gradients(model, [(x, y)])
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert math.isclose(whole, model_loss(model, x, y).item(), rel_tol=1e-12)
    loss = accumulate_gradients(model, list(zip(x.tensor_split(cuts), y.tensor_split(cuts))))
    assert math.isclose(loss, whole, rel_tol=1e-12)
    for g, p in zip(wanted, model.parameters()): close(p.grad, g, rtol=1e-8, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 25), st.integers(1, 3), st.integers(1, 4), st.sampled_from([None, 0.5]), SEEDS)
@example(21, 2, 4, 0.5, 0)                                                       # a short group that ends with a short batch
@example(17, 2, 4, None, 0)                                                      # a group of a single text
def test_a_trainer_with_pieces_is_a_trainer_with_the_big_batch(n, small, k, limit, seed):
    trainers = []
    for batch_size, accumulate in ((small * k, 1), (small, k)):
        config = TrainConfig(accumulate=accumulate, grad_clip=limit)
        trainers.append(Trainer(model_of(seed), loader_of(n, batch_size), config, schedule=WarmupCosine(9, 0.01, 3)))
        trainers[-1].run(min(20, 2 * -(-n // (small * k)) + 1), report=None)     # two epochs and a step
    big, pieces = trainers
    assert pieces.history.tokens == big.history.tokens and pieces.history.rates == big.history.rates
    assert [b - a for a, b in zip([0, *big.history.tokens], big.history.tokens)] == ([6 * min(small * k, n - i) for i in range(0, n, small * k)] * 3)[:big.step]
    assert all(p.grad is None for t in trainers for p in t.model.parameters())   # nothing is left for the next step
    close(pieces.history.losses, big.history.losses, rtol=1e-7, atol=1e-9)
    close(pieces.history.norms, big.history.norms, rtol=1e-6, atol=1e-9)
    for p, q in zip(pieces.model.parameters(), big.model.parameters()): close(p, q, rtol=1e-6, atol=1e-8)
