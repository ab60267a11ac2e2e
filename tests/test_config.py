"""The command line, the presets and the checks."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

from lite_mentor.config import PRESETS, Config, check, load, parse
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
        (["--updates-per-step", "3"], "does not divide"),
        (["--micro-tokens", "100"], "--micro-tokens 100 cannot hold one rollout"),
        (["--device", "tpu"], "use auto, cpu or cuda"),
        (["--temperature", "nan"], "--temperature is nan"),
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


def test_hash_ignores_what_does_not_change_the_learning():
    base = PRESETS["tiny"]
    assert (
        base.hash() == dataclasses.replace(base, out="elsewhere", eval_size=7, micro_tokens=9999, sandbox="off").hash()
    )
    assert base.hash() != dataclasses.replace(base, lr=1e-5).hash()
