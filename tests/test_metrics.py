"""metrics.py: every rule by hand; the expected numbers were confirmed with the code of the benchmarks' makers."""
import functools
import random
import string

import numpy as np
import pytest

import metrics

FOUR = {"A": "cat", "B": "red car", "C": "dog", "D": "red"}


# ---- texts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("T-Shirt", "t shirt"), ("-5", "5"), ("well- known t-shirt", "well known tshirt"), ("x -y-z", "x yz"),
    ("well-\nknown t-shirt", "well known tshirt"), ("x+-y-z", "x y z"), ("one/two", "1 2"), ("a_b", "b"), ("yes!", "yes"), ("what?", "what"),
    ("(red)", "red"), ('"stop"', "stop"), ("c:\\x", "c: x"), ("[5]{6}", "5 6"), ("<a@b>", "b"), ("`x`=y+z;", "x y z"), ("5.", "5"), ("u.s.a.", "usa"),
    (".5", ".5"), ("3.14", "3.14"), ("5.a", "5a"), ("$5.00", "$5.00"), ("50%", "50%"), ("R & B", "r & b"), ("10:30", "10:30"), ("1,000", "1000"),
    ("red,white", "redwhite"), ("man's", "man 's"), ("o'clock", "o'clock"), ("oclock", "o'clock"), ("Im", "im"), ("dont", "don't"),
    ("Couldn'tve", "couldn't've"), ("ow's'at", "ow 's'at"), ("twas", "'twas"), ("somebody'd", "somebodyd"), ("let's", "let 's"), ("None", "0"),
    ("ZERO", "0"), ("Two dogs", "2 dogs"), ("ten", "10"), ("eleven", "eleven"), ("the", ""), ("An apple, a day", "apple day"),
    (" \n The\tcat  sat\n", "cat sat"), ("", ""), ("?", ""), ("." * 33 + "x", ".x"),
    ("one two three four five six seven eight nine ten", "1 2 3 4 5 6 7 8 9 10")])
def test_vqa_normalise(text, expected):
    """A mark beside a space vanishes, else it is a space; . vanishes unless a digit follows (32 times); $ % & : ' stay"""
    assert metrics.vqa_normalise(text) == expected


def test_the_table_of_contractions():
    """114 pairs of the same letters: each gains one apostrophe, but somebody'd, which loses it"""
    assert len(metrics.CONTRACTIONS) == 114 == len(" ".join(metrics.CONTRACTIONS).lower().split())
    for short, long in metrics.CONTRACTIONS.items():
        assert short.replace("'", "") == long.replace("'", "") and len(long) - len(short) == (-1 if short == "somebody'd" else 1)
        assert set(long.split("'")[1:]) <= set("t ve d ll re s all am at clock ow twas".split())
    assert metrics.MARKS.isascii() and sorted(metrics.MARKS) == sorted(set(string.punctuation) - set("#$%&'*.:^|~"))


@pytest.mark.parametrize("matches, expected", [(0, 0), (1, .3), (2, .6), (3, .9), (4, 1), (5, 1), (10, 1)])
def test_vqa_accuracy_by_hand(matches, expected):
    """Three of ten: the three see two others, 2/3, and seven see three, 1: (3 * 2/3 + 7) / 10 = 0.9. min(1, n/3) would give 1"""
    answers = ["Yes."] * matches + [f"other {n}" for n in range(10 - matches)]
    assert metrics.vqa_accuracy("yes", answers) == pytest.approx(expected)
    assert metrics.vqa_accuracy("yes", answers[::-1]) == pytest.approx(expected)
    assert metrics.vqa_accuracy("The no", answers) == 0


def test_vqa_accuracy_normalises_identical_answers_too():
    """The first official code does not, if all ten are the same"""
    assert metrics.vqa_accuracy("a  T-shirt", ["t shirt"] * 10) == metrics.vqa_accuracy("yes", ["Yes"] * 10) == 1


def test_vqa_accuracy_is_the_literal_double_loop():
    draw = random.Random(0)
    for _ in range(300):
        answers = [draw.choice(["yes", "no", "Yes.", "two", "2", "the dog"]) for _ in range(draw.choice([3, 10, 10]))]
        prediction, scores = draw.choice(["yes", "2", "dog", "no!", "none"]), []
        for left_out in range(len(answers)):
            matches = 0
            for other in range(len(answers)):
                if other != left_out and metrics.vqa_normalise(answers[other]) == metrics.vqa_normalise(prediction):
                    matches += 1
            scores.append(min(1, matches / 3))
        assert metrics.vqa_accuracy(prediction, answers) == pytest.approx(np.mean(scores))


def test_edit_distance():
    @functools.lru_cache(None)
    def slow(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    assert metrics.edit_distance("kitten", "sitting") == 3 and metrics.edit_distance("", "abc") == 3 == metrics.edit_distance("abc", "")
    draw = random.Random(0)
    for _ in range(200):
        a, b = ("".join(draw.choices("abc", k=draw.randrange(8))) for _ in range(2))
        assert metrics.edit_distance(a, b) == slow(a, b)


@pytest.mark.parametrize("prediction, answers, expected", [
    ("abcd", ["abcd"], 1), ("abcd", ["abce"], .75), ("abcd", ["abxy"], .5), ("abcd", ["axyz"], 0), ("abcdefghi", ["abcd"], 0),
    ("abc", ["abcdef"], .5), ("ABCD", ["abcd"], 1), ("abcd", ["ABCE"], .75), ("abcd", ["wxyz", "abce", "abxy"], .75), ("", [""], 1), ("", ["a"], 0),
    ("a", [""], 0), ("new  york", ["New York"], 1), (" abcd ", ["abce"], 5 / 6), ("abcd", [" abce\n"], 5 / 6), ("a\tb", ["a b"], 1),
    ("ab", ["a b"], 2 / 3), ("ß", ["x"], .5)])  # the length is that of the text in upper case, SS
def test_anls(prediction, answers, expected):
    """One half stays, less is 0; the distance is of tidy texts, the length of raw ones: " abcd " against "abce" is 1 of 6"""
    assert metrics.anls(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize("prediction, target, paper, lmms", [
    ("105", "100", 1, 1), ("95", "100", 1, 1), ("105.1", "100", 0, 0), ("94.9", "100", 0, 0), ("-95", "-100", 1, 1), ("95", "-100", 0, 0),
    ("100", "95", 0, 0), ("1e2", "100", 1, 1), (" 5 ", "5", 1, 1), ("Red", "rEd", 1, 1), ("red.", "red", 0, 0), ("", "", 1, 1), ("", "5", 0, 0),
    ("1,000", "1000", 0, 0), ("1000", "1,000", 0, 0), ("$5", "5", 0, 0), ("5 cm", "5", 0, 0), ("five", "5", 0, 0), ("5", "five", 0, 0),
    ("5 CM", "5 cm", 1, 1), ("25%", "25", 0, 0), ("25", "25%", 0, 0), ("0.25", "25%", 0, 1), ("25%", "0.25", 0, 1), ("25%", "25%", 1, 1),
    ("26%", "25%", 0, 1), ("27%", "25%", 0, 0), ("5%%", "5%", 0, 1), ("%", "%", 1, 1), ("0", "0", 1, 1), ("0.0", "0", 1, 0), ("-0", "0", 1, 0),
    ("0", "0%", 0, 0), ("0%", "0%", 1, 1), ("0.01", "0", 0, 0), ("0", "5", 0, 0), ("0%", "5", 0, 0), ("nan", "nan", 0, 0), ("inf", "inf", 0, 0)])
def test_relaxed_accuracy(prediction, target, paper, lmms):
    """The bound of 5 % is of the target and counts; "nan" is a number, and like no other"""
    scores = metrics.relaxed_accuracy(prediction, target, "paper"), metrics.relaxed_accuracy(prediction, target, "lmms")
    assert scores == (paper, lmms) and all(isinstance(score, float) for score in scores)


def test_the_paper_is_the_default():
    assert metrics.relaxed_accuracy("0.25", "25%") == 0 and metrics.option_letter("apple", FOUR) == "A"


@pytest.mark.parametrize("prediction, target, expected", [
    ("95", "100", True), ("105", "100", True), ("100", "95", False), ("-95", "-100", True), ("0", "0", True), ("x", "1", False), ("1", "x", False),
    ("x", "x", False)])
def test_near(prediction, target, expected):
    assert metrics.near(prediction, target) is expected


def test_number():
    assert metrics.number("1e3") == 1000 and metrics.number("-.5") == -.5 and metrics.number("1,000") is None is metrics.number("")


@pytest.mark.parametrize("prediction, answer, expected", [
    ("Yes.", "yes", True), ("yes", "Yes!", True), ("T-shirt", "tshirt", True), ("t shirt", "tshirt", False), ("the man", "man", False),
    ("", "yes", False), ("men", "man", False), ("“yes”", "yes", False)])
def test_gqa(prediction, answer, expected):
    """Articles count, and punctuation is that of ASCII"""
    assert metrics.gqa_correct(prediction, answer) is expected


@pytest.mark.parametrize("kind", ["HME100k", "Handwritten Mathematical Expression Recognition"])
@pytest.mark.parametrize("prediction, answers, expected", [
    ("x ^ 2\n+ 1", ["x^2+1"], True), ("x^2+1", ["x ^ 2 + 1"], True), ("= \\Delta", ["\\delta"], False), ("= \\Delta x", ["\\Delta"], True),
    ("x", ["y", "x"], True), ("x", ["x y"], False), ("Ａ", ["A"], False)])
def test_ocrbench_mathematics(prediction, answers, expected, kind):
    assert metrics.ocrbench_correct(prediction, answers, kind) is expected


@pytest.mark.parametrize("prediction, answers, expected", [
    ("The sign says STOP.", ["stop"], True), ("st op", ["stop"], False), ("stop", ["S T O P"], False), ("new\nyork", ["New York"], True),
    ("york", ["new york"], False), ("b", ["a", "b"], True), ("", ["a"], False), ("a b", [" A B\n"], True), ("ＳＴＯＰ！～", ["stop!~"], True),
    ("stop", ["ｓｔｏｐ"], True), ("\\DELTA", ["\\delta"], True), ("東京\u3000駅", ["東京 駅"], True)])  # the wide space too
def test_ocrbench_text(prediction, answers, expected):
    assert metrics.ocrbench_correct(prediction, answers, "Regular Text Recognition") is expected


# ---- options ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    (" B ", "b"), ("The answer is B.", "b."), ("Answer: B", "b"), ("the answer is: B", ": b"), ("answer is A, no, the ANSWER IS b", "b"),
    ("answer is b answer: c", "c"), ("answer: c answer is b", "b"), ("answers: b", "answers: b"), ("", "")])
def test_after_answer_is(text, expected):
    assert metrics.after_answer_is(text) == expected


@pytest.mark.parametrize("prediction, expected", [
    ("B", "B"), ("b", "B"), (" (b) ", "B"), ("B. red car", "B"), ("((D", "D"), ("C:", "C"), ("D,", "D"), ("apple", "A"), ("Cannot determine", "C"),
    ("The dog", None), ("The answer is B", "B"), ("Answer: (c).", "C"), ("The answer is: B", None), ("The answer is A. No, the answer is D", "D"),
    ("E", None), ('"B"', None), (".B", None), ("( B", None), ("", None), ("(", None), (".", None), ("é", None)])
def test_letter_of_the_paper(prediction, expected):
    """The first character of what follows "answer is", whatever it begins"""
    assert metrics.option_letter(prediction, FOUR) == expected
    assert metrics.cvbench_letter(prediction, FOUR, "paper") == expected


@pytest.mark.parametrize("prediction, expected", [
    ("B", "B"), ("b", None), ("B.", "B"), ("(B)", "B"), ("(B", "B"), ("A thing (B)", "B"), ("(C), not (A)", "A"), ("(A), not (C)", "C"),
    ("(C) (A) (C)", "C"), ("A or B.", "B"), ("B or A", "A"), ("B. because A is wrong", "A"), ("A. or B.", "B"), ("A. B. x", "A"), ("D. or B. x", "B"),
    ("'C'", "C"), ("!?;:,.D.,:;?!", "D"), ("BAD idea", "D"), ("BAD ABC", "C"), ("AB AC BC", "B"), ("E", None), ("", None), ("apple", None),
    ("(b)", None), ("it is a red car", None), ("it is surely a red car", "B"), ("it is surely a Red Car", "B"), ("no red car, it is a dog", "C"),
    ("no dog, it is a red thing", "D"), ("a dog sits on the red car here", "B"), ("a dog or cat or a dog", "C"),
    ("there is nothing at all in it", None)])
def test_letter_of_mmmu(prediction, expected):
    """(B), else "B ", else "B.", the last; the texts of options only in more than five words. "BAD ABC" has no place: the first option"""
    options = {letter: text.title() for letter, text in FOUR.items()}           # their case is free, that of the letters is not
    assert metrics.mmmu_choice(prediction, options) == expected
    assert metrics.mmmu_choice(prediction, FOUR) == expected


@pytest.mark.parametrize("task, prediction, expected", [
    ("seed", "B", "B"), ("seed", "Banana", "B"), ("seed", " C. dog", "C"), ("seed", "(B)", None), ("seed", "E", None), ("seed", "", None),
    ("seed", "the B", None), ("seed", "b", "B"), ("seed", "banana", "B"), ("scienceqa", "B", "B"), ("scienceqa", " b\n", "B"),
    ("scienceqa", "B. red", "B"), ("scienceqa", "B.", "B"), ("scienceqa", "b.", None), ("scienceqa", "(B)", None), ("scienceqa", "B red", None),
    ("scienceqa", "red B. x", None), ("scienceqa", "AB", None), ("scienceqa", "", None), ("scienceqa", "E", None), ("ai2d", "B", "B"),
    ("ai2d", "b", "B"), ("ai2d", "(b)", "B"), ("ai2d", "b.", "B"), ("ai2d", "B. red car", "B"), ("ai2d", "b. red car", None), ("ai2d", "B red", None),
    ("ai2d", "B) red", None), ("ai2d", "The answer is B.", None), ("ai2d", "x B. y", None), ("ai2d", "AB", None), ("ai2d", "", None),
    ("ai2d", "_B_", "B"), ("ai2d", "“B”", None), ("cvbench", "b", "B"), ("cvbench", " ((C", "C"), ("cvbench", "apple", "A"),
    ("cvbench", "Cannot tell", "C"), ("cvbench", "The dog", None), ("cvbench", "1. B", None), ("cvbench", "", None), ("cvbench", "[B]", None)])
def test_letters_by_pattern(task, prediction, expected):
    """The rules of single tasks of lmms-eval: any first letter, "B." or a lone letter, punctuation around it"""
    assert metrics.pattern_letter(prediction, FOUR, task) == expected


@pytest.mark.parametrize("prediction, expected", [
    ("A", "A"), ("(b).", "B"), ("b. Closed", "B"), ("B. a dog", "B"), ("A answer", "A"), ("The answer is (b)!", "B"), ("answer  is A, B", "A"),
    ("Option B, the answer is A", "A"), ("it is option (B), not A", "B"), ("Panda or B", "A"), ("I see a dog", "A"), ("the door (B) is a ", "B"),
    ("not sure, B", "B"), ("Bicycle", "B"), ("apple", "A"), ("Closed", None), ("C", None), ("", None), ("club", "B"), ("B!", "B"), ("grab!", None),
    ("so it is B!", None)])
def test_letters_of_mmvp(prediction, expected):
    """Six patterns in order; the fifth finds any word that ends in a or b: "Panda", "club", the "a" of "a dog" """
    assert metrics.pattern_letter(prediction, {"A": "Open", "B": "Closed"}, "mmvp") == expected


@pytest.mark.parametrize("prediction, expected", [
    ("B", "B"), ("B.", "B"), ("B,", "B"), ("B:", "B"), ("B)", "B"), ("B).", "B"), ("(B)", "B"), ("(B).", "B"), (":B", "B"), (":B,", "B"),
    (":B.", "B"), (":B)", "B"), (":B).", "B"), ("(B),", None), ("b", None), ("E", None), ("E.", None), ("F", None), ("", None), ("A or B", None),
    ("A. or B.", None), ("A B.", "A"), ("B E", None), ("B F", "B"), ("A. it is seen here", "A"), ("A, B, C", "C"), ("B. then (C)", "B"),
    ("(C) then B.", "B"), ("A red cat", "A"), ("A cat on grass", "A"), ("A dog on grass", "C"), ("A thing is (B)", "B"), ("B in A big house", None),
    ("D is it, surely", "D"), ("dog", "C"), ("it is RED", "D"), ("a red car", None), ("cat or dog", None), ("nothing", None)])
def test_letter_of_mmbench(prediction, expected):
    """Exactly one letter alone (A only in three words or fewer), else in one of twelve forms in order, else exactly one text"""
    assert metrics.mmbench_letter(prediction, FOUR) == expected


@pytest.mark.parametrize("prediction, answers, expected", [
    ("5", "5", True), ("The answer is 5.", ["5"], True), ("3.14159", "3.14", True), ("3.149", "3.14", False), ("3.1", "3.14", False),
    ("1000", "1,000", True), ("1,000,000 people", "1000000", True), ("2e3 m", "2000", True), ("about -.5 volts", "-0.5", True),
    ("values 3 and 7", "7", True), ("values 3 and 7", "3", True), ("values 3 and 7", ["8", "9"], False), ("12,34 m", "34", True),
    ("12,34 m", "12", False), ("7 cats", "cat", True), ("a box", "red", False), ("cat", "7 cats", False), ("at the North Pole", "north", True),
    ("Yes", ["no", "yes"], True), ("B", "b", True), ("plan b", "B", True), ("banana", "B", False), ("b-side", "B", False),
    ("x = 4 so the result is 8", "8", True), ("x = 4 so the result is 8", "4", False), ("y = 4\ntherefore done", "4", False),
    ("therefore done\ny = 4", "4", True), ("x is 5\nso it is 20", "5", True), ("x is 5\nso it is 20", "20", True), ("5 is the answer :", "5", True),
    ("also 7", "7", True), ("this 9 is 8. It is 7", "8", False), ("", "5", False), ("", "", True), ("5", ["five", "5.001"], True),
    ("five", ["five", "5"], True), ("5.0", "5", True), ("nan", "nan", False)])
def test_mmmu_open(prediction, answers, expected):
    """The shortest end after a word like "is" of each line; two decimals; a text holds the answer, a letter with a space beside it"""
    assert metrics.mmmu_open(prediction, answers) is expected


@pytest.mark.parametrize("text, expected", [
    ("Hello.", ["hello"]), ("it is so red", ["red"]), ("it could be red", ["red"]), ("thus red", ["red"]), ("therefore blue", ["blue"]),
    ("the final blue", ["blue"]), ("the answer blue", ["blue"]), ("a result blue", ["blue"]), ("x = 4", ["4"]), ("x = 4\nno", ["x = 4\nno"]),
    ("it is 5\nno", ["5"]), ("it is 5\nx=6", ["5", "6"]), ("it is", ["it is"]), ("answer :", ["answer :"]), ("answer ,", ["answer ,"]),
    ("x = '", ["x = '"]), ("x =", ["x ="]), ("x is y = 2", ["2"]), ("so is ", ["is"]), ("a is b. C is d", ["d"])])
def test_key_phrases(text, expected):
    """An end that is nothing or one mark is none; "=" counts in the last line only; without any, the whole text"""
    assert metrics.key_phrases(text) == expected


def test_numbers_of_a_text():
    """Numbers with commas, of science, and simple ones, which find the ends of the others once more"""
    assert metrics.numbers_in("1,000 or 1e-3 or -.5 or 2.5e+10, 7") == ["1,000", "1e-3", "2.5e+10", "000", "-3", "-.5", "2", "7"]
    assert metrics.numbers_in("-12 x3 4x 5.25") == ["-12", "3", "5.25"] and metrics.numbers_in("12,34") == ["34"] and metrics.numbers_in("no") == []
    assert metrics.mmmu_normalise(" 1,000.456 ") == [1000.46] and metrics.mmmu_normalise(" AB ") == ["ab"]
    assert metrics.mmmu_normalise("B") == [" b", "b "]


# ---- yes or no -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, lmms, paper", [
    ("Yes", "yes", "yes"), (" NO.\n", "no", "no"), ("no..", "no", "no"), ("yes,", "yes", None), ("y", "yes", None), ("N", "no", None),
    ("y.", "yes", None), ("x", None, None), ("", None, None), ("Yes, it is", "yes", None), ("no yes", "no", None), ("yesno", "yes", None),
    ("not sure", "no", None), ("know", "no", None), ("eyes", "yes", None), ("I know", None, None), ("I say yes", None, None), ("n.o", "no", None),
    ("ok no", None, None), ("noyes", "no", None), (". yes", "yes", None)])
def test_mme_yes_no(prediction, lmms, paper):
    """lmms-eval looks at four characters: "know" is a no"""
    assert (metrics.mme_yes_no(prediction, "lmms"), metrics.mme_yes_no(prediction, "paper")) == (lmms, paper)


@pytest.mark.parametrize("prediction, lmms, paper", [
    ("yes", "yes", "yes"), (" NO\n", "no", "no"), ("Yes.", None, "yes"), ("no:,.", None, "no"), ("Yes, there is", None, "yes"),
    ("no there", None, "no"), ("nope", None, None), ("The yes", None, None), ("", None, None), (" ", None, None), ("yes!", None, None)])
def test_pope_yes_no(prediction, lmms, paper):
    assert (metrics.pope_yes_no(prediction, "lmms"), metrics.pope_yes_no(prediction, "paper")) == (lmms, paper)


@pytest.mark.parametrize("prediction, kind, expected", [
    ("Yes", "yes_no", 1), ("No.", "yes_no", 0), ("no, yes", "yes_no", 0), ("well, YES or no", "yes_no", 1), ("yesterday", "yes_no", -1),
    ("", "yes_no", -1), ("A", "yes_no", -1), ("A", "multiple_choice", 1), ("(b)", "multiple_choice", 0), ("B or A", "multiple_choice", 0),
    ("it is a dog, B", "multiple_choice", 1), ("Banana", "multiple_choice", -1), ("Yes", "multiple_choice", -1), ("no; no; yes", "yes_no", 0)])
def test_naturalbench_choice(prediction, kind, expected):
    assert metrics.naturalbench_choice(prediction, kind) == expected


# ---- many rows -------------------------------------------------------------------------------------------------------

def scrambled(rows):
    """The order of rows must not count"""
    return random.Random(1).sample(rows, len(rows))


def test_nothing_scores_nothing():
    for name in "mme mmbench mmvp cvbench pope naturalbench hallusionbench".split():
        assert set(getattr(metrics, name + "_score")([]).values()) == {0}
    assert metrics.mean([]) == 0 and metrics.mean([1, 2]) == 1.5 and metrics.mean(n for n in (3, 5)) == 4


def test_mme_by_hand():
    """Existence: picture 1 right twice (100 + 100), 2 right once (50 + 0), 3 lacks its pair: 250 / 2 = 125. OCR: 0.
    Code: picture 1, of the same id, never (0), 2 twice (200): 100. A pair is not two neighbours, so the order is free."""
    rows = [dict(zip(("category", "question_id", "answer", "prediction"), row.split(" ", 3))) for row in (
        "existence 1 Yes yes", "existence 2 Yes yes", "existence 2 No yes", "existence 1 No No.",
        "existence 3 Yes yes", "OCR 1 Yes maybe", "OCR 1 No maybe",
        "code_reasoning 1 Yes no", "code_reasoning 1 No yes", "code_reasoning 2 Yes. Yes", "code_reasoning 2 No no")]
    expected = {"perception": 125, "cognition": 100, "total": 225, "existence": 125, "code_reasoning": 100, "OCR": 0}
    for profile in ("lmms", "paper"):
        assert metrics.mme_score(rows, profile) == metrics.mme_score(scrambled(rows), profile) == expected
    rows[0]["prediction"] = "Yes, it is"                                       # only lmms-eval reads it: picture 1 falls to 50 + 0
    assert metrics.mme_score(rows)["existence"] == 125 and metrics.mme_score(rows, "paper")["existence"] == 50


def test_mme_at_best_is_2000_and_800():
    cognition = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
    rows = [{"category": category, "question_id": n, "answer": answer, "prediction": answer}
            for category in metrics.MME_PERCEPTION + cognition for n in range(3) for answer in ("Yes", "No")]
    score = metrics.mme_score(rows)
    assert (score["perception"], score["cognition"], score["total"]) == (2000, 800, 2800)
    names = "OCR artwork celebrity color count existence landmark position posters scene"
    assert " ".join(sorted(metrics.MME_PERCEPTION)) == names


def mmbench_rows():
    """7 has three options and is right in all rotations, 8 two and is wrong in the second, 1007 two: right"""
    table = [(7, "cat dog cow nan", "A", "x", "A"), (1000007, "dog cow cat nan", "C", "x", "(C)"),
             (2000007, "cow cat dog nan", "B", "x", "the cat"), (8, "cat dog nan nan", "B", "x", "B."), (1000008, "dog cat nan nan", "A", "x", "B"),
             (1007, "banana apple nan nan", "A", "y", "it is a banana"), (1001007, "apple banana nan nan", "B", "y", "B")]
    return [{"index": index, **dict(zip("ABCD", options.split())), "answer": answer, "category": category, "prediction": prediction}
            for index, options, answer, category, prediction in table]


def test_mmbench_by_hand():
    """Two of three questions, six of seven rows; category x one of two. "banana" holds "nan", which is no option. In the paper's reading
    "the cat" is T, and "it is a banana" I: no question is right, four rows are"""
    rows = mmbench_rows()
    expected = {"circular_accuracy": 2 / 3, "accuracy": 6 / 7, "circular_accuracy x": .5, "circular_accuracy y": 1}
    assert metrics.mmbench_score(rows) == metrics.mmbench_score(scrambled(rows), "lmms") == pytest.approx(expected)
    expected_of_paper = {"circular_accuracy": 0, "accuracy": 4 / 7, "circular_accuracy x": 0, "circular_accuracy y": 0}
    assert metrics.mmbench_score(rows, "paper") == pytest.approx(expected_of_paper)
    rows[2]["prediction"], rows[5]["prediction"] = "beef", "apple"             # first characters
    assert metrics.mmbench_score(rows, "paper")["circular_accuracy"] == pytest.approx(2 / 3)
    bare = [{key: value for key, value in row.items() if key != "category"} for row in mmbench_rows()]
    assert set(metrics.mmbench_score(bare)) == {"circular_accuracy", "accuracy"}
    assert metrics.mmbench_score([{**row, "index": str(row["index"])} for row in mmbench_rows()]) == pytest.approx(expected)


def test_mmbench_options():
    row = {"A": "cat", "B": "nan", "C": None, "D": "", "E": "dog"}
    assert metrics.mmbench_options(row) == {"A": "cat"} and metrics.mmbench_options({"A": "1", "B": "2", "D": "4"}) == {"A": "1", "B": "2", "D": "4"}


def mmvp_rows(*predictions):
    return [{"Index": n, "Options": "(a) Open (b) Not open", "Correct Answer": f"({'ba'[n % 2]})", "prediction": prediction}
            for n, prediction in enumerate(predictions, 1)]


@pytest.mark.parametrize("text, expected", [
    ("(a) Open (b) Closed", {"A": "Open", "B": "Closed"}), ("(a) In the middle(b) Left ", {"A": "In the middle", "B": "Left"}),
    ("(A) 1\n(B) 2", {"A": "1", "B": "2"})])
def test_mmvp_options(text, expected):
    assert metrics.mmvp_options({"Options": text}) == expected


@pytest.mark.parametrize("prediction, paper, lmms", [
    ("b", 1, 1), ("(B)", 1, 1), ("B.", 1, 1), ("Not open", 1, 0), ("not OPEN.", 1, 0), ("The answer is (b)", 1, 1), ("Answer: not open", 1, 0),
    ("B. Not open", 0, 1), ("(b) Not open", 0, 1), ("open", 0, 0), ("a", 0, 0), ("The answer is: b", 0, 1), ("", 0, 0)])
def test_mmvp_right(prediction, paper, lmms):
    """For Cambrian the letter or the option's text and nothing else, so "B. Not open" is wrong"""
    row = mmvp_rows("a", prediction)[1]
    assert (metrics.mmvp_right(row), metrics.mmvp_right(row, "lmms")) == (paper, lmms) and metrics.mmvp_right(row, "paper") == paper


def test_mmvp_by_hand():
    """Pairs are 1-2, 3-4, 5-6: right-right, right-wrong, wrong-wrong and a 7 without an 8. Neighbours in the table are not pairs"""
    rows = mmvp_rows("a", "b", "a", "a", "b", "a", "a")
    for profile in ("paper", "lmms"):
        score = metrics.mmvp_score(rows, profile)
        assert score == metrics.mmvp_score(scrambled(rows), profile) == pytest.approx({"pair_accuracy": 1 / 3, "accuracy": 4 / 7})
    assert metrics.mmvp_score(mmvp_rows("Open", "Not open")) == {"pair_accuracy": 1, "accuracy": 1}
    assert metrics.mmvp_score(mmvp_rows("A. Open", "B. Not open")) == {"pair_accuracy": 0, "accuracy": 0}
    assert metrics.mmvp_score(mmvp_rows("A. Open", "B. Not open"), "lmms") == {"pair_accuracy": 1, "accuracy": 1}
    assert metrics.mmvp_score([{**row, "Index": str(row["Index"])} for row in mmvp_rows("a", "b")])["pair_accuracy"] == 1


def test_cvbench_by_hand():
    """ADE20K 1 of 1, COCO 1 of 4: 2D is 0.625 and not 2 of 5; Omni3D 1 of 2; overall (0.625 + 0.5) / 2; rows 3 of 7"""
    table = "ADE20K (A) A, COCO (B) (b), COCO (B) A, COCO (C) C_, COCO (A) D, Omni3D (F) F, Omni3D (A) B"
    rows = [dict(zip(("source", "answer", "prediction"), row.split())) for row in table.split(", ")]
    rows[3]["prediction"] = "1 dog"
    expected = {"ADE20K": 1, "COCO": .25, "Omni3D": .5, "2D": .625, "3D": .5, "overall": .5625, "accuracy": 3 / 7}
    for profile in ("paper", "lmms"):
        assert metrics.cvbench_score(rows, profile) == metrics.cvbench_score(scrambled(rows), profile) == pytest.approx(expected)
        assert metrics.cvbench_score(rows[1:5], profile) == {"COCO": .25, "2D": .25, "overall": .25, "accuracy": .25}
        assert metrics.cvbench_score([{**rows[0], "prediction": ""}], profile)["overall"] == 0
    rows[6]["prediction"] = "The answer is A"                                  # T for lmms-eval
    assert (metrics.cvbench_score(rows)["3D"], metrics.cvbench_score(rows, "lmms")["3D"]) == (1, .5)


def test_pope_by_hand():
    """Three true yes, one false, one missed, one true no, and of yes and of no one answer that is neither: accuracy 4 / 8, precision 3 / 4,
    recall 3 / 4 (what is neither is not missed), F1 6 / 8, and four of eight predictions are yes, of the answers five"""
    table = "yes yes, yes YES, Yes yes, no yes, yes no, no no, yes maybe, no yes."
    rows = [dict(zip(("answer", "prediction"), row.split())) for row in table.split(", ")]
    expected = {"accuracy": .5, "precision": .75, "recall": .75, "f1": .75, "yes_ratio": .5}
    assert metrics.pope_score(rows) == metrics.pope_score(scrambled(rows), "lmms") == pytest.approx(expected)
    assert metrics.pope_score(rows, "paper") == pytest.approx({**expected, "precision": .6, "f1": 2 * .6 * .75 / 1.35, "yes_ratio": .625})
    for row, category in zip(rows, "rrrppppp"):
        row["category"] = category
    assert metrics.pope_score(rows) == pytest.approx({**expected, "f1 r": 1, "f1 p": 0})
    rows[6]["prediction"] = "Yes."                                             # read by Cambrian only: one true, two false, one missed: 2 / 5
    assert metrics.pope_score(rows, "paper")["f1 p"] == pytest.approx(.4) and metrics.pope_score(rows)["f1 p"] == 0
    assert metrics.pope_score(rows[:3]) == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 1, "f1 r": 1}
    assert metrics.pope_score([{"answer": "no", "prediction": "no"}]) == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_pope_is_that_of_a_confusion_matrix():
    draw = np.random.default_rng(0)
    for _ in range(50):
        gold, said = draw.integers(0, 2, 40), draw.integers(0, 2, 40)
        matrix = np.zeros((2, 2))
        np.add.at(matrix, (gold, said), 1)
        precision, recall = matrix[1, 1] / matrix[:, 1].sum(), matrix[1, 1] / matrix[1].sum()
        score = metrics.pope_score([{"answer": ("no", "yes")[a], "prediction": ("no", "yes")[b]} for a, b in zip(gold, said)])
        assert score == pytest.approx({"accuracy": matrix.trace() / 40, "precision": precision, "recall": recall,
                                       "f1": 2 * precision * recall / (precision + recall), "yes_ratio": said.mean()})


def test_naturalbench_by_hand():
    """Groups of right and wrong 1111, 1100, 1010, 1001 and 0111, where the fifth cannot be read:
    Acc 13 / 20, Q_Acc (2 + 1 + 0 + 0 + 1) / 10, I_Acc (2 + 0 + 1 + 0 + 1) / 10, G_Acc 1 / 5. The sixth group is not whole"""
    rows = []
    for n, pattern in enumerate(("1111", "1100", "1010", "1001", "0111", "111")):
        names = (("yes", "no"), ("A", "B"))[n % 2]
        for k, right in enumerate(pattern):
            said = names[(k in (1, 2)) ^ (right == "0")] if (n, k) != (4, 0) else "perhaps"
            rows.append({"Index": str(4 * n + k), "Question_Type": ("yes_no", "multiple_choice")[n % 2], "prediction": said})
    expected = {"Acc": .65, "Q_Acc": .4, "I_Acc": .4, "G_Acc": .2}
    assert metrics.naturalbench_score(rows) == metrics.naturalbench_score(scrambled(rows)) == pytest.approx(expected)
    assert metrics.naturalbench_score(rows[4:8]) == {"Acc": .5, "Q_Acc": .5, "I_Acc": 0, "G_Acc": 0}
    assert metrics.naturalbench_score([rows[n] for n in (4, 6, 5, 7)])["Q_Acc"] == .5
    assert metrics.naturalbench_score(rows[8:12]) == {"Acc": .5, "Q_Acc": 0, "I_Acc": .5, "G_Acc": 0}
    assert [metrics.naturalbench_gold({"Index": n}) for n in range(8)] == [1, 0, 0, 1, 1, 0, 0, 1]
    assert set(metrics.naturalbench_score([{**row, "prediction": ""} for row in rows]).values()) == {0}     # wrong in every place


def test_hallusionbench_by_hand():
    """aAcc: all but "eyes", which contains yes, and the no about the map, 7 of 9. qAcc: of VS chart set 0 questions 0 and 2 but not 1 ("eyes"),
    of VD 0 and 1, the map not, set 1: 5 of 7. fAcc: of VS chart figure 1 but not 2, of VD 0, the map not, set 1: 3 of 5; VS has no figure 0"""
    table = ["VS chart 0 1 0 1 Yes", "VS chart 0 2 0 0 no", "VS chart 0 1 1 0 No, it", "VS chart 0 2 1 0 eyes", "VS chart 0 0 2 1 yes",
             "VD chart 0 0 0 0 unclear", "VS map 0 1 0 1 no", "VS chart 1 1 0 0 ", "VD chart 0 0 1 1 YES, yes"]
    names = "category subcategory set_id figure_id question_id gt_answer prediction".split()
    rows = [dict(zip(names, row.split(" ", 6))) for row in table]
    expected = {"aAcc": 7 / 9, "qAcc": 5 / 7, "fAcc": 3 / 5}
    assert metrics.hallusionbench_score(rows) == metrics.hallusionbench_score(scrambled(rows)) == pytest.approx(expected)
    numbers = [{**row, "gt_answer": int(row["gt_answer"]), "figure_id": int(row["figure_id"])} for row in rows]
    assert metrics.hallusionbench_score(numbers) == pytest.approx(expected)


CHOICES = {"question_type": "multi_choice", "answer_type": "text", "precision": None, "choices": ["cat", "red car", "dog"]}


@pytest.mark.parametrize("prediction, expected", [
    ("B", "red car"), ("(C)", "dog"), (" A\n", "cat"), ("Red car", "red car"), ("a dog!", "dog"), ("cat, dog", None), ("cow", None), ("", None),
    ("D", None)])
def test_mathvista_choices(prediction, expected):
    assert metrics.mathvista_answer(prediction, CHOICES) == expected


@pytest.mark.parametrize("kind, precision, prediction, expected", [
    ("integer", None, "12", "12"), ("integer", None, "first 3, then 1,200 m", "1200"), ("integer", None, "x = -7.9", "-7"),
    ("integer", None, "none", None), ("integer", None, "", None), ("float", 1.0, "3.14159", "3.1"), ("float", 2.0, "it is .5", "0.5"),
    ("float", 2.0, "5", "5.0"), ("float", None, "2.6", "3.0"), ("float", 1.0, "-.25 or -0.36.", "-0.4"), ("float", 1.0, "x", None),
    ("list", None, "from [1] to [2,  3]", "[2, 3]"), ("list", None, "['a',2]", "['a', 2]"), ("list", None, "1, 2", None), ("list", None, "[a]", None),
    ("list", None, "[1", None), ("text", None, " Two cats ", "Two cats"), ("text", None, "", None),
    ("integer", None, "1" * 400, None), ("list", None, "[{{}}]", None), ("list", None, f"[{'-' * 100_000}1]", None)])  # what repeats itself
def test_mathvista_free_form(kind, precision, prediction, expected):
    row = {"question_type": "free_form", "answer_type": kind, "precision": precision, "choices": None}
    assert metrics.mathvista_answer(prediction, row) == expected
