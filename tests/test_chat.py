"""Chat text: what is prompt, what is response, found for every template without knowing it."""
import pytest
import torch

from conftest import TOKENIZERS
from model import SYSTEM, Chat
from trees import pack

END = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": " </s>"}
QUESTION, ANSWER = "what color is the ring?", "It is red,\nas far as I see."
parametrize = pytest.mark.parametrize("name", TOKENIZERS)


def conversation(question, answer=None):
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return turns + [{"role": "assistant", "content": answer}] if answer else turns


def as_text(tokenizer, ids):
    """ids -> text, the image tokens 0, 1, ... of picture 0, each once and in order, as one <image>"""
    first, n = ids.index(-1), sum(i < 0 for i in ids)
    assert ids[first:first + n] == [-1 - i for i in range(n)]
    return tokenizer.decode(ids[:first]) + "<image>" + tokenizer.decode(ids[first + n:])


@parametrize
def test_prompt_and_response_are_the_template(name, tokenizers):
    # prompt + response = the template's own text of the whole conversation, and the prompt = its generation prompt, picture first
    tokenizer, chat = tokenizers[name], Chat(tokenizers[name])
    prompt, response = chat.prompt_ids(QUESTION, 4), chat.response_ids(ANSWER)
    render = lambda turns, **kw: tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **kw)
    assert sum(i < 0 for i in prompt) == 4 and min(response) >= 0
    assert as_text(tokenizer, prompt + response) == render(conversation("<image>\n" + QUESTION, ANSWER)).rstrip()
    generation = render(conversation("<image>\n" + QUESTION), add_generation_prompt=True)
    assert as_text(tokenizer, prompt) == generation
    assert (generation.count("<think>") == 1) == (name == "qwen3")  # enable_thinking=False has reached the template


@parametrize
def test_prompt_ids_are_those_of_the_template(name, tokenizers):
    # the ids themselves, cut only at the picture: special tokens are special, one BOS where the family has one
    tokenizer, chat = tokenizers[name], Chat(tokenizers[name])
    text = tokenizer.apply_chat_template(conversation("<image>\n" + QUESTION), tokenize=False, enable_thinking=False, add_generation_prompt=True)
    before, after = text.split("<image>")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat.prompt_ids(QUESTION, 2) == ids(before) + [-1, -2] + ids(after)
    assert chat.prompt_ids(QUESTION, 2, 3) == ids(before) + [-7, -8] + ids(after)  # pictures 0, 1 and 2 have the six image tokens before
    assert chat.trunk_ids(2, 3) + chat.question_ids(QUESTION) == chat.prompt_ids(QUESTION, 2, 3)
    if name.startswith("llama"):
        assert chat.prompt_ids(QUESTION, 2).count(tokenizer.bos_token_id) == 1


@parametrize
def test_the_loss_is_on_answer_and_end_of_turn(name, tokenizers):
    # decoded, the loss-bearing tokens are the answer and the token that ends the turn; generation stops at that token
    tokenizer, chat = tokenizers[name], Chat(tokenizers[name])
    tree = [(chat.question_ids(QUESTION), [chat.response_ids(answer) for answer in (ANSWER, "  no \n")])]
    batch = pack([chat.trunk_ids(3)], [tree], torch.zeros(1, 3, 2, 2), chat.pad_id)
    bear_loss = [batch.targets[batch.response_of == r] for r in range(2)]
    assert [tokenizer.decode(ids).removeprefix(chat.lead) for ids in bear_loss] == [ANSWER + END[name], "no" + END[name]]
    for ids in bear_loss:
        last = int(ids[-1])
        assert last in chat.stop_ids and tokenizer.decode([last]) == END[name].strip()
    assert tokenizer.eos_token_id in chat.stop_ids
    # no prompt, picture or padding among them: each is predicted from the whole prompt and what its own answer has said so far, and nothing else
    at = 0
    for r, response in enumerate(tree[0][1]):
        for n, token in enumerate(response):
            seen = batch.input_ids[0, batch.visible()[0, 0, batch.logit_at[at]]].tolist()
            assert (seen, int(batch.targets[at])) == (chat.prompt_ids(QUESTION, 3) + response[:n], token) and batch.response_of[at] == r
            at += 1
    assert at == len(batch.targets) == len(batch.logit_at)


@parametrize
def test_no_marker_leaks(name, tokenizers):
    # the words by which the template was taken apart are in no text and no ids, not even for an empty question
    chat = Chat(tokenizers[name])
    text = chat.head + chat.middle + chat.lead + chat.tail
    decoded = as_text(tokenizers[name], chat.prompt_ids("", 1) + chat.response_ids("x"))
    assert not any(word in text + decoded for word in ("MARKER", "QUESTION", "ANSWER"))


def test_the_system_turn_is_ours(tokenizers):
    # a template with a default system message shows ours instead, exactly once
    for name in ("smollm2", "chatml", "qwen3"):
        chat = Chat(tokenizers[name])
        assert chat.head.count("system") == 1 and SYSTEM in chat.head and "SmolLM" not in chat.head


def test_an_image_tag_in_a_question_is_removed(tokenizers):
    # some data sets write the tag, before or after the question: the place of the picture is ours
    chat = Chat(tokenizers["chatml"])
    expected = chat.prompt_ids(QUESTION, 4)
    assert chat.prompt_ids("<image>\n" + QUESTION, 4) == chat.prompt_ids(QUESTION + "\n<image>", 4) == expected


@pytest.mark.parametrize("template", [
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages[0].content }}",
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", None])
def test_a_template_that_cannot_be_used_says_so(template, tokenizers):
    # no system turn (Gemma), no assistant turn, no template at all: one ValueError with the reason
    tokenizer = type(tokenizers["chatml"])(tokenizer_object=tokenizers["chatml"].backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template cannot render a system, a user and an assistant turn: .+"):
        Chat(tokenizer)
