"""Rows and reward functions that the tests of the evaluation share: a text begins with its score."""


def by_text(prompts, completions, **columns):
    """The number that a completion begins with."""
    return [float(text.split()[0]) for text in completions]


def by_length(prompts, completions, **columns):
    """The number of characters."""
    return [float(len(text)) for text in completions]


def pairs(number=40):
    """Preference rows of which `by_text` gets 40 % right, with 20 % ties."""
    return [
        {"prompt": f"p{n}", "chosen": f"{n % 5} it is so. Quite so.", "rejected": "2 it is not so. Not at all."}
        for n in range(number)
    ]
