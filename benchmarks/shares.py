"""Where the time goes: a turn of ours, each part of it timed by PyTorch's profiler; and two of its parts done in another way."""
import math, time

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import generation, training
from benchmarks.harness import Contender, Job, Row
from llmbook.loss import linear_cross_entropy

KINDS = {      # PyTorch's names begin so
    'products': ('aten::mm', 'aten::addmm', 'aten::bmm', 'mkldnn::_linear', 'aten::_weight_int8pack_mm'),
    'attention': ('aten::_scaled_dot_product',),
    'activation': ('aten::gelu',),
    'optimiser': ('aten::_fused_adamw', 'aten::linalg_vector_norm'),
}


def kind_of(name: str) -> str | None:
    "The kind of an operation; none, if it only calls others."
    if not name.startswith(('aten::', 'mkldnn::')): return None
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), 'other operations')


def shares(make, **settings) -> Job:
    "What part of a turn each kind of operation takes; what is left over lies between them."
    job = make(**settings)
    def turn(_):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            start = time.perf_counter()
            job.turn(None)
            seconds = time.perf_counter() - start
        out = dict.fromkeys((*KINDS, 'other operations'), 0.0)
        for event in found.key_averages():
            if kind := kind_of(event.key): out[kind] += event.self_cpu_time_total / 1e6 / seconds
        return out | {'between them': 1 - sum(out.values())}
    return Job(turn)


def gelu(form: str) -> Job:
    "Forward and backward of GELU, for as many numbers as a block of the small model has."
    x, grad = torch.randn(2, 768, 512)
    x.requires_grad_()
    def turn(_):
        for _ in range(200): F.gelu(x, approximate=form).backward(grad)
        return {'units': 200 * x.numel() / 1e6}
    return Job(turn)


def loss(pieces: bool, places: int = 2048, width: int = 384, ids: int = 50_257) -> Job:
    "The loss and its gradients: by pieces, or with all logits at once."
    torch.manual_seed(1)
    hidden, weight, targets = torch.randn(places, width), 0.02 * torch.randn(ids, width), torch.randint(ids, (places,))
    for x in (hidden, weight): x.requires_grad_()
    def turn(_):
        hidden.grad = weight.grad = None
        found = linear_cross_entropy(hidden, weight, targets) if pieces else F.cross_entropy(hidden @ weight.T, targets)
        found.backward()
        return {'units': places, 'result': [x.item() for x in (found, hidden.grad.norm(), weight.grad.norm())]}
    return Job(turn)


def same_loss(found: dict) -> None:
    "The same loss, and gradients of the same length."
    want = found['ours, by pieces']
    for name, result in found.items():
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(result, want, strict=True)): raise RuntimeError(f'{name} does not do the same work: {result}, and ours {want}')


def rows(full: bool) -> list[Row]:
    "The rows of this file."
    cases = [('training, 30 million', training.ours, '30M'), ('training, 124 million', training.ours, '124M'), ('training, small model', training.ours, 'small'),
             ('writing', generation.ours, '124M'), ('writing, int8', generation.int8, '124M')]
    name, env = training.allocator()
    ways = [(way + after, {'pieces': pieces}, more) for after, more in (('', {}), (f', {name}', env)) for way, pieces in (('ours, by pieces', True), ('all logits at once', False))]
    forms = Contender('ours, with tanh, as GPT-2', gelu, {'form': 'tanh'}), Contender('with erf, as nanoGPT', gelu, {'form': 'none'})
    return [Row('activation', 'two formulas of GELU', 'forward and backward, 768 places, 512 wide', 'million numbers', forms),
            Row('loss', 'two ways to the loss', 'the loss and its gradients, 2,048 places, 384 wide, 50,257 ids', 'tokens', tuple(Contender(way, loss, settings, env) for way, settings, env in ways), agree=same_loss),
            Row('shares', 'where the time goes', "a turn of ours under PyTorch's profiler, which itself takes time with each operation; shares of the time", '',
                tuple(Contender(name, shares, {'make': make, 'size': size}, {'KINETO_LOG_LEVEL': '99'}) for name, make, size in cases), rounds=1)] if full else []
