"""Where the time goes: a turn of ours, each part of it timed by PyTorch's profiler."""
import time

from torch.profiler import ProfilerActivity, profile

from benchmarks import generation, training
from benchmarks.harness import Contender, Job, Row

KINDS = {      # PyTorch's names begin so
    'products': ('aten::mm', 'aten::addmm', 'aten::bmm', 'mkldnn::_linear', 'aten::_weight_int8pack_mm'),
    'attention': ('aten::_scaled_dot_product',),
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


def rows(full: bool) -> list[Row]:
    "The row of this file."
    cases = [(f'train {size}', training.ours, size) for size in ('30M', '124M', 'small')] + [('generate', generation.ours, '124M'), ('generate, int8', generation.int8, '124M')]
    return [Row('shares', 'where the time goes', "a turn of ours under PyTorch's profiler, which itself takes time with each operation; shares of the time", '',
                tuple(Contender(name, shares, {'make': make, 'size': size}, {'KINETO_LOG_LEVEL': '99'}) for name, make, size in cases), rounds=1)] * full
