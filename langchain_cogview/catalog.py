"""The table of the endpoint's image models: sizes, qualities, prices, in-flight limits.

The facts are from the provider's documentation as of `PRICES_AS_OF` (docs.bigmodel.cn and docs.z.ai, "CogView-4", "GLM-Image",
"Pricing"). The in-flight limits are what users observed, and can differ by account.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from langchain_cogview.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

Region = Literal["china", "international"]
"""The platform: BigModel in mainland China, or Z.ai internationally."""
Quality = Literal["standard", "hd"]
"""The qualities that the endpoint knows; `hd` has finer detail and takes longer."""

DEFAULT_MODEL: Final = "cogview-4-250304"
"""The model of a generator that names none."""
PRICES_AS_OF: Final = date(2026, 10, 1)
"""The day on which the list prices were read from the provider's documentation."""

SIZE_WORDS: Final[dict[str, tuple[int, int]]] = {
    **dict.fromkeys(("square", "方形", "正方", "方图"), (1, 1)),
    **dict.fromkeys(("portrait", "vertical", "tall", "竖版", "竖屏", "竖图", "竖向", "纵向"), (3, 4)),
    **dict.fromkeys(("landscape", "horizontal", "wide", "横版", "横屏", "横图", "横向"), (4, 3)),
    **dict.fromkeys(("widescreen", "宽屏"), (16, 9)),
}
"""The aspect ratio (width, height) for each word that is accepted as a size; a Chinese one may be part of a longer word."""

QUALITY_WORDS: Final[dict[str, Quality]] = {
    **dict.fromkeys(("hd", "uhd", "fhd", "qhd", "high", "higher", "highest", "hi", "hires", "hq", "best", "max"), "hd"),
    **dict.fromkeys(
        ("maximum", "ultra", "premium", "detailed", "fine", "finest", "excellent", "superior", "pro"), "hd"
    ),
    **dict.fromkeys(("professional", "1080p", "1440p", "2160p", "2k", "4k", "8k"), "hd"),
    **dict.fromkeys(("高", "最高", "超高", "极高", "更高", "最好", "最佳", "高清", "超清", "超高清", "全高清"), "hd"),
    **dict.fromkeys(("精细", "优质", "高级"), "hd"),
    **dict.fromkeys(("standard", "std", "sd", "normal", "regular", "basic", "average", "medium", "mid"), "standard"),
    **dict.fromkeys(
        ("low", "lower", "lowest", "lq", "draft", "preview", "fast", "quick", "speed", "turbo"), "standard"
    ),
    **dict.fromkeys(("标准", "标清", "普通", "一般", "正常", "中", "中等", "低", "较低", "最低"), "standard"),
    **dict.fromkeys(("快速", "草稿"), "standard"),
}
"""The quality for each word that chat models and other image APIs use for one."""

_UNSPECIFIED: Final = frozenset(
    (
        *("", "-", "auto", "automatic", "default", "none", "null", "nil", "undefined", "unspecified", "not specified"),
        *("any", "n/a", "no preference", "not set", "unset"),
        *("自动", "自适应", "默认", "默认值", "缺省", "无", "空", "任意", "随意", "不限", "未指定", "不指定", "未设置"),
    )
)
_PIXELS = re.compile(
    r"(?:w(?:idth)?\s*[=:]?\s*)?(\d{1,6})\s*(?:px|pixels?|像素|w)?\s*(?:[x×*,乘]|by)"
    r"\s*(?:h(?:eight)?\s*[=:]?\s*)?(\d{1,6})\s*(?:px|pixels?|像素|h)?"
)
_PIXELS_AMONG_WORDS = re.compile(r"(?<![\w.,])(\d{1,6})\s*[x×*]\s*(\d{1,6})(?!\d|[.,]\d|\s*[x×*])")
_OF_A_SIZE = re.compile(r"(?:\s+size|尺寸|大小|比例|分辨率|选择)$")
_OF_A_QUALITY = re.compile(r"(?:\s+quality|质量|品质|画质|清晰度|分辨率|选择)$")
_RATIO = re.compile(r"(?<![\d.])(\d{1,4}(?:\.\d{1,4})?)\s*[:/_]\s*(\d{1,4}(?:\.\d{1,4})?)(?![\d.])")
_LARGEST_RATIO_TERM = 64
_MAX_PHRASE = 40
_LISTED_RATIO_TOLERANCE = 0.06
_TYPICAL_PIXELS = 1024 * 1024


def currency_of(region: Region) -> str:
    """The currency in which a platform bills.

    Args:
        region: The platform.

    Returns:
        ISO code, `CNY` or `USD`.
    """
    return "CNY" if region == "china" else "USD"


def money_text(amount: Decimal, currency: str | None) -> str:
    """Format an amount of money.

    Args:
        amount: The amount.
        currency: ISO code; None where it is unknown.

    Returns:
        Text such as `0.06 CNY`.
    """
    return f"{amount:f} {currency or ''}".rstrip()


class SizeRule(NamedTuple):
    """Which custom sizes a model accepts."""

    multiple: int
    """Each side is divisible by this number of pixels."""
    max_pixels: int
    """Largest product of both sides, in pixels."""
    min_side: int = 512
    """Shortest side, in pixels."""
    max_side: int = 2048
    """Longest side, in pixels."""

    def allows(self, width: int, height: int) -> bool:
        """Check a size.

        Args:
            width: In pixels.
            height: In pixels.

        Returns:
            Whether the model accepts the size.
        """
        sides = (width, height)
        return (
            all(self.min_side <= side <= self.max_side and side % self.multiple == 0 for side in sides)
            and width * height <= self.max_pixels
        )

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Find the legal size that is nearest to another one, which is first scaled into the bounds with its aspect ratio.

        Args:
            width: In pixels.
            height: In pixels.

        Returns:
            Width and height in pixels.
        """
        width, height = (self._fit(side) for side in self._scaled(max(width, 1), max(height, 1)))
        candidates = (
            (side, min(height, self.max_pixels // side // self.multiple * self.multiple))
            for side in range(self.min_side, self.max_side + 1, self.multiple)
        )
        legal = (size for size in candidates if self.allows(*size))

        def distance(size: tuple[int, int]) -> float:
            # The distance in pixels, increased by a change of the aspect ratio, so that a square remains a square.
            shape = abs(math.log(size[0] / size[1] * height / width))
            return ((size[0] - width) ** 2 + (size[1] - height) ** 2) * (1 + 4 * shape)

        return min(legal, key=distance)

    def _scaled(self, width: int, height: int) -> tuple[float, float]:
        # Scaled down, both sides are whole steps, so that the area is not exceeded again.
        scale = min(self.max_side / max(width, height), math.sqrt(self.max_pixels / (width * height)))
        if scale < 1:
            step = self.multiple
            return int(width * scale) // step * step, int(height * scale) // step * step
        scale = max(1.0, self.min_side / min(width, height))
        return width * scale, height * scale

    def _fit(self, side: float) -> int:
        return min(max(round(side / self.multiple) * self.multiple, self.min_side), self.max_side)

    def __str__(self) -> str:
        return (
            f"each side {self.min_side} to {self.max_side} pixels and divisible by {self.multiple}, "
            f"at most {self.max_pixels:,} pixels in all"
        )


class ModelInfo(NamedTuple):
    """The facts about one model."""

    name: str
    """Name of the model in a request body."""
    regions: frozenset[Region] = frozenset({"china"})
    """The platforms that offer the model."""
    sizes: tuple[str, ...] = ()
    """The documented sizes, `WIDTHxHEIGHT` in pixels; the first is the default."""
    rule: SizeRule | None = None
    """Which other sizes are legal; None where no rule is known."""
    qualities: tuple[Quality, ...] = ("standard", "hd")
    """The allowed values of `quality`; the first is the default."""
    prices: Mapping[str, Decimal] | None = None
    """Price of one image by ISO currency code; None where it is unknown."""
    in_flight: int = 5
    """The number of requests in flight that an ordinary account is allowed."""
    max_prompt_characters: int | None = None
    """The length limit of the prompt; None where none is documented."""
    tasks: bool = False
    """Whether the task endpoint accepts the model."""
    documented: bool = True
    """Whether the provider's documentation still lists the model."""

    @property
    def default_size(self) -> str | None:
        """The size of the image if the request has none; None where it is unknown."""
        return self.sizes[0] if self.sizes else None

    def price(self, region: Region) -> tuple[Decimal, str] | None:
        """The list price of one image on a platform.

        Args:
            region: The platform.

        Returns:
            Amount and ISO currency code; None where the price is unknown.
        """
        currency = currency_of(region)
        amount = (self.prices or {}).get(currency)
        return None if amount is None else (amount, currency)


_COGVIEW_SIZES = ("1024x1024", "768x1344", "864x1152", "1344x768", "1152x864", "1440x720", "720x1440")
_COGVIEW_RULE = SizeRule(multiple=16, max_pixels=2**21)
_BOTH: Final[frozenset[Region]] = frozenset({"china", "international"})

MODELS: Final[dict[str, ModelInfo]] = {
    info.name: info
    for info in (
        ModelInfo(
            "cogview-4-250304",
            _BOTH,
            _COGVIEW_SIZES,
            _COGVIEW_RULE,
            prices={"CNY": Decimal("0.06"), "USD": Decimal("0.01")},
        ),
        ModelInfo("cogview-4", sizes=_COGVIEW_SIZES, rule=_COGVIEW_RULE, prices={"CNY": Decimal("0.06")}),
        ModelInfo("cogview-3-flash", sizes=_COGVIEW_SIZES, rule=_COGVIEW_RULE, prices={"CNY": Decimal(0)}, in_flight=1),
        ModelInfo(
            "glm-image",
            _BOTH,
            ("1280x1280", "1568x1056", "1056x1568", "1472x1088", "1088x1472", "1728x960", "960x1728"),
            SizeRule(multiple=32, max_pixels=2**22),
            qualities=("hd",),
            prices={"CNY": Decimal("0.10"), "USD": Decimal("0.015")},
            in_flight=1,
            max_prompt_characters=1000,
            tasks=True,
        ),
        ModelInfo("cogview-3-plus", sizes=_COGVIEW_SIZES, rule=_COGVIEW_RULE, documented=False),
        ModelInfo("cogview-3", sizes=_COGVIEW_SIZES, rule=_COGVIEW_RULE, documented=False),
    )
}


def find_model(name: str) -> ModelInfo | None:
    """Look up a model.

    Args:
        name: Name of the model; case does not matter.

    Returns:
        The facts about the model; None if it is unknown.
    """
    return MODELS.get(name.strip().lower())


def model_info(name: str) -> ModelInfo:
    """Look up a model, which may be unknown.

    Args:
        name: Name of the model; case does not matter.

    Returns:
        The facts about the model; for an unknown model, a record that allows everything.
    """
    return find_model(name) or ModelInfo(name, _BOTH, documented=False)


def price_of(model: str, region: Region, prices: Mapping[str, Decimal] | None = None) -> tuple[Decimal | None, str]:
    """The price of one image.

    Args:
        model: Name of the model; case does not matter.
        region: The platform.
        prices: Prices by model that replace the list prices.

    Returns:
        Amount, None where it is unknown, and ISO code of the platform's currency.
    """
    info = model_info(model)
    overrides = {model_info(name).name: amount for name, amount in prices.items()} if prices else {}
    listed = info.price(region)
    return overrides.get(info.name, listed[0] if listed else None), currency_of(region)


def model_warning(name: str) -> str | None:
    """The warning about a model that the provider's documentation does not list.

    Args:
        name: Name of the model; case does not matter.

    Returns:
        The warning; None for a documented model.
    """
    info = find_model(name)
    if info is not None:
        return (
            None
            if info.documented
            else f"The provider's documentation no longer lists the model {info.name!r}, which may have been withdrawn."
        )
    close = difflib.get_close_matches(name.strip().lower(), MODELS, n=1, cutoff=0.7)
    guess = f" Did you mean {close[0]!r}?" if close else f" Known models: {', '.join(MODELS)}."
    shown = printable(name, 128)
    return f"This version does not know the model {shown!r}: it is sent as it is, and its sizes are not checked.{guess}"


def is_unspecified(text: str) -> bool:
    """Whether a text means that nothing was chosen, which chat models send for an argument that they would leave out.

    Args:
        text: A size or a quality.

    Returns:
        True for `""`, `"auto"`, `"null"` and similar; False for every other text, even an unknown word.
    """
    word = _plain(text).partition("(")[0].strip()
    return any(item in _UNSPECIFIED for item in (word, _OF_A_SIZE.sub("", word), _OF_A_QUALITY.sub("", word)))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text[:200]).strip(" \t\r\n.'\"`()[]").casefold()


def parse_size(text: str) -> tuple[int, int] | None:
    """Read a size in pixels, such as `1024x1024`, `1024 × 1024 px`, `1024 by 1024` or `1344x768 (landscape)`.

    Args:
        text: A size in the words of a user or a chat model.

    Returns:
        Width and height in pixels; None if the text has no such size, or several. `16x9` is a ratio and not a size.
    """
    match = _pixels(_plain(text))
    return None if match is None or _is_ratio(match) else (int(match[1]), int(match[2]))


def _pixels(plain: str) -> re.Match[str] | None:
    match = _PIXELS.fullmatch(plain)
    if match or len(plain) > _MAX_PHRASE:
        return match
    found = list(_PIXELS_AMONG_WORDS.finditer(plain))
    return found[0] if len(found) == 1 else None


def parse_ratio(text: str) -> float | None:
    """Read an aspect ratio or a word for one, such as `16:9`, `portrait` or `landscape (16:9)`.

    Args:
        text: A size in the words of a user or a chat model.

    Returns:
        Width divided by height; None if the text has neither a ratio nor such a word.
    """
    plain = _plain(text)
    pixels = _pixels(plain)
    phrase = plain if len(plain) <= _MAX_PHRASE else ""
    numbers = pixels if pixels and _is_ratio(pixels) else _RATIO.search(phrase)
    words = re.split(r"[\W_]+", phrase)
    shape = next((SIZE_WORDS[word] for word in SIZE_WORDS if word in (words if word.isascii() else phrase)), None)
    if numbers is None:
        return shape and shape[0] / shape[1]
    width, height = float(numbers[1]), float(numbers[2])
    if not width or not height:
        return None
    # In `portrait 16:9` the word decides which side is longer.
    upright = shape is not None and (shape[0] - shape[1]) * (width - height) < 0
    return height / width if upright else width / height


def _is_ratio(match: re.Match[str]) -> bool:
    # `16x9` and `3x2` are ratios. `1x1` is a size, which no model accepts.
    width, height = int(match[1]), int(match[2])
    return width != height and min(width, height) > 0 and max(width, height) <= _LARGEST_RATIO_TERM


def parse_quality(text: str) -> Quality | None:
    """Read a quality, such as `high` for `hd` and `medium` for `standard`.

    Args:
        text: A quality in the words of a user or a chat model; case does not matter.

    Returns:
        The quality; None if no word is known, or if the words differ, as in `standard or hd`.
    """
    if text in QUALITY_WORDS:
        return QUALITY_WORDS[text]
    words = (_OF_A_QUALITY.sub("", word) for word in re.split(r"[\W_]+", _plain(text)))
    found = {QUALITY_WORDS[word] for word in words if word in QUALITY_WORDS}
    return found.pop() if len(found) == 1 else None


def legal_size(model: ModelInfo, text: str) -> str:
    """Turn a size into a legal one of a model.

    A word or a ratio becomes the nearest documented size or, if none is near, a custom size of about a megapixel.

    Args:
        model: The model.
        text: A size in the words of a user or a chat model.

    Returns:
        `WIDTHxHEIGHT` in pixels.

    Raises:
        ValueError: The size is illegal. The text has the rule and the nearest legal size.
    """
    if text in model.sizes:
        return text
    pixels = parse_size(text)
    if pixels:
        size = f"{pixels[0]}x{pixels[1]}"
        if size in model.sizes or (min(pixels) > 0 if model.rule is None else model.rule.allows(*pixels)):
            return size
    ratio = parse_ratio(text)
    nearest = None if ratio is None else _size_of_ratio(model, ratio)
    if nearest is None:
        raise ValueError(_illegal_size(model, text, pixels))
    return nearest


def _size_of_ratio(model: ModelInfo, ratio: float) -> str | None:
    listed = min(model.sizes or _COGVIEW_SIZES, key=lambda size: _distance(size, ratio))
    if _distance(listed, ratio) <= _LISTED_RATIO_TOLERANCE:
        return listed
    if model.rule is None or not 1 / 4 <= ratio <= 4:  # noqa: PLR2004  2048/512, the widest legal image
        return None
    width, height = math.sqrt(_TYPICAL_PIXELS * ratio), math.sqrt(_TYPICAL_PIXELS / ratio)
    stretch = max(1.0, model.rule.min_side / min(width, height))
    width, height = model.rule.nearest(round(width * stretch), round(height * stretch))
    return f"{width}x{height}"


def _distance(size: str, ratio: float) -> float:
    width, height = parse_size(size) or (1, 1)
    return abs(math.log(width / height / ratio))


def _illegal_size(model: ModelInfo, text: str, pixels: tuple[int, int] | None) -> str:
    shown = printable(text, 40)
    # The nearest size comes first, because an agent's model may get a shortened text.
    sentence = f"The size {shown!r} is not legal for {printable(model.name, 128)}"
    if pixels and model.rule:
        width, height = model.rule.nearest(*pixels)
        sentence += f"; the nearest legal size is {width}x{height}"
    if not model.sizes:
        return f"{sentence}. Give it as WIDTHxHEIGHT in pixels, such as 1024x1024."
    sentence += f". Use one of {', '.join(model.sizes)}"
    sentence += f", or a custom size: {model.rule}." if model.rule else "."
    return sentence if pixels else f"{sentence} Words and ratios work too: square, portrait, landscape, 16:9."
