"Windows, batches and id files: every id where it should be, whatever the sizes, the interruptions and the faults."
import copy, errno, json, multiprocessing, os, pickle, random, signal, subprocess, sys, textwrap, time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from llmbook import data
from llmbook.bpe import END_OF_TEXT, BPETokenizer, gpt2_encoding, gpt2_tokenizer
from llmbook.core import load_text
from llmbook.data import (HEADER, TokenDataset, TokenFile, TokenLoader, find_texts, fingerprint, make_dataloader, read_pieces, safe_cut, split_ids,
                          tokenize_files)
from llmbook.words import Vocabulary, WordTokenizer, split_words

GPT2, STORY = gpt2_tokenizer(), load_text('the-verdict')
EOT = 50_256
POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs signals and limits of POSIX')
LINUX = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs limits that Linux keeps')
sizes = st.tuples(st.integers(2, 60), st.integers(1, 12), st.integers(1, 15)).filter(lambda s: s[0] > s[1])     # ids, context, stride


def lists(pair): return [part.tolist() for part in pair]


def by_definition(ids, context_length, stride):
    "All windows, found by looking at every place of the row."
    return [[ids[i:i + context_length], ids[i + 1:i + context_length + 1]]
            for i in range(len(ids)) if i % stride == 0 and i + context_length + 1 <= len(ids)]


# ---- windows

@given(sizes)
def test_windows_are_those_of_the_definition(size):
    n, context_length, stride = size
    ids = [100 + i for i in range(n)]
    dataset = TokenDataset(ids, context_length, stride)
    wanted = by_definition(ids, context_length, stride)
    assert [lists(pair) for pair in dataset] == wanted == [lists(dataset[i]) for i in range(len(dataset))]
    assert len(dataset) == len(wanted) == (n - context_length - 1) // stride + 1
    assert dataset.tail == n - 1 - (wanted[-1][1][-1] - 100)


@given(sizes)
def test_every_id_is_a_target_once_if_the_stride_is_the_context(size):
    n, context_length, _ = size
    dataset = TokenDataset(range(n), context_length)
    targets = torch.cat([targets for _, targets in dataset]).tolist()
    assert targets == list(range(1, n - dataset.tail)) and 0 <= dataset.tail < context_length


@given(sizes, st.data())
def test_any_access_gives_the_same_windows(size, draw):
    dataset = TokenDataset(range(size[0]), *size[1:])
    all_inputs, all_targets = dataset[:]
    assert all_inputs.shape == (len(dataset), size[1]) and all_inputs.dtype == all_targets.dtype == torch.int64
    some = draw.draw(st.lists(st.integers(-len(dataset), len(dataset) - 1), min_size=1, max_size=5))
    for key in (some, torch.tensor(some), np.array(some)):
        inputs, targets = dataset[key]
        assert inputs.tolist() == [all_inputs[i].tolist() for i in some] and targets.tolist() == [all_targets[i].tolist() for i in some]
    low, step = draw.draw(st.integers(-9, 9)), draw.draw(st.integers(1, 3))
    assert lists(dataset[low::step]) == [all_inputs[low::step].tolist(), all_targets[low::step].tolist()]
    for beyond in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError): dataset[beyond]


def memory_map(tmp_path, ids):
    (tmp_path/'ids.bin').write_bytes(np.array(ids, '<u2').tobytes())
    return np.memmap(tmp_path/'ids.bin', '<u2', 'r')


def test_rows_of_every_kind(tmp_path):
    ids = [40_000, 7, 8, 65_535, 0, 3, 12, 99]
    frozen = np.array(ids)
    frozen.flags.writeable = False
    rows = [ids, tuple(ids), torch.tensor(ids), torch.tensor(ids, dtype=torch.int32), np.array(ids), np.array(ids, np.uint16), np.array(ids, np.int32),
            np.array(ids, np.uint32), np.array(ids, np.uint64), np.array(ids, '>u2'), np.array(ids[::-1])[::-1], np.repeat(ids, 2)[::2], frozen,
            torch.from_numpy(np.array(ids, np.uint16)), memory_map(tmp_path, ids)]
    for row in rows: assert [lists(pair) for pair in TokenDataset(row, 3, 2, vocab_size=65_536)] == by_definition(ids, 3, 2)
    assert [lists(p) for p in TokenDataset(np.array([1, 2, 250], np.uint8), 2)] == [[[1, 2], [2, 250]]]


@pytest.mark.parametrize('stride', [1, 7, 256])
def test_no_id_is_copied(stride, tmp_path):
    row = torch.arange(100_000)
    dataset = TokenDataset(row, 256, stride)
    for part in (dataset.windows, *dataset[5], *dataset[2:4]): assert part.untyped_storage().data_ptr() == row.untyped_storage().data_ptr()
    array = np.arange(100_000, dtype=np.uint16)
    assert TokenDataset(array, 256, stride).windows.data_ptr() == array.ctypes.data
    mapped = memory_map(tmp_path, array)
    assert TokenDataset(mapped, 256, stride).windows.data_ptr() == mapped.ctypes.data


def test_writing_to_a_batch_leaves_the_ids_alone(tmp_path):
    row = torch.arange(100)
    frozen = np.arange(100)
    frozen.flags.writeable = False
    for ids in (row, memory_map(tmp_path, range(100)), frozen):
        for inputs, targets in make_dataloader(ids, 4, shuffle=False): inputs.zero_(), targets.zero_()
        assert lists(TokenDataset(ids, 4)[1]) == [[4, 5, 6, 7], [5, 6, 7, 8]]
    TokenDataset(frozen, 4)[0][0].zero_()
    assert frozen[1] == 1


@pytest.mark.parametrize('call, error, message', [
    (lambda: TokenDataset(range(5), 5), ValueError, 'ids has 5 ids, and a window of context_length=5 needs 6.*context_length=4 at most'),
    (lambda: TokenDataset([], 5), ValueError, 'ids has 0 ids.*give a longer text$'),
    (lambda: TokenDataset([3], 1), ValueError, 'give a longer text$'),
    (lambda: TokenDataset(range(9), 4, stride=0), ValueError, 'stride=0 is too small; the smallest that is allowed is 1'),
    (lambda: TokenDataset(range(9), 4, stride=-2), ValueError, 'stride=-2'),
    (lambda: TokenDataset(range(9), 0), ValueError, 'context_length=0'),
    (lambda: TokenDataset(range(9), 4.0), TypeError, 'context_length=4.0 is not a whole number'),
    (lambda: TokenDataset(range(9), True), TypeError, 'context_length=True'),
    (lambda: TokenDataset(range(9), 4, vocab_size=8), ValueError, r'ids\[8\] is 8; with vocab_size=8, ids run from 0 to 7'),
    (lambda: TokenDataset([1, 2, -1, 3], 2, vocab_size=8), ValueError, r'ids\[2\] is -1'),
    (lambda: TokenDataset(np.array([1, 2, 60_000, 3], np.uint16), 2, vocab_size=8), ValueError, r'ids\[2\] is 60000'),
    (lambda: TokenDataset([0] * 2**20 + [9, 9], 2, vocab_size=8), ValueError, r'ids\[1048576\] is 9'),
    (lambda: TokenDataset('a text', 2), TypeError, r'ids is a str; encode a text with tokenizer.encode'),
    (lambda: TokenDataset(Path('x.ids'), 2), TypeError, r'TokenFile\(path\)'),
    (lambda: TokenDataset([0.5, 1, 2], 2), TypeError, 'float64; ids are whole numbers'),
    (lambda: TokenDataset(torch.rand(5), 2), TypeError, 'torch.float32'),
    (lambda: TokenDataset([True, False, True], 2), TypeError, 'bool'),
    (lambda: TokenDataset(torch.tensor([True, False, True]), 2), TypeError, 'bool'),
    (lambda: TokenDataset(['a', 'b', 'c'], 2), TypeError, 'whole numbers'),
    (lambda: TokenDataset([[1, 2, 3], [4, 5, 6]], 2), ValueError, r'shape \(2, 3\); give one row'),
])
def test_what_is_no_row_of_ids_is_refused(call, error, message):
    with pytest.raises(error, match=message): call()


# ---- batches

@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_window_once_in_each_epoch(n, batch_size, shuffle, drop_last, seed):
    if drop_last and n < batch_size: return
    loader = make_dataloader(range(n + 1), 1, batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed)
    for _ in range(2):
        batches = [inputs.flatten().tolist() for inputs, _ in loader]
        seen = sum(batches, [])
        assert len(batches) == len(loader) == (n // batch_size if drop_last else -(-n // batch_size))
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(n)) and (drop_last or len(seen) == n)
        assert all(len(batch) == batch_size for batch in batches[:-1] + batches[-1:] * drop_last)
        assert shuffle or seen == sorted(seen)


def orders(**settings): return [torch.cat([inputs for inputs, _ in loader]).flatten().tolist() for loader in [make_dataloader(range(201), 1, **settings)] for _ in range(3)]


def test_the_seed_decides_the_order_and_nothing_else():
    assert orders(seed=7) == orders(seed=7)
    all_orders = [tuple(order) for seed in (7, 8, 9) for order in orders(seed=seed)]
    assert len(set(all_orders)) == 9, 'another seed or another epoch gives another order'
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = orders(seed=7)
    assert torch.equal(torch.get_rng_state(), before), 'nothing is drawn from the generator of everybody'
    torch.rand(5)
    assert orders(seed=7) == first


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 25), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 60))
@example(n=12, batch_size=3, shuffle=True, drop_last=True, stop=4)
def test_a_restored_loader_goes_on(n, batch_size, shuffle, drop_last, stop):
    if drop_last and n < batch_size: return
    def loader(): return make_dataloader(range(n + 1), 1, batch_size, shuffle=shuffle, drop_last=drop_last)
    def endless(loader):
        while True:
            for inputs, _ in loader: yield inputs.tolist()
    unharmed, stopped, restored = endless(loader()), loader(), loader()
    stop = min(stop, 3 * len(stopped))
    wanted = list(islice(unharmed, stop + 2 * len(stopped) + 1))
    assert list(islice(endless(stopped), stop)) == wanted[:stop]
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state['epoch'] == stop // len(stopped) and state['batch'] == stop % len(stopped)
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    assert list(islice(endless(restored), 1)) == wanted[stop:stop + 1]
    again = loader()
    again.load_state_dict(restored.state_dict())      # stopped and restored a second time
    assert list(islice(endless(again), 2 * len(stopped))) == wanted[stop + 1:]


def test_a_loop_that_is_begun_anew():
    loader = make_dataloader(range(33), 1, batch_size=8, shuffle=False)
    for _ in range(3): assert next(iter(loader))[0].flatten().tolist() == list(range(8))
    assert loader.state_dict()['epoch'] == 2, 'a pass that was left does not go on'
    state = loader.state_dict()
    other = make_dataloader(range(33), 1, batch_size=8, shuffle=False)
    other.load_state_dict(state)
    assert [len(list(other)), len(list(other))] == [3, 4]


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing_but_who_does_it(workers):
    alone = make_dataloader(range(101), 5, batch_size=3, workers=0)
    loader = make_dataloader(range(101), 5, batch_size=3, workers=workers)
    others = set(multiprocessing.active_children())
    wanted, got = list(alone) + list(alone), []
    for _ in range(2):
        for k, batch in enumerate(loader, 1):
            got.append(batch)
            assert len(set(multiprocessing.active_children()) - others) == workers
            assert loader.state_dict()['batch'] == k % len(loader), 'batches fetched ahead are not counted'
    assert [lists(batch) for batch in got] == [lists(batch) for batch in wanted]
    resumed = make_dataloader(range(101), 5, batch_size=3, workers=workers)
    for _ in islice(resumed, 2): pass
    state = resumed.state_dict()
    again = make_dataloader(range(101), 5, batch_size=3)
    again.load_state_dict(state)
    assert [lists(batch) for batch in again] == [lists(batch) for batch in wanted[2:len(alone)]]


@pytest.mark.parametrize('method', multiprocessing.get_all_start_methods())
def test_workers_on_every_platform(method, tmp_path):
    (tmp_path/'a.txt').write_text(STORY, encoding='utf-8')
    tokenize_files(tmp_path/'a.txt', tmp_path/'a.ids')
    (tmp_path/'run.py').write_text(textwrap.dedent(f'''
        import multiprocessing
        from llmbook.data import TokenFile, make_dataloader, split_ids, tokenize_files
        if __name__ == '__main__':
            multiprocessing.set_start_method({method!r})
            train, _ = split_ids(TokenFile('a.ids'))
            one, two = ([[part.tolist() for part in batch] for batch in make_dataloader(train, 32, workers=w)] for w in (0, 2))
            assert one == two and len(one) == {4631 // 32 // 8}, len(one)
            assert tokenize_files('a.txt', 'b.ids', workers=2)[:].ids.tolist() == TokenFile('a.ids').ids.tolist()
    '''))
    done = subprocess.run([sys.executable, 'run.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_state_of_another_loader_is_refused():
    loader = make_dataloader(range(100), 4, batch_size=3, stride=2)
    state = loader.state_dict()
    with pytest.raises(ValueError, match='context_length=4, and this one has context_length=5'): make_dataloader(range(100), 5, batch_size=3, stride=2).load_state_dict(state)
    for other in (dict(batch_size=2), dict(stride=3), dict(seed=5), dict(shuffle=False), dict(drop_last=False)):
        with pytest.raises(ValueError, match=f'{next(iter(other))}='): make_dataloader(range(100), 4, **{'batch_size': 3, 'stride': 2, **other}).load_state_dict(state)
    with pytest.raises(ValueError, match='windows=48.*windows=47'): make_dataloader(range(98), 4, batch_size=3, stride=2).load_state_dict(state)
    with pytest.raises(ValueError, match='batch=16 is none of the 16'): loader.load_state_dict({**state, 'batch': 16})
    for bad in ({**state, 'epoch': -1}, {**state, 'batch': None}, {}):
        with pytest.raises((ValueError, TypeError)): loader.load_state_dict(bad)
    assert loader.state_dict() == state


@pytest.mark.parametrize('settings, error, message', [
    (dict(batch_size=0), ValueError, 'batch_size=0'), (dict(batch_size=2.5), TypeError, 'batch_size=2.5'), (dict(workers=-1), ValueError, 'workers=-1'),
    (dict(seed=-1), ValueError, 'seed=-1'), (dict(batch_size=26), ValueError, 'batch_size=26 is more than the 25 windows.*drop_last=False'),
])
def test_batches_that_cannot_be_are_refused(settings, error, message):
    with pytest.raises(error, match=message): make_dataloader(range(101), 4, **settings)


# ---- two parts

@given(st.integers(2, 300), st.floats(0.001, 0.999))
def test_the_parts_are_the_whole(n, held_out):
    ids = list(range(n))
    if not 0 < int(n * (1 - held_out)) < n:
        with pytest.raises(ValueError, match='leaves one part empty'): split_ids(ids, held_out)
        return
    train, validation = split_ids(ids, held_out)
    assert train + validation == ids and len(train) == int(n * (1 - held_out))
    if len(train) > 3 < len(validation):      # no window of one part holds an id of the other
        seen = [set(torch.cat([torch.cat(pair) for pair in TokenDataset(part, 2, 1)]).tolist()) for part in (train, validation)]
        assert not seen[0] & seen[1]


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=2, max_size=30), st.floats(0.01, 0.99))
def test_documents_stay_whole(documents, held_out):
    ids = [i for document in documents for i in (*document, 0)]
    ends = [i + 1 for i, token in enumerate(ids[:-1]) if token == 0]
    train, validation = split_ids(ids, held_out, separator=0)
    assert train + validation == ids and len(train) in ends
    at = int(len(ids) * (1 - held_out))
    assert abs(len(train) - at) == min(abs(end - at) for end in ends), 'the nearest end of a document'


def test_the_end_of_a_document_is_found_far_away():
    ids = torch.ones(100_000, dtype=torch.int32)
    ids[[3, 99_999]] = 0
    assert [len(part) for part in split_ids(ids, 0.1, separator=0)] == [4, 99_996]
    ids[90_500] = 0
    assert len(split_ids(ids, 0.1, separator=0)[0]) == 90_501


def test_splits_that_cannot_be_are_refused():
    for held_out in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match=f'held_out={held_out} is no share'): split_ids(range(10), held_out)
    with pytest.raises(ValueError, match='separator=7 stands nowhere but at the end.*separator=None'): split_ids([1, 2, 3, 7], 0.5, separator=7)
    with pytest.raises(ValueError, match='separator=7 stands nowhere'): split_ids([1, 2, 3], 0.5, separator=7)


# ---- pieces

NASTY = ['the', ' tea', "'s", "don't", '  ', '\n', '\r\n', '\t', ' \n ', '\u00a0', '\u3000', '\u2028', '\x1f', '\x85', '茶', '🍵', 'é', '.', '...', '12', '_', ' ', '\n\n\n', END_OF_TEXT, '\ufeff']
nasty = st.lists(st.sampled_from(NASTY), max_size=40).map(''.join)


@settings(max_examples=400)
@given(nasty)
def test_a_safe_cut_changes_no_id(text):
    raw = text.encode()
    for end in range(0, len(raw) + 1, 3):
        at = safe_cut(raw[:end], GPT2.encode_ordinary)
        if at:
            left, right = raw[:at].decode(), raw[at:].decode()
            assert GPT2.encode_ordinary(left) + GPT2.encode_ordinary(right) == GPT2.encode_ordinary(text)
            assert right[0] in ' \n' and not left[-1].isspace()


def test_a_safe_cut_is_the_last_one_and_none_is_invented():
    encode = GPT2.encode_ordinary
    assert safe_cut(b'one two three', encode) == 7 and safe_cut(b'one two  ', encode) == 7 and safe_cut(b'one two\n', encode) == 7
    for text in ('', ' ', 'one', '   one', '茶茶茶'): assert safe_cut(text.encode(), encode) == 0
    assert safe_cut(('one two' + ' ' * 500).encode(), encode) == 7
    adds_a_mark = lambda text: [0, *encode(text)]
    assert safe_cut(b'one two three', adds_a_mark) == 0
    pairs = lambda text: [text[i:i + 2] for i in range(0, len(text), 2)]       # cuts only at even places
    assert safe_cut(b'a bc d ef ghi', pairs) == 6


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nasty, st.integers(1, 30))
def test_pieces_are_the_text_and_its_ids(tmp_path, text, size):
    (tmp_path/'t').write_bytes(text.encode())
    read = list(read_pieces(tmp_path/'t', 0, GPT2.encode_ordinary, size))
    assert ''.join(piece for piece, _, _ in read) == text.removeprefix('\ufeff')
    assert [i for piece, _, _ in read for i in GPT2.encode_ordinary(piece)] == GPT2.encode_ordinary(text.removeprefix('\ufeff'))
    assert [last for *_, last in read] == [False] * (len(read) - 1) + [True] * bool(read)
    for _, end, last in read[:-1]: assert [p for p, *_ in read_pieces(tmp_path/'t', end, GPT2.encode_ordinary, 10**6)] == [text.encode()[end:].decode()]


def test_a_byte_that_is_no_utf8_is_named_with_its_place(tmp_path):
    good = b'tea ' * 1000
    for at in (0, 1, 1500, 3999):
        (tmp_path/'bad.txt').write_bytes(good[:at] + b'\xe9' + good[at:])
        with pytest.raises(ValueError, match=rf'bad.txt is not UTF-8: byte 0xe9 at {at} .*iconv -f Latin-1'): list(read_pieces(tmp_path/'bad.txt', 0, GPT2.encode, 100))
    (tmp_path/'bad.txt').write_bytes(good + '茶'.encode()[:2])
    with pytest.raises(ValueError, match='byte 0xe8 at 4000 .unexpected end'): list(read_pieces(tmp_path/'bad.txt', 0, GPT2.encode, 100))
    (tmp_path/'bad.txt').write_bytes('tea'.encode('utf-16'))
    with pytest.raises(ValueError, match='at 0 .*iconv -f UTF-16'): list(read_pieces(tmp_path/'bad.txt'))


def test_the_mark_that_some_editors_put_first_is_no_text(tmp_path):
    (tmp_path/'t').write_bytes('\ufefftea for \ufefftwo'.encode())
    assert [p for p, *_ in read_pieces(tmp_path/'t', 0, GPT2.encode, 8)] == ['tea', ' for', ' \ufefftwo']


def test_a_text_without_a_place_to_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(data, '_TOO_LONG', 500)
    (tmp_path/'t').write_text('a' * 400)
    assert [p for p, *_ in read_pieces(tmp_path/'t', 0, GPT2.encode, 50)] == ['a' * 400]
    (tmp_path/'t').write_text('tea ' + 'a' * 1000)
    with pytest.raises(ValueError, match='no place to cut in the .* bytes from byte'): list(read_pieces(tmp_path/'t', 0, GPT2.encode, 50))


# ---- id files

@pytest.fixture
def texts(tmp_path, monkeypatch):
    "A folder of texts, some of many pieces, one empty; and the ids they should give."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, 'PIECE', 2000)
    monkeypatch.setattr(data, 'gpt2_tokenizer', lambda: GPT2)
    rng = random.Random(0)
    contents = {'a.txt': STORY, 'b/c.txt': '', 'b/d.txt': 'tea 🍵\r\n\u3000茶', 'e.txt': ''.join(rng.choice(NASTY) for _ in range(9000)), 'f.txt': 'The end.'}
    for name, text in contents.items():
        (tmp_path/'texts'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'texts'/name).write_bytes(text.encode())
    (tmp_path/'texts'/'notes.md').write_text('not a text')
    return [i for text in contents.values() if text for i in (*GPT2.encode_ordinary(text), EOT)]


@pytest.mark.parametrize('cores, pieces, started', [(8, 3, 0), (8, 7, 0), (8, 8, 2), (8, 200, 8), (1, 200, 0)])
def test_workers_are_started_where_they_help(tmp_path, monkeypatch, cores, pieces, started):
    (tmp_path/'a.txt').write_text('tea ' * 5 * pieces)
    seen, encode = [], data._encode_all
    monkeypatch.setattr(data, 'PIECE', 20)
    for name in ('cpu_count', 'process_cpu_count'): monkeypatch.setattr(data.os, name, lambda: cores, raising=False)
    monkeypatch.setattr(data, '_encode_all', lambda draft, paths, sizes, encoder, workers, progress: encode(draft, paths, sizes, encoder, seen.append(workers) or 0, progress))
    tokenize_files(tmp_path/'a.txt', tmp_path/'a.ids')
    assert seen == [started]


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_an_id_file_holds_the_ids_of_its_texts(texts, workers):
    file = tokenize_files('texts', 'corpus.ids', workers=workers)
    assert file.ids.tolist() == texts and len(file) == len(texts) and file.ids.dtype == torch.uint16
    assert (file.vocab_size, file.separator, file.documents, file.tokenizer) == (50_257, EOT, 4, fingerprint(GPT2))
    assert Path('corpus.ids').stat().st_size == HEADER + 2 * len(texts)
    assert np.fromfile('corpus.ids', '<u2', offset=HEADER).tolist() == texts
    file.verify()
    assert sorted(p.name for p in Path().iterdir()) == ['corpus.ids', 'texts'], 'nothing else is left'
    assert [lists(p) for p in TokenDataset(file, 16, vocab_size=50_257)] == [lists(p) for p in TokenDataset(texts, 16)]


def test_the_number_of_workers_changes_no_byte(texts):
    files = []
    for workers in (0, 1, 2):
        tokenize_files('texts', 'corpus.ids', workers=workers)
        files.append(Path('corpus.ids').read_bytes())
        Path('corpus.ids').unlink()
    assert files[0] == files[1] == files[2]


class Counting:
    "GPT-2's tokenizer, which fails at its n-th text."
    vocab, vocab_size, encode = GPT2.vocab, GPT2.vocab_size, GPT2.encode
    def __init__(self, fail_at=None, error=KeyboardInterrupt): self.left, self.error, self.seen = fail_at, error, 0
    def encode_ordinary(self, text):
        self.seen += len(text)
        if self.left is not None:
            self.left -= 1
            if self.left < 0: raise self.error
        return GPT2.encode_ordinary(text)


@pytest.mark.parametrize('workers', [0, 2])
def test_interrupted_anywhere_it_goes_on_and_ends_in_the_same_bytes(texts, monkeypatch, workers):
    monkeypatch.setattr(data, 'safe_cut', lambda raw, encode, cut=safe_cut: cut(raw, GPT2.encode_ordinary))      # so that only pieces are counted
    def encode(tokenizer): return tokenize_files('texts', 'corpus.ids', tokenizer, workers)
    first = Counting()
    encode(first)
    wanted, shares = Path('corpus.ids').read_bytes(), []
    for fail_at in (0, 1, 4, 5, 9):          # interrupted again and again, after so many pieces
        Path('corpus.ids').unlink()
        work = 0
        for _ in range(30 if fail_at > 1 else 1):
            stopped = Counting(fail_at)
            try: encode(stopped)
            except KeyboardInterrupt as error:
                assert not Path('corpus.ids').exists() and Path('corpus.ids.part').exists() and not Path('corpus.ids.lock').exists()
                shares.append(error.__notes__[0].split()[6])
                work += stopped.seen
            else:
                work += stopped.seen
                break
        last = Counting()
        encode(last)
        assert Path('corpus.ids').read_bytes() == wanted
        if not workers: assert first.seen <= work + last.seen < first.seen + 4000 * len(shares), 'only what was under way is done again'
    assert len(set(shares)) > 5, shares


def test_what_another_work_has_left_is_not_taken_up(texts):
    with pytest.raises(KeyboardInterrupt): tokenize_files('texts', 'corpus.ids', Counting(40), workers=0)
    assert Path('corpus.ids.part').stat().st_size > HEADER
    assert tokenize_files('texts/f.txt', 'corpus.ids').ids.tolist() == [*GPT2.encode('The end.'), EOT]
    with pytest.raises(KeyboardInterrupt): tokenize_files('texts', 'corpus.ids', Counting(40), workers=0)
    part = Path('corpus.ids.part').read_bytes()
    for changed in (part + b'more than the header knows of', part[:-1], part[:HEADER]):
        Path('corpus.ids.part').write_bytes(changed)
        assert tokenize_files('texts', 'corpus.ids').ids.tolist() == texts
        tokenize_files('texts', 'corpus.ids').verify()
        Path('corpus.ids').unlink()
    for rubbish in (b'', b'rubbish', b'{"format": "llmbook token ids, unfinished"}' + b' ' * 2000):
        Path('corpus.ids.part').write_bytes(rubbish)
        assert tokenize_files('texts', 'corpus.ids').ids.tolist() == texts
        Path('corpus.ids').unlink()


def test_work_that_is_done_is_not_done_again_and_other_work_is(texts):
    tokenize_files('texts', 'corpus.ids')
    assert tokenize_files('texts', 'corpus.ids', Counting(0)).ids.tolist() == texts
    Path('texts/f.txt').write_text('The very end.')
    assert tokenize_files('texts', 'corpus.ids')[-5:].ids.tolist() == [*GPT2.encode('The very end.'), EOT]
    before = Path('corpus.ids').read_bytes()
    with pytest.raises(KeyboardInterrupt): tokenize_files('texts/a.txt', 'corpus.ids', Counting(1), workers=0)
    assert Path('corpus.ids').read_bytes() == before, 'the old file stays until the new one is whole'
    Path('corpus.ids').write_bytes(before[:-1])
    assert len(tokenize_files('texts', 'corpus.ids')) == (len(before) - HEADER) // 2, 'a damaged file is written again'


def test_a_text_that_changes_while_it_is_read(texts):
    class Changing(Counting):
        def encode_ordinary(self, text):
            with open('texts/f.txt', 'a') as file: file.write(' No.')
            return GPT2.encode_ordinary(text)
    with pytest.raises(ValueError, match='a text has changed while it was read'): tokenize_files('texts', 'corpus.ids', Changing(), workers=0)
    assert not Path('corpus.ids').exists()


def child(code, **kwargs):
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


SLOW = '''
    import sys, time
    from llmbook import data
    from llmbook.bpe import gpt2_tokenizer
    data.PIECE = 2000
    class Slow:
        ours = gpt2_tokenizer()
        vocab, vocab_size, encode = ours.vocab, ours.vocab_size, ours.encode
        def encode_ordinary(self, text):
            if len(text) > 300: time.sleep(0.3)
            return self.ours.encode_ordinary(text)
'''


@POSIX
@pytest.mark.parametrize('workers', [0, 2])
def test_killed_at_any_moment_it_goes_on(texts, workers):
    tokenize_files('texts', 'whole.ids')
    noted = []
    for seconds in (0.1, 0.7, 1.1, 1.6):
        running = child(SLOW + f"    print('ready', flush=True)\n    data._Draft.saved = 0\n    data.tokenize_files('texts', 'corpus.ids', Slow(), workers={workers})", start_new_session=True)
        assert running.stdout.readline() == 'ready\n', running.stderr.read()
        time.sleep(seconds)
        running.kill()
        running.communicate(timeout=20)       # ends only if no worker lives on with the pipe
        noted.append(json.loads(Path('corpus.ids.part').read_bytes()[:HEADER] or '{}').get('count', 0))
    assert noted[-1] > noted[0] and not Path('corpus.ids').exists(), noted
    assert tokenize_files('texts', 'corpus.ids').ids.tolist() == texts
    assert Path('corpus.ids').read_bytes()[HEADER:] == Path('whole.ids').read_bytes()[HEADER:]


@POSIX
@pytest.mark.parametrize('workers', [0, 2])
def test_ctrl_c_in_a_terminal(texts, workers):
    running = child(SLOW + f"    print('ready', flush=True)\n    data.tokenize_files('texts', 'corpus.ids', Slow(), workers={workers})", start_new_session=True)
    assert running.stdout.readline() == 'ready\n', running.stderr.read()
    time.sleep(0.7)
    os.killpg(running.pid, signal.SIGINT)     # as a terminal does: to the process and its workers
    _, said = running.communicate(timeout=20)
    assert said.count('KeyboardInterrupt') == 1 and 'the same call goes on from there' in said, said
    assert tokenize_files('texts', 'corpus.ids').ids.tolist() == texts


def test_a_reader_sees_a_whole_file_or_none(texts):
    running = child('''
        import sys
        from llmbook import data
        data.PIECE, ours = 2000, data.gpt2_tokenizer()
        print('ready', flush=True)
        for k in range(12): data.tokenize_files(['texts'] * (1 + k % 2), 'corpus.ids', ours, workers=0)
    ''')
    assert running.stdout.readline() == 'ready\n'
    seen = set()
    while running.poll() is None:
        try: file = TokenFile('corpus.ids')
        except FileNotFoundError: continue
        ids = file.ids.tolist()
        assert ids in (texts, texts + texts)
        seen.add(len(ids))
    assert running.returncode == 0, running.stderr.read()
    assert len(seen) == 2


def test_two_writers_do_not_meet(texts):
    class Second(Counting):
        def encode_ordinary(self, text):
            if text == 'The end.':
                with pytest.raises(ValueError, match='path=corpus.ids is being written by another process'): tokenize_files('texts', 'corpus.ids', GPT2)
            return GPT2.encode_ordinary(text)
    tokenize_files('texts', 'corpus.ids', Second(), workers=0)
    assert TokenFile('corpus.ids').ids.tolist() == texts


@POSIX
@pytest.mark.parametrize('workers', [0, 2])
def test_a_full_disk_leaves_nothing_under_the_name(texts, workers):
    running = child(f'''
        import resource
        from llmbook import data
        data.PIECE = 2000
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        try: data.tokenize_files('texts', 'corpus.ids', workers={workers})
        except OSError as error: print(error.errno, *error.__notes__)
    ''')
    said, wrong = running.communicate(timeout=60)
    assert said.startswith(f'{errno.EFBIG} corpus.ids was not written.') and 'the same call goes on' in said, said + wrong
    assert not Path('corpus.ids').exists()
    assert tokenize_files('texts', 'corpus.ids').ids.tolist() == texts


def test_no_room_is_reported_and_the_old_file_stays(texts, monkeypatch):
    tokenize_files('texts/f.txt', 'corpus.ids')
    before = Path('corpus.ids').read_bytes()
    def write(self, data):
        if self.fields['count'] > 2000: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return keep(self, data)
    keep = data._Draft._write
    monkeypatch.setattr(data._Draft, '_write', write)
    with pytest.raises(OSError, match='No space left') as caught: tokenize_files('texts', 'corpus.ids')
    assert 'corpus.ids was not written' in caught.value.__notes__[0] and Path('corpus.ids').read_bytes() == before
    monkeypatch.undo()


@LINUX
def test_memory_stays_flat(tmp_path):
    "A text of 96 MB, ids of 192 MB, and 48 MB of room for all that is written to memory."
    with open(tmp_path/'large.txt', 'wb') as file:
        for _ in range(96): file.write(b'all that glisters \n' * (2**20 // 19))
    running = child('''
        import resource, numpy as np
        from llmbook.data import TokenFile, make_dataloader, split_ids, tokenize_files
        class Bytes:
            "A tokenizer that costs no time: one id for each byte."
            vocab_size = 257
            def decode(self, ids): return str(ids)
            def encode(self, text): return [256] if text == '<|endoftext|>' else np.frombuffer(text.encode(), np.uint8)
        used = int(next(l for l in open('/proc/self/status') if l.startswith('VmData')).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 48 * 2**20,) * 2)
        try: np.ones(64 * 2**20, np.uint8)
        except MemoryError: print('limited')
        file = tokenize_files('large.txt', 'large.ids', Bytes(), workers=0)
        file.verify()
        train, validation = split_ids(file)
        assert len(train) + len(validation) == len(file) == 96 * 19 * (2**20 // 19) + 1
        batches = iter(make_dataloader(train, 1024, batch_size=32))
        print(sum(len(next(batches)[0]) for _ in range(200)), file.documents)
    ''', cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'})
    said, wrong = running.communicate(timeout=120)
    assert said.split() == ['limited', '6400', '1'], said + wrong


# ---- reading id files

@given(st.integers(-3, 12), st.integers(-3, 12), st.integers(-3, 6), st.integers(-3, 6))
def test_parts_of_a_file_are_parts_of_its_ids(shared, low, high, low2, high2):
    file, ids = shared
    part, wanted = file[low:high][low2:high2], ids[low:high][low2:high2]
    assert part.ids.tolist() == wanted and len(part) == len(wanted)
    assert pickle.loads(pickle.dumps(part)).ids.tolist() == wanted
    if wanted: assert part[0] == wanted[0] and part[-1] == wanted[-1] and isinstance(part[0], int)


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shared')
    (folder/'t.txt').write_text('The cat sat on a mat, it is said.')
    file = tokenize_files(folder/'t.txt', folder/'t.ids')
    assert len(file) == 12
    return file, file.ids.tolist()


def test_what_travels_to_a_worker_is_a_name(texts, monkeypatch):
    file = tokenize_files('texts', 'corpus.ids')
    for thing in (file, TokenDataset(file[3:], 8, 2)):
        sent = pickle.dumps(thing)
        assert len(sent) < 500
        monkeypatch.chdir('texts')         # found from any folder
        again = pickle.loads(sent)
        monkeypatch.chdir('..')
        assert repr(again) == repr(thing) and len(again) == len(thing)
    inputs, targets = TokenDataset(file[3:], 8, 2)[1]
    assert inputs.tolist() == texts[5:13] and targets.tolist() == texts[6:14]
    assert lists(copy.deepcopy(TokenDataset(range(20), 3))[1]) == [[3, 4, 5], [4, 5, 6]]
    assert repr(file) == f'TokenFile(corpus.ids: {len(texts):,} ids, 16 bits, vocab_size=50257)'
    assert '10 to 20' in repr(file[10:20])
    with pytest.raises(ValueError, match='no step, got 2'): file[::2]


def test_each_fault_of_a_file_has_its_message(texts):
    tokenize_files('texts', 'corpus.ids')
    whole = Path('corpus.ids').read_bytes()
    head = json.loads(whole[:HEADER])
    def said(content, verify=False):
        Path('x.ids').write_bytes(content)
        with pytest.raises(ValueError) as caught:
            file = TokenFile('x.ids')
            if verify: file.verify()
        return str(caught.value)
    for size in (HEADER, HEADER + 1, len(whole) - 1): assert said(whole[:size]).startswith('x.ids is cut short: ')
    for size in (50, HEADER - 1): assert said(whole[:size]).startswith('x.ids is cut short, in its header')
    assert said(whole + b'\0').startswith('x.ids has extra bytes after its ids')
    for foreign in (b'', b'PK\x03\x04', STORY.encode(), b'{"format": "something else"}', whole[HEADER:]): assert said(foreign).startswith('x.ids is no id file: it begins with')
    future = json.dumps({**head, 'version': 2}).encode().ljust(HEADER - 1) + b'\n'
    assert said(future + whole[HEADER:]) == 'x.ids has version 2, and only 1 is known here; update the package'
    for at in (HEADER, len(whole) - 1, HEADER + 999):
        changed = bytearray(whole)
        changed[at] ^= 1
        assert said(changed, verify=True).startswith('x.ids is damaged: the sha256')
    with pytest.raises(FileNotFoundError): TokenFile('nothing.ids')
    with pytest.raises(KeyboardInterrupt): tokenize_files('texts', 'y.ids', Counting(3), workers=0)
    with pytest.raises(ValueError, match='y.ids.part is not finished'): TokenFile('y.ids.part')


def test_every_changed_byte_of_a_header_is_noticed(texts):
    tokenize_files('texts/f.txt', 'corpus.ids')
    whole = Path('corpus.ids').read_bytes()
    for at in range(HEADER):
        changed = bytearray(whole)
        changed[at] = ord('7') if changed[at] != ord('7') else ord('8')
        Path('x.ids').write_bytes(changed)
        with pytest.raises(ValueError): TokenFile('x.ids')


# ---- tokenizers of every kind

def test_any_tokenizer_will_do(texts):
    "tiktoken's; words; characters of a vocabulary that two bytes do not hold; a tokenizer without a mark."
    assert tokenize_files('texts', 't.ids', gpt2_encoding()).ids.tolist() == texts
    assert fingerprint(gpt2_encoding()) == fingerprint(GPT2)
    words = WordTokenizer(Vocabulary(split_words(STORY), [END_OF_TEXT, '<|unk|>']), '<|unk|>')
    file = tokenize_files('texts/a.txt', 'w.ids', words)
    assert file.ids.tolist() == [*words.encode(STORY), 1159] and file.vocab_size == 1161
    class Characters:
        vocab_size = 0x110000
        def encode(self, text): return list(map(ord, text))
        def decode(self, ids): return ''.join(map(chr, (i for i in ids if not 0xD800 <= i < 0xE000)))
    with pytest.raises(ValueError, match='no id for <|endoftext|>.*separator='): tokenize_files('texts', 'c.ids', Characters())
    file = tokenize_files('texts/b/d.txt', 'c.ids', Characters(), separator=0)
    assert file.ids.tolist() == [*map(ord, 'tea 🍵\r\n\u3000茶'), 0] and file.ids.dtype == torch.int32
    plain = BPETokenizer([(116, 104)], special_tokens=())
    with pytest.raises(ValueError, match='separator='): tokenize_files('texts', 'p.ids', plain)
    with pytest.raises(ValueError, match='separator=300 is no id; they run from 0 to 256'): tokenize_files('texts', 'p.ids', plain, separator=300)
    assert tokenize_files('texts/f.txt', 'p.ids', plain, separator=256).separator == 256


def test_fingerprints_tell_tokenizers_apart():
    kinds = [GPT2, BPETokenizer([]), BPETokenizer([], special_tokens=()), BPETokenizer([(116, 104)]), BPETokenizer([(116, 105)]), BPETokenizer([], byte_order=bytes(range(255, -1, -1))),
             WordTokenizer(Vocabulary('ab')), WordTokenizer(Vocabulary('ac'))]
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)


def test_ids_outside_the_vocabulary_are_refused(texts):
    class Lying(Counting):
        vocab, vocab_size = GPT2.vocab, 50_000
    with pytest.raises(ValueError, match='with vocab_size=50000, ids run from 0 to 49999'): tokenize_files('texts', 'x.ids', Lying(), separator=1)
    class Wild:
        vocab_size, decode = 300, lambda self, ids: str(ids)
        def __init__(self, *ids): self.ids = list(ids)
        def encode(self, text): return self.ids
    for wild in (Wild(300), Wild(0, -1), Wild(7, 300, 5)):
        with pytest.raises(ValueError, match='with vocab_size=300, ids run from 0 to 299'): tokenize_files('texts/f.txt', 'x.ids', wild, separator=299)
    with pytest.raises(ValueError, match='separator=300 is no id'): tokenize_files('texts/f.txt', 'x.ids', Wild(1), separator=300)
    assert tokenize_files('texts/f.txt', 'x.ids', Wild(299, 0), separator=7).ids.tolist() == [299, 0, 7]
    Path('x.ids').unlink()
    for size, bits in ((2**16, 16), (2**16 + 1, 32)):
        Wild.vocab_size = size
        file = tokenize_files('texts/f.txt', f'{bits}.ids', Wild(size - 1), separator=0)
        assert file.ids.tolist() == [size - 1, 0] and f'{bits} bits' in repr(file)
    assert not Path('x.ids').exists()


def test_the_mark_inside_a_text(texts):
    Path('m.txt').write_text(f'One.{END_OF_TEXT}Two.{END_OF_TEXT}')
    ordinary = tokenize_files('m.txt', 'm.ids')
    assert ordinary.ids.tolist() == [*GPT2.encode_ordinary(f'One.{END_OF_TEXT}Two.{END_OF_TEXT}'), EOT]
    marked = tokenize_files('m.txt', 'm.ids', marks=True)
    assert marked.ids.tolist() == [*GPT2.encode('One.'), EOT, *GPT2.encode('Two.'), EOT], 'and no second mark at the end'
    assert marked.documents == 2


# ---- what is given, and what is shown

def test_texts_are_found_in_order(texts):
    assert [p.as_posix() for p in find_texts('texts')] == ['texts/a.txt', 'texts/b/c.txt', 'texts/b/d.txt', 'texts/e.txt', 'texts/f.txt']
    assert [p.as_posix() for p in find_texts(['texts/notes.md', 'texts/b'])] == ['texts/notes.md', 'texts/b/c.txt', 'texts/b/d.txt']
    Path('empty').mkdir()
    for files, error, message in (('nothing', FileNotFoundError, 'no file or folder nothing'), ('empty', ValueError, "folder empty has no .txt file"), ([], ValueError, 'files is empty')):
        with pytest.raises(error, match=message): find_texts(files)


def test_places_where_no_file_can_be_written(texts):
    for path, error, message in (('no/such.ids', FileNotFoundError, 'path=no/such.ids lies in a folder that does not exist'), ('texts', IsADirectoryError, 'path=texts is a folder'),
                                 ('texts/a.txt', ValueError, 'path=texts/a.txt is one of the texts')):
        with pytest.raises(error, match=message): tokenize_files('texts/a.txt', path)
    with pytest.raises(ValueError, match='nothing to encode: texts/b/c.txt is empty$'): tokenize_files('texts/b/c.txt', 'x.ids')
    assert Path('texts/a.txt').read_bytes() == STORY.encode() and not list(Path().glob('x.*'))


@POSIX
def test_a_link_stays_a_link_and_a_device_a_device(texts):
    Path('far').mkdir()
    Path('link.ids').symlink_to('far/real.ids')
    assert tokenize_files('texts', 'link.ids').ids.tolist() == texts
    assert Path('link.ids').is_symlink() and [p.name for p in Path('far').iterdir()] == ['real.ids']
    os.mkfifo('pipe')
    with pytest.raises(ValueError, match='path=pipe is a device or a pipe'): tokenize_files('texts', 'pipe')
    Path('a.link').symlink_to('texts/a.txt')
    with pytest.raises(ValueError, match='path=a.link is one of the texts'): tokenize_files('texts/a.txt', 'a.link')


def test_a_bar_where_somebody_looks(texts, capsys):
    tokenize_files('texts', 'x.ids')
    assert capsys.readouterr() == ('', '')
    Path('x.ids').unlink()
    tokenize_files('texts', 'x.ids', progress=True)
    assert '100%' in (said := capsys.readouterr().err) and 'x.ids' in said
