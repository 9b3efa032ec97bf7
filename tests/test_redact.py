"""Which values are hidden where a config is written, and that no others are."""

from pathlib import Path

import pytest
import yaml
from runs import ROOT
from test_data import data_format

from axolotl_amopo.config.redact import names_a_secret, redact, redact_config_file, redact_yaml


@pytest.mark.parametrize(
    "key",
    [
        *("token", "hub_token", "HF_TOKEN", "hf_token_2", "wandb_api_key", "apiKey", "api_keys"),
        *("clientSecret", "aws_secret_access_key", "password", "db.password", "Authorization"),
        *("swanlab_lark_secret", "swanlab_lark_webhook_url", "X-Amz-Signature"),
    ],
)
def test_a_secret(key):
    assert names_a_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        *("tokens", "max_tokens", "eot_tokens", "special_tokens", "pad_token", "image_token"),
        *("token_ids", "pad_token_id", "tokenizer_type", "include_tokens_per_second"),
        *("secret_env", "api_token_env", "keyboard", "monkey", "tokenise", "passes"),
        *("rows without a key", 128009, ""),
    ],
)
def test_no_secret(key):
    assert not names_a_secret(key)


def test_what_is_hidden():
    url = "https://{}example.org/rows.json?split=train&{}"
    given = {
        "token": "abc",
        "password": 12345678,
        "hf_use_auth_token": True,
        "api_key": None,
        "env": [{"AWS_SECRET_ACCESS_KEY": "abc"}],
        "secrets": {"a": "abc", "b": ["abc"]},
        "path": url.format("user:p@ss@", "token=abc&X-Amz-Signature=abc"),
        "git": "ssh://abc@example.org",
        # A dimension may be called so.
        "scales": {"key": [1, 5]},
        "hub": "hf://datasets/someone/rows@main/data.json",
        "template": "{{ user }}@{{ host }} said: token=abc",
    }
    hidden = redact(given)
    assert hidden == given | {
        "token": "(hidden)",
        "password": "(hidden)",
        "env": [{"AWS_SECRET_ACCESS_KEY": "(hidden)"}],
        "secrets": {"a": "(hidden)", "b": ["(hidden)"]},
        "path": url.format("(hidden)@", "token=(hidden)&X-Amz-Signature=(hidden)"),
        "git": "ssh://(hidden)@example.org",
    }
    assert redact(hidden) == hidden


@pytest.mark.parametrize("path", sorted((ROOT / "example_configs").glob("*.yml")), ids=str)
def test_yaml_without_secrets_stays_as_it_is(path):
    assert redact_yaml(path.read_text(encoding="utf-8")) == path.read_text(encoding="utf-8")
    assert redact_config_file(str(path)) == str(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: {api_key: abc, b: 1}  # why",
        "api_key: |\n  abc\n  abc\nb: 1",
        "name: &k abc\napi_key: *k\nb: 1",
        "b: 1\n# api_key: abc",
        "b: 1  # see https://abc@example.org",
        "'api_key': !!str 'abc'",
    ],
)
def test_yaml_with_secrets_is_still_yaml(text):
    hidden = redact_yaml(text)
    if "&k" in text:
        # The key that it stands under first does not name a secret.
        assert yaml.safe_load(hidden) == {"name": "abc", "api_key": "(hidden)", "b": 1}
        return
    assert "abc" not in hidden
    keys = yaml.safe_load(text)
    assert yaml.safe_load(hidden).keys() == keys.keys()


def test_a_copy_is_made_where_there_is_a_secret(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("api_key: abc\nb: 1\n")
    copy = redact_config_file(str(path))
    assert copy != str(path) and copy.endswith("/config.yml")
    assert Path(copy).read_text() == "api_key: (hidden)\nb: 1\n"
    assert path.read_text() == "api_key: abc\nb: 1\n"
    assert redact_config_file(None) is None


def test_the_name_of_a_dataset():
    """It stands in logs, errors, cards, and in the facts of prepared rows."""
    entry = {"data_files": ["https://user:abc@example.org/rows.json", "more.json"]}
    name = data_format("rated", entry=entry).source.name
    assert name == "https://(hidden)@example.org/rows.json, more.json"
