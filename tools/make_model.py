"""Train the small model that the package ships, anew: `python -m tools.make_model` (about two minutes on two cores).

The defaults of `llmbook pretrain`, the model saved beside the texts. Another machine adds up in another order, so the
last digits of its weights differ; what the book prints of the model is compared with the file that is shipped.
"""
import shutil, tempfile
from pathlib import Path

from llmbook.pretrain import PretrainConfig, pretrain, save_model

TARGET = Path(__file__).resolve().parent.parent/'llmbook'/'assets'/'shakespeare-model'


def main():
    with tempfile.TemporaryDirectory(prefix='llmbook-') as folder:
        run = pretrain(PretrainConfig(out=f'{folder}/shakespeare'))
        save_model(TARGET, run.model(), run.tokenizer)
        for name in ('metrics.jsonl', 'result.json'): shutil.copy(run.folder/name, TARGET)


if __name__ == '__main__': main()
