"""The live page: one document that is all there is to it, and the policy that keeps everything else out of it."""

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import Final

INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@cache
def page() -> tuple[bytes, str]:
    """The document, and its Content-Security-Policy: its own script and style by their hashes, and nothing else."""
    text = resources.files("pgauthproxy.ops").joinpath("page.html").read_text("utf-8")
    hashes = {kind: _hash(content) for kind, content in INLINE.findall(text)}
    policy = (
        "default-src 'none'",
        f"script-src '{hashes['script']}'",
        f"style-src '{hashes['style']}'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return text.encode(), "; ".join(policy)


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
