"""The Chinese README and pages say what the English ones say: the same parts in the same order, whatever their wording."""

import posixpath
import re
from collections import Counter
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAIRS = {
    "README.md": "README.zh.md",
    **{
        path.relative_to(ROOT).as_posix().replace("/zh/", "/"): path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "docs" / "zh").glob("*.md"))
    },
}
"""The Chinese page for each English one that has one."""
VERBATIM = ("messages",)  # between these markers stands the code's own English; between others the facts are compared


@dataclass
class Part:
    """One of what stands under a heading: a paragraph, code, a table, a list or a marker."""

    kind: str
    line: int
    text: str = ""
    end: int = 0

    @property
    def rows(self):
        return [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))] for row in self.text.splitlines()
        ]

    def __str__(self):
        if self.kind == "a table":
            columns = sorted({len(row) for row in self.rows})
            return f"a table of {len(self.rows)} lines with {' or '.join(map(str, columns))} columns"
        if self.kind == "a list":
            return f"a list of {len(self.text.splitlines())} items"
        return self.kind


@dataclass
class Section:
    """A heading, and what stands under it before the next one."""

    level: int
    title: str
    line: int
    prose: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def targets(self, *, images):
        text = re.sub(r"(?<!`)(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\1(?!`)", "", "\n".join(self.prose), flags=re.DOTALL)
        image = r"!\[[^\[\]]*\]\(([^()\s]+)\)"
        if images:
            return re.findall(image, text)
        return re.findall(r"\[[^\[\]]*\]\(([^()\s]+)\)", re.sub(image, "", text))  # an image may be within a link


@dataclass
class Readme:
    """A README, cut at its headings."""

    name: str
    sections: list[Section]

    @property
    def anchors(self):
        """GitHub's: lower case, punctuation dropped, a hyphen for a space, a number for the second of a kind."""
        seen = Counter()
        anchors = []
        for section in self.sections:
            anchor = re.sub(r"[^\w\- ]", "", section.title.lower()).replace(" ", "-")
            anchors.append(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
        return anchors

    def marked(self):
        """The rows of tables between `<!-- name -->` and `<!-- /name -->`, by name."""
        found, name = {}, None
        for part in (part for section in self.sections for part in section.parts):
            if part.kind.startswith("the marker "):
                name = part.kind.removeprefix("the marker ")
                name = None if name.startswith("/") else name
                if name:
                    found[name] = []
            elif name and part.kind == "a table":
                found[name] += [(part.line + number, row) for number, row in enumerate(part.rows)]
        return found


def read(name, text):
    sections = [Section(0, "the beginning of the file", 1)]
    fence = None
    for number, line in enumerate(text.splitlines(), 1):
        section = sections[-1]
        last = section.parts[-1] if section.parts else None
        if fence is not None:
            if line.startswith(fence) and not line.strip("`"):
                fence = None
            else:
                last.text += line + "\n"
        elif opened := re.match(r"(`{3,})(.*)", line):
            fence = opened[1]
            section.parts.append(Part(f"a code block of {opened[2].strip() or 'no language'}", number))
        elif heading := re.match(r"(#{1,6}) +(.+)", line):
            sections.append(Section(len(heading[1]), heading[2].strip(), number))
        elif marker := re.fullmatch(r"<!-- (/?\w+) -->", line.strip()):
            section.parts.append(Part(f"the marker {marker[1]}", number))
        elif comment := re.fullmatch(r"<!-- (.+) -->", line.strip()):
            section.parts.append(Part(f"the comment {comment[1]!r}", number))
        else:
            section.prose.append(line)
            kind = "a table" if line.startswith("|") else "a list" if re.match(r"[-*] |\d+\. ", line) else "a paragraph"
            if not line.strip():
                continue
            if last and last.end == number - 1 and kind in (last.kind, "a paragraph"):
                last.end = number
                last.text += line + "\n" if kind == last.kind else ""
            else:
                section.parts.append(Part(kind, number, line + "\n", end=number))
    return Readme(name, sections)


def facts(cell):
    """What no translation changes: code in backticks, and figures."""
    return Counter(re.findall(r"`[^`]+`|\d[\d.,x]*\d|\d", cell))


def first_difference(first, second):
    for number, (left, right) in enumerate(zip(first, second, strict=False), 1):
        if left != right:
            return number, left, right
    number = min(len(first), len(second))
    return number + 1, *((item[number] if number < len(item) else "nothing") for item in (first, second))


def differences(english, chinese):
    """What differs, each as one text that says where."""
    if [section.level for section in english.sections] != [section.level for section in chinese.sections]:
        return list(in_headings(english, chinese))
    return [
        *(text for pair in zip(english.sections, chinese.sections, strict=True) for text in in_a_section(*pair)),
        *in_links(english, chinese),
        *in_marked_tables(english, chinese),
    ]


def in_headings(english, chinese):
    signatures = [[(item.level, *map(str, item.parts)) for item in readme.sections] for readme in (english, chinese)]
    for kind, start, end, other_start, other_end in SequenceMatcher(None, *signatures, autojunk=False).get_opcodes():
        if kind != "equal":
            ranges = (english.sections[start:end], chinese.sections[other_start:other_end])
            left, right = (
                ", ".join(f"{'#' * item.level} {item.title!r} (line {item.line})" for item in sections) or "none"
                for sections in ranges
            )
            after = english.sections[start - 1].title if start else "nothing"
            yield f"after {after!r} the headings differ: {left} in {english.name}, {right} in {chinese.name}"


def in_a_section(english, chinese):
    where = f"under {english.title!r} (line {english.line}) and {chinese.title!r} (line {chinese.line})"
    kinds = [[str(part) for part in section.parts] for section in (english, chinese)]
    if kinds[0] != kinds[1]:
        number, left, right = first_difference(*kinds)
        yield f"{where} the {number}. part differs: {left} in English, {right} in Chinese"
        return
    for left, right in zip(english.parts, chinese.parts, strict=True):
        if left.kind.startswith("a code block") and left.text != right.text:
            number, one, other = first_difference(left.text.splitlines(), right.text.splitlines())
            lines = f"line {left.line + number} and {right.line + number}"
            yield f"{where} {left.kind} differs at {lines}: {one!r} in English, {other!r} in Chinese"


def from_the_root(page, target):
    """The path of a link's target in the repository, whichever page has the link."""
    if re.match(r"[a-z]+:|#", target):
        return target
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def translated(target, english, chinese):
    """Where the Chinese page links to, for a target of the English one: the Chinese page with the heading, if there is one."""
    path, hash_mark, anchor = target.partition("#")
    path = path or english.name
    if path == chinese.name:  # each links the other
        return english.name + hash_mark + anchor
    if path not in PAIRS and path != english.name:
        return target
    pair = (english, chinese) if path == english.name else [page_of(name) for name in (path, PAIRS[path])]
    headings = dict(zip(pair[0].anchors, pair[1].anchors, strict=False))
    other = pair[1].name if target.partition("#")[0] else ""
    return other + hash_mark + headings.get(anchor, anchor)


def in_links(english, chinese):
    for left, right in zip(english.sections, chinese.sections, strict=True):
        images = [
            [from_the_root(page.name, target) for target in section.targets(images=True) if "shields.io" not in target]
            for page, section in ((english, left), (chinese, right))
        ]
        if images[0] != images[1]:
            yield f"under {right.title!r} the images differ: {images[0]} in English, {images[1]} in Chinese"
        found = Counter(from_the_root(chinese.name, target) for target in right.targets(images=False))
        expected = Counter(
            translated(from_the_root(english.name, target), english, chinese) for target in left.targets(images=False)
        )
        where = f"under {right.title!r} (line {right.line})"
        if missing := expected - found:
            yield f"{where} {chinese.name} lacks a link to {', '.join(missing.elements())}"
        if excess := found - expected:
            yield f"{where} {chinese.name} links {', '.join(excess.elements())}, {english.name} does not"
    for readme in (english, chinese):
        for section in readme.sections:
            for target in section.targets(images=False):
                if target.startswith("#") and target[1:] not in readme.anchors:
                    yield f"{readme.name} links {target}, which is no heading's, under {section.title!r}"


def in_marked_tables(english, chinese):
    there = chinese.marked()
    for name, rows in english.marked().items():
        for (line, row), (other_line, other_row) in zip(rows, there.get(name, ()), strict=False):
            where = f"between the markers {name!r}, line {line} of {english.name} and {other_line} of {chinese.name}"
            if name in VERBATIM:
                if row != other_row:
                    both = f"{' | '.join(row)!r} and {' | '.join(other_row)!r}"
                    yield f"{where}: copy this section from {english.name} as it stands; {both}"
                continue
            for cell, other in zip(row, other_row, strict=False):
                if facts(cell) != facts(other):
                    yield f"{where}: names or figures differ in {cell!r} and {other!r}"


def page_of(name):
    return read(name, (ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(params=PAIRS)
def english(request):
    return page_of(request.param)


@pytest.fixture
def chinese(english):
    return page_of(PAIRS[english.name])


def test_the_chinese_page_has_the_structure_of_the_english_one(english, chinese):
    found = differences(english, chinese)
    assert not found, f"{english.name} and {chinese.name} differ:\n" + "\n".join(found)


def test_the_main_pages_are_there():
    assert set(PAIRS) >= {f"docs/{name}.md" for name in ("agents", "chains", "errors", "sandbox")}


def test_the_last_line_of_each_readme_leads_to_the_other():
    readmes = page_of("README.md"), page_of("README.zh.md")
    for readme, other in (readmes, readmes[::-1]):
        last = (ROOT / readme.name).read_text(encoding="utf-8").rstrip().splitlines()[-1]
        assert f"]({other.name})" in last, f"the last line of {readme.name} has no link to {other.name}"


def test_the_comparison_sees_all_of_the_page(english):
    text = (ROOT / english.name).read_text(encoding="utf-8")
    parts = [part for section in english.sections for part in section.parts]
    assert (
        sum(part.kind.startswith("a code block") for part in parts) == len(re.findall("^```", text, re.MULTILINE)) // 2
    )
    assert set(re.findall(r"^<!-- (\w+) -->", text, re.MULTILINE)) == set(english.marked())
    assert all(len({len(row) for row in part.rows}) == 1 for part in parts if part.kind == "a table")
    targets = Counter(
        target for section in english.sections for images in (True, False) for target in section.targets(images=images)
    )
    assert targets == Counter(re.findall(r"\]\(([^()\s]+)\)", text))


def test_the_chinese_text_is_chinese(chinese):
    for section in chinese.sections[1:]:
        words = "".join(line for line in section.prose if not line.startswith("|"))
        assert not words.strip() or re.search(r"[\u4e00-\u9fff]", words), f"no Chinese under {section.title!r}"
    prose = [line for section in chinese.sections for line in section.prose]
    for before, line in pairwise(prose):
        wrapped = before.strip() and line.strip() and not re.match(r"[|\-*]", line)
        assert not wrapped, f"one line for a paragraph, for a break becomes a blank between characters: {line[:40]!r}"


SAMPLE = """# Name

![cat](cat.png)

Look at [More, and more](#more-and-more) or [help](HELP.md), `x[0](y)` is code.

## More, and more

- one
- two

```python
# not a heading
draw("cat")
```

<!-- models -->
| model | price |
|---|---|
| `cat-4` | 0.06, 16 to 2,048 |
<!-- /models -->

<!-- messages -->
| what |
|---|
| It failed. |
<!-- /messages -->

[中文](README.zh.md)
"""
TRANSLATION = (
    SAMPLE.replace(
        "Look at [More, and more](#more-and-more) or [help](HELP.md)", "见[帮助](HELP.md)和[更多](#还有更多)"
    )
    .replace("## More, and more", "## 还有，更多！")
    .replace("| model | price |", "| 模型 | 价格 |")
    .replace("16 to 2,048", "16 至 2,048")
    .replace("- one", "- 一")
    .replace("[中文](README.zh.md)", "[English](README.md)")
)


def compared(translation, original=SAMPLE):
    return differences(read("README.md", original), read("README.zh.md", translation))


def test_other_words_are_no_difference():
    assert compared(TRANSLATION) == []


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        (
            "## 还有",
            "### 还有",
            "## 'More, and more' (line 7) in README.md, ### '还有，更多！' (line 7) in README.zh.md",
        ),
        (
            "## 还有",
            "## 另外\n\n## 还有",
            "after 'Name' the headings differ: none in README.md, ## '另外' (line 7) in README.zh.md",
        ),
        ("## 还有，更多！\n", "", "## 'More, and more' (line 7) in README.md, # 'Name' (line 1) in README.zh.md"),
        ('draw("cat")', 'draw("猫")', """'draw("cat")' in English, 'draw("猫")' in Chinese"""),
        ('draw("cat")\n', "", "'nothing'"),
        ("```python", "```text", "a code block of python in English, a code block of text in Chinese"),
        ("- two\n", "", "a list of 2 items in English, a list of 1 items in Chinese"),
        ("| `cat-4` | 0.06, 16 至 2,048 |\n", "", "a table of 3 lines"),
        ("| 模型 | 价格 |", "| 模型 |", "with 1 or 2 columns in Chinese"),
        ("<!-- models -->\n", "", "the marker models in English"),
        ("[English]", "另一段。\n\n[English]", "'More, and more' (line 7)"),
        (
            "![cat](cat.png)",
            "![cat](cat.png)\n\n又一段。",
            "the 3. part differs: nothing in English, a paragraph in Chinese",
        ),
        ("`cat-4`", "`cat-3`", "names or figures differ in '`cat-4`' and '`cat-3`'"),
        ("2,048", "2,084", "line 20 of README.md and 20 of README.zh.md"),
        ("It failed.", "失败了。", "copy this section from README.md as it stands"),
        ("cat.png", "dog.png", "['cat.png'] in English, ['dog.png'] in Chinese"),
        ("(HELP.md)", "(HILFE.md)", "lacks a link to HELP.md"),
        ("[帮助](HELP.md)", "[帮助](HELP.md)和[它](OTHER.md)", "links OTHER.md"),
        ("#还有更多", "#more-and-more", "links #more-and-more, which is no heading's"),
        ("[English](README.md)", "[English](README.zh.md)", "lacks a link to README.md"),
    ],
)
def test_a_difference_is_reported_with_its_position(before, after, difference):
    assert before in TRANSLATION
    assert difference in "\n".join(compared(TRANSLATION.replace(before, after)))


def test_a_broken_anchor_of_the_english_readme_is_reported():
    broken = SAMPLE.replace("(#more-and-more)", "(#more)")
    assert "README.md links #more, which is no heading's, under 'Name'" in compared(TRANSLATION, broken)


def test_anchors_are_those_of_github():
    readme = read("README.zh.md", "# 示例：在 notebook 中（一）\n\n## A `code_name`, twice\n\n## 费用\n\n## 费用\n")
    assert readme.anchors[1:] == ["示例在-notebook-中一", "a-code_name-twice", "费用", "费用-1"]
