"""Images to be shown, and HTML as a browser takes it apart."""

import base64
import hashlib
import io
import random
from html.parser import HTMLParser
from types import SimpleNamespace

from PIL import Image

from langchain_cogview import GeneratedImage, ImageResult

EVIL = (
    "\"><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><svg onload=document.title='owned'>"
    "</figcaption></figure></table></div><a href=\"javascript:document.title='owned'\">x</a><style>*{display:none}</style>"
    "$\\href{javascript:document.title='owned'}{x}$ ' & &lt; \x00\u202e"
)
OURS = {"div", "figure", "figcaption", "img", "b", "span", "a", "table", "tr", "th", "td"}
OUR_ATTRIBUTES = {"class", "style", "src", "alt", "width", "height", "href", "target", "rel"}
KEPT_STYLES = {  # by JupyterLab's sanitizer, in a notebook that is not trusted
    "background-color", "border", "border-collapse", "border-radius", "color", "display", "font-family", "font-size",
    "font-weight", "height", "line-height", "margin", "max-width", "opacity", "overflow", "overflow-wrap", "padding",
    "text-align", "vertical-align", "width",
}  # fmt: skip
OF_A_PAGE = {"html", "head", "meta", "title", "style", "body"}
VOID = {"img", "meta"}


class Seen(HTMLParser):
    """HTML, and what stands in it; everything that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.texts = []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self):
        """The embedded images, decoded."""
        found = []
        for attributes in self.all("img"):
            head, data = attributes["src"].split(",", 1)
            decoded = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            assert head == f"data:image/{decoded.format.lower()};base64"
            decoded.load()
            found.append(decoded)
        return found


def assert_harmless(text, *more_tags):
    """That no element and no attribute is there but ours, and nothing is loaded or run."""
    seen = Seen(text)
    assert seen.all("div")[0]["class"] == "mathjax_ignore tex2jax_ignore"  # a formula can hold a link to a script
    for tag, attributes in seen.tags:
        assert tag in OURS | set(more_tags), tag
        if tag not in more_tags:
            assert set(attributes) <= OUR_ATTRIBUTES, attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "https://").startswith(("https://", "http://"))
        style = attributes.get("style") or ""
        assert "url(" not in style
        assert {item.split(":")[0] for item in style.split(";") if item} <= KEPT_STYLES
    return seen


def photo(seed=0, side=1024):
    """The bytes of an image that does not get small by itself."""
    chance = random.Random(seed)
    coarse = Image.effect_noise((side // 8, side // 8), 70).resize((side, side))
    fine = Image.effect_noise((side, side), 25)
    tint = Image.new("RGB", (side, side), tuple(chance.randrange(256) for _ in range(3)))
    blended = Image.blend(Image.merge("RGB", (coarse, fine, coarse)), tint, 0.5)
    out = io.BytesIO()
    blended.save(out, "PNG", compress_level=1)
    return out.getvalue()


PHOTO = photo()


def image(content=None, **facts):
    """An image as a call gives it."""
    fields = {"id": "1", "request_id": "1", "model": "cogview-4-250304", "prompt": "a kitten", **facts}
    if content is not None:
        fields |= {
            "sha256": hashlib.sha256(content).hexdigest(),
            "width": 1024,
            "height": 1024,
            "mime_type": "image/png",
        }
    return GeneratedImage(**fields)


def result(*images, **facts):
    """A result as a call gives it."""
    return ImageResult(images=images, prompt=images[0].prompt, model=images[0].model, **facts)


def be_a_kernel(monkeypatch):
    """Let this process look like a Jupyter kernel."""
    shell = SimpleNamespace(kernel=object(), execution_count=1)
    monkeypatch.setitem(__import__("sys").modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    return shell
