"""Hide secrets in what a run writes and sends: its log, its card, the config that trackers get."""

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HIDDEN = "(hidden)"  # plain text in YAML, JSON, Markdown and HTML alike

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# The last word of a key that names a secret: hub_token, AWS_SECRET_ACCESS_KEY, clientSecret. Keys
# that name where a secret is (api_token_env) or count tokens (max_tokens) end with another word.
SECRETS = {
    *("token", "key", "keys", "apikey", "secret", "secrets", "password", "passwords", "passwd"),
    *("pwd", "passphrase", "credential", "credentials", "authorization", "bearer", "cookie"),
    *("signature", "sig"),
}
# A token of the vocabulary has one of these words before it: pad_token.
SPECIAL_TOKENS = {
    *("bos", "eos", "eot", "eom", "unk", "sep", "pad", "cls", "mask", "prefix", "suffix"),
    *("image", "video", "audio", "boi", "eoi", "boa", "eoa", "think"),
}
# Whoever knows a webhook's address can post there.
ADDRESSES = ("webhook",)

USER_IN_URL = re.compile(r"(?<=://)[^/?#\s\"']+(?=@)")
PARAMETER_IN_URL = re.compile(r"(?<=[?&])([\w.-]+)=([^&#\s\"']+)")
COMMENTS = re.compile(r"(?:^|\s)#(.*)")
KEY = re.compile(r"([\w-]+)[\"']?\s*[:=]")


def names_a_secret(key: Any) -> bool:
    """Return whether the value of a key of this name is a secret.

    Example:
        names_a_secret("wandb_api_key")  # True
        names_a_secret("max_tokens")     # False
    """
    words = [word.lower() for word in WORD.findall(str(key))]
    if not words or not re.fullmatch(r"[\w.-]+", str(key)):
        return False
    if words[-1] == "token" and words[-2:-1] and words[-2] in SPECIAL_TOKENS:
        return False
    return words[-1] in SECRETS or any(word in ADDRESSES for word in words)


def redact(value: Any) -> Any:
    """Return plain values without secrets: of keys that name one, and of URLs.

    Texts and numbers are hidden; `true`, `false` and null say only whether there is one.
    """
    if isinstance(value, dict):
        return {
            key: _hidden(item) if names_a_secret(key) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_urls(value) if isinstance(value, str) else value


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # Numbers in a list are no secret: a dimension may be called "key", and have a scale.
        return [item if isinstance(item, int | float) else _hidden(item) for item in value]
    return value if value is None or isinstance(value, bool) else HIDDEN


def redact_urls(text: str) -> str:
    """Return a text without the user, password and signing parameters of the URLs in it."""

    def parameter(match: re.Match) -> str:
        return f"{match[1]}={HIDDEN}" if names_a_secret(match[1]) else match[0]

    return PARAMETER_IN_URL.sub(parameter, USER_IN_URL.sub(HIDDEN, text))


def redact_yaml(text: str) -> str | None:
    """Return YAML without secrets; None where it can't be read.

    As it is where there are none. Otherwise without its comments, which may hold one too.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    hidden = redact(values)
    if hidden == values and redact_urls(text) == text and not any(_keys_in_comments(text)):
        return text
    return yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True, width=100)


def _keys_in_comments(text: str) -> Iterator[bool]:
    for comment in COMMENTS.findall(text):
        yield from map(names_a_secret, KEY.findall(comment))


def redact_config_file(path: str | None) -> str | None:
    """Return the path of a config file that may be copied anywhere: the same where it may.

    Otherwise of a redacted copy. It stays when the process ends: trackers upload in their own time.
    """
    if not path or not Path(path).is_file():
        return path
    text = Path(path).read_text(encoding="utf-8")
    hidden = redact_yaml(text)
    if hidden == text:
        return path
    copy = Path(tempfile.mkdtemp(prefix="axolotl_amopo_")) / Path(path).name
    copy.write_text(hidden or "", encoding="utf-8")
    return str(copy)


def redact_logged_config(record: logging.LogRecord) -> bool:
    """Hide secrets in the config that axolotl logs, as a filter of its logger.

    The log goes to `debug.log` in the output folder, which is uploaded with the model.
    """
    if str(record.msg).startswith("config:") and isinstance(record.args, tuple) and record.args:
        values = redact(json.loads(str(record.args[0])))
        record.args = (json.dumps(values, indent=2, sort_keys=True),)
    return True
