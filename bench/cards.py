"""Model cards: Markdown wrapped as all prose of this repository is."""

import textwrap

WIDTH = 120


def wrapped(card: str) -> str:
    """`card` with its paragraphs and list items wrapped at WIDTH columns; tables, headings and code are left alone."""
    blocks: list[list[str]] = []  # a paragraph or list item, or one line of anything else
    going_on = in_code = False
    for line in card.splitlines():
        fence = line.startswith("```")
        prose = bool(line) and not (in_code or fence or line.startswith(("|", "#")))
        in_code ^= fence
        if prose and going_on and not line.startswith("- "):
            blocks[-1].append(line.strip())
        else:
            blocks.append([line])
        going_on = prose
    return "".join(_filled(block) for block in blocks)


def _filled(block: list[str]) -> str:
    text = " ".join(block)
    if len(block) == 1 and (len(text) <= WIDTH or text.startswith("|")):
        return f"{text}\n"
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) + "\n"
