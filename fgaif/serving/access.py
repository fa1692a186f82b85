"""The service's API key, from a file or the environment."""

from fgaif.chat.secrets import find_key, fits_header
from fgaif.config import ServeConfig
from fgaif.errors import ConfigError

_SHORTEST = 16


def read_serve_key(config: ServeConfig) -> str | None:
    """The key that clients must send, or None where none is set.

    Raises:
        ConfigError: unreadable file, or no key for a header, or one that could be guessed.
    """
    where, key = find_key(config.key_env, config.key_file, "serve.key_file")
    if not key and config.key_file is None:
        return None
    if len(key) < _SHORTEST or not fits_header(key):
        raise ConfigError(
            f"{where}: holds no usable key; give at least {_SHORTEST} printable ASCII characters "
            "without blanks, for example from `openssl rand -hex 32`"
        )
    return key
