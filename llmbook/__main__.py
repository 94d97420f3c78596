"""`python -m llmbook` does what the command `llmbook` does."""
import sys

from llmbook.cli import main

if __name__ == "__main__": sys.exit(main())
