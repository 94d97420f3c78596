"""Writing with 124 million parameters beside `transformers`, in one run: `python benchmarks/generate.py [rounds] [threads]`.

Every contender has a process of its own and the same random weights, reads a prompt of 64 tokens and writes 128 more, greedily, batch 1.
They take turns, in an order that alternates; a turn in which other programs used the cores is taken again. Medians are shown, and the
median over rounds of (tokens per second / those of transformers). Before each round the speed of memory is measured; divided by the number
of bytes that a token must fetch, it is the limit that no program can pass.
"""
import os, platform, statistics, sys, time
from importlib.metadata import version
from multiprocessing import get_context

import psutil

PROMPT, NEW, OTHERS = 64, 128, 0.06                        # the last: the share of the cores that others may use in a turn


def ours():
    "The book's model, and a prompt."
    import torch
    from llmbook.gpt import GPT, GPT2_SIZES
    torch.manual_seed(123)
    model = GPT(GPT2_SIZES['124M']).eval()
    return model, torch.randint(50_257, (PROMPT,)).tolist()


def cached():
    from llmbook.generate import generate
    model, ids = ours()
    return lambda new: generate(model, ids, new, temperature=0), sum(p.nbytes for p in model.parameters())


def plain():
    "With a cache, and the products as PyTorch computes them."
    from llmbook import generate as module
    module._onednn_works = lambda: False
    return cached()


def uncached():
    from llmbook.generate import generate
    model, ids = ours()
    return lambda new: generate(model, ids, new, temperature=0, use_cache=False), sum(p.nbytes for p in model.parameters())


def int8():
    from llmbook.generate import generate, quantize_int8
    model, ids = ours()
    model = quantize_int8(model)
    read = sum(b.nbytes for b in model.buffers()) + sum(p.nbytes for n, p in model.named_parameters() if 'embedding' not in n)
    return lambda new: generate(model, ids, new, temperature=0), read


def peer():
    "transformers' GPT-2 with the same weights."
    import torch
    from llmbook.open_weights import _published
    from transformers import GPT2Config, GPT2LMHeadModel
    model, ids = ours()
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    theirs.load_state_dict(_published(model), strict=False)
    theirs.tie_weights()
    ids = torch.tensor([ids])
    return lambda new: theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                       use_cache=True, pad_token_id=50_256)[0].tolist(), sum(p.nbytes for p in theirs.parameters())


CONTENDERS = {'transformers, cache': peer, 'ours, cache': cached, 'ours, cache, plain products': plain, 'ours, no cache': uncached, 'ours, cache, int8': int8}
GOALS = {'ours, cache': '1.2', 'ours, cache, int8': '2.5'}


def bandwidth() -> float:
    "Bytes per second that all threads together read from memory."
    import torch
    x = torch.ones(2**27, dtype=torch.float32)                # 512 MB
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        x.sum()
        best = max(best, x.nbytes / (time.perf_counter() - start))
    return best


def work(name: str, threads: int, pipe) -> None:
    "The process of one contender: writes when asked, and says the ids and the seconds."
    import torch
    torch.set_num_threads(threads)
    if name == 'memory':
        while pipe.recv(): pipe.send((bandwidth(), None, sum(psutil.Process().cpu_times()[:2])))
        return
    write, read = CONTENDERS[name]()
    write(4)                                                 # once unmeasured
    pipe.send(read)
    while pipe.recv():
        start = time.perf_counter()
        ids = write(NEW)
        pipe.send((NEW / (time.perf_counter() - start), ids, sum(psutil.Process().cpu_times()[:2])))


def busy() -> float:
    "Seconds of all cores that anything has used."
    t = psutil.cpu_times()
    return t.user + t.nice + t.system + getattr(t, 'steal', 0)


def turn(pipe, process, tries: int = 30) -> tuple:
    "One measurement, and the others' share of the cores while it was made."
    for _ in range(tries):
        used, mine, start = busy(), sum(process.cpu_times()[:2]), time.perf_counter()
        pipe.send(True)
        result, ids, after = pipe.recv()
        others = (busy() - used - (after - mine)) / (time.perf_counter() - start) / os.cpu_count()
        if others <= OTHERS: break
        time.sleep(2)
    return result, ids, others


def main(rounds: int = 5, threads: int = os.cpu_count()) -> None:
    print(f'{", ".join(f"{p} {version(p)}" for p in ("torch", "transformers"))}; Python {platform.python_version()}, {platform.machine()}, {threads} threads, {rounds} rounds')
    print(f'124,439,808 parameters, float32 or int8; prompt {PROMPT}, {NEW} new tokens, batch 1, greedy\n')
    context, alive, read, speeds, seen, shares = get_context('spawn'), {}, {}, {}, {}, []
    for name in ('memory', *CONTENDERS):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(name, threads, there), daemon=True)
        process.start()
        alive[name] = here, psutil.Process(process.pid)
        if name != 'memory': read[name] = here.recv()
        speeds[name] = []
    for r in range(rounds):
        for name in ('memory', *list(CONTENDERS)[::1 if r % 2 else -1]):
            speed, ids, others = turn(*alive[name])
            speeds[name].append(speed)
            shares.append(others)
            if ids: seen[name] = ids
    for here, _ in alive.values(): here.send(False)
    memory = max(speeds['memory'])
    print(f'memory: {memory / 1e9:.1f} GB/s; others used at most {max(shares):.0%} of the cores in a turn that counts\n')
    print(f'{"contender":30}{"tokens/s":>10}{"of transformers":>17}{"goal":>7}{"limit":>8}{"of it":>7}')
    base = speeds['transformers, cache']
    for name in CONTENDERS:
        taken, limit = statistics.median(speeds[name]), memory / read[name]
        ratio = statistics.median(a / b for a, b in zip(speeds[name], base))
        print(f'{name:30}{taken:10.1f}{ratio:17.2f}{GOALS.get(name, ""):>7}{limit:8.0f}{taken / limit:7.0%}')
    gain = statistics.median(a / b for a, b in zip(speeds['ours, cache'], speeds['ours, no cache']))
    print(f'\nwith the cache {gain:.1f} times as fast as without (goal 5); of {PROMPT + NEW} tokens, as many from the first are those of transformers:')
    first = seen['transformers, cache']
    print({name: next((i for i, (a, b) in enumerate(zip(ids, first)) if a != b), min(len(ids), len(first))) for name, ids in seen.items()})


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
