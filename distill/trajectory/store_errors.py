"""What an error of the storage client means, in words that quote no URL and no credentials."""

from __future__ import annotations

import re


def meaning(error: Exception, text: str, reason: str) -> tuple[str, str]:
    """(sentence, kind) of a client's error with this text and reason."""
    status, kind = _status(text), type(error).__name__
    if kind == "NotSupportedError":
        return "can't be read: the server sends no parts of files (range requests); use another", "refused"
    if re.search("NoSuchBucket|ContainerNotFound|bucket does not exist", text):
        return "the bucket does not exist: correct the URL, or create it", "bucket"
    if isinstance(error, FileNotFoundError) or status == 404:
        return "does not exist: index the trajectory again, or upload it", "missing"
    if "169.254.169.254" in text or "metadata.google" in text:
        return "no credentials were found: set them in the environment (AWS_ACCESS_KEY_ID, ...)", "denied"
    if status in (401, 403):
        return (
            f"the credentials were refused ({reason}): check those in the environment and what they may read",
            "denied",
        )
    if kind == "PreconditionError" or status == 412:
        return "was replaced since it was listed: index the trajectory again", "changed"
    if status == 416:
        return "is shorter than expected: it is truncated", "short"
    if status is None or status in (408, 425, 429) or status >= 500:
        return f"can't be reached ({reason}): try again when the storage is well", "unreachable"
    return f"was refused ({reason}): correct the request", "refused"


def _status(text: str) -> int | None:
    found = re.search(r"status code: (\d{3})", text)
    return int(found[1]) if found else None


def reason_of(error: Exception) -> str:
    """The few words of a client's error that name no URL."""
    text = str(error)
    if code := re.search(r"<Code>(\w+)</Code>", text):
        return code[1]
    if status := re.search(r"status code: (\d{3}[\w ]*)", text):
        return status[1].strip()
    last = text.split("\n")[0].rpartition(" - ")[2]
    return re.sub(r"\S+://\S+", "...", last)[:120]
