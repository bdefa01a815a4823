"""A server with OpenAI's protocol that answers the prompts of self-instruct by a script, and errs on purpose.

Knows the last line of each prompt of the package. What it says depends on the prompt and the seed alone.
"""

import random
from typing import Any


VERBS = ("Describe", "List", "Compare", "Explain", "Rewrite", "Count", "Name", "Translate", "Plan", "Correct")
THINGS = ("rivers", "recipes", "poems", "engines", "gardens", "letters", "bridges", "planets", "trains", "coins")
PLACES = ("Spain", "winter", "a village", "the north", "old books", "a kitchen", "the harbour", "March", "school")
SPOILT = (
    "Name rivers",  # too short
    "Draw a picture of a tall tree",  # keyword
    "- list the coins of Spain",  # begins with a sign
    "Name the capital of the country.",  # a seed
)


def answer(number: int, path: str, body: dict[str, Any]) -> tuple:
    """The answer to a request, as `serving` wants it."""
    chat = path.endswith("chat/completions")
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    text, reason = _text(prompt, chat, random.Random(f"{body['seed']} {prompt}"))
    content = {"message": {"content": text}} if chat else {"text": text}
    return 200, {"choices": [content | {"finish_reason": reason}]}, {}


def _text(prompt: str, chat: bool, rng: random.Random) -> tuple[str, str]:
    last = prompt.rstrip().splitlines()[-1]
    if "Fixed labels:" in last or last.startswith("Does this task"):
        return rng.choice((" Yes", " No", " No", " maybe")), "stop"
    if last == "Input:" or (chat and '"Input:" and the next with "Output:"' in prompt):
        start = "Input: " if chat else " "
        output = rng.choice(("fine", "good", "", "small"))
        return f"{start}{rng.choice(('none', 'a stone', 'small'))}\nOutput: {output}\n\nTask: more", "stop"
    if last == "Label:" or (chat and '"Label:" and the next with "Input:"' in prompt):
        return f"{'Label: ' if chat else ' '}{rng.choice(('yes', 'no'))}\nInput: {rng.choice(PLACES)}", "stop"
    tasks = [
        rng.choice(SPOILT)
        if rng.random() < 0.4
        else " ".join((rng.choice(VERBS), "the", rng.choice(THINGS), "of", rng.choice(PLACES), rng.choice(THINGS)))
        for _ in range(8)
    ]
    first = 1 if chat else 9
    lines = "\n".join(f"{first + place}. {task}" for place, task in enumerate(tasks))
    return (f"Here they are:\n{lines}" if chat else lines.removeprefix("9.")), rng.choice(("stop", "length"))
