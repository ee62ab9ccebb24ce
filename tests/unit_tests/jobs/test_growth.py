"""What a user of a large job relies on: folders and pages stay small, and nothing is paid twice in any of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from langchain_core.callbacks import BaseCallbackHandler

from langchain_cogview import arun_job, plan_job, run_job
from langchain_cogview.errors import CogViewConfigurationError, CogViewStorageError
from langchain_cogview.jobs import files, report

SMALL = {"size": "640x512"}
MOST = 3


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture(params=["sync", "async"])
def run(request, sandbox, out):
    def work(prompts, **options):
        options = {"base_url": sandbox.base_url, "progress": False, **SMALL, **options}
        if request.param == "sync":
            return run_job(prompts, out, **options)
        return asyncio.run(arun_job(prompts, out, **options))

    return work


@pytest.fixture
def small_folders(monkeypatch):
    monkeypatch.setattr(files, "MAX_FILES", MOST)


def prompts(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def write_records(out: Path, values: list[dict]) -> None:
    (out / "manifest.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def images(out: Path) -> dict[str, int]:
    """The number of images in the job's folder and in each sub-folder."""
    found = sorted(out.rglob("*.png"))
    return {
        str(folder.relative_to(out)): sum(path.parent == folder for path in found)
        for folder in {p.parent for p in found}
    }


def check_files(out: Path) -> None:
    """Each file of the manifest is there with its bytes, and no other image is."""
    named = {image["file"]: image["sha256"] for record in records(out) for image in record["images"]}
    assert {file: hashlib.sha256((out / file).read_bytes()).hexdigest() for file in named} == named
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == named.keys()


# --- sub-folders


@pytest.mark.usefixtures("small_folders")
def test_no_folder_gets_more_images_than_a_file_manager_shows_well(run, out, sandbox):
    assert run(prompts(8)).made == 8
    assert images(out) == {".": 3, "images-0002": 3, "images-0003": 2}
    check_files(out)
    assert len(sandbox.ledger) == 8


def test_a_small_job_has_its_images_beside_the_page(run, out):
    run(prompts(5))
    assert images(out) == {".": 5}
    assert [path for path in out.iterdir() if path.is_dir()] == []


@pytest.mark.usefixtures("small_folders")
def test_a_job_that_goes_on_fills_the_last_folder_first(run, out, sandbox):
    for limit in (4, 1, 2, None):
        run(prompts(8), limit=limit)
    assert images(out) == {".": 3, "images-0002": 3, "images-0003": 2}
    check_files(out)
    assert len(sandbox.ledger) == 8


@pytest.mark.usefixtures("small_folders")
def test_the_images_of_one_prompt_are_in_one_folder(run, out):
    assert run([{"prompt": "a cat", "n": 2}, {"prompt": "a dog", "n": 2}, "a fox"]).images == 5
    assert sum(images(out).values()) == 5
    assert max(images(out).values()) <= MOST
    assert [len({Path(image["file"]).parent for image in record["images"]}) for record in records(out)] == [1, 1, 1]
    check_files(out)


def test_a_folder_of_an_earlier_version_with_all_its_images_goes_on(run, out, sandbox, monkeypatch):
    run(prompts(6))
    before = records(out)
    monkeypatch.setattr(files, "MAX_FILES", MOST)
    report = run(prompts(8))
    assert (report.skipped, report.made) == (6, 2)
    assert records(out)[:6] == before
    assert images(out) == {".": 6, "images-0002": 2}
    check_files(out)
    assert len(sandbox.ledger) == 8


@pytest.mark.usefixtures("small_folders")
def test_an_image_in_a_sub_folder_whose_record_is_missing_is_recovered_and_not_paid_again(run, out, sandbox):
    run(prompts(8))
    lost = [record for record in records(out) if not record["images"][0]["file"].startswith("images-0002")]
    write_records(out, lost)
    plan = plan_job(prompts(8), out, base_url=sandbox.base_url, **SMALL)
    assert (plan.done, plan.recovered, plan.images) == (5, 3, 0)
    report = run(prompts(8))
    assert (report.made, report.images, report.unknown) == (3, 3, ())
    check_files(out)
    assert len(sandbox.ledger) == 8


@pytest.mark.usefixtures("small_folders")
@pytest.mark.parametrize("kind", ["link", "file"])
def test_nothing_is_written_through_a_link_in_place_of_a_sub_folder(run, out, tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(prompts(1))
    if kind == "link":
        (out / "images-0002").symlink_to(elsewhere)
    else:
        (out / "images-0002").write_text("mine")
    assert run(prompts(6)).made == 5
    assert images(out) == {".": 1, "images-0003": 3, "images-0004": 2}
    assert list(elsewhere.iterdir()) == []
    check_files(out)


@pytest.mark.usefixtures("small_folders")
def test_a_link_that_replaces_a_sub_folder_stops_the_job_before_it_pays(run, out, sandbox, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(prompts(4))
    paid = len(sandbox.ledger)

    def replace():
        shutil.rmtree(out / "images-0002")
        (out / "images-0002").symlink_to(elsewhere)

    def replace_in_thread(plan):  # an async job calls it in the event loop
        thread = threading.Thread(target=replace)
        thread.start()
        thread.join()

    report = run(prompts(6), on_plan=replace_in_thread)
    assert isinstance(report.stopped, CogViewStorageError)
    assert "is not a folder" in str(report.stopped)
    assert len(sandbox.ledger) == paid
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "file",
    ["../x.png", "/x.png", "images-0002/../x.png", "images-0002/../../x.png", "other/x.png", "images-0002/", "a\\b"],
)
def test_a_manifest_that_names_a_file_outside_of_the_folder_is_refused(run, out, sandbox, file):
    run(prompts(1))
    (record,) = records(out)
    record["images"][0]["file"] = file
    write_records(out, [record])
    with pytest.raises(CogViewConfigurationError, match="Line 1 of .*manifest.jsonl is damaged"):
        run(prompts(2))
    assert len(sandbox.ledger) == 1


# --- pages of the contact sheet


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(report, "PAGE_TILES", MOST)


def shown(page: Path) -> list[int]:
    """The lines of the prompts on a page."""
    return [int(line) for line in re.findall(r"<figcaption><b>(\d+)</b>", page.read_text(encoding="utf-8"))]


def links(page: Path) -> list[tuple[str, str]]:
    """The links to other pages; they are above and below the tiles."""
    found = re.findall(r'<a href="([^"]+html)">([^<]+)</a>', page.read_text(encoding="utf-8"))
    assert found[: len(found) // 2] == found[len(found) // 2 :]
    return [(text, file) for file, text in found[: len(found) // 2]]


@pytest.mark.usefixtures("small_pages", "small_folders")
def test_the_contact_sheet_has_pages_in_the_order_of_the_prompts_that_link_to_each_other(run, out):
    report = run([*prompts(6), "a [[content-filter]]", "a [[bad-request]]"])
    assert (report.contact_sheet, report.stopped) == (out / "index.html", None)
    pages = [out / "index.html", out / "index-page-2.html", out / "index-page-3.html"]
    assert sorted(out.glob("*.html")) == sorted(pages)
    assert [shown(page) for page in pages] == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert links(pages[0]) == [("1", "index.html"), ("2", "index-page-2.html"), ("3", "index-page-3.html")]
    first = ("First page", "index.html")
    assert links(pages[1]) == [first, ("Previous page", "index.html"), ("Next page", "index-page-3.html")]
    assert links(pages[2]) == [first, ("Previous page", "index-page-2.html")]
    files = [file for page in pages for file in re.findall(r'<img src="([^"]+)"', page.read_text(encoding="utf-8"))]
    assert sorted(files) == sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))


def test_the_contact_sheet_of_a_small_job_is_one_page_without_links(run, out):
    run(prompts(5))
    assert sorted(out.glob("*.html")) == [out / "index.html"]
    assert links(out / "index.html") == []


@pytest.mark.usefixtures("small_pages")
def test_a_page_is_there_as_soon_as_it_is_full(out, sandbox):
    last = {}

    class Looks(BaseCallbackHandler):
        def on_chain_start(self, serialized, inputs, **kwargs):
            last.update({page.name: shown(page) for page in out.glob("*.html")})

    # The last call begins when all but one of the others have ended, and with them the pages that they filled.
    run_job(
        prompts(40),
        out,
        base_url=sandbox.base_url,
        progress=False,
        max_concurrency=2,
        config={"callbacks": [Looks()]},
        **SMALL,
    )
    assert last["index.html"] == [1, 2, 3]
    assert last["index-page-2.html"] == [4, 5, 6]
    assert len(last) < 14


@pytest.mark.usefixtures("small_pages")
def test_pages_follow_what_is_made_later_and_none_is_left_over(run, out, monkeypatch):
    run(["a [[content-filter]]", *prompts(6)], limit=5)
    assert [shown(out / name) for name in ("index.html", "index-page-2.html")] == [[1, 2, 3], [4, 5]]
    run(["a [[content-filter]]", *prompts(6)], retry_failed=True)
    assert [shown(out / f"index{page}.html") for page in ("", "-page-2", "-page-3")] == [[1, 2, 3], [4, 5, 6], [7]]
    monkeypatch.setattr(report, "PAGE_TILES", 1000)
    run(["a [[content-filter]]", *prompts(6)])
    assert sorted(out.glob("*.html")) == [out / "index.html"]
    assert shown(out / "index.html") == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_page_of_the_users_is_not_overwritten_and_everything_is_made(run, out, sandbox, tmp_path, kind):
    mine = tmp_path / "mine.html"
    mine.write_text("<h1>Mine</h1>")
    run(prompts(1))
    page = out / "index-page-2.html"
    if kind == "link":
        page.symlink_to(mine)
    else:
        page.write_text("<h1>Mine</h1>")
    report = run(prompts(8))
    assert (page.read_text(), mine.read_text()) == ("<h1>Mine</h1>", "<h1>Mine</h1>")
    assert isinstance(report.stopped, CogViewStorageError)
    assert "index-page-2.html" in str(report.stopped)
    assert (report.made, len(sandbox.ledger)) == (7, 8)
    page.unlink()
    assert run(prompts(8)).stopped is None
    assert shown(page) == [4, 5, 6]


def test_the_contact_sheet_counts_each_state_and_shows_only_one_if_asked(run, out):
    inputs = [*prompts(2), "a [[content-filter]]", "a [[expired-url]]", "a [[malformed]]", "a [[flagged]] cat"]
    report = run(inputs)
    assert (report.made, report.blocked, report.failed, len(report.unknown)) == (3, 1, 1, 1)
    page = report.contact_sheet.read_text(encoding="utf-8")
    assert "<p>3 images · 1 blocked · 1 failed · 1 of unknown outcome · nothing is charged</p>" in page
    assert re.search(r"<p>5 prompts · written \d{4}-\d\d-\d\d \d\d:\d\d UTC</p>", page)
    labels = re.findall(r'<label for="only-(\w+)"[^>]*>([^<]+)</label>', page)
    assert labels == [
        ("all", "All 6"),
        ("image", "Made 3"),
        ("blocked", "Blocked 1"),
        ("failed", "Failed 1"),
        ("unknown", "Outcome unknown 1"),
    ]
    for kind, number in (("image", 3), ("blocked", 1), ("failed", 1), ("unknown", 1)):
        assert f"#only-{kind}:checked~main figure:not(.{kind})" in page
        assert page.count(f'<figure class="{kind}"') == number
    (unknown,) = report.unknown
    assert f"<b>Outcome unknown</b> It may have been charged. Request id: {unknown.request_id}." in page
    assert shown(report.contact_sheet) == [1, 2, 3, 4, 5, 6]  # in the order of the prompts
    assert page.count(" · sandbox, no cost</div>") == 3
    assert "content filter: image (level 3, mildest)" in page
    assert "<script" not in page


def test_images_of_one_prompt_are_numbered_as_in_a_gallery(run, out):
    run([{"prompt": "a cat", "n": 2}, "a dog"])
    page = (out / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<figcaption><b>([^<]+)</b>", page) == ["1.1", "1.2", "2"]
    assert "only-" not in page  # there is one state only


def test_pages_have_at_most_500_tiles():
    assert report.PAGE_TILES == 500
