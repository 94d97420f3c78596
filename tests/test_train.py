"AdamW against PyTorch's and by hand, the trainer against a bare loop to the last bit, Ctrl-C with real signals, and the longest copy against brute force."
import copy, io, math, os, signal, subprocess, sys, textwrap, threading, time
from contextlib import nullcontext
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook import train as module
from llmbook.core import count_parameters, set_seed
from llmbook.data import make_dataloader
from llmbook.generate import generate
from llmbook.gpt import GPT, GPTConfig
from llmbook.loss import next_token_loss
from llmbook.train import History, TrainConfig, Trainer, accumulate_gradients, longest_copy, make_optimizer
from torch import nn
from torch.nn import functional as F

SEEDS = st.integers(0, 2**31)
IDS = torch.arange(400) * 7 % 11


pytestmark = pytest.mark.usefixtures('one_thread')


def gpt(V=11, L=6, N=2, H=2, D=4, seed=0, dropout=0.0, dtype=torch.double, **more):
    torch.manual_seed(seed)
    return GPT(GPTConfig(V, L, N, H, H * D, dropout=dropout, **more)).to(dtype)


def loader(B=2, T=6, seed=3, n=100, **more): return make_dataloader(IDS[:n], T, B, seed=seed, **more)
def trainer(model=None, batches=None, validation=None, schedule=None, **more):
    settings = {'learning_rate': 0.01, 'max_steps': 7, 'evaluate_every': 3, **more}
    return Trainer(gpt() if model is None else model, loader() if batches is None else batches, TrainConfig(**settings), validation, schedule)


def state(t):
    "Everything that a training consists of, to be compared to the bit."
    return [p.detach().clone() for p in t.model.parameters()], copy.deepcopy(t.optimizer.state_dict()['state']), copy.deepcopy(t.history)


def same(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    assert a[1].keys() == b[1].keys() and all(torch.equal(a[1][i][k], b[1][i][k]) for i in a[1] for k in a[1][i])
    assert a[2] == b[2]


# ---- the optimiser

@settings(max_examples=40)
@given(SEEDS, st.floats(1e-4, 0.1), st.floats(0, 0.5), st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)), st.booleans())
def test_steps_are_adamw_by_hand(seed, rate, decay, betas, tied):
    model = gpt(seed=seed % 100, tied=tied)
    optimizer, twin = make_optimizer(model, rate, decay, betas), copy.deepcopy(model)
    m = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
    v = copy.deepcopy(m)
    for t in range(1, 5):
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            m[name] = betas[0] * m[name] + (1 - betas[0]) * p.grad
            v[name] = betas[1] * v[name] + (1 - betas[1]) * p.grad**2
            if 'norm' not in name and not name.endswith('bias'): q.data *= 1 - rate * decay
            q.data -= rate * m[name] / (1 - betas[0]**t) / ((v[name] / (1 - betas[1]**t)).sqrt() + 1e-8)
        optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_decay_by_name():
    model = gpt()
    decayed = {id(p) for p in make_optimizer(model, weight_decay=0.3).param_groups[0]['params']}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert names == {'token_embedding.weight', 'position_embedding.weight'} | {f'blocks.{i}.{part}.weight' for i in (0, 1) for part in (
        'attention.qkv', 'attention.projection', 'feed_forward.expand', 'feed_forward.contract')}
    assert [g['weight_decay'] for g in make_optimizer(model, weight_decay=0.3).param_groups] == [0.3, 0.0]
    untied = gpt(tied=False)
    assert id(untied.lm_head.weight) in {id(p) for p in make_optimizer(untied).param_groups[0]['params']}


@pytest.mark.parametrize('tied', [True, False])
def test_each_parameter_once(tied):
    model = gpt(tied=tied)
    held = [p for g in make_optimizer(model).param_groups for p in g['params']]
    assert len(held) == len({id(p) for p in held}) and sum(p.numel() for p in held) == count_parameters(model)


def test_what_is_frozen_stays_out():
    model = gpt()
    model.position_embedding.requires_grad_(False)
    held = {id(p) for g in make_optimizer(model).param_groups for p in g['params']}
    assert id(model.position_embedding.weight) not in held and len(held) == len(list(model.parameters())) - 1
    for empty in (gpt().requires_grad_(False), nn.GELU()):
        with pytest.raises(ValueError, match='no parameter that can be trained'): make_optimizer(empty)


def test_settings_reach_the_optimizer():
    for group in make_optimizer(gpt(), 0.25, 0.5, (0.3, 0.4)).param_groups: assert (group['lr'], group['betas'], group['eps']) == (0.25, (0.3, 0.4), 1e-8)
    defaults = make_optimizer(gpt())
    assert [(g['lr'], g['betas'], g['weight_decay']) for g in defaults.param_groups] == [(1e-3, (0.9, 0.95), 0.1), (1e-3, (0.9, 0.95), 0.0)]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_fused_is_unfused(dtype):
    model = gpt(dtype=dtype)
    twin = copy.deepcopy(model)
    a, b = make_optimizer(model, 0.01), make_optimizer(twin, 0.01)
    assert all(g['fused'] for g in a.param_groups)
    for g in b.param_groups: g['fused'] = False
    for step in range(4):
        for p, q in zip(model.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step(), b.step()
        for p, q in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(p, q, **({'rtol': 1e-10, 'atol': 1e-12} if dtype == torch.double else {}))


@pytest.mark.parametrize('layer', [lambda: nn.Linear(3, 2, device='meta'), lambda: nn.Linear(3, 2, dtype=torch.complex64)])
def test_where_torch_refuses_it_is_not_fused(layer):
    optimizer = make_optimizer(layer())
    assert not any(g['fused'] for g in optimizer.param_groups) and [len(g['params']) for g in optimizer.param_groups] == [1, 1]
    for g in optimizer.param_groups:
        for p in g['params']: p.grad = torch.zeros_like(p)
    optimizer.step()


def test_one_kind_that_cannot_decides_for_all():
    assert not module._fused_works([torch.ones(2), torch.ones(2, device='meta')])
    assert module._fused_works([torch.ones(2), torch.ones(2, dtype=torch.double)])


@pytest.mark.parametrize('where', ['made', 'stepped'])
def test_an_older_torch_without_fused(monkeypatch, where):
    real = torch.optim.AdamW
    class Old(real):
        def __init__(self, params, fused=None, **more):
            if fused and where == 'made': raise RuntimeError('`fused=True` requires all the params to be CUDA')
            super().__init__(params, fused=fused, **more)
        def step(self):
            if self.defaults['fused']: raise NotImplementedError('"fused_adamw" not implemented for Half')
            super().step()
    monkeypatch.setattr(torch.optim, 'AdamW', Old)
    assert make_optimizer(gpt()).defaults['fused'] is False


def test_the_probe_draws_nothing_and_touches_nothing():
    model = gpt()
    before, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    make_optimizer(model)
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


# ---- the config

@pytest.mark.parametrize('name, value, error, words', [
    ('max_steps', 0, ValueError, 'max_steps=0 is too small'), ('max_steps', 2.5, TypeError, 'max_steps=2.5 is not a whole'), ('max_steps', True, TypeError, 'max_steps=True'),
    ('accumulate', 0, ValueError, 'accumulate=0'), ('evaluate_every', -1, ValueError, 'evaluate_every=-1'), ('evaluate_batches', 0, ValueError, 'evaluate_batches=0'),
    ('learning_rate', 0, ValueError, 'learning_rate=0 is not allowed; give a number above 0, such as 1e-3'), ('learning_rate', math.inf, ValueError, 'learning_rate=inf'),
    ('learning_rate', math.nan, ValueError, 'learning_rate=nan'), ('learning_rate', 'fast', TypeError, "learning_rate='fast' is not a number"), ('learning_rate', True, TypeError, 'learning_rate=True'),
    ('weight_decay', -0.1, ValueError, 'weight_decay=-0.1 is not allowed; give 0 for no decay'), ('weight_decay', math.inf, ValueError, 'weight_decay=inf'), ('weight_decay', None, TypeError, 'weight_decay=None'),
    ('grad_clip', 0, ValueError, 'grad_clip=0 is not allowed; give a number above 0, such as 1.0, or None'), ('grad_clip', -1, ValueError, 'grad_clip=-1'), ('grad_clip', math.inf, ValueError, 'grad_clip=inf'),
    ('betas', 0.9, TypeError, 'betas=0.9 is no pair; give two'), ('betas', (0.9,), TypeError, r'betas=\(0.9,\)'), ('betas', (0.9, 0.9, 0.9), TypeError, 'is no pair'), ('betas', '09', TypeError, "betas='09'"),
    ('betas', (0.9, 1), ValueError, r'betas\[1\]=1 is not allowed; give a number in \[0, 1\)'), ('betas', (-0.1, 0.9), ValueError, r'betas\[0\]=-0.1'), ('betas', ('a', 0.9), TypeError, r"betas\[0\]='a'"),
])
def test_config_refuses(name, value, error, words):
    with pytest.raises(error, match=words): TrainConfig(**{name: value})


def test_config_is_frozen_and_plain():
    with pytest.raises(FrozenInstanceError): TrainConfig().learning_rate = 1
    c = TrainConfig(np.int64(9), np.float32(0.5), 0, [0, 0.5], None, np.int32(2), np.int8(3), np.int16(4))
    assert c == TrainConfig(9, 0.5, 0.0, (0.0, 0.5), None, 2, 3, 4) and hash(c) == hash(TrainConfig(9, 0.5, 0.0, (0.0, 0.5), None, 2, 3, 4))
    assert [type(x) for x in (c.max_steps, c.learning_rate, c.weight_decay, c.betas, c.betas[0], c.accumulate, c.evaluate_every, c.evaluate_batches)] == [int, float, float, tuple, float, int, int, int]
    d = TrainConfig()
    assert (d.max_steps, d.learning_rate, d.weight_decay, d.betas, d.grad_clip, d.accumulate, d.evaluate_every, d.evaluate_batches) == (500, 1e-3, 0.1, (0.9, 0.95), 1.0, 1, 50, None)


# ---- the history

def test_plot_names_its_axes_and_both_splits():
    h = History([3.0, 2.0, 1.0, 0.5], [100, 200, 300, 350], [], [], {4: 2.5, 0: 3.0})
    svg = h.plot('a title').svg
    for text in ('steps', 'tokens read', 'loss in nats per token', 'training', 'validation', 'a title', '>300<'): assert text in svg, text
    assert 'validation' not in History([3.0], [5]).plot().svg
    assert 'tokens read' not in History().plot().svg and 'training' in History().plot().svg


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 10**6))
@settings(max_examples=60)
def test_tokens_stand_where_they_were_read(pieces, unit):
    "The marks above are read off the figure and compared with the tokens, also when steps differ in size."
    tokens, seen = np.cumsum(np.array(pieces) * unit).tolist(), {}
    original = module.show_plot
    module.show_plot = lambda figure: seen.setdefault('figure', figure)
    try: History([1.0] * len(tokens), tokens).plot()
    finally: module.show_plot = original
    above = seen['figure'].axes[0].child_axes[0]
    marks = [(x, int(label.get_text().replace(',', ''))) for x, label in zip(above.get_xticks(), above.get_xticklabels())]
    assert 2 <= len(marks) <= 6 or tokens[-1] < 5
    for x, n in marks:
        lower, part = int(x), x - int(x)
        read = [0, *tokens]
        exact = read[lower] + (part and part * (read[lower + 1] - read[lower]))
        assert abs(exact - n) <= max(1, 1e-6 * n)


# ---- gradients

@settings(max_examples=40)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4))
def test_several_batches_are_one(seed, sizes):
    model = gpt(seed=seed % 50)
    batches = [torch.randint(11, (2, B, T)).unbind() for B, T in sizes]
    loss = accumulate_gradients(model, batches)
    twin, n = copy.deepcopy(model), sum(B * T for B, T in sizes)
    twin.zero_grad()
    total = sum(F.cross_entropy(twin(x).flatten(0, 1), y.flatten(), reduction='sum') for x, y in batches) / n
    total.backward()
    assert math.isclose(loss, total.item(), rel_tol=1e-9)
    for p, q in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10)


def test_gradients_grow_and_nothing_is_refused():
    model = gpt()
    batch = torch.randint(11, (2, 3, 5)).unbind()
    accumulate_gradients(model, [batch])
    once = [p.grad.clone() for p in model.parameters()]
    accumulate_gradients(model, [batch])
    for p, g in zip(model.parameters(), once): torch.testing.assert_close(p.grad, 2 * g)
    for empty in ([], [(torch.zeros(0, 5).long(),) * 2]):
        with pytest.raises(ValueError, match='no tokens'): accumulate_gradients(model, empty)


def test_batches_go_to_the_models_device(monkeypatch):
    class Sent(torch.Tensor):
        sent = []
        def to(self, device):
            Sent.sent.append(device)
            return torch.Tensor(self.as_subclass(torch.Tensor)).long()
    batch = [torch.randint(11, (2, 5)).as_subclass(Sent) for _ in 'xy']
    accumulate_gradients(gpt(), [batch])
    assert Sent.sent == [torch.device('cpu')] * 2


# ---- the trainer

def test_it_is_the_bare_loop():
    t, model = trainer(weight_decay=0.2, betas=(0.8, 0.9), grad_clip=None), gpt()
    optimizer, losses = make_optimizer(model, 0.01, 0.2, (0.8, 0.9)), []
    batches = loader()
    while len(losses) < 20:
        for x, y in batches:
            loss = next_token_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    h = t.run(20, report=None)
    torch.testing.assert_close(h.losses, losses[:20], rtol=1e-9, atol=0)
    assert h is t.history and t.step == 20 and h.tokens == [12 * (i + 1) for i in range(20)] and h.rates == [0.01] * 20 and len(h.norms) == 20


def test_every_batch_once_and_in_order():
    seen, batches = [], [(torch.full((1, 3), i),) * 2 for i in range(5)]
    class Watch(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(11, 11))
        def forward(self, ids): seen.append(ids[0, 0].item()); return self.w[ids]
    trainer(Watch(), batches).run(12, report=None)
    assert seen == [0, 1, 2, 3, 4] * 2 + [0, 1]
    seen.clear()
    t = trainer(Watch(), batches, accumulate=2)
    t.run(6, report=None)
    assert seen == [0, 1, 2, 3, 4] * 2 and t.history.tokens == [6, 12, 15, 21, 27, 30]


@pytest.mark.parametrize('dropout', [0.0, 0.4])
def test_the_same_seed_gives_the_same_bits(dropout):
    runs = []
    for _ in range(2):
        t = trainer(gpt(dropout=dropout, dtype=torch.float), validation=loader(shuffle=False))
        t.run(report=None)
        runs.append(state(t))
    same(*runs)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 9), max_size=4))
def test_stopped_anywhere_and_continued(stops):
    whole, parted = trainer(grad_clip=0.5, accumulate=2), trainer(grad_clip=0.5, accumulate=2)
    whole.run(9, report=None)
    for end in sorted(stops) + [9]:
        if end: parted.run(end, report=None)
    same(state(whole), state(parted))
    assert parted.run(4, report=None).losses == whole.history.losses and parted.step == 9          # already beyond


@pytest.mark.parametrize('every', [1, 2, 5])
def test_looking_changes_nothing(every):
    def run(**more):
        looks = more.pop('looks', False)
        t = trainer(gpt(dropout=0.5), validation=loader(shuffle=True, seed=9) if looks else None, evaluate_every=every, **more)
        t.run(report=None, sample=(lambda model: str(generate(model, [1, 2], 4))) if looks else None)
        weights, optimizer, history = state(t)
        history.validation = {}
        return weights, optimizer, history
    same(run(), run(looks=True))
    same(run(), run(looks=True, evaluate_batches=1))


def test_sample_and_evaluation_see_no_dropout_and_training_does():
    t = trainer(gpt(dropout=0.5), validation=loader(shuffle=False))
    assert t.evaluate() == t.evaluate()
    t.model.eval()
    t.update()
    assert t.model.training and all(m.training for m in t.model.modules())


def test_when_it_looks():
    lines = []
    t = trainer(validation=loader(shuffle=False))
    t.run(8, sample=lambda model: f'sample at {t.step}', report=lines.append)
    assert [*t.history.validation] == [0, 3, 6, 7, 8]
    assert lines[1::2] == ['sample at 0', 'sample at 3', 'sample at 6', 'sample at 7', 'sample at 8']
    assert lines[0] == f'step     0, validation {t.history.validation[0]:.3f}'
    assert lines[4] == f'step     6, 72 tokens, training {sum(t.history.losses[3:6]) / 3:.3f}, validation {t.history.validation[6]:.3f}'
    t.run(9, report=lines.append)
    assert len(lines) == 11 and 'step     9' in lines[-1]
    with pytest.raises(ValueError, match='validation=None: there is nothing'): trainer().evaluate()
    assert trainer(validation=loader(), evaluate_batches=1).evaluate() != trainer(validation=loader()).evaluate()


def test_reports_are_printed(capsys):
    trainer().run(3)
    out = capsys.readouterr()
    assert out.out.startswith('step     0\nstep     3, 36 tokens') and not out.err


def test_the_schedule_is_obeyed():
    asked, used = [], []
    t = trainer(schedule=lambda step: asked.append(step) or 0.1 / (step + 1))
    real = t.optimizer.step
    t.optimizer.step = lambda: (used.append([g['lr'] for g in t.optimizer.param_groups]), real())
    t.run(4, report=None)
    assert asked == [0, 1, 2, 3] and used == [[0.1 / (i + 1)] * 2 for i in range(4)] and t.history.rates == [0.1, 0.05, 0.1 / 3, 0.025]


def test_clipping():
    norms = []
    t = trainer(grad_clip=0.01)
    real = t.optimizer.step
    t.optimizer.step = lambda: (norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in t.model.parameters()))), real())
    t.run(4, report=None)
    assert all(math.isclose(n, 0.01, rel_tol=1e-3) for n in norms) and all(n > 0.02 for n in t.history.norms)


def test_nothing_to_read():
    for empty in ([], iter([])):
        with pytest.raises(ValueError, match='loader gives no batch'): trainer(batches=empty).update()
    t = trainer(batches=iter([*loader()][:2]))
    t.run(2, report=None)
    for _ in range(2):
        with pytest.raises(ValueError, match='read again and again'): t.update()
    for bad, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match='max_steps'): trainer().run(bad)


# ---- numbers that are none

class Sick(nn.Module):
    "Well until step `at`; then its loss, or only its gradient, is no number."
    def __init__(self, at, value, only_gradient=False):
        super().__init__()
        self.w, self.at, self.calls, self.value, self.only_gradient = nn.Parameter(torch.zeros(11, 11)), at, 0, value, only_gradient

    def forward(self, ids):
        self.calls += 1
        sick = self.calls == self.at + 1
        logits = self.w[ids]
        if sick and self.only_gradient: logits.register_hook(lambda g: g * self.value)
        return logits * self.value if sick and not self.only_gradient else logits


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('only_gradient', [False, True])
@pytest.mark.parametrize('at', [0, 3])
def test_what_is_no_number_stops_the_run(value, only_gradient, at):
    model = Sick(at, value, only_gradient)
    t, healthy = trainer(model, grad_clip=None if only_gradient else 1.0), trainer(Sick(99, value), grad_clip=None if only_gradient else 1.0)
    with pytest.raises(FloatingPointError, match=rf'step {at}: the loss is .* learning rate of 0.01; the weights are those of the step before') as caught: t.run(report=None)
    assert not getattr(caught.value, '__notes__', [])
    healthy.run(at, report=None) if at else None
    same(state(t), state(healthy))
    assert t.step == at and all(p.grad is None for p in model.parameters())
    t.run(report=None)                                                        # the fault was that of one batch
    assert t.step == 7 and all(map(math.isfinite, t.history.losses))


def test_a_loss_that_is_none_stops_even_if_its_gradient_is_sound():
    t = trainer()
    sound, t.loss = t.loss, lambda *batch: sound(*batch) + math.inf
    with pytest.raises(FloatingPointError, match='step 0: the loss is inf'): t.update()
    assert t.step == 0


def test_the_last_good_checkpoint_is_named():
    class Kept:
        last, saved, steps = 'step-2', [], []
        def hold(self, trainer): return nullcontext()
        def after_step(self, trainer, report): self.steps.append(trainer.step)
        def end(self, trainer): self.saved.append(trainer.step)
    with pytest.raises(FloatingPointError) as caught: trainer(Sick(2, math.nan)).run(checkpoints=Kept(), report=None)
    assert str(caught.value).endswith('; the last good checkpoint is step-2') and Kept.steps == [1, 2] and Kept.saved == []
    Kept.steps.clear()
    trainer().run(3, checkpoints=Kept(), report=None)
    assert Kept.steps == [1, 2, 3] and Kept.saved == [3]


# ---- Ctrl-C

def press(): signal.raise_signal(signal.SIGINT)


@pytest.fixture
def default_interrupt():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_the_first_press_ends_after_the_step(default_interrupt):
    lines, whole = [], trainer(gpt(dropout=0.3))
    whole.run(report=None)
    t = trainer(gpt(dropout=0.3), schedule=lambda step: (press() if step == 4 and t.step == 4 and not lines[-1:] == ['go'] else None) or 0.01)
    t.run(report=lines.append)
    assert t.step == 5 and lines[-1] == 'stopped after step 5 of 7; run() goes on from here'
    assert signal.getsignal(signal.SIGINT) is default_interrupt
    lines.append('go')
    t.run(report=lines.append)
    assert t.step == 7 and 'stopped' not in lines[-1]
    # the schedule that presses is asked in the middle of the step, so all of that step was made
    assert t.history.losses[:5] == whole.history.losses[:5]


def test_the_second_press_acts_at_once_and_one_can_go_on(default_interrupt):
    presses = []
    def rate(step):
        if step == 2 and len(presses) < 2:
            while len(presses) < 2:
                presses.append(step)
                press()
        return 0.01
    t = trainer(schedule=rate)
    with pytest.raises(KeyboardInterrupt): t.run(report=None)
    assert t.step == 2 and presses == [2, 2] and signal.getsignal(signal.SIGINT) is default_interrupt
    t.run(report=None)
    assert t.step == 7


@pytest.mark.parametrize('where', ['forward', 'reading'])
def test_after_a_hard_stop_no_gradient_is_left_and_reading_goes_on(default_interrupt, where):
    fired = []
    class Reads(list):
        def __iter__(self):
            for i, batch in enumerate(list.__iter__(self)):
                if where == 'reading' and i == 3 and not fired:
                    fired.append(1); raise KeyboardInterrupt
                yield batch
    t = trainer(batches=Reads(loader()), accumulate=2)
    if where == 'forward':
        def stop(*_):
            if t.step == 1 and len(fired) < 2:
                fired.append(1)
                if len(fired) == 2: raise KeyboardInterrupt                   # in the second batch of the step
        t.model.token_embedding.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): t.run(report=None)
    assert t.step == 1 and all(p.grad is None for p in t.model.parameters())
    t.run(report=None)
    assert t.step == 7


def test_pressed_in_the_last_step_nothing_is_said(default_interrupt):
    lines = []
    t = trainer(validation=loader(), schedule=lambda step: (press() if step == 6 else None) or 0.01)
    t.run(report=lines.append)
    assert t.step == 7 and 'step     7' in lines[-1] and signal.getsignal(signal.SIGINT) is default_interrupt


def test_pressed_before_the_first_step(default_interrupt):
    lines = []
    t = trainer()
    t.run(sample=lambda model: press() or 's', report=lines.append)
    assert t.step == 0 and lines[-1] == 'stopped after step 0 of 7; run() goes on from here'


def test_a_stop_saves(default_interrupt):
    class Kept:
        last, how_to_resume = None, 'call again'
        def hold(self, trainer): return nullcontext()
        def after_step(self, trainer, report): pass
        def end(self, trainer): self.last = f'step-{trainer.step}'
    lines = []
    t = trainer(schedule=lambda step: (press() if step == 1 else None) or 0.01)
    t.run(checkpoints=Kept(), report=lines.append)
    assert lines[-1] == 'stopped after step 2 of 7, saved as step-2; call again'


def test_who_ignores_the_key_still_does():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        t = trainer(schedule=lambda step: press() or 0.01)
        t.run(report=None)
        assert t.step == 7 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, before)


def test_the_handler_is_restored_after_an_error(default_interrupt):
    with pytest.raises(FloatingPointError): trainer(Sick(1, math.nan)).run(report=None)
    assert signal.getsignal(signal.SIGINT) is default_interrupt


def test_in_another_thread_nothing_is_touched(default_interrupt):
    found, t = [], trainer(schedule=lambda step: found.append(signal.getsignal(signal.SIGINT)) or 0.01)
    thread = threading.Thread(target=lambda: t.run(report=None))
    thread.start()
    thread.join()
    assert t.step == 7 and set(found) == {default_interrupt}


SCRIPT = '''
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
from llmbook.core import set_seed
from llmbook.data import make_dataloader
from llmbook.gpt import GPT, GPTConfig
from llmbook.train import TrainConfig, Trainer
set_seed(1)
trainer = Trainer(GPT(GPTConfig(11, 6, 1, 2, 8)), make_dataloader(torch.arange(100) % 11, 6, 2, workers=WORKERS), TrainConfig(100_000, evaluate_every=1),
                  schedule=lambda step: time.sleep(SLEEP) or 1e-3)
trainer.run(report=lambda line: print(line, flush=True), progress=PROGRESS)
print("weights", all(p.isfinite().all() for p in trainer.model.parameters()), "step", trainer.step, flush=True)
before = trainer.step
trainer.run(before + 2, report=None)
print("went on to", trainer.step - before)
'''


LOUD = {k: v for k, v in os.environ.items() if k != 'TQDM_DISABLE'}               # where a live line may be shown


def start(sleep, line, workers=0):
    code = SCRIPT.replace('SLEEP', str(sleep)).replace('PROGRESS', 'None').replace('WORKERS', str(workers))
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=LOUD, start_new_session=True)
    while not (got := process.stdout.readline()).startswith(line): assert got, process.stderr.read()
    time.sleep(0.3)
    return process


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGINT for a single process')
@pytest.mark.parametrize('workers', [0, 1])
def test_a_real_interrupt_ends_after_a_step(workers):
    process = start(0.01, 'step     2', workers)
    os.killpg(process.pid, signal.SIGINT)                                     # as a terminal does: to all of its processes
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == '', err                         # and no live line: stderr is no terminal
    assert 'stopped after step' in out and 'of 100000; run() goes on from here' in out and 'weights True' in out and 'went on to 2' in out


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGINT for a single process')
def test_a_second_real_interrupt_does_not_wait():
    process = start(30, 'step     0')
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None                                             # the first one waits for the step
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and 'KeyboardInterrupt' in err and 'stopped after' not in out and time.monotonic() - begun < 20


# ---- the live line

@pytest.mark.skipif(os.name == 'nt', reason='no pseudo-terminal')
@pytest.mark.parametrize('wanted, disable', [({'None': True, 'False': False, 'True': True}, {}), ({'None': False}, {'TQDM_DISABLE': '1'})])
def test_a_terminal_gets_a_live_line(wanted, disable):
    "Several trainings in a process, a mark on the terminal after each."
    import fcntl, pty, struct, termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))     # rows and columns
    setup, *training = SCRIPT.replace('SLEEP', '0').replace('WORKERS', '0').replace('100_000', '30').replace('evaluate_every=1', 'evaluate_every=10').partition('set_seed(1)')
    code = setup + ''.join(''.join(training).replace('PROGRESS', progress) + 'print("<end>", file=sys.stderr, flush=True)\n' for progress in wanted)
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=theirs, text=True, env={**LOUD, **disable})
    out, _ = process.communicate(timeout=60)
    os.set_blocking(ours, False)                                              # what has been written is lost once both ends are closed
    seen = b''
    try:
        while part := os.read(ours, 4096): seen += part
    except BlockingIOError: pass
    os.close(ours), os.close(theirs)
    *parts, rest = seen.split(b'<end>')
    assert [(b'/30 [' in part and b'loss' in part) for part in parts] == [*wanted.values()] and rest.strip() == b'', seen
    assert out.count('step     0\nstep    10, ') == len(wanted)


@pytest.mark.parametrize('stream, progress, want', [('ipykernel.iostream', None, {}), ('io', None, {'disable': True}), ('none', None, {'disable': True}),
                                                    ('io', True, {'disable': False}), ('ipykernel.iostream', False, {'disable': True})])
def test_who_gets_a_line(monkeypatch, stream, progress, want):
    "Without `disable` tqdm asks TQDM_DISABLE."
    class Stream(io.StringIO): pass
    Stream.__module__ = stream
    monkeypatch.setattr(module, 'tqdm', lambda **settings: settings)
    monkeypatch.setattr(sys, 'stderr', None if stream == 'none' else Stream())
    line = module._live_line(5, 2, progress)
    assert (line['total'], line['initial'], line['leave']) == (5, 2, False)
    assert {k: v for k, v in line.items() if k == 'disable'} == want


# ---- the longest copy

def brute(text, source):
    known = {tuple(source[i:j]) for i in range(len(source)) for j in range(i + 1, len(source) + 1)}
    return max(((i, j - i) for i in range(len(text)) for j in range(i + 1, len(text) + 1) if tuple(text[i:j]) in known), key=lambda c: (c[1], -c[0]), default=(0, 0))


@settings(max_examples=500)
@given(st.integers(1, 4).flatmap(lambda k: st.tuples(*[st.lists(st.integers(0, k), max_size=24)] * 2)))
@example(([], []))
@example(([1] * 24, [1] * 17))
@example(([1] * 17, [1] * 24))
@example(([0, 1] * 12, [1, 0] * 11))
def test_longest_copy_is_brute_force(rows):
    text, source = rows
    want = brute(text, source)
    assert longest_copy(text, source) == want
    assert longest_copy(torch.tensor(text, dtype=torch.int64), np.array(source, dtype=np.int32)) == want
    letters = [''.join('aé🙂\ud800\x00'[i] for i in row) for row in rows]
    assert longest_copy(*letters) == want
    at, n = longest_copy(*letters)
    assert letters[0][at:at + n] in letters[1] and all(type(x) is int for x in (at, n))


@settings(max_examples=60)
@given(SEEDS, st.integers(0, 300), st.integers(0, 200))
def test_a_planted_copy_is_found(seed, length, at):
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 50_000, 700)
    text = rng.integers(50_000, 99_000, 700)
    text[at:at + length] = source[300:300 + length]
    assert longest_copy(text.tolist(), source) == ((at, length) if length else (0, 0))


def test_large_ids_and_negative_ones_are_only_names():
    assert longest_copy([2**62, -5, 7], [9, 2**62, -5]) == (0, 2)


def test_copies_of_a_million_letters_take_seconds():
    rng = np.random.default_rng(0)
    text, source = (''.join(map(chr, rng.integers(97, 123, 300_000))) for _ in range(2))
    text = text[:1000] + source[5000:200_000] + text[1000:]
    begun = time.perf_counter()
    assert longest_copy(text, source) == (1000, 195_000)
    assert time.perf_counter() - begun < 30


@pytest.mark.parametrize('text, source, error, words', [('abc', [1], TypeError, 'text is a str and source a list; give two strings'), ([1], 'abc', TypeError, 'text is a list and source a str'),
                                                       ([1.5], [1], TypeError, 'whole numbers'), (torch.ones(2, 2).long(), [1], ValueError, 'one row')])
def test_longest_copy_refuses(text, source, error, words):
    with pytest.raises(error, match=words): longest_copy(text, source)


# ---- it learns

def test_it_learns_a_text_by_heart():
    torch.manual_seed(0)
    ids = torch.randint(11, (25,))
    t = Trainer(gpt(N=1, L=24), [(ids[None, :-1], ids[None, 1:])], TrainConfig(200, learning_rate=0.01, weight_decay=0.0))
    losses = t.run(report=None).losses
    assert abs(losses[0] - math.log(11)) < 0.1 and losses[-1] < 0.05
    assert generate(t.model, ids[:1], 24, temperature=0) == ids.tolist()
