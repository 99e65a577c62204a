"""
Packed trees are separate rows: values, losses and every gradient against slow code, with policy and reference apart.

One function, `same`, compares; the classic mistakes of masks and positions are planted further down, and it must notice each of them.
"""
import copy
import functools
import math
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

import model as model_file
from conftest import DINO, HALF, LLM, VISION, randomise
from model import MLLM, TokenLogps, chunk_logits_gradient, chunk_logps
from train_dpo import dpo_loss
from trees import pack

BETA, EAGER = .1, (chunk_logps, chunk_logits_gradient)
WORDS = "a red ring at top left , blue cross center green circle what color is the square ? describe picture where".split()
close = torch.testing.assert_close

# ---- layout: where pack puts what --------------------------------------------------------------------------------------------


def test_the_layout_of_the_docstring():
    # the example in pack's docstring, whole
    batch = pack([[5, -1, 6]], [[([7], [[8, 9], [8, 3]])]], torch.zeros(1, 3, 2, 2), 0)
    assert batch.input_ids.tolist() == [[5, -1, 6, 7, 8, 9, 8, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5]]
    assert batch.branch_end.tolist() == [[8, 8, 8, 8, 6, 6, 8, 8]]
    assert batch.logit_at.tolist() == [3, 4, 3, 6] and batch.targets.tolist() == [8, 9, 8, 3]
    assert batch.response_of.tolist() == [0, 0, 1, 1] and batch.n_responses == 2 and batch.rows == ()
    drawn = ["x.......", "xx......", "xxx.....", "xxxx....", "xxxxx...", "xxxxxx..", "xxxx..x.", "xxxx..xx"]
    assert batch.visible().shape == (1, 1, 8, 8) and batch.visible().dtype == torch.bool
    assert ["".join(".x"[v] for v in row) for row in batch.visible()[0, 0].tolist()] == drawn
    assert batch.per_response(torch.tensor([1., 2., 4., 8.])).tolist() == [3., 12.]


def test_the_layout_of_two_trees_in_a_row():
    # sizes 3, 9, 5, 3: the largest makes row 0; 5 and 3 and no more fit into row 1, with a token of padding; responses keep their given numbers
    batch = pack([[10], [20, 21], [30], [40]],
                 [[([11], [[12]])], [([22], [[23]]), ([24, 25], [[26, 27], [28]])], [([31], [[32, 33], [34]])], [([41], [[42]])]],
                 torch.zeros(1, 3, 2, 2), 99)
    assert batch.input_ids.tolist() == [[20, 21, 22, 23, 24, 25, 26, 27, 28], [30, 31, 32, 33, 34, 10, 11, 12, 99], [40, 41, 42] + [99] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4, 5, 4], [0, 1, 2, 3, 2, 0, 1, 2, 0], [0, 1, 2] + [0] * 6]
    assert batch.branch_end.tolist() == [[9, 9, 4, 4, 9, 9, 8, 8, 9], [5, 5, 4, 4, 5, 8, 8, 8, 9], [3, 3, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.targets.tolist() == [12, 23, 26, 27, 28, 32, 33, 34, 42] and batch.response_of.tolist() == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert batch.logit_at.tolist() == [15, 2, 5, 6, 5, 10, 11, 10, 19] and batch.n_responses == 7


def random_ids(seed):
    """Trunks and trees in which no id occurs twice, so that an id names a token"""
    rng, ids = np.random.default_rng(seed), iter(range(1, 10_000))
    some = lambda most: [next(ids) for _ in range(rng.integers(1, most + 1))]
    trunks, trees = [], []
    for _ in range(rng.integers(1, 7)):
        trunks.append(some(9))
        trees.append([(some(5), [some(6) for _ in range(rng.integers(1, 6))]) for _ in range(rng.integers(1, 7))])
    return trunks, trees


@pytest.mark.parametrize("seed", range(20))
def test_each_token_sees_its_own_branch_and_its_ancestors(seed):
    # visible, positions, logit_at, targets and numbering of random trees against their definition, token by token
    trunks, trees = random_ids(seed)
    batch = pack(trunks, trees, torch.zeros(1, 3, 2, 2), 0)
    ids, visible, width = batch.input_ids, batch.visible()[:, 0], batch.input_ids.shape[1]
    place = {int(ids[s, at]): (s, at) for s, at in ids.nonzero().tolist()}
    given = [token for trunk, tree in zip(trunks, trees) for q, responses in tree for token in [*trunk, *q, *sum(responses, [])]]
    assert set(place) == set(given) and int((ids != 0).sum()) == len(place)  # nothing lost, nothing twice
    sees = lambda token: set(ids[place[token][0]][visible[place[token]]].tolist())

    number = 0
    for trunk, tree in zip(trunks, trees):
        for question, responses in tree:
            for response in responses:
                path = trunk + question + response
                for depth, token in enumerate(path):
                    assert sees(token) == set(path[:depth + 1])
                    assert batch.positions[place[token]] == depth == visible[place[token]].sum() - 1
                mine = batch.response_of == number
                assert batch.targets[mine].tolist() == response
                previous = path[len(path) - len(response) - 1:-1]
                assert batch.logit_at[mine].tolist() == [place[token][0] * width + place[token][1] for token in previous]
                number += 1
    assert number == batch.n_responses and batch.response_of.tolist() == sorted(batch.response_of.tolist())
    padding = ids == 0
    assert torch.equal(visible[padding], torch.eye(width).bool().expand(len(ids), -1, -1)[padding]) and not batch.positions[padding].any()


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_filled_first_fit_largest_first(seed):
    # rows as long as the largest tree; trees in whole, one behind the other, padding only at the end; each where the plain rule puts it
    trunks, trees = random_ids(seed)
    batch = pack(trunks, trees, torch.zeros(1, 3, 2, 2), 0)
    sizes = [len(trunk) + sum(len(q) + sum(map(len, responses)) for q, responses in tree) for trunk, tree in zip(trunks, trees)]
    rows = []
    for t in sorted(range(len(sizes)), key=lambda t: (-sizes[t], t)):
        fitting = [row for row in rows if sum(sizes[u] for u in row) + sizes[t] <= max(sizes)]
        (fitting[0] if fitting else rows.append([]) or rows[-1]).append(t)
    written = [sum(([*trunks[t], *(token for q, responses in trees[t] for token in q + sum(responses, []))] for t in row), []) for row in rows]
    assert batch.input_ids.tolist() == [row + [0] * (max(sizes) - len(row)) for row in written]


def test_the_same_trees_are_packed_the_same():
    # twice the same bits, and equal sizes keep their order: a seed is a run
    trunks, trees = random_ids(3)
    trunks, trees = trunks + trunks, trees + trees
    a, b = (pack(trunks, trees, torch.zeros(1, 3, 2, 2), 0) for _ in range(2))
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    assert all(value.dtype == torch.int64 for name, value in vars(a).items() if torch.is_tensor(value) and name != "pixels")


# ---- the comparison ------------------------------------------------------------------------------------------------------------
# A forest is ((picture, ((question, (response, ...)), ...)), ...): texts, in tuples, so that the oracles' answers can be remembered.


def random_forest(seed, n_trees, questions=(1, 6), responses=(2, 2)):
    """Trees of random lengths; an empty response is one token, the end of the turn"""
    rng = np.random.default_rng(seed)
    some = lambda bounds: range(rng.integers(bounds[0], bounds[1] + 1))
    text = lambda least, most: " ".join(rng.choice(WORDS) for _ in some((least, most)))
    return tuple((int(rng.integers(4)), tuple((text(1, 8), tuple(text(0, 12) for _ in some(responses))) for _ in some(questions)))
                 for _ in range(n_trees))


def flat(forest):
    """[(picture, question, response), ...] in the order in which pack numbers the responses"""
    return [(picture, question, response) for picture, tree in forest for question, responses in tree for response in responses]


def packed(model, forest, pixels):
    chat = model.chat
    return pack([chat.trunk_ids(model.n_image, picture) for picture, _ in forest],
                [[(chat.question_ids(question), [chat.response_ids(r) for r in responses]) for question, responses in tree] for _, tree in forest],
                pixels, chat.pad_id)


class Models:
    """A policy, a reference that stands apart from it, and the pixels of four pictures"""

    def __init__(self, policy, reference, pictures):
        self.policy, self.reference, self.pixels = policy, reference, policy.pixels(pictures)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += .05 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def models(make, pictures):
    """models(vision, llm) -> Models, made once"""
    return functools.lru_cache(maxsize=None)(lambda vision="siglip", llm="qwen2": Models(make(vision, llm), make(vision, llm), pictures))


def loss_of(forest, policy, reference, lengths):
    """(R,) log-probs -> the loss that such a forest trains: DPO for pairs, SFT's token mean for single answers, else GRPO's kind: fixed advantages"""
    per_question = {len(responses) for _, tree in forest for _, responses in tree}
    if per_question == {2}:
        return dpo_loss(policy[0::2], policy[1::2], reference[0::2], reference[1::2], BETA)[0].mean()
    if per_question == {1}:
        return -policy.sum() / sum(lengths)
    return -(torch.linspace(-1, 2, len(policy), dtype=policy.dtype) * (policy - reference)).mean()


def outcome(models, forest, logps_of):
    """What is compared: log-probs of policy and reference, the loss, and its gradient for every trained parameter and the pixels"""
    pixels = models.pixels.clone().requires_grad_(True)
    with torch.no_grad():
        reference = logps_of(models.reference, pixels)
    policy = logps_of(models.policy, pixels)
    loss = loss_of(forest, policy, reference, [len(models.policy.chat.response_ids(r)) for _, _, r in flat(forest)])
    names, leaves = zip(("pixels", pixels), *((n, p) for n, p in models.policy.named_parameters() if p.requires_grad))
    return policy.detach(), reference, loss.detach(), dict(zip(names, torch.autograd.grad(loss, leaves)))


@functools.lru_cache(maxsize=None)
def oracle(models, forest):
    """By MLLM.logps: row by row, all logits"""
    def logps_of(model, pixels):
        model.pixels = torch.cat  # so that a "picture" may be a tensor with a gradient
        try:
            picture, question, response = zip(*flat(forest))
            return model.logps([pixels[i:i + 1] for i in picture], question, response)
        finally:
            del model.pixels
    return outcome(models, forest, logps_of)


def by_trees(batch):
    """By token_logps, all in one batch"""
    def logps_of(model, pixels):
        batch.pixels = pixels
        return batch.per_response(model.token_logps(batch))
    return logps_of


def by_rows(forest):
    """By token_logps, each response in a pack of its own"""
    def logps_of(model, pixels):
        alone = [packed(model, ((0, ((question, (response,)),)),), pixels[i:i + 1]) for i, question, response in flat(forest)]
        return torch.cat([batch.per_response(model.token_logps(batch)) for batch in alone])
    return logps_of


@functools.lru_cache(maxsize=None)
def one_by_one(models, forest):
    return outcome(models, forest, by_rows(forest))


def is_key_bias(name):
    return name.startswith("vision") and name.endswith("k_proj.bias")


def same(models, forest, batch=None, fast=None, slack=1):
    """Raises AssertionError unless the forest in one batch gives what its responses give one by one.

    batch: altered by a test that plants a mistake; fast: models of equal weights that run it, compiled ones for instance"""
    batch = batch or packed(models.policy, forest, models.pixels)
    *found, found_gradients = outcome(fast or models, forest, by_trees(batch))
    for *expected, gradients in (oracle(models, forest), one_by_one(models, forest)):
        for name, a, b in zip(("policy", "reference", "loss"), found, expected, strict=True):
            close(a, b, rtol=slack * 1e-5, atol=0, msg=lambda m: f"{name}: {m}")
        assert found_gradients.keys() == gradients.keys()
        for name, b in gradients.items():
            # softmax does not see an encoder's key bias: its gradient is rounding noise, so the query bias gives the scale
            scale = gradients[name.replace("k_proj", "q_proj") if is_key_bias(name) else name].norm()
            error = float((found_gradients[name] - b).norm() / scale)
            assert error <= slack * 1e-5, f"gradient of {name}: off by {error:.1e} of its norm"


# ---- sameness ------------------------------------------------------------------------------------------------------------------

HAND = {  # what random trees may not contain
    "a pair": ((2, (("where ?", ("top left", "at the center")),)),),
    "one token each": ((2, (("where ?", ("", "")), ("what color ?", ("", "red")))),),
    "six questions": ((0, tuple((f"{word} ?", (f"a {word} ring", "blue")) for word in WORDS[:6])),),
    "SFT": ((0, (("where ?", ("top left",)), ("what color ?", ("red",)), ("describe", ("",)))), (3, (("where ?", ("center , left",)),))),
    "a group of five": ((1, (("describe", ("a red ring", "", "blue cross at top left", "red", "a red circle at center , blue")),)),),
    "a picture in two trees": ((1, (("where ?", ("left", "top")),)), (3, (("is it red ?", ("a", "ring")),)), (1, (("what ?", ("red", "blue")),))),
    "groups of one to four": ((2, (("where ?", ("left",)), ("what ?", ("a", "ring", "", "cross")))), (0, (("is it ?", ("red", "red", "blue")),))),
}
RANDOM = {  # seed, number of trees, least and most questions of a tree, least and most responses of a question
    "pairs": (0, 5, (1, 6), (2, 2)), "six questions": (1, 2, (6, 6), (2, 2)), "small trees and large ones": (1, 6, (1, 4), (2, 2)),
    "SFT": (2, 5, (1, 6), (1, 1)), "groups of five": (3, 4, (1, 3), (5, 5)), "groups of one to four": (5, 4, (1, 4), (1, 4)),
}


@pytest.mark.parametrize("name", HAND)
def test_trees_by_hand_are_separate_rows(name, models):
    same(models(), HAND[name])


@pytest.mark.parametrize("kind", RANDOM)
def test_random_trees_are_separate_rows(kind, models):
    # one-token responses among them, and (except where all have six questions) trees that share a row
    forest = random_forest(*RANDOM[kind])
    same(models(), forest)
    assert kind == "six questions" or len(packed(models().policy, forest, models().pixels).input_ids) < len(forest)
    assert any(response == "" for _, _, response in flat(forest))


@pytest.mark.parametrize("vision, llm", [(vision, list(LLM)[i % len(LLM)]) for i, vision in enumerate(VISION)])
def test_every_family_reads_trees(vision, llm, models):
    # each vision family once, each LLM at least twice
    same(models(vision, llm), random_forest(10, 3, (1, 3)))


def test_policy_and_reference_are_apart(models):
    # what makes the comparison mean something: no reward is near 0, the loss is far from log 2, every gradient is there
    forest = random_forest(0, 3)
    policy, reference, loss, gradients = oracle(models(), forest)
    assert (policy - reference).abs().median() > 1 and abs(float(loss) - math.log(2)) > .01
    assert all(g.abs().max() > 1e-5 for name, g in gradients.items() if not is_key_bias(name))
    asked = {picture for picture, _ in forest}
    assert len(asked) < 4 and [bool(g.any()) for g in gradients["pixels"]] == [i in asked for i in range(4)]


@pytest.mark.parametrize("grid", ["4x4", "2x4"])
def test_pooled_trees_are_separate_rows(grid, llm_dirs, pictures, tmp_path):
    # pool=2, for which the grid must be even: four image tokens of 4x4 patches, two of 2x4
    if grid == "4x4":
        make_encoder = lambda: SiglipVisionModel(SiglipVisionConfig(**{**HALF, "image_size": 32}))
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    else:
        make_encoder = lambda: Dinov2Model(Dinov2Config(**DINO))
        processor = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 16, "width": 32})
    torch.manual_seed(0)
    randomise(make_encoder(), .2).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    policy, reference = (MLLM.from_pretrained(str(tmp_path), llm_dirs["qwen2"], pool=2).eval() for _ in range(2))
    reference.load_state_dict(policy.state_dict())  # the connectors were drawn apart
    assert f"{policy.grid[0]}x{policy.grid[1]}" == grid and policy.n_image == policy.grid[0] * policy.grid[1] // 4
    same(Models(policy, reference, pictures), random_forest(11, 3))


def test_gradient_checkpointing_changes_nothing(models):
    # recomputed (two calls of an LLM layer for one forward and backward), and still the same
    plain = models()
    policy, calls = copy.deepcopy(plain.policy).train(), []
    policy.gradient_checkpointing()
    policy.llm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    fast = copy.copy(plain)
    fast.policy = policy
    same(plain, random_forest(0, 3), fast=fast)
    assert len(calls) == 2


@pytest.mark.parametrize("seed", range(3))
def test_equal_responses_carry_no_preference(seed, models):
    # chosen = rejected, policy and reference apart: twins differ by the last bits of log p at most, the loss is log 2 but for beta/2 of that and one
    # ulp of its own, and the gradient is nothing beside what either answer has alone
    m, forest = models(), tuple((i, tuple((q, (chosen, chosen)) for q, (chosen, _) in tree)) for i, tree in random_forest(seed, 3))
    batch = packed(m.policy, forest, m.pixels)
    with torch.no_grad():
        reference = batch.per_response(m.reference.token_logps(batch))
    policy = batch.per_response(m.policy.token_logps(batch))
    apart = [(x[0::2] - x[1::2]).detach().double().numpy() for x in (policy, reference)]
    for difference, x in zip(apart, (policy, reference)):
        assert (abs(difference) <= 4 * np.spacing(x[0::2].abs().detach().numpy())).all()
    losses, rewards, _ = dpo_loss(policy[0::2], policy[1::2], reference[0::2], reference[1::2], BETA)
    log_2 = np.float32(math.log(2))
    assert (abs(losses.detach().double().numpy() - log_2 + BETA / 2 * (apart[0] - apart[1])) <= 1.01 * np.spacing(log_2)).all()
    assert rewards.abs().max() > .1

    names, parameters = zip(*[(n, p) for n, p in m.policy.named_parameters() if p.requires_grad])
    paired = torch.autograd.grad(losses.mean(), parameters, retain_graph=True)
    unpaired = dict(zip(names, torch.autograd.grad(BETA / 2 * policy[0::2].mean(), parameters)))
    for name, gradient in zip(names, paired):
        assert gradient.norm() <= 1e-5 * unpaired[name.replace("k_proj", "q_proj") if is_key_bias(name) else name].norm(), name


def test_what_stands_in_the_padding_does_not_matter(models):
    # other tokens, image tokens even: the same bits
    m = models()
    batch = packed(m.policy, random_forest(*RANDOM["pairs"]), m.pixels)
    padding = (batch.positions == 0) & (batch.branch_end == torch.arange(batch.input_ids.shape[1]) + 1)
    assert padding.sum() > 20 and (batch.input_ids[padding] == m.policy.chat.pad_id).all()
    with torch.no_grad():
        before = m.policy.token_logps(batch)
        for other in (5, -3):
            batch.input_ids[padding] = other
            assert torch.equal(m.policy.token_logps(batch), before)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_the_order_of_trees_is_theirs(order, models):
    # trees given in another order: the same log-probs, in that order
    m = models()
    logps = lambda forest: [batch.per_response(m.policy.token_logps(batch)).detach() for batch in [packed(m.policy, forest, m.pixels)]][0]
    sizes = [sum(len(responses) for _, responses in tree) for _, tree in PLANTED]
    parts = logps(PLANTED).split(sizes)
    close(logps(tuple(PLANTED[t] for t in order)), torch.cat([parts[t] for t in order]), rtol=1e-5, atol=0)


def test_many_chunks_change_nothing(models, monkeypatch):
    # the whole path with seven tokens to a chunk
    monkeypatch.setattr(model_file, "CHUNK_LOGITS", 7 * len(models().policy.llm.lm_head.weight))
    same(models(), random_forest(*RANDOM["pairs"]))


@pytest.mark.skipif(not model_file.can_compile(), reason="torch.compile needs a C++ compiler and Python's headers")
def test_compiled_is_eager(models, monkeypatch):
    # --compile changes speed only, whatever the number of tokens in a chunk
    m, fast = models("clip", "llama"), copy.copy(models("clip", "llama"))
    fast.policy, fast.reference = copy.deepcopy(m.policy), copy.deepcopy(m.reference)
    fast.policy.compile_hot_path()
    fast.reference.chunk_functions = fast.policy.chunk_functions
    assert not set(fast.policy.chunk_functions) & set(EAGER)
    for tokens in (1000, 7):
        monkeypatch.setattr(model_file, "CHUNK_LOGITS", tokens * len(m.policy.llm.lm_head.weight))
        same(m, random_forest(12, 3, (1, 3)), fast=fast)


# ---- bf16 ----------------------------------------------------------------------------------------------------------------------


def autocast(run):
    def under_autocast(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return run(*args)
    return under_autocast


@pytest.mark.parametrize("vision, llm", [("siglip", "qwen2"), ("dinov2", "qwen3"), ("clip", "llama"), ("vit_mae", "smollm2")])
def test_bf16_trees_are_as_exact_as_bf16_rows(vision, llm, models):
    # autocast as on a GPU, measured by float64: errors of log-probs, log-ratios and the whole gradient, packed and row by row
    m, forest = models(vision, llm), random_forest(20, 4, (1, 4))
    exact = copy.copy(m)
    exact.policy, exact.reference, exact.pixels = copy.deepcopy(m.policy).double(), copy.deepcopy(m.reference).double(), m.pixels.double()
    trees, rows = by_trees(packed(m.policy, forest, m.pixels)), by_rows(forest)

    def vectors(policy, reference, loss, gradients):
        return policy, reference, policy - reference, torch.cat([g.flatten().double() for g in gradients.values()])
    truth = vectors(*oracle(exact, forest))
    fp32, packed_bf16, rows_bf16 = (vectors(*outcome(m, forest, logps_of)) for logps_of in (trees, autocast(trees), autocast(rows)))
    for t, *found in zip(truth, fp32, packed_bf16, rows_bf16, strict=True):
        exact_error, packed_error, row_error = (float((x - t).norm() / t.norm()) for x in found)
        assert packed_error <= 1.5 * row_error and exact_error <= row_error / 100


# ---- the hot path --------------------------------------------------------------------------------------------------------------


def by_log_softmax(hidden, weight, bias, targets):
    return F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def some(m, d, v, dtype=torch.float32, with_bias=True):
    """hidden (m,d), weight (v,d), bias (v,) that require gradients, and targets (m,)"""
    generator = torch.Generator().manual_seed(m)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.double).to(dtype).requires_grad_(True)
    return draw(m, d), draw(v, d), draw(v) if with_bias else None, torch.randint(v, (m,), generator=generator)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 49, 50, 3 * 50, 4 * 50 + 49, 11 * 50, 2**25])  # of V = 50: 1, 1, 1, 3, 4, 11 and all tokens at a time
def test_the_hot_path_is_log_softmax(chunk, with_bias, monkeypatch):
    # against float64: values, and the gradients of hidden states, weight and bias, in one chunk and in many with a last odd one
    monkeypatch.setattr(model_file, "CHUNK_LOGITS", chunk)
    hidden, weight, bias, targets = some(11, 16, 50, with_bias=with_bias)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    exact = [None if x is None else x.detach().double().requires_grad_(True) for x in (hidden, weight, bias)]
    coefficients = torch.linspace(-2, 3, 11)
    fast, slow = TokenLogps.apply(hidden, weight, bias, targets, EAGER), by_log_softmax(*exact, targets)
    close(fast.double(), slow, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad((fast * coefficients).sum(), leaves),
                    torch.autograd.grad((slow * coefficients).sum(), [x for x in exact if x is not None]), strict=True):
        close(a.double(), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(with_bias, monkeypatch):
    # torch's own check of every derivative by finite differences, in double, three chunks of two, two and one token
    monkeypatch.setattr(model_file, "CHUNK_LOGITS", 2 * 7)
    hidden, weight, bias, targets = some(5, 3, 7, torch.double, with_bias)
    assert torch.autograd.gradcheck(lambda *x: TokenLogps.apply(*x, *([] if with_bias else [None]), targets, EAGER),
                                    (hidden, weight, bias)[:2 + with_bias])


def test_extreme_logits_stay_finite():
    # logits of +-1e4: log-probs of 0 and -2e4, and a gradient of zeros and ones
    hidden, weight = torch.tensor([[1e4], [1e4]], requires_grad=True), torch.tensor([[1.], [-1.], [0.]], requires_grad=True)
    logps = TokenLogps.apply(hidden, weight, None, torch.tensor([0, 1]), EAGER)
    assert logps.tolist() == [0., -2e4]
    logps.sum().backward()
    assert hidden.grad.tolist() == [[0.], [-2.]] and weight.grad.tolist() == [[-1e4], [1e4], [0.]]


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias"), ("hidden", "weight")])
def test_what_is_frozen_costs_nothing(frozen, monkeypatch):
    # no gradient for a frozen input, the same bits for the others
    monkeypatch.setattr(model_file, "CHUNK_LOGITS", 3 * 50)
    names, (*inputs, targets) = ("hidden", "weight", "bias"), some(11, 16, 50)
    everything = torch.autograd.grad((TokenLogps.apply(*inputs, targets, EAGER) * torch.arange(11)).sum(), inputs)
    *inputs, targets = some(11, 16, 50)
    for name, x in zip(names, inputs):
        x.requires_grad_(name not in frozen)
    (TokenLogps.apply(*inputs, targets, EAGER) * torch.arange(11)).sum().backward()
    for name, x, expected in zip(names, inputs, everything):
        assert x.grad is None if name in frozen else torch.equal(x.grad, expected)


class Memory(TorchDispatchMode):
    """Watches every tensor that an operation makes: the largest, and how many elements of width V were alive at a time"""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.largest, self.alive, self.peak, self.calls = vocabulary, 0, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made, given = function(*args, **(kwargs or {})), {x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)}
        self.calls += 1
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:  # not a view, not in place
                self.largest = max(self.largest, x.numel())
                if x.ndim == 2 and x.shape[1] == self.vocabulary:
                    self.alive += x.numel()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(x, self.free, x.numel())
        return made

    def free(self, n):
        self.alive -= n


@pytest.mark.parametrize("tokens", [40, 400])
def test_memory_does_not_grow_with_the_tokens(tokens, monkeypatch):
    # V=1000, chunks of 8 tokens: no tensor is larger than a chunk, few chunks live at a time, no logits are kept for the backward pass
    chunk, saved = 8 * 1000, []
    monkeypatch.setattr(model_file, "CHUNK_LOGITS", chunk)
    hidden, weight, bias, targets = some(tokens, 4, 1000)
    with Memory(1000) as memory, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        logps = TokenLogps.apply(hidden, weight, bias, targets, EAGER)
        forward = memory.peak
        logps.sum().backward()
    assert memory.largest == chunk and memory.calls > tokens / 8 * 10  # every operation of both passes was seen
    assert forward == chunk and memory.peak <= 2 * chunk
    assert sorted(x.numel() for x in saved) == sorted([tokens * 4, 1000 * 4, 1000, tokens, tokens])  # what came in, and each token's logsumexp


@torch.no_grad()
def test_the_vocabulary_is_met_in_fp32(models):
    # under bf16 autocast the last hidden states are rough, but what follows them is exact: log-ratios are small differences of large sums
    m, hidden = models("clip", "llama"), []
    batch = packed(m.policy, random_forest(12, 3, (1, 3)), m.pixels)
    hook = m.policy.llm.model.register_forward_hook(lambda module, args, out: hidden.append(out.last_hidden_state))
    logps = autocast(m.policy.token_logps)(batch)
    hook.remove()
    assert not torch.equal(logps, m.policy.token_logps(batch))
    exact = by_log_softmax(hidden[0].flatten(0, 1)[batch.logit_at].double(), m.policy.llm.lm_head.weight.double(), None, batch.targets)
    assert logps.dtype == torch.float32
    close(logps.double(), exact, rtol=1e-6, atol=1e-5)


# ---- planted mistakes ------------------------------------------------------------------------------------------------------------

Response = namedtuple("Response", "number tree question last start end")


def responses_of(batch, n_trunk):
    """Where each response and its ancestors begin, as indices into S*T; a response follows its question or its elder sibling"""
    found, positions = [], batch.positions.flatten()
    for number in range(batch.n_responses):
        mine = batch.response_of == number
        last = int(batch.logit_at[mine][0])
        start = found[-1].end if found and found[-1].last == last else last + 1
        tree = int((positions[:last + 1] == 0).nonzero()[-1])
        found.append(Response(number, tree, last + 1 - (int(positions[last]) - n_trunk + 1), last, start, start + int(mine.sum())))
    return found


def no_reset(batch, responses, tree_end):
    for r in responses:  # positions simply go on
        batch.positions.view(-1)[r.tree:r.end] = torch.arange(r.end - r.tree)


def no_reset_of_rejected(batch, responses, tree_end):
    for r in responses[1::2]:
        batch.positions.view(-1)[r.start:r.end] += r.start - r.last - 1


def rejected_sees_chosen(batch, responses, tree_end):
    for r in responses[0::2]:
        batch.branch_end.view(-1)[r.start:r.end] = batch.branch_end.view(-1)[r.last]


def later_questions_see_rejected(batch, responses, tree_end):
    for r in responses[1::2]:
        batch.branch_end.view(-1)[r.start:r.end] = tree_end(r)


def later_questions_see_earlier_ones(batch, responses, tree_end):
    for r in responses:
        batch.branch_end.view(-1)[r.question:r.last + 1] = tree_end(r)


def a_tree_sees_its_neighbour(batch, responses, tree_end):
    for r in responses:
        batch.branch_end.view(-1)[r.tree:r.question] = batch.input_ids.shape[1]


def rejected_starts_from_chosen(batch, responses, tree_end):
    for r in responses[1::2]:
        batch.logit_at[(batch.response_of == r.number).nonzero()[0]] = r.start - 1


def no_shift(batch, responses, tree_end):
    for r in responses:
        batch.logit_at[batch.response_of == r.number] = torch.arange(r.start, r.end)


def rejected_does_not_see_the_question(batch, responses, tree_end):
    for r in responses[0::2]:
        batch.branch_end.view(-1)[r.question:r.last + 1] = batch.branch_end.view(-1)[r.start]


def only_causal(batch, responses, tree_end):
    batch.branch_end[:] = batch.input_ids.shape[1]


def everything_in_sight(batch, responses, tree_end):
    visible = batch.visible()
    batch.visible = lambda: visible | visible.transpose(-1, -2)  # also what comes later


def chosen_and_rejected_swapped(batch, responses, tree_end):
    batch.response_of ^= 1


def the_next_picture(batch, responses, tree_end):
    image = batch.input_ids < 0
    batch.input_ids[image] = -1 - (-1 - batch.input_ids[image] + 9) % 36


MISTAKES = [no_reset, no_reset_of_rejected, rejected_sees_chosen, later_questions_see_rejected, later_questions_see_earlier_ones,
            a_tree_sees_its_neighbour, rejected_starts_from_chosen, no_shift, rejected_does_not_see_the_question, only_causal,
            everything_in_sight, chosen_and_rejected_swapped, the_next_picture]
PLANTED = ((0, tuple((f"{word} is it ?", (f"{word} a ring", "blue")) for word in WORDS[:5])),
           (2, (("where is the ring ?", ("at top left", "at the center of it")), ("what color ?", ("red", "blue cross")))),
           (1, (("what ?", ("a circle", "a")),)))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_noticed(mistake, models):
    # by the comparison of all tests above, also if it were a hundred times as lenient
    m = models()
    batch = packed(m.policy, PLANTED, m.pixels)
    responses, ids = responses_of(batch, len(m.policy.chat.trunk_ids(m.policy.n_image))), batch.input_ids.flatten()
    for r, (_, question, response) in zip(responses, flat(PLANTED), strict=True):  # they are planted where they belong
        assert ids[r.question:r.last + 1].tolist() == m.policy.chat.question_ids(question)
        assert ids[r.start:r.end].tolist() == m.policy.chat.response_ids(response)
    assert len(batch.input_ids) == 2 < len(PLANTED)
    ends = {r.number: int(batch.branch_end.view(-1)[r.tree]) for r in responses}
    mistake(batch, responses, lambda r: ends[r.number])
    with pytest.raises(AssertionError):
        same(m, PLANTED, batch, slack=100)


@pytest.mark.parametrize("llm", LLM)
def test_a_dropped_mask_is_noticed(llm, models, monkeypatch):
    # without a mask transformers takes positions that begin again for documents of their own
    m = models(llm=llm)
    monkeypatch.setattr(model_file, "attention_mask", lambda visible: None)
    with pytest.raises(AssertionError):
        same(m, PLANTED, slack=100)


@pytest.mark.parametrize("llm", LLM)
def test_without_a_mistake_it_passes(llm, models):
    same(models(llm=llm), PLANTED)


def test_the_hot_path_is_fp32_wherever_backward_is_called():
    # gradient maps ask for gradients inside autocast, training outside: the same numbers, in fp32
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True), torch.randint(40, (9,))

    def gradients(inside):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                total = model_file.TokenLogps.apply(hidden, weight, None, targets, (model_file.chunk_logps, model_file.chunk_logits_gradient)).sum()
            if inside:
                return torch.autograd.grad(total, (hidden, weight))
        return torch.autograd.grad(total, (hidden, weight))
    for a, b in zip(gradients(inside=True), gradients(inside=False), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
