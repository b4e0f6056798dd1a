"""What a model must do whatever is in it: look back only, stay in its document, start where it
should; and each idea, switched off, is the rung before it."""

import itertools
import math
import zlib
from dataclasses import replace

import pytest
import torch
from torch import nn

import recipes
from kernels.attention import packed_keys
from kernels.norm import rms_norm as norm
from model import (
    GPT,
    Attention,
    Extras,
    GPTConfig,
    Layer,
    Linear,
    Phase,
    bigram_hash,
    composed_heads,
    exclude_own_value,
    flops_per_token,
    init_weights,
    layer_plan,
    mean_keys,
    num_parameters,
    parameter_entry,
    rotary,
    rotary_frequencies,
    shift_still_half,
    sign_hash,
    smear,
)
from recipes import RECORDS, edit, pocket

LADDER = list(RECORDS)


def model_of(record: int, *, noise: float = 0.3, last: bool = False, **changes) -> nn.Module:
    """A small model of a record in float64, its parameters away from zero: all paths carry."""
    recipe = edit(pocket(RECORDS[record]), num_heads=2, head_dim=16, num_layers=4, **changes)
    model = recipes.build_model(recipe, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += noise * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    model.stream_dtype = torch.float64
    for part in model.modules():
        if isinstance(part, Linear):
            part.compute_dtype = torch.float64
    step = recipe.num_iterations - 1 if last else 0
    model.set_phase(recipes.phase(step, recipe))
    return model.eval()


def row(T: int, bos: tuple[int, ...] = (0,), seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(256, (1, T), generator=torch.Generator().manual_seed(seed))
    tokens[0, list(bos)] = 256
    return tokens


@torch.no_grad()
def reach(model: nn.Module, tokens: torch.Tensor, at: int) -> set[int]:
    """Positions whose output changes when the token at `at` does."""
    changed = tokens.clone()
    changed[0, at] = (changed[0, at] + 1) % 256
    before, after = model.hidden(tokens), model.hidden(changed)
    return set(((before - after).abs().amax(-1)[0] > 1e-12).nonzero().flatten().tolist())


# --- looking back only, and only into the own document --------------------------------------------

@pytest.mark.parametrize("record", LADDER)
def test_no_position_sees_a_later_token(record):
    model = model_of(record)
    reached = reach(model, row(48), at=20)
    assert min(reached) == 20 and reached >= {20, 21}


@pytest.mark.parametrize("record", [r for r in LADDER if r >= 12])
@pytest.mark.parametrize("last", [False, True])
def test_documents_do_not_see_each_other(record, last):
    """But for the token before: smear and bigrams look one back, as in the records. The key offset
    (#53, #62) is left out here: with it a document's first key holds some of the one before.
    """
    model = model_of(record, last=last, key_offset=False)
    reached = reach(model, row(64, bos=(0, 30)), at=20)
    assert min(reached) == 20 and max(reached) < 30
    one_back = RECORDS[record].model.smear or RECORDS[record].model.bigram
    reached = reach(model, row(64, bos=(0, 30)), at=29)
    assert (max(reached) >= 30) == one_back


def test_rows_before_packing_see_everything_before():
    assert max(reach(model_of(11), row(64, bos=(0, 30)), at=20)) == 63


@pytest.mark.parametrize("layers, window", [(1, 9), (2, 9), (3, 5)])
def test_a_window_has_an_edge_at_every_depth(layers, window):
    """Through L layers a token is seen up to L * (window - 1) positions later, and no further."""
    config = GPTConfig(num_layers=layers, num_heads=2, head_dim=8, vocab_size=257, seq_len=128,
                       compute_dtype="fp32", head="fp32", packed=True)
    model = GPT(config)
    init_weights(model, 0)
    model = model.double()
    model.stream_dtype = torch.float64
    for part in model.modules():
        if isinstance(part, Linear):
            part.compute_dtype = torch.float64
    model.set_phase(Phase(window=window))
    reached = reach(model, row(128), at=40)
    assert reached == set(range(40, 40 + layers * (window - 1) + 1))


def test_short_layers_see_less_than_long_ones():
    config = GPTConfig(num_layers=12, packed=True, windows="two")
    assert [layer.keys for layer in layer_plan(config)] == [
        "long", *["short"] * 3, "long", *["short"] * 6, "long"]


# --- positions ------------------------------------------------------------------------------------

@pytest.mark.parametrize("half", [False, True])
def test_rotary_scores_depend_on_relative_position_only(half):
    config = GPTConfig(head_dim=16, num_heads=1, rotary_half=half, rotary_base=100.0)
    freqs = rotary_frequencies(config)
    angle = torch.outer(torch.arange(40, dtype=torch.float64), freqs)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    q_T, k_T = (rotary(x.expand(1, 40, 1, 16), angle.cos(), angle.sin())[0, :, 0] for x in (q, k))
    scores = q_T @ k_T.T
    for shift in (1, 7):
        torch.testing.assert_close(scores[shift:, shift:], scores[:-shift, :-shift])
    assert not torch.allclose(scores[5, 0], scores[9, 0])
    torch.testing.assert_close(q_T.norm(dim=-1), q.norm().expand(40))


def test_half_rotary_leaves_half_of_the_dimensions_alone():
    freqs = rotary_frequencies(GPTConfig(head_dim=128, rotary_half=True, rotary_base=1024.0))
    assert freqs[0] == 1 and freqs[31] == pytest.approx(1 / 1024) and not freqs[32:].any()
    assert rotary_frequencies(GPTConfig(head_dim=64))[1] == pytest.approx(10_000 ** (-2 / 64))


def test_key_offset_moves_what_does_not_turn():
    k = torch.arange(5.0)[None, :, None, None].expand(1, 5, 1, 16)
    moved = shift_still_half(k)[0, :, 0]
    still = [4, 5, 6, 7, 12, 13, 14, 15]
    assert moved[:, still].amax(-1).tolist() == [0, 0, 1, 2, 3]
    turning = [i for i in range(16) if i not in still]
    assert moved[:, turning].amin(-1).tolist() == [0, 1, 2, 3, 4]


def test_paired_heads_are_as_in_record_58():
    """Streams pair heads (0, 3), (1, 4), (2, 5): heads 0-2 of a token come first, then 3-5. The
    rotary position is 2t for even heads and 2t+1 for odd ones, wherever they are in the stream."""
    config = GPTConfig(num_layers=1, num_heads=6, head_dim=8, vocab_size=257, seq_len=16,
                       qk_norm="before", compute_dtype="fp32", paired_heads=True)
    attn = Attention(config, Layer(keys="paired"))
    torch.manual_seed(0)
    for p in attn.parameters():
        nn.init.normal_(p, std=0.5)
    T, H, D = 10, 6, 8
    angle = torch.outer(torch.arange(2 * T, dtype=torch.float64), rotary_frequencies(config))
    cos, sin = angle.cos().float(), angle.sin().float()
    doc_BT = torch.zeros(1, 2 * T, dtype=torch.int32)
    x = torch.randn(1, T, H * D)
    with torch.no_grad():
        found = attn(x, {"cos": cos, "sin": sin}, None, packed_keys(doc_BT, 6, torch.float32),
                     Extras())
        q, k, v = attn.qkv(norm(x)).view(T, 3, H, D).unbind(1)
    y = torch.zeros(T, H, D)
    streams = {(h, t): 2 * t + (h >= 3) for h in range(H) for t in range(T)}

    def rotated(z, h, t):
        z = z[t, h] / z[t, h].square().mean().sqrt()
        at = 2 * t + h % 2
        z1, z2 = z[:D // 2], z[D // 2:]
        return torch.cat([z1 * cos[at] + z2 * sin[at], z2 * cos[at] - z1 * sin[at]])

    for (h, t), at in streams.items():
        seen = [(g, u) for (g, u), other in streams.items()
                if g % 3 == h % 3 and at - 6 < other <= at]
        scores = torch.stack([rotated(q, h, t) @ rotated(k, g, u) for g, u in seen]) * D ** -0.5
        y[t, h] = sum(w * v[u, g] for w, (g, u) in zip(scores.softmax(0), seen))
    expected = y.flatten(1) @ attn.out.weight.T
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps, dtype, expected", [
    (None, torch.bfloat16, 2 ** -7), (None, torch.float32, 2 ** -23), (1e-6, torch.float32, 1e-6),
    (2 ** -23, torch.bfloat16, 2 ** -23)])
def test_the_eps_of_norms(eps, dtype, expected):
    """Before 2025 torch took the eps of the input's dtype: for bf16 2^-7, which is felt where a
    stream is as small as a fresh embedding's."""
    x = torch.full((1, 8), 0.0625, dtype=dtype)
    y = norm(x, eps).float()
    torch.testing.assert_close(y, torch.full((1, 8), 0.0625 / math.sqrt(0.0625 ** 2 + expected)),
                               rtol=4e-3, atol=0)


# --- the small pieces -----------------------------------------------------------------------------

def test_norm_has_rms_one():
    x = 5 * torch.randn(3, 64)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))


@pytest.mark.parametrize("rows", [1000, 251_520])
def test_bigrams_hash_the_last_two_tokens(rows):
    """As record #62's program: it writes rows - 1 over the token at position 0 before it hashes
    position 1, and its products are int32, which 27,191 * 251,519 is not."""
    tokens = torch.tensor([[5, 9, 50_256, 5, 9, 50_256]], dtype=torch.int32)
    found = bigram_hash(tokens, rows)[0].tolist()

    def int32(x: int) -> int:
        return (x + 2**31) % 2**32 - 2**31

    expected = [rows - 1] + [(int32(36_313 * now) ^ int32(27_191 * before)) % (rows - 1)
                             for before, now in ((rows - 1, 9), (9, 50_256), (50_256, 5), (5, 9),
                                                 (9, 50_256))]
    assert found == expected and found[2] == found[5]
    if rows == 251_520:  # by hand: 27,191 * 251,519 = 6,839,053,129 wraps to -1,750,881,463
        assert found[1] == (326_817 ^ -1_750_881_463) % 251_519


def test_smear_takes_from_the_token_before():
    e = torch.randn(1, 4, 16)
    expected = e.clone()
    expected[:, 1:] += 0.25 * e[:, :-1]
    torch.testing.assert_close(smear(e, torch.zeros(1, 12), torch.tensor(0.5)), expected)


def test_several_targets_are_a_weighted_sum_of_losses():
    model = model_of(53)
    model.set_phase(Phase(target_weights=(1.0, 0.5, 0.25)))
    inputs, targets = row(40), row(40, seed=5)
    logits = model.logits(model.hidden(inputs)).log_softmax(-1)[0]
    expected = sum(weight * -logits[t, targets[0, t + ahead]]
                   for ahead, weight in enumerate((1.0, 0.5, 0.25)) for t in range(40 - ahead))
    assert model(inputs, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_fp8_head_is_exact_in_validation_and_near_in_training():
    config = GPTConfig(num_layers=1, num_heads=2, head_dim=16, vocab_size=320, seq_len=32,
                       tied_head=False, compute_dtype="fp32", head="fp8",
                       fp8_factors=(64.0, 64.0, 448.0))
    fp8, plain = GPT(config), GPT(replace(config, head="fp32"))
    init_weights(fp8, 3)
    nn.init.normal_(fp8.lm_head.weight, std=0.2)
    plain.load_state_dict(fp8.state_dict())
    inputs, targets = row(32), row(32, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(fp8.eval()(inputs, targets), plain(inputs, targets))
    for model in (fp8.train(), plain):
        model(inputs, targets).backward()
    for (name, ours), exact in zip(fp8.named_parameters(), plain.parameters()):
        error = (ours.grad - exact.grad).norm() / exact.grad.norm()
        assert 1e-3 < error < 0.2, name  # e5m2 keeps two bits of the gradient


def test_the_loss_in_triton_is_the_loss():
    """Of a recipe with softcap, padded rows and three targets."""
    pytest.importorskip("triton")
    recipe = edit(pocket(RECORDS[62]), num_heads=2, head_dim=16, num_layers=4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, targets = row(32).to(device), row(32, seed=5).to(device)
    results = []
    for kernels in (frozenset(), frozenset({"loss"})):
        model = GPT(recipe.model, kernels)
        init_weights(model, 0)
        model.to(device).set_phase(recipes.phase(0, recipe))
        loss = model(inputs, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()
                                         if p.grad is not None)])
    assert len(model.target_weights) == 3
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


# --- the start ------------------------------------------------------------------------------------

@pytest.mark.parametrize("record", LADDER)
def test_loss_at_the_start(record):
    """ln V where the head starts at zero; what logits of the table's own scale give elsewhere."""
    recipe = pocket(RECORDS[record])
    model = recipes.build_model(recipe, seed=0).eval()
    model.set_phase(recipes.eval_phase(0, recipe))
    inputs, targets = row(128), row(128, seed=1)
    with torch.no_grad():
        loss = model(inputs, targets).item() / 128
    zero_head = not recipe.model.tied_head and recipe.model.head_init_std == 0
    expected = math.log(recipe.model.padded_vocab_size)
    assert loss == pytest.approx(expected, abs=1e-5 if zero_head else 1.5)


@pytest.mark.parametrize("record", LADDER)
def test_the_seed_decides_the_start(record):
    recipe = pocket(RECORDS[record])
    first, same, other = (recipes.build_model(recipe, seed) for seed in (0, 0, 1))
    equal = [torch.equal(p, q) for p, q in zip(first.parameters(), same.parameters())]
    assert all(equal)
    assert not torch.equal(first.blocks[-1].mlp.fc.weight, other.blocks[-1].mlp.fc.weight)


# --- each idea, switched off, is the rung before --------------------------------------------------

@torch.no_grad()
def neutral(model: nn.Module) -> nn.Module:
    """Learned numbers where they change nothing; other weights as they are."""
    at = {"x0_lambda": 0.0, "resid_lambda": 1.0, "value_lambda": 0.0, "embed_lambda": 0.0,
          "skip_lambda": 0.0, "smear_lambda": 0.0, "backout_lambda": 0.0, "bigram_lambda": 0.0,
          "factor": 1.0}
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        if p.ndim == 0:
            p.fill_(at[last])
    return model


# (idea, the fields that bring it, how else to make it do nothing)
SWITCHES = [
    ("value residual", {"value_residual": True}),
    ("x0 lambdas", {"x0_lambdas": True}),
    ("U-net skips", {"unet": "weight"}),
    ("value embeddings", {"value_embeds": "all", "value_mix": "one"}),
    ("mirrored value embeddings", {"value_embeds": "mirror", "value_mix": "one"}),
    ("smear", {"smear": True}),
    ("backout", {"backout": True}),
    ("bigrams", {"bigram": True}),
    ("learned factors", {"qkv_lambda": True}),
    ("document masks in one document", {"packed": True}),
    ("long and short windows as wide as the row", {"packed": True, "windows": "two"}),
    ("softcap far above the logits", {"logit_softcap": 1e7}),
    ("padded vocabulary, of true tokens", {"pad_vocab": True}),
]


def plain(**changes) -> GPT:
    config = GPTConfig(num_layers=4, num_heads=2, head_dim=16, vocab_size=320, seq_len=64,
                       activation="relu2", qk_norm="before", tied_head=False, head="fp32",
                       compute_dtype="fp32")
    model = GPT(replace(config, **changes))
    init_weights(model, 3)
    return model


def take_weights(model: nn.Module, source: nn.Module) -> nn.Module:
    known = dict(source.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in known:
                p.copy_(known[name])
    return model


@pytest.mark.parametrize("changes", [c for _, c in SWITCHES], ids=[i for i, _ in SWITCHES])
def test_switched_off_it_is_the_rung_before(changes):
    before = plain()
    with torch.no_grad():
        before.lm_head.weight.normal_()
    after = neutral(take_weights(plain(**changes), before))
    inputs, targets = row(64, bos=()), row(64, seed=9)
    torch.testing.assert_close(after(inputs, targets), before(inputs, targets))


def test_switched_on_they_all_matter():
    """Or the test above would pass with pieces that are not there."""
    before = plain()
    with torch.no_grad():
        before.lm_head.weight.normal_()
    inputs, targets = row(64, bos=()), row(64, seed=9)
    for idea, changes in SWITCHES[:9]:
        after = take_weights(plain(**changes), before)
        with torch.no_grad():
            for p in after.parameters():
                if p.ndim == 0:
                    p.fill_(0.3)
            for name, p in after.named_parameters():
                if name.startswith("bigram"):
                    p.normal_()
        assert abs(after(inputs, targets) - before(inputs, targets)) > 1e-3, idea


@pytest.mark.parametrize("on, off", [
    ({"qk_norm": "after"}, {"qk_norm": "before"}),  # a rotation keeps the norm
    ({"unet": "sigmoid"}, {"unet": "weight"}),      # sigmoid(0) is one half
])
def test_two_ways_to_say_the_same(on, off):
    one, two = plain(**on), plain(**off)
    with torch.no_grad():
        one.lm_head.weight.normal_()
        for name, p in one.named_parameters():
            if name.endswith("skip_lambda"):
                p.zero_()
        take_weights(two, one)
        for name, p in two.named_parameters():
            if name.endswith("skip_lambda"):
                p.fill_(0.5)
    inputs, targets = row(64), row(64, seed=9)
    torch.testing.assert_close(one(inputs, targets), two(inputs, targets))


def test_a_sigmoid_softcap_is_a_tanh_one_moved_up():
    """30 sigmoid(z / 7.5) = 15 + 15 tanh(z / 15): softmax does not see the 15 (#18 to #19)."""
    tanh = plain(logit_softcap=15.0)
    sigmoid = plain(logit_softcap=30.0, softcap_kind="sigmoid", softcap_div=7.5)
    with torch.no_grad():
        tanh.lm_head.weight.normal_()
        take_weights(sigmoid, tanh)
    inputs, targets = row(64), row(64, seed=9)
    torch.testing.assert_close(sigmoid(inputs, targets), tanh(inputs, targets))


# --- from #62 to #89: each new piece begins as the rung before ------------------------------------

def eleven(record: int) -> GPT:
    """A record's own 11 layers, small, at its start; head and biggest tables away from zero."""
    config = replace(pocket(RECORDS[record]).model, num_layers=11, num_heads=2, head_dim=16)
    model = GPT(config)
    init_weights(model, 0)
    model.set_phase(Phase(window=32, short_window=16))
    with torch.no_grad():
        for name, p in model.named_parameters():    # what both rungs have is the same in both
            if name.endswith(".weight") and not name.endswith("w2.weight"):
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(
                    zlib.crc32(name.encode()))))
    return model


@torch.no_grad()
def set_all(model: GPT, ending: str, value: float | torch.Tensor) -> None:
    found = [p for name, p in model.named_parameters() if name.endswith(ending)]
    assert found, ending
    for p in found:
        p.copy_(torch.as_tensor(value, dtype=p.dtype))


@torch.no_grad()
def assert_equal_start(before: GPT, after: GPT, equal: bool = True) -> None:
    tokens = row(48, bos=(0, 20))
    found, expected = after.hidden(tokens), before.hidden(tokens)
    assert torch.allclose(found, expected, rtol=1e-4, atol=2e-5) == equal, (
        (found - expected).abs().max())


@torch.no_grad()
def test_63_begins_as_62_with_copies_of_its_tables():
    before, after = eleven(62), eleven(63)
    for mine, shared in zip(range(5), (1, 2, 0, 1, 2)):
        after.value_embeds[str(mine)].weight.copy_(before.value_embeds[str(shared)].weight)
    assert_equal_start(before, after)
    after.value_embeds["4"].weight.add_(1)
    assert_equal_start(before, after, equal=False)


def test_70_begins_with_a_value_gate_of_one():
    after = eleven(70)
    before = take_weights(GPT(replace(after.config, value_mix="add")), after)
    before.set_phase(after.phase)
    assert_equal_start(before, after)
    with torch.no_grad():
        for name, p in after.named_parameters():
            if name.endswith("value_gate"):
                p[:, :6].zero_()
                p[:, 6:].fill_(3.0)     # channels of the value embedding alone
    assert_equal_start(before, after, equal=False)


def test_77_with_factors_of_one_is_72():
    """But for the late input: it reads another layer from the first step on."""
    before, after = eleven(72), eleven(77)
    after.plan = [layer._replace(attn_from=None) for layer in after.plan]
    for model in (before, after):
        set_all(model, "bigram.weight", 0.0)
    set_all(before, "resid_lambda", 1.0)
    set_all(after, "_resid", 1.0)
    assert_equal_start(before, after)
    for name in ("attn_resid", "attn_post", "mlp_resid", "mlp_post", "x0_lambda"):
        p = getattr(after.blocks[1], name)
        was = p.item()
        with torch.no_grad():
            p.add_(0.5)
            assert_equal_start(before, after, equal=False)
            p.fill_(was)
    late = eleven(77)
    set_all(late, "_resid", 1.0)
    assert [layer.attn_from for layer in late.plan] == [None] * 8 + [7, 7, 7]
    assert_equal_start(before, late, equal=False)


def test_77_brings_bigrams_before_layer_0_and_behind_attention_elsewhere():
    model = eleven(77)
    tokens = row(48, bos=(0, 20))
    x_BTC, shared, _ = model.embed_tokens(tokens)
    torch.testing.assert_close(x_BTC, shared["x0"] + 0.05 * shared["bigram"])
    assert [block.takes_bigram for block in model.blocks] == [False] + [True] * 10


def test_80_begins_as_77():
    before, after = eleven(77), eleven(80)
    with torch.no_grad():
        for one, two in zip(before.blocks, after.blocks):
            if one.attn is not None:
                one.attn.qkv.weight.copy_(torch.cat([two.attn.qk.weight, two.attn.v.weight]))
    assert_equal_start(before, after)


def test_81_begins_as_80():
    """But for the last layer's value gate: the program has 2 there, where a gate was 1."""
    before, after = eleven(80), eleven(81)
    for model in (before, after):
        set_all(model, "value_embeds.4.weight", 0.0)
    set_all(before, "mlp_resid", RECORDS[80].model.resid_lambda)
    assert_equal_start(before, after)
    for mixer in (after.mudd, after.blocks[10].mudd):
        with torch.no_grad():
            mixer.w2.weight.normal_()
            assert_equal_start(before, after, equal=False)
            mixer.w2.weight.zero_()
    assert_equal_start(before, after)


def test_the_coefficients_of_81_weigh_what_they_say():
    """The last layer and the end, from their constants alone, written out."""
    model, tokens = eleven(81), row(48, bos=(0, 20))
    generator = torch.Generator().manual_seed(3)
    for mixer in (model.mudd, model.blocks[10].mudd):
        mixer.start.data = torch.randn(mixer.start.shape, generator=generator)
    with torch.no_grad():
        x, shared, values = model.embed_tokens(tokens)
        c0, outputs = x, {}
        keys = model.attention_keys(tokens, None)
        h9 = model.run_layers(range(10), x, shared, values, keys, {}, outputs)
        m, n = 0.1 * model.blocks[10].mudd.start, 0.1 * model.mudd.start
        attn = model.blocks[10].attn
        u = m[0] * c0 + m[1] * outputs[7] + m[2] * h9
        ve = torch.cat([m[6] * values[4][:, :, :1], m[7] * values[4][:, :, 1:]], 2)
        # the values are those of plain attention on V + u + ve
        plain = replace(model.config, mudd=False, value_mix="add")
        same = Attention(plain, model.plan[10])
        same.load_state_dict(attn.state_dict())
        y = same(outputs[7], shared, ve + u.unflatten(-1, (2, -1)), keys["long"], Extras())
        x = (1 + m[5]) * h9 + m[3] * c0 + m[4] * outputs[7]
        x = m[8] * x + m[9] * y + m[10] * c0 + m[11] * shared["bigram"]
        x = m[12] * x + m[13] * model.blocks[10].mlp(x)
        x = x + n[0] * c0 + n[1] * outputs[7] + n[2] * h9 + n[3] * values[0].flatten(-2) + (
            n[4] * outputs[3])
        torch.testing.assert_close(model.hidden(tokens), norm(x), rtol=1e-4, atol=1e-4)


def test_82_begins_as_81():
    before, after = eleven(81), eleven(82)
    assert_equal_start(before, after)
    set_all(after, ".xsa", 0.5)
    assert_equal_start(before, after, equal=False)


def test_xsa_takes_away_the_part_along_the_own_value():
    y, v = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)
    left = exclude_own_value(y, v, torch.tensor([100.0, 0.0, math.atanh(0.25)]).double())
    assert (left[..., 0, :] * v[..., 0, :]).sum(-1).abs().max() < 1e-12
    torch.testing.assert_close(left[..., 1, :], y[..., 1, :])
    torch.testing.assert_close((left[..., 2, :] * v[..., 2, :]).sum(-1),
                               0.75 * (y[..., 2, :] * v[..., 2, :]).sum(-1))
    assert torch.isfinite(exclude_own_value(y, torch.zeros_like(v), torch.ones(3).double())).all()


def test_83_begins_as_82_and_signs_the_rows():
    before, after = eleven(82), eleven(83)
    for model in (before, after):
        set_all(model, "bigram.weight", 0.0)
    assert_equal_start(before, after)
    after.bigram.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    tokens = row(48, bos=(0, 20))
    _, shared, _ = after.embed_tokens(tokens)
    rows = after.bigram.weight[bigram_hash(tokens, after.config.bigram_rows)]
    signs = [after.signs[0]] + [after.signs[int(a) ^ int(b)]
                                for a, b in itertools.pairwise(tokens[0])]
    torch.testing.assert_close(shared["bigram"][0, :, :8], rows[0] * torch.stack(signs))
    assert not shared["bigram"][..., 8:].any()
    torch.testing.assert_close(sign_hash(torch.tensor([[50_256, 11_492]])),
                               torch.tensor([[0, (50_256 ^ 11_492) % 8192]]))


def test_85_begins_with_constants_in_the_place_of_gates():
    """Attention gates 0.25 in layers 3 and 10 and none elsewhere, where 0.5 was, and half the skip;
    with those put into #83, and bigrams at 0, it begins alike."""
    before, after = eleven(83), eleven(85)
    for model in (before, after):
        set_all(model, "bigram.weight", 0.0)
    half = torch.sigmoid(torch.tensor(-1.5)) / 2
    with torch.no_grad():
        before.blocks[6].skip_lambda.copy_(torch.logit(half))
        for i, block in enumerate(before.blocks):
            if block.attn is not None:
                block.attn.out.factor.copy_(0.5 if i in (3, 10) else 2.0)
    assert_equal_start(before, after)
    for mixer in (after.gates_early, after.gates_late):
        with torch.no_grad():
            mixer.w2.weight.normal_()
            assert_equal_start(before, after, equal=False)
            mixer.w2.weight.zero_()


def test_dynamic_composition_mixes_attention_weights():
    """Every weight, query by query."""
    B, T, H, D, W = 2, 23, 3, 4, 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, B, T, H, D, dtype=torch.float64, generator=generator)
    into, out = torch.randn(2, B, T, H, dtype=torch.float64, generator=generator)
    doc = torch.tensor([[0] * 7 + [1] * 16, [0] * 23])
    extras = Extras(dc_in_BTH=into, dc_out_BTH=out)
    found = composed_heads(q, k, v, extras, 0.3, doc, W)
    for b, i in itertools.product(range(B), range(T)):
        seen = [j for j in range(T) if 0 <= i - j < W and doc[b, i] == doc[b, j]]
        weights = torch.stack([(0.3 * k[b, seen, h] @ q[b, i, h]).softmax(0) for h in range(H)])
        heads = into[b, i] / (into[b, i].square().mean() + 1e-6).sqrt()
        mixed = heads @ weights
        for h in range(H):
            torch.testing.assert_close(found[b, i, h], out[b, i, h] * (mixed @ v[b, seen, h]))


def test_the_prefix_of_the_next_token_is_one_more_target():
    model, tokens, targets = model_of(88), row(40), row(40, seed=5)
    model.prefixes = torch.arange(model.config.vocab_size) // 2 - 1     # tokens 0 and 1 have none
    model.set_phase(Phase(target_weights=(1.0, 0.5), prefix_weight=0.25))
    logits = model.logits(model.hidden(tokens)).log_softmax(-1)[0]
    expected = 0.0
    for t, y in enumerate(targets[0].tolist()):
        expected -= logits[t, y]
        expected -= 0.5 * logits[t, targets[0, t + 1]] if t < 39 else 0
        expected -= 0.25 * logits[t, y // 2 - 1] if y > 1 else 0
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    model.set_phase(recipes.eval_phase(0, pocket(RECORDS[88])))     # never in validation
    logits = model.logits(model.hidden(tokens)).log_softmax(-1)[0]
    plain = -logits.gather(1, targets[0][:, None]).sum()
    assert model(tokens, targets).item() == pytest.approx(plain.item(), rel=1e-6)


# --- phases ---------------------------------------------------------------------------------------

def test_tied_for_a_while_then_a_copy():
    recipe = pocket(RECORDS[53])
    model = recipes.build_model(recipe, seed=0)
    tokens = row(32)
    assert model.phase.tied
    tied = model.hidden(tokens)
    model(tokens, tokens).backward()
    assert model.embed.weight.grad is None  # the head's table serves
    model.untie()
    model.set_phase(model.phase._replace(tied=False))
    torch.testing.assert_close(model.hidden(tokens), tied)
    model(tokens, tokens).backward()
    assert model.embed.weight.grad is not None


def test_entering_a_stage_moves_adams_state_with_the_table():
    from muon import Muon

    recipe = pocket(RECORDS[53])
    model = recipes.build_model(recipe, seed=0)
    optimizer = Muon(recipes.optimizer_groups(recipe, model.named_parameters()), reduce="sum")
    tokens = row(32)
    for _ in range(2):  # Adam steps every second time
        (model(tokens, tokens) / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
    recipes.enter_phase(model, optimizer, model.phase._replace(tied=False))
    assert torch.equal(model.embed.weight, model.lm_head.weight)
    embed, head = (optimizer.state[table.weight] for table in (model.embed, model.lm_head))
    assert head["exp_avg_sq"].any() and embed.keys() == head.keys()
    assert all(torch.equal(embed[key], value) for key, value in head.items())


def test_yarn_tables_move_with_the_window_and_back():
    recipe = pocket(RECORDS[31])
    model = recipes.build_model(recipe, seed=0)
    start = model.cos.clone()
    model.set_phase(recipes.eval_phase(recipe.num_iterations, recipe))
    assert not torch.equal(model.cos, start)
    model.set_phase(recipes.phase(0, recipe))
    assert torch.equal(model.cos, start)


def test_fading_targets_do_not_make_the_tables_anew(monkeypatch):
    """With a weight that changes every step, the phase does; 262,144 positions must not."""
    model = recipes.build_model(pocket(RECORDS[62]), seed=0)
    monkeypatch.setattr(model, "set_rotary", None)
    model.set_phase(model.phase._replace(target_weights=(1.0, 0.5, 0.2)))
    assert model.target_weights.tolist() == pytest.approx([1.0, 0.5, 0.2])


# --- about models ---------------------------------------------------------------------------------

def test_every_parameter_has_a_role():
    for record in LADDER:
        with torch.device("meta"):
            model = GPT(pocket(RECORDS[record]).model)
        for name, p in model.named_parameters():
            role, _ = parameter_entry(name, model.config)
            assert role in recipes.ROLES
            assert (role in recipes.SCALARS) == (p.ndim < 2), name


def test_flops_count_products_and_keys():
    recipe = edit(pocket(RECORDS[6]), num_layers=2)
    with torch.device("meta"):
        model = GPT(recipe.model)
    C, V, T = 128, recipe.model.padded_vocab_size, recipe.model.seq_len
    expected = 6 * (2 * 12 * C * C + V * C) + 2 * 12 * C * (T + 1) / 2
    assert flops_per_token(model, Phase(), T) == pytest.approx(expected)
    assert recipes.mean_flops_per_token(recipe, model) == pytest.approx(expected)
    windowed = GPT(pocket(RECORDS[13]).model)
    early, late = (flops_per_token(windowed, Phase(window=w), 512) for w in (16, 432))
    assert early < recipes.mean_flops_per_token(pocket(RECORDS[13]), windowed) < late
    assert num_parameters(model) == 2 * 12 * C * C + V * C
    assert mean_keys(100, 10) == pytest.approx(sum(min(t + 1, 10) for t in range(100)) / 100)
