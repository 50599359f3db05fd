"""A corpus that takes no time."""

from pathlib import Path


def write_corpus(folder: Path) -> Path:
    """Twenty documents of about 2000 bytes."""
    folder.mkdir(exist_ok=True)
    for number in range(20):
        words = " ".join(f"word{(number * 7 + i * i) % 97}" for i in range(300))
        (folder / f"{number:02}.txt").write_text(words)
    return folder
