"""The same script of replies gives the same outcomes, sync and async."""

import asyncio

import pytest

from langchain_cogview import CogViewError, CogViewImageGenerator, Sandbox

SCRIPTS = {
    "plain": [],
    "limit, then good": [("rate-limit", {"retry_after": 0})],
    "limit to the end": [("rate-limit", {"retry_after": 0})] * 3,
    "busy, then blocked": [("busy", {"retry_after": 0}), ("content-filter", {"level": 1})],
    "unavailable, then balance": [("unavailable", {"retry_after": 0}), ("balance", {})],
    "server error": [("server-error", {})],
    "malformed": [("malformed", {})],
    "wrong key": [("auth", {})],
    "gateway": [("status", {"status": 502, "body": b"<html>"})],
    "teapot": [("status", {"status": 418, "body": b"\xff\xfe"})],
    "redirect": [("status", {"status": 302, "body": b""})],
    "empty success": [("status", {"status": 200, "body": b""})],
    "link of another scheme": [("status", {"status": 200, "body": b'{"data":[{"url":"ftp://x/y"}]}'})],
    "flagged": [("flagged", {"level": 0})],
    "dead link": [("expired-url", {})],
}


def outcome(script, how, tmp_path):
    with Sandbox() as sandbox:
        for fault, options in script:
            sandbox.fail_next(fault, **options)
        generator = CogViewImageGenerator(base_url=sandbox.base_url, output_dir=tmp_path)
        try:
            result = generator.invoke("x") if how == "sync" else asyncio.run(generator.ainvoke("x"))
        except CogViewError as error:
            facts = (
                type(error),
                error.code,
                error.status,
                error.outcome,
                error.attempts,
                (error.detail or "")[:20],
                error.text_for_model.replace(error.request_id, "ID"),
            )
        else:
            image = result.images[0]
            facts = (
                image.sha256,
                image.content_filter,
                image.warnings and image.warnings[0][:40],
                image.path is not None,
            )
        return facts, len(sandbox.requests), len(sandbox.downloads)


@pytest.mark.parametrize("name", SCRIPTS)
def test_sync_and_async_end_alike(name, tmp_path, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda least, most: least)  # the waits that no reply asks for
    try:
        assert outcome(SCRIPTS[name], "sync", tmp_path) == outcome(SCRIPTS[name], "async", tmp_path)
    except ValueError as error:  # an option that the sandbox does not have would hide the comparison
        pytest.fail(str(error))
