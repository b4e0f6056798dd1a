"""The command line: everything is checked before anything starts, and nothing is ignored."""

import pytest

import recipes
from trainer import options


def parse(*words: str, has_cuda: bool = False):
    return options.parse(list(words), has_cuda=has_cuda)


def test_defaults_follow_the_machine():
    assert parse()[1].scale == "pocket"
    assert parse(has_cuda=True)[1].scale == "full"
    assert parse("--device", "cpu", has_cuda=True)[1].scale == "pocket"


@pytest.mark.parametrize("words, name, value", [
    (("--num_iterations", "50"), "num_iterations", 50),
    (("--num-iterations=50",), "num_iterations", 50),
    (("--batch_tokens", "8_192"), "batch_tokens", 8192),
    (("--embed_lr", "3e-4"), "embed_lr", 3e-4),
    (("--target", "none"), "target", None),
    (("--target", "3.5"), "target", 3.5),
    (("--first_batch_repeated", "false"), "first_batch_repeated", False),
])
def test_values_become_fields_of_the_recipe(words, name, value):
    assert getattr(parse("--record", "6", *words)[1], name) == value


def test_a_field_of_the_model_is_an_option_too():
    assert parse("--num_layers", "2", "--tied_head", "false")[1].model.num_layers == 2


def test_options_of_the_run():
    run, _ = parse("--seed", "7", "--runs", "5", "--wandb", "--record", "6")
    assert (run.seed, run.runs, run.wandb, run.record) == (7, 5, True, "6")


def test_fewer_steps_keep_the_shape_of_the_schedule():
    full = recipes.RECORDS[6]
    half = recipes.change(full, num_iterations=full.num_iterations // 2)
    at = [recipes.lr_multiplier(s, half) for s in range(0, half.num_iterations, 50)]
    assert at == pytest.approx([recipes.lr_multiplier(2 * s, full)
                                for s in range(0, half.num_iterations, 50)], abs=1e-3)


@pytest.mark.parametrize("words, says", [
    (("--recrd", "6"), "did you mean --record?"),
    (("--nonsense", "6"), "--help lists all"),
    (("--record", "99"), "expected one of"),
    (("--record", "3.5"), "expected one of 1, 2, 3"),
    (("--record", "25"), "23, 24, 26, 27"),
    (("--scale", "full"), "--scale pocket"),
    (("--record", "6", "--head", "fp8"), "fp32 or bf16 (this recipe has no factors for fp8)"),
    (("--record", "62", "--num_heads", "3"), "an even number (heads are paired)"),
    (("--record", "41", "--extension_steps", "9999"), "--extension_steps: expected 0 to below"),
    (("--record", "17", "--num_layers", "1"), "--num_layers: expected at least 2"),
    (("--record", "9", "--qkv_lambda", "true"), "--qkv_lambda: expected false"),
    (("--record", "12", "--packed", "false"), "true where attention has windows"),
    (("--record", "5", "--windows", "two"), "--windows: expected one"),
    (("--record", "15", "--window_block", "0"), "--window_block: expected a whole number from 1"),
    (("--record", "27", "--softcap_div", "0"), "--softcap_div: expected none or above 0"),
    (("--record", "8", "--muon_scale", "big"), "--muon_scale: expected none or unit_rms"),
    (("--record", "8", "--momentum_form", "sma"), "--momentum_form: expected ema or heavy_ball"),
    (("--record", "62", "--loss_divisor", "0"), "--loss_divisor: expected none or a whole number"),
    (("--record",), "expected a value"),
    (("--num_iterations", "many"), "expected a whole number, got 'many'"),
    (("--num_iterations", "0"), "expected a whole number from 1, got 0"),
    (("--embed_lr", "-1"), "above 0, got -1.0"),
    (("--embed_lr", "nan"), "above 0, got nan"),
    (("--cooldown_steps", "100000"), "--cooldown_steps: expected 0 to"),
    (("--batch_tokens", "1000"), "expected a multiple of"),
    (("--compute_dtype", "fp16"), "expected fp64 or fp32 or bf16, got fp16"),
    (("--tied_head", "maybe"), "expected true or false"),
    (("--scale", "huge"), "expected one of auto"),
    (("--seed", "1", "--seed", "2"), "given twice"),
    (("--runs", "0"), "--runs"),
    (("stray",), "expected an option"),
    (("--device", "cuda"), "there is no CUDA device here"),
    (("--track", "short"), "unknown option"),
    (("--record", "normal"), "89, norms; got 'normal'"),
    (("--record", "89", "--num_layers", "2"), "--num_layers: expected at least 3"),
    (("--record", "85", "--mudd", "false"), "--token_gates: expected false without mudd"),
    (("--record", "6", "--other_rule", "norms"), "expected adam where head and embedding share"),
    (("--record", "norms", "--matrix_rule", "adam"), "expected muon where other_rule is norms"),
])
def test_a_wrong_command_line_is_one_line_that_helps(words, says):
    with pytest.raises(options.OptionError) as error:
        parse(*words)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_help_names_every_option_and_fits_the_screen():
    text = options.help_text()
    for name in options.recipe_kinds():
        assert f"--{name} " in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_recipe_survives_its_json():
    import json
    for recipe in (r for base in recipes.RECIPES.values() for r in (base, recipes.pocket(base))):
        assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(recipe)))) == recipe
