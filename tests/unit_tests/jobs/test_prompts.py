"""What a user relies on: every line of a file of prompts is read as it was meant, or reported with its number."""

from __future__ import annotations

import io
import json
import math
import tracemalloc

import pytest

from langchain_cogview.errors import CogViewConfigurationError
from langchain_cogview.jobs.items import check_prompts
from langchain_cogview.jobs.prompts import MAX_LINE, read_prompts
from tests.unit_tests.test_batches import PARTI


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes, name: str = "prompts.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def texts_of(path, **options):
    """Number and prompt of each line, or its problem."""
    return [(line.number, line.problem or line.arguments["prompt"]) for line in read_prompts(path, **options)]


def problems(path, **options):
    return {line.number: line.problem for line in read_prompts(path, **options) if line.problem}


# --- text


def test_a_text_file_has_a_prompt_a_line_and_blank_ones_are_counted(written):
    file = read_prompts(written('a cat\n\n  \na "quoted" dog, and more\n 猫 '))
    assert [(line.number, line.arguments) for line in file] == [
        (1, {"prompt": "a cat"}),
        (4, {"prompt": 'a "quoted" dog, and more'}),
        (5, {"prompt": " 猫 "}),
    ]
    assert (file.blank, file.notes) == (2, [])


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.csv", "prompts.tsv", "prompts.jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_foreign_line_ends_are_no_part_of_a_prompt(written, name, end, mark):
    lines = {
        "txt": ["a cat", "ein Hündchen"],
        "csv": ["Prompt", "a cat", "ein Hündchen"],
        "tsv": ["PROMPT", "a cat", "ein Hündchen"],
        "jsonl": ['"a cat"', '{"prompt": "ein Hündchen"}'],
    }[name.rpartition(".")[2]]
    content = mark + end.join([*lines, ""]).encode()
    assert [prompt for _, prompt in texts_of(written(content, name))] == ["a cat", "ein Hündchen"]


@pytest.mark.parametrize(
    ("name", "before"), [("p.txt", b""), ("p.csv", b"prompt\n"), ("p.tsv", b"prompt\n"), ("p.jsonl", b"")]
)
def test_what_is_not_utf_8_is_reported_by_line_and_the_others_are_read(written, name, before):
    row = b'"good"' if name == "p.jsonl" else b"good"
    path = written(before + row + b"\ncaf\xe9\n" + row + b"\n", name)
    first = 1 + before.count(b"\n")
    assert problems(path) == {first + 1: "Not valid UTF-8 at character 4."}
    assert [number for number, _ in texts_of(path)] == [first, first + 1, first + 2]


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_utf_16_is_named(written, mark):
    with pytest.raises(CogViewConfigurationError, match="are in UTF-16.*Save them as UTF-8"):
        texts_of(written(mark + "a cat".encode("utf-16-le")))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("p.txt", ["{}", "good"]),
        ("p.csv", ["prompt,model", "{}", "good,"]),
        ("p.csv", ["prompt,model", '"{}",', "good,"]),
        ("p.tsv", ["prompt", "{}", "good"]),
        ("p.jsonl", ['"{}"', '"good"']),
    ],
)
def test_a_line_that_is_too_long_is_a_problem_and_the_next_is_read(written, name, lines):
    path = written("\n".join(lines).replace("{}", "x" * (MAX_LINE + 5)), name)
    number = next(number for number, line in enumerate(lines, 1) if "{}" in line)
    reported = problems(path)
    assert set(reported) == {number}
    assert "more than 100,000 characters" in reported[number]
    assert texts_of(path)[-1] == (number + 1, "good")


def test_a_line_of_exactly_the_limit_is_read(written):
    assert texts_of(written("x" * MAX_LINE + "\r\nnext")) == [(1, "x" * MAX_LINE), (2, "next")]


def test_a_file_of_one_endless_line_is_not_held_in_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "p.txt"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    tracemalloc.start()
    (line,) = read_prompts(path)
    assert "more than" in line.problem
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


# --- CSV and TSV


def test_a_csv_file_has_arguments_beside_the_prompt_and_other_columns_are_carried_along(written):
    rows = [
        " Prompt ,SIZE,n,User_ID,watermark_enabled,Category,,seed",
        '"a cat, sitting",16:9,2,user-123,false,animals,x,7',
        '"a ""quoted""',
        'dog ", ,,,,,,',
        ",,,,,,,",
        "a hare",
    ]
    file = read_prompts(written("\n".join(rows), "p.csv"))
    first, second, third = file
    assert first.arguments == {
        "prompt": "a cat, sitting", "size": "16:9", "n": "2", "user_id": "user-123", "watermark_enabled": "false",
    }  # fmt: skip
    assert first.extra == {"Category": "animals", "seed": "7"}
    assert (second.number, second.arguments["prompt"], second.extra) == (3, 'a "quoted"\ndog ', {})
    assert (third.number, third.arguments) == (6, {"prompt": "a hare"})
    assert file.blank == 1
    assert [note.partition(" is not an argument")[0] for note in file.notes] == [
        "The column 'Category'",
        "The column 'seed'",
    ]
    assert "The endpoint takes no seed" in file.notes[1]


def test_line_ends_within_a_quoted_prompt_are_plain_ones(written):
    assert texts_of(written('prompt\r\n"a\r\nb"\r\n', "p.csv")) == [(2, "a\nb")]


def test_a_csv_quote_that_is_never_closed_swallows_nothing_in_silence(written):
    path = written('prompt\ngood\n"never closed\nlost\nlost too\n', "p.csv")
    assert texts_of(path)[0] == (2, "good")
    assert problems(path) == {3: "A quote in it is never closed. Lines 3 to 5 are read as one line."}


def test_wrong_quotes_in_a_csv_file_are_reported(written):
    path = written('prompt\n"G I G" painted\ngood\n', "p.csv")
    assert problems(path).keys() == {2}
    assert "double a quote within a quoted cell" in problems(path)[2]
    assert texts_of(path)[-1] == (3, "good")


def test_a_cell_too_many_is_reported(written):
    assert problems(written("prompt,n\na cat, sitting,1\na dog,1,\n", "p.csv")) == {
        2: "It has 3 cells, the header 2: quote a cell that holds a separator."
    }
    assert problems(written("prompt\ta\nx\ty\tz\n", "p.tsv")).keys() == {2}


def test_a_tsv_file_has_raw_quotes_unless_they_are_a_spreadsheets(written):
    cells = ['"G I G" painted', 'a "word"', '"quoted, ""twice"""', '"', '""', '"a" and "b"']
    assert [prompt for _, prompt in texts_of(written("\n".join(["Prompt\tNote", *(f"{c}\tx" for c in cells)]), "p.tsv"))] == [
        '"G I G" painted', 'a "word"', 'quoted, "twice"', '"', "", '"a" and "b"',
    ]  # fmt: skip


@pytest.mark.skipif(not PARTI.exists(), reason="needs the Parti prompts")
def test_the_parti_prompts_are_read_as_they_stand():
    lines = [*read_prompts(PARTI)]
    rows = [row.split("\t") for row in PARTI.read_text(encoding="utf-8").splitlines()[1:]]
    assert [line.arguments["prompt"] for line in lines] == [row[0] for row in rows]
    assert [line.number for line in lines] == [*range(2, 1634)]
    assert lines[0].extra == {"Category": "Abstract", "Challenge": "Basic", "Note": rows[0][3]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "it is empty"),
        ("\n \n", "it is empty"),
        ("text,size\na cat,square", "it has no column 'prompt'; its columns, separated by commas, are 'text', 'size'"),
        ("prompt,Prompt\na,b", "it has the column 'prompt' twice"),
        (b"pr\xff\xffmpt\na", "Not valid UTF-8"),
        ('"prompt\na', "never closed"),
    ],
)
def test_a_header_that_cannot_be_used_is_reported(written, content, words):
    with pytest.raises(CogViewConfigurationError) as caught:
        texts_of(written(content, "p.csv"))
    assert words in str(caught.value)
    assert "Name a column 'prompt'" in caught.value.hint


def test_a_tsv_header_too(written):
    with pytest.raises(CogViewConfigurationError, match="separated by tabs"):
        texts_of(written("prompt,size\na,b", "p.tsv"))


# --- JSON lines


def test_json_lines_are_texts_or_objects(written):
    lines = ['"a cat"', '{"prompt": "a dog", "n": 2, "size": null, "id": [1, {"a": "b"}]}', "", '{"prompt": 7}']
    file = read_prompts(written("\n".join(lines), "p.jsonl"))
    assert [(line.number, line.arguments, line.extra) for line in file] == [
        (1, {"prompt": "a cat"}, {}),
        (2, {"prompt": "a dog", "n": 2}, {"id": [1, {"a": "b"}]}),
        (4, {"prompt": 7}, {}),
    ]
    assert file.blank == 1
    assert file.notes == ["The key 'id' is not an argument; it is copied to the manifest."]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Not valid JSON: "),
        ("[]", "not a list"),
        ("7", "not a number"),
        ("true", "not true or false"),
        ("null", "not null"),
        ('{"text": "a cat"}', "The key 'prompt' is missing."),
        ('{"Prompt": "a cat"}', "It is written 'Prompt'."),
        ("[" * 90_000, "nested too deep"),
        ("9" * 9_000, "a number that is too long"),
    ],
)
def test_json_that_is_not_a_prompt_is_reported(written, line, words):
    reported = problems(written(f'{line}\n"good"\n', "p.jsonl"))
    assert reported.keys() == {1}
    assert words in reported[1]


def test_no_more_than_twenty_foreign_names_are_noted(written):
    file = read_prompts(written(json.dumps({"prompt": "a", **{f"name{n}": n for n in range(500)}}), "p.jsonl"))
    (line,) = file
    assert len(line.extra) == 500
    assert len(file.notes) == 20


# --- where they come from


def test_prompts_can_be_texts_and_dicts():
    file = read_prompts(iter(["a cat", " ", {"prompt": "a dog", "n": 2, "mood": "calm"}, 7, {"prompt": "x", "o": {1}}]))
    lines = [*file]
    assert [line.number for line in lines] == [1, 3, 4, 5]
    assert (lines[1].arguments, lines[1].extra) == ({"prompt": "a dog", "n": 2}, {"mood": "calm"})
    assert "not a number" in lines[2].problem
    assert "cannot be written as JSON" in lines[3].problem
    assert file.blank == 1


@pytest.mark.parametrize(
    "value",
    [
        "x" * (MAX_LINE + 1),
        {"prompt": "x" * (MAX_LINE + 1)},
        {"prompt": "a cat", "thumbnail": "x" * MAX_LINE},
        {"prompt": "a cat", "ids": [*range(MAX_LINE)]},
    ],
    ids=["text", "prompt", "text beside it", "list beside it"],
)
def test_a_prompt_of_a_list_is_no_longer_than_a_line_of_a_file(value):
    # A manifest whose line is too long could not be read again.
    assert problems(["a cat", value, "a dog"]) == {2: "It has more than 100,000 characters."}


@pytest.mark.parametrize("container", [lambda inner: [inner], lambda inner: {"a": inner}, lambda inner: (inner,)])
def test_what_is_nested_so_deeply_that_a_manifest_might_not_be_read_again_is_reported(container):
    inner = 1
    for _ in range(99):
        inner = container(inner)
    assert problems([{"prompt": "a cat", "notes": inner}]) == {}
    assert problems([{"prompt": "a cat", "notes": container(inner)}]) == {
        1: "A value beside its arguments is nested too deeply."
    }


def test_a_dash_is_the_standard_input_and_leaves_it_open(monkeypatch):
    stdin = io.BytesIO(b"\xef\xbb\xbfa cat\r\n\r\na dog")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stdin, "ascii"))
    assert texts_of("-") == [(1, "a cat"), (3, "a dog")]
    assert not stdin.closed
    stdin.seek(0)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stdin, "ascii"))
    assert texts_of("-", format="jsonl")[0][1].startswith("Not valid JSON")


def test_the_format_can_be_passed(written):
    path = written("prompt\na cat", "prompts.data")
    assert texts_of(path, format="csv") == [(2, "a cat")]
    with pytest.raises(CogViewConfigurationError, match=r"does not name a format of prompts\. Choose one with format="):
        texts_of(path)


@pytest.mark.parametrize("form", ["xml", "TXT", "", 5, ["txt"]])
def test_a_format_that_does_not_exist_is_refused_with_those_that_do(written, form):
    with pytest.raises(CogViewConfigurationError, match="format is one of 'txt', 'csv', 'tsv', 'jsonl', not"):
        texts_of(written("a cat"), format=form)


def test_a_file_that_cannot_be_read_is_reported(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path, "nul\0.txt"):
        with pytest.raises(CogViewConfigurationError, match="cannot be read"):
            texts_of(path, format="txt")


# --- checked


VALID = (
    "a cat",
    {"prompt": "a cat", "n": True},
    {"prompt": "a cat", "n": 1.0},
    {"prompt": "a cat", "n": 2},
    {"prompt": 'a "dog" \\ 犬 \u2028 \x7f', "n": 2},
    {"prompt": "a dog", "n": "2", "size": "16:9"},
    {"prompt": "a fox", "size": "1344x768", "n": 2},
    {"prompt": "a fox", "model": "glm-image"},
    {"prompt": "a hare", "model": " GLM-Image "},
    {"prompt": "a hare", "user_id": "a user", "watermark_enabled": True},
    {"prompt": "a hare", "user_id": "a user", "watermark_enabled": None},
)
WRONG = (
    {"prompt": "\ud800", "n": 2},
    {"prompt": "x" * 1001, "model": "glm-image"},
    {"prompt": ["a cat"], "n": 2},
    {"prompt": None},
    {"prompt": "  ", "n": 2},
    {"prompt": "a cat", "n": 2.5},
    {"prompt": "a cat", "n": {2}},
    {"prompt": "a cat", "size": "1x1"},
)


def checked(*prompts):
    return check_prompts(prompts, {"model": "cogview-4-250304", "size": "1024x1024"}, format=None, unique=False)


def test_a_line_is_checked_and_identified_in_the_same_way_among_others_as_alone():
    lines = [*VALID, *WRONG, *VALID[::-1], *WRONG[::-1]]
    found = checked(*lines)
    alone = [checked(line) for line in lines]
    keys = [item.key.partition("-")[0] for item in found.items]
    assert keys == [item.key for one in alone for item in one.items]
    assert [item[2:] for item in found.items] == [item[2:] for one in alone for item in one.items]
    assert [problem.text for problem in found.problems] == [problem.text for one in alone for problem in one.problems]
    assert len(found.problems) == 2 * len(WRONG)


def test_the_key_of_a_prompt_is_that_of_earlier_versions_so_that_their_folders_go_on():
    (item,) = checked("a cat").items
    assert item.key == "330f56d4555a4a78fe7cc0bb21bb9b2b"


def test_what_stands_beside_a_prompt_comes_back_as_it_was_written():
    extra = {"mood": "calm \ud800 \\", "tags": ["犬", 1, 2.5, None, True], "nested": {"a b": {"c": "d e"}}}
    (item,) = checked({"prompt": "a cat on a mat", **extra}).items
    assert (item.extra, item.arguments) == (extra, {"prompt": "a cat on a mat"})


def test_a_missing_value_of_pandas_is_null_so_that_every_program_reads_the_manifest():
    (item,) = checked({"prompt": "a cat", "rating": math.nan, "more": [1.5, {"most": math.inf}]}).items
    assert item.extra == {"rating": None, "more": [1.5, {"most": None}]}


def test_thousands_of_prompts_are_held_as_they_were_read_and_take_little_memory():
    lines = [
        {
            "prompt": f"Product photo {number}: a teapot, style {number % 7}",
            **({"id": f"\x00{number}\ud800\n"} if number % 3 else {}),
        }
        for number in range(5_001)
    ]
    items = checked(*lines).items
    assert len(items) == 5_001
    assert [item.arguments["prompt"] for item in items] == [line["prompt"] for line in lines]
    assert [(item.extra or {}).get("id") for item in items] == [line.get("id") for line in lines]
    assert [*items.keys()] == [(item.key, item.n) for item in items]
    for position in (0, 499, 500, 2_718, 4_999, 5_000, -1, -5_001):
        assert items[position].arguments["prompt"] == lines[position]["prompt"]
    assert [item.number for item in items[998:1_003]] == [*range(999, 1_004)]
    with pytest.raises(IndexError):
        items[5_001]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        held = checked(*({"prompt": line["prompt"]} for line in lines))
        assert tracemalloc.get_traced_memory()[0] - before < 100 * len(held.items)  # bytes
    finally:
        tracemalloc.stop()
