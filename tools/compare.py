"""Compare the outputs stored in a notebook with the outputs of a new run.

Words and integers must be equal. A float may differ by one unit of its last printed decimal or by `RTOL` of its
value, whichever is larger (by `RTOL` alone if it has no decimals, as in `1.`); `-0.0` equals `0.0`. A cell asks for more room only by a tag that gives a reason:
`rtol=0.05: why` widens the tolerance of its floats, `uncompared: why` leaves its outputs out.
"""
import math, re

RTOL = 1e-3
FLOAT = re.compile(r'(?<![\w.#])[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)'
                   r'(?![\d.]*\d)(?!\w)')        # not in v1.2, 2.13.0 or #6e7781
TAG = re.compile(r'(?P<name>uncompared|rtol)(?:=(?P<value>[^:]*))?(?::\s*(?P<reason>.*))?$')
KNOWN_TAGS = {'raises-exception', 'remove-cell', 'remove-input', 'readme-skip', 'skip-execution'}
PICTURES = {'image/png', 'image/jpeg', 'image/gif', 'application/pdf'}


class Mismatch(AssertionError):
    "A new output that differs from the stored one by more than the tolerance."


def last_digit(number: str) -> float:
    "The unit of the last decimal printed in `number`: 0.0001 for `1.6755`, 1e-7 for `1.68e-5`, 0 for `1.` and `1e-5`."
    mantissa, _, exponent = number.lower().partition('e')
    decimals = len(mantissa.partition('.')[2])
    return float(f'1e{int(exponent or 0) - decimals}') if decimals else 0.0


def close(stored: str, new: str, rtol: float = RTOL) -> bool:
    "Whether two printed floats agree within the last digit of `stored` or `rtol`, whichever is larger."
    a, b = float(stored), float(new)
    if not (math.isfinite(a) and math.isfinite(b)): return stored == new
    room = max(last_digit(stored), rtol * abs(a))
    return abs(a - b) <= room * (1 + 1e-9)


def words(text: str) -> str:
    "`text` with each float replaced by a mark, and the spaces that align floats in a column folded."
    return re.sub(r'[ \t]*§', ' §', FLOAT.sub('§', text))


def compare_text(stored: str, new: str, rtol: float = RTOL) -> bool:
    "True if equal to the letter, False if equal within tolerance; raises `Mismatch` otherwise."
    if stored == new: return True
    for a, b in zip(FLOAT.findall(stored), FLOAT.findall(new)):
        if not close(a, b, rtol): raise Mismatch(f'stored {a}, now {b}\n{both(stored, new)}')
    if words(stored) != words(new): raise Mismatch(f'words or integers differ\n{both(stored, new)}')
    return False


def both(stored: str, new: str, most: int = 1500) -> str:
    "The two texts under each other, shortened around the first place where they differ."
    at = next((i for i, (a, b) in enumerate(zip(stored, new)) if a != b), min(len(stored), len(new)))
    start = max(0, at - most // 2)
    cut = lambda s: ('…' if start else '') + s[start:start + most] + ('…' if len(s) > start + most else '')
    return f'--- stored\n{cut(stored)}\n--- now\n{cut(new)}'


def as_text(value) -> str:
    "The text of a notebook field, which may be a list of lines."
    return ''.join(value) if isinstance(value, list) else str(value)


def flatten(outputs: list) -> list[tuple[str, str]]:
    "Outputs as a list of (kind, text), with the pieces of one stream joined."
    flat = []
    for out in outputs:
        if out['output_type'] == 'stream':
            kind, text = f"stream {out['name']}", as_text(out['text'])
            if flat and flat[-1][0] == kind: text = flat.pop()[1] + text
            flat.append((kind, text))
        elif out['output_type'] == 'error':
            flat += [('error type', out['ename']), ('error message', out['evalue'])]
        else:
            flat += [(mime, as_text(data)) for mime, data in sorted(out['data'].items())]
    return flat


def compare_outputs(stored: list, new: list, rtol: float = RTOL) -> bool:
    "True if every output is equal to the letter, False if some need the tolerance; raises `Mismatch` otherwise."
    stored, new = flatten(stored), flatten(new)
    if [k for k, _ in stored] != [k for k, _ in new]:
        show = lambda flat: '\n'.join(f'{k}: {t[:300]!r}' for k, t in flat) or '(nothing)'
        raise Mismatch(f'different outputs\n--- stored\n{show(stored)}\n--- now\n{show(new)}')
    if bad := PICTURES & {k for k, _ in stored}:
        raise Mismatch(f'{bad.pop()} cannot be compared: return an SVG, or tag the cell `uncompared: why`')
    return all([compare_text(a, b, rtol) for (_, a), (_, b) in zip(stored, new)])


def read_tags(tags: list[str], source: str = '') -> tuple[float, str | None]:
    "The tolerance that a cell's tags ask for, and the reason why its outputs are not compared (or None)."
    rtol, uncompared = RTOL, None
    for tag in tags:
        if tag in KNOWN_TAGS or tag.startswith('fold: '): continue
        if not tag.startswith(('uncompared', 'rtol')):
            raise ValueError(f'tag {tag!r} is not known; there are {sorted(KNOWN_TAGS)}, `fold: …`, `uncompared: why` and `rtol=0.05: why`')
        m = TAG.match(tag)
        if not m or len((m['reason'] or '').split()) < 3:
            raise ValueError(f'tag {tag!r} gives no reason: write `uncompared: why` or `rtol=0.05: why`')
        if m['name'] == 'uncompared': uncompared = m['reason']
        else:
            rtol = float(m['value'] or 'nan')
            if not RTOL < rtol <= 0.5: raise ValueError(f'tag {tag!r}: the tolerance lies between {RTOL} and 0.5')
    if marker := re.search(r'#\s*(NBVAL_\w+|PYTEST_VALIDATE_\w+)', source):
        raise ValueError(f'comment {marker[0]!r}: use a tag `uncompared: why` or `rtol=0.05: why`')
    return rtol, uncompared
