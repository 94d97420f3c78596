"The model against `transformers`' GPT-2 with the weights moved over, against its own parts, and against a formula for its size; and what is refused."
import copy, io, math
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from llmbook.core import count_parameters, set_seed
from llmbook.gpt import GPT, GPT2_SIZES, GPTConfig
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

SEEDS = st.integers(0, 2**31)
close = torch.testing.assert_close
SMALL = GPTConfig(vocab_size=11, context_length=8, n_layer=2, n_head=3, n_embd=12)


@st.composite
def configs(draw, dropout=st.just(0.0)):
    n_head = draw(st.integers(1, 4))
    return GPTConfig(draw(st.integers(1, 23)), draw(st.integers(1, 9)), draw(st.integers(1, 3)), n_head, n_head * draw(st.integers(1, 5)),
                     draw(dropout), draw(st.booleans()), draw(st.sampled_from([None, True, False])), draw(st.booleans()))


def shaken(model, seed=0):
    "Every parameter random, so that no 0 or 1 of the start hides anything; in double precision."
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data = torch.randn(p.shape, generator=generator)
    return model.double()


def drawn(config, shape, seed=0): return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
def formula(c):
    C, qkv = c.n_embd, c.bias if c.qkv_bias is None else c.qkv_bias
    return (c.vocab_size * (1 if c.tied else 2) + c.context_length) * C + c.n_layer * (12 * C * C + (3 * qkv + 8 * c.bias + 2) * C) + (1 + c.bias) * C


# ---- against transformers

THEIR_NAMES = {'token_embedding': 'transformer.wte', 'position_embedding': 'transformer.wpe', 'final_norm': 'transformer.ln_f', 'lm_head': 'lm_head'}
THEIR_PARTS = {'attention_norm': 'ln_1', 'attention.qkv': 'attn.c_attn', 'attention.projection': 'attn.c_proj',
               'feed_forward_norm': 'ln_2', 'feed_forward.expand': 'mlp.c_fc', 'feed_forward.contract': 'mlp.c_proj'}


def pairs(ours, theirs):
    "Each parameter of ours, with theirs and whether it lies transposed; and the added vectors that only theirs has."
    rest, found = dict(theirs.named_parameters()), []
    names = {o: t for o, t in THEIR_NAMES.items() if o != 'lm_head' or not ours.config.tied}
    names |= {f'blocks.{n}.{o}': f'transformer.h.{n}.{t}' for n in range(ours.config.n_layer) for o, t in THEIR_PARTS.items()}
    own = dict(ours.named_parameters())
    for o, t in names.items():
        for kind in ('weight', 'bias'):
            if f'{o}.{kind}' in own: found.append((own.pop(f'{o}.{kind}'), rest.pop(f'{t}.{kind}'), '.c_' in t and kind == 'weight'))
    assert not own and all(name.endswith('.bias') for name in rest), (own, rest)
    return found, rest


def their_model(ours):
    c = ours.config
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                        tie_word_embeddings=c.tied)).double().eval()
    found, rest = pairs(ours, theirs)
    for p, q, turned in found: q.data = (p.T if turned else p).detach().clone()
    for q in rest.values(): nn.init.zeros_(q)
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == c.tied
    return theirs


@settings(max_examples=120)
@given(configs(), st.integers(1, 3), SEEDS, st.data())
@example(SMALL, 2, 0, None)
@example(replace(SMALL, bias=False, tied=False), 2, 1, None)
@example(replace(SMALL, qkv_bias=False), 3, 2, None)
@example(replace(SMALL, bias=False, qkv_bias=True, tied=False), 2, 3, None)
def test_logits_and_gradients_are_those_of_transformers(config, B, seed, data):
    T = data.draw(st.integers(1, config.context_length)) if data else config.context_length - 1
    ours = shaken(GPT(config), seed).eval()
    theirs, ids = their_model(ours), drawn(config, (B, T), seed)
    a, b = ours(ids), theirs(ids).logits
    assert a.shape == (B, T, config.vocab_size)
    close(a, b, rtol=1e-8, atol=1e-8)
    for logits in (a, b): F.cross_entropy(logits.flatten(0, 1), drawn(config, (B * T,), seed + 1)).backward()
    for p, q, turned in pairs(ours, theirs)[0]: close(p.grad, q.grad.T if turned else q.grad, rtol=1e-6, atol=1e-8)


def test_single_precision_too():
    for tied in (True, False):
        ours = shaken(GPT(replace(SMALL, tied=tied))).eval()
        theirs, ids = their_model(ours).float(), drawn(SMALL, (4, 8))
        close(ours.float()(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


# ---- against its own parts

@settings(max_examples=100)
@given(configs(), SEEDS)
def test_the_model_is_its_parts_in_order(config, seed):
    model, T = shaken(GPT(config), seed).eval(), config.context_length
    ids, p = drawn(config, (2, T), seed), dict(model.named_parameters(remove_duplicate=False))
    x = torch.stack([torch.stack([p['token_embedding.weight'][i] + p['position_embedding.weight'][t] for t, i in enumerate(row)]) for row in ids.tolist()])
    for block in model.blocks: x = block(x)
    x = F.layer_norm(x, (config.n_embd,), p['final_norm.weight'], p.get('final_norm.bias'))
    close(model(ids), x @ p['token_embedding.weight' if config.tied else 'lm_head.weight'].T)


@settings(max_examples=100)
@given(configs(), SEEDS, st.data())
def test_rows_batches_and_prefixes(config, seed, data):
    model, ids = shaken(GPT(config), seed).eval(), drawn(config, (2, 3, config.context_length), seed)
    logits, T = model(ids), data.draw(st.integers(0, config.context_length))
    assert logits.shape == (*ids.shape, config.vocab_size)
    close(model(ids[1]), logits[1])
    close(model(ids[1, 2]), logits[1, 2])                                        # a row without a batch
    close(model(ids[..., :T]), logits[..., :T, :])                               # the future changes nothing
    close(model(ids.int()), logits)
    assert model(ids[:0]).shape == (0, *ids.shape[1:], config.vocab_size)


def test_places_are_told_apart_only_by_positions():
    model, ids = shaken(GPT(SMALL)), torch.full((8,), 3)
    assert (model(ids)[1:] - model(ids)[:1]).abs().amax(-1).gt(1e-3).all()
    nn.init.zeros_(model.position_embedding.weight)
    close(model(ids), model(ids)[:1].expand(8, -1))


def test_dropout_only_in_training_and_on_the_input_too():
    noisy, ids = shaken(GPT(replace(SMALL, dropout=0.5))), drawn(SMALL, (2, 8))
    plain = shaken(GPT(SMALL))
    assert not torch.equal(noisy(ids), noisy(ids)) and torch.equal(plain(ids), plain(ids))
    close(noisy.eval()(ids), plain(ids))
    assert {m.p for m in noisy.modules() if isinstance(m, nn.Dropout)} == {0.5} == {b.attention.dropout for b in noisy.blocks}
    assert sum(isinstance(m, nn.Dropout) for m in noisy.modules()) == 3
    noisy.train()
    for block in noisy.blocks: block.eval()                                      # what is left is the input
    set_seed(1)
    logits = noisy(ids)
    set_seed(1)
    x = F.dropout(noisy.token_embedding(ids) + noisy.position_embedding(8), 0.5)
    for block in noisy.blocks: x = block(x)
    close(logits, noisy.lm_head(noisy.final_norm(x)))


# ---- the tied head

@given(configs())
@settings(max_examples=50)
def test_tied_means_the_same_parameter(config):
    model = GPT(config)
    assert (model.lm_head.weight is model.token_embedding.weight) == config.tied
    assert config.tied == (model.lm_head.weight.data_ptr() == model.token_embedding.weight.data_ptr())
    assert not model.lm_head.weight.is_meta and model.lm_head.bias is None and isinstance(model.lm_head.weight, nn.Parameter)
    assert model.lm_head.weight.shape == (config.vocab_size, config.n_embd)


def test_the_tie_holds():
    model, ids = GPT(SMALL), drawn(SMALL, (2, 8))
    for same in (copy.deepcopy(model), model.double(), model.float(), model.train()):
        assert same.lm_head.weight is same.token_embedding.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    assert model.lm_head.weight is model.token_embedding.weight
    other = GPT(SMALL)
    other.load_state_dict(model.state_dict())
    assert other.lm_head.weight is other.token_embedding.weight and torch.equal(other(ids), model(ids))


def test_a_tied_table_gets_both_gradients():
    tied = shaken(GPT(SMALL))
    apart = GPT(replace(SMALL, tied=False)).double()
    apart.load_state_dict(tied.state_dict())
    ids = drawn(SMALL, (2, 8))
    close(tied(ids), apart(ids))
    for model in (tied, apart): F.cross_entropy(model(ids).flatten(0, 1), ids.flip(1).flatten()).backward()
    close(tied.token_embedding.weight.grad, apart.token_embedding.weight.grad + apart.lm_head.weight.grad)


def test_no_memory_for_a_head_that_is_replaced(monkeypatch):
    made, normal = [], nn.Parameter.__new__
    monkeypatch.setattr(nn.Parameter, '__new__', lambda cls, data=None, *args, **more: made.append(data) or normal(cls, data, *args, **more))
    GPT(SMALL)
    assert sum(p.numel() for p in made if not p.is_meta) == formula(SMALL)


# ---- the start

@pytest.mark.parametrize('tied', [True, False])
def test_how_it_starts(tied):
    set_seed(123)
    model = GPT(GPTConfig(1000, 400, 8, 4, 64, tied=tied, dropout=0.1))
    for name, p in model.named_parameters():
        if name.endswith('.bias'): assert p.eq(0).all(), name
        elif 'norm' in name: assert p.eq(1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if 'projection' in name or 'contract' in name else 0.02
            assert math.isclose(p.std().item(), std, rel_tol=0.06) and abs(p.mean().item()) < std / 10, name
    weights = [p for p in model.parameters() if p.dim() == 2]
    assert len(weights) == 2 + 4 * 8 + (not tied) and not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i] if a.shape == b.shape)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('n_layer', [1, 12])
def test_it_starts_with_no_opinion(tied, n_layer):
    set_seed(123)
    model, ids = GPT(GPTConfig(5000, 64, n_layer, 4, 64, tied=tied)), torch.randint(5000, (8, 64))
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(5000)) < 0.05


def test_the_depth_does_not_change_the_size_of_the_stream():
    sizes = []
    for n_layer in (2, 8, 32):
        set_seed(123)
        model, x = GPT(GPTConfig(5, 32, n_layer, 4, 64)), torch.randn(2, 32, 64)
        y = x
        for block in model.blocks: y = block(y)
        sizes.append((y - x).std().item())
    assert max(sizes) < 1.15 * min(sizes)


def test_the_same_seed_gives_the_same_model():
    def start(seed): set_seed(seed); return [p.detach() for p in GPT(SMALL).parameters()]
    assert all(map(torch.equal, start(1), start(1))) and not all(map(torch.equal, start(1), start(2)))


# ---- sizes

@settings(max_examples=200)
@given(configs())
@example(SMALL)
def test_the_number_of_parameters(config):
    assert count_parameters(GPT(config)) == formula(config)
    with torch.device('meta'): assert count_parameters(GPT(config)) == formula(config)


def test_the_sizes_of_gpt2():
    with torch.device('meta'):
        assert [count_parameters(GPT(c)) for c in GPT2_SIZES.values()] == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
        gpt2 = GPT2_SIZES['124M']
        assert count_parameters(GPT(replace(gpt2, qkv_bias=False, tied=False))) == 163_009_536
        assert count_parameters(GPT(replace(gpt2, qkv_bias=False))) == 124_412_160
        assert GPT(GPT2_SIZES['1558M'])(torch.zeros(2, 1024, dtype=torch.int64)).shape == (2, 1024, 50_257)
    assert round(163_009_536 * 4 / 2**20, 2) == 621.83
    assert list(GPT2_SIZES) == ['124M', '355M', '774M', '1558M']
    assert all(c == GPTConfig(50_257, 1024, c.n_layer, c.n_head, 64 * c.n_head) for c in GPT2_SIZES.values())


@settings(max_examples=60)
@given(configs(), st.data())
def test_the_number_of_operations(config, data):
    "No product of matrices more than needed: nothing is computed twice."
    T, C = data.draw(st.integers(1, config.context_length)), config.n_embd
    counter = FlopCounterMode(display=False)
    with torch.device('meta'), counter: GPT(config)(torch.zeros(3, T, dtype=torch.int64))
    assert counter.get_total_flops() == 3 * 2 * T * (config.n_layer * (12 * C * C + 2 * T * C) + config.vocab_size * C)


# ---- the config

def test_config_is_frozen_and_plain():
    with pytest.raises(FrozenInstanceError): SMALL.n_layer = 3
    assert GPTConfig(**asdict(SMALL)) == SMALL and hash(SMALL) == hash(replace(SMALL)) and replace(SMALL, n_layer=3).n_layer == 3
    assert asdict(GPTConfig(9)) == dict(vocab_size=9, context_length=128, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=True, qkv_bias=None, tied=True)
    config = GPTConfig(np.int64(9), n_embd=np.int32(8), n_head=np.int8(2), dropout=0)
    assert {type(v) for k, v in asdict(config).items() if k not in ('bias', 'qkv_bias', 'tied')} == {int, float}
    model = GPT(SMALL)
    assert model.config is SMALL


@pytest.mark.parametrize('name', ['vocab_size', 'context_length', 'n_layer', 'n_head', 'n_embd'])
def test_sizes_that_are_refused(name):
    for bad in (0, -4):
        with pytest.raises(ValueError, match=f'^{name}={bad} is too small'): replace(SMALL, **{name: bad})
    for bad in (2.0, True, '3', None, math.nan):
        with pytest.raises(TypeError, match=f'^{name}={bad!r} is not a whole number'): replace(SMALL, **{name: bad})


@given(st.integers(1, 30), st.integers(1, 200))
def test_a_width_that_the_heads_do_not_divide(n_head, n_embd):
    if n_embd % n_head == 0: return
    with pytest.raises(ValueError) as caught: GPTConfig(9, n_head=n_head, n_embd=n_embd)
    near = int(str(caught.value).rpartition('try n_embd=')[2])
    assert str(caught.value).startswith(f'n_embd={n_embd} is not a multiple of n_head={n_head}; ')
    assert near > 0 and abs(near - n_embd) < n_head and GPTConfig(9, n_head=n_head, n_embd=near).n_embd == near


def test_other_settings_that_are_refused():
    for bad in (-0.1, 1.0, 1, 2.5, math.nan):
        with pytest.raises(ValueError, match=f'^dropout={bad}'): replace(SMALL, dropout=bad)
    for bad in ('0.1', None, True):
        with pytest.raises(TypeError, match='^dropout='): replace(SMALL, dropout=bad)
    for name in ('bias', 'qkv_bias', 'tied'):
        for bad in (0, 1, 'yes'):
            with pytest.raises(TypeError, match=f'^{name}={bad!r} is no switch; give True or False$'): replace(SMALL, **{name: bad})
    for name in ('bias', 'tied'):
        with pytest.raises(TypeError, match=f'^{name}=None'): replace(SMALL, **{name: None})
    with pytest.raises(TypeError): GPTConfig()
    for bad in ({'vocab_size': 9}, 9, None):
        with pytest.raises(TypeError, match=f'config is a {type(bad).__name__}; give a GPTConfig'): GPT(bad)


# ---- ids that are refused

def test_texts_that_are_too_long():
    model = GPT(SMALL)
    for shape in ((9,), (2, 9), (1, 30)):
        with pytest.raises(ValueError, match=rf'position 8 has no vector: T={shape[-1]}.*context_length=8 allows 0 to 7; cut the text'): model(drawn(SMALL, shape))


def test_ids_that_are_refused():
    model = GPT(SMALL)
    for bad in (11, -1, 50_256):
        with pytest.raises(ValueError, match=rf'ids\[1, 2\] is {bad}; allowed are 0 to 10, because vocab_size=11'): model(torch.tensor([[1, 2, 3], [4, 5, bad]]))
    for dtype in (torch.float32, torch.bool, torch.uint8):
        with pytest.raises(TypeError, match=f'ids has dtype {dtype}'): model(torch.ones(2, 3, dtype=dtype))
    for bad in ([1, 2], 'text', None):
        with pytest.raises(TypeError, match='ids is a'): model(bad)
    with pytest.raises(ValueError, match='ids is a single number; give a row of them'): model(torch.tensor(3))


# ---- as a part of what follows

def test_what_later_pages_rely_on():
    model = GPT(SMALL)
    assert [name for name, _ in model.named_children()] == ['token_embedding', 'position_embedding', 'dropout', 'blocks', 'final_norm', 'lm_head']
    own = set(model.state_dict())
    block = {f'{n}.{p}' for p in ('weight', 'bias') for n in ('attention_norm', 'attention.qkv', 'attention.projection', 'feed_forward_norm', 'feed_forward.expand', 'feed_forward.contract')}
    assert own == {'token_embedding.weight', 'position_embedding.weight', 'final_norm.weight', 'final_norm.bias', 'lm_head.weight'} | {f'blocks.{i}.{n}' for i in range(2) for n in block}
    assert not list(model.buffers())


def test_saved_and_loaded():
    model, file, ids = shaken(GPT(SMALL)), io.BytesIO(), drawn(SMALL, (2, 8))
    torch.save({'config': asdict(model.config), 'weights': model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = GPT(GPTConfig(**saved['config'])).double()
    other.load_state_dict(saved['weights'])
    assert torch.equal(other(ids), model(ids))
    with pytest.raises(RuntimeError, match='size mismatch'): GPT(replace(SMALL, n_embd=6)).load_state_dict(model.state_dict())


def test_it_learns_one_batch_by_heart():
    set_seed(123)
    model, ids = GPT(SMALL), torch.randint(11, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(200):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0: first = loss.item()
    assert abs(first - math.log(11)) < 0.2 and loss.item() < 0.2


@pytest.mark.parametrize('dynamic', [None, True])
def test_compiled_in_one_piece(dynamic):
    torch._dynamo.reset()
    model = shaken(GPT(SMALL)).eval()
    compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=dynamic)
    for T in (4, 7, 2): close(compiled(ids := drawn(SMALL, (2, T))), model(ids))
    torch._dynamo.reset()
