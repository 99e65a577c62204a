"""gallery.py read back as a browser reads it: a tree of tags, texts character by character, pictures pixel by pixel."""
import base64
import io
import os
import re
from html.parser import HTMLParser
from xml.etree.ElementTree import TreeBuilder

import numpy as np
import pytest
from PIL import Image

import gallery
from gallery import Answer, Card

VOID = {"meta", "img", "input", "br", "hr", "link"}
NASTY = '</p></style></title><script>alert("1")</script>\n\n \'a\' & &amp; &#60; <img src=x onerror="y"> https://example.com'
RIGHT, WRONG, PARTLY = "✓ right", "✗ wrong", "◐ partly right, "


class Parser(HTMLParser):
    """A page -> tree of elements; a tag that is left open, closed twice or closed in another's place is an error"""

    def __init__(self, text):
        super().__init__()
        self.tree, self.tags = TreeBuilder(), []
        self.feed(text)
        self.close()
        assert not self.tags
        self.root = self.tree.close()

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.tree.start(tag, {name: value or "" for name, value in attributes})
        self.tree.end(tag) if tag in VOID else self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.tags and tag == self.tags.pop()
        self.tree.end(tag)

    def handle_data(self, data):
        self.tree.data(data) if self.tags else None


def drawn(size=(64, 48), seed=0):
    """A picture of noise"""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def ramp(size):
    """A photo-like picture without detail: what is lost in a JPEG is not seen in it"""
    x, y = np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1])
    return Image.fromarray(np.stack(np.broadcast_arrays(x, y[:, None], 128), -1).astype(np.uint8))


def card(*right, benchmark="MME", name="mme row 1", image=None, question="what?", gold="a ring", texts=None, maps=None):
    """A card of models m0, m1, ...; `right`: the score of each"""
    answers = [Answer(f"m{i}", (texts or ["said"] * 9)[i], r, (maps or [None] * 9)[i]) for i, r in enumerate(right)]
    return Card(benchmark, name, image or drawn(), question, gold, answers)


@pytest.fixture
def page(tmp_path):
    """cards -> the parsed page"""
    def make(cards, title="title", notes=(), tables=()):
        gallery.write(tmp_path / "report.html", title, notes, tables, cards)
        assert os.listdir(tmp_path) == ["report.html"]
        return Parser((tmp_path / "report.html").read_text(encoding="utf-8")).root
    return make


def all_of(root, tag=None, kind=None):
    return [e for e in root.iter(tag) if kind is None or kind in e.get("class", "").split()]


def words(element):
    return "".join(element.itertext())


def decoded(uri):
    head, data = uri.split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == f"data:image/{image.format.lower()};base64"
    image.load()
    return image


def under_map(article):
    return decoded(re.search(r"--picture: url\((data:[^()'\"\s]+)\)", article.get("style"))[1])


def panels(article):
    """The panels of the models, without the plain picture"""
    plain, *found = all_of(article, "figure")
    assert plain.get("class") == "plain"
    return found


def everything():
    """Cards of all sorts, two benchmarks mixed, every text nasty somewhere"""
    gradient = np.arange(12.).reshape(3, 4)
    return [card(0, 1, .5, texts=[NASTY, "", NASTY * 9], maps=[gradient, gradient * 0, None], question=NASTY, gold=NASTY, name=NASTY),
            card(1, 0, benchmark=NASTY, image=ramp((900, 600)), question=NASTY * 20), card(1, 1, 0, image=drawn((5, 300)))]


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_sound(page):
    # tags balance (Parser), ids are unique, links have ends, headings skip no level, every picture says what it shows
    root = page(everything(), NASTY, [NASTY], [(NASTY, [NASTY, "x"], [[NASTY, NASTY]])])
    ids = [e.get("id") for e in root.iter() if "id" in e.attrib]
    assert len(set(ids)) == len(ids) and {e.get("href") for e in root.iter("a")} <= {f"#{i}" for i in ids}
    levels = [int(e.tag[1]) for e in root.iter() if re.fullmatch(r"h\d", e.tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:])) and levels.count(1) == 1 and max(levels) == 4
    assert root.get("lang") == "en" and {e.get("charset") for e in root.iter("meta")} > {"utf-8"}
    assert all(e.get("alt") for e in root.iter("img"))
    assert all(e.get("loading") == "lazy" for article in all_of(root, "article") for e in article.iter("img"))
    assert all(e.get("tabindex") == "0" and e.get("aria-label") for e in all_of(root, "div", "scroll"))  # the keyboard scrolls wide tables
    assert any(e.get("name") == "viewport" for e in root.iter("meta"))


def test_the_page_needs_nothing_else(page):
    # no script, and no address but data: and places on the page; should escaping ever fail, the policy forbids the rest
    root = page(everything(), NASTY, [NASTY], [(NASTY, [NASTY], [[NASTY]])])
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "video", "source"} & {e.tag for e in root.iter()}
    addresses = {"src": "data:image/", "href": "#"}
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on") and name not in ("srcset", "action", "poster", "background")
            assert value.startswith(addresses.get(name, ""))
    styles = [words(e) for e in root.iter("style")] + [e.get("style") for e in root.iter() if "style" in e.attrib]
    assert len(styles) == 5 and not any(re.search(r"@import|@font-face|url\((?!data:image/)", style) for style in styles)
    policy, = (e.get("content") for e in root.iter("meta") if e.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_text_arrives_character_by_character(page):
    strange = "\n two  spaces \u202e \u0645\u0627 \U0001f600 \ud83d"                        # turned writing, half a surrogate pair
    model = Answer(NASTY, "it is\n" + NASTY[:50], 0, np.ones((1, 1)))
    asked = Card(NASTY, NASTY, drawn(), NASTY + strange, NASTY[:99], [model, model._replace(model="2" + NASTY, right=1)])
    root = page([asked], NASTY, [NASTY, strange], [(NASTY, [NASTY, "n"], [[NASTY, NASTY], ["b", "2"]])])
    strange = strange.replace("\ud83d", "\ufffd")
    title, heading = (words(next(root.iter(tag))) for tag in ("title", "h1"))
    assert title == heading == NASTY and [words(e) for e in root.iter("li")] == [NASTY, strange]
    first = all_of(root, "div", "tables")[0]
    assert words(next(first.iter("figcaption"))) == NASTY and [words(e) for e in next(first.iter("thead")).iter("th")] == [NASTY, "n"]
    rows = [[words(e) for e in row] for row in next(first.iter("tbody")).iter("tr")]
    assert rows == [[NASTY, NASTY], ["b", "2"]] and all(row[0].get("scope") == "row" for row in next(first.iter("tbody")).iter("tr"))
    article, = all_of(root, "article")
    question, gold, answer, _ = all_of(article, kind="text")
    assert [words(e) for e in (question, gold, answer)] == [NASTY + strange, NASTY[:99], model.text]
    assert all(e.get("dir") == "auto" for e in (question, gold, answer))
    assert words(next(article.iter("h4"))) == NASTY and words(panels(article)[0].find("figcaption/b")) == NASTY
    plain, gradient, _ = (e.get("alt") for e in article.iter("img"))
    assert plain == f"picture of {NASTY}" and gradient == f"gradient map of {NASTY}, largest in row 1 of 1, column 1 of 1"
    assert words(next(root.iter("h3"))).startswith(NASTY) and NASTY in words(next(root.iter("nav")))
    assert f"Compared with {NASTY}, the first model" in words(root)
    assert [words(e) for e in root.iter("label")][1] == f" 2{NASTY} ▲ gained 1" and words(root.findall(".//nav//thead/tr/th")[2]) == "2" + NASTY
    assert re.search(r"^\.text \{[^}]*white-space: pre-wrap", gallery.STYLE, re.M)          # line breaks are seen


def test_both_lights_can_be_read():
    # the same colours are defined in light and dark; text has the contrast of WCAG AA on page and cards
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in gallery.STYLE.split("prefers-color-scheme: dark"))
    assert set(light) == set(dark) and {*re.findall(r"var\(--(\w+)", gallery.STYLE)} <= {*light, "state", "ratio", "picture"}

    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(2 * d for d in color[1:])
        values = np.array([int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)])
        return np.where(values <= .04045, values / 12.92, ((values + .055) / 1.055) ** 2.4) @ [.2126, .7152, .0722]
    for colors in (light, dark):
        for name in ("text", "muted", "link", "right", "wrong", "partly"):
            for ground in ("page", "card"):
                dim, bright = sorted(luminance(colors[c]) + .05 for c in (name, ground))
                assert bright / dim > 4.5, (name, ground)
    assert luminance(light["page"]) > .8 and luminance(dark["page"]) < .05


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second, change, verdict", [
    (0, 1, "gained", RIGHT), (0, .5, "gained", PARTLY + "0.50"), (.5, 1., None, RIGHT), (.25, 2 / 3, "gained", PARTLY + "0.67"),
    (1, 0, "lost", WRONG), (1, .5, None, PARTLY + "0.50"), (.5, 0., "lost", WRONG), (2 / 3, .25, "lost", PARTLY + "0.25"),
    (1, 1, None, RIGHT), (0, 0, None, WRONG), (.5, .5, None, PARTLY + "0.50"), (0, .3, None, PARTLY + "0.30")])
def test_what_changed_is_told_in_words_signs_and_classes(first, second, change, verdict, page):
    asked = card(first, first, second)
    assert gallery.changes(asked) == ({"m2": change} if change else {})
    article, = all_of(page([asked]), "article")
    start, same, other = panels(article)
    sign = {"gained": "▲ gained", "lost": "▼ lost", None: ""}[change]
    assert words(other.find("figcaption")).split() == f"m2 {verdict} {sign}".split()
    assert other.get("class") == {RIGHT: "right", WRONG: "wrong"}.get(verdict, "partly") in words(other.find("figcaption/span"))
    assert not re.search("gained|lost", words(start) + words(same)) and start.get("class") == same.get("class")
    assert set(article.get("class").split()) == {"card", "small", *([f"{change}-1"] if change else [])}


def test_cards_are_counted_grouped_and_chosen(page):
    # two benchmarks in turn, one of them asked of a third model only once
    cards = [card(0, 1, 1, benchmark="B", name="1"), card(1, 0, benchmark="A", name="2"), card(0, 1, benchmark="B", name="3"),
             card(.5, 0, .5, benchmark="A", name="4")]
    root = page(cards)
    assert words(root.find(".//nav//figcaption")) == "questions on this page, ▲ gained and ▼ lost"
    heads = [words(e) for e in root.find(".//nav//thead/tr")]
    assert heads == ["benchmark", "questions", "m1", "m2"]
    lines = {words(line[0]): [words(e) for e in line[1:]] for line in root.findall(".//nav//tbody/tr")}
    assert lines == {"B": ["2", "▲ 2  ▼ 0", "▲ 1  ▼ 0"], "A": ["2", "▲ 0  ▼ 2", "▲ 0  ▼ 0"]}
    targets = {words(e): e.get("href")[1:] for e in root.findall(".//nav//a")}
    sections = {e.get("id"): [words(h) for h in e.iter("h4")] for e in root.iter("section")}
    assert sections == {targets["B"]: ["1", "3"], targets["A"]: ["2", "4"]} and list(sections) == list(targets.values())

    options = [(words(label).strip(), label[0]) for label in root.iter("label")]
    assert [text for text, _ in options] == ["all 4", "m1 ▲ gained 2", "m1 ▼ lost 2", "m2 ▲ gained 1", "m2 ▼ lost 0"]
    assert {e.get("type") for _, e in options} == {"radio"} and len({e.get("name") for _, e in options}) == 1
    assert ["checked" in e.attrib for _, e in options] == [True, False, False, False, False]
    assert ["disabled" in e.attrib for _, e in options] == [False, False, False, False, True]
    rules = words(root.find(".//div/style"))
    for (_, option), expected in zip(options[1:], (["1", "3"], ["2", "4"], ["1"], [])):
        kind = option.get("id")
        assert [words(next(e.iter("h4"))) for e in all_of(root, "article", kind)] == expected
        chosen = f".gallery:has(#{kind}:checked)"
        assert f"{chosen} .card:not(.{kind}), {chosen} section:not(:has(.{kind})) {{ display: none }}" in rules
    assert rules.count("display") == 4 and "id" not in options[0][1].attrib                 # "all" hides nothing
    assert all(e in list(all_of(root, "div", "gallery")[0].iter()) for e in [*root.iter("input"), *root.iter("section")])


def test_long_texts_are_folded_and_none_is_cut(page):
    # by length, by lines; an answer of nothing says so
    texts = ["x" * 100, "y" * 101, "1\n2\n3\n4\n5\n6\n7\n8", "\n".join("123456789"), "", " \n", "z" * 5000]
    article, = all_of(page([card(*[0] * 6, 1, texts=texts, question="q" * 800, gold="g" * 101)]), "article")
    for panel, text, folded in zip(panels(article), texts, (False, True, False, True, False, False, True), strict=True):
        said, = all_of(panel, kind="text")
        assert (said.tag == "details") == folded
        if folded:
            summary, whole = said
            assert words(whole) == text and words(summary).endswith(f"… all {len(text)} characters")
            assert words(summary).startswith(text[:15 if "\n" in text else 100]) and len(words(summary)) < 130
        else:
            assert words(said) == (text if text.strip() else "(empty)")
    question, gold = all_of(article, kind="text")[:2]
    assert question.tag == "p" and words(question) == "q" * 800 and gold.tag == "details" and words(gold[1]) == "g" * 101
    question = all_of(page([card(0, 1, question="q" * 801)]), kind="text")[0]
    assert question.tag == "details" and words(question[1]) == "q" * 801


def test_answers_stand_in_the_order_of_the_models(page):
    asked = card(0, 1, .5, texts=["red", "blue", "green"])
    article, = all_of(page([asked]), "article")
    assert [(words(p.find("figcaption/b")), words(all_of(p, kind="text")[0])) for p in panels(article)] == \
        [("m0", "red"), ("m1", "blue"), ("m2", "green")]
