"""Write README.md from the welcome page: `python -m tools.readme`.

A cell tagged `remove-cell` is in the README and not in the book; one tagged `readme-skip` is in neither. Links to pages
become links into `nbs/`, and the drawing becomes a file in `_static/`.
"""
import re, sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'_ext'))
from nbdev_reader import split_directives      # noqa: E402


def readme(page: Path) -> tuple[str, dict[str, str]]:
    "The README's text, and the drawings it shows as {file name: SVG}."
    parts, drawings = [], {}
    for cell in nbformat.read(page, as_version=4).cells:
        if 'readme-skip' in cell.metadata.get('tags', []): continue
        if cell.cell_type == 'markdown':
            parts.append(re.sub(r'\]\((\w+\.(?:ipynb|md))\)', r'](nbs/\1)', cell.source))
            continue
        directives, source = split_directives(cell.source)
        if 'remove-input' not in cell.metadata.get('tags', []): parts.append(f'```python\n{source}\n```')
        for out in cell.outputs:
            if out.output_type == 'error': parts.append(f'```\n{chr(10).join(out.traceback)}\n```')
            elif svg := out.data.get('image/svg+xml'):
                name = f"_static/{directives['label']}.svg"
                drawings[name] = svg
                parts.append(f"![{directives['fig-alt']}]({name})")
            else: parts.append(f"```\n{out.data['text/plain']}\n```")
    return '\n\n'.join(parts) + '\n', drawings


def main():
    text, drawings = readme(ROOT/'nbs'/'index.ipynb')
    (ROOT/'README.md').write_text(text, encoding='utf-8', newline='\n')
    for name, svg in drawings.items(): (ROOT/name).write_text(svg, encoding='utf-8', newline='\n')


if __name__ == '__main__': main()
