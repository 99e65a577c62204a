"""
The metrics of the benchmarks, as their makers compute them.

Small pure functions, one for each rule: a prediction is the text that a model wrote, and nothing of a model or a data
set comes in here. Those of one row take plain values; those of many rows take dicts with the hub's own columns and a
`prediction`, because what they score is more than one row: a question asked in every rotation of its options, a pair
of pictures, a category.

Two readings of the same answer exist, and they are never mixed. "paper" is Cambrian-1's, with which PIVOT's tables were
made; "lmms" is that of lmms-eval. Where a rule looks odd it was kept, and its line says so: only the same oddities make
the same numbers.
"""
import ast
import math
import re
import string
from collections import Counter, defaultdict

# ---- own data ------------------------------------------------------------------------------------------------------


def normalise(text):
    """Lower case, single spaces, no full stop at the end"""
    return " ".join(text.lower().split()).rstrip(".").strip()


def score(prediction, answer):
    """How right is a prediction, in [0, 1]: the same text; F1 of the parts for an answer of several, between commas.

    score("red", "Red.") = 1, score("red, blue", "red") = 0, score("red ring, blue box", "red ring, green box") = 1/2"""
    said, true = ([normalise(part) for part in text.split(",")] for text in (prediction, answer))
    if len(true) == 1:
        return float(said == true)
    return 2 * (Counter(said) & Counter(true)).total() / (len(said) + len(true))


# ---- texts ---------------------------------------------------------------------------------------------------------

CONTRACTIONS = dict(pair.split(":") for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't
    itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've
    mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock
    oughtnt:oughtn't 'ows'at:'ow's'at 'ow'sat:'ow's'at ow's'at:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've
    shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
    somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll
    thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd
    theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't
    wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've
    whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've
    wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've
    wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll
    yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've
    youll:you'll youre:you're youve:you've""".split())  # the table of the VQA scorer, as far as lower case can match it
NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))
MARKS = ";/[]\"{}()=+\\_-><@`,?!"  # not the period, and not $ % & : '


def vqa_normalise(text):
    """An answer as the VQA metric compares it (EvalAI's processor, the form that M4C and TextVQA use): lower case,
    punctuation, number words, articles and contractions made alike"""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = cleaned = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in MARKS:  # next to a space anywhere in the text: all of its kind vanish, else they become spaces
        cleaned = cleaned.replace(mark, "" if mark + " " in text or " " + mark in text else " ")
    # a lookahead was meant to be a lookbehind, so that a period vanishes unless a digit follows; 32 is re.UNICODE,
    # given as the count
    cleaned = re.sub(r"(?!<=\d)(\.)(?!\d)", "", cleaned, count=32)
    words = [NUMBERS.get(word, word) for word in cleaned.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction, answers):
    """VQA's soft accuracy in [0, 1]: is this what people say? `answers` are those of (ten) people, list of str.

    Each person in turn is left out, and min(1, matches among the others / 3) is averaged: 1, 2, 3, 4 matches of ten
    are worth 0.3, 0.6, 0.9, 1. Goyal et al. 2017 (VQAv2); Singh et al. 2019 (TextVQA)."""
    said, people = vqa_normalise(prediction), [vqa_normalise(answer) for answer in answers]
    n = people.count(said)
    return sum(min(1.0, (n - (answer == said)) / 3) for answer in people) / len(people)


def edit_distance(a, b):
    """Levenshtein distance of two texts, in characters"""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(prediction, answers):
    """Average normalised Levenshtein similarity of DocVQA, for one row: that to the nearest of `answers` (list of str),
    0 if it is below 0.5 (Biten et al. 2019).

    Distances are of texts in lower case with single spaces, but lengths are of the texts with all their spaces."""
    tidy = lambda text: " ".join(text.strip().lower().split())
    lengths = [max(len(answer.upper()), len(prediction.upper())) for answer in answers]  # upper: ß counts as two
    distances = [edit_distance(tidy(answer), tidy(prediction)) for answer in answers]
    similarity = 1 - min(distance / length if length else 0.0 for distance, length in zip(distances, lengths))
    return similarity if similarity >= 0.5 else 0.0


def number(text):
    """The float that a text is, or None"""
    try:
        return float(text)
    except ValueError:
        return None


def near(prediction, target):
    """Are both numbers, and the prediction within 5 % of the target, the bound included? (Cambrian's form)"""
    said, true = number(prediction), number(target)
    return said is not None and true is not None and abs(said - true) <= abs(true) * 0.05


def relaxed_accuracy(prediction, target, profile="paper"):
    """ChartQA: a number may be off by 5 % of the target, anything else must be the same text but for case; 0.0 or 1.0
    (Masry et al. 2022, section 5.1). Commas, $ and units make a number a text.

    "lmms" reads 25% as 0.25, and wants the very string for a target of 0; "paper" knows no percent."""
    same = prediction.lower() == target.lower()
    if profile == "paper":
        both = number(prediction) is not None and number(target) is not None
        return float(near(prediction, target) if both else same)
    said, true = ((value := number(text.rstrip("%"))) and value / (100 if text.endswith("%") else 1)
                  for text in (prediction, target))
    return float(abs(said - true) / abs(true) <= 0.05 if said is not None and true else same)


def bare(text):
    """Lower case, without punctuation"""
    return text.translate(str.maketrans("", "", string.punctuation)).lower()


def gqa_correct(prediction, answer):
    """GQA: the same text but for case and punctuation; articles and spaces count (lmms-eval)"""
    return bare(prediction) == bare(answer)


def ocrbench_correct(prediction, answers, kind):
    """OCRBench: is any of `answers` contained in the prediction? `kind` is the row's `question_type`, or its `dataset`.

    Case and line ends do not count, but handwritten mathematics is compared without spaces and with its case, as LaTeX
    tells \\Delta from \\delta (Liu et al. 2023)."""
    if kind in ("HME100k", "Handwritten Mathematical Expression Recognition"):
        tidy = lambda text: text.strip().replace("\n", "").replace(" ", "")
    else:
        wide = {0x3000: " "} | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width ASCII (lmms-eval)
        tidy = lambda text: text.translate(wide).lower().strip().replace("\n", " ")
    return any(tidy(answer) in tidy(prediction) for answer in answers)


# ---- options -------------------------------------------------------------------------------------------------------


def after_answer_is(prediction):
    """Cambrian's first step everywhere: lower case, and what follows the last "answer is" or "answer:" """
    text = prediction.lower().strip()
    for words in ("answer is", "answer:"):  # of "answer is: b" the colon stays, and costs the answer
        text = text.rpartition(words)[2]
    return text.strip()


def option_letter(prediction, options):
    """The letter of `options` (dict letter -> text) that a prediction names, or None if it cannot be told, by
    Cambrian's rule: the first character of what follows "answer is", so "apple" is A (its extract_mcq_answer)"""
    letter = after_answer_is(prediction).rstrip(".:,").lstrip("(").rstrip(")")[:1].upper()
    return letter if letter in options else None


def mmmu_choice(prediction, options):
    """MMMU's own rule: "(B)" anywhere, else "B ", else "B.", else in a text of more than five words an option's text;
    the last one where several stand. `options`: dict letter -> text. Lower-case letters are not seen.

    The original draws a letter at random if there is none; None here, which is never right. (Yue et al. 2024)"""
    text = prediction
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):    # the last pair as in the original
        if found := [letter for letter in options if form.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) > 5:
        text, options = text.lower(), {letter: option.lower() for letter, option in options.items()}
        if found := [letter for letter in options if options[letter] in text]:
            return max(found, key=lambda letter: text.rfind(options[letter]))
    return None


MARK = f"[{re.escape(string.punctuation)}]"
LMMS_LETTERS = {  # the rules of single tasks of lmms-eval: patterns in the order in which they are tried
    "seed": (r"(?i)^([A-Z])",),
    "scienceqa": (r"^([A-Z])\.", r"(?i)^([A-Z])$"),
    "ai2d": (r"^([A-Z])\.", rf"(?i)^{MARK}*([A-Z]){MARK}*$"),
    "cvbench": (r"(?i)^[(\s]*([A-Z])",),        # any first letter counts
    "mmvp": (r"(?i)^\(?([AB])\)?\.?\s*$", r"(?i)^\(?([AB])\)?[.\s]", r"(?i)answer\s+is\s+\(?([AB])\)?",
             r"(?i)option\s+\(?([AB])\)?", r"(?i)\(?([AB])\)?(?:\s|$)", r"(?i)^([AB])"),
    "blink": (r"(?i)^(?=[^\n]{1,4}(?:\n|$))\(?([LETTERS])\)?[.\s:,)]*(?:\n|$)",          # a line of little else
              r"(?is).*answers?(?:\s+is)?\s*[:\-]?\s*\(?([LETTERS])\)?(?![A-Za-z])",     # the last that is declared
              r"(?s).*\(([LETTERS])\)", r"(?i)^[(\s]*([LETTERS])"),
    "realworldqa": (r"(?is).*(?:answer|option|choice)\s*(?:is\b|[:=])\W*([A-D])(?!\w)",     # in short what it does
                    r"(?i)^\W*([A-D])(?:\W*$|[.):,])", r"(?s).*\(([A-D])\)"),
}


def pattern_letter(prediction, options, task):
    """The letter by the patterns of LMMS_LETTERS[task], or None"""
    letters = "".join(options)  # where a pattern says LETTERS it sees no others
    found = (re.search(pattern.replace("LETTERS", letters), prediction.strip()) for pattern in LMMS_LETTERS[task])
    letter = next((match[1].upper() for match in found if match), None)
    return letter if letter and letter in options else None


def mmbench_letter(prediction, options):
    """MMBench as lmms-eval reads it where it needs no GPT: exactly one letter that stands alone ("A" may be an article
    in more than three words), else exactly one in a form such as "(B)", else exactly one option's text"""
    words = prediction.split()
    forms = ["{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{})."]
    for form in forms:
        found = [letter for letter in "ABCDE" if form.format(letter) in words]
        if len(found) == 1 and not (form == "{}" and found == ["A"] and len(words) > 3):
            return found[0] if found[0] in options else None
    found = [letter for letter, option in options.items() if option.lower() in prediction.lower()]
    return found[0] if len(found) == 1 else None


def mmmu_open(prediction, answers):
    """MMMU's open questions: does one of the numbers or key phrases of a prediction equal one of `answers` (str or list
    of str)? Numbers are rounded to two decimals, any of them counts; a text counts if it contains the answer.

    (lmms-eval's later code compares the letters of the first phrase and so gives 0 to all; this is the original.)"""
    found, true = set(), set()
    for phrase in key_phrases(prediction):
        found.update(mmmu_normalise(phrase), *map(mmmu_normalise, numbers_in(phrase)))
    true.update(*map(mmmu_normalise, [answers] if isinstance(answers, str) else answers))
    return any(said in true if isinstance(said, float) else
               any(isinstance(answer, str) and answer in said for answer in true) for said in found)


def key_phrases(prediction):
    """The parts of a prediction that may be the answer: of each sentence the shortest end after a word like "is" """
    text, phrases = prediction.strip().strip(".").lower(), []
    words = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)  # of lower case, so only lines are told apart, as in the original
    for i, sentence in enumerate(sentences):
        shortest = ""
        for word in words + ["="] * (i == len(sentences) - 1):
            end = sentence.rpartition(word)[2].strip()
            if word in sentence and (not shortest or len(end) < len(shortest)):
                shortest = end
        if shortest not in ("", *":,.!?;'"):
            phrases.append(shortest)
    return phrases or [text]


def numbers_in(text):
    """All numbers of a text as they are written: 1,000 and 1e-3 and -.5"""
    return [found for pattern in (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
                                  r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
            for found in re.findall(pattern, text)]


def mmmu_normalise(text):
    """-> [float rounded to two decimals] or [text in lower case]; a single letter wants a space beside it"""
    text = text.strip()
    value = number(text.replace(",", ""))
    if value is not None:
        return [round(value, 2)]
    text = text.lower()
    return [" " + text, text + " "] if len(text) == 1 else [text]


# ---- yes or no -----------------------------------------------------------------------------------------------------


def mme_yes_no(prediction, profile):
    """ "yes", "no" or None. "lmms": the word, its first letter alone, or the word within the first four characters;
    "paper": the word and nothing else"""
    text = prediction.lower().strip()
    if profile == "paper":
        text = text.rstrip(".")
        return text if text in ("yes", "no") else None
    text = text.replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def pope_yes_no(prediction, profile):
    """ "yes", "no" or None. "lmms": the word alone ("Yes." is neither); "paper": the first word"""
    text = prediction.lower().strip()
    if profile == "paper":
        text = (text.split() or [""])[0].rstrip(".:,")
    return text if text in ("yes", "no") else None


def naturalbench_choice(prediction, kind):
    """1 for yes or A, 0 for no or B, whichever word comes first; -1 if there is neither. `kind`: the row's
    Question_Type, yes_no or multiple_choice"""
    words = ("yes", "no") if kind == "yes_no" else ("A", "B")
    places = [match.start() if (match := re.search(rf"\b{word}\b", prediction, re.IGNORECASE)) else None
              for word in words]
    if places == [None, None]:
        return -1
    return int(places[1] is None or places[0] is not None and places[0] < places[1])


# ---- many rows -----------------------------------------------------------------------------------------------------

MME_PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def grouped(rows, key):
    """{key(row): rows}"""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def mme_score(rows, profile="lmms"):
    """MME (Fu et al. 2023): of each category the mean over pictures of accuracy and accuracy+ (both questions of a
    picture right), in points, at most 200; perception and cognition sum their ten and four categories.

    rows: question_id (one a picture), category, answer, prediction. A pair is told by category and question_id, not by
    its place, and a picture without its pair is left out."""
    right = lambda row: mme_yes_no(row["prediction"], profile) == row["answer"].lower().strip().rstrip(".")
    points = {}
    for category, members in grouped(rows, lambda row: row["category"]).items():
        pairs = [[right(row) for row in pair] for pair in grouped(members, lambda row: row["question_id"]).values()]
        points[category] = mean(100 * (mean(pair) + all(pair)) for pair in pairs if len(pair) == 2)
    perception = sum(value for category, value in points.items() if category in MME_PERCEPTION)
    return {"perception": perception, "cognition": sum(points.values()) - perception, "total": sum(points.values()),
            **points}


def is_there(text):
    """Missing texts are None, empty or the string "nan" """
    return text not in (None, "", "nan")


def mmbench_options(row):
    """The options that a row of MMBench has"""
    return {letter: row[letter] for letter in "ABCD" if is_there(row.get(letter))}


def mmbench_score(rows, profile="lmms"):
    """MMBench (Liu et al. 2023), circular: a question counts if it is answered rightly in every rotation of its
    options. rows: index (a rotation's is a million higher each), A to D, answer, category, prediction.

    -> circular_accuracy, accuracy (of rows), and the circular accuracy of each category"""
    read = mmbench_letter if profile == "lmms" else option_letter
    right = lambda row: read(row["prediction"], mmbench_options(row)) == row["answer"]
    circles = {index: (members[0].get("category"), all(map(right, members)))
               for index, members in grouped(rows, lambda row: int(row["index"]) % 1_000_000).items()}
    categories = {f"circular_accuracy {category}": mean(hit for c, hit in circles.values() if c == category)
                  for category in sorted({c for c, _ in circles.values() if c})}
    return {"circular_accuracy": mean(hit for _, hit in circles.values()), "accuracy": mean(map(right, rows)),
            **categories}


def mmvp_options(row):
    """ "(a) Open (b) Closed" -> {"A": "Open", "B": "Closed"} """
    return {letter.upper(): text.strip() for letter, text in
            re.findall(r"\(([a-z])\)\s*(.*?)(?=\s*\([a-z]\)|$)", row["Options"], re.IGNORECASE)}


def mmvp_right(row, profile="paper"):
    """Is a row of MMVP answered rightly? "paper": the letter alone or the option's very text, and nothing beside it"""
    gold, options = row["Correct Answer"].strip("() ").upper(), mmvp_options(row)
    if profile == "lmms":
        return pattern_letter(row["prediction"], options, "mmvp") == gold
    said = after_answer_is(row["prediction"]).rstrip(".:,").lstrip("(").rstrip(")")
    return said in (gold.lower(), options[gold].lower())


def mmvp_score(rows, profile="paper"):
    """MMVP (Tong et al. 2024): pairs of pictures that CLIP confuses, two questions each; a pair counts if both are
    right. rows: Index (from 1), Options, Correct Answer, prediction -> pair_accuracy, accuracy"""
    pairs = grouped(rows, lambda row: (int(row["Index"]) - 1) // 2).values()
    return {"pair_accuracy": mean(all(mmvp_right(row, profile) for row in pair) for pair in pairs if len(pair) == 2),
            "accuracy": mean(mmvp_right(row, profile) for row in rows)}


def cvbench_letter(prediction, options, profile):
    """The letter that a prediction names, or None"""
    return option_letter(prediction, options) if profile == "paper" else \
        pattern_letter(prediction, options, "cvbench")


def cvbench_score(rows, profile="paper"):
    """CV-Bench (Tong et al. 2024, Cambrian-1): 2D is the mean of the accuracies on ADE20K and COCO, 3D that on Omni3D,
    overall their mean. rows: source, answer as "(A)", prediction. -> these and accuracy, of all rows alike.

    A part of which no row is given is not in the dict."""
    right = lambda row: cvbench_letter(row["prediction"], list(string.ascii_uppercase), profile) == \
        row["answer"].strip("()")
    score = {source: mean(map(right, members)) for source, members in grouped(rows, lambda row: row["source"]).items()}
    for name, parts in (("2D", ("ADE20K", "COCO")), ("3D", ("Omni3D",)), ("overall", ("2D", "3D"))):
        if found := [score[part] for part in parts if part in score]:
            score[name] = mean(found)
    return {**score, "accuracy": mean(map(right, rows))}


def pope_score(rows, profile="lmms"):
    """POPE (Li et al. 2023): is an object there? yes is the positive class. rows: answer, prediction; with `category`
    also the F1 of each. -> accuracy, precision, recall, f1, yes_ratio.

    An answer that is neither is wrong, but no false negative, as in lmms-eval. yes_ratio is that of the predictions,
    which shows a model that says yes to everything; lmms-eval by mistake takes that of the answers."""
    said = [pope_yes_no(row["prediction"], profile) for row in rows]
    pairs = [(answer, row["answer"].lower().strip()) for answer, row in zip(said, rows)]
    true, false, missed = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    score = {"accuracy": mean(answer == gold for answer, gold in pairs), "precision": true / max(1, true + false),
             "recall": true / max(1, true + missed), "f1": 2 * true / max(1, 2 * true + false + missed),
             "yes_ratio": mean(answer == "yes" for answer in said)}
    groups = grouped((row for row in rows if row.get("category")), lambda row: row["category"])
    return score | {f"f1 {category}": pope_score([{**row, "category": None} for row in members], profile)["f1"]
                    for category, members in groups.items()}


def naturalbench_gold(row):
    """What is right follows from a row's place in its group of four: yes, no, no, yes (A, B, B, A)"""
    return int(int(row["Index"]) % 4 in (0, 3))


def naturalbench_score(rows):
    """NaturalBench (Li et al. 2024): two questions about two pictures, in the order q0_i0, q0_i1, q1_i0, q1_i1.
    rows: Index (from 0), Question_Type, prediction -> Acc; Q_Acc, both pictures of a question; I_Acc, both questions of
    a picture; G_Acc, all four. An answer that cannot be read is wrong in each."""
    groups = grouped(sorted(rows, key=lambda row: int(row["Index"])), lambda row: int(row["Index"]) // 4).values()
    right = [[naturalbench_choice(row["prediction"], row["Question_Type"]) == naturalbench_gold(row) for row in group]
             for group in groups if len(group) == 4]
    return {"Acc": mean(mean(group) for group in right),
            "Q_Acc": mean((a and b) / 2 + (c and d) / 2 for a, b, c, d in right),
            "I_Acc": mean((a and c) / 2 + (b and d) / 2 for a, b, c, d in right),
            "G_Acc": mean(all(group) for group in right)}


def hallusionbench_score(rows):
    """HallusionBench (Guan et al. 2023): aAcc of rows, qAcc of questions (right about each of their figures), fAcc of
    figures (right in each of their questions). rows: category, subcategory, set_id, figure_id, question_id, gt_answer
    "1" or "0", prediction.

    The original asks GPT-4 whether an answer is right; this is lmms-eval's rule without it: an answer means yes if it
    contains "yes" anywhere, so "eyes" does, and no otherwise."""
    right = lambda row: str(int("yes" in row["prediction"].lower())) == str(row["gt_answer"])
    groups = lambda last: grouped(rows, lambda row: tuple(
        str(row[column]) for column in ("category", "subcategory", "set_id", last))).values()
    figures = [group for group in groups("figure_id")  # VS questions with figure 0 have no figure
               if not (group[0]["category"] == "VS" and str(group[0]["figure_id"]) == "0")]
    return {"aAcc": mean(map(right, rows)), "qAcc": mean(all(map(right, group)) for group in groups("question_id")),
            "fAcc": mean(all(map(right, group)) for group in figures)}


def mathvista_answer(prediction, row):
    """What a prediction answers to a row of MathVista, as text in the form of its `answer`; None if it cannot be told.

    The official scorer has an LLM find the answer; this is a rule instead: of choices, MMMU's letter or the one choice
    that the prediction names; of numbers, the last; of lists, the last in brackets; else the whole text."""
    text, choices = prediction.strip(), row.get("choices") or []
    if row["question_type"] == "multi_choice":
        letter = mmmu_choice(text, dict(zip(string.ascii_uppercase, choices)))
        named = [choice for choice in choices if choice.lower() in text.lower()]
        return choices[ord(letter) - ord("A")] if letter else named[0] if len(named) == 1 else None
    if row["answer_type"] == "list":
        found = re.findall(r"\[[^\[\]]*\]", text)
        try:
            return str(ast.literal_eval(found[-1])) if found else None
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # of a model that repeats itself
            return None
    if row["answer_type"] in ("integer", "float"):
        found = [float(each.replace(",", "")) for each in re.findall(r"-?\d[\d,]*\.?\d*|-?\.\d+", text)]
        if not found or math.isinf(found[-1]):
            return None
        return str(int(found[-1])) if row["answer_type"] == "integer" else \
            str(round(found[-1], int(row["precision"] or 0)))
    return text or None
