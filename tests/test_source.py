"The notebooks are the only source: modules, README and requirements follow from them, and every page keeps the book's rules."
import ast, configparser, json, os, re, shutil, subprocess, sys, tomllib
from dataclasses import is_dataclass
from importlib import import_module
from inspect import Parameter
from pathlib import Path

import nbformat
import pytest
from fastcore.docments import docments
from tools.readme import readme

sys.path.insert(0, str(Path(__file__).parent.parent/'_ext'))
from nbdev_reader import read_notebook      # noqa: E402

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
MODULES = [p.stem for p in sorted((ROOT/'llmbook').glob('*.py')) if not p.stem.startswith('_')]
PROJECT = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT/'settings.ini')
by_name = pytest.mark.parametrize('page', NOTEBOOKS, ids=lambda p: p.stem)


def code_cells(page): return [c for c in nbformat.read(page, as_version=4).cells if c.cell_type == 'code']
def tags(cell): return cell.metadata.get('tags', [])
def files(folder, pattern): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob(pattern))}


def nbdev(command, cwd):
    env = {**os.environ, 'PYTHONPATH': str(cwd)}
    return subprocess.run([sys.executable, '-c', f'from nbdev.cli import {command}; {command}()'], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    "The project's source in a folder of its own."
    for folder in ('nbs', 'llmbook'): shutil.copytree(ROOT/folder, tmp_path/folder, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for file in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/file, tmp_path)
    return tmp_path


def test_export_is_in_step(copy):
    before = files(copy/'llmbook', '*.py')
    for path in (copy/'llmbook').glob('*.py'):
        if path.name not in ('__init__.py', '__main__.py'): path.unlink()
    done = nbdev('nbdev_export', copy)
    assert done.returncode == 0, done.stderr
    assert files(copy/'llmbook', '*.py') == before, 'run `make pages`: the modules and the notebooks differ'


def test_clean_changes_nothing(copy):
    before = files(copy/'nbs', '*.ipynb')
    done = nbdev('nbdev_clean', copy)
    assert done.returncode == 0, done.stderr
    assert files(copy/'nbs', '*.ipynb') == before, 'run `nbdev_clean`: a notebook holds more than source and outputs'


def test_nbdev_test(copy):
    "nbdev's own runner reads our pages; three of them, since every page is run and compared as well."
    for path in (copy/'nbs').glob('*.ipynb'):
        if path.stem not in ('index', '00_start', '02_words'): path.unlink()
    done = nbdev('nbdev_test', copy)
    assert done.returncode == 0 and 'Success' in done.stdout + done.stderr, done.stdout + done.stderr


def test_every_module_is_a_page():
    exports = {m[1]: p.stem for p in NOTEBOOKS for c in code_cells(p) if (m := re.match(r'#\| default_exp (\w+)', c.source))}
    assert sorted(exports) == MODULES
    assert all((ROOT/'nbs'/'api'/f'{m}.md').exists() for m in MODULES)
    toc = (ROOT/'_toc.yml').read_text(encoding='utf-8')
    assert all(f'nbs/api/{m}\n' in toc for m in MODULES) and all(f'nbs/{p.stem}\n' in toc for p in NOTEBOOKS)


EXPORTS = {      # what later pages and users rely on
    'core': 'TEXTS load_text check_count check_number set_seed device_fault get_device count_parameters PALETTE Picture show_tokens show_heatmap show_flow new_plot show_plot',
    'budget': 'GPT_SIZES PEAK_FLOPS count_gpt_parameters training_flops forward_flops memory_bytes training_time training_cost',
    'words': 'SPLIT_PATTERN split_words Vocabulary WordTokenizer',
    'checking': 'Report Exercise exercise all_exercises find_exercise check check_file NotYet main',
    'data': 'TokenDataset TokenLoader make_dataloader split_ids TokenFile tokenize_files fingerprint',
    'bpe': 'GPT2_SPLIT count_pairs merge_pair train_merges BPETokenizer gpt2_tokenizer gpt2_encoding',
    'embedding': 'TokenEmbedding PositionEmbedding',
    'attention': 'softmax causal_mask scaled_dot_product_attention SelfAttention CausalSelfAttention',
    'multihead': 'MultiHeadAttention',
    'transformer': 'LayerNorm GELU FeedForward TransformerBlock',
    'gpt': 'GPTConfig GPT2_SIZES GPT GPT2_NAMES',
    'generate': 'apply_temperature filter_top_k filter_top_p next_probabilities draw KVCache stream_batch generate_batch stream generate Int8Linear quantize_int8',
    'loss': 'next_token_loss perplexity bits_per_byte linear_cross_entropy model_loss evaluate_loss',
    'train': 'make_optimizer TrainConfig History accumulate_gradients Trainer longest_copy',
    'schedule': 'WarmupCosine',
    'checkpoint': 'save_checkpoint CheckpointError read_checkpoint load_checkpoint load_model Checkpoints',
    'distributed': 'World join_world share_batches DistributedTrainer DistributedCheckpoints',
    'pretrain': 'PretrainConfig read_config write_config make_tokenizer cut_by_bytes Run whole_text score start_run speed_up train_run write_sample pretrain resume write_report save_model load_pretrained',
    'open_weights': 'GPT2_RELEASES Release gpt2_name read_gpt2_config find_gpt2 fetch_gpt2 load_gpt2 load_gpt2_tokenizer save_gpt2 open_model',
    'cli': 'COMMANDS Resume Generate Evaluate Info Tokenize Doctor main',
}


@pytest.mark.parametrize('module', MODULES)
def test_nothing_that_others_use_has_gone(module):
    exported = import_module(f'llmbook.{module}').__all__
    assert not set(EXPORTS[module].split()) - set(exported)
    assert not [name for name in exported if name.startswith('_')]


def test_a_module_imports_only_earlier_pages():
    order = [m[1] for p in NOTEBOOKS for c in code_cells(p) if (m := re.match(r'#\| default_exp (\w+)', c.source))]
    for name in MODULES:
        tree = ast.parse((ROOT/'llmbook'/f'{name}.py').read_text(encoding='utf-8'))
        own = {(n.module or '').removeprefix('llmbook.') for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('llmbook'))}
        assert own <= {'', *order[:order.index(name)]}, f'{name} imports {own}'      # '': the package itself, for its version


def test_readme_is_the_welcome_page():
    text, drawings = readme(ROOT/'nbs'/'index.ipynb')
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, 'run `python -m tools.readme`'
    assert all((ROOT/name).read_text(encoding='utf-8') == svg for name, svg in drawings.items())
    local = re.findall(r'\]\((?!https?:|#)([^)]+)\)', text)
    assert local and all((ROOT/link).exists() for link in local), local


def public():
    for module in map(import_module, (f'llmbook.{m}' for m in MODULES)):
        for name in module.__all__:
            obj = getattr(module, name)
            if not callable(obj) or isinstance(obj, type) and issubclass(obj, BaseException): continue
            own = is_dataclass(obj) or not isinstance(obj, type)
            yield f'{module.__name__}.{name}', obj, obj if own else vars(obj).get('__init__', lambda: None)      # without one of its own there is nothing to say
            for key, method in vars(obj).items() if isinstance(obj, type) else ():
                if isinstance(method, (classmethod, staticmethod)): method = method.__func__
                if not key.startswith('_') and callable(method): yield f'{module.__name__}.{name}.{key}', method, method


@pytest.mark.parametrize('name, obj, signature', list(public()), ids=lambda x: x if isinstance(x, str) else '')
def test_every_public_name_is_documented(name, obj, signature):
    assert obj.__doc__ and obj.__doc__.strip(), f'{name} has no docstring'
    for key, doc in docments(signature, full=True, returns=False).items():
        if key in ('self', 'cls') or doc.kind == Parameter.VAR_KEYWORD: continue     # docments reads no comment of **
        assert doc.anno is not None and 'empty' not in repr(doc.anno), f'{name}: {key} has no type'
        assert doc.docment, f'{name}: {key} has no comment'


def imports(name):
    tree = ast.parse((ROOT/'llmbook'/f'{name}.py').read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name.split('.')[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split('.')[0]


def test_requirements_are_what_the_modules_import():
    needed = {i for m in MODULES for i in imports(m)} - set(sys.stdlib_module_names) - {'llmbook'}
    declared = {re.match(r'[\w-]+', r)[0].replace('-', '_') for r in PROJECT['dependencies']}
    assert needed == declared
    assert all(re.fullmatch(r'[\w-]+>=[\d.]+', r) for r in PROJECT['dependencies']), 'lower bounds only'
    assert not CONFIG['DEFAULT'].get('requirements'), 'requirements stand in pyproject.toml alone'


def test_tools_are_pinned():
    lines = [l for l in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if l and not l.startswith('#')]
    assert all(re.fullmatch(r'[\w.-]+==[\w.+!-]+( ; .+)?', l) for l in lines), lines
    pinned = {l.split('==')[0].lower().replace('_', '-') for l in lines}
    wanted = [re.match(r'[\w-]+', r)[0] for group in (PROJECT['dependencies'], *PROJECT['optional-dependencies'].values()) for r in group]
    assert {w.lower() for w in wanted} <= pinned
    assert 'torch==2.13.0' in lines


def test_settings_and_project_agree():
    settings = CONFIG['DEFAULT']
    assert PROJECT['name'] == settings['lib_name'] and PROJECT['description'] == settings['description']
    assert PROJECT['requires-python'] == f">={settings['min_python']}"
    assert import_module('llmbook').__version__ == settings['version']
    assert f"version: {settings['version']}" in (ROOT/'CITATION.cff').read_text(encoding='utf-8').splitlines()
    assert f"## {settings['version']}" in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8').splitlines()


def test_one_address():
    "Every link to the repository is the one that settings.ini states."
    url, found = CONFIG['DEFAULT']['git_url'], {}
    for path in [*ROOT.glob('*.*'), *(ROOT/'nbs').rglob('*.*'), *(ROOT/'.github').rglob('*.yml'), *(ROOT/'.binder').glob('*')]:
        if path.suffix in ('.ipynb', '.md', '.yml', '.toml', '.ini', '.cff', '.txt'):
            found |= {m: path.name for m in re.findall(r'https://github\.com/[\w-]+/llmbook', path.read_text(encoding='utf-8'))}
    assert set(found) == {url}, found


@by_name
def test_page_can_be_opened_in_colab(page):
    cells = [c for c in code_cells(page) if 'google.colab' in c.source]
    if not code_cells(page): return
    assert len(cells) == 1 and f"git+{CONFIG['DEFAULT']['git_url']}" in cells[0].source
    assert '#| hide' in cells[0].source or 'remove-cell' in tags(cells[0])


@by_name
def test_code_fits_its_column(page):
    wide = [line for c in code_cells(page) for line in c.source.splitlines() if len(line) > 79 and not line.startswith('#|')]
    assert not wide, wide


@by_name
def test_directives_are_known_and_stand_at_the_top(page):
    for cell in read_notebook(page.read_text(encoding='utf-8')).cells:
        if cell.cell_type == 'code': assert not re.search(r'^#\s*\|', cell.source, re.M), cell.source


@by_name
def test_pictures_are_described(page):
    for cell in code_cells(page):
        if not any('image/svg+xml' in o.get('data', {}) for o in cell.outputs): continue
        for directive in ('label: fig-', 'fig-cap: ', 'fig-alt: '):
            assert re.search(rf'^#\| {directive}\S', cell.source, re.M), f'{page.stem}: no {directive} in\n{cell.source[:200]}'


@by_name
def test_outputs_hold_no_path_of_a_machine(page):
    outputs = json.dumps([c.outputs for c in code_cells(page)])
    assert not re.search(rf'({re.escape(str(ROOT))}|/home/|/Users/|/tmp/|/root/|[A-Z]:\\\\)', outputs)


@by_name
def test_page_begins_as_pages_do(page):
    first = nbformat.read(page, as_version=4).cells[0].source
    assert re.match(r'# [^\n]+\n\n> [^\n]+', first), 'a title, then one sentence behind `>`'
