"""Chat text: what is prompt, what is response, found for every template without knowing it."""
import pytest
import torch

from conftest import TOKENIZERS
from model import IMAGE, SYSTEM, Chat, pad_rows

END = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": " </s>"}
QUESTION, ANSWER = "what color is the ring?", "It is red,\nas far as I see."
parametrize = pytest.mark.parametrize("name", TOKENIZERS)


def conversation(question, answer=None):
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return turns + [{"role": "assistant", "content": answer}] if answer else turns


def as_text(tokenizer, ids):
    """ids -> text, each run of placeholders as one <image>"""
    n = ids.count(IMAGE)
    first = ids.index(IMAGE)
    assert ids[first:first + n] == [IMAGE] * n
    return tokenizer.decode(ids[:first]) + "<image>" + tokenizer.decode(ids[first + n:])


@parametrize
def test_prompt_and_response_are_the_template(name, tokenizers):
    # prompt + response = the template's own text of the whole conversation, and the prompt = its generation prompt, picture first
    tokenizer, chat = tokenizers[name], Chat(tokenizers[name])
    prompt, response = chat.prompt_ids(QUESTION, 4), chat.response_ids(ANSWER)
    render = lambda turns, **kw: tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **kw)
    assert prompt.count(IMAGE) == 4
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
    assert chat.prompt_ids(QUESTION, 2) == ids(before) + [IMAGE] * 2 + ids(after)
    if name.startswith("llama"):
        assert chat.prompt_ids(QUESTION, 2).count(tokenizer.bos_token_id) == 1


@parametrize
def test_the_loss_is_on_answer_and_end_of_turn(name, tokenizers):
    # decoded, the loss-bearing tokens are the answer and the token that ends the turn; generation stops at that token
    tokenizer, chat = tokenizers[name], Chat(tokenizers[name])
    rows = [(chat.prompt_ids(QUESTION, 3), chat.response_ids(answer)) for answer in (ANSWER, "  no \n")]
    batch = pad_rows(rows, torch.zeros(1, 3, 2, 2), [0, 0], chat.pad_id)
    bear_loss = [tokenizer.decode(ids[mask]).removeprefix(chat.lead) for ids, mask in zip(batch.input_ids, batch.response_mask)]
    assert bear_loss == [ANSWER + END[name], "no" + END[name]]
    for ids, mask in zip(batch.input_ids, batch.response_mask):
        last = int(ids[mask][-1])
        assert last in chat.stop_ids and tokenizer.decode([last]) == END[name].strip()
    assert tokenizer.eos_token_id in chat.stop_ids
    assert not batch.response_mask[batch.attention_mask == 0].any() and not batch.response_mask[batch.input_ids == IMAGE].any()


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
