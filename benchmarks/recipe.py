"""Shakespeare in about a minute: what each step of our recipe buys, beside nanoGPT's setting for a CPU, in one run.

    python -m benchmarks.recipe [--seeds 3] [--write]

All contenders are GPTs of 4 layers, 4 heads and width 128 with a context of 64, trained by this package; the first has the
setting that nanoGPT's README gives for a laptop (characters, batch 12, 2,000 steps, rate 1e-3 falling to 1e-4, no biases,
windows drawn anywhere). The loss is over the whole last tenth of the text, in nats per byte (the text is ASCII, so per
character). Seconds are those of making the tokens and of all steps with two threads, at the median pace of turns that the
contenders take one after the other. `--write` keeps the table as `llmbook/assets/shakespeare-model/recipe.json`, from which
page 16 draws it.
"""
import argparse, json, os, platform, statistics, time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from llmbook.bpe import BPETokenizer
from llmbook.core import load_text, set_seed
from llmbook.data import make_dataloader
from llmbook.gpt import GPT, GPTConfig
from llmbook.loss import evaluate_loss
from llmbook.pretrain import PretrainConfig, whole_text
from llmbook.schedule import WarmupCosine
from llmbook.train import TrainConfig, Trainer

RECORD = Path(__file__).resolve().parent.parent/'llmbook'/'assets'/'shakespeare-model'/'recipe.json'
OURS, THREADS = PretrainConfig(), min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Recipe:
    name: str
    steps: int = 2000
    rate: float = 1e-3
    end: float = 1e-4
    vocab: int = 0              # 0: characters
    overlap: bool = True        # windows may begin anywhere
    beta2: float = 0.99
    bias: bool = False
    muon: bool = False


LIKE_OURS = dict(steps=OURS.max_steps, rate=OURS.learning_rate, end=OURS.min_learning_rate, vocab=int(OURS.tokenizer), overlap=False, beta2=OURS.betas[1], bias=OURS.bias)
ROWS = [
    Recipe("nanoGPT's setting"),
    Recipe('+ rate 4e-3 (to 4e-4)', rate=4e-3, end=4e-4),
    Recipe('+ falling to zero', rate=4e-3, end=0),
    Recipe('+ windows side by side', rate=4e-3, end=0, overlap=False),
    Recipe('+ tokens of its own: the defaults', **LIKE_OURS),
    Recipe('+ Muon for the matrices', **LIKE_OURS, muon=True),
]


class WithMuon(Trainer):
    "Matrices inside the blocks by Muon, the rest by AdamW."
    def __init__(self, *args, muon_rate=0.02):
        super().__init__(*args)
        inside = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        ids = set(map(id, inside))
        for group in self.optimizer.param_groups: group['params'] = [p for p in group['params'] if id(p) not in ids]
        self.second, self.factor = torch.optim.Muon(inside, lr=muon_rate, weight_decay=0.0, momentum=0.95), muon_rate/self.config.learning_rate
        adamw = self.optimizer.step
        def step():
            for group in self.second.param_groups: group['lr'] = self.optimizer.param_groups[0]['lr']*self.factor
            self.second.step(); adamw()
            self.second.zero_grad()
        self.optimizer.step = step


class Contender:
    "A recipe, ready to be trained on a text."
    def __init__(self, recipe: Recipe, seed: int, train: str, held_out: str):
        start, T, r = time.perf_counter(), OURS.context_length, recipe
        if r.vocab:
            tokenizer = BPETokenizer.train(train, r.vocab, progress=False)
            encode, V = tokenizer.encode_ordinary, tokenizer.vocab_size
        else:
            letters = {c: i for i, c in enumerate(sorted(set(train + held_out)))}
            encode, V = lambda text: [letters[c] for c in text], len(letters)
        ids, self.rest, self.held_out, self.recipe = torch.tensor(encode(train)), torch.tensor(encode(held_out)), held_out, r
        self.before = time.perf_counter() - start                       # seconds for the tokens
        set_seed(seed)
        model = GPT(GPTConfig(V, T, OURS.n_layer, OURS.n_head, OURS.n_embd, bias=r.bias))
        loader = make_dataloader(ids, T, OURS.batch_size, stride=1 if r.overlap else T, seed=seed)
        warmup = r.steps//20                                            # 100 of 2,000, as nanoGPT has it
        self.trainer = (WithMuon if r.muon else Trainer)(model, loader, TrainConfig(r.steps, r.rate, 0.1, (0.9, r.beta2), 1.0), None, WarmupCosine(r.steps, r.rate, warmup, r.end))

    def loss(self) -> float:
        "Train to the end; nats per byte of the held-out text."
        while self.trainer.step < self.recipe.steps: self.trainer.update()
        return evaluate_loss(self.trainer.model, whole_text(self.rest, OURS.context_length))*(len(self.rest) - 1)/(len(self.held_out) - 1)

    def pace(self, steps: int = 50) -> float:
        "Seconds of a step, now."
        start = time.perf_counter()
        for _ in range(steps): self.trainer.update()
        return (time.perf_counter() - start)/steps


def texts(dev: bool = False) -> tuple[str, str]:
    "Shakespeare, to learn from and held back: the last tenth, or the end of the rest to tune on."
    text = load_text('shakespeare') + '\n'
    cut = int(0.9*len(text))
    train, held_out = text[:cut], text[cut:]
    return (train[:int(0.9*cut)], train[int(0.9*cut):]) if dev else (train, held_out)


def seconds(rounds: int, dev: bool = False, rows: list[Recipe] = ROWS) -> dict[str, float]:
    "What each recipe takes, its tokens included: the contenders take turns, and the median pace counts."
    contenders = [Contender(r, 1, *texts(dev)) for r in rows]
    for c in contenders: c.pace(5)
    paces = {c.recipe.name: [] for c in contenders}
    for k in range(rounds):
        for c in contenders[::(-1)**k]: paces[c.recipe.name].append(c.pace())
    return {c.recipe.name: c.before + c.recipe.steps*statistics.median(paces[c.recipe.name]) for c in contenders}


def one_loss(seed: int, recipe: Recipe, dev: bool) -> float:
    "For a process of its own, with one thread."
    torch.set_num_threads(1)
    return Contender(recipe, seed, *texts(dev)).loss()


def losses(seeds: int, dev: bool = False, rows: list[Recipe] = ROWS) -> dict[str, list[float]]:
    "Nats per byte of each recipe, for each seed; as many trainings side by side as there are threads."
    found = {r.name: [] for r in rows}
    with ProcessPoolExecutor(THREADS, get_context('spawn')) as pool:
        waiting = [(seed, r, pool.submit(one_loss, seed, r, dev)) for seed in range(1, seeds + 1) for r in rows]
        for seed, r, future in waiting:
            found[r.name].append(future.result())
            print(f'seed {seed}  {r.name:34} {r.steps:5} steps  {found[r.name][-1]:.4f}', flush=True)
    return found


def table(found: dict[str, list[float]], took: dict[str, float]) -> list[dict]:
    "The rows, printed and returned."
    rows = [{'name': r.name, 'steps': r.steps, 'nats_per_byte': [round(x, 4) for x in found[r.name]], 'seconds': round(took[r.name], 1)} for r in ROWS]
    first = statistics.mean(found[ROWS[0].name])
    for row in rows: print(f"{row['name']:34} {row['seconds']:6.1f} s  {statistics.mean(row['nats_per_byte']):.3f}  {statistics.mean(row['nats_per_byte']) - first:+.3f}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=10, help='turns of 50 steps, for the seconds')
    parser.add_argument('--write', action='store_true', help='keep the table for page 16')
    parser.add_argument('--dev', action='store_true', help='tune: hold back the end of the training part instead')
    asked = parser.parse_args()
    found = losses(asked.seeds, asked.dev)
    torch.set_num_threads(THREADS)
    rows = table(found, seconds(asked.rounds, asked.dev))
    if asked.write: write(rows, asked.seeds)


def write(rows: list[dict], seeds: int):
    "Keep the table."
    record = {'machine': f'{platform.machine()}, torch {torch.__version__}', 'threads': THREADS, 'seeds': [*range(1, seeds + 1)], 'rows': rows}
    RECORD.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8', newline='\n')


if __name__ == '__main__': main()
