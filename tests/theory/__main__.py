"""``python -m tests.theory`` prints the table of responses of docs/theory.md, as Markdown."""

from tests.theory.responses import table
from train.analysis.plots import markdown_table

if __name__ == "__main__":
    print(markdown_table(table()))
