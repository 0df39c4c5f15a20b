"""The model: its shape, and what a forward pass may and may not do."""
import math

import pytest
import torch

from train_gpt2 import (
    GPT,
    MLP,
    OPENAI_SIZES,
    Block,
    CausalSelfAttention,
    GPTConfig,
    KVCache,
    build_model,
    choose_config,
)

TINY = GPTConfig(
    block_size=16,
    vocab_size=50257,
    n_layer=2,
    n_head=2,
    n_embd=32,
)


def parameter_shapes(config):
    """Return {name: shape} of a GPT's parameters."""
    with torch.device("meta"):  # shapes without numbers: no memory, no time
        return {name: p.shape for name, p in GPT(config).named_parameters()}


def count(config):
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def test_number_of_parameters():
    assert count(GPTConfig()) == 124_439_808


def test_the_names_are_those_of_openais_checkpoint():
    with torch.device("meta"):
        names = GPT(GPTConfig()).state_dict().keys()
    assert {
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight",
        "transformer.ln_f.bias", "lm_head.weight",
    } <= names


@pytest.mark.parametrize("name, parameters", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200),
])
def test_names_and_shapes_are_those_of_hugging_face(name, parameters):
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = parameter_shapes(GPTConfig(**OPENAI_SIZES[name]))
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**OPENAI_SIZES[name]))
    theirs = {name: p.shape for name, p in model.named_parameters()}
    assert sum(shape.numel() for shape in ours.values()) == parameters
    assert ours.keys() == theirs.keys()
    for name in ours:  # some are stored transposed
        assert sorted(ours[name]) == sorted(theirs[name]), name


def new_model(**given):
    """Return the model of a run with these settings, without numbers."""
    cfg = choose_config(dict(data="a.txt") | given, None, torch.device("cpu"))
    with torch.device("meta"):
        return build_model(cfg, None)


@pytest.mark.parametrize("name, n_layer, n_embd", [
    ("gpt3-small", 12, 768), ("gpt3-medium", 24, 1024), ("gpt3-large", 24, 1536),
    ("gpt3-xl", 24, 2048),
])
def test_gpt3s_small_models(name, n_layer, n_embd):
    model = new_model(model=name)
    assert model.config.block_size == 2048
    # 12 C^2 weights and 13 C vectors in a layer, two C in the last LayerNorm
    layers = n_layer * (12 * n_embd**2 + 13 * n_embd)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == (50304 + 2048) * n_embd + layers + 2 * n_embd


@pytest.mark.parametrize("given, block_size", [
    (dict(model="laptop"), 64), (dict(model="laptop", seq_len=100), 100),
    (dict(model="gpt2"), 1024),
])
def test_a_new_model_has_no_position_that_is_never_trained(given, block_size):
    model = new_model(**given)
    assert model.config.block_size == model.transformer.wpe.weight.shape[0] == block_size
    assert model.config.vocab_size == 50304


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_embd 32 .* n_head 3"):
        GPT(GPTConfig(n_embd=32, n_head=3))


def test_block_adds_to_the_residual_stream():
    torch.manual_seed(0)
    block = Block(TINY)
    x = torch.randn(2, 5, 32)
    x_before = x.clone()
    assert not torch.allclose(block(x), x)
    assert torch.equal(x, x_before)
    for name, p in block.named_parameters():
        if "c_proj" in name:  # what a branch writes is silenced: the stream must pass unchanged
            torch.nn.init.zeros_(p)
    assert torch.equal(block(x), x)


def test_mlp_sees_each_token_alone():
    torch.manual_seed(0)
    mlp = MLP(TINY)
    x = torch.randn(1, 5, 32)
    assert torch.allclose(mlp(x)[:, 3:4], mlp(x[:, 3:4]), atol=1e-6)


def test_attention_by_hand():
    torch.manual_seed(0)
    layer = CausalSelfAttention(TINY)  # two heads of 16 numbers
    x = torch.randn(3, 5, 32)
    q, k, v = layer.c_attn(x).split(32, dim=2)
    y = torch.zeros(3, 5, 32)
    for b in range(3):
        for start in (0, 16):  # where a head's numbers begin
            head = slice(start, start + 16)
            for t in range(5):
                scores = [(q[b, t, head] @ k[b, other, head]).item() / 4 for other in range(t + 1)]
                total = sum(math.exp(score) for score in scores)
                for other, score in enumerate(scores):
                    y[b, t, head] += math.exp(score) / total * v[b, other, head].detach()
    assert torch.allclose(layer(x), layer.c_proj(y), atol=1e-5)


def test_the_scores_of_all_pairs_never_stand_in_memory():
    T = 256
    layer = CausalSelfAttention(TINY)
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(1, T, 32))
    assert sizes and max(sizes) < T * T


def test_a_later_token_never_changes_an_earlier_logit():
    torch.manual_seed(0)
    model = GPT(TINY)
    idx = torch.randint(50257, (1, 16))
    before, _ = model(idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 50257
        after, _ = model(changed)
        assert torch.allclose(after[:, :t], before[:, :t], atol=1e-6)
        difference = (after[:, t:] - before[:, t:]).abs().amax(dim=(0, 2))
        assert difference.min() > 1e-6  # and it does change all later ones


def test_order_matters():
    torch.manual_seed(0)
    one_layer = GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=32))  # only wpe can tell
    there, _ = one_layer(torch.tensor([[5, 6, 7]]))
    back, _ = one_layer(torch.tensor([[6, 5, 7]]))
    assert not torch.allclose(there[:, -1], back[:, -1], atol=1e-4)


def test_forward_returns_logits_and_no_loss():
    logits, loss = GPT(TINY)(torch.randint(50257, (3, 7)))
    assert logits.shape == (3, 7, 50257)
    assert loss is None


def test_hidden_is_what_lm_head_reads():
    torch.manual_seed(0)
    model = GPT(TINY)
    idx = torch.randint(50257, (3, 7))
    x = model.hidden(idx)
    assert x.shape == (3, 7, 32)
    assert torch.equal(model.lm_head(x), model(idx)[0])


def test_a_sequence_longer_than_block_size_is_refused():
    idx = torch.zeros(1, 17, dtype=torch.int64)
    with pytest.raises(ValueError, match="17 tokens .* block_size, 16"):
        GPT(TINY)(idx)


@pytest.mark.parametrize("first", [1, 5, 16])
def test_with_a_cache_the_vectors_are_the_same(first):
    torch.manual_seed(0)
    model = GPT(TINY)
    idx = torch.randint(50257, (3, 16))
    expected = model.hidden(idx)  # (3, 16, 32)
    cache = KVCache(model)
    assert cache.length == 0
    for t in range(first, 17):
        x = cache.newest_vector(idx[:, :t])  # (3, 32)
        assert torch.allclose(x, expected[:, t - 1], atol=1e-5)
        assert cache.length == t


def test_what_the_cache_holds_is_not_computed_again():
    torch.manual_seed(0)
    model = GPT(TINY)
    idx = torch.randint(50257, (3, 6))
    expected = model.hidden(idx)[:, -1]
    cache = KVCache(model)
    cache.newest_vector(idx[:, :5])
    idx[:, :5] = 0  # nobody looks at them any more
    assert torch.allclose(cache.newest_vector(idx), expected, atol=1e-5)


def test_the_first_loss_is_that_of_a_guess():
    torch.manual_seed(0)
    idx = torch.randint(50257, (4, 17))
    wide = GPT(GPTConfig(block_size=32, n_layer=1))  # as wide as GPT-2
    for model in (GPT(TINY), wide):
        _, loss = model(idx[:, :16], idx[:, 1:])
        assert abs(loss.item() - math.log(50257)) < 0.3


def test_the_loss_is_the_mean_of_minus_log_probability():
    torch.manual_seed(0)
    model = GPT(TINY)
    idx = torch.randint(50257, (2, 6))
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    probabilities = logits.double().softmax(dim=-1)
    total = 0.0
    for b in range(2):
        for t in range(5):
            total -= math.log(probabilities[b, t, idx[b, t + 1]].item())
    assert math.isclose(loss.item(), total / 10, rel_tol=1e-5)


def test_the_loss_of_bfloat16_logits_is_computed_in_float32():
    idx = torch.randint(50257, (2, 6))
    logits, loss = GPT(TINY).bfloat16()(idx, idx)
    expected = -logits.float().log_softmax(dim=-1).gather(2, idx[:, :, None]).mean()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, expected)


def test_no_gradient_is_made_for_logits_beside_a_loss():
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16))
    idx = torch.randint(64, (2, 8))
    logits, loss = model(idx, idx)
    assert loss.requires_grad
    assert not logits.requires_grad  # so torch.compile has nothing to make one for
    alone, _ = model(idx)
    assert alone.requires_grad
    assert torch.equal(alone, logits)


def test_one_matrix_goes_in_and_out():
    model = GPT(TINY)
    assert model.lm_head.weight is model.transformer.wte.weight
    model(torch.tensor([[1, 2]]))[0].sum().backward()
    grad = model.transformer.wte.weight.grad
    assert grad[40_000].abs().sum() > 0  # a token that wasn't read is still scored


def test_initialisation():
    torch.manual_seed(0)
    config = GPTConfig(block_size=256, vocab_size=1000, n_layer=8, n_head=2, n_embd=128)
    for name, p in GPT(config).named_parameters():
        if name.endswith("c_proj.weight"):
            assert abs(p.std().item() / (0.02 / 4) - 1) < 0.03  # sqrt(2 * 8 layers) = 4
        elif p.dim() == 2:
            assert abs(p.std().item() / 0.02 - 1) < 0.03
        elif name.endswith("weight"):
            assert (p == 1).all()
        else:
            assert (p == 0).all()
