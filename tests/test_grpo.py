"""GRPO and what it stands on: samples against the plain path's softmax, rewards and equations by hand, train_grpo.py as a user runs it."""
import itertools
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import rewards
import sampling
import scenes
import train_grpo
from conftest import LLM
from model import MLLM, InputError
from rewards import digit, exact, final_answer, four_numbers, iou, letter, mathematical, open_ended, overlap, place
from sampling import next_tokens, sample_groups
from train_grpo import adapted, advantages, as_batch, grpo_terms

SHORT, LONG = "color?", "what color is the square, and what is at the bottom left of the picture?"

# ---- sampling --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_logits(model, image, question, said=()):
    """Logits of the next token, (V,), by a whole forward pass over prompt and `said`: no cache, no padding"""
    ids = torch.tensor([model.chat.prompt_ids(question, model.n_image) + list(said)])
    return model.llm(inputs_embeds=model.splice(ids, model.image_tokens(model.pixels([image])))).logits[0, -1]


def misfit(found, probs):
    """Chi-square of a list of ids against probabilities (V,), in standard deviations of its distribution; rare ids share bins"""
    counts, expected, bins = torch.bincount(torch.tensor(found), minlength=len(probs)).tolist(), (probs * len(found)).tolist(), [[0, 0.]]
    for i in sorted(range(len(probs)), key=lambda i: -expected[i]):
        assert expected[i] or not counts[i]
        if bins[-1][1] >= 8:
            bins.append([0, 0.])
        bins[-1] = [bins[-1][0] + counts[i], bins[-1][1] + expected[i]]
    *bins, last = bins
    bins[-1] = [bins[-1][0] + last[0], bins[-1][1] + last[1]]
    assert len(bins) > 2
    return (sum((o - e)**2 / e for o, e in bins) - len(bins) + 1) / math.sqrt(2 * (len(bins) - 1))


def nucleus(probs, top_p):
    """probs (V,) cut to the likeliest ids until they reach top_p, renormalised: the definition as a loop"""
    kept, total = torch.zeros_like(probs), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -float(probs[i])):
        kept[i] = probs[i]
        total += float(probs[i])
        if total >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.6, 1.0), (.7, 1.0), (1.3, .6)])
def test_samples_are_drawn_from_the_softmax(temperature, top_p, make, pictures):
    # first tokens of two padded questions, and second tokens after each likely first one: frequencies are those of the plain path
    model = make()
    model.chat.stop_ids = [0]
    asked = [(pictures[0], SHORT), (pictures[2], LONG)]
    torch.manual_seed(1)
    groups, _ = sample_groups(model, *zip(*asked), 4000, 2, temperature, top_p)
    assert [len(group) for group in groups] == [4000, 4000]
    for (image, question), group in zip(asked, groups):
        cut = lambda logits: nucleus((logits / temperature).softmax(-1), top_p)
        firsts = [said[0] for said in group]
        assert abs(misfit(firsts, cut(plain_logits(model, image, question)))) < 4
        common = sorted({*firsts} - {0}, key=firsts.count)[-2:]
        for first in common:
            seconds = [said[1] for said in group if said[0] == first]
            assert len(seconds) > 60 and abs(misfit(seconds, cut(plain_logits(model, image, question, [first])))) < 4


def test_next_tokens():
    # temperature and nucleus row by row, in rows of their own order; the likeliest at temperature 0; a tiny share keeps one token
    torch.manual_seed(2)
    logits = torch.randn(3, 12) * 2
    for temperature, top_p in itertools.product((.5, 1., 2.), (1., .95, .8, .5)):
        ids = next_tokens(logits.repeat_interleave(4000, 0), temperature, top_p).view(3, 4000)
        for row, found in zip(logits, ids.tolist()):
            probs = nucleus((row / temperature).softmax(-1), top_p)
            if (probs > 0).sum() > 3:
                assert abs(misfit(found, probs)) < 4
            else:
                assert probs.gather(0, torch.tensor(found)).min() > 0
            assert (probs[probs > .01] > 0).all() and {int(i) for i in (probs > .01).nonzero()} <= {*found}
    assert next_tokens(logits, 0).tolist() == logits.argmax(-1).tolist() == next_tokens(logits, 0, .5).tolist()
    assert next_tokens(logits, 1.0, 1e-6).tolist() == logits.argmax(-1).tolist() and next_tokens(logits).shape == (3,)
    assert next_tokens(logits.bfloat16(), .01).dtype == torch.long


@pytest.mark.parametrize("llm", LLM)
def test_greedy_is_generate(llm, make, pictures):
    # temperature 0, questions of three lengths, one picture twice, turns that end at different steps: MLLM.generate's answers, n times each
    model = make(llm=llm)
    model.chat.stop_ids = [model.chat.stop_ids[0], *range(30, 370, 5)]
    images, questions = [*pictures[:3], pictures[0]], [LONG, SHORT, "is there a ring in the picture?", "where?"]
    groups, _ = sample_groups(model, images, questions, 3, 9, temperature=0)
    answers = model.generate(images, questions, 9)
    assert [[text.strip() for text in model.tokenizer.batch_decode(group, skip_special_tokens=True)] for group in groups] == \
        [[answer] * 3 for answer in answers]
    for image, question, (said, *more) in zip(images, questions, groups):  # and token by token, the stop token included
        expected = []
        while len(expected) < 9 and (not expected or expected[-1] not in model.chat.stop_ids):
            expected.append(int(plain_logits(model, image, question, expected).argmax()))
        assert said == expected and more == [said] * 2
    assert len({len(group[0]) for group in groups}) > 1


def sampled(model, monkeypatch, images, questions, n, most, **how):
    """sample_groups -> groups, and for each step the log-probs (R,V) that its open rows were drawn from"""
    seen = []
    monkeypatch.setattr(sampling, "next_tokens", lambda logits, *a, **k: (seen.append(logits.log_softmax(-1)), next_tokens(logits, *a, **k))[1])
    groups, entropy = sample_groups(model, images, questions, n, most, **how)
    each = [-float((row.exp() * row).sum()) for logps in seen for row in logps]
    assert float(entropy) == pytest.approx(sum(each), rel=1e-5) and len(each) == sum(len(said) for group in groups for said in group)
    return groups, seen


@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_rows_that_end_leave_and_the_others_do_not_notice(llm, make, pictures, monkeypatch):
    # every step reads the open rows only; what each token was drawn from is what the plain path and token_logps say of it
    model = make(llm=llm)
    model.chat.stop_ids = [*range(0, 367, 5)]
    read = []
    model.llm.register_forward_hook(lambda module, args, kwargs, out: read.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True)
    images, questions = pictures[:3], [SHORT, LONG, "where is it?"]
    torch.manual_seed(3)
    groups, seen = sampled(model, monkeypatch, images, questions, 5, 7)
    longest = max(len(model.chat.prompt_ids(question, model.n_image)) for question in questions)
    rows = [(i, said) for i, group in enumerate(groups) for said in group]
    lengths = [len(said) for _, said in rows]
    assert read == [(3, longest)] + [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]
    assert len({*lengths}) > 3 and [len(group) for group in groups] == [5] * 3
    for _, said in rows:  # stop token kept, none before the end; the end is a stop token or the limit
        assert not {*said[:-1]} & {*model.chat.stop_ids} and (said[-1] in model.chat.stop_ids or len(said) == 7)
    drawn = {}
    for step, logps in enumerate(seen):
        still = [r for r, length in enumerate(lengths) if length > step]
        assert len(logps) == len(still)
        for r, row in zip(still, logps):
            i, said = rows[r]
            drawn[r, step] = float(row[said[step]])
            torch.testing.assert_close(row, plain_logits(model, images[i], questions[i], said[:step]).log_softmax(-1), rtol=0, atol=1e-4)
    with torch.no_grad():
        batch = as_batch(model, [[{"image": image, "question": question}] for image, question in zip(images, questions)], groups)
        logps = model.token_logps(batch)
    assert batch.targets.tolist() == sum((said for _, said in rows), []) and batch.n_responses == 15
    assert batch.response_of.tolist() == [r for r, length in enumerate(lengths) for _ in range(length)]
    assert logps.tolist() == pytest.approx([drawn[r, step] for r, length in enumerate(lengths) for step in range(length)], abs=1e-4)


def test_the_limit_the_seed_and_the_shared_picture(make, pictures):
    # max_new_tokens exactly, no step more; same seed same samples, another seed others; the same object is encoded once
    model = make()
    model.chat.stop_ids = [0]
    encoded, steps = [], []
    model.vision.register_forward_pre_hook(lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True)
    model.llm.register_forward_pre_hook(lambda *_: steps.append(1))
    images = [pictures[0], pictures[1], pictures[0]]
    ask = lambda most, seed: (torch.manual_seed(seed), sample_groups(model, images, [SHORT, SHORT, LONG], 4, most)[0])[1]
    for most in (1, 2, 5):
        steps.clear()
        groups = ask(most, 0)
        assert len(steps) == most and {len(said) for group in groups for said in group} == {most}
    assert encoded == [2, 2, 2] and ask(5, 0) == groups != ask(5, 1)
    assert len({tuple(said) for said in groups[0]}) > 1
    greedy, _ = sample_groups(model, images, [SHORT, SHORT, LONG], 1, 4, temperature=0)
    for image, question, group in zip(images, [SHORT, SHORT, LONG], greedy):
        assert [group] == sample_groups(model, [image], [question], 1, 4, temperature=0)[0]


# ---- the equations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups, size", [(1, 2), (3, 8), (5, 3)])
def test_advantages_are_the_equation(groups, size):
    # (r - mean) / (standard deviation of a sample + 1e-4), or r - mean, as loops over floats
    torch.manual_seed(groups)
    scores = torch.rand(groups, size, dtype=torch.double)
    for row, plain, divided in zip(scores.tolist(), advantages(scores, False).tolist(), advantages(scores).tolist(), strict=True):
        mean = sum(row) / size
        deviation = math.sqrt(sum((r - mean)**2 for r in row) / (size - 1))
        assert plain == pytest.approx([r - mean for r in row], abs=1e-12)
        assert divided == pytest.approx([(r - mean) / (deviation + 1e-4) for r in row], abs=1e-12)
    assert advantages(torch.tensor([[0., 1.], [1., 1.]]), False).tolist() == [[-.5, .5], [0., 0.]]
    assert advantages(torch.tensor([[0., 0., 1., 0.]])).flatten().tolist() == pytest.approx([-.25 / .5001] * 2 + [.75 / .5001, -.25 / .5001])
    assert not advantages(torch.tensor([[0.] * 8, [1.] * 8])).any()


def test_equal_rewards_of_any_size_have_no_advantage():
    for reward, size in itertools.product((1 / 3, .1, .7, .632), range(2, 17)):
        assert not advantages(torch.full((1, size), reward)).any()


def naive_terms(logp, old, reference, advantage, low, high):
    """One token in floats: (loss, KL, clipped), from the docstring of grpo_terms"""
    ratio = math.exp(logp - old)
    held = 1 - low if ratio < 1 - low else 1 + high if ratio > 1 + high else ratio
    loss = -min(ratio * advantage, held * advantage)
    kl = 0.0 if reference is None else math.exp(reference - logp) - (reference - logp) - 1
    return loss, kl, float((advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low))


@pytest.mark.parametrize("low, high", [(.2, .2), (.2, .28), (.1, .4)])
def test_grpo_terms_are_the_equation(low, high):
    # values and gradients in float64, both sides of the clip with both signs of the advantage, and with no reference
    torch.manual_seed(0)
    old = -torch.rand(400, dtype=torch.double) * 6
    logps, reference = (old + torch.randn(400, dtype=torch.double) * .5).requires_grad_(), old + torch.randn(400, dtype=torch.double)
    advantage = torch.randn(400, dtype=torch.double)
    advantage[::50] = 0
    ratio = (logps.detach() - old).exp()
    for outside in (ratio < 1 - low, ratio > 1 + high):
        assert (outside & (advantage > 0)).any() and (outside & (advantage < 0)).any()
    for anchor in (reference, None):
        losses, kl, clipped = grpo_terms(logps, old, anchor, advantage, low, high)
        rows = [*zip(logps.tolist(), old.tolist(), reference.tolist() if anchor is not None else [None] * 400, advantage.tolist())]
        expected = [naive_terms(*row, low, high) for row in rows]
        for found, column in zip((losses, kl, clipped), zip(*expected), strict=True):
            assert found.tolist() == pytest.approx(column, rel=1e-10, abs=1e-12)
        gradient, = torch.autograd.grad((losses + .3 * kl).sum(), logps)
        slopes = [(0.0 if cut else -math.exp(p - o) * a) + (0.0 if r is None else .3 * (1 - math.exp(r - p)))
                  for (p, o, r, a), (_, _, cut) in zip(rows, expected)]
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)


def test_the_first_step_is_plain_policy_gradient():
    # policy = sampler = reference: ratio 1, KL 0, nothing clipped, the gradient of -A * logp and none of the KL
    logps = torch.tensor([-.1, -3., -9.], dtype=torch.double, requires_grad=True)
    advantage = torch.tensor([1.5, -2., 0.], dtype=torch.double)
    losses, kl, clipped = grpo_terms(logps, logps.detach(), logps.detach(), advantage, .2, .2)
    assert losses.tolist() == (-advantage).tolist() and not kl.any() and not clipped.any()
    (losses + kl).sum().backward()
    assert logps.grad.tolist() == (-advantage).tolist()


def test_the_kl_estimator_is_right_on_average():
    # never negative; weighted by the policy over all of a categorical distribution it is the exact divergence policy || reference
    torch.manual_seed(0)
    policy, reference = (torch.randn(2, 50, dtype=torch.double) * 1.5).log_softmax(-1)
    _, kl, _ = grpo_terms(policy, policy, reference, torch.zeros(50), .2, .2)
    exact_kl = sum(math.exp(p) * (p - r) for p, r in zip(policy.tolist(), reference.tolist()))
    assert (kl >= 0).all() and float((policy.exp() * kl).sum()) == pytest.approx(exact_kl, rel=1e-10) and exact_kl > .1


def test_the_adapted_weight():
    # Ziegler et al. 2019: proportional within a fifth, held at both bounds
    assert adapted(.1, 1.1, 1., 100) == pytest.approx(.1 * (1 + .1 * 100 / 10_000), rel=1e-12)
    assert adapted(.1, .9, 1., 100) == pytest.approx(.1 * (1 - .1 * .01), rel=1e-12)
    assert adapted(.1, 9., 1., 100) == pytest.approx(.1 * (1 + .2 * .01), rel=1e-12) == adapted(.1, 1.2, 1., 100)
    assert adapted(.1, 0., 1., 100) == pytest.approx(.1 * (1 - .2 * .01), rel=1e-12) == adapted(.1, .8, 1., 100)
    assert adapted(.1, 1e-3, 5e-4, 512) == pytest.approx(.1 * (1 + .2 * 512 / 10_000)) and adapted(.5, 2., 2., 512) == .5
    assert adapted(1., 9., 1., 50, horizon=100) == pytest.approx(1.1)


# ---- rewards ---------------------------------------------------------------------------------------------------------------


def all_of(reward, field, cases):
    for prediction, truth, expected in cases:
        assert reward(prediction, {field: truth}) == pytest.approx(expected, abs=1e-12), (prediction, truth)


def test_exact():
    all_of(exact, "answer", [("red", "red", 1), (" Top   LEFT. ", "top left", 1), ("red", "Red.", 1), ("red ring", "red", 0), ("", "red", 0),
                             ("re d", "red", 0), ("red, blue", "red", 0)])
    assert isinstance(exact("red", {"answer": "red"}), float)


def test_digit():
    all_of(digit, "answer", [("5", "5", 1), ("There are 5.", "5", 1), ("3 and 4 make 7", "7", 1), ("7 is 3 and 4", "7", 0), ("-2", "2", 0),
                             ("2.50", "2.5", 1), ("05", "5", 1), ("five", "5", 0), ("", "5", 0), ("5", "five", 0), ("no", "none", 0), ("4", "5", 0)])


@pytest.mark.parametrize("prediction, truth, expected", [
    ("1,000", "1000", 1), ("1000", "1,000", 1), ("1,000", "0", 0), ("3 + 997 = 1,000", "1000", 1), ("It is 5, I think", "5", 1),
    ("3, no 5, sorry", "5", 1), ("2,3", "3", 1),
    ("2e3", "2000", 1)])
def test_digit_and_commas(prediction, truth, expected):
    assert digit(prediction, {"answer": truth}) == expected


def test_letter():
    all_of(letter, "answer", [("B", "B", 1), ("(B) cat", "B", 1), ("B. cat", "b", 1), ("**B**", "(b) a cat", 1), (" B\n", "B", 1), ("B: 1", "B", 1),
                              ("A", "B", 0), ("b", "B", 0), ("Because", "B", 0), ("B's", "B", 0), ("B’s", "B", 0), ("", "B", 0), ("?", "?", 0),
                              ("BC", "B", 0), ("AB", "A", 0), ("the B", "B", 0), ("BÉ", "B", 0)])


def test_iou():
    truth = "[0, 0, 10, 10]"
    all_of(iou, "answer", [("[0, 0, 10, 10]", truth, 1), ("0 0 10 5", truth, .5), ("[5,0,15,10]", truth, 1 / 3), ("[20, 20, 30, 30]", truth, 0),
                           ("[10, 0, 20, 10]", truth, 0), ("[0, 0, 10]", truth, 0), ("", truth, 0), ("no box", truth, 0),
                           ("[10, 10, 0, 0]", truth, 0), ("[10, 0, 0, 10]", truth, 0), ("[-10, -10, 10, 10]", truth, .25),
                           ("[0.5, .0, 1.0, .5]", "[0, 0, 1, 1]", .25), ("[0, 0, 10, 10], not [5, 5, 6, 6]", truth, 1),
                           ("[1, 1, 1, 1]", "[1, 1, 1, 1]", 0), ("[0, 0, 10, 10]", "none", 0), ("[2, 3, 7, 8]", truth, .25)])
    all_of(iou, "box", [("[0, 0, 10, 10]", (0, 0, 10, 5), .5)])
    assert iou("[0, 0, 2, 2]", {"box": [0, 0, 2, 2], "answer": "[5, 5, 6, 6]"}) == 1  # the field goes before the text
    assert overlap((0, 0, 2, 4), (1, 1, 3, 3)) == 2 / (8 + 4 - 2) and four_numbers("a -1.5, .5;3 4 5") == [-1.5, .5, 3, 4]


def test_place_is_the_cell_of_the_drawn_world():
    # the right place is the best of the nine and the share of its cell that the box is; any other place, or none, is worth nothing
    world, seen = scenes.Scenes("train", 150, "vqa"), set()
    for record in (world[i] for i in range(150)):
        assert record["reward"] == ("place" if record["kind"] == "place" else "exact")
        if record["kind"] != "place":
            continue
        x0, y0, x1, y1 = record["box"]
        values = {name: place(name, record) for name in scenes.PLACES}
        assert values.pop(record["answer"]) == pytest.approx((x1 - x0) * (y1 - y0) / 144) and not any(values.values())
        assert place(f" {record['answer'].upper()}. ", record) > .4 and place("at the " + record["answer"], record) == place("", record) == 0
        seen.add(record["answer"])
    assert len(seen) > 5
    for scale in (1, 3):                                                                 # whatever the size of the picture
        at = lambda *box: {"box": tuple(scale * x for x in box), "image": Image.new("RGB", (36 * scale, 36 * scale))}
        assert place("top right", at(24, 0, 36, 12)) == 1 and place("bottom left", at(6, 24, 18, 36)) == pytest.approx(72 / 216)


def test_open_ended():
    # 1 - exp(-beta * better), 0 when it is not better; the question goes along
    points = {("why?", "good"): 2., ("why?", "best"): 3.5, ("why?", "bad"): 1.5, ("how?", "good"): 9.}
    score, record = (lambda question, answer: points[question, answer]), {"question": "why?", "answer": "good"}
    assert open_ended("best", record, score, 1.) == pytest.approx(1 - math.exp(-1.5))
    assert open_ended("best", record, score, .2) == pytest.approx(1 - math.exp(-.3))
    assert open_ended("good", record, score, 1.) == open_ended("bad", record, score, 1.) == 0


def test_the_reward_model_is_a_sequence_classifier(tmp_path, tokenizers):
    # from a folder: question and answer in that order, through the tokenizer's own way of joining two texts; nothing to train
    torch.manual_seed(0)
    tokenizer = tokenizers["chatml"]
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1,
        max_position_embeddings=64, initializer_range=.5))
    classifier.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    judge, classifier = rewards.RewardModel(str(tmp_path / "judge"), torch.device("cpu")), classifier.eval()
    with torch.no_grad():
        expected = float(classifier(**tokenizer("what color?", "red", return_tensors="pt")).logits[0, 0])
    assert judge("what color?", "red") == pytest.approx(expected, abs=1e-6) == judge("what color?", "red") and isinstance(expected, float)
    assert judge("red", "what color?") != pytest.approx(expected, abs=1e-3)
    with pytest.raises(InputError, match="cannot be opened"):
        rewards.RewardModel(str(tmp_path / "nothing"), torch.device("cpu"))


@pytest.mark.parametrize("saved, outputs", [("BertModel", 1), ("BertForSequenceClassification", 2)])
def test_a_reward_model_has_one_output_of_its_own(saved, outputs, tmp_path, tokenizers):
    config = transformers.BertConfig(vocab_size=len(tokenizers["chatml"]), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, num_labels=outputs)
    getattr(transformers, saved)(config).save_pretrained(tmp_path / "judge")
    tokenizers["chatml"].save_pretrained(tmp_path / "judge")
    with pytest.raises(InputError):
        rewards.RewardModel(str(tmp_path / "judge"), torch.device("cpu"))


def test_final_answer():
    for text, expected in [("<answer>red</answer>", "red"), ("<think>a</think>\n<answer> red\n</answer> ok", "red"), ("red", None), ("", None),
                           ("<answer>red</answer> no <answer>blue</answer>", "blue"), ("<answer>red", None), ("red</answer>", None),
                           ("<answer>top\nleft</answer>", "top\nleft"), ("<answer></answer>", ""), ("</answer>red<answer>", None),
                           ("<answer>red</answer> <answer>blue", "red")]:
        assert final_answer(text) == expected, text


def test_mathematical():
    pytest.importorskip("math_verify")
    all_of(mathematical, "answer", [("1/2", "0.5", 1), ("$\\frac{1}{2}$", "1/2", 1), ("\\boxed{2}", "2", 1), ("3", "2", 0), ("", "2", 0)])


def test_the_judge(monkeypatch):
    # by the row's kind; tags only where they are asked for; open answers through the model, or a line that says which flag is missing
    make = lambda **more: train_grpo.Judge(SimpleNamespace(**{"reward_model": None, "think": False, "open_beta": 2.} | more), None)
    red, five = {"answer": "red", "reward": "exact"}, {"answer": "5", "reward": "digit"}
    assert make()("red", red) == 1 == make()("so 5", five) and make()("so 5", {**five, "reward": "exact"}) == 0
    think = make(think=True)
    assert think("red", red) == 0 and think("<think>x</think><answer>red</answer>", red) == 1 and make()("<answer>red</answer>", red) == 0
    free = {"question": "?", "answer": "red", "reward": "open", "name": "rows.jsonl line 3"}
    monkeypatch.setattr(rewards, "RewardModel", lambda name, device: lambda question, answer: float(len(answer)))
    assert make(reward_model="judge")("redder", free) == pytest.approx(1 - math.exp(-6))
    for refused in (make(), make(think=True)):
        with pytest.raises(InputError, match="line 3.*--reward_model"):
            refused("redder", free)
    assert {*rewards.KINDS} == {"exact", "digit", "letter", "math", "iou", "place", "open"}


def test_the_reader_keeps_trees_and_names_kinds(make):
    # the row's own kind before the flag's; the questions of a tree get one and the same picture; a tree without rows is gone
    model, pictures = make(), [Image.new("RGB", (9, 9)) for _ in range(4)]
    rows = [{"question": "?", "answer": "a", "image": picture, "name": f"row {i}"} for i, picture in enumerate(pictures)]
    rows[1]["reward"], rows[2]["reward"], rows[3]["reward"] = "digit", None, "places"
    read = train_grpo.Reader(rows, model, SimpleNamespace(reward="letter", max_new_tokens=4, max_length=500))
    trees, dropped = read([[0, 1], [3], [2]])
    assert [[record["name"] for record in tree] for tree in trees] == [["row 0", "row 1"], ["row 2"]]
    assert [[record["reward"] for record in tree] for tree in trees] == [["letter", "digit"], ["letter"]]
    assert trees[0][0]["image"] is trees[0][1]["image"] is pictures[0] and trees[1][0]["image"] is pictures[2]
    assert len(dropped) == 1 and dropped[0].startswith("row 3: no reward is named 'places'") and "image" in rows[1] and rows[1]["image"] is pictures[1]


# ---- whole runs ------------------------------------------------------------------------------------------------------------

FIELDS = {"step", "seconds", "loss", "kl", "clipped", "entropy", "lr", "grad_norm", "grad_norm_vision", "grad_norm_connector", "grad_norm_llm",
          "drift_vision", "drift_connector", "drift_llm", "reward", "reward_std", "no_signal", "reward_exact", "kl_weight", "length",
          "samples_per_s", "dropped", "peak_mb"}


@pytest.fixture
def train(start_run, tmp_path, monkeypatch):
    """train("--steps", 2, ...) -> (folder of the finished run, its log lines); 8 questions, 4 a step, 3 answers each of up to 4 tokens"""
    def train(*flags, init=start_run, out="out"):
        argv = ["train_grpo.py", "--init", init, "--out", tmp_path / out, "--n", 8, "--batch_size", 4, "--group", 3, "--max_new_tokens", 4,
                "--lr", 1e-3, "--log_every", 1, "--compile", "false", "--max_bad", 1, *flags]
        monkeypatch.setattr("sys.argv", [str(a) for a in argv])
        train_grpo.main()
        with open(tmp_path / out / "log.jsonl") as f:
            return str(tmp_path / out), [json.loads(line) for line in f]
    return train


@pytest.fixture
def any_reward(monkeypatch):
    """Random models are never right: a reward that they can earn, the share of letters before n"""
    reward = lambda prediction, record: sum(letter < "n" for letter in prediction) / max(1, len(prediction))
    for kind in ("exact", "place"):
        monkeypatch.setitem(rewards.KINDS, kind, reward)


@pytest.fixture
def canned(monkeypatch):
    """canned(*texts) makes train_grpo's sampler say these to every question; -> a growing list of what it was called with"""
    def canned(*texts):
        calls = []

        def sampler(model, images, questions, n, most, temperature, top_p):
            assert n == len(texts) == train_grpo.parser.parse_args().group and len(images) == len(questions)
            groups = [[model.chat.response_ids(text) for text in texts] for _ in questions]
            calls.append({"head": model.chat.head, "images": images, "questions": questions, "groups": groups, "how": (most, temperature, top_p)})
            return groups, torch.tensor(.5)
        monkeypatch.setattr(train_grpo, "sample_groups", sampler)
        return calls
    return canned


def weights(run):
    """{name: tensor} of a whole run directory"""
    return {f"{part}.{k}": v for part, file in (("vision", "vision/model"), ("llm", "llm/model"), ("connector", "connector"))
            for k, v in load_file(os.path.join(run, file + ".safetensors")).items()}


def slow_logps(model, image, question, said):
    """log p of each token of a sampled answer, by the plain path"""
    prompt = model.chat.prompt_ids(question, model.n_image)
    embeds = model.splice(torch.tensor([prompt + said]), model.image_tokens(model.pixels([image])))
    logps = model.llm(inputs_embeds=embeds).logits.log_softmax(-1)[0]
    return torch.stack([logps[len(prompt) + i - 1, token] for i, token in enumerate(said)])


def test_a_run(train, any_reward, start_run, capsys):
    # all promised fields, a first step with KL 0 and nothing clipped, every part moved, a run that loads and that a seed repeats bit for bit
    run, lines = train("--epochs", 2)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert FIELDS <= set(line) <= FIELDS | {"reward_place"} and all(math.isfinite(value) for value in line.values())
        assert line["dropped"] == 0 and line["kl_weight"] == 1e-3 and line["clipped"] == 0 and 1 <= line["length"] <= 4
        assert min(line[f"drift_{part}"] for part in ("vision", "connector", "llm")) > 0 and 0 < line["reward"] < 1 and line["entropy"] > 0
    assert lines[0]["kl"] == 0 and all(line["kl"] > 0 for line in lines[1:])
    again, _ = train("--epochs", 2, out="again")
    other, _ = train("--epochs", 2, "--seed", 1, out="other")
    assert all(torch.equal(a, b) for a, b in zip(weights(run).values(), weights(again).values(), strict=True))
    assert not torch.equal(weights(run)["connector.up.weight"], weights(other)["connector.up.weight"])
    model = MLLM.load(run)
    assert model.generate([scenes.Scenes("test", 1, "vqa")[0]["image"]], [SHORT], 3)
    with open(os.path.join(run, "config.json")) as f:
        settings = json.load(f)
    assert settings["stage"] == "train_grpo.py" and settings["parent"] == start_run and settings["total_steps"] == 4 and settings["flops"] > 0


@pytest.mark.parametrize("frozen", ["vision", "llm"])
def test_what_is_frozen_stays(frozen, train, any_reward, start_run):
    run, lines = train("--steps", 1, f"--lr_{frozen}", 0)
    before, after = weights(start_run), weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(frozen))
    for part in ("vision", "connector", "llm"):
        assert (lines[0][f"drift_{part}"] == 0) == (lines[0][f"grad_norm_{part}"] == 0) == (part == frozen)


@pytest.mark.parametrize("flags", [(), ("--length", "constant", "--advantage", "mean")])
def test_micro_batches_change_nothing(flags, train, any_reward, start_run):
    # 1, 2 or 3 of 4 questions at a time: the same first update
    full, (line,) = train("--steps", 1, "--lr", 1e-2, *flags, out="full")
    full, start = weights(full), weights(start_run)
    for micro in (1, 2, 3):
        run, (found,) = train("--steps", 1, "--lr", 1e-2, *flags, "--micro_batch", micro, out=f"micro{micro}")
        for name, value in weights(run).items():
            if not (name.startswith("vision") and "k_proj.bias" in name):  # no gradient but rounding noise, which Adam scales up
                assert (value - full[name]).norm() <= 1e-2 * (full[name] - start[name]).norm(), (micro, name)
        for key in ("loss", "entropy", "grad_norm", "grad_norm_vision", "reward", "length", "clipped"):
            assert found[key] == pytest.approx(line[key], rel=1e-4, abs=1e-6), (micro, key)


def test_gradient_checkpointing_changes_nothing(train, any_reward):
    plain, lines = train("--steps", 1, out="plain")
    checkpointed, found = train("--steps", 1, "--grad_checkpoint", out="checkpointed")
    assert found[0]["reward"] == lines[0]["reward"] and found[0]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)
    for (name, a), b in zip(weights(plain).items(), weights(checkpointed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")


TEXTS = ("red", "it is the one at the top left", "two", "red. i think it is red")


@pytest.mark.parametrize("length, advantage", [("response", "std"), ("response", "mean"), ("constant", "std"), ("constant", "mean")])
@pytest.mark.parametrize("micro_batch", [4, 3])
def test_the_first_update_is_the_policy_gradient(length, advantage, micro_batch, train, canned, monkeypatch, start_run):
    # logged loss and gradient norms = those of -mean of A * log p by the plain path: the four ways of averaging
    points = dict(zip(TEXTS, (1., 0., .25, .5)))
    for kind in ("exact", "place"):
        monkeypatch.setitem(rewards.KINDS, kind, lambda prediction, record: points[prediction])
    calls = canned(*TEXTS)
    _, (line,) = train("--steps", 1, "--group", 4, "--max_new_tokens", 9, "--temperature", .8, "--top_p", .9,
                       "--length", length, "--advantage", advantage, "--micro_batch", micro_batch)
    call, = calls
    assert call["how"] == (9, .8, .9)
    model, mean = MLLM.load(start_run), sum(points.values()) / 4
    deviation = math.sqrt(sum((r - mean)**2 for r in points.values()) / 3) + 1e-4
    loss, value, n_tokens = 0, 0, 0
    for image, question, group in zip(call["images"], call["questions"], call["groups"]):
        for said, reward in zip(group, points.values(), strict=True):
            share = (reward - mean) / (deviation if advantage == "std" else 1) / (len(said) if length == "response" else 9) / 16
            logps = slow_logps(model, image, question, said)
            loss, value = loss - share * logps.sum(), value - share * len(said)
            n_tokens += len(said)
    loss.backward()
    norms = {part: math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None))
             for part, module in model.parts().items()}
    assert {part: line[f"grad_norm_{part}"] for part in norms} == pytest.approx(norms, rel=1e-4)
    assert line["loss"] == pytest.approx(value, abs=1e-5)
    assert line["length"] == pytest.approx(n_tokens / 16, rel=1e-5) and line["reward"] == pytest.approx(mean) and line["no_signal"] == 0
    assert line["reward_std"] == pytest.approx(deviation - 1e-4, rel=1e-4)


@pytest.mark.parametrize("length, micro_batch", [("response", 4), ("constant", 3)])
def test_the_second_update_is_the_clipped_equation(length, micro_batch, train, canned, monkeypatch, start_run):
    # two updates of the same samples: the second is held to the first policy by the clip and to the start by the KL, by floats and the plain path
    points = dict(zip(TEXTS, (1., 0., .25, .5)))
    for kind in ("exact", "place"):
        monkeypatch.setitem(rewards.KINDS, kind, lambda prediction, record: points[prediction])
    flags = ("--steps", 1, "--group", 4, "--max_new_tokens", 9, "--length", length, "--kl", .3, "--warmup", 0, "--lr", 3e-3, "--clip_low", .1,
             "--clip_high", .25, "--micro_batch", micro_batch)
    calls = canned(*TEXTS)
    once, _ = train(*flags, out="once")
    _, lines = train(*flags, "--updates", 2, out="twice")
    assert [line["step"] for line in lines] == [0, 1] and len(calls) == 2  # sampled once a run
    assert lines[0]["kl"] == lines[0]["clipped"] == 0
    start, then, mean, (call, _) = MLLM.load(start_run), MLLM.load(once), sum(points.values()) / 4, calls
    deviation = math.sqrt(sum((r - mean)**2 for r in points.values()) / 3) + 1e-4
    total, kls, clips, n_tokens = 0, 0, 0, 0
    for image, question, group in zip(call["images"], call["questions"], call["groups"]):
        for said, reward in zip(group, points.values(), strict=True):
            old, new = slow_logps(start, image, question, said).detach(), slow_logps(then, image, question, said)
            for p, o in zip(new, old.tolist()):
                _, kl, clipped = naive_terms(float(p.detach()), o, o, (reward - mean) / deviation, .1, .25)
                ratio, a = (p - o).exp(), (reward - mean) / deviation
                term = -torch.minimum(ratio * a, ratio.clamp(.9, 1.25) * a) + .3 * ((o - p).exp() - (o - p) - 1)
                total, kls, clips, n_tokens = total + term / (len(said) if length == "response" else 9) / 16, kls + kl, clips + clipped, n_tokens + 1
    total.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in then.parameters() if p.grad is not None))
    assert 0 < clips < n_tokens and lines[1]["clipped"] == pytest.approx(clips / n_tokens, abs=2.1 / n_tokens)
    assert lines[1]["loss"] == pytest.approx(float(total.detach()), rel=2e-3, abs=2e-4) and lines[1]["kl"] == pytest.approx(kls / n_tokens, rel=2e-3)
    assert lines[1]["grad_norm"] == pytest.approx(norm, rel=2e-2)


def test_samples_and_means_since_the_last_line(train, canned, monkeypatch, capsys):
    # a line of the log has the mean of all its steps; the question shown is one whose answers differ; its rewards and counts are all there
    said, n = ("red", "no", "red"), iter(range(10**6))
    for kind in ("exact", "place"):
        monkeypatch.setitem(rewards.KINDS, kind, lambda prediction, record: next(n) // 12 / 4 + float(prediction == "red") / 8)
    canned(*said)
    run, lines = train("--steps", 3, "--log_every", 2)
    assert [line["step"] for line in lines] == [0, 2] and [line["reward"] for line in lines] == pytest.approx([1 / 12, 3 / 8 + 1 / 12], abs=1e-6)
    with open(os.path.join(run, "samples.jsonl")) as f:
        shown = [json.loads(line) for line in f]
    assert [line["step"] for line in shown] == [0, 2] and all({"row", "question", "answer", "kind", "said"} <= {*line} for line in shown)
    assert shown[0]["said"] == [{"text": "red", "reward": .125, "n": 2}, {"text": "no", "reward": 0, "n": 1}]
    assert f"{shown[0]['question']}  2 x 'red' 0.12 | 1 x 'no' 0.00" in capsys.readouterr().out


def test_workers_and_trees_change_nothing(train, any_reward, monkeypatch):
    # four questions about each picture: read by two workers, or one question a tree, the same samples' first losses; a picture of a tree is encoded once
    flags, encoded = ("--data", "scenes/train/vqa/4", "--steps", 2), []
    features = MLLM.features
    monkeypatch.setattr(MLLM, "features", lambda self, pixels: (encoded.append(len(pixels)), features(self, pixels))[1])
    _, lines = train(*flags)
    assert encoded == [1, 1, 1] * 2  # to sample, for the reference and for the policy
    _, found = train(*flags, "--workers", 2, out="workers")
    drop = lambda line: {key: value for key, value in line.items() if key not in ("seconds", "samples_per_s", "peak_mb")}
    assert [drop(line) for line in found] == [drop(line) for line in lines]


def test_equal_rewards_move_nothing(train, canned, start_run):
    # every answer worth the same, no KL: not a bit of the model changes
    canned("never", "no such thing", "nor this")
    run, (line,) = train("--steps", 1, "--kl", 0)
    assert line["grad_norm"] == 0 == line["loss"] == line["reward"] and line["no_signal"] == 1 and line["drift_llm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(start_run).values(), weights(run).values(), strict=True))


def test_updates_and_the_reference(train, any_reward, monkeypatch):
    # --updates 2: twice the optimiser steps, a schedule of twice the length; --kl 0: nothing is copied, nothing is logged but 0
    _, lines = train("--steps", 2, "--updates", 2, "--lr", 1e-2)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[0]["kl"] == 0 < lines[1]["kl"]
    assert [line["reward"] for line in lines[::2]] == [line["reward"] for line in lines[1::2]]
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * (1 + math.cos(math.pi * i / 3)) / 2 for i in (0, 0, 1, 2)], rel=1e-4)
    copies, deepcopy = [], train_grpo.copy.deepcopy
    monkeypatch.setattr(train_grpo, "copy", SimpleNamespace(deepcopy=lambda model: (copies.append(model), deepcopy(model))[1]))
    _, lines = train("--steps", 2, "--kl", 0, out="free")
    assert not copies and [line["kl"] for line in lines] == [0, 0] == [line["kl_weight"] for line in lines]
    train("--steps", 1, out="held")
    assert len(copies) == 1


def test_the_weight_of_the_kl_follows_its_target(train, any_reward):
    # step 0 came to 0 nats, less than the target; later ones to more
    _, lines = train("--steps", 3, "--kl", .01, "--kl_target", 1e-9, "--lr", 1e-2)
    assert lines[0]["kl_weight"] == .01 and lines[1]["kl_weight"] == pytest.approx(.01 * (1 - .2 * 12 / 10_000), abs=6e-7)
    assert lines[2]["kl_weight"] == pytest.approx(lines[1]["kl_weight"] * (1 + .2 * 12 / 10_000), abs=6e-7) and lines[1]["kl"] > 1e-9


def test_think(train, canned, monkeypatch):
    # the prompt asks for the tags; an answer is what stands between them, and worth nothing without
    calls = canned("<think>x</think> <answer>red</answer>", "red", "<answer>red", "<answer> red </answer>")
    for kind in ("exact", "place"):
        monkeypatch.setitem(rewards.KINDS, kind, lambda prediction, record: float(prediction == "red"))
    _, (line,) = train("--steps", 1, "--group", 4, "--think")
    assert line["reward"] == .5 and rewards.THINK in calls[0]["head"]
    _, (line,) = train("--steps", 1, "--group", 4, out="plain")
    assert line["reward"] == .25 and rewards.THINK not in calls[1]["head"]


def test_rows_of_a_file_and_bad_ones(train, canned, tmp_path, capsys):
    # each row by its own kind or the flag's; a picture that is missing is named and counted, and the group means are of what is left
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "how many?", "answer": "2", "reward": "digit"}, {"image": "gone.png", "question": "?", "answer": "2"},
            {"image": "a.png", "question": "which?", "answer": "B", "reward": "exact"}, {"image": "a.png", "question": "which?", "answer": "(B) 2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    canned("B", "so 2", "(B)")
    _, lines = train("--data", tmp_path / "rows.jsonl", "--reward", "letter", "--micro_batch", 2)
    assert len(lines) == 1 and lines[0]["dropped"] == 1 and "gone.png" in capsys.readouterr().out
    found = {key: lines[0][key] for key in lines[0] if key.startswith("reward_") and key != "reward_std"}
    assert found == pytest.approx({"reward_digit": 1 / 3, "reward_exact": 1 / 3, "reward_letter": 2 / 3}, abs=1e-5)
    assert lines[0]["reward"] == pytest.approx(4 / 9, abs=1e-5) and lines[0]["no_signal"] == 0


def test_a_group_of_one_is_refused(train, tmp_path):
    with pytest.raises(InputError, match="--group must be at least 2"):
        train("--group", 1)
    assert not (tmp_path / "out.tmp").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("row, flags", [({"answer": "2", "reward": "digits"}, ()), ({"answer": "2", "reward": "open"}, ()),
                                        ({"answer": "2"}, ("--reward", "open")), ({"answer": "top", "reward": "place"}, ())])
def test_what_cannot_be_judged_is_said_in_a_line(row, flags, train, canned, tmp_path):
    # a kind that does not exist, an open question without a model, a place without a box
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "question": "?", **row}) + "\n")
    canned("top", "2", "3")
    with pytest.raises((InputError, SystemExit)):
        train("--data", tmp_path / "rows.jsonl", *flags)


def test_longer_rows_are_dropped(train, canned, tmp_path, capsys):
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": question, "answer": "2"} for question in ("?", "how many? " * 60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    canned("a", "2", "b")
    _, lines = train("--data", tmp_path / "rows.jsonl", "--max_length", 120)
    assert lines[0]["dropped"] == 1 and "--max_length is 120" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--top_p", 0), ("--temperature", -1)])
def test_flags_that_cannot_be_sampled_with(flags, train):
    with pytest.raises((InputError, SystemExit)):
        train("--steps", 1, *flags)


def test_a_step_without_rows_is_skipped(train, canned, tmp_path, capsys):
    # two steps of a row each, one of them without a picture: the other one trains
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"image": f"{name}.png", "question": "?", "answer": "2"}) + "\n" for name in ("a", "b")))
    calls = canned("a", "2", "b")
    _, lines = train("--data", tmp_path / "rows.jsonl", "--batch_size", 1)
    assert len(calls) == 1 and [line["step"] for line in lines] == [0] and "b.png" in capsys.readouterr().out


# ---- does it learn? --------------------------------------------------------------------------------------------------------


def test_a_bandit_is_solved(make, pictures):
    # one question, reward 1 for one first token out of 367: from about 5 % to more than 95 % in 60 steps
    model, record = make(), {"image": pictures[0], "question": SHORT}
    chance = lambda: plain_logits(model, pictures[0], SHORT).softmax(-1)
    target = int((chance() - .05).abs().argmin())
    assert .01 < float(chance()[target]) < .1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for _ in range(60):
        groups, _ = sample_groups(model, [pictures[0]], [SHORT], 32, 1)
        advantage = advantages(torch.tensor([[float(said[0] == target) for said in groups[0]]]))
        batch = as_batch(model, [[record]], groups)
        logps = model.token_logps(batch)
        losses, *_ = grpo_terms(logps, logps.detach(), None, advantage.flatten()[batch.response_of], .2, .2)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(chance()[target]) > .95
