"""Every recipe against the facts of its record, and against itself at pocket scale.

Facts: tests/facts/ladder.json, numbers from the official logs. Tests allow a difference only where
this list, or a table below that says so, has it.

Deliberate differences of the recipes, with their sizes:

    #1      rows come in order, shuffled there
    #2      no normalisation of each gradient: removed eight days later as useless
    #2-#4   validation in bf16 products, fp32 there: +5e-5 nats (pocket #4 after 60 steps)
    #3-#89  no 1e-7 (1e-6 from #38) beside the Frobenius norm of what Muon orthogonalises: at most
            4e-5 of an update (smallest norm of a gradient in 40 steps: 2.5e-3 in pocket #8; 0.14
            in #38)
    #5-#18  at pocket scale norms have the eps of fp32, which all its inputs are; of bf16's 2^-7 a
            random full-size model's loss knows 2e-3
    #10-#89 tables in bf16 are updated through an fp32 copy; there without, an update rounded to
            2^-9 of the number that it changes. Adam's averages are fp32, bf16 there until #61:
            2^-9 of each
    #10-#17 scalars are fp32, bf16 there: 2^-9 of each
    #14-#16 rotary tables are fp32, nominally bf16 there: angles up to 2^-9 off
    #15-#27 each query sees the mean number of keys, up to 64 more or fewer there (window_in_keys)
    #17, #19-#23 tables keep 50,304 rows, 50,257 there: 47 rows that no token reads
    #19, #21-#24, #38, #41 a window grows one step earlier: 4 steps of 1,395 in #19, 1 in the others
    #38-#89 softcap and cross-entropy of fp32 numbers, bf16 there in training until #53: 2^-9 of a
            logit
    #38, #43 the extension's learning rate is 0.1, 0.10018 there: 0.2% for 40 steps
    #41     NorMuon looks at Q, K, V and O each by itself, together there: 6% of their update
            (pocket, after 40 steps)
    #63, #64 learning rates still rise past a third, with the batch from #70 on; the change is
            known to lie between #62 and #84: one step
    #70-#89 the cooldown begins at a whole step, rounded down as in #84's log: less than a step
    #81-#89 coefficients of tokens are fp32 until they are multiplied; there perhaps bf16: 2^-9
    #83-#89 the fixed signs are drawn from another seed
    #84-#89 the MLP in bf16, its forward products in fp8 there: 0.8 mn, five steps for the first
    #85-#89 the last layer's shortcut coefficient is of what enters layer 0, as in #81; whether
            that became x0 when the two parted is not known: its start is 0
    #88     at pocket scale without its idea: no byte begins with another token
"""

import dataclasses
import json
import math

import pytest
import torch

import recipes
from conftest import FACTS
from kernels.loss import softcapped
from model import GPT, GPTConfig, backout_layer, init_weights, num_parameters, parameter_entry
from recipes import RECORDS, pocket

# The facts' #84 is #83 with fp8 in a matrix and five more steps: no rung, but with all its numbers.
LADDER = [*range(1, 25), 26, 27, 29, 31, 38, 41, 43, 46, 53, 62, 84]
NEWEST = [63, 64, 70, 72, 77, 80, 81, 82, 83, 85, 88, 89]     # held to facts below
HELD = RECORDS | {84: recipes.edit(RECORDS[83], num_iterations=1390, cooldown_steps=828)}


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((FACTS / "ladder.json").read_text())


@pytest.fixture(scope="module")
def meta_models() -> dict:
    """Every full-size model, without memory for its weights."""
    with torch.device("meta"):
        return {record: GPT(recipe.model) for record, recipe in HELD.items()}


def test_the_whole_ladder_is_there():
    assert list(RECORDS) == LADDER[:-1] + NEWEST
    assert all(recipe.record == record and recipe.title for record, recipe in RECORDS.items())


# --- the model ------------------------------------------------------------------------------------

# Parameters of ours minus theirs. All ours are used; theirs carry numbers that nothing reads.
TABLES_50257 = 47 * 768 * 4     # #17 and #19 to #23 pad the head, not the four embedding tables
NO_TABLE = -5                   # a second value lambda in five layers that have no table
EXTRA_PARAMETERS = {
    17: TABLES_50257 + NO_TABLE, 18: NO_TABLE,
    **dict.fromkeys((19, 20, 21, 22, 23), TABLES_50257 + NO_TABLE),
    # One vector of 64 scalars: 12 skips of which 6 are used, 4 of padding, 2 value lambdas in
    # the layer without attention, and those five.
    **dict.fromkeys((24, 26, 27, 29, 31), -(6 + 4 + 2 + 5)),
    # Vectors of 72, then 64: here 10 + 22 + 9 + 6 + ... numbers, one for each use.
    38: 42 - 71, 41: 43 - 63, 43: 43 - 63, 46: 39 - 63,
    53: -6,                     # a vector of 40
    62: -(2 * 3072 * 768 + 6),  # a padding layer in the MLP bank, and padding of scalars
    # Padding: 4 blocks of Q and K, 4 matrices of V and O, an MLP; 9 more coefficients of the second
    # mixer. Of layer 10 a value gate and 6 lambdas, of layer 6 4 lambdas, XSA of 5 layers without;
    # a vector of 24 scalars.
    84: -(4 * 256 * 768 + 4 * 768 * 768 + 2 * 3072 * 768 + 9 * 65 + 72 + 6 + 4 + 5 * 6 + 2),
}


@pytest.mark.parametrize("record", LADDER)
def test_parameter_count(record, facts, meta_models):
    expected = facts[str(record)]["arch"]["params_total"]
    assert num_parameters(meta_models[record]) - expected == EXTRA_PARAMETERS.get(record, 0)


@pytest.mark.parametrize("record", LADDER)
def test_shape_of_the_model(record, facts):
    arch, config = facts[str(record)]["arch"], HELD[record].model
    layers = arch["n_layer"] - (config.drop_first and arch["n_layer"] == 12)
    assert (config.num_layers, config.num_heads, config.head_dim) == (
        layers, arch["n_head"], arch["head_dim"])
    assert config.mlp_ratio * config.model_dim == arch["mlp_hidden"]
    named = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh", "relu2": "relu_squared"}
    assert named[config.activation] == arch["activation"]
    assert config.embed_norm == arch["embed_norm"]
    assert config.tied_head == (arch["tied_head"] is True)
    assert HELD[record].tie_first == isinstance(arch["tied_head"], str)
    assert config.stream_dtype == (
        "bf16" if record >= 10 else "fp32")
    assert config.embed_dtype == ("bf16" if record >= 10 else "fp32")
    assert config.head_dtype == ("bf16" if "bf16" in arch["dtypes"]["head_params"].split(",")[0]
                                 and record > 1 else "fp32")
    fp8 = arch["fp8"]
    assert (config.head == "fp8") == (fp8 is not None)


@pytest.mark.parametrize("record", [r for r in LADDER if r > 1])
def test_attention_of_each_layer(record, facts, meta_models):
    arch = facts[str(record)]["arch"]
    said, config, model = arch["attention"], HELD[record].model, meta_models[record]
    first = 12 - config.num_layers if arch["n_layer"] == 12 else 0  # #38 to #46: layer 0 not run
    assert [i + first for i, block in enumerate(model.blocks) if block.attn is None] == [
        i for i in said["no_attn_layers"] if i >= first]
    assert [i + first for i, block in enumerate(model.blocks) if block.mlp is None] == [
        i for i in said["no_mlp_layers"] if i >= first]
    order = {None: "none", "rope->norm": "after", "norm->rope": "before"}[said["qk_norm_order"]]
    assert config.qk_norm == order
    scale = next(b.attn.scale for b in model.blocks if b.attn is not None)
    assert scale == pytest.approx(said["scale"], rel=1e-4)
    assert config.packed == said["doc_mask"]
    if windows := said["layer_windows"]:
        ours = {"long": "L", "short": "S", "paired": "S"}
        assert [ours[b.layer.keys] if b.attn is not None else "-"
                for b in model.blocks] == windows[first:]
    assert [i for i, b in enumerate(model.blocks) if b.layer.keys == "paired"] == [
        i for i in said["paired_head_layers"]]
    offset = [i for i, b in enumerate(model.blocks) if b.attn is not None and b.attn.shifts_keys]
    assert offset == (said["key_offset"]["layers"] if said["key_offset"] else [])
    assert config.attn_gate == bool(said["gate"])
    attends = [i for i, b in enumerate(model.blocks) if b.attn is not None]
    assert [i for i in attends if model.blocks[i].attn.xsa is not None] == (
        said.get("xsa") or {"layers": []})["layers"]
    late = [(i, b.layer.attn_from) for i, b in enumerate(model.blocks) if b.layer.attn_from]
    assert late == ([(8, 7), (9, 7), (10, 7)] if "late_input" in said else [])


@pytest.mark.parametrize("record", [r for r in LADDER if r > 1])
def test_what_crosses_layers(record, facts, meta_models):
    arch, model = facts[str(record)]["arch"], meta_models[record]
    first = arch["n_layer"] - HELD[record].model.num_layers
    pairs = [(b.layer.skip_from, i) for i, b in enumerate(model.blocks)
             if b.layer.skip_from is not None]
    assert sorted(pairs) == sorted((a - first, b - first)
                                   for a, b in (arch["unet"] or {"pairs": []})["pairs"])
    tables = arch["value_embeds"] and arch["value_embeds"]["layer_to_table"][first:]
    # The layer without attention cannot use a table; in the mirrored layouts none is dropped.
    assert [b.layer.value_table for b in model.blocks] == (tables or [None] * len(model.blocks))
    assert (HELD[record].model.value_residual) == bool(arch["value_residual"])
    if arch["backout"] and not model.config.mudd:
        assert backout_layer(model.config) == arch["backout"]["layer"] - first
    if arch["bigram"]:
        assert model.bigram.num_embeddings == arch["bigram"]["rows"]
        assert model.bigram.embedding_dim == arch["bigram"].get("dim", 768)


SOFTCAPS = {"30*tanh(z/30)": lambda z: 30 * math.tanh(z / 30),
            "15*tanh(z/15)": lambda z: 15 * math.tanh(z / 15),
            "30*sigmoid(z/7.5)": lambda z: 30 / (1 + math.exp(-z / 7.5)),
            "30*sigmoid(z/(7.5*sqrt(768)))": lambda z: 30 / (1 + math.exp(-z / 7.5 / 768 ** 0.5)),
            "23*sigmoid((z+5)/7.5)": lambda z: 23 / (1 + math.exp(-(z + 5) / 7.5))}


@pytest.mark.parametrize("record", LADDER)
def test_softcap(record, facts):
    said = facts[str(record)]["arch"]["softcap"]
    z = torch.linspace(-40, 40, 9)
    softcap = HELD[record].model.softcap
    if softcap.kind == "none":
        assert said is None
        return
    expected = [SOFTCAPS[said["form"]](x) for x in z.tolist()]
    torch.testing.assert_close(softcapped(z, softcap), torch.tensor(expected))


@pytest.mark.parametrize("record", LADDER)
def test_the_unit_of_gradients_is_the_records(record, facts):
    """A mean over tokens until #21; then a sum over each of 8 ranks' tokens, averaged over them.
    Adam's eps counts in that unit, and moments grow with the batch from #46 on."""
    summed = record >= 22
    assert HELD[record].loss_divisor == (8 if summed else None)
    if record in (22, 38, 62):
        assert "SUM" in facts[str(record)]["arch"]["logits"]
    assert pocket(HELD[record]).loss_divisor == HELD[record].loss_divisor


@pytest.mark.parametrize("record, record_eps, record_unit", [
    (14, 1e-8, 524_288), (20, 1e-10, 524_288), (23, 1e-10, 8), (38, 1e-8, 8), (53, 1e-8, 8)])
def test_adam_eps_against_the_gradient_of_a_row_seen_once(record, record_eps, record_unit):
    """One token's gradient in the summed loss, 5.9e-4 for a value table (1.5e-9 of the mean over
    393,216 tokens): its row moves as far as in the record, at pocket scale too."""
    from muon import Adam

    gradient = 5.9e-4 / record_unit
    theirs = gradient / (gradient + record_eps)     # the first update, in units of the rate
    for recipe in (HELD[record], pocket(HELD[record])):
        with torch.device("meta"):
            model = GPT(recipe.model)
        groups = {group["name"]: group
                  for group in recipes.optimizer_groups(recipe, model.named_parameters())}
        p = torch.nn.Parameter(torch.zeros(1))
        optimizer = Adam([p], lr=1.0, betas=recipe.adam_betas, eps=groups["value_embed"]["eps"])
        p.grad = torch.full_like(p, 5.9e-4 / (recipe.loss_divisor or recipe.batch_tokens))
        optimizer.step()
        assert -p.item() == pytest.approx(theirs, rel=1e-6)
        # a gradient that every token feeds keeps its size in a mean
        assert groups["scalar"]["eps"] == groups["head"]["eps"] == record_eps


@pytest.mark.parametrize("record", [r for r in LADDER if r >= 19])
def test_fp8_factors(record, facts):
    said, config = facts[str(record)]["arch"]["fp8"], HELD[record].model
    # Theirs multiply the gradient of each rank's mean loss until #21, of the summed loss after.
    mean_over = {19: 65_536, 20: 65_536, 21: 49_152}.get(record, 1)
    assert config.fp8_factors == pytest.approx(
        (said["x_mul"], said["w_mul"], said["g_mul"] / mean_over), rel=1e-4)


@pytest.mark.parametrize("record", LADDER)
def test_initial_standard_deviations(record, facts, meta_models):
    said = facts[str(record)]["init"]
    names = {"embed.weight": "embed", "position.weight": "pos_embed", "lm_head.weight": "head",
             "qkv.weight": "qkv", "qk.weight": "qkv", ".v.weight": "qkv",
             "out.weight": "attn_out", "fc.weight": "mlp_in",
             "proj.weight": "mlp_out", "bigram.weight": "bigram", "attn_gate": "attn_gate",
             "value_gate": "ve_gate", "smear_gate": "smear_gate", "skip_gate": "skip_gate"}
    seen = set()
    for name, _ in meta_models[record].named_parameters():
        key = "value_embeds" if name.startswith("value_embeds.") else next(
            (fact for ending, fact in names.items() if name.endswith(ending)), None)
        if key is None:
            continue
        fact = said["head"] if said[key]["dist"] == "tied" else said[key]
        if fact["dist"] == "tied":
            fact = said["embed"]
        if fact["dist"] in ("copy_of_head", "copied_from_head_at_split"):
            continue  # untie() copies the head's table before this one is first used
        seen.add(key)
        kind, number = parameter_entry(name, meta_models[record].config)[1]
        if fact["dist"] == "zero":
            assert number == 0, name
        else:
            assert (kind, number) == (fact["dist"], pytest.approx(fact["std"], rel=2e-4)), name
    assert {"qkv", "attn_out", "mlp_in", "mlp_out"} <= seen


SCALARS = {"value_lamb": ["value_lambda"], "value_lambdas": ["value_lambda", "embed_lambda"],
           "x0_lambdas": ["resid_lambda", "x0_lambda"], "skip": ["skip_lambda"],
           "smear_lambda": ["smear_lambda"], "backout_lambda": ["backout_lambda"],
           "resid_lambda": ["resid_lambda"], "x0_lambda": ["x0_lambda"],
           "sa_lambdas": ["v.factor", "out.factor"], "bigram_lambda": ["bigram_lambda"],
           "resid": ["attn_resid", "mlp_resid"], "post": ["attn_post", "mlp_post"], "xsa": [".xsa"]}


@pytest.mark.parametrize("record", LADDER)
def test_initial_scalars(record, facts, meta_models):
    names = [name for name, p in meta_models[record].named_parameters()
             if p.ndim == 0 or name.endswith(".xsa")]
    checked = set()
    for key, value in (facts[str(record)]["init"]["scalars"] or {}).items():
        for ending, number in zip(
                SCALARS[key], value if isinstance(value, list) else [value] * len(SCALARS[key])):
            of_kind = [n for n in names if n.endswith(ending)]
            assert of_kind, ending
            config = meta_models[record].config
            assert all(parameter_entry(n, config)[1] == (
                "constant", pytest.approx(number, rel=1e-6)) for n in of_kind)
            checked.update(of_kind)
    assert checked == set(names)


def test_initial_weights_have_the_deviation_that_the_rules_say():
    model = recipes.build_model(pocket(RECORDS[62]), seed=1)
    for name, p in model.named_parameters():
        kind, number = parameter_entry(name, model.config)[1]
        if kind == "constant":
            assert (p == number).all(), name
        else:
            assert p.std().item() == pytest.approx(number, rel=0.05, abs=1e-12), name


def test_a_parameter_without_a_rule_is_refused():
    model = GPT(pocket(RECORDS[6]).model)
    model.stranger = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="stranger"):
        init_weights(model, 0)


# --- the optimizer --------------------------------------------------------------------------------

def said_group(name: str, config: GPTConfig, said: list[dict]) -> dict:
    """The group of the facts that a parameter of ours belongs to."""
    role, _ = parameter_entry(name, config)
    words = {
        "embed": ("embedding after split", "embedding", "wte", "tied embedding", "all"),
        "head": ("head",), "value_embed": ("value embedding",), "bigram": ("bigram",),
        "attn_gate": ("attention gate",), "value_gate": ("ve gates",),
        "smear_gate": ("smear gate",), "skip_gate": ("skip gate",),
        "x0_lambda": ("x0 lambdas", "scalars"), "scalar": ("other scalars", "scalars", "LayerNorm"),
        "resid_lambda": ("residual lambdas",), "post_lambda": ("post, x0",),
        "mudd": ("MUDD w1",), "mudd_start": ("MUDD bias",),
    }.get(role, ("attention bank" if role.startswith("attn") else "MLP bank", "QKVO", "QK, VO",
                 "matrices", "all"))
    for word in words:
        for group in said:
            if word in group["params"]:
                return group
    raise AssertionError(f"the facts have no group for {name} ({role})")


@pytest.mark.parametrize("record", LADDER)
def test_optimizer_group_of_every_parameter(record, facts, meta_models):
    optim, recipe = facts[str(record)]["optim"], HELD[record]
    groups = recipes.optimizer_groups(recipe, meta_models[record].named_parameters())
    named = [name for group in groups for name, _ in group["params"]]
    assert sorted(named) == sorted(name for name, _ in meta_models[record].named_parameters())
    first_lr = recipes.lr_multiplier(0, recipe)
    for group in groups:
        for name, _ in group["params"]:
            said = said_group(name, recipe.model, optim["groups"])
            assert group["lr"] / first_lr == pytest.approx(said["lr"]), name
            assert group["weight_decay"] == said["wd"], name
            if "Muon" in said["opt"]:
                assert group["rule"] == "muon", name
            else:
                assert group["rule"] == "adam", name
                assert (list(group["betas"]), group["eps"]) == (said["betas"], said["eps"]), name
                assert group["update_interval"] == optim["adam_every"], name
            if optim["cautious_wd"] and said["wd"]:
                assert group["decay"] == "lr2" and group["cautious"], name


# Factor on Muon's rate for each kind of matrix, as the facts' tables name them by stored shape.
MUON_SCALES = {3: (1, 1, 1), **dict.fromkeys((4, 5, 6, 7), (768 ** 0.5, 3072 ** 0.5, 3072 ** 0.5)),
               **dict.fromkeys([*range(8, 25), 26], (1, 2, 1)),
               **dict.fromkeys((27, 29, 31, 38, 41), (1, 1, 1)),
               43: (1, 2, 1), 46: (1, 2, 1), 53: (2, 2, 4), 62: (1, 2, 4), 84: (1, 2, 4)}


@pytest.mark.parametrize("record", [r for r in LADDER if r > 2])
def test_muon_settings(record, facts, meta_models):
    from muon import SCALES

    said, recipe = facts[str(record)]["optim"]["muon"], HELD[record]
    groups = {g["name"]: g for g in recipes.optimizer_groups(
        recipe, meta_models[record].named_parameters())}
    square, mlp_in, mlp_out = MUON_SCALES[record]
    shapes = {"attn_out": (768, 768), "mlp_in": (3072, 768), "mlp_out": (768, 3072)}
    shapes |= ({"attn_qk": (256, 768), "attn_v": (768, 768)} if record == 84 else
               {"attn_in": (768, 768)})
    for role, expected in zip(shapes, (square, mlp_in, mlp_out, square, square)):
        got = SCALES[groups[role]["scale"]](*shapes[role]) * groups[role]["multiplier"]
        assert got == pytest.approx(expected), role
    told = said["scale_table"].values()
    assert all(any(value == pytest.approx(x, rel=1e-4) for x in (1, square, mlp_in, mlp_out))
               for value in told)
    kind = said["orthogonalizer"]["kind"]
    assert (groups["mlp_in"]["method"] == "polar_express") == (kind == "Polar Express")
    assert groups["mlp_in"]["ns_steps"] == said["orthogonalizer"]["steps"] == 5
    if record == 84:    # pairs of heads; wide matrices, whose columns NorMuon looks at
        assert groups["attn_qk"]["split"] == 6
        assert "per pair of heads (256x768)" in said["qkv_split"]
        assert [groups[role]["second_moment"] for role in shapes] == [
            "row", "row", "col", "col", "row"]
    else:  # #3 orthogonalises the fused QKV as one matrix
        assert groups["attn_in"]["split"] == (None if record == 3 else 3)
    if said["second_moment"] is not None:
        assert groups["mlp_in"]["beta2"] == said["second_moment"].get("beta2", 0.95)
    assert all((g["second_moment"] is not None) == (said["second_moment"] is not None)
               for g in groups.values() if g["rule"] == "muon")
    form = {"EMA": "ema", "heavy-ball": "heavy_ball"}[said["momentum_form"].partition(":")[0]]
    assert {g["momentum_form"] for g in groups.values() if g["rule"] == "muon"} == {form}


def test_polar_express_has_the_coefficients_of_the_records(facts):
    from muon import coefficients

    said = facts["62"]["optim"]["muon"]["orthogonalizer"]["coeffs"]
    polynomials, safety = coefficients("polar_express", 5)
    assert safety == 1.02
    assert [list(p) for p in polynomials] == [pytest.approx(p, rel=1e-9) for p in said]


@pytest.mark.parametrize("record", [41, 43, 46, 53, 62])
def test_normuon_averages_over_the_dimension_of_the_stored_matrix(record, facts):
    """Each record averages over one dimension of all that it stores. The MLP's first matrix was
    stored transposed until #52, its second one from then on."""
    said = facts[str(record)]["optim"]["muon"]
    last = "dim -1" in said["second_moment"]["axis"]
    assert last != ("dim -2" in said["second_moment"]["axis"])
    ours = {"mlp_in": "3072x768", "mlp_out": "768x3072"}
    for role in HELD[record].normuon:
        (stored,) = {word for key in said["scale_table"] if role in key for word in key.split()
                     if "3072" in word} or {ours.get(role)}
        row = last == (stored == ours.get(role))
        assert HELD[record].normuon[role] == ("row" if row else "col"), role


def test_normuon_of_53_evens_out_the_hidden_neurons_of_the_second_mlp_matrix():
    """A wide orthogonal matrix has rows of one norm: by rows NorMuon would do nothing."""
    from muon import normuon, orthogonalize

    G = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    X = orthogonalize(G * torch.logspace(-1, 1, 64), "svd")
    v = torch.zeros((1, 64) if RECORDS[53].normuon["mlp_out"] == "col" else (16, 1))
    norms = normuon(X, v, 0.95, RECORDS[53].normuon["mlp_out"]).norm(dim=0)
    assert X.norm(dim=0).std() > 0.3 * X.norm(dim=0).mean()
    assert norms.std() < 1e-4 * norms.mean()


@pytest.mark.parametrize("rule", ["adam", "muon"])
@pytest.mark.parametrize("record", RECORDS)
def test_every_record_trains_its_matrices_by_either_rule(record, rule):
    """Under adam matrices, and gates without a rate of their own, take matrix_lr, and Adam's
    options; under muon what the record says or the defaults."""
    import train_gpt
    from data.loader import Batch

    recipe = recipes.edit(pocket(HELD[record]), matrix_rule=rule, num_layers=4, num_heads=2,
                          head_dim=8, max_seq_len=1024)
    model = recipes.build_model(recipe, seed=0)
    optimizer = train_gpt.build_optimizer(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = {group["name"]: group for group in optimizer.param_groups}
    for role in set(recipes.MATRICES) | (set(recipes.GATES) - set(recipe.adam_roles)):
        if role in groups:
            assert groups[role]["rule"] == rule, role
            assert groups[role]["lr"] == recipe.matrix_lr * recipes.lr_multiplier(0, recipe), role
    for seed in range(2 * recipe.adam_every):   # a head of zeros passes no gradient at first
        tokens = torch.randint(257, (2, 65), generator=torch.Generator().manual_seed(seed))
        train_gpt.train_step(model, optimizer, recipe, Batch(tokens[:, :-1].int(), tokens[:, 1:]),
                             128, 128)
    moved = {parameter_entry(name, model.config)[0] for name, p in model.named_parameters()
             if not torch.equal(p, before[name])}
    assert {"mlp_out", "attn_out"} <= moved


def test_only_record_1_clips_and_the_rest_reduce_as_they_did(facts):
    for record in LADDER[:-1]:
        recipe, said = HELD[record], facts[str(record)]
        assert recipe.grad_clip == said["optim"]["grad_clip"]
        scattered = "reduce_scatter" in json.dumps(said["systems"]) and record >= 24
        assert (recipe.grad_collective == "reduce_scatter") == scattered
    assert [r for r in RECORDS if not RECORDS[r].grad_overlap] == [19, 20, 21, 22]


# --- schedules ------------------------------------------------------------------------------------

@pytest.mark.parametrize("record", LADDER)
def test_lr_multiplier_at_the_probed_steps(record, facts):
    probes = facts[str(record)]["schedule"]["lr"]["probes"]
    for step, expected in probes.items():
        if record in (38, 43) and int(step) >= HELD[record].scheduled_steps:
            assert expected == 0.10018  # progress was cut off at 0.9999 there
            expected = 0.1
        got = recipes.lr_multiplier(int(step), HELD[record])
        assert got == pytest.approx(expected, abs=2e-6), step


@pytest.mark.parametrize("record, starts", [(46, (700, 1400)), (53, (627, 1254)),
                                            (62, (521, 1041))])
def test_the_learning_rate_rises_past_its_bounds_not_at_them(record, starts, facts):
    """x > 1/3 in #53 and #62, x > 0.33 in #46, x = step / scheduled steps."""
    said, recipe = facts[str(record)]["schedule"]["lr"], HELD[record]
    assert said["stage_mult"] == list(recipe.lr_stages)
    bounds = ("0.33", "0.66") if record == 46 else ("1/3", "2/3")
    assert all(f"(x>{bound})" in said["shape"] for bound in bounds)
    for start, before, after in zip(starts, recipe.lr_stages, recipe.lr_stages[1:]):
        for step, full in ((start - 1, before), (start, after)):
            left = min(1.0, (recipe.scheduled_steps - step) / recipe.cooldown_steps)
            assert recipes.lr_multiplier(step, recipe) == pytest.approx(
                full * left + 0.1 * (1 - left)), step


def test_learning_rates_of_stages_need_their_bounds():
    with pytest.raises(ValueError, match="--lr_stages: expected none or 3 factors"):
        recipes.edit(RECORDS[62], lr_stages=(1.0, 2.0))


@pytest.mark.parametrize("record", [r for r in LADDER if r > 2])
def test_momentum_at_the_probed_steps(record, facts):
    said = facts[str(record)]["schedule"]["muon_momentum"]
    probes = dict(said.get("probes") or {})
    if not probes:
        steps = said["warmup"]["steps"] if said["warmup"] else 0
        start = said["warmup"]["from"] if said["warmup"] else said["value"]
        probes = {0: start, steps: said["value"], HELD[record].num_iterations - 1: said["value"]}
    for step, expected in probes.items():
        assert recipes.momentum(int(step), HELD[record]) == pytest.approx(expected, abs=1e-6)


def changes(value_at, steps: range) -> list[list]:
    found = []
    for step in steps:
        value = value_at(step)
        if not found or value != found[-1][1]:
            found.append([step, value])
    return found


@pytest.mark.parametrize("record", [r for r in LADDER if r >= 12])
def test_windows_at_every_step(record, facts):
    said, recipe = facts[str(record)]["schedule"]["window"], HELD[record]
    unit = 1 if said["unit"] == "tokens" else 128
    both = said["unit"].endswith("(short,long)")

    def window(step: int):
        short, long = recipes.windows(step, recipe, last=step == recipe.num_iterations)
        if recipe.final_long and step == recipe.num_iterations:
            long = 128 * 13  # theirs list the window that YaRN saw; 20 is checked below
        return [short // unit, long // unit] if both else long // unit

    ours = changes(window, range(recipe.num_iterations + 1))
    assert [value for _, value in ours] == [value for _, value in said["changes"]]
    # One step early: #19 to #24 stay below at an exact multiple, #38 and #41 have thirds of
    # rounded-up length.
    early = [theirs - step for (step, _), (theirs, _) in zip(ours, said["changes"])]
    num_early = {19: 4, **dict.fromkeys((21, 22, 23, 24, 38, 41), 1)}.get(record, 0)
    assert set(early) <= {0, 1} and sum(early) == num_early
    if recipe.final_long:
        assert "20" in facts[str(record)]["eval"]["note"]
        assert recipes.windows(recipe.num_iterations, recipe, last=True)[1] == 20 * 128


@pytest.mark.parametrize("window, record, keys", [
    (1024, 12, 1024),       # q - k < 1024
    (64, 15, 48),           # and a block of 128: 1 to 64 keys, 48.25 on average
    (1792, 15, 1728),       # 1,665 to 1,792, 1728.5 on average
    (128, 16, 64),          # a block of 128: 1 to 128 keys, 64.5 on average
    (14 * 128, 24, 13 * 128 + 64),
    (3 * 128, 29, 3 * 128 + 1),     # flash attention: so many before the query, and itself
])
def test_keys_seen_through_a_window(window, record, keys):
    assert recipes.window_in_keys(window, HELD[record]) == keys


@pytest.mark.parametrize("record", [15, 16, 24])
def test_a_window_of_blocks_is_the_mean_of_what_queries_saw(record):
    """Both masks counted: keys of the last n blocks, and (#15) fewer than `window` tokens back."""
    for recipe in (HELD[record], pocket(HELD[record])):
        block = recipe.window_block
        for window in {recipes.windows(step, recipe)[0] for step in range(recipe.num_iterations)}:
            n = -(-window // block)
            row = range(n * block, (n + 1) * block)     # queries of a later block: all look alike
            saw = [sum(q // block - k // block < n and q - k < window for k in range(q + 1))
                   for q in row]
            assert recipes.window_in_keys(window, recipe) == sum(saw) // block


@pytest.mark.parametrize("record", LADDER)
def test_batches_and_data(record, facts):
    said, recipe = facts[str(record)], HELD[record]
    schedule = said["schedule"]
    assert recipe.num_iterations == schedule["steps"]
    assert recipe.extension_steps == schedule["steps_extension"]
    assert recipe.total_tokens == schedule["tokens_total"]
    if schedule["batch_schedule"]:
        assert changes(lambda step: recipes.batch_tokens(step, recipe),
                       range(recipe.num_iterations)) == schedule["batch_schedule"]["changes"]
    longest = said["data"]["seq_len_train"]
    rows, seq_len = recipes.batch_shape(recipe.num_iterations - 1, recipe)
    assert seq_len == (longest[-1] if isinstance(longest, list) else longest)
    assert rows == (8 if record >= 12 else 512)
    assert (list(recipe.max_doc_stages) or recipe.max_doc_len) == said["data"]["max_doc_len"]
    assert recipe.first_batch_repeated == said["data"]["first_batch_repeated"]
    align = "none" if record < 26 else "row" if record < 29 else "document"
    assert recipe.data_align == align
    assert (recipe.val_row, recipe.val_tokens, recipe.val_every) == (
        said["eval"]["seq_len_val"], said["eval"]["val_tokens"], said["eval"]["every"])


def test_attention_gets_sharper_as_yarn_says(facts):
    """0.1 at the first window, times 1 + 0.2 ln(new/old) at each change."""
    from model import rotary_frequencies, yarn

    recipe = RECORDS[31]
    at = [yarn(rotary_frequencies(recipe.model), recipes.eval_phase(step, recipe).yarn_windows)[1]
          for step in (0, 557, 1114, 1670)]
    assert [0.1 * sharper for sharper in at] == pytest.approx(
        [0.1, 0.116946, 0.127518, 0.131778], rel=1e-5)
    assert "0.131778" in facts["31"]["arch"]["attention"]["scale_rule"]


def test_yarn_slows_what_turns_little_and_keeps_what_turns_much():
    from model import yarn

    freqs = 2 * math.pi / torch.tensor([5.0, 100.0, 1000.0, 1e9], dtype=torch.float64)
    after, _ = yarn(freqs, (1000, 2000))  # 200, 10, 1 and no turns in the old window
    keep = (10 - 1) / 31
    expected = torch.tensor([1.0, 0.5 + 0.5 * keep, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(after / freqs, expected)


def test_targets_fade_in_thirds():
    recipe = RECORDS[53]
    weights = [recipes.phase(step, recipe).target_weights for step in (0, 313, 627, 1254, 1900)]
    assert weights[0] == (1.0, 0.5, 0.25) and weights[2] == pytest.approx((1.0, 0.5), abs=1e-3)
    assert weights[1] == pytest.approx((1.0, 0.5, 0.125), abs=1e-3)
    assert weights[3] == weights[4] == (1.0,)
    assert recipes.eval_phase(0, recipe).target_weights == (1.0,)


@pytest.mark.parametrize("record, last_tied", [(53, 1253), (62, 1041), (84, 921)])
def test_the_embedding_leaves_the_head_after_the_update_at_two_thirds(record, last_tied, facts):
    recipe = HELD[record]
    assert f"until step {last_tied}" in facts[str(record)]["arch"]["tied_head"]
    assert changes(lambda step: recipes.phase(step, recipe).tied, range(recipe.num_iterations)) == [
        [0, True], [last_tied + 1, False]]
    # Adam's k-th step just was: nothing is half collected.
    assert (last_tied + 1) % recipe.adam_every == 0


def test_scalars_rest_after_each_change_in_53_alone():
    recipe = RECORDS[53]
    resting = changes(lambda step: recipes.group_schedule(step, "scalar", recipe)["frozen"],
                      range(recipe.num_iterations))
    assert resting == [[0, False], [627, True], [667, False], [1254, True], [1294, False],
                       [1880, True]]
    assert "frozen" not in recipes.group_schedule(700, "x0_lambda", recipe)
    assert [r for r, recipe in RECORDS.items() if any(
        recipes.group_schedule(step, "scalar", recipe).get("frozen")
        for step in range(recipe.num_iterations))] == [53]


def test_every_field_is_an_idea_of_some_recipe():
    """A recipe that is dropped may leave fields without a user: they are dropped with it."""
    sizes = {"vocab_size", "mlp_ratio", "bigram_factor", "compute_dtype", "scale", "track",
             "corpus", "muon_momentum", "embed_momentum", "momentum_start", "muon_steps",
             "muon_mode", "window_block", "val_tokens", "target"} - {"bigram_factor"}
    unused = {field.name for kind, of in ((type(RECORDS[62].model), lambda r: r.model),
                                          (recipes.Recipe, lambda r: r))
              for field in dataclasses.fields(kind)
              if len({str(getattr(of(recipe), field.name))
                      for recipe in recipes.RECIPES.values()}) == 1}
    assert unused == sizes


# --- the newest: numbers of their merged programs -------------------------------------------------

# record: (steps, of them extension, tokens in M, first step of the cooldown, final factor)
MERGED = {63: (1575, 40, 418.1, 690.75, 0.1), 64: (1555, 40, 412.9, 681.75, 0.1),
          70: (1547, 40, 410.8, 678, 0.1), 72: (1530, 40, 406.3, 670, 0.15),
          77: (1490, 40, 395.8, 580, 0.15), 80: (1480, 40, 393.2, 576, 0.15),
          81: (1415, 10, 372.2, 562, 0.15), 82: (1385, 10, 364.4, 550, 0.15),
          83: (1385, 10, 364.4, 550, 0.15), 85: (1300, 15, 342.8, 514, 0.15),
          88: (1285, 15, 338.8, 508, 0.15), 89: (1285, 15, 338.8, 508, 0.15)}


@pytest.mark.parametrize("record", NEWEST)
def test_steps_and_tokens_of_the_newest(record):
    steps, extension, tokens, cooldown, final = MERGED[record]
    recipe = RECORDS[record]
    assert (recipe.num_iterations, recipe.extension_steps) == (steps, extension)
    assert round(recipe.total_tokens / 1e6, 1) == tokens
    assert recipe.scheduled_steps - recipe.cooldown_steps == pytest.approx(cooldown)
    assert recipes.lr_multiplier(steps - 1, recipe) == recipe.final_lr_frac == final
    assert changes(lambda step: recipes.max_doc_len(step, recipe), range(steps)) == (
        [[0, 2048]] if record < 72 else [[0, 896], [round(recipe.scheduled_steps / 3), 2048]])


def test_schedule_of_89():
    """Thirds of 1,270 steps begin at 423 and 847, the nearest ones to 423.3 and 846.7."""
    recipe = RECORDS[89]
    steps = range(recipe.num_iterations)
    assert changes(lambda step: recipes.batch_tokens(step, recipe), steps) == [
        [0, 131_072], [423, 262_144], [847, 393_216]]
    assert changes(lambda step: recipes.windows(step, recipe)[1] // 128, steps) == [
        [0, 3], [423, 7], [847, 11], [1270, 13]]
    assert changes(lambda step: recipes.phase(step, recipe).tied, steps) == [[0, True],
                                                                            [848, False]]
    prefix = [recipes.phase(step, recipe).prefix_weight for step in steps]
    assert prefix[:424] == [0.25] * 424 and not any(prefix[847:])
    assert prefix[423:847] == pytest.approx([0.25 * (1 - i / 424) for i in range(424)])
    ahead = [recipes.phase(step, recipe).target_weights for step in (0, 422, 423, 846, 847)]
    assert ahead[0] == (1, 0.5, 0.25) and ahead[2] == (1, 0.5) and ahead[4] == (1,)
    assert ahead[1] == pytest.approx((1, 0.5, 0.25 / 423))
    assert ahead[3] == pytest.approx((1, 0.5 / 424))
    assert recipes.eval_phase(0, recipe).prefix_weight == 0
    assert all(not RECORDS[r].prefix_weight for r in RECORDS if r < 88)


def test_learning_rates_of_1375_steps():
    """Probes of the runs of #83 with 1,375 steps."""
    recipe = recipes.edit(RECORDS[83], num_iterations=1375, cooldown_steps=1365 - 546)
    probes = {0: 1.0, 454: 1.0, 455: 1.52, 545: 1.52, 700: 1.26239, 909: 0.91278, 910: 1.02778,
              1100: 0.66123, 1364: 0.15193, 1365: 0.15, 1374: 0.15}
    for step, expected in probes.items():
        assert recipes.lr_multiplier(step, recipe) == pytest.approx(expected, abs=6e-6), step
    assert round(recipe.total_tokens / 1e6, 1) == 361.8
    assert recipes.untie_step(recipe) == 912     # after the update of step 911


LAYERS = {  # record: layers with a value table, with XSA, with attention gates
    63: ([0, 1, 8, 9, 10], [], [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]),
    70: ([1, 2, 8, 9, 10], [], [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]),
    82: ([1, 2, 8, 9, 10], [1, 3, 4, 7, 8, 10], [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]),
    89: ([1, 2, 8, 9, 10], [1, 3, 4, 7], [3, 10])}


@pytest.mark.parametrize("record", LAYERS)
def test_layers_of_the_newest(record, meta_models):
    plan = meta_models[record].plan
    found = [[i for i, layer in enumerate(plan) if holds(layer) and i != 6] for holds in (
        lambda layer: layer.value_table is not None, lambda layer: layer.xsa,
        lambda layer: layer.gated)]
    assert found == list(LAYERS[record])
    tables = [layer.value_table for layer in plan if layer.value_table is not None]
    assert tables == [0, 1, 2, 3, 4]


def test_starts_of_the_newest(meta_models):
    def start(record: int, name: str) -> tuple:
        return parameter_entry(name, RECORDS[record].model)[1]

    half = ("uniform", pytest.approx(0.5 / 768 ** 0.5))
    for record in NEWEST:
        assert (start(record, "blocks.0.attn.out.weight") == half) == (record >= 64)
        assert start(record, "blocks.0.mlp.proj.weight").number == 0
        if 64 <= record < 80:
            assert start(record, "blocks.0.attn.qkv.weight") == half
        assert start(record, "value_embeds.0.weight") == ("normal", 0.01 if record >= 70 else 0)
        assert start(record, "bigram.weight").number == 0
    assert start(77, "blocks.0.attn_resid").number ** 2 == pytest.approx(1.1)
    assert start(77, "blocks.0.bigram_lambda").number == 0.05
    assert start(77, "backout_lambda").number == 0.5 and not RECORDS[81].model.backout
    for name in ("mudd", "blocks.10.mudd", "gates_early", "gates_late"):
        bound = 3 ** 0.5 * start(89, f"{name}.w1.weight").number
        assert bound == pytest.approx(0.0361, abs=1e-4)
        assert start(89, f"{name}.w2.weight").number == 0
    root = 1.1 ** 0.5
    assert [0.1 * x for x in start(89, "blocks.10.mudd.start").number] == pytest.approx(
        [0, 0, 0, 0, 0, 0, 2, 2, root, 1, 0, 0.05, root, 1])
    assert [0.1 * x for x in start(89, "mudd.start").number] == pytest.approx([0, -0.5, 0, 0, 0])
    assert meta_models[83].bigram.weight.shape == (754_560, 192)
    assert meta_models[83].signs.shape == (8192, 192)
    assert meta_models[89].bigram.weight.shape == (377_280, 768)
    assert set(meta_models[89].signs.unique().tolist()) == {-1, 1}


def test_token_gates_of_85(meta_models):
    """26 numbers from x0 for layers 0 to 3 and 41 from layer 4's input, raw, at these starts."""
    model = meta_models[85]
    plans = model.plan_early, model.plan_late
    assert [sum(count for _, _, count, _ in plan) for plan in plans] == [26, 41]
    assert [{layer for layer, *_ in plan} for plan in plans] == [
        {0, 1, 2, 3}, {4, 5, 6, 7, 8, 9, 10}]
    starts = {"xsa_BTH": 0, "attn_gate_BTH": 0.25, "x0_BT1": 0, "bigram_BT1": 0.05,
              "skip_BT1": 0.5, "dc_in_BTH": 1, "dc_out_BTH": 0}
    for plan, name in zip(plans, ("gates_early", "gates_late")):
        expected = [starts[field] for _, field, count, _ in plan for _ in range(count)]
        stored = parameter_entry(f"{name}.start", model.config)[1].number
        assert [0.1 * x for x in stored] == pytest.approx(expected)
        assert parameter_entry(f"{name}.scale", model.config)[1].number == 0.1
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    assert not names & {"attn_gate", "xsa", "x0_lambda", "bigram_lambda", "skip_gate"}
    assert model.config.dc_window == 112 and pocket(RECORDS[85]).model.dc_window == 28


# role: (rate, betas, decay) from #62 to #89, with the record that brought it
GROUPS = {"embed": (62, 0.008, (0.5, 0.95), 0.75), "head": (62, 0.008, (0.5, 0.95), 0.75),
          "value_embed": (62, 0.6, (0.75, 0.95), 0.025), "bigram": (62, 0.6, (0.75, 0.95), 0.025),
          "scalar": (62, 0.04, (0.9, 0.99), 0), "resid_lambda": (77, 0.04, (0.9, 0.95), 0),
          "post_lambda": (77, 0.008, (0.9, 0.95), 0), "value_gate": (62, 0.008, (0.9, 0.99), 0.005),
          "smear_gate": (62, 8e-5, (0.9, 0.99), 0), "mudd": (81, 0.002, (0.9, 0.99), 0.005),
          "mudd_start": (81, 0.002, (0.9, 0.99), 0), "token_gate": (85, 8e-4, (0.9, 0.99), 0.005),
          "token_gate_start": (85, 8e-4, (0.9, 0.99), 0)}


@pytest.mark.parametrize("record", NEWEST)
def test_groups_of_the_newest(record, meta_models):
    groups = {g["name"]: g for g in recipes.optimizer_groups(
        RECORDS[record], meta_models[record].named_parameters())}
    for role, (first, lr, betas, decay) in GROUPS.items():
        assert (role in groups) == (record >= first), role
        if role in groups:
            found = groups[role]
            assert (found["lr"], found["betas"], found["eps"], found["update_interval"]) == (
                pytest.approx(lr), betas, 1e-10, 2), role
            assert found["weight_decay"] == pytest.approx(decay), role
    for group in groups.values():
        if group["rule"] == "muon":
            assert (group["lr"], group["weight_decay"]) == (0.023, 1.2)
            assert group["beta2"] == (0.9 if record >= 80 else 0.95)
    assert ("attn_qk" in groups) == (record >= 80) == ("attn_in" not in groups)


# --- pocket scale ---------------------------------------------------------------------------------

@pytest.mark.parametrize("record", RECORDS)
def test_pocket_keeps_the_ideas_and_the_tokens(record):
    full, small = HELD[record], pocket(HELD[record])
    assert abs(small.total_tokens - recipes.POCKET_TOKENS) < small.batch_tokens
    sizes = {"num_layers", "num_heads", "head_dim", "vocab_size", "seq_len", "max_seq_len",
             "attn_scale", "dc_window", "compute_dtype", "stream_dtype", "embed_dtype", "head",
             "head_dtype"}
    for name in recipes.MODEL_FIELDS - sizes:
        assert getattr(small.model, name) == getattr(full.model, name), name
    for step_full in (full.num_iterations // 9, full.num_iterations // 2, full.num_iterations - 1):
        step = step_full * small.num_iterations // full.num_iterations
        assert recipes.lr_multiplier(step, small) == pytest.approx(
            recipes.lr_multiplier(step_full, full), abs=0.03)
    # So a laptop's ranks can share it.
    assert all(recipes.batch_shape(step, small)[0] >= 4 for step in range(small.num_iterations))


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("num_layers", [2, 3, 4])
def test_any_depth_works_for_every_record(record, num_layers):
    """A forward and a backward pass, and every parameter gets a gradient."""
    if RECORDS[record].model.mudd and num_layers == 2:
        with pytest.raises(ValueError, match="--num_layers: expected at least 3"):
            recipes.edit(pocket(RECORDS[record]), num_layers=num_layers)
        return
    recipe = recipes.edit(pocket(HELD[record]), num_layers=num_layers, num_heads=2, head_dim=8)
    model = recipes.build_model(recipe, seed=0)
    last = recipes.phase(recipe.num_iterations - 1, recipe)
    model.set_phase(last)
    tokens = torch.randint(recipe.model.vocab_size, (2, 65))
    loss = model(tokens[:, :-1], tokens[:, 1:]) / 128
    loss.backward()
    assert math.isfinite(loss.item())
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert not without


@pytest.mark.parametrize("record", [41, 62, 89])
def test_a_shorter_run_keeps_its_stages(record):
    recipe = recipes.change(pocket(HELD[record]), num_iterations=60)
    kinds = {recipes.phase(step, recipe).window for step in range(60)}
    assert len(kinds) >= 3 and recipe.extension_steps >= 1
    steps = recipes.phase_steps(recipe)
    assert steps[0] == 0 and len(steps) == len(set(steps)) <= 6
