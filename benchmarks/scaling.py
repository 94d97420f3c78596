"""How cost grows: with the model, the context, the text and the number of processes, each with the power that fits it best."""
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import environment, quickest
from llmbook.bpe import BPETokenizer, gpt2_tokenizer
from llmbook.budget import forward_flops
from llmbook.core import load_text
from llmbook.data import make_dataloader
from llmbook.gpt import GPT, GPTConfig
from llmbook.train import TrainConfig, Trainer

TOKENS, TURNS = 2048, 3      # of a step; turns, of which the quickest counts
ROOT = Path(__file__).resolve().parent.parent


def fit(sizes, costs) -> float:
    "The power of the size that the cost grows with."
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 2)


def step(config: GPTConfig, tokens: int = TOKENS) -> float:
    "Seconds of a step of training."
    torch.manual_seed(1)
    batch = tokens // config.context_length
    trainer = Trainer(GPT(config), [tuple(torch.randint(config.vocab_size, (2, batch, config.context_length)))], TrainConfig(10**6))
    trainer.update()
    return quickest(trainer.update, TURNS)


def sweep(title: str, size: str, cost: str, sizes: list, costs: list, note: str = '') -> dict:
    "One table of the record."
    return {'title': title, 'size': size, 'cost': cost, 'sizes': sizes, 'costs': [float(f'{c:.4g}') for c in costs], 'power': fit(sizes, costs), 'note': note}


def models() -> dict:
    "Deeper and wider models, the same tokens."
    configs = [GPTConfig(1024, 128, n_layer=n, n_head=n, n_embd=32 * n) for n in (2, 4, 6, 8, 12)]
    return sweep('the model', 'operations of a token', 'seconds per step', [3 * forward_flops(c.vocab_size, c.context_length, c.n_layer, c.n_embd) for c in configs], [step(c) for c in configs],
                 f'{TOKENS:,} tokens a step, context 128, 1,024 ids; 2 to 12 layers, 64 to 384 wide')


def contexts() -> dict:
    "Longer texts, the same tokens."
    lengths = [64, 128, 256, 512, 1024, 2048]
    return sweep('the context', 'tokens', 'seconds per step', lengths, [step(GPTConfig(1024, t, 4, 4, 128)) for t in lengths], f'{TOKENS:,} tokens a step: 32 texts to 1; 4 layers, 128 wide')


def texts() -> list[dict]:
    "Longer texts to learn a tokenizer from, and to encode."
    text = load_text('shakespeare')
    parts = [text[:len(text) // k] for k in (16, 8, 4, 2, 1)]
    sizes = [len(p.encode()) for p in parts]
    return [sweep('the text, learning a tokenizer', 'bytes', 'seconds', sizes, [quickest(lambda: BPETokenizer.train(p, 1000, progress=False), TURNS) for p in parts], '1,000 ids'),
            sweep('the text, encoding', 'bytes', 'seconds', sizes, [encoding(p) for p in parts], "a fresh tokenizer with GPT-2's merges")]


def encoding(text: str) -> float:
    "Seconds to encode a text with a tokenizer that has seen none; to make it does not count."
    fresh = [gpt2_tokenizer() for _ in range(TURNS)]
    return quickest(lambda: fresh.pop().encode(text), TURNS)


def one_of_many() -> None:
    "What each process does: the same batch, shared; the first says how fast."
    from llmbook.distributed import DistributedTrainer, join_world
    with join_world('cpu') as world:
        torch.manual_seed(1)
        config = GPTConfig(1024, 128, 6, 6, 192)
        loader = make_dataloader(torch.randint(1024, (100_000,)), 128, TOKENS // 128, seed=1)
        trainer = DistributedTrainer(world, GPT(config), loader, TrainConfig(10**6))
        trainer.update()
        seconds = quickest(lambda: [trainer.update() for _ in range(4)], TURNS) / 4
        if world.rank == 0: print(json.dumps(seconds), flush=True)


def processes() -> dict:
    "One thread each; the batch is shared."
    counts, costs = [1, 2, 4], []
    for n in counts:
        with environment({'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}):
            done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), '-m', 'benchmarks.scaling'], capture_output=True, text=True, cwd=ROOT)
        if done.returncode: raise RuntimeError(done.stderr)
        costs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    table = sweep('processes', 'processes', 'seconds per step', counts, costs, f'{TOKENS:,} tokens a step, shared; one thread each, on {os.cpu_count()} cores; 6 layers, 192 wide')
    own = [n for n in counts if n <= os.cpu_count()]      # where each has a core
    return table | {'power': fit(own, costs[:len(own)]) if len(own) > 1 else None}


def sweeps() -> list[dict]:
    "All tables."
    return [models(), contexts(), *texts(), processes()]


if __name__ == '__main__': one_of_many()
