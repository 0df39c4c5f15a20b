"""The tokenizer and sampling."""
import inspect
import socket

from fineweb import gpt2_encoding


def test_tokenizer_is_gpt2s_and_needs_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # nothing from an earlier download
    encoding = inspect.unwrap(gpt2_encoding)()  # not the one that was kept
    hello = encoding.encode("Hello, I'm a language model,")
    assert hello == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.n_vocab == 50257
    assert encoding.eot_token == 50256
    text = "naïve café 東京 \t\n  x=1; don't 12345"
    assert encoding.decode(encoding.encode(text)) == text
    for number in range(50257):
        assert encoding.encode_single_token(encoding.decode_single_token_bytes(number)) == number
