"""HellaSwag: which of four endings fits a text?

Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?". The validation set has
10,042 examples. Each is a line of JSON. This is one of them, folded, without four other fields:

    {"ind": 143, "activity_label": "Playing guitarra", "split": "val",
     "ctx": "A young man sits on a bed. the man",
     "endings": ["then wipes his face.",
                 "gets up and walks towards the camera.",
                 "lifts a shoe to his mouth.",
                 "starts playing an acoustic guitar."],
     "label": 3}

ctx is the context, and label the number of the right ending, counted from 0. The other three were
written by a program.

A language model can't be asked to choose, but it gives a probability to every text. So it reads the
context four times, each time with another ending. Its answer is the ending whose tokens it finds
likeliest on average.
"""
import hashlib
import http.client
import json
import os
import urllib.request

from fineweb import UserError, blame, one_line

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PATH = "hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # of that file

# -------------------------------------------------------------------------------------------------
# The file


def download(path=PATH, url=URL, sha256=SHA256):
    """Get the validation set and save it as path, unless that file exists.

    Raises UserError if that fails. The message says how to do it by hand.
    """
    if os.path.exists(path):
        return
    by_hand = f"save it as {path} by hand"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {one_line(error)}; {by_hand}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{url} sent something else than HellaSwag's validation set; {by_hand}")
    with blame(path), open(path, "wb") as f:
        f.write(data)


def is_example(example):
    """Return whether example, read from JSON, has a context, four endings and a label."""
    if not isinstance(example, dict):
        return False
    endings = example.get("endings")
    if not isinstance(endings, list) or len(endings) != 4:
        return False
    for text in (example.get("ctx"), *endings):
        if not isinstance(text, str) or text == "":
            return False
    return example.get("label") in (0, 1, 2, 3)


def read_examples(path):
    """Return the examples in the file at path, a list of dicts.

    Raises UserError if it can't be read, if it is empty, or if a line isn't an example.
    """
    examples = []
    with blame(path), open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            try:
                example = json.loads(line)
            except (ValueError, RecursionError):  # RecursionError: lists in lists in lists ...
                example = None
            if not is_example(example):
                raise UserError(f"{path}, line {number}: an example of HellaSwag has ctx, four "
                                "endings, and a label from 0 to 3")
            examples.append(example)
    if not examples:
        raise UserError(f"{path} is empty")
    return examples
