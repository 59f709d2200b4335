"""Rows rebuilt in models of every shape: gradients keep each bit, and no class is named."""

import contextlib
import copy
import threading

import pytest
import torch
import transformers

import offload.errors
from offload import ActivationSwap
from offload.swap.tokenwise.keeper import MemoryKeeper
from offload.swap.tokenwise.plans import Settings
from offload.swap.tokenwise.tokenwise import TokenWise

VOCABULARY, ROWS, LAYERS = 64, 256, 2
WIDE = 128  # its activations are large enough to be swapped by default
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": ROWS,
}


def wide_llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDE, intermediate_size=2 * WIDE,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=ROWS, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


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
    rows = TokenWise(model, MemoryKeeper(), settings)
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


def training_loop(model, optimizer, _engine):
    """Accumulation, clipping, evaluation, two forwards before a backward."""
    values = []
    for step in range(6):
        model.train()
        losses = [loss_of(model, "llama", 2) for _ in range(1 + step % 2)]
        sum(losses).backward()
        values.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            values += [loss_of(model, "llama", 1).item(), *(loss.item() for loss in losses)]
    return values


@pytest.mark.parametrize("alpha", [0.0, 0.5, "auto"])
def test_training_under_the_engine(alpha, compare):
    same = compare(
        wide_llama,
        lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
        training_loop,
        config={"recompute": "tokenwise", "alpha": alpha},
    )
    assert same.moved_roles() >= {"weight", "gradient", "state", "activation"}
    reports = [one for one in same.engine.tokenwise.report() if one.rebuilt_nbytes]
    assert len(reports) == 3
    if alpha == "auto":
        assert all(one.solution is not None and one.solution.fits for one in reports)
        assert all(one.cost.backward_s > 0 for one in reports)
    else:
        assert {one.cut for one in reports} == {alpha * ROWS}
        assert same.engine.notices == []


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_rows_are_rebuilt_before_their_weights_are_stepped(alpha, compare):
    def loop(model, optimizer, _engine):
        losses = []
        for _ in range(6):
            loss = loss_of(model, "llama", 2)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    same = compare(
        wide_llama,
        lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
        loop,
        config={"recompute": "tokenwise", "alpha": alpha, "step_in_backward": True},
    )
    assert {one.cut for one in same.engine.tokenwise.report()} == {alpha * ROWS}
    assert "gradient" not in same.moved_roles()


def test_a_block_that_the_model_has_not(starve):
    model = wide_llama()
    with pytest.raises(offload.errors.ConfigError, match=r"no module 'model\.h'"):
        starve(model, None, config={"recompute": "tokenwise", "blocks": ["model.h"]})


def test_reasons_are_told(starve):
    model = wide_llama()
    engine = starve(model, None, config={"recompute": "tokenwise"})
    tokens = torch.randint(VOCABULARY, (1, 40))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert any("40 tokens are too few rows" in notice for notice in engine.notices)


def step_gradients(model, swap, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    if swap is None:
        loss = loss_of(model, "llama", 2)
    else:
        with swap:
            loss = loss_of(model, "llama", 2)
    loss.backward()
    return [loss.detach(), *(one.grad for one in model.parameters())]


def test_without_an_engine_too(tmp_path):
    plain = wide_llama().train()
    model = copy.deepcopy(plain)
    with contextlib.closing(
        ActivationSwap(model, nvme=tmp_path, recompute="tokenwise", alpha=0.5)
    ) as swap:
        for seed in range(3):
            loss_of(model, "llama", 2).backward()  # outside of the context nothing is learnt
            expected = step_gradients(plain, None, seed)
            for one, other in zip(expected, step_gradients(model, swap, seed), strict=True):
                assert torch.equal(one, other)
        assert {report.cut for report in swap.tokenwise.report()} == {ROWS // 2}
        assert all(report.rebuilt_nbytes > 0 for report in swap.tokenwise.report())
        assert swap.journal.totals.written_nbytes > 0


def test_what_checkpoint_recomputes_is_left_to_it(tmp_path):
    plain = wide_llama().train()
    model = copy.deepcopy(plain)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with contextlib.closing(
        ActivationSwap(model, nvme=tmp_path, recompute="tokenwise", alpha=0.5)
    ) as swap:
        for seed in range(2):
            expected = step_gradients(plain, None, seed)
            for one, other in zip(expected, step_gradients(model, swap, seed), strict=True):
                assert torch.equal(one, other)
        assert not any(report.rebuilt_nbytes for report in swap.tokenwise.report())


def test_recompute_without_a_model_is_refused(tmp_path):
    with pytest.raises(offload.errors.ConfigError, match="pass model="):
        ActivationSwap(nvme=tmp_path, recompute="tokenwise")


def test_an_unknown_block_leaves_nothing_open(tmp_path):
    before = set(threading.enumerate())
    with pytest.raises(offload.errors.ConfigError, match=r"no module 'model\.h'"):
        ActivationSwap(wide_llama(), nvme=tmp_path, recompute="tokenwise", blocks=["model.h"])
    assert set(threading.enumerate()) <= before
