"""The MCP server in this process, by the SDK's own client and both protocol versions."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from pathlib import Path

import pytest

from langchain_cogview import ImageResult

pytest.importorskip("mcp")
from mcp import Client
from mcp.shared.exceptions import MCPError
from PIL import Image

from langchain_cogview.mcp.server import Approval, CogViewServer, ServerSettings

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(params=["2025-11-25", "2026-07-28"])
def mode(request):
    return "legacy" if request.param == "2025-11-25" else request.param


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "images"


@pytest.fixture
def make(sandbox, folder):
    """Makes servers that use one folder and one sandbox; each stands for a process."""
    made = []

    def server(approve="never", inline="thumbnail", **settings):
        settings = {"base_url": sandbox.base_url, "output_dir": folder, **settings}
        made.append(CogViewServer(ServerSettings(settings, Approval.parse(approve), inline)))
        return made[-1]

    yield server
    for item in made:
        end(item)


def end(server):
    """What the end of the process does: the images are finished, and the locks are released."""
    server.finish()
    if server._images:
        server._images.records.close()


def size_of(result):
    return len(result.model_dump_json(by_alias=True, exclude_none=True).encode())


def text_of(result):
    return "\n".join(block.text for block in result.content if block.type == "text")


async def test_the_tools_say_what_they_do_and_none_takes_a_file_name_or_deletes(make, mode):
    async with Client(make().app, mode=mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == {"generate_image", "get_image", "list_images", "estimate_cost"}
    assert set(tools["generate_image"].input_schema["properties"]) == {"prompt", "size", "quality", "wait_seconds"}
    assert tools["generate_image"].input_schema["properties"]["wait_seconds"]["maximum"] == 50
    assert tools["generate_image"].input_schema["required"] == ["prompt"]
    assert not tools["generate_image"].annotations.read_only_hint
    assert not tools["generate_image"].annotations.idempotent_hint
    for name in ("get_image", "list_images", "estimate_cost"):
        assert tools[name].annotations.read_only_hint and tools[name].annotations.idempotent_hint, name
    for tool in tools.values():
        assert tool.output_schema["type"] == "object" and "status" in tool.output_schema["required"], tool.name


async def test_an_image_is_a_line_a_thumbnail_for_the_user_a_link_and_the_artifact(make, mode, sandbox, folder):
    async with Client(make().app, mode=mode) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
        assert not result.is_error
        text, thumbnail, link = result.content
        image = result.structured_content["images"][0]
        assert (
            "\n" not in text.text and image["id"] in text.text and image["path"] in text.text and "Cost:" in text.text
        )
        assert thumbnail.mime_type == "image/jpeg" and thumbnail.annotations.audience == ["user"]
        content = base64.b64decode(thumbnail.data)
        assert len(content) <= 100_000 and Image.open(io.BytesIO(content)).size == (512, 512)
        assert link.uri == f"cogview://images/{image['id']}" and link.mime_type == "image/png"
        assert size_of(result) < 150_000
        assert result.structured_content["status"] == "made" and result.structured_content["id"] == image["id"]
        read = ImageResult.from_artifact(result.structured_content, within=folder)
        assert read.image.read() == Path(image["path"]).read_bytes()
        whole = await client.read_resource(link.uri)
        assert base64.b64decode(whole.contents[0].blob) == read.image.read()
        assert whole.contents[0].mime_type == "image/png"
    assert sandbox.images_made == 1


@pytest.mark.parametrize("word", ["see", "look", "shows", "here is"])
async def test_no_text_suggests_that_the_model_has_seen_the_image(make, word):
    async with Client(make().app) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
    assert word not in text_of(result).lower()


async def test_a_large_and_detailed_image_stays_below_the_limit_of_a_result(make, sandbox, monkeypatch):
    noise = io.BytesIO()
    Image.effect_noise((1024, 1024), 200).convert("RGB").save(noise, "PNG")
    monkeypatch.setattr("langchain_cogview.mcp.results.GeneratedImage", object, raising=False)

    async def noisy(self):
        return noise.getvalue()

    monkeypatch.setattr("langchain_cogview.result.GeneratedImage.aread", noisy)
    async with Client(make().app) as client:
        result = await client.call_tool("generate_image", {"prompt": "字" * 900})
    assert [block.type for block in result.content] == ["text", "image", "resource_link"]
    assert 50_000 < size_of(result) < 150_000


@pytest.mark.parametrize(
    ("inline", "kinds"), [("none", ["text", "resource_link"]), ("full", ["text", "image", "resource_link"])]
)
async def test_a_result_has_of_the_image_what_the_option_says(make, inline, kinds):
    async with Client(make(inline=inline).app) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
    assert [block.type for block in result.content] == kinds
    if inline == "full":
        path = result.structured_content["images"][0]["path"]
        assert base64.b64decode(result.content[1].data) == Path(path).read_bytes()
        assert result.content[1].mime_type == "image/png"


async def test_a_call_ends_with_its_wait_and_the_image_is_collected_for_nothing(make, mode, sandbox):
    async with Client(make().app, mode=mode) as client:
        first = await client.call_tool("generate_image", {"prompt": "a kitten [[slow:4]]", "wait_seconds": 1})
        assert not first.is_error and first.structured_content["status"] == "running"
        image_id = first.structured_content["id"]
        assert image_id in text_of(first) and "get_image" in text_of(first) and "free" in text_of(first)
        second = await client.call_tool("get_image", {"id": image_id, "wait_seconds": 50})
        assert second.structured_content["status"] == "made"
        third = await client.call_tool("get_image", {"id": second.structured_content["id"]})
        assert third.structured_content["images"] == second.structured_content["images"]
    assert sandbox.images_made == 1


async def test_a_call_that_may_not_wait_has_an_id_at_once(make, sandbox):
    async with Client(make().app) as client:
        first = await client.call_tool("generate_image", {"prompt": "a kitten [[slow:1]]", "wait_seconds": 0})
        assert first.structured_content["status"] == "running"
        second = await client.call_tool("get_image", {"id": first.structured_content["id"]})
        assert second.structured_content["status"] == "made"
    assert sandbox.images_made == 1


async def test_a_client_that_ends_a_call_and_sends_it_again_pays_once(make, mode, sandbox):
    async with Client(make().app, mode=mode) as client:
        for _ in range(3):
            call = asyncio.ensure_future(client.call_tool("generate_image", {"prompt": "a kitten [[slow:3]]"}))
            await asyncio.sleep(0.2)
            call.cancel()
            await asyncio.wait([call])
        result = await client.call_tool("generate_image", {"prompt": "a kitten [[slow:3]]"})
        assert result.structured_content["status"] == "made" and "nothing is paid again" in text_of(result)
        assert sandbox.images_made == 1
        again = await client.call_tool("generate_image", {"prompt": "a kitten [[slow:3]]"})
    assert sandbox.images_made == 2  # the user got the first, and wants another one
    assert again.structured_content["id"] != result.structured_content["id"]


async def test_equal_calls_at_the_same_time_are_an_image_each(make, sandbox):
    async with Client(make().app) as client:
        calls = [client.call_tool("generate_image", {"prompt": "a kitten [[slow:1]]"}) for _ in range(3)]
        results = await asyncio.gather(*calls)
    assert len({result.structured_content["id"] for result in results}) == sandbox.images_made == 3


async def test_a_later_server_finds_the_images_and_counts_what_was_spent(make, mode, sandbox):
    server = make(max_images=2)
    async with Client(server.app, mode=mode) as client:
        made = await client.call_tool("generate_image", {"prompt": "a kitten"})
    await asyncio.to_thread(end, server)
    later = make(max_images=2)
    async with Client(later.app, mode=mode) as client:
        image_id = made.structured_content["id"]
        found = await client.call_tool("get_image", {"id": image_id})
        assert found.structured_content["images"] == made.structured_content["images"]
        listed = await client.call_tool("list_images", {})
        assert [item["id"] for item in listed.structured_content["images"]] == [image_id]
        assert listed.structured_content["images"][0]["path"] == made.structured_content["images"][0]["path"]
        estimate = await client.call_tool("estimate_cost", {"prompt": "a kitten"})
        assert estimate.structured_content["spent"] == "0.06" and estimate.structured_content["images_left"] == 1
        assert not (await client.call_tool("generate_image", {"prompt": "a dog"})).is_error
        refused = await client.call_tool("generate_image", {"prompt": "a cow"})
    assert refused.is_error and refused.structured_content["error"] == "CogViewBudgetError"
    assert sandbox.images_made == 2


async def test_a_budget_survives_a_restart(make, sandbox):
    for number in range(3):
        server = make(budget="0.12")
        async with Client(server.app) as client:
            result = await client.call_tool("generate_image", {"prompt": f"kitten {number}"})
        await asyncio.to_thread(end, server)
        assert result.is_error is (number == 2)
    assert sandbox.images_made == 2


async def test_two_servers_on_one_folder_share_images_and_limits(make, sandbox):
    first, second = make(max_images=2), make(max_images=2)
    async with Client(first.app) as one, Client(second.app) as other:
        started = await one.call_tool("generate_image", {"prompt": "a kitten [[slow:2]]", "wait_seconds": 0})
        found = await other.call_tool("get_image", {"id": started.structured_content["id"]})
        assert found.structured_content["status"] == "made"
        assert not (await other.call_tool("generate_image", {"prompt": "a dog"})).is_error
        for client in (one, other):
            refused = await client.call_tool("generate_image", {"prompt": "a cow"})
            assert refused.is_error, client
        assert len((await one.call_tool("list_images", {})).structured_content["images"]) == 2
    assert sandbox.images_made == 2


async def test_a_blocked_prompt_is_an_error_with_the_entries_of_the_filter(make, mode, sandbox):
    server = make(max_images=1)
    async with Client(server.app, mode=mode) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten [[content-filter:1]]"})
        assert result.is_error and result.structured_content["status"] == "error"
        assert result.structured_content["content_filter"] == [{"role": "user", "level": 1}]
        assert result.structured_content["may_have_been_charged"] is False
        assert "[[content-filter" not in text_of(result)
        assert not (
            await client.call_tool("generate_image", {"prompt": "a kitten"})
        ).is_error  # nothing was spent before


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        ("get_image", {"id": "00000000"}, "00000000"),
        ("get_image", {"id": "../../etc/passwd"}, "id"),
        ("get_image", {"id": "a/b"}, "id"),
        ("get_image", {"id": "x" * 10_000}, "id"),
        ("get_image", {}, "id"),
        ("get_image", {"id": "0", "wait_seconds": 51}, "wait_seconds"),
        ("generate_image", {}, "prompt"),
        ("generate_image", {"prompt": ""}, "prompt"),
        ("generate_image", {"prompt": "a kitten", "size": "1x1"}, "size"),
        ("generate_image", {"prompt": "a kitten", "size": "1728x960x2"}, "size"),
        ("generate_image", {"prompt": "a kitten", "quality": ["hd"]}, "quality"),
        ("generate_image", {"prompt": "a kitten", "wait_seconds": -1}, "wait_seconds"),
        ("generate_image", {"prompt": "a kitten", "wait_seconds": "soon"}, "wait_seconds"),
        ("generate_image", {"prompt": "a kitten", "path": "/tmp/x.png"}, "path"),
        ("list_images", {"limit": 0}, "limit"),
        ("estimate_cost", {"prompt": "a kitten", "n": 10**9}, "n"),
    ],
)
async def test_wrong_arguments_are_an_error_that_says_which_and_cost_nothing(make, sandbox, tool, arguments, says):
    async with Client(make().app) as client:
        result = await client.call_tool(tool, arguments)
    assert result.is_error and says in text_of(result)
    assert len(text_of(result)) <= 500 and size_of(result) < 10_000
    assert result.structured_content["status"] == "error"
    assert not sandbox.requests


async def test_a_prompt_over_the_limit_of_the_model_is_refused(make, sandbox):
    async with Client(make(model="glm-image").app) as client:
        result = await client.call_tool("generate_image", {"prompt": "x" * 1001})
        other = await client.call_tool("generate_image", {"prompt": "a kitten", "size": "720x1440"})
    assert result.is_error and "prompt" in text_of(result) and "1,000" in text_of(result)
    assert other.is_error and "size" in text_of(other)
    assert not sandbox.requests


async def test_a_very_long_prompt_makes_no_large_result(make, sandbox):
    async with Client(make().app) as client:
        result = await client.call_tool("generate_image", {"prompt": "字" * 100_000})
        listed = await client.call_tool("list_images", {})
    assert not result.is_error and size_of(result) < 150_000 and size_of(listed) < 10_000
    assert "cut" in result.structured_content["warnings"][-1]
    assert sandbox.requests[0].prompt == "字" * 100_000


async def test_an_unknown_tool_is_an_error_of_the_protocol(make):
    async with Client(make().app) as client:
        with pytest.raises(MCPError):
            await client.call_tool("delete_image", {"id": "0"})


async def test_without_a_key_each_call_says_how_to_get_one_and_that_there_is_a_sandbox(folder):
    server = CogViewServer(ServerSettings({"output_dir": folder}))
    async with Client(server.app) as client:
        assert len((await client.list_tools()).tools) == 4
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
    assert result.is_error
    for part in ("ZHIPUAI_API_KEY", "ZAI_API_KEY", "cogview mcp --sandbox"):
        assert part in text_of(result)
    assert not folder.exists()


async def test_a_folder_that_cannot_be_used_is_reported_before_anything_is_sent_and_tried_again(make, sandbox, folder):
    folder.write_text("a file")
    async with Client(make().app) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten"})
        assert result.is_error and str(folder) in text_of(result)
        assert not sandbox.requests
        folder.unlink()
        assert not (await client.call_tool("generate_image", {"prompt": "a kitten"})).is_error


async def test_an_image_of_unknown_outcome_counts_as_spent_and_says_so(make, sandbox):
    server = make(max_images=1)
    async with Client(server.app) as client:
        result = await client.call_tool("generate_image", {"prompt": "a kitten [[malformed]]"})
        assert result.is_error and result.structured_content["may_have_been_charged"] is True
        assert result.structured_content["request_id"]
    await asyncio.to_thread(end, server)
    async with Client(make(max_images=1).app) as client:
        assert (await client.call_tool("generate_image", {"prompt": "a dog"})).is_error
        listed = (await client.call_tool("list_images", {})).structured_content["images"]
        found = await client.call_tool("get_image", {"id": listed[0]["id"]})
    assert found.is_error and found.structured_content["may_have_been_charged"] is True
    assert sandbox.images_made == 1


async def test_damaged_records_refuse_paid_requests_and_name_the_line(make, sandbox, folder):
    server = make()
    async with Client(server.app) as client:
        await client.call_tool("generate_image", {"prompt": "a kitten"})
    await asyncio.to_thread(end, server)
    manifest = next(folder.glob(".cogview-mcp-sandbox/*/manifest.jsonl"))
    manifest.write_text('{"key": 1}\n')
    async with Client(make().app) as client:
        result = await client.call_tool("generate_image", {"prompt": "a dog"})
    assert result.is_error and "server-001/manifes" in text_of(result)
    assert sandbox.images_made == 1


@pytest.mark.parametrize(
    "change",
    [
        {"artifact": []},
        {"artifact": {"images": "x"}},
        {"artifact": {"images": [1]}},
        {"artifact": {"images": [{"id": 1}]}},
        {"artifact": {"images": [{}]}},
        {"artifact": {"images": [{"id": "a", "path": 1}]}},
        {"is_answered": "no"},
        {"arguments": {"prompt": "a kitten", "size": []}},
        {"arguments": {"prompt": "a kitten", "model": 1}},
    ],
    ids=str,
)
async def test_records_of_other_types_are_damage_too(make, sandbox, folder, change):
    server = make()
    async with Client(server.app) as client:
        await client.call_tool("generate_image", {"prompt": "a kitten"})
    await asyncio.to_thread(end, server)
    manifest = next(folder.glob(".cogview-mcp-sandbox/*/manifest.jsonl"))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "is_answered": False, **change}) + "\n")
    async with Client(make().app) as client:
        for tool, arguments in (("generate_image", {"prompt": "a dog"}), ("list_images", {})):
            result = await client.call_tool(tool, arguments)
            assert result.is_error and "is damaged (" in text_of(result)
        assert len((await client.list_resources()).resources) == 1
    assert sandbox.images_made == 1


@pytest.mark.parametrize(
    "change",
    [{"size": 1}, {"size": "1x1"}, {"quality": {}}, {"quality": "x"}, {"model": 5}, {"at": []}, {"prompt": "\ud800"}],
    ids=str,
)
@pytest.mark.parametrize("task", [False, True], ids=["saved", "task"])
async def test_a_request_without_an_end_that_is_of_no_request_costs_nothing(make, sandbox, folder, change, task):
    server = make()
    async with Client(server.app) as client:
        await client.call_tool("generate_image", {"prompt": "a kitten"})
    await asyncio.to_thread(end, server)
    next(folder.glob(".cogview-mcp-sandbox/*/manifest.jsonl")).write_bytes(b"")
    attempts = next(folder.glob(".cogview-mcp-sandbox/*/attempts.jsonl"))
    sent = {**json.loads(attempts.read_text()), **change}
    lines = [sent, {"key": sent["key"], "request_id": sent["request_id"], "task_id": "1"}] if task else [sent]
    attempts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if task:
        next(folder.glob("*.png")).unlink()
    async with Client(make(max_images=1).app) as client:
        result = await client.call_tool("generate_image", {"prompt": "a dog"})
    assert result.is_error and "The server failed" not in text_of(result)
    assert sandbox.images_made == 1


async def test_no_file_outside_the_folder_is_read_whatever_the_records_say(make, sandbox, folder, tmp_path):
    server = make()
    async with Client(server.app) as client:
        made = await client.call_tool("generate_image", {"prompt": "a kitten"})
    await asyncio.to_thread(end, server)
    path = Path(made.structured_content["images"][0]["path"])
    path.rename(tmp_path / "private.png")
    manifest = next(folder.glob(".cogview-mcp-sandbox/*/manifest.jsonl"))
    record = json.loads(manifest.read_text())
    record["artifact"]["images"][0]["path"] = str(tmp_path / "private.png")
    manifest.write_text(json.dumps(record) + "\n")
    async with Client(make().app) as client:
        with pytest.raises(MCPError, match="cannot be read"):
            await client.read_resource(made.content[-1].uri)
        found = await client.call_tool("get_image", {"id": made.structured_content["id"]})
    assert [block.type for block in found.content] == ["text", "resource_link"]


async def test_the_records_are_those_of_a_job(make, folder):
    async with Client(make().app) as client:
        made = await client.call_tool("generate_image", {"prompt": "a kitten"})
    records = folder / ".cogview-mcp-sandbox" / "server-001"
    sent = json.loads((records / "attempts.jsonl").read_text())
    ended = json.loads((records / "manifest.jsonl").read_text())
    assert sent["request_id"] == made.structured_content["images"][0]["request_id"] and sent["prompt"] == "a kitten"
    assert ended["key"] == sent["key"] and ended["status"] == "made"
    assert (folder / ended["images"][0]["file"]).is_file()


# --- what earlier servers left


async def test_an_image_that_was_saved_and_not_recorded_is_found_at_the_next_start(make, sandbox, folder):
    server = make()
    async with Client(server.app) as client:
        made = await client.call_tool("generate_image", {"prompt": "a kitten"})
    await asyncio.to_thread(end, server)
    next(folder.glob(".cogview-mcp-sandbox/*/manifest.jsonl")).write_bytes(b"")  # killed before it could be written
    async with Client(make(max_images=1).app) as client:
        again = await client.call_tool(
            "generate_image", {"prompt": "a kitten"}
        )  # nobody was answered, as far as is known
        assert "nothing is paid again" in text_of(again)
        found = await client.call_tool("get_image", {"id": made.structured_content["id"]})
        assert found.structured_content["images"][0]["sha256"] == made.structured_content["images"][0]["sha256"]
        assert found.structured_content["images"][0]["path"] == made.structured_content["images"][0]["path"]
        assert (await client.call_tool("generate_image", {"prompt": "a dog"})).is_error  # it counts
    assert sandbox.images_made == 1


async def test_a_blocked_prompt_is_remembered_with_its_entries(make, sandbox):
    server = make()
    async with Client(server.app) as client:
        await client.call_tool("generate_image", {"prompt": "a kitten [[content-filter:1]]"})
    await asyncio.to_thread(end, server)
    async with Client(make().app) as client:
        item = (await client.call_tool("list_images", {})).structured_content["images"][0]
        found = await client.call_tool("get_image", {"id": item["id"]})
    assert item["status"] == "blocked" and found.is_error
    assert found.structured_content["content_filter"] == [{"role": "user", "level": 1}]


async def test_entries_of_the_filter_beside_another_error_are_no_failure_of_the_server(make, sandbox, folder):
    server = make()
    async with Client(server.app) as client:
        await client.call_tool("generate_image", {"prompt": "a kitten [[content-filter:1]]"})
    await asyncio.to_thread(end, server)
    manifest = next(folder.glob(".cogview-mcp-sandbox/*/manifest.jsonl"))
    record = json.loads(manifest.read_text())
    record["failures"][0]["error"] = "CogViewMalformedReplyError"
    manifest.write_text(json.dumps(record) + "\n")
    async with Client(make().app) as client:
        found = await client.call_tool("get_image", {"id": record["key"]})
    assert found.is_error and found.structured_content["error"] == "CogViewMalformedReplyError"


async def test_a_file_that_is_gone_is_an_error_and_not_paid_again(make, sandbox):
    async with Client(make(inline="none").app) as client:
        made = await client.call_tool("generate_image", {"prompt": "a kitten"})
        Path(made.structured_content["images"][0]["path"]).unlink()
        with pytest.raises(MCPError, match="cannot be read"):
            await client.read_resource(made.content[-1].uri)
    assert sandbox.images_made == 1


# --- resources


async def test_an_image_has_smaller_sizes_by_query(make):
    async with Client(make().app) as client:
        made = await client.call_tool("generate_image", {"prompt": "a kitten"})
        uri = made.content[-1].uri
        for size in (32, 200, 1024):
            read = (await client.read_resource(f"{uri}?size={size}")).contents[0]
            assert read.mime_type == "image/jpeg"
            assert max(Image.open(io.BytesIO(base64.b64decode(read.blob))).size) == size
        listed = [str(resource.uri) for resource in (await client.list_resources()).resources]
        assert listed == ["ui://cogview/gallery", uri]
        for wrong in (
            f"{uri}?size=0", f"{uri}?size=99999", f"{uri}?size=x", f"{uri}?size=32&size=33", f"{uri}?path=x", f"{uri}/x",
            "cogview://images/../secret", "cogview://images/", "cogview://images/%2e%2e", "file:///etc/passwd", "cogview://images/00000000",
        ):  # fmt: skip
            with pytest.raises(MCPError):
                await client.read_resource(wrong)


async def test_the_gallery_is_an_app_with_the_images_and_one_script_that_its_policy_names(make):
    async with Client(make().app) as client:
        for prompt in ("a kitten", "</script><script>alert(1)</script>"):
            made = await client.call_tool("generate_image", {"prompt": prompt})
        tools = (await client.list_tools()).tools
        assert "io.modelcontextprotocol/ui" in (client.server_capabilities.extensions or {})
        page = (await client.read_resource("ui://cogview/gallery")).contents[0]
    linked = {
        tool.name for tool in tools if (tool.meta or {}).get("ui", {}).get("resourceUri") == "ui://cogview/gallery"
    }
    assert linked == {"generate_image", "get_image", "list_images"}
    assert page.mime_type == "text/html;profile=mcp-app" and len(page.text) < 200_000
    assert f"<b>{made.structured_content['id']}</b>" in page.text
    assert page.text.count("data:image/") >= 2 and page.text.count("<script>") == 1
    script = page.text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#x27;sha256-{digest}&#x27;" in page.text or f"script-src 'sha256-{digest}'" in page.text
    assert "http" not in page.text.split("<body", 1)[1].replace("http://www.w3.org", "")
