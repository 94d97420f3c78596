"""The byte-pair tokenizer beside its peers, in one run: `python benchmarks/bpe.py [rounds]`.

Contenders take turns, in an order that alternates, so that a busy moment of the machine hits all of them. A row's
"speed" is the median over rounds of (their time / our time): above 1 we are faster. Cold means a fresh tokenizer for
each measurement, warm one that has seen the text.
"""
import gc, os, platform, statistics, sys, time
from importlib.metadata import version

from llmbook.bpe import BYTE_NAMES, BPETokenizer, gpt2_encoding, gpt2_tokenizer
from llmbook.core import load_text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers


def byte_level(model: models.BPE) -> Tokenizer:
    "A tokenizer of the `tokenizers` library that splits as GPT-2 does."
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def train_peer(texts: list[str], vocab_size: int) -> Tokenizer:
    "Train the Rust trainer on `texts`, from all 256 bytes and without special tokens."
    tokenizer = byte_level(models.BPE())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2))
    return tokenizer


def gpt2_peer() -> Tokenizer:
    "GPT-2's merges in the `tokenizers` library, with an empty cache."
    ours = gpt2_tokenizer()
    sign = lambda i: ''.join(BYTE_NAMES[b] for b in ours.vocab[i])
    return byte_level(models.BPE(vocab={sign(i): i for i in range(50_256)}, merges=[(sign(a), sign(b)) for a, b in ours.merges]))


def seconds(make, run) -> float:
    "Seconds that `run` takes on what `make` makes; the making is not counted."
    thing = make()
    gc.collect()
    start = time.perf_counter()
    run(thing)
    return time.perf_counter() - start


def race(title: str, contenders: dict, rounds: int, goals: dict = {}) -> None:
    "Let all contenders run in turn and print a row for each."
    times = {name: [] for name in contenders}
    for contender in contenders.values(): seconds(*contender)      # once unmeasured
    for r in range(rounds):
        for name in list(contenders)[::1 if r % 2 else -1]: times[name].append(seconds(*contenders[name]))
    for name, taken in times.items():
        speed = statistics.median(t / ours for t, ours in zip(taken, times['ours']))
        row = f'{title:27}{name:24}{1e3 * min(taken):10.1f}{1e3 * statistics.median(taken):10.1f}'
        print(row if name == 'ours' else f'{row}{speed:8.2f}{goals.get(name, ""):>8}', flush=True)


def main(rounds: int = 9) -> None:
    plays, story = load_text('shakespeare'), load_text('the-verdict')
    lines, nothing = plays.splitlines(keepends=True), lambda: None
    names = ', '.join(f'{p} {version(p)}' for p in ('tokenizers', 'tiktoken', 'regex'))
    print(f'{names}; Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, {rounds} rounds')
    print(f'{"task":27}{"contender":24}{"best ms":>10}{"median ms":>10}{"speed":>8}{"goal":>8}')
    for size in (1000, 5000):
        ours = BPETokenizer.train(plays, size, special_tokens=())
        assert ours.vocab_size == train_peer([plays], size).get_vocab_size() == size     # the same work
        race(f'train {size:,} ids', {
            'ours': (nothing, lambda _: BPETokenizer.train(plays, size, special_tokens=())),
            'tokenizers, one string': (nothing, lambda _: train_peer([plays], size)),
            'tokenizers, lines': (nothing, lambda _: train_peer(lines, size)),
        }, rounds, {'tokenizers, one string': '1.0', 'tokenizers, lines': '0.6'})
    ours, tiktoken, peer = gpt2_tokenizer(), gpt2_encoding(), gpt2_peer()
    for name, text in (('Shakespeare', plays), ('The Verdict', story)):
        assert ours.encode(text) == tiktoken.encode_ordinary(text) == peer.encode(text).ids
        race(f'encode {name}, cold', {
            'ours': (gpt2_tokenizer, lambda t: t.encode(text)),
            'tiktoken': (nothing, lambda _: tiktoken.encode_ordinary(text)),
            'tokenizers': (gpt2_peer, lambda t: t.encode(text).ids),
        }, rounds, {'tiktoken': '0.3'})
        race(f'encode {name}, warm', {
            'ours': (nothing, lambda _: ours.encode(text)),
            'tiktoken': (nothing, lambda _: tiktoken.encode_ordinary(text)),
            'tokenizers': (nothing, lambda _: peer.encode(text).ids),
        }, 3 * rounds, {'tiktoken': '0.3'})


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
