"""Rows rebuilt in models of every shape: gradients keep each bit, and no class is named."""

import copy

import pytest
import torch
import transformers

from offload.swap.tokenwise.home import MemoryHome
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.tokenwise import TokenWise

VOCABULARY, ROWS, LAYERS = 64, 256, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": ROWS,
}


def decoder(model, config, dropout, **options):
    options = {"num_key_value_heads": 2, "attention_dropout": dropout, **SIZES, **options}
    return model(config(bos_token_id=0, eos_token_id=1, **options))


MODELS = {
    "gpt2": lambda dropout: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=ROWS, n_embd=32, n_layer=LAYERS, n_head=4,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            bos_token_id=0, eos_token_id=1, loss_type="ForCausalLM",
        )
    ),
    "llama": lambda dropout: decoder(
        transformers.LlamaForCausalLM, transformers.LlamaConfig, dropout
    ),
    "qwen": lambda dropout: decoder(
        transformers.Qwen2ForCausalLM, transformers.Qwen2Config, dropout
    ),
    "mistral": lambda dropout: decoder(
        transformers.MistralForCausalLM, transformers.MistralConfig, dropout, sliding_window=64
    ),
    "bert": lambda dropout: transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **SIZES
        )
    ),
    "vit": lambda dropout: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
            image_size=128, patch_size=8,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
    ),
}  # fmt: skip


def loss_of(model, name, batch):
    dtype = next(model.parameters()).dtype
    if name == "vit":  # 256 patches and the class token
        images = torch.randn(batch, 3, 128, 128).to(dtype)
        return model(pixel_values=images, labels=torch.randint(2, (batch,))).loss
    tokens = torch.randint(VOCABULARY, (batch, ROWS))
    return model(input_ids=tokens, labels=tokens).loss


def gradients(model, name, batch, seed, rows=None):
    torch.manual_seed(seed)
    model.zero_grad()
    if rows is None:
        loss = loss_of(model, name, batch)
    else:
        with torch.autograd.graph.saved_tensors_hooks(rows.pack, rows.unpack):
            loss = loss_of(model, name, batch)
    loss.backward()
    return [loss.detach(), *(one.grad for one in model.parameters() if one.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_keep_each_bit(name, dropout, dtype, batch):
    torch.manual_seed(0)
    plain = MODELS[name](dropout).to(dtype).train()
    model = copy.deepcopy(plain)
    settings = Settings(alpha=0.5 if batch == 2 else 0.0, min_nbytes=1024)
    rows = TokenWise(model, MemoryHome(), settings)
    assert len(rows.block_names) == LAYERS
    for seed in range(2):  # the first one is recorded and verified
        expected = gradients(plain, name, batch, seed)
        found = gradients(model, name, batch, seed, rows)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)
    for report in rows.report():
        assert report.gave_up is None
        assert report.cut == (128 if batch == 2 else 0)
        assert not any("bit-identical" in reason for reason, _ in report.whole)
        # Projections, norms, the rotary, the MLP; attention's own tensors depend on the dropout.
        assert report.rebuilt_nbytes > (0.5 if dropout else 2) * report.whole_nbytes
