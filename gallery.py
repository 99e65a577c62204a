"""
A page to look at: how several models answered, first in tables, then question by question wherever a model answered
differently from the first one, with the picture, what each model said, and its gradient map laid over the picture.

`write` makes one .html file with everything inside. It opens from disk, offline, and has no script, so that the words
of a question or an answer can do nothing. Choosing among the cards is CSS; a browser without :has() shows them all.
"""
import base64
import io
from html import escape
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image

SMALL = 128                 # px: drawn pictures up to this size keep every pixel and are enlarged as squares
PLAIN, UNDER_MAP = 448, 320     # px, longer side of a photo: alone, and under the maps, where less is seen of it
QUESTION, ANSWER = 800, 100     # characters; what is longer is folded
SIGNS = {"gained": "▲", "lost": "▼"}  # words and signs tell what colours tell


class Answer(NamedTuple):
    """What one model said"""
    model: str              # name of the run
    text: str               # as the model wrote it
    right: float            # 1 right, 0 wrong, between partly
    map: np.ndarray | None  # (rows, columns), magnitude of the gradient at the image tokens, which cover the picture


class Card(NamedTuple):
    """A question that two models answered differently"""
    benchmark: str
    name: str
    image: Image.Image
    question: str
    gold: str               # the right answer
    answers: list[Answer]   # the first model's first


def changes(card):
    """{model: "gained" if it is right where the first model is wrong, "lost" if wrong where that is right}; right means
    at least half right, as in the tables"""
    first, *others = ((answer.model, answer.right >= .5) for answer in card.answers)
    return {model: "gained" if right else "lost" for model, right in others if right != first[1]}


# ---- pictures --------------------------------------------------------------------------------------------------------


def data_uri(image, format, **options):
    """A picture as an address that contains it"""
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_uri(image, side):
    """The picture in RGB, as models read it: a photo at most `side` px high and wide, a small picture without loss"""
    image = image.convert("RGB")
    if max(image.size) <= SMALL:
        return data_uri(image, "PNG")
    image.thumbnail((side, side))
    return data_uri(image, "JPEG", quality=85)


def heat_uri(gradient):
    """A map (rows, columns) as a picture to lay over another, one pixel a token, brightest where the gradient is
    largest. Where there is none it darkens: were it clear there, a white picture would outshine all heat."""
    heat = np.asarray(gradient, float) / (np.max(gradient) or 1)
    rgba = matplotlib.colormaps["inferno"](heat)
    rgba[..., 3] = .55 + .2 * heat
    return data_uri(Image.fromarray((255 * rgba).round().astype(np.uint8)), "PNG")


# ---- pieces of the page ----------------------------------------------------------------------------------------------


def passage(text, limit):
    """A text with its line breaks; a long one folded behind its beginning"""
    begin = "\n".join(text.split("\n")[:8])[:limit]
    if begin == text:
        return f'<p class="text" dir="auto">{escape(text)}</p>'
    return (f'<details class="text"><summary dir="auto"><span class="begin">{escape(begin)}… </span>'
            f'<small>all {len(text)} characters</small></summary><p dir="auto">{escape(text)}</p></details>')


def table(caption, heads, lines, targets=()):
    """A table whose first column names its lines; `targets`: the part of the page that each name leads to"""
    names = [escape(name) for name, *_ in lines]
    names = [f'<a href="#{target}">{name}</a>' for target, name in zip(targets, names)] or names
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    rows = [f'<th scope="row">{name}</th>' + "".join(f"<td>{escape(text)}</td>" for text in texts)
            for name, (_, *texts) in zip(names, lines)]
    return (f'<figure><figcaption>{escape(caption)}</figcaption><div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(caption)}"><table><thead><tr>{head}</tr></thead>\n<tbody>'
            + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</tbody></table></div></figure>\n")


def map_view(answer):
    """The map of an answer over the picture of its card, if there is one"""
    if answer.map is None:
        return ""
    if not np.isfinite(answer.map).all():  # half precision overflows
        return '<p class="muted">no map: the gradient is not finite</p>'
    (row, column), (rows, columns) = np.unravel_index(np.argmax(answer.map), answer.map.shape), answer.map.shape
    peak = f"largest in row {row + 1} of {rows}, column {column + 1} of {columns}" if np.any(answer.map) else "all zero"
    return (f'<div class="view map"><img src="{heat_uri(answer.map)}" loading="lazy" '
            f'alt="gradient map of {escape(answer.model)}, {peak}"></div>')


def panel(answer, change):
    """One model's map, whether it is right, what changed from the first model ("gained", "lost", None), what it said"""
    state, verdict = {1: ("right", "✓ right"), 0: ("wrong", "✗ wrong")}.get(
        answer.right, ("partly", f"◐ partly right, {answer.right:.2f}"))
    change = f'<span class="{change}">{SIGNS[change]} {change}</span>' if change else ""
    said = passage(answer.text, ANSWER) if answer.text.strip() else '<p class="text muted">(empty)</p>'
    return (f'<figure class="{state}">{map_view(answer)}<figcaption><b>{escape(answer.model)}</b> '
            f'<span class="verdict">{verdict}</span> {change}</figcaption>{said}</figure>\n')


def article(card, models):
    """A card. Its classes say what `models` gained and lost: by them it is chosen"""
    changed, small = changes(card), max(card.image.size) <= SMALL
    classes = ["card", *["small"] * small, *(f"{change}-{models.index(m)}" for m, change in changed.items())]
    return (f'<article class="{" ".join(classes)}" style="--ratio: {card.image.width / card.image.height:.4f}; '
            f'--picture: url({picture_uri(card.image, UNDER_MAP)})"><h4>{escape(card.name)}</h4>\n'
            f'{passage(card.question, QUESTION)}\n<div class="panels"><figure class="plain"><div class="view">'
            f'<img src="{picture_uri(card.image, PLAIN)}" loading="lazy" alt="picture of {escape(card.name)}"></div>'
            f'<figcaption>right answer</figcaption>{passage(card.gold, ANSWER)}</figure>\n'
            f'{"".join(panel(answer, changed.get(answer.model)) for answer in card.answers)}</div></article>\n')


def gallery(cards):
    """Contents with counts, how to read a card, a choice of cards, and the cards by benchmark"""
    if not cards:
        return "<p>No question to show: the models answered alike, there was only one, or no gallery was asked for.</p>"
    models, groups = list(dict.fromkeys(answer.model for card in cards for answer in card.answers[1:])), {}
    for card in cards:
        groups.setdefault(card.benchmark, []).append(card)
    count = lambda members, model, change: sum(changes(card).get(model) == change for card in members)
    lines = [[name, str(len(members)), *("  ".join(f"{SIGNS[c]} {count(members, model, c)}" for c in SIGNS)
                                         for model in models)] for name, members in groups.items()]
    contents = table("questions on this page" + ", ▲ gained and ▼ lost" * bool(models),
                     ["benchmark", "questions", *models], lines, [f"benchmark-{i}" for i in range(len(lines))])
    page = [f'<nav id="contents" aria-label="contents">{contents}</nav>\n']
    if any(answer.map is not None for card in cards for answer in card.answers):
        page.append('<p>A map shows the gradient of the log-probability of that model\'s own answer with respect to '
                    f'the image tokens; each on its own scale, <span class="scale">none <img src="'
                    f'{heat_uri(np.linspace(0, 1, 64)[None])}" alt="dark to bright"> largest.</span></p>\n')
    options, rules = [f'<label><input type="radio" name="show" checked> all {len(cards)}</label>'], []
    for i, model in enumerate(models):
        for change, sign in SIGNS.items():
            n, kind = count(cards, model, change), f"{change}-{i}"
            options.append(f'<label><input type="radio" name="show" id="{kind}"{" disabled" * (n == 0)}> '
                           f"{escape(model)} {sign} {change} {n}</label>")
            chosen = f".gallery:has(#{kind}:checked)"
            rules.append(f"{chosen} .card:not(.{kind}), {chosen} section:not(:has(.{kind})) {{ display: none }}")
    if models:
        page.append(f'<p>Compared with {escape(cards[0].answers[0].model)}, the first model: <span class="gained">▲ '
                    'gained</span>: right where it was wrong, <span class="lost">▼ lost</span>: wrong.</p>\n<style>'
                    f'{" ".join(rules)}</style><fieldset><legend>show</legend>{" ".join(options)}</fieldset>\n')
    for i, (name, members) in enumerate(groups.items()):
        page += [f'<section id="benchmark-{i}"><h3>{escape(name)} <small><a href="#contents">contents</a></small>',
                 "</h3>\n", *(article(card, models) for card in members), "</section>\n"]
    return "".join(page)


# ---- the page --------------------------------------------------------------------------------------------------------

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser fetches and runs nothing
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --text: #20242a; --muted: #5f666e; --line: #dededa;
  --link: #1f56b8; --right: #17703f; --wrong: #b3311f; --partly: #855700 }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1e2125; --text: #e4e4e0; --muted: #a0a6ad;
  --line: #373c42; --link: #8ab4f8; --right: #6fd398; --wrong: #ff9483; --partly: #e3b75c } }
* { box-sizing: border-box }
html { scroll-padding-top: 6rem }
body { margin: 0 auto; padding: 1.5rem clamp(.75rem, 3vw, 2.5rem) 4rem; max-width: 88rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .75rem } h1 { font-size: 1.7rem; margin-top: 0 } h3 { font-size: 1.1rem }
h4, small { font-size: .85rem; font-weight: normal; margin: 0 }
h4, small, .muted, ul, legend, thead, .plain figcaption, label:has(:disabled) { color: var(--muted) }
p, ul, figcaption { margin: .4rem 0; max-width: 75ch } ul { padding: 0; list-style: none }
a { color: var(--link) } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
figure { margin: 0; min-width: 0; max-width: 100% }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2rem } .tables figcaption, nav figcaption { font-weight: 600 }
.scroll, .card { border: 1px solid var(--line); border-radius: .6rem; background: var(--card) }
.scroll { overflow-x: auto; width: fit-content; max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: pre }
th, td { padding: .35rem .8rem; text-align: right; font-weight: normal }
tbody > tr > * { border-top: 1px solid var(--line) }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--card) }
.verdict, .gained, .lost, .scale { white-space: nowrap } .scale img { width: 8rem; height: .8em; background: #888 }
.right { --state: var(--right) } .wrong { --state: var(--wrong) } .partly { --state: var(--partly) }
.verdict { color: var(--state) } .gained { color: var(--right) } .lost { color: var(--wrong) }
fieldset { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: 1rem 0 0; padding: .5rem 0;
  border: 0; position: sticky; top: 0; z-index: 2; background: var(--page) } legend { float: left; padding: 0 }
label { display: flex; align-items: center; gap: .2rem; padding: .1rem .7rem .1rem .3rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 2rem } label:has(:checked) { border-color: var(--link) }
@supports not selector(:has(a)) { fieldset { display: none } }
.card { padding: .9rem 1.1rem 1.1rem; margin-bottom: 1rem }
.card { content-visibility: auto; contain-intrinsic-size: auto 28rem } /* what is out of sight is not laid out */
.text { margin: .1rem 0 0; white-space: pre-wrap } .card > .text { font-size: 1.1rem }
summary { cursor: pointer } details[open] .begin { display: none }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: 1rem; margin-top: .75rem }
.panels figcaption { font-size: .9rem }
.panels .text { padding-left: .6rem; border-left: 3px solid var(--state, var(--line)) }
.view { aspect-ratio: var(--ratio); width: min(100%, 20rem, 16rem * var(--ratio)); outline: 1px solid var(--line) }
.view img { display: block; width: 100%; height: 100% }
.map { background: var(--picture) 0 0 / 100% 100%; print-color-adjust: exact }
.map img, .small .view { image-rendering: pixelated }
@media (max-width: 40rem) { .plain { grid-column: 1 / -1 } fieldset { flex-wrap: nowrap; overflow-x: auto }
  label, legend { white-space: nowrap } }
"""


def write(path, title, notes, tables, cards):
    """Writes the page: `notes` a line each, `tables` of (caption, heads, lines), all cells text
    and the first one of a line its name, and `cards`, a list of Card"""
    page = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n'
            f'<ul>{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>\n<main><h2>Summary</h2>\n'
            f'<div class="tables">{"".join(table(*parts) for parts in tables)}</div>\n'
            f'<h2>Answered differently</h2>\n<div class="gallery">{gallery(cards)}</div></main></body></html>\n')
    with open(path, "w", encoding="utf-8", errors="xmlcharrefreplace") as f:  # half a surrogate pair is no UTF-8
        f.write(page)
