"""From text to batches: training a tokenizer, encoding with it, and cutting windows, each beside its peer."""
import gc, tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from benchmarks.harness import AGAIN, Contender, Goal, Job, Row
from llmbook.bpe import BYTE_NAMES, BPETokenizer, gpt2_encoding, gpt2_tokenizer
from llmbook.core import load_text
from llmbook.data import TokenDataset, tokenize_files

CONTEXT, BATCH, BATCHES, COPIES = 256, 8, 10_000, 8


def byte_level(model: models.BPE) -> Tokenizer:
    "A tokenizer of the library `tokenizers` that splits as GPT-2 does."
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def text_job(text: str, turn, fresh=lambda: None) -> Job:
    "Warm turns that read a text once; its bytes are counted."
    n = len(text.encode())
    return Job(lambda thing: {'units': n / 1e6, 'result': turn(thing)}, fresh, warm=True)


def train_ours(vocab_size: int, text: str = 'shakespeare') -> Job:
    "BPETokenizer.train, given the text as one string."
    text = load_text(text)
    return text_job(text, lambda _: BPETokenizer.train(text, vocab_size, special_tokens=(), progress=False).vocab_size)


def train_rust(vocab_size: int, lines: bool, text: str = 'shakespeare') -> Job:
    "The trainer of `tokenizers`, in Rust, from all 256 bytes and without special tokens."
    text = load_text(text)
    texts = text.splitlines(keepends=True) if lines else [text]
    def train(_):
        tokenizer = byte_level(models.BPE())
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2))
        return tokenizer.get_vocab_size()
    return text_job(text, train)


def encode_ours(text: str, warm: bool) -> Job:
    "gpt2_tokenizer(): fresh for each turn, or one that has seen the text."
    text, seen = load_text(text), gpt2_tokenizer()
    seen.encode(text)
    return text_job(text, lambda t: t.encode(text), (lambda: seen) if warm else gpt2_tokenizer)


def encode_tiktoken(text: str, warm: bool) -> Job:
    "gpt2_encoding(), which is tiktoken's Encoding with GPT-2's merges."
    text, tiktoken = load_text(text), gpt2_encoding()
    return text_job(text, lambda _: tiktoken.encode_ordinary(text))


def encode_rust(text: str, warm: bool) -> Job:
    "`tokenizers`, with GPT-2's merges."
    text, ours = load_text(text), gpt2_tokenizer()
    sign = lambda i: ''.join(BYTE_NAMES[b] for b in ours.vocab[i])
    make = lambda: byte_level(models.BPE(vocab={sign(i): i for i in range(50_256)}, merges=[(sign(a), sign(b)) for a, b in ours.merges]))
    seen = make()
    seen.encode(text)
    return text_job(text, lambda t: t.encode(text).ids, (lambda: seen) if warm else make)


class TensorList:
    "The usual way: every window cut beforehand, as two tensors of its own."
    def __init__(self, ids, context_length, stride):
        starts = range(0, len(ids) - context_length, stride)
        self.inputs = [torch.tensor(ids[i:i + context_length]) for i in starts]
        self.targets = [torch.tensor(ids[i + 1:i + context_length + 1]) for i in starts]
    def __len__(self): return len(self.inputs)
    def __getitem__(self, batch): return torch.stack([self.inputs[i] for i in batch]), torch.stack([self.targets[i] for i in batch])


def windows(usual: bool, stride: int, n: int = 1_000_000) -> Job:
    "Cut a row of ids into windows, then read batches of them in random order."
    torch.set_num_threads(1)
    ids, kind = np.random.default_rng(123).integers(0, 50_257, n), TensorList if usual else TokenDataset
    kind(ids[:2000], CONTEXT, stride)[[0, 1]]      # once unmeasured
    def turn(_):
        gc.collect()
        before, start = psutil.Process().memory_info().rss, perf_counter()
        made = kind(ids, CONTEXT, stride)
        built, grown = perf_counter() - start, psutil.Process().memory_info().rss - before
        order = np.random.default_rng(0).integers(0, len(made), (BATCHES, BATCH)).tolist()
        start = perf_counter()
        for batch in order: found = made[batch]
        read = perf_counter() - start
        return {'units': len(made), 'result': (len(made), [t.tolist() for t in found]), 'build': built, 'builds per second': 1 / built,
                'kept': (ids.nbytes + grown) / ids.nbytes, 'windows per second': BATCHES * BATCH / read}
    return Job(turn)


def files(folder: str) -> list[Path]:
    "Copies of Shakespeare: all words but those of the first are known."
    found = [Path(folder)/f'{k:02}.txt' for k in range(COPIES)]
    for file in found: file.write_text(load_text('shakespeare'), encoding='utf-8')
    return found


def tokenize_ours(tiktoken: bool, workers: int) -> Job:
    "tokenize_files: from files to an id file."
    folder = tempfile.TemporaryDirectory()
    texts, out, made = files(folder.name), Path(folder.name)/'corpus.ids', gpt2_encoding() if tiktoken else gpt2_tokenizer()
    def turn(_, keep=folder): return {'units': sum(t.stat().st_size for t in texts) / 1e6, 'result': tokenize_files(texts, out, made, workers).ids.tolist()[:100_000]}
    return Job(turn, lambda: out.unlink(missing_ok=True))


def tokenize_tiktoken(threads: int) -> Job:
    "tiktoken alone: the same files, encoded in memory, and kept nowhere."
    folder = tempfile.TemporaryDirectory()
    texts, made = files(folder.name), gpt2_encoding()
    def turn(_, keep=folder):
        rows = made.encode_ordinary_batch([t.read_text(encoding='utf-8') for t in texts], num_threads=threads)
        return {'units': sum(t.stat().st_size for t in texts) / 1e6, 'result': [i for row in rows for i in (*row, made.eot_token)][:100_000]}
    return Job(turn)


def equal(found: dict) -> None:
    "All made the same."
    first = next(iter(found))
    for name, result in found.items():
        if result != found[first]: raise RuntimeError(f'{name} does not do the same work as {first}: {str(result)[:200]} and {str(found[first])[:200]}')


def rows(full: bool) -> list[Row]:
    "The rows of this file, with what they must reach."
    n, out = 5 if full else 3, []
    one, lines = 'tokenizers, one string', 'tokenizers, lines'
    for size in (1000, 5000): out.append(Row(
        f'learn {size:,} ids', f'learning a tokenizer of {size:,} ids', 'Shakespeare, 1.1 MB, from 256 bytes, no special tokens', 'MB',
        (Contender('ours', train_ours, {'vocab_size': size}), Contender(one, train_rust, {'vocab_size': size, 'lines': False}), Contender(lines, train_rust, {'vocab_size': size, 'lines': True}),
         Contender(AGAIN, train_ours, {'vocab_size': size})),
        (Goal('speed', 1.0, (one,)), Goal('speed', 0.6, (lines,))), n, agree=equal))
    for text, title in (('shakespeare', 'Shakespeare'), ('the-verdict', 'The Verdict')):
        for warm in (False, True): out.append(Row(
            f'encode {text}, {"seen before" if warm else "fresh"}', f'encoding {title}, {"one that has seen it" if warm else "a fresh tokenizer"}', "GPT-2's merges, the whole text", 'MB',
            tuple(Contender(name, make, {'text': text, 'warm': warm}, note=make.__doc__) for name, make in (('ours', encode_ours), ('tiktoken', encode_tiktoken), ('tokenizers', encode_rust), (AGAIN, encode_ours))),
            (Goal('speed', 0.3, ('tiktoken',)),), n, agree=equal))
    for stride, least in ((256, 2), (4, 100)): out.append(Row(
        f'windows, stride {stride}', f'windows with stride {stride}', f'a million ids, context {CONTEXT}: build, then batches of {BATCH} in random order, one thread', '',
        (Contender('ours', windows, {'usual': False, 'stride': stride}), Contender('list of tensors', windows, {'usual': True, 'stride': stride})),
        (Goal('builds per second', least, ('list of tensors',)), Goal('kept', 1.1, at_most=True), Goal('windows per second', 1.0, ('list of tensors',))),
        n, alone=True, agree=equal))
    if full: out.append(Row(
        'tokenize files', 'from files to an id file', f'{COPIES} copies of Shakespeare', 'MB',
        (*(Contender(f'ours{", tiktoken inside" * tik}, {w or 1} process{"es" * (w > 1)}', tokenize_ours, {'tiktoken': tik, 'workers': w}) for tik in (False, True) for w in (0, 2)),
         *(Contender(f'tiktoken alone, {t} thread{"s" * (t > 1)}', tokenize_tiktoken, {'threads': t}) for t in (1, 2))), (), 3, agree=equal))
    return out
