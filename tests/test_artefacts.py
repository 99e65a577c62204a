"""The export against transformers' own LLaVA, opened as anybody opens it; `ask` against generate, its maps against autograd by hand."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (AutoProcessor, AutoTokenizer, BitImageProcessor, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer,
                          LlavaForConditionalGeneration, PhiConfig, PhiForCausalLM, pipeline)

import artefacts
import model as model_file
from conftest import LLAMA2, LLM, TOKENIZERS, VISION, WORDS, make_tokenizer, randomise
from model import MLLM, SYSTEM, InputError
from rows import Rows

QUESTIONS = ["what color is the ring?", "where?", " describe the picture. ", "what shape is at the top left\nof the <image>?"]
LENGTH = 24  # tokens of an answer


def turn(picture, question):
    """A question as a user of any server asks it"""
    return {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}


def slow_logits(model, picture, question):
    """-> prompt ids with image tokens as negative numbers, logits (T,V) of the plain path"""
    ids = model.chat.prompt_ids(question, model.n_image)
    return ids, model.llm(inputs_embeds=model.splice(torch.tensor([ids]), model.image_tokens(model.pixels([picture])))).logits[0]


def fingerprint(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def exported(model, tmp_path):
    """Saves and exports a model -> the export's LLaVA, its processor; run/ and exported/ are in tmp_path, and nothing else"""
    model.save(tmp_path / "run")
    before = fingerprint(tmp_path / "run")
    artefacts.export(str(tmp_path / "run"), str(tmp_path / "exported"))
    assert fingerprint(tmp_path / "run") == before and sorted(os.listdir(tmp_path)) == ["exported", "run"]
    llava, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(found.values()), found  # no weight is missing and none is left over, a pooler that nothing reads included
    return llava.eval(), AutoProcessor.from_pretrained(tmp_path / "exported")


def assert_same(model, llava, processor, pictures, folder):
    """Prompt ids, logits and greedy answers of the run, by transformers' own processor, forward pass and pipeline"""
    for picture, question in zip(pictures, QUESTIONS):
        ids, logits = slow_logits(model, picture, question)
        inputs = processor.apply_chat_template([turn(picture, question)], add_generation_prompt=True, tokenize=True, return_dict=True,
                                               return_tensors="pt")
        image_id = llava.config.image_token_id
        assert inputs["input_ids"][0].tolist() == [image_id if i < 0 else i for i in ids] and image_id not in ids
        torch.testing.assert_close(llava(**inputs).logits[0, :, :logits.shape[1]], logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    assert llava.config.image_seq_length == model.n_image
    pipe = pipeline("image-text-to-text", model=folder, device="cpu")
    served = [pipe(text=[turn(picture, question)], max_new_tokens=LENGTH, return_full_text=False)[0]["generated_text"].strip()
              for picture, question in zip(pictures, QUESTIONS)]
    assert served == model.generate(pictures, QUESTIONS, max_new_tokens=LENGTH) and len(set(served)) > 1


EXPORTED = [(vision, "qwen2", -2) for vision in VISION if vision != "dinov2_with_registers"] + \
    [("siglip", llm, -2) for llm in LLM if llm != "qwen2"] + \
    [("siglip", "qwen3", 3), ("clip", "llama", -1), ("vit", "smollm2", 1), ("dinov2", "llama", -1)]  # the last layers end before the final norm


@pytest.mark.parametrize("vision, llm, layer", EXPORTED)
@torch.no_grad()
def test_an_export_reads_and_answers_as_its_run(vision, llm, layer, make, pictures, tmp_path, capsys):
    model = make(vision, llm, layer)
    llava, processor = exported(model, tmp_path)
    assert ("vllm serve" in capsys.readouterr().out) == vision.startswith(("siglip", "clip"))
    assert_same(model, llava, processor, pictures, tmp_path / "exported")


def wide(vision_dirs, folder):
    """The tiny DINOv2 with a processor that crops to 16 x 24"""
    shutil.copytree(vision_dirs["dinov2"], folder, dirs_exist_ok=True)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 16, "width": 24}).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_an_export_of_crops_that_are_not_square(vision_dirs, llm_dirs, pictures, tmp_path_factory, tmp_path):
    # 2 x 3 patches: their order, and their number in the prompt
    model = MLLM.from_pretrained(wide(vision_dirs, tmp_path_factory.mktemp("wide")), llm_dirs["llama"]).eval()
    assert model.grid == (2, 3)
    llava, processor = exported(model, tmp_path)
    assert_same(model, llava, processor, pictures, tmp_path / "exported")


@torch.no_grad()
def test_a_linear_connector_is_held_exactly(vision_dirs, llm_dirs, pictures, tmp_path, capsys):
    model = MLLM.from_pretrained(vision_dirs["siglip"], llm_dirs["qwen2"], hidden=0).eval()
    llava, processor = exported(model, tmp_path)
    assert "vllm" not in capsys.readouterr().out  # it has no linear activation
    assert_same(model, llava, processor, pictures, tmp_path / "exported")


def llama2_tokenizer():
    """As Llama-2's: sentencepiece, so that a text gets a space in front, and encoding adds a BOS that the template writes too"""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    bpe.train_from_iterator(WORDS + ["[/INST] <<SYS>>"], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    bpe = json.loads(bpe.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=bpe["vocab"], merges=[tuple(merge) for merge in bpe["merges"]], add_bos_token=True)
    tokenizer.chat_template = LLAMA2
    return tokenizer


def other_llm(name, folder, spare=7, tie=False):
    """Writes a tiny Llama with the tokenizer of that name and `spare` rows more than it has tokens"""
    tokenizer = llama2_tokenizer() if name == "llama2" else make_tokenizer(name)
    torch.manual_seed(0)
    randomise(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + spare, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                           num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie)), .25).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tokenizer, spare", [("chatml", 7), ("chatml", 0), ("llama3", 0), ("llama2", 7)])
@torch.no_grad()
def test_image_token_leaves_the_vocabulary_alone(tokenizer, spare, tie, vision_dirs, pictures, tmp_path_factory, tmp_path):
    # a spare row serves as it is; without one the table grows by a row that is never the largest logit, and all others stay
    model = MLLM.from_pretrained(vision_dirs["siglip"], other_llm(tokenizer, tmp_path_factory.mktemp("llm"), spare, tie)).eval()
    llava, processor = exported(model, tmp_path)
    assert_same(model, llava, processor, pictures, tmp_path / "exported")
    rows, old = llava.get_input_embeddings().weight, model.llm.get_input_embeddings().weight
    n, length = len(old), len(model.tokenizer)
    assert (llava.lm_head.weight is rows) == llava.config.tie_word_embeddings == tie and llava.config.image_token_id == length == n - spare
    assert len(rows) == llava.config.text_config.vocab_size == n + (spare == 0) and torch.equal(rows[:n], old)
    if spare == 0:
        logits = llava(**processor(images=pictures[0], text="<image> what?", return_tensors="pt")).logits[0]
        torch.testing.assert_close(logits[:, n], logits[:, :n].mean(-1), rtol=1e-4, atol=1e-4)


# ---- the prompt ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_template_renders_what_the_original_renders(name):
    # several turns, with and without a system turn, as texts and as parts; thinking stays off, whoever asks for it
    original, tokenizer = make_tokenizer(name), make_tokenizer(name)
    tokenizer.add_tokens("<image>", special_tokens=True)
    tokenizer.chat_template = artefacts.chat_template(tokenizer)
    rendered = lambda turns, **more: tokenizer.apply_chat_template(turns, tokenize=False, **more)
    expected = lambda turns, **more: original.apply_chat_template(turns, tokenize=False, enable_thinking=False, **more)
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    talk = [("user", "<image>\nwhat is at the top?"), ("assistant", "a ring"), ("user", "  what color?"), ("assistant", "'red' {{}}"), ("user", "?")]
    first, *rest = [{"role": role, "content": words} for role, words in talk]
    in_parts = [{"role": role, "content": [text(words[:3]), text(words[3:])]} for role, words in talk[1:]]
    asked = [[image, text("what is at the top?")], [text("what is "), image, text("at the top?")], "what is <image>at the top? ",
             [text("what is at the top?\n"), {"type": "image_url", "image_url": {"url": "x.png"}}],
             [image, text("<image>what is at the top?")], [text("<image> what is at the top?")]]
    default, own = {"role": "system", "content": SYSTEM}, {"role": "system", "content": "You are a pirate."}
    for more in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
        for content in asked:
            for others in (rest, in_parts):
                turns = [{"role": "user", "content": content}, *others]
                assert rendered(turns, **more) == rendered(turns, enable_thinking=True, **more) == expected([default, first, *rest], **more)
                assert rendered([own, *turns], **more) == expected([own, first, *rest], **more)
    words = {"role": "user", "content": " no picture "}  # left as it is
    assert rendered([words]) == expected([default, words])
    assert "<image><image>\nwhich?" in rendered([{"role": "user", "content": [image, image, text("which?")]}])


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen3"])
def test_the_rendered_text_encodes_to_the_same_prompt(name, vision_dirs, pictures, tmp_path_factory, tmp_path):
    # as lmms-eval does it: text from the template, which writes the BOS, through a processor that must not add a second one
    model = MLLM.from_pretrained(vision_dirs["siglip"], other_llm(name, tmp_path_factory.mktemp("llm"))).eval()
    llava, processor = exported(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    image_id = llava.config.image_token_id
    expected = [image_id if i < 0 else i for i in model.chat.prompt_ids("what color?", model.n_image)]
    parts = turn(None, "what color?")["content"]
    for renders, content in ((processor, parts), (tokenizer, parts), (tokenizer, "<image>\nwhat color?"), (tokenizer, "what color? <image>")):
        text = renders.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        assert np.array(processor(images=pictures[0], text=text)["input_ids"]).ravel().tolist() == expected
    assert tokenizer.special_tokens_map == model.tokenizer.special_tokens_map
    assert tokenizer.decode([image_id], skip_special_tokens=True) == ""


@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_generation_is_greedy_and_ends_where_ours_ends(llm, make, tmp_path):
    # of the instruct model's own defaults (conftest: sampling, a repetition penalty) nothing is left
    model = make(llm=llm)
    exported(model, tmp_path)
    settings = GenerationConfig.from_pretrained(tmp_path / "exported").to_diff_dict()
    settings.pop("transformers_version")
    assert settings == {"eos_token_id": model.chat.stop_ids, "pad_token_id": model.chat.pad_id}


def test_weights_have_the_names_of_the_hubs_llavas(make, tmp_path):
    # which vLLM and earlier transformers look for, whatever the names inside this transformers are
    from safetensors import safe_open
    exported(make("siglip", "llama"), tmp_path)
    with safe_open(tmp_path / "exported/model.safetensors", "pt") as weights:
        names = {name.replace("layers.0", "layers.N").rpartition(".layers.N")[0] or name for name in weights.keys()}
    assert {"vision_tower.vision_model.encoder", "vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.linear_1.weight",
            "language_model.model", "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= names


# ---- refusals --------------------------------------------------------------------------------------------------------------


def biased(vision_dirs, folder):
    """A model whose LLM has a head with a bias: Phi's"""
    tokenizer = make_tokenizer("chatml")
    PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                             num_attention_heads=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return MLLM.from_pretrained(vision_dirs["siglip"], str(folder))


REFUSED = {"folds 3x3 patches.*--pool 1": lambda make, *_: make(pool=3),
           "registers.*train with an encoder": lambda make, *_: make("dinov2_with_registers"),
           "connector is 8 wide.*LLM's 32.*--connector_from": lambda make, v, l, _: MLLM.from_pretrained(v["siglip"], l["qwen2"], hidden=8),
           "has a bias.*another LLM": lambda make, v, l, folder: biased(v, folder)}


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["model.py", *map(str, words)])
    artefacts.main()


@pytest.mark.parametrize("reason", REFUSED)
def test_what_llava_cannot_hold_is_refused(reason, make, vision_dirs, llm_dirs, tmp_path_factory, tmp_path, monkeypatch):
    # one line with the reason and what to do, and nothing on the disk
    REFUSED[reason](make, vision_dirs, llm_dirs, tmp_path_factory.mktemp("llm")).save(tmp_path / "run")
    before = fingerprint(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{reason}[^\n]*$"):
        command(monkeypatch, "export", tmp_path / "run", tmp_path / "exported")
    assert fingerprint(tmp_path) == before and os.listdir(tmp_path) == ["run"]


def test_an_existing_folder_and_a_missing_run_are_refused(start_run, tmp_path):
    # through the real command line, once: model.py is then in memory twice
    (tmp_path / "taken").mkdir()
    script = os.path.join(os.path.dirname(model_file.__file__), "model.py")
    done = subprocess.run([sys.executable, script, "export", start_run, "taken"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: taken exists already; remove it or choose another name\n"
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        artefacts.export(str(tmp_path / "taken"), str(tmp_path / "exported"))
    assert os.listdir(tmp_path) == ["taken"] and os.listdir(tmp_path / "taken") == []


def test_an_export_checks_itself(start_run, tmp_path, monkeypatch):
    # whatever goes wrong in writing, a folder that does not read as the run does is not left behind
    write, template = artefacts.write_llava, artefacts.chat_template

    def with_a_bug(model, folder):
        model.connector.up.weight.data[0] += .1
        write(model, folder)
    monkeypatch.setattr(artefacts, "write_llava", with_a_bug)
    with pytest.raises(InputError, match="logits are not this run's"):
        artefacts.export(start_run, str(tmp_path / "exported"))
    monkeypatch.setattr(artefacts, "write_llava", write)
    monkeypatch.setattr(artefacts, "chat_template", lambda tokenizer: template(tokenizer).replace("helpful", "helpless"))
    with pytest.raises(InputError, match="^[^\n]*does not write this run's prompt[^\n]*$"):
        artefacts.export(start_run, str(tmp_path / "exported"))
    assert os.listdir(tmp_path) == []


# ---- ask -------------------------------------------------------------------------------------------------------------------


def map_by_hand(model, picture, question, answer):
    """|d log p(answer, end of turn) / d image token|, summed over channels, as a plain loop over all logits: (N,)"""
    prompt, response = model.chat.prompt_ids(question, model.n_image), model.chat.response_ids(answer)
    head, embed = prompt.index(-1), model.llm.get_input_embeddings()
    tokens = model.connector(model.features(model.pixels([picture])), model.grid)[0].detach().requires_grad_()
    words = embed(torch.tensor(prompt[head + model.n_image:] + response))
    logps = F.log_softmax(model.llm(inputs_embeds=torch.cat([embed(torch.tensor(prompt[:head])), tokens, words])[None]).logits[0], -1)
    total = sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response))
    return torch.autograd.grad(total, tokens)[0].abs().sum(-1).numpy()


@pytest.mark.parametrize("vision, llm, pool", [("siglip", "qwen2", 1), ("clip", "llama", 1), ("dinov2_with_registers", "qwen3", 1),
                                               ("vit", "smollm2", 3)])
def test_the_map_is_the_gradient_of_the_answer(vision, llm, pool, make, pictures):
    model = make(vision, llm, pool=pool)
    for picture, answer in zip(pictures, ("red", "at the bottom right, below a blue ring", "")):  # an empty answer still ends its turn
        found = artefacts.answer_map(model, picture, QUESTIONS[0], answer)
        expected = map_by_hand(model, picture, QUESTIONS[0], answer)
        assert found.shape == (3 // pool, 3 // pool) and expected.min() > 0
        np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4)


def test_the_map_has_the_rows_and_columns_of_the_picture(vision_dirs, llm_dirs, pictures, tmp_path):
    # 2 x 3 patches: the gradient at a token is drawn where its patch is
    model = MLLM.from_pretrained(wide(vision_dirs, tmp_path), llm_dirs["qwen2"]).eval()
    found = artefacts.answer_map(model, pictures[2], QUESTIONS[0], "ring")
    np.testing.assert_allclose(found, map_by_hand(model, pictures[2], QUESTIONS[0], "ring").reshape(2, 3), rtol=1e-4)
    pixels, size = artefacts.seen(model, pictures[2])
    assert pixels.shape == (16, 24, 3) and tuple(size) == (24, 16)


@pytest.mark.parametrize("vision", ["siglip", "clip", "dinov2", "vit"])
def test_the_picture_is_drawn_as_the_encoder_saw_it(vision, make, pictures):
    # pixels without mean and deviation; a crop keeps its shape, a squashed picture gets its own back
    model = make(vision)
    for picture in pictures:
        pixels, size = artefacts.seen(model, picture)
        mean, std = torch.tensor(model.image_processor.image_mean), torch.tensor(model.image_processor.image_std)
        np.testing.assert_allclose(pixels, model.pixels([picture])[0].permute(1, 2, 0) * std + mean, atol=1e-5)
        assert tuple(size) == ((24, 24) if vision in ("clip", "dinov2") else picture.size)


@pytest.mark.filterwarnings("ignore:Glyph")  # what random models say
def test_ask_says_what_generate_says_and_draws_it(make, pictures, tmp_path, monkeypatch, capsys):
    # a line and a panel a run, each with its own answer and its own map
    asked = {"one": make(), "two": make("clip", "llama")}
    for name, model in asked.items():
        model.save(tmp_path / name)
    pictures[2].save(tmp_path / "picture.png")
    drawn, save = [], artefacts.figures.save
    monkeypatch.setattr(artefacts.figures, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    answers = {name: model.generate([pictures[2]], [QUESTIONS[0]], max_new_tokens=9)[0] for name, model in asked.items()}
    lines = [f"{name}: {' '.join(answer.split())}" for name, answer in answers.items()]
    where = (tmp_path / "one", tmp_path / "two", tmp_path / "picture.png", QUESTIONS[0])
    command(monkeypatch, "ask", *where, "--max_new_tokens", 9)
    assert capsys.readouterr().out.splitlines() == lines and not drawn
    command(monkeypatch, "ask", *where, "--max_new_tokens", 9, "--map", tmp_path / "map.png")
    assert capsys.readouterr().out.splitlines() == [*lines, f"wrote {tmp_path}/map.png"]
    assert len(drawn[0].axes) == 3 and np.array(Image.open(tmp_path / "map.png")).std() > 10
    for axis, (name, model), line, size in zip(drawn[0].axes[1:], asked.items(), lines, (pictures[2].size, (24, 24)), strict=True):
        picture, heat = axis.images
        gradient = map_by_hand(model, pictures[2], QUESTIONS[0], answers[name]).reshape(3, 3)
        np.testing.assert_allclose(heat.get_array(), gradient / gradient.max(), rtol=1e-3)
        assert picture.get_array().shape == (24, 24, 3) and picture.get_extent() == heat.get_extent() == [0, size[0], size[1], 0]
        assert axis.get_title().replace("\n", " ").split() == line.split()


def test_one_run_is_asked_and_strange_answers_are_drawn(start_run, pictures, tmp_path, monkeypatch, capsys):
    # an answer that says nothing, one with dollar signs that is no formula, one that is too long for a title
    pictures[0].save(tmp_path / "picture.png")
    save, heights = artefacts.figures.save, []
    monkeypatch.setattr(artefacts.figures, "save", lambda figure, path: (save(figure, path), heights.append(figure.axes[0].get_position().height)))
    for answer, shown in (("", "(empty: the turn ends at once)"), ("$\\frac\n\n{$", "$\\frac {$"), ("word " * 99, ("word " * 99).strip())):
        monkeypatch.setattr(MLLM, "generate", lambda *args: [answer])
        artefacts.ask([start_run], str(tmp_path / "picture.png"), "$\\frac$?", str(tmp_path / "map.png"))
        assert capsys.readouterr().out.splitlines()[0] == f"start: {shown}"
    assert min(heights) > .7 and not matplotlib.pyplot.get_fignums()


def test_a_photo_is_asked_the_right_way_up(start_run, pictures, tmp_path, monkeypatch):
    # a telephone stores how it was held: training turns the picture (rows.py), and so does ask
    seen, exif = [], Image.Exif()
    exif[0x0112] = 6                                                                    # held upright, stored lying
    pictures[1].save(tmp_path / "phone.png", exif=exif)
    monkeypatch.setattr(model_file.MLLM, "generate", lambda self, images, *_: seen.extend(images) or ["a"])
    artefacts.ask([start_run], str(tmp_path / "phone.png"), "what?")
    trained = Rows("own", [{"image": str(tmp_path / "phone.png"), "question": "what?", "answer": "a"}], "sft")[0]["image"]
    assert seen[0].size == trained.size == pictures[1].size[::-1] and np.array_equal(seen[0], trained)


def test_what_cannot_be_asked_is_one_line(start_run, pictures, tmp_path, monkeypatch, capsys):
    pictures[0].save(tmp_path / "picture.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "picture.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    picture, shop = tmp_path / "picture.png", tmp_path / "shop"
    shop.mkdir()
    for reason, words in {"its picture is missing: .*missing.png": (start_run, tmp_path / "missing.png", "?"),
                          "its picture cannot be read: .*broken.png": (start_run, tmp_path / "broken.png", "?"),
                          "its picture cannot be read: .*text.png": (start_run, tmp_path / "text.png", "?"),
                          "shop is not a run directory": (start_run, shop, picture, "?"),
                          "start is named twice": (start_run, start_run, picture, "?"),
                          "--map .*: must be a .png file in a folder that exists": (start_run, picture, "?", "--map", tmp_path / "none/map.png"),
                          "--map map.jpg: must": (start_run, picture, "?", "--map", "map.jpg")}.items():
        with pytest.raises(SystemExit, match=f"^error: [^\n]*{reason}[^\n]*$"):
            command(monkeypatch, "ask", *words)
