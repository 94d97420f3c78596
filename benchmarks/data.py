"""Windows beside a list of tensors, and `tokenize_files` beside tiktoken alone, in one run: `python benchmarks/data.py [rounds]`.

Windows: a million ids, context 256; each row is measured in a process of its own, memory is what that process grows by.
Reading is the time for one batch of eight windows in random order, made of inputs and targets. Tokenising: sixteen copies of
Shakespeare (18 MB, so all words but those of the first copy are known), from files to an id file. tiktoken alone reads the same
files and encodes them in memory, and keeps nothing. Contenders take turns; the best round and the median are shown.
"""
import gc, os, platform, statistics, sys, tempfile
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import torch
from bpe import seconds
from llmbook.bpe import gpt2_encoding, gpt2_tokenizer
from llmbook.core import load_text
from llmbook.data import TokenDataset, tokenize_files

CONTEXT, BATCH, COPIES = 256, 8, 16
IDS = np.random.default_rng(123).integers(0, 50_257, 1_000_000)


class TensorList:
    "The usual way: every window cut beforehand, as two tensors of its own."
    def __init__(self, ids, context_length, stride):
        starts = range(0, len(ids) - context_length, stride)
        self.inputs = [torch.tensor(ids[i:i + context_length]) for i in starts]
        self.targets = [torch.tensor(ids[i + 1:i + context_length + 1]) for i in starts]
    def __len__(self): return len(self.inputs)
    def __getitem__(self, batch): return torch.stack([self.inputs[i] for i in batch]), torch.stack([self.targets[i] for i in batch])


def windows(kind: type, stride: int) -> tuple:
    "Windows, seconds and bytes to build `kind`, and seconds for a batch of it."
    torch.set_num_threads(1)
    kind(IDS[:2000], CONTEXT, stride)[[0, 1]]      # once unmeasured
    gc.collect()
    before, start = psutil.Process().memory_info().rss, perf_counter()
    made = kind(IDS, CONTEXT, stride)
    taken, grown = perf_counter() - start, psutil.Process().memory_info().rss - before
    batches = np.random.default_rng(0).integers(0, len(made), (5000, BATCH)).tolist()
    start = perf_counter()
    for batch in batches: made[batch]
    return len(made), taken, grown, (perf_counter() - start) / len(batches)


def race_of_windows() -> None:
    print(f'\n{"stride":>6}  {"contender":18}{"windows":>10}{"build s":>12}{"memory MB":>12}{"windows/s":>14}')
    for stride in (256, 64, 16, 4):
        for kind in (TokenDataset, TensorList):
            with get_context('spawn').Pool(1) as alone: n, taken, grown, read = alone.apply(windows, (kind, stride))
            name = 'ours, a view' if kind is TokenDataset else 'list of tensors'
            print(f'{stride:6}  {name:18}{n:10,}{taken:12.4f}{grown / 1e6:12.1f}{BATCH / read:14,.0f}', flush=True)


def race_of_tokenizers(rounds: int) -> None:
    text = load_text('shakespeare')
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder)/f'{k:02}.txt' for k in range(COPIES)]
        for file in files: file.write_text(text, encoding='utf-8')
        megabytes = COPIES * len(text.encode()) / 1e6
        tiktoken, out = gpt2_encoding(), Path(folder)/'corpus.ids'
        def fresh(): out.unlink(missing_ok=True)
        def ours(make, workers): return fresh, lambda _: tokenize_files(files, out, make(), workers)
        def alone(threads): return fresh, lambda _: tiktoken.encode_ordinary_batch([f.read_text(encoding='utf-8') for f in files], num_threads=threads)
        contenders = {
            'tokenize_files, our BPE, 1 process': ours(gpt2_tokenizer, 0), 'tokenize_files, our BPE, 2 processes': ours(gpt2_tokenizer, 2),
            'tokenize_files, tiktoken, 1 process': ours(lambda: tiktoken, 0), 'tokenize_files, tiktoken, 2 processes': ours(lambda: tiktoken, 2),
            'tiktoken alone, 1 thread': alone(1), 'tiktoken alone, 2 threads': alone(2),
        }
        want = [i for f in files for i in (*tiktoken.encode_ordinary(text), tiktoken.eot_token)]
        times = {name: [] for name in contenders}
        for r in range(rounds):
            for name in list(contenders)[::1 if r % 2 else -1]:
                times[name].append(seconds(*contenders[name]))
                if out.exists() and r == 0: assert tokenize_files(files, out, tiktoken).ids.tolist() == want      # the same work
        print(f'\n{"contender":40}{"best MB/s":>12}{"median MB/s":>14}{"of tiktoken alone, 1 thread":>30}')
        base = times['tiktoken alone, 1 thread']
        for name, taken in times.items():
            share = statistics.median(b / t for t, b in zip(taken, base))
            print(f'{name:40}{megabytes / min(taken):12.1f}{megabytes / statistics.median(taken):14.1f}{share:30.2f}', flush=True)


def main(rounds: int = 5) -> None:
    names = ', '.join(f'{p} {version(p)}' for p in ('torch', 'numpy', 'tiktoken'))
    print(f'{names}; Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, {rounds} rounds')
    race_of_windows()
    race_of_tokenizers(rounds)


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
