"""API keys: read from a file or the environment, and kept out of every message and log."""

import ipaddress
import logging
import os
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from fgaif.errors import ConfigError

if TYPE_CHECKING:  # the configuration tree takes a second to import
    from fgaif.config import EndpointConfig

NO_KEY = "none"
"""Sent to servers on this machine where no key is set; the client refuses an empty one."""

_keys: set[str] = set()

# Keys that we never read but that a server or a proxy may show.
_SHAPES = re.compile(r"(?i)\b(bearer\s+)[^\s\"',}\\]+|\bsk-[\w*.-]{8,}")

_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")


def read_key(entry: str, config: "EndpointConfig") -> str:
    """Return the key of ``endpoints.<entry>``; from now on :func:`redact` removes it.

    A server on this machine needs none and then gets ``none``.

    Raises:
        ConfigError: no key, an unreadable file, or a key that cannot be an HTTP header.
    """
    setting = f"endpoints.{entry}.api_key_file"
    where, key = find_key(config.api_key_env, config.api_key_file, setting)
    if not key and is_loopback(config.base_url):
        return NO_KEY
    if not key:
        raise ConfigError(
            f"endpoints.{entry}: no key for {config.base_url}; set the environment variable "
            f"{config.api_key_env}, or endpoints.{entry}.api_key_file to a file that holds it"
        )
    if not fits_header(key):
        raise ConfigError(f"{where}: holds no key (blanks or control characters in it); correct it")
    _keys.add(key)
    return key


def find_key(variable: str, file: Path | None, setting: str) -> tuple[str, str]:
    """Look for a key in a file, or without one in an environment variable.

    Args:
        setting: the configuration key that names the file.

    Returns:
        Where it was looked for, in words, and what is there: an empty text for nothing.

    Raises:
        ConfigError: the file cannot be read.
    """
    if file is None:
        return f"environment variable {variable}", os.environ.get(variable, "").strip()
    where = f"{setting} = {file}"
    try:
        return where, file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise ConfigError(f"{where}: {reason}; name a file that holds the key alone") from None


def fits_header(key: str) -> bool:
    """Whether a key can stand in an HTTP header: printable ASCII without blanks."""
    return key.isascii() and key.isprintable() and " " not in key


def is_loopback(base_url: str) -> bool:
    """Tell whether a URL leads to this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def redirected_base(url: str, location: str) -> str:
    """Where a redirect of a request leads, as a base URL: without the path that the API adds.

    Args:
        url: what was asked, a WebSocket or an HTTP address.
        location: the answer's header.
    """
    try:
        asked, target = urlsplit(url), urlsplit(urljoin(url, location))
    except ValueError:  # no address at all
        return location[:200]
    path = target.path.rstrip("/")
    for end in ("/chat/completions", asked.path.rstrip("/")):
        path = path.removesuffix(end)
    scheme = target.scheme.replace("ws", "http")
    return f"{scheme}://{target.netloc.rpartition('@')[2]}{path}"[:200]


def redact(text: str) -> str:
    """Replace every key that was read, and whatever looks like one, by ``[key]``."""
    for key in sorted(_keys, key=len, reverse=True):
        text = text.replace(key, "[key]")
    return _SHAPES.sub(lambda match: f"{match[1] or ''}[key]", text)


class RedactKeys(logging.Filter):
    """Redacts records, tracebacks included; it drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the redacted text in the place of message and arguments."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


def redact_logs() -> None:
    """Attach :class:`RedactKeys` to all loggers of the API client and its HTTP libraries.

    A logger's filter does not see the records of its children, so each child gets its own.
    """
    names = [n for n in logging.root.manager.loggerDict if n.partition(".")[0] in _LOGGERS]
    for name in {*names, *_LOGGERS}:
        logger = logging.getLogger(name)
        if not any(isinstance(known, RedactKeys) for known in logger.filters):
            logger.addFilter(RedactKeys())
