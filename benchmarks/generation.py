"""Writing with 124 million parameters, greedily, beside `transformers`: same weights, same prompt, the same ids in the end.

A program that writes one text fetches every weight from memory for every token; the speed of memory, divided by the bytes of
the weights, is the limit that none can pass. The cache of the PyPI package `llms-from-scratch` 1.0.19 does not work, so it is no
contender.
"""
import torch

from benchmarks.harness import AGAIN, Contender, Goal, Job, Row
from llmbook import generate as module
from llmbook.gpt import GPT, GPT2_SIZES, GPTConfig
from llmbook.generate import generate, quantize_int8
from llmbook.open_weights import _published

PROMPT, NEW = 64, 128
SIZES = {'124M': GPT2_SIZES['124M'], 'tiny': GPTConfig(300, 200, 2, 2, 32)}      # the second for the tests


def start(size: str) -> tuple[GPT, list[int]]:
    "The book's model, and a prompt."
    torch.manual_seed(123)
    model = GPT(SIZES[size]).eval()
    return model, torch.randint(SIZES[size].vocab_size, (PROMPT,)).tolist()


def writes(write, read: int) -> Job:
    "Turns of `NEW` tokens, for each of which `read` bytes are fetched."
    write(4)
    return Job(lambda _: {'units': NEW, 'result': list(write(NEW))}, limit={'bytes': read})


def ours(size: str) -> Job:
    "As the book writes, with a cache."
    model, ids = start(size)
    return writes(lambda new: generate(model, ids, new, temperature=0), sum(p.nbytes for p in model.parameters()))


def products(size: str, onednn: bool) -> Job:
    "With a cache, and the products of one of PyTorch's two libraries, without a race."
    module._onednn_pays = lambda: onednn
    return ours(size)


def uncached(size: str) -> Job:
    "Everything computed again for each token."
    model, ids = start(size)
    return writes(lambda new: generate(model, ids, new, temperature=0, use_cache=False), sum(p.nbytes for p in model.parameters()))


def int8(size: str) -> Job:
    "With a cache, and weights of 8 bits."
    model, ids = start(size)
    model = quantize_int8(model)
    read = sum(b.nbytes for b in model.buffers()) + sum(p.nbytes for n, p in model.named_parameters() if 'embedding' not in n)
    return writes(lambda new: generate(model, ids, new, temperature=0), read)


def transformers(size: str) -> Job:
    "GPT2LMHeadModel.generate, with its cache."
    from transformers import GPT2Config, GPT2LMHeadModel
    model, ids = start(size)
    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.context_length, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, bos_token_id=0, eos_token_id=0)).eval()
    theirs.load_state_dict(_published(model), strict=False)
    theirs.tie_weights()
    theirs.generation_config.eos_token_id = None      # or a text could end early
    ids = torch.tensor([ids])
    write = lambda new: theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)[0].tolist()
    return writes(write, sum(p.nbytes for p in theirs.parameters()))


def same_text(found: dict) -> None:
    "Greedy, from the same weights: all write the same ids; those of 8 bits may differ, and are compared by their loss."
    want = found['transformers']
    for name, ids in found.items():
        if len(ids) != len(want) or 'int8' not in name and ids != want: raise RuntimeError(f'{name} does not do the same work: it wrote {ids}, and transformers {want}')


def int8_loss() -> dict[str, float]:
    "Nats per token of the small trained model on the end of Shakespeare that it has not seen, with weights of 32 and of 8 bits."
    from llmbook.core import load_text
    from llmbook.loss import evaluate_loss
    from llmbook.pretrain import load_pretrained, whole_text
    model, tokenizer = load_pretrained()[:2]
    text = load_text('shakespeare')
    ids = torch.tensor(tokenizer.encode(text[int(0.9 * len(text)):]))
    loss = lambda m: round(evaluate_loss(m, whole_text(ids, model.config.context_length)), 5)
    return {'float32': loss(model), 'int8': loss(quantize_int8(model))}


def rows(full: bool, size: str = '124M') -> list[Row]:
    "The row of this file, with what it must reach."
    makes = [('ours', ours, {}), ('ours, int8', int8, {}), ('transformers', transformers, {})]
    if full: makes += [('ours, usual products', products, {'onednn': False}), ('ours, oneDNN', products, {'onednn': True}), ('ours, no cache', uncached, {})]
    makes += [(AGAIN, ours, {})]
    return [Row('generate', 'writing, 124 million parameters', f'prompt of {PROMPT} tokens, {NEW} new ones, batch 1, greedy, float32 or int8', 'tokens',
                tuple(Contender(name, make, {'size': size, **more}, note=make.__doc__) for name, make, more in makes),
                (Goal('speed', 1.2, ('transformers',)), Goal('speed', 2.5, ('transformers',), of='ours, int8')), 5 if full else 3, agree=same_text)]
