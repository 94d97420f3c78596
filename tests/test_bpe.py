"The tokenizer against tiktoken and `tokenizers`, the fast trainer against the slow one, and everything that must be refused."
import copy, json, os, pickle, random, subprocess, sys, warnings
from collections import Counter

import pytest
import regex
import tiktoken
from hypothesis import example, given, settings, strategies as st
from llmbook import bpe
from llmbook.bpe import BPETokenizer, GPT2_SPLIT, gpt2_encoding, gpt2_tokenizer, merge_long_word, merge_word, train_merges
from llmbook.core import load_text
from tiktoken_ext.openai_public import r50k_pat_str

EOT = "<|endoftext|>"
VERDICT, SHAKE = load_text("the-verdict"), load_text("shakespeare")
OURS = gpt2_tokenizer()
BYTES = {bytes([b]): b for b in range(256)}
THEIRS = tiktoken.Encoding(     # tiktoken as it comes: its own pattern and table, without the download
    "gpt2", pat_str=r50k_pat_str, special_tokens={EOT: 50_256},
    mergeable_ranks={token: i for i, token in enumerate(OURS.vocab[:-1])})
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


# ---- the split pattern and Unicode ----------------------------------------
@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{N}", r"\s"])
def test_both_libraries_know_the_same_unicode(kind):
    "The pinned `regex` and `tiktoken` classify every code point alike; with other versions, characters one of them does not know yet may differ."
    theirs = tiktoken.Encoding("probe", pat_str=kind, special_tokens={}, mergeable_ranks=BYTES)
    ours = regex.compile(kind).fullmatch
    assert not [hex(c) for c in CODE_POINTS if bool(ours(chr(c))) != bool(theirs.encode_ordinary(chr(c)))]

CONTEXTS = ("{c}", "a{c}b", " {c}", "{c} ", "{c}{c}", "'s{c}", "'{c}", "1{c}2", "  {c}", "{c}  x", "\n{c}\n", ".{c}.", " {c}s {c}", "{c}'t")

def test_every_code_point():
    "Each in one of the contexts by turns, and the first twelve thousand in all of them; where nothing is assigned, above plane 3 but for 14, sixty-four in a row."
    turn = lambda c: CONTEXTS[c % len(CONTEXTS)].format(c=chr(c))
    empty = [c for c in CODE_POINTS if c >= 0x40000 and c >> 16 != 14]
    for c in sorted({*CODE_POINTS} - {*empty}):
        for text in [context.format(c=chr(c)) for context in CONTEXTS] if c < 12_000 else [turn(c)]: assert OURS.encode(text) == THEIRS.encode_ordinary(text), (hex(c), text)
    for k in range(0, len(empty), 64):
        text = ''.join(map(turn, empty[k:k + 64]))
        assert OURS.encode(text) == THEIRS.encode_ordinary(text), hex(empty[k])


# ---- against tiktoken --------------------------------------------------
def test_whole_texts():
    ids = OURS.encode(VERDICT)
    assert len(ids) == 5145
    assert ids[:8] == [40, 367, 2885, 1464, 1807, 3619, 402, 271]
    assert ids == THEIRS.encode_ordinary(VERDICT)
    assert OURS.decode(ids) == VERDICT
    ids = OURS.encode(SHAKE + "\n")
    assert len(ids) == 337_704
    assert ids[:8] == [5962, 22307, 25, 198, 8421, 356, 5120, 597]
    assert ids == THEIRS.encode_ordinary(SHAKE + "\n")
    assert OURS.decode(ids) == SHAKE + "\n"

PIECES = ["'s", "'t", " 't", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "don't", "’s",
    " ", "  ", "     ", "\t", "\n", "\r\n", "\r\n\r\n", "\n\n\n", "\u00a0", "\u2003", "\u200b",
    "\u3000", "\x1c", "\x1f", "\x85", "\u180e", "\u2028", "\ufeff", "\x00", "such a 'subject.'",
    "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "e\u0301", "a\u0300\u0323", "\u0301", "123", "12,345.67", "٣٤٥",
    "Ⅷ", "½", "²", "日本語", "中文字符", "한국어", "привет", "γειά", "שלום", "مرحبا", "नमस्ते",
    "สวัสดี", "...", "--", "!?", "_", "a_b", "The", " the", "hello", " world", EOT,
    "<|", "|>", "\U0001d4d0", "ﬁ", "İ", "ß"]
def random_text(rng):
    kind = rng.random()
    if kind < .25: return "".join(chr(rng.choice(CODE_POINTS)) for _ in range(rng.randrange(12)))
    if kind < .35: return "".join(rng.choice(" \t\n\r\u00a0ab") for _ in range(rng.randrange(20)))
    if kind < .45: return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(60)))
    if kind < .47: return "".join(rng.choice("abcde") for _ in range(rng.randrange(400)))
    parts = [rng.choice(PIECES) for _ in range(rng.randrange(14))]
    if kind < .7: parts += [chr(rng.choice(CODE_POINTS)) for _ in range(rng.randrange(5))]
    rng.shuffle(parts)
    return "".join(parts)
def test_ten_thousand_random_texts():
    rng = random.Random(0)
    for _ in range(10_000):
        text = random_text(rng)
        ids = OURS.encode_ordinary(text)
        assert ids == THEIRS.encode_ordinary(text), ascii(text)
        assert OURS.decode(ids) == text
        assert (OURS.encode(text, allowed_special="all")
                == THEIRS.encode(text, allowed_special="all")), ascii(text)

@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([chr(c) for c in CODE_POINTS[::7]]) | st.characters(max_codepoint=0x2FF)).map("".join))      # `text` is slow if its letters have gaps
@example("")
@example("   ")
@example(" 't")
@example("such a 'subject.'")
def test_hypothesis_texts(text):
    assert OURS.encode_ordinary(text) == THEIRS.encode_ordinary(text)
    assert OURS.decode(OURS.encode_ordinary(text)) == text

@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 50256)))
def test_any_ids_decode_as_tiktoken_does(ids):
    assert OURS.decode(ids) == THEIRS.decode(ids)

def test_long_words():
    rng = random.Random(1)
    for text in ("a" * 100_000, "=" * 99_999, " " * 5000 + "x", "ab" * 30_000,
                 "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(20_000))):
        assert OURS.encode(text) == THEIRS.encode_ordinary(text)
        assert OURS.decode(OURS.encode(text)) == text

def test_two_ways_to_merge_agree():
    rng = random.Random(2)
    table = OURS._cache.token_of
    for n in [*range(12), 40, 99, 100, 101, 300]:
        for letters in ("a", "ab", "etaoin shrdlu", "é日😀"):
            word = "".join(rng.choice(letters) for _ in range(n)).encode()
            word = word.translate(OURS._cache.id_of_byte)
            assert merge_word(word, table) == merge_long_word(word, table)

def test_every_token_is_reached_by_merging():
    "So the short cut for words that are tokens changes nothing."
    cache = OURS._cache
    for i, token in enumerate(OURS.vocab[:-1]):
        assert merge_word(token.translate(cache.id_of_byte), cache.token_of) == [i]

def test_gpt2_encoding_is_tiktoken():
    ours = gpt2_encoding()
    for text in (VERDICT, SHAKE, *(random_text(random.Random(seed)) for seed in range(500))):
        assert ours.encode(text, allowed_special="all") == THEIRS.encode(text, allowed_special="all")
    assert ours.n_vocab == 50_257 and ours.eot_token == 50_256

def test_vocab_and_gpt2_layout():
    assert OURS.vocab_size == 50_257 == THEIRS.n_vocab
    assert OURS.special_tokens == {EOT: 50_256}
    assert OURS.vocab[:3] == [b"!", b'"', b"#"] and OURS.vocab[220] == b" "
    assert OURS.vocab[50_256] == EOT.encode()
    assert len(OURS.merges) == 50_000


# ---- training ----------------------------------------------------------
def naive_merges(words, n_merges):
    words, merges = [(list(w.encode()), n) for w, n in words.items()], []
    while len(merges) < n_merges:
        counts = Counter()
        for ids, n in words:
            for pair, k in bpe.count_pairs(ids).items(): counts[pair] += n * k
        best = min(counts, key=lambda p: (-counts[p], p), default=None)
        if best is None or counts[best] < 2: break
        words = [(bpe.merge_pair(ids, best, 256 + len(merges)), n) for ids, n in words]
        merges.append(best)
    return merges

def test_teaching_functions():
    assert bpe.count_pairs([]) == Counter() == bpe.count_pairs([1])
    assert bpe.count_pairs([1, 2, 3, 1, 2]) == {(1, 2): 2, (2, 3): 1, (3, 1): 1}
    assert bpe.merge_pair([1, 1, 1], (1, 1), 9) == [9, 1]
    assert bpe.merge_pair([1, 1, 1, 1], (1, 1), 9) == [9, 9]
    assert bpe.merge_pair([], (1, 1), 9) == []
    assert bpe.merge_pair([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]

def test_naive_equals_incremental():
    rng = random.Random(3)
    for trial in range(1500):
        letters = rng.choice(["a", "ab", "abc", "abé ", "日本 語", "abcdefgh ,.'12"])
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 120)))
        if trial % 2: words = Counter(GPT2_SPLIT.findall(text))
        else: words = {text[:k]: rng.randrange(1, 5) for k in rng.sample(range(len(text) + 1), 1)}
        n = rng.choice([0, 1, 5, 30, 300])
        assert train_merges(words, n, progress=False) == naive_merges(words, n), ascii(text)

@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text("ab\u00e9", max_size=25), st.integers(1, 4), max_size=5))
def test_naive_equals_incremental_hypothesis(words):
    assert train_merges(words, 60, progress=False) == naive_merges(words, 60)

@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text("ab", max_size=20), st.integers(1, 4), max_size=5))
def test_mended_counts_are_those_of_a_new_count(words):
    index = bpe.PairIndex(words)
    for new_id in range(256, 300):
        counts = Counter()
        for word, times in zip(index.words, index.times):
            for pair, n in bpe.count_pairs(word).items(): counts["".join(pair)] += n * times
        assert +Counter(index.counts) == counts
        if (pair := index.most_frequent()) is None: break
        assert counts[pair] == max(counts.values())
        index.merge(pair, chr(new_id))

def test_naive_equals_incremental_on_the_story():
    words = Counter(GPT2_SPLIT.findall(VERDICT))
    assert train_merges(words, 150, progress=False) == naive_merges(words, 150)

def test_same_merges_as_tokenizers():
    "Rust breaks ties by its own ids, which are GPT-2's order: stand-ins give us the same."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator([SHAKE], trainers.BpeTrainer(vocab_size=5000, min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    theirs = [tuple(m) for m in json.loads(tok.to_str())["model"]["merges"]]
    swap = str.maketrans("\n ", "\x7e\x7f")      # GPT-2 sorts "\n" and " " after "z"
    assert "~" not in SHAKE and "\x7f" not in SHAKE and SHAKE.isascii()
    words = Counter(GPT2_SPLIT.findall(SHAKE))
    merges = train_merges({w.translate(swap): n for w, n in words.items()}, 4744)
    names = [chr(b) for b in range(256)]
    names[0x7E], names[0x7F] = "Ċ", "Ġ"
    ours = []
    for a, b in merges:
        ours.append((names[a], names[b]))
        names.append(names[a] + names[b])
    assert ours == theirs

def test_tie_goes_to_the_smallest_pair():
    assert train_merges({"ba": 2, "ab": 2}, 1) == [(97, 98)]
    assert train_merges({"xy": 2, "ba": 2, "bA": 2}, 1) == [(98, 65)]

def test_no_pair_twice_no_merge():
    assert train_merges({"ab": 1, "cd": 1}, 5) == []
    assert train_merges({"aaa": 1}, 5) == [(97, 97)]
    assert train_merges({}, 5) == []

def test_same_merges_under_any_hash_seed():
    code = "from llmbook import bpe, core; print(bpe.BPETokenizer.train(core.load_text(), 900).merges)"
    outs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "0123"}
    assert len(outs) == 1 and len(outs.pop()) > 1000

def test_trained_tokenizer():
    tok = BPETokenizer.train(VERDICT, 1000, progress=False)
    assert tok.vocab_size == 1000 == len(tok.vocab) and len(tok.merges) == 743
    assert tok.special_tokens == {EOT: 999}
    ids = tok.encode(VERDICT)
    assert tok.decode(ids) == VERDICT and len(ids) < len(VERDICT) / 2
    enc = tiktoken.Encoding("x", pat_str=THEIRS._pat_str, special_tokens={},
                            mergeable_ranks={t: i for i, t in enumerate(tok.vocab[:-1])})
    rng = random.Random(5)
    for text in [VERDICT, SHAKE[:50_000], *(random_text(rng) for _ in range(500))]:
        assert tok.encode_ordinary(text) == enc.encode_ordinary(text)
    cache = tok._cache
    for i, token in enumerate(tok.vocab[:-1]):       # each token reached
        assert merge_word(token.translate(cache.id_of_byte), cache.token_of) == [i]

def test_smallest_vocabulary_and_no_special_tokens():
    tok = BPETokenizer.train("aaaa", 256, special_tokens=())
    assert tok.vocab_size == 256 and tok.encode("é" + EOT) == list(("é" + EOT).encode())
    assert tok.decode(range(256)) == bytes(range(256)).decode("utf-8", "replace")

def test_running_out_of_pairs_warns():
    with pytest.warns(UserWarning, match="vocab_size=1000 not reached: after 2 merges.* is 259"):
        assert BPETokenizer.train("aaaa aaaa", 1000).vocab_size == 259
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BPETokenizer.train("aaaa aaaa", 259)

def test_progress(capsys):
    BPETokenizer.train(VERDICT, 300, progress=True)
    assert "merges" in capsys.readouterr().err
    for quiet in (None, False):
        BPETokenizer.train(VERDICT, 300, progress=quiet)
        assert capsys.readouterr().err == ""


# ---- special tokens, refusals ------------------------------------------
def test_special_tokens():
    text = f"Hello{EOT} world"
    a, b = OURS.encode("Hello"), OURS.encode(" world")
    assert OURS.encode(text, allowed_special="all") == [*a, 50_256, *b]
    assert OURS.encode(text, allowed_special={EOT}) == [*a, 50_256, *b]
    assert OURS.encode_ordinary(text) == THEIRS.encode_ordinary(text)
    assert OURS.decode([*a, 50_256, *b]) == text
    for allowed in ((), [], set()):
        with pytest.raises(ValueError, match=r"text\[5\] begins the special token '<\|endoftext\|>'.*encode_ordinary"):
            OURS.encode(text, allowed)
    tok = BPETokenizer([], special_tokens=("<a>", "<a>b"))
    assert tok.encode("<a>b<a>", "all") == [257, 256]
    with pytest.raises(ValueError, match=r"text\[4\] begins the special token '<a>'"):
        tok.encode("<a>b<a>", {"<a>b"})

def refused(kind, match, call, *args, **kwargs):
    with pytest.raises(kind, match=match) as info: call(*args, **kwargs)
    assert type(info.value) is kind

def test_refusals():
    train, encode, decode = BPETokenizer.train, OURS.encode, OURS.decode
    for call in (encode, OURS.encode_ordinary, lambda t: train(t, 300)):
        refused(ValueError, r"text\[2\] is '\\ud800', half of a surrogate pair.*repair", call, "ab\ud800c")
        refused(TypeError, "text must be a str, got bytes; decode it", call, b"abc")
        refused(TypeError, "text must be a str, got NoneType", call, None)
    refused(TypeError, "allowed_special='<.endoftext.>' is one string; give a set", encode, "a", EOT)
    refused(ValueError, "allowed_special names '<x>'; this tokenizer has", encode, "a", {"<x>"})
    refused(ValueError, "ids holds 50257; allowed are whole numbers from 0 to 50256", decode, [1, 50_257])
    refused(ValueError, "ids holds -1; allowed", decode, [-1])
    refused(TypeError, "row of whole numbers.*row by row", decode, [[1, 2], [3]])
    refused(TypeError, "row of whole numbers", decode, 5)
    half = OURS.encode("日")[:1]
    assert decode(half) == "\ufffd"
    refused(ValueError, "no UTF-8 text: byte 0x.. at 0 of .*errors='replace'", decode, half, errors="strict")
    refused(ValueError, "vocab_size=256 is too small.* need 257; try vocab_size=513", train, "ab", 256)
    refused(TypeError, "vocab_size=300.0 is no whole number", train, "ab", 300.0)
    refused(TypeError, "vocab_size=True", train, "ab", True)
    refused(ValueError, "text is empty", train, "", 300)
    for make in (lambda s: train("ab", 300, special_tokens=s), lambda s: BPETokenizer([], s)):
        refused(TypeError, "is one string; give a tuple", make, EOT)
        refused(ValueError, "empty string", make, ("",))
        refused(ValueError, "names a token twice", make, ("<a>", "<a>"))
        refused(TypeError, "a special token must be a str, got int", make, (5,))
        refused(ValueError, r"a special token\[0\] is '\\ud800'", make, ("\ud800",))
        for kind in (set, iter): refused(TypeError, "give a tuple, because the order decides the ids", make, kind(["<a>"]))
    refused(ValueError, r"merge 1 joins ids \(257, 97\); allowed are ids.* 0 to 256", BPETokenizer, [(97, 98), (257, 97)])
    refused(ValueError, r"merge 0 joins ids \(-1, 97\)", BPETokenizer, [(-1, 97)])
    for bad in ((1, 2, 3), "ab", (97.0, 98.0), 5): refused(TypeError, "merge 0 is .* give a pair of ids", BPETokenizer, [bad])
    refused(TypeError, "allowed_special is a generator; give a set", encode, "a", (t for t in [EOT]))
    refused(TypeError, "allowed_special is a NoneType", encode, "a", None)
    for errors in (None, "nope"): refused(ValueError, "errors=.* is not known", decode, [40], errors)
    refused(ValueError, "vocab_size=.* is too large", train, "abab", 2**70)
    refused(ValueError, r"merge 1, \(97, 98\), makes b'ab', which is id 256", BPETokenizer, [(97, 98), (97, 98)])
    refused(ValueError, "makes b'abc', which is id 258", BPETokenizer, [(97, 98), (98, 99), (256, 99), (97, 257)])
    refused(ValueError, "byte_order must hold each of the 256 bytes once, got 1 distinct ones in 256", BPETokenizer, [], (), bytes(256))

def test_arrays_and_tensors_decode():
    import numpy, torch
    ids = OURS.encode("Hello, wörld")
    assert OURS.decode(torch.tensor(ids)) == OURS.decode(numpy.array(ids)) == "Hello, wörld"
    assert OURS.decode(iter(ids)) == "Hello, wörld" and OURS.decode([]) == ""


# ---- cache, copies -------------------------------------------------------
def test_cache_is_bounded_and_harmless(monkeypatch):
    assert bpe.WordCache.max_words <= 2**18
    monkeypatch.setattr(bpe.WordCache, "max_words", 10)
    tok = gpt2_tokenizer()
    assert tok.encode(VERDICT) == THEIRS.encode_ordinary(VERDICT)
    assert 0 < len(tok._cache) <= 10
    tok._cache.clear()
    tok.encode("a" * 1001 + "b" * 1001)
    assert len(tok._cache) == 0

def test_a_caller_cannot_spoil_the_cache():
    tok = BPETokenizer.train(VERDICT, 400)
    first = tok.encode("genius"); expected = list(first)
    first.append(5); first[0] = 7
    assert tok.encode("genius") == expected

@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(again):
    for tok in (OURS, BPETokenizer.train(VERDICT, 400, special_tokens=("<a>", "<b>"))):
        other = again(tok)
        assert (other.vocab, other.merges, other.special_tokens) == (tok.vocab, tok.merges, tok.special_tokens)
        assert other.encode(VERDICT) == tok.encode(VERDICT) and other._cache is not tok._cache
    assert len(pickle.dumps(OURS)) < 1_000_000


# ---- files -----------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    tok = BPETokenizer.train(VERDICT, 400, special_tokens=(EOT, "<é\n>"))
    tok.save(tmp_path / "tok.json")
    return tok, tmp_path / "tok.json"

def test_round_trip(saved, tmp_path):
    tok, path = saved
    other = BPETokenizer.load(str(path))
    assert (other.merges, other.vocab, other.special_tokens) == (tok.merges, tok.vocab, tok.special_tokens)
    other.save(path)
    OURS.save(tmp_path / "gpt2.json")
    gpt2 = BPETokenizer.load(tmp_path / "gpt2.json")
    assert gpt2.vocab == OURS.vocab and gpt2.encode(VERDICT) == OURS.encode(VERDICT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2.json", "tok.json"]
    assert '\n  "h e",\n' in path.read_text("utf-8")

def test_failed_write_leaves_the_old_file(saved, monkeypatch):
    tok, path = saved
    old = path.read_bytes()
    def fail(fd): raise OSError("disk full")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"): OURS.save(path)
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["tok.json"]

def test_failed_rename_leaves_the_old_file(saved, monkeypatch):
    tok, path = saved
    old = path.read_bytes()
    def fail(*args): raise OSError("busy")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="busy"): OURS.save(path)
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["tok.json"]

@pytest.mark.skipif(os.name == "nt", reason="links and modes of POSIX")
def test_links_and_modes_are_kept(saved):
    tok, path = saved
    link = path.with_name("link.json")
    link.symlink_to(path)
    path.chmod(0o600)
    tok.save(link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600

def test_many_threads_save_and_load_one_file(saved):
    from concurrent.futures import ThreadPoolExecutor
    tok, path = saved
    def work(_): tok.save(path); return BPETokenizer.load(path).merges == tok.merges
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(work, range(60)))

def damage(**changes):
    def apply(text):
        data = json.loads(text)
        for key, value in changes.items():
            if value is None: del data[key]
            else: data[key] = value(data[key]) if callable(value) else value
        return json.dumps(data)
    return apply
DAMAGE = {
    "empty": (lambda t: "", "no tokenizer file"),
    "deep": (lambda t: "[" * 100_000, "recursion"),
    "version of another type": (damage(version=True), "version True is not supported"),
    "text": (lambda t: "hello", "no tokenizer file"),
    "other json": (lambda t: '{"a": 1}', "no tokenizer file: 'format'"),
    "list": (lambda t: "[1]", "no tokenizer file: 'format'"),
    "cut": (lambda t: t[:len(t) // 2], "cut short or damaged"),
    "cut at end": (lambda t: t[:-3], "cut short or damaged"),
    "version": (damage(version=2), "version 2 is not supported, only 1"),
    "no version": (damage(version=None), "version None"),
    "no merges": (damage(merges=None), "field 'merges' is missing or no list"),
    "no special": (damage(special_tokens=None), "field 'special_tokens' is missing"),
    "no order": (damage(byte_order=None), "field 'byte_order' is missing or no str"),
    "no sum": (damage(sha256=None), "field 'sha256' is missing"),
    "merges text": (damage(merges="h e"), "field 'merges' is missing or no list"),
    "entry": (damage(merges=lambda m: [*m[:3], 7]), r"merges\[3\] is 7, not a string"),
    "special entry": (damage(special_tokens=[None]), r"special_tokens\[0\] is None"),
    "order": (damage(byte_order=lambda o: o[:-1]), "sign of each byte once"),
    "order twice": (damage(byte_order=lambda o: o[:-1] + o[0]), "sign of each byte once"),
    "unknown": (damage(merges=lambda m: [*m[:3], "h zzz"]), "merge 3, 'h zzz', uses 'zzz'"),
    "one part": (damage(merges=lambda m: [*m[:3], "h"]), "merge 3, 'h', uses ''"),
    "three parts": (damage(merges=lambda m: [*m[:3], "h e l"]), "merge 3, 'h e l', uses 'e l'"),
    "duplicate": (damage(merges=lambda m: [*m, m[0]]), "merge 142, .* a second time"),
    "swap": (damage(merges=lambda m: [m[1], m[0], *m[2:]]), "merge|sha256"),
    "last gone": (damage(merges=lambda m: m[:-1]), "sha256 does not fit"),
    "special changed": (damage(special_tokens=["<x>", "<y>"]), "sha256 does not fit"),
    "order changed": (damage(byte_order=lambda o: o[1] + o[0] + o[2:]), "sha256 does not fit"),
    "sum": (damage(sha256="0" * 64), "sha256 does not fit"),
    "special twice": (damage(special_tokens=["<x>", "<x>"]), "sha256|twice"),
}
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file(saved, name):
    spoil, message = DAMAGE[name]
    saved[1].write_text(spoil(saved[1].read_text("utf-8")), "utf-8")
    with pytest.raises(ValueError, match=r"tok\.json: .*(" + message + ")") as info:
        BPETokenizer.load(saved[1])
    assert type(info.value) is ValueError

def test_any_changed_byte_is_noticed(saved):
    tok, path = saved
    good, rng = path.read_bytes(), random.Random(6)
    for _ in range(300):
        at = rng.randrange(len(good))
        bad = bytearray(good); bad[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try: other = BPETokenizer.load(path)
        except ValueError: continue
        assert other.vocab == tok.vocab          # blanks between fields may change
    path.write_bytes(b"\xff\xfe" + good)
    with pytest.raises(ValueError): BPETokenizer.load(path)
    with pytest.raises(FileNotFoundError): BPETokenizer.load(path.with_name("none"))
