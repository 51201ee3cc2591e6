"""The one error of image sources, whose text is a sentence for the user, and what they say meanwhile."""

import warnings


class DataError(ValueError):
    """An image source that is missing, incomplete, unreadable or ambiguous."""


class DataWarning(UserWarning):
    """What a person should know about how their pictures and labels are read."""


warnings.filterwarnings("once", category=DataWarning)


def tell(sentence: str) -> None:
    """Say ``sentence`` as a DataWarning: once in a process, however often the data are opened."""
    warnings.warn_explicit(sentence, DataWarning, "data", 1)


def brief(error: BaseException) -> str:
    """The first 300 characters of what ``error`` says, on one line, for the brackets of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
