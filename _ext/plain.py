"""The book as plain text for machine readers: `llms.txt` lists the pages, `llms-full.txt` holds their words, code and printed outputs."""
import re
from pathlib import Path

import nbformat
from nbdev_reader import split_directives


def page_text(path: Path) -> str:
    "A page in Markdown: what is written, run and printed, without pictures, checkers and clean-up."
    if path.suffix == '.md': return path.read_text(encoding='utf-8').strip()
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == 'markdown':
            parts.append(cell.source)
            continue
        directives, source = split_directives(cell.source)
        if 'checker' in directives or 'hide' in directives or 'remove-cell' in cell.metadata.get('tags', []): continue
        parts.append(f'```python\n{source.strip()}\n```')
        printed = ''.join(o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell.outputs if 'image/svg+xml' not in o.get('data', {})).strip()
        if printed: parts.append(f'```text\n{printed}\n```')
        if alt := directives.get('fig-alt'): parts.append(f'[Figure: {alt}]')
    return '\n\n'.join(re.sub(r'### (BEGIN|END) SOLUTION\n?', '', part).strip() for part in parts)


def write(app, error):
    if error or app.builder.format != 'html': return
    pages = [doc for doc in sorted(app.env.found_docs) if not doc.startswith('nbs/api') and doc != 'nbs/C_solutions']
    source = {doc: Path(app.env.doc2path(doc)) for doc in pages}
    title = {doc: app.env.titles[doc].astext() for doc in pages}
    about = '# llmbook\n\n> A book from which people learn to build a large language model from nothing, and the Python package that falls out of it.\n'
    rows = [f'- [{title[doc]}]({app.builder.get_target_uri(doc)})' for doc in pages]
    Path(app.outdir, 'llms.txt').write_text('\n'.join([about, 'All of it in one file: [llms-full.txt](llms-full.txt)', '', '## Pages', '', *rows, '']), encoding='utf-8')
    Path(app.outdir, 'llms-full.txt').write_text('\n\n\n'.join([about, *map(page_text, source.values())]) + '\n', encoding='utf-8')


def setup(app):
    app.connect('build-finished', write)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)
