"""The command line, the presets and the checks."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re

import pytest

from lite_mentor.config import PRESETS, Config, check, is_config, load, parse
from lite_mentor.errors import UserError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_named_after_itself_and_passes_its_own_checks(name):
    assert PRESETS[name].preset == name
    check(PRESETS[name])


def test_every_field_has_a_sentence():
    text = inspect.getsource(Config)
    for field in dataclasses.fields(Config):
        after = text.split(f"\n    {field.name}: ", 1)[1].split("\n", 2)[1]
        assert after.strip().startswith('"""'), field.name


def test_flags_override_single_fields_of_the_preset():
    config = parse(["--preset", "tiny", "--steps", "3", "--prompts-per-step", "2", "--reward", "sparse", "--check"])
    assert (config.preset, config.steps, config.prompts_per_step, config.reward) == ("tiny", 3, 2, "sparse")
    assert config.check is True
    assert config.student == PRESETS["tiny"].student


def test_cuda_graphs_are_decided_by_the_machine_unless_given():
    assert {config.cuda_graphs for config in PRESETS.values()} == {"auto"}
    assert parse(["--cuda-graphs", "off"]).cuda_graphs == "off"
    with pytest.raises(SystemExit):
        parse(["--cuda-graphs"])


def test_without_flags_it_is_the_quick_preset():
    assert parse([]) == PRESETS["quick"]


def test_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--group-sise", "4"])
    assert error.value.code == 2
    assert "--group-size" in capsys.readouterr().err


def test_unknown_preset_names_the_presets():
    with pytest.raises(UserError, match="no such preset; choose one of quick, tiny"):
        parse(["--preset", "huge"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "0"], "--steps is 0; it must be greater than 0"),
        (["--group-size", "1"], "--group-size is 1, so no rollout has another to be compared with"),
        (["--top-p", "1.5"], "top-p lies in"),
        (["--drop-mass", "1"], "--drop-mass is 1.0; it is a probability, from 0 to below 1: try 0.001"),
        (["--drop-mass", "0.1", "--kl", "exact"], "--drop-mass bounds no error with --kl exact"),
        (["--updates-per-step", "3"], "does not divide"),
        (["--micro-tokens", "100"], "--micro-tokens 100 cannot hold one rollout"),
        (["--device", "tpu"], "use auto, cpu or cuda"),
        (["--date", "2026-02-30"], "--date '2026-02-30': write a day as 2026-12-01"),
        (["--date", "20261201"], "--date '20261201': write a day as 2026-12-01"),
        (["--device", "cudax"], "use auto, cpu or cuda"),
        (["--device", "c\n"], "--device 'c\\n': use auto"),
        (["--preset", "a\nb"], "--preset 'a\\nb': there is no such preset"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--entropy", "nan"], "--entropy is nan; it must be finite"),
        (["--lr", "inf"], "--lr is inf; it must be finite"),
        (["--clip", "0.1", "inf"], "--clip is inf; it must be finite"),
        (["--clip", "-0.1", "0.2"], "--clip is -0.1; it must not be negative"),
        (["--seed", "9223372036854775808"], "--seed is 9223372036854775808; it must be below 2 ** 63"),
        (["--cache-gib", "nan"], "--cache-gib is nan; it must be finite"),
        (["--sft-steps", "-1"], "--sft-steps is -1; it must not be negative"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(flags, sentence):
    with pytest.raises(UserError) as error:
        parse(flags)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_config_json_round_trip(tmp_path):
    config = parse(["--preset", "tiny", "--clip", "0.1", "0.3"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.asdict()))
    assert load(str(path)) == config


@pytest.mark.parametrize("text", ["{", "[]", '{"preset": "tiny", "no_such_field": 1}', "3"])
def test_a_foreign_config_json_is_one_sentence(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not the configuration of a run"):
        load(str(path))


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("lr", None, "lr is None"),
        ("lora_alpha", [64], r"lora_alpha is \[64\]"),
        ("seed", "0", "seed is '0'"),
        ("check", 1, "check is 1"),
        ("steps", True, "steps is True"),
        ("steps", 3.0, "steps is 3.0"),
        ("loss", "no", "loss is 'no'"),
        ("reward", {"a": 1}, "reward is"),
        ("clip", [0.1], r"clip is \[0.1\]"),
        ("levels", ["1"], r"levels is \['1'\]"),
        ("eval_suites", "test", "eval_suites is 'test'"),
        ("\x1b[2J", 1, r"there is no setting '\\x1b\[2J'"),
    ],
)
def test_a_config_json_with_a_value_of_another_type_is_one_sentence(tmp_path, field, value, shown):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**PRESETS["tiny"].asdict(), field: value}))
    with pytest.raises(UserError, match=f"not the configuration of a run of this version: {shown}"):
        load(str(path))


def test_a_config_json_that_lacks_a_field_or_is_nested_too_deeply_is_one_sentence(tmp_path):
    path = tmp_path / "config.json"
    row = PRESETS["tiny"].asdict()
    del row["tis_cap"]
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match="of this version: tis_cap is missing"):
        load(str(path))
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not the configuration of a run"):
        load(str(path))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--clip", "1.5", "0.2"], "--clip 1.5 0.2: a ratio cannot fall below 0, so low is 1 at most."),
        (["--loss", "gspo"], "which --clip 0.2 0.28 never reaches; give --clip 0.0003 0.0004."),
    ],
)
def test_a_clip_that_cannot_be_or_never_holds(flags, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse(flags)
    assert parse(["--loss", "gspo", "--clip", "0.0003", "0.0004"]).loss == "gspo"


def test_a_resumed_run_stays_where_it_is_and_forgets_what_only_one_command_meant(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], check=True, resume_anyway=True, sandbox="off", lr=0.25)
    (tmp_path / "config.json").write_text(json.dumps(config.asdict()))
    again = parse(["--resume", str(tmp_path)])
    assert (again.check, again.resume_anyway, again.sandbox, again.lr) == (False, False, "on", 0.25)
    assert parse(["--resume", str(tmp_path), "--sandbox", "off"]).sandbox == "off"
    with pytest.raises(UserError, match="leave --out away"):
        parse(["--resume", str(tmp_path), "--out", "elsewhere"])


@pytest.mark.skipif(os.name != "posix", reason="its kinds of files")
@pytest.mark.usefixtures("soon")
def test_a_folder_from_elsewhere_is_looked_at_before_its_settings_are_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json is a pipe"):
        parse(["--resume", str(tmp_path)])


def test_what_is_the_configuration_of_a_run(tmp_path):
    path = tmp_path / "config.json"
    assert not is_config(path)
    for text, is_one in (
        (json.dumps(PRESETS["tiny"].asdict()), True),
        ('{"model_type": "llama"}', False),
        ("[", False),
    ):
        path.write_text(text)
        assert is_config(path) is is_one


@pytest.mark.parametrize("name", ["\u0645\u06cc\u200c\u062e", "👩\u200d🔬", "a\xadb"])
def test_a_name_may_hold_what_belongs_to_its_words(tmp_path, name):
    config = parse(["--out", name])
    assert config.out == name
    (tmp_path / "config.json").write_text(json.dumps(config.asdict()))
    assert load(str(tmp_path / "config.json")) == config


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\n", "\u202ea", "a\u2069", "\udcff"])
def test_a_name_that_deceives_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"--out .* holds a character that cannot be shown"):
        parse(["--out", name])
    (tmp_path / "config.json").write_text(json.dumps({**PRESETS["tiny"].asdict(), "out": name}))
    with pytest.raises(UserError, match="not the configuration of a run"):
        load(str(tmp_path / "config.json"))
