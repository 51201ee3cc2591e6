"""The one error of image sources, whose text is a sentence for the user."""


class DataError(ValueError):
    """An image source that is missing, incomplete, unreadable or ambiguous."""


def brief(error: BaseException) -> str:
    """The first 300 characters of what ``error`` says, on one line, for the brackets of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"
