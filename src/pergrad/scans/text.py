"""What data sets, models and exceptions say, made fit to store and to show.

Owns: messages of exceptions whose words cannot be had, text that no encoding takes, and what may
not reach a terminal or a spreadsheet.
Does not know: where the text goes.
"""

MOST_LETTERS = 2000  # of a message that is stored


def storable(text: str) -> str:
    r"""The text with what UTF-8 lacks (lone surrogates) written out.

    >>> storable("caf\u00e9 \ud800")
    'café \\ud800'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def message_of(error: BaseException, most: int = MOST_LETTERS) -> str:
    """Type and words of an exception, also where asking for its words raises."""
    try:
        words = str(error)
    except Exception as another:
        words = f"(its message cannot be had: str() raised {type(another).__name__})"
    return storable(f"{type(error).__name__}: {words}")[:most]


def printable(text: object) -> str:
    r"""One line without anything that drives a terminal.

    >>> printable("a\x1b[31mb\nc")
    'a\\x1b[31mb c'
    """
    shown = storable(str(text)).replace("\n", " ").replace("\t", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def printable_lines(text: object) -> str:
    """The same, line by line."""
    return "\n".join(printable(line) for line in str(text).split("\n"))
