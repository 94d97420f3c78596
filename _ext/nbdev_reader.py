"""Read nbdev notebooks into myst-nb: the `#|` lines become tags and metadata, and never show."""
import re
from html import escape

import nbformat

DIRECTIVE = re.compile(r'^\s*#\s*\|\s*(.*?)\s*$')
TAGS = {
    'hide': 'remove-cell', 'include:false': 'remove-cell', 'hide_input': 'remove-input', 'echo:false': 'remove-input',
    'hide_output': 'remove-output', 'output:false': 'remove-output', 'eval:false': 'skip-execution',
}
KNOWN = {'default_exp', 'export', 'exporti', 'exports', 'hide', 'include', 'hide_input', 'echo', 'hide_output', 'output',
         'eval', 'notest', 'slow', 'checker', 'label', 'fig-cap', 'fig-alt'}


def split_directives(source: str) -> tuple[dict[str, str], str]:
    "The leading `#|` lines of a cell as {name: value}, and the code below them."
    found, lines = {}, source.splitlines()
    while lines and (m := DIRECTIVE.match(lines[0])):
        name, _, value = m[1].partition(':') if ':' in m[1] else m[1].partition(' ')
        found[name.strip()] = value.strip().strip('"\'')
        lines.pop(0)
    return found, '\n'.join(lines).strip('\n')


def convert(cell) -> None:
    "Turn the directives of a code cell into myst-nb's tags and metadata, in place."
    found, cell.source = split_directives(cell.source)
    if unknown := set(found) - KNOWN: raise ValueError(f'cell {cell.id}: unknown directive {sorted(unknown)}; known: {sorted(KNOWN)}')
    tags = cell.metadata.setdefault('tags', [])
    tags += [tag for key, value in found.items() if (tag := TAGS.get(key) or TAGS.get(f'{key}:{value.lower()}')) and tag not in tags]
    if not cell.source.strip(): tags.append('remove-cell')
    mystnb = cell.metadata.setdefault('mystnb', {})
    if 'fig-cap' in found: mystnb['figure'] = {'caption': found['fig-cap'], **({'name': found['label']} if 'label' in found else {})}
    if 'fig-alt' in found: mystnb['image'] = {'alt': found['fig-alt']}
    for tag in list(tags):
        if m := re.match(r'(uncompared|rtol=[\d.]+): (.*)', tag):
            room = 'Not compared' if m[1] == 'uncompared' else f'Compared within {100 * float(m[1][5:]):g} % of each value'
            if 'figure' in mystnb:                # a second output would be a second figure of the same name
                mystnb['figure']['caption'] += f' ({room}: {m[2]}.)'
                continue
            note = f'<p class="llm-note">{room}: {escape(m[2])}.</p>'
            cell.outputs.append(nbformat.v4.new_output('display_data', {'text/html': note}))
        if tag.startswith('fold: '):        # `fold: Show the drawing code` folds the code behind that line
            tags.append('hide-input')
            mystnb['code_prompt_show'] = tag.removeprefix('fold: ')


def read_notebook(text: str):
    "The custom reader that `nb_custom_formats` names."
    nb = nbformat.reads(text, as_version=4)
    nb.metadata.setdefault('language_info', {'name': 'python', 'pygments_lexer': 'ipython3'})
    for cell in nb.cells:
        if cell.cell_type == 'code': convert(cell)
    return nb


def setup(app): return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)
