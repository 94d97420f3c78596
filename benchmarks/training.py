"""Steps of training beside those who teach or ship the same model: same weights, same batches, each with the habits it ships with."""
import importlib.util, math
from ctypes.util import find_library
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.harness import AGAIN, Contender, Goal, Job, Row
from llmbook.budget import forward_flops
from llmbook.gpt import GPT, GPTConfig
from llmbook.open_weights import _published, gpt2_name
from llmbook.train import TrainConfig, Trainer

RATE, DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
SIZES = {      # (config, batch, steps of a turn)
    '30M': (GPTConfig(50_257, 256, n_layer=6, n_head=6, n_embd=384), 8, 1),
    '124M': (GPTConfig(50_257, 256, n_layer=12, n_head=12, n_embd=768), 2, 1),
    'small': (GPTConfig(65, 64, n_layer=4, n_head=4, n_embd=128), 12, 20),
    'tiny': (GPTConfig(65, 16, n_layer=2, n_head=2, n_embd=32), 4, 3),      # for the tests
}


def start(size: str) -> GPT:
    "The weights that all begin with."
    torch.manual_seed(1)
    return GPT(SIZES[size][0])


def batches(size: str) -> list:
    "The inputs and targets that all read."
    config, batch, _ = SIZES[size]
    chance = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(config.vocab_size, (2, batch, config.context_length), generator=chance)) for _ in range(4)]


def steps(size: str, step) -> Job:
    "Turns of steps; `step` takes inputs and targets, and gives the loss."
    config, batch, n = SIZES[size]
    read, losses = batches(size), []
    def turn(_):
        for _ in range(n): losses.append(float(step(*read[len(losses) % len(read)])))
        return {'units': n * batch * config.context_length, 'result': losses[:3]}
    flops = 3 * forward_flops(config.vocab_size, config.context_length, config.n_layer, config.n_embd)
    return Job(turn, limit={'flops': flops})


def usual(model, optimizer, loss, clip: float | None = CLIP):
    "A step as everybody writes it."
    model.train()
    def step(x, y):
        found = loss(x, y)
        found.backward()
        if clip: torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.detach()
    return step


def ours(size: str) -> Job:
    "The book's trainer, with its defaults."
    trainer = Trainer(start(size), batches(size), TrainConfig(10**6, RATE, DECAY, BETAS, CLIP))
    return steps(size, lambda x, y: trainer.update())


def transformers(size: str) -> Job:
    "GPT2LMHeadModel, with what its Trainer does by default: fused AdamW, gradients clipped."
    from transformers import GPT2Config, GPT2LMHeadModel
    c, mine = SIZES[size][0], start(size)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    model.load_state_dict(_published(mine), strict=False)
    model.tie_weights()
    groups = [{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': DECAY}, {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE, BETAS, fused=True)
    return steps(size, usual(model, optimizer, lambda x, y: model(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss))


def nanogpt(size: str, path: str, compiled: bool = False) -> Job:
    "A checkout of nanoGPT, with its own optimizer and clip."
    spec = importlib.util.spec_from_file_location('nanogpt', Path(path)/'model.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c, mine = SIZES[size][0], start(size)
    model = module.GPT(module.GPTConfig(block_size=c.context_length, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, dropout=0.0, bias=True))
    weights = {f'transformer.{gpt2_name(name)[0]}': p for name, p in mine.named_parameters()}
    left = model.load_state_dict(weights, strict=False)
    if left.unexpected_keys or any('lm_head' not in k for k in left.missing_keys): raise RuntimeError(f'the weights do not fit this nanoGPT: {left}')
    optimizer = model.configure_optimizers(DECAY, RATE, BETAS, 'cpu')
    run = torch.compile(model) if compiled else model
    return steps(size, usual(model, optimizer, lambda x, y: run(x, y)[1]))


def from_scratch(size: str) -> Job:
    "GPTModel of LLMs-from-scratch, trained as its chapter 5 does: AdamW, no clipping; its head has weights of its own."
    from llms_from_scratch.ch04 import GPTModel
    c, mine = SIZES[size][0], start(size)
    model = GPTModel(dict(vocab_size=c.vocab_size, context_length=c.context_length, emb_dim=c.n_embd, n_heads=c.n_head, n_layers=c.n_layer, drop_rate=0.0, qkv_bias=True))
    model.load_state_dict(their_weights(mine), strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    return steps(size, usual(model, optimizer, lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), None))


def their_weights(mine: GPT) -> dict:
    "Our weights by the names of LLMs-from-scratch."
    parts = {'token_embedding': 'tok_emb', 'position_embedding': 'pos_emb', 'blocks': 'trf_blocks', 'attention': 'att', 'attention_norm': 'norm1', 'feed_forward_norm': 'norm2',
             'projection': 'out_proj', 'feed_forward': 'ff.layers', 'expand': '0', 'contract': '2'}
    found = {'out_head.weight': mine.lm_head.weight}
    for name, p in mine.state_dict().items():
        where = [parts.get(part, part) for part in name.split('.')]
        if 'norm' in name: where[-1] = {'weight': 'scale', 'bias': 'shift'}[where[-1]]
        if 'qkv' in where:
            for third, part in zip(p.chunk(3), ('W_query', 'W_key', 'W_value')): found['.'.join(part if w == 'qkv' else w for w in where)] = third
        else: found['.'.join(where)] = p
    return found


def litgpt(size: str) -> Job:
    "A model of litgpt of the same sizes; its positions are rotations, so its losses are its own, and its head has weights of its own."
    from litgpt.config import Config
    from litgpt.model import GPT as Model
    c = SIZES[size][0]
    model = Model(Config(name='gpt', block_size=c.context_length, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                         bias=True, lm_head_bias=False, norm_class_name='LayerNorm', mlp_class_name='GptNeoxMLP', gelu_approximate='tanh', parallel_residual=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, betas=BETAS, fused=True)
    return steps(size, usual(model, optimizer, lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten())))


def same_losses(found: dict) -> None:
    "The same model on the same batches: the first loss of all, and the later ones of those who step alike."
    want = found['ours']
    for name, losses in found.items():
        if 'litgpt' in name: close = abs(losses[0] - want[0]) < 0.5
        elif 'from-scratch' in name: close = math.isclose(losses[0], want[0], rel_tol=1e-4)
        else: close = all(math.isclose(a, b, rel_tol=2e-3) for a, b in zip(losses, want, strict=True)) and math.isclose(losses[0], want[0], rel_tol=1e-4)
        if not close: raise RuntimeError(f'{name} does not do the same work: its losses are {losses}, and ours {want}')


def allocator() -> tuple[str, dict[str, str]]:
    "An allocator that keeps what it is given back: its name, and the variables that a program is started with."
    for name, word in (('tcmalloc', 'tcmalloc_minimal'), ('jemalloc', 'jemalloc')):
        if library := find_library(word): return name, {'LD_PRELOAD': library, 'TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD': str(2**40)}
    return 'glibc that returns nothing', {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**62), 'MALLOC_TOP_PAD_': str(2**26)}


def row(size: str, title: str, rounds: int, goals: tuple[Goal, ...], checkout: str | None = None, compiled: bool = False, same_allocator: bool = False) -> Row:
    "One size of model, each contender as shipped or all with the same allocator."
    c, batch, _ = SIZES[size]
    name, env = allocator() if same_allocator else ('', {})
    peers = [('transformers', transformers, {}), ('LLMs-from-scratch', from_scratch, {}), ('litgpt', litgpt, {})]
    if checkout: peers += [('nanoGPT', nanogpt, {'path': checkout})] + [('nanoGPT, compiled', nanogpt, {'path': checkout, 'compiled': True})] * (compiled and not same_allocator)
    return Row(f'train {size}' + ', same allocator' * same_allocator, title + f', all with {name}' * same_allocator,
               f'{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.context_length}, batch {batch}, {c.vocab_size:,} ids, float32: forward, loss, backward, AdamW',
               'tokens', tuple(Contender(who, make, {'size': size, **more}, env, make.__doc__.split('\n')[0]) for who, make, more in [('ours', ours, {}), *peers, (AGAIN, ours, {})]), goals, rounds, agree=same_losses)


GPT2_PEERS = 'nanoGPT', 'nanoGPT, compiled', 'transformers'


def rows(full: bool, checkout: str | None) -> list[Row]:
    "The rows of this file, with what they must reach."
    n, more = 11 if full else 5, dict(checkout=checkout, compiled=full)
    faster = lambda bound, over=GPT2_PEERS: Goal('speed', bound, over)
    smaller = lambda bound, over=GPT2_PEERS: Goal('memory', bound, over, at_most=True)
    large = [
        row('30M', 'training step, 30 million parameters', 7, (faster(1.0), smaller(0.55)), same_allocator=True, **more),
        row('124M', 'training step, 124 million parameters', n, (faster(1.1), faster(1.7, ('LLMs-from-scratch',)), smaller(1.0, ('nanoGPT', 'transformers'))), **more),
        row('124M', 'training step, 124 million parameters', 7, (faster(1.05),), same_allocator=True, **more)]
    return [
        row('30M', 'training step, 30 million parameters', n, (faster(1.2), smaller(0.6)), **more), *large * full,
        row('small', 'training step, small model', 2 * n - 1, (faster(1.0, ('nanoGPT',)), faster(1.3, ('transformers',)), faster(1.6, ('LLMs-from-scratch',))), **more),
    ]
