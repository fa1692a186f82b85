"""The service's API key, from a file or the environment."""

import os

from fgaif.config import ServeConfig
from fgaif.errors import ConfigError

_SHORTEST = 16


def read_serve_key(config: ServeConfig) -> str | None:
    """The key that clients must send, or None where none is set.

    Raises:
        ConfigError: unreadable file, or no key for a header, or one that could be guessed.
    """
    if config.key_file is not None:
        where = f"serve.key_file = {config.key_file}"
        try:
            key = config.key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is no text"
            raise ConfigError(f"{where}: {reason}; name a file that holds the key alone") from None
    else:
        where = f"environment variable {config.key_env}"
        key = os.environ.get(config.key_env, "").strip()
        if not key:
            return None
    if len(key) < _SHORTEST or not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"{where}: holds no usable key; give at least {_SHORTEST} printable ASCII characters "
            "without blanks, for example from `openssl rand -hex 32`"
        )
    return key
