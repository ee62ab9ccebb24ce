"""Whatever an artifact holds, each way to read and show it gives a result or one of our errors, bounded in text."""

import asyncio
import json
import math
import pickle
import warnings
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from langchain_core.messages import ToolMessage

from langchain_cogview import (
    CogViewError,
    CogViewInvalidRequestError,
    GeneratedImage,
    ImageCallbackHandler,
    ImageRequest,
    ImageResult,
    gallery,
    images_from_messages,
)
from langchain_cogview.artifact import GeneratedImageArtifact, ImageArtifact, ImageFailureArtifact
from langchain_cogview.cache import CacheKey, from_entry
from langchain_cogview.cost import Charges, Money
from tests.unit_tests.notebook.displayed import assert_harmless, photo

PNG = photo(1, 16)
VALID = {
    "id": "a1",
    "url": None,  # never fetched here
    "expires_at": "2026-01-01T00:00:00Z",
    "path": None,
    "uri": None,
    "mime_type": "image/png",
    "width": 16,
    "height": 16,
    "size_bytes": len(PNG),
    "sha256": None,
    "content_filter": [{"role": "user", "level": 2}],
    "request_id": "r1",
    "response_id": "x",
    "created": 1_700_000_000,
    "model": "cogview-4",
    "size": "16x16",
    "quality": "hd",
    "prompt": "a kitten",
    "task_id": None,
    "cost": "0.06",
    "currency": "CNY",
    "seconds": 1.5,
    "cached": False,
    "sandbox": False,
    "warnings": ["w"],
}
FAILURE = {
    "index": 1,
    "error": "CogViewServerError",
    "message": "m",
    "hint": "h",
    "code": "1",
    "status": 503,
    "request_id": "r",
    "task_id": None,
    "outcome": "not_run",
    "content_filter": [],
}
RESULT = {
    "type": "cogview.image_result",
    "version": 1,
    "prompt": "a kitten",
    "model": "cogview-4",
    "size": None,
    "quality": None,
    "cost": "0.06",
    "currency": "CNY",
    "sandbox": False,
    "warnings": [],
}
ODD = [
    None, True, False, 0, -1, 1.5, math.nan, math.inf, -math.inf, 10**400, 10**5000, -(10**400), 2**63, 1e308, 1e-320,
    "", " ", "0", "-1", "NaN", "sNaN", "Infinity", "1E+1000000", "1E-1000000", "0." + "3" * 500, "1" * 5000, "1_000",
    "\ud800", "a\ud800b", "\0", "\x1b[31m", "\u202e", "<script>", "é" * 3, "x" * 100_000, "../../etc", "/etc/passwd",
    "/dev/zero", "\0/x", "2026-01-01T00:00:00", "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+14:00", "http://127.0.0.1/",
    "file:///etc/passwd", "javascript:alert(1)", "s3://bucket/x.png", "memory://x/y.png", "a::b://c", "://", "data:image/png;base64,AA==",
    b"bytes", Decimal("NaN"), Decimal("1E+999999"), Decimal(-1), datetime(2026, 1, 1), datetime.max.replace(tzinfo=UTC), object(),
    [], {}, [None], [[[]]], {"a": {"b": []}}, [{"role": 5, "level": 10**400}], [{"role": "user" * 1000, "level": True}],
    [{"level": "1" * 5000}] * 500, ["w" * 10_000] * 300, ("a",), {"role": "user"},
]  # fmt: skip
values = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20) | st.decimals(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
)


def changes(names, most=3):
    return st.dictionaries(st.sampled_from([*names, "unknown"]), values, max_size=most)


images = st.one_of(changes(GeneratedImageArtifact.__annotations__).map(lambda changed: {**VALID, **changed}), values)
failures = st.one_of(changes(ImageFailureArtifact.__annotations__).map(lambda changed: {**FAILURE, **changed}), values)
artifacts = st.builds(
    lambda changed, made, failed: {**RESULT, "images": made, "failures": failed, **changed},
    st.one_of(st.just({}), changes(set(ImageArtifact.__annotations__) - {"type"}, 2)),
    st.lists(images, min_size=1, max_size=3),
    st.lists(failures, max_size=1),
)
quickly = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def check_text(text, most=20_000):
    text.encode()
    assert len(text) <= most


def check_bundle(thing, most=150_000):
    bundle = thing._repr_mimebundle_()
    assert len(json.dumps(bundle)) <= most
    assert_harmless(bundle["text/html"])
    bundle["text/plain"].encode()


def check_image(image, folder):
    check_text(repr(image), 2_000)
    check_bundle(image, 60_000)
    assert hash(image) == hash(pickle.loads(pickle.dumps(image)))
    image.model_dump_json() if image.path is None else image.model_dump()
    if image.url:
        return  # nothing is fetched here
    for use in (image.read, lambda: image.save(folder), image.to_pil, lambda: asyncio.run(image.aread())):
        try:
            use()
        except CogViewError as error:
            check_text(str(error), 1_000)


def check_shown(made, folder):
    check_text(repr(made), 2_000)
    check_text(str(made.charges), 2_000)
    check_bundle(made)
    made.save(folder / "page.html")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in" / "here"
    path.mkdir(parents=True)
    (path / "a.png").write_bytes(PNG)
    return path


@quickly
@given(artifact=artifacts)
@example(artifact={**RESULT, "images": [VALID, {**VALID, "cost": Decimal("1E+90"), "currency": "X"}]})
@example(artifact={**RESULT, "version": 10**5000, "images": []})
@example(artifact={**RESULT, "version": True, "images": [VALID]})
def test_any_artifact_is_read_and_shown_or_one_of_our_errors(artifact, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = images_from_messages([ToolMessage("x", tool_call_id="1", artifact=artifact)])
    assert len(caught) <= 1
    for warning in caught:
        check_text(str(warning.message), 500)
    charges = Charges()
    for image in found:
        charges.add(Money.of_image(image))
    str(charges)
    for image in found:
        check_image(image, folder)
    check_shown(gallery(found), folder)
    check_shown(gallery([artifact, *found, {**RESULT, "images": [VALID]}]), folder)
    try:
        result = ImageResult.from_artifact(artifact)
    except CogViewInvalidRequestError as error:
        check_text(str(error), 500)
        check_text(error.text_for_model if hasattr(error, "text_for_model") else "", 500)
    else:
        check_text(repr(result), 5_000)
        check_bundle(result)
        result.to_artifact()
        str(result.content_filter)
    assert [path for path in folder.parent.parent.rglob("*") if path.is_file() and path.parent != folder] == []


@pytest.mark.parametrize("name", GeneratedImageArtifact.__annotations__)
def test_an_odd_value_costs_one_tile_and_not_the_others(name):
    made = gallery([{**RESULT, "images": [VALID, *({**VALID, name: odd} for odd in ODD), VALID]}])
    html = made._repr_mimebundle_()["text/html"]
    assert html.count("<figure") == len(ODD) + 2
    assert html.count("<b>Not shown</b>") >= 2
    check_text(repr(made), 500)


@quickly
@given(image=images)
def test_an_entry_of_a_cache_with_odd_values_is_an_image_or_passed_over(image, folder):
    key = CacheKey.of(ImageRequest(prompt="x"), 0, "sandbox:")
    try:
        text = json.dumps({"type": "cogview.cached_image", "version": 1, "key": key.digest, "image": image})
    except (TypeError, ValueError):
        return
    found = from_entry(key, text)
    if found is not None:
        check_image(found, folder)


@quickly
@given(image=images)
def test_an_event_with_odd_values_is_an_image_or_passed_over(image, folder):
    handler = ImageCallbackHandler()
    handler.on_custom_event("cogview.generated", image, run_id=1)
    for item in handler.images:
        check_image(item, folder)


class HostileError(Exception):
    message = 5

    def __str__(self):
        raise ValueError("no text")


def test_a_gallery_shows_foreign_exceptions_whatever_they_do(folder):
    check_shown(gallery([HostileError(), Exception("\ud800" * 10), Exception("x" * 10**6), KeyError()]), folder)


def test_costs_that_are_no_amounts_are_damage_and_add_up_to_nothing():
    for odd in ("NaN", "Infinity", "-1", "1E+1000000", "1E-1000000", True, [1], math.inf, 10**400):
        with pytest.raises(CogViewInvalidRequestError, match="damaged at images.0.cost"):
            ImageResult.from_artifact({**RESULT, "images": [{**VALID, "cost": odd}]})


def test_a_moment_without_a_time_zone_is_in_utc():
    [image] = ImageResult.from_artifact({**RESULT, "images": [{**VALID, "expires_at": "2026-01-01T00:00:00"}]}).images
    assert image.expires_at == datetime(2026, 1, 1, tzinfo=UTC)
    assert GeneratedImage(id="a", request_id="r", model="m", prompt="p", expires_at=datetime(2026, 1, 1)) is not None
