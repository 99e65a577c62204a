"""The model against transformers' own forward pass and against slow code that is obviously right (packing and hot path: test_trees.py)."""
import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (AutoModel, CLIPModel, CLIPVisionModel, Dinov2Model, Dinov2WithRegistersModel, LlamaConfig, LlamaForCausalLM,
                          MistralConfig, MistralForCausalLM, MptConfig, MptForCausalLM, Qwen2Config, Qwen2ForCausalLM, RwkvConfig, RwkvForCausalLM,
                          SiglipModel, SiglipVisionModel, ViTForImageClassification, ViTMAEModel, ViTModel)

from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 asks for torchvision one level up

import model as model_file
from conftest import LLM, VISION, randomise
from model import MLLM, Connector
from trees import pack

close = lambda a, b, rtol=1e-5, atol=1e-5: torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
QUESTIONS = ["what color is the ring?", "where?", "describe the picture.", "what shape is at the top left of the picture?"]
ANSWERS = ["red", "at the bottom right, below a blue ring", "red ring at top left, blue cross at center", "ring"]


def own_hidden_states(name, folder, pixels, **more):
    """All hidden states (layers + 1) of a checkpoint by the class that transformers made for it, and the number of special tokens"""
    if name == "vit_mae":  # unmasked, in order
        mae = ViTMAEModel.from_pretrained(folder, mask_ratio=0.0).eval()
        n = (pixels.shape[-1] // 8)**2
        noise = torch.arange(float(n)).expand(len(pixels), n)
        return mae(pixels, noise=noise, output_hidden_states=True, **more).hidden_states, 1
    load, n_special = {"siglip": (SiglipVisionModel.from_pretrained, 0),
                       "siglip_full": (lambda f: SiglipModel.from_pretrained(f).vision_model, 0),
                       "clip": (CLIPVisionModel.from_pretrained, 1),
                       "clip_full": (lambda f: CLIPModel.from_pretrained(f).vision_model, 1),
                       "dinov2": (Dinov2Model.from_pretrained, 1),
                       "dinov2_with_registers": (Dinov2WithRegistersModel.from_pretrained, 5),
                       "vit": (lambda f: ViTForImageClassification.from_pretrained(f).vit, 1),
                       "vit_pooler": (ViTModel.from_pretrained, 1)}[name]
    return load(folder).eval()(pixels, output_hidden_states=True, **more).hidden_states, n_special


# ---- seeing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_features_are_transformers_hidden_states(name, make, vision_dirs, pictures):
    # features = hidden_states[feature_layer] of the unshortened checkpoint, patch tokens only, of the checkpoint's own preprocessing
    pixels = AutoImageProcessor.from_pretrained(vision_dirs[name])(pictures, return_tensors="pt")["pixel_values"]
    hidden_states, n_special = own_hidden_states(name, vision_dirs[name], pixels)
    for layer in (-2, -1, 1):
        model = make(name, feature_layer=layer)
        assert torch.equal(model.pixels(pictures), pixels)
        features = model.features(pixels)
        assert features.shape == (4, 9, 16) and model.n_image == 9 and model.grid == (3, 3)
        close(features, hidden_states[layer][:, n_special:])
    assert not torch.allclose(features, hidden_states[-2][:, n_special:], atol=.1)  # the layers do differ


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_another_picture_size_interpolates_positions(name, vision_dirs, llm_dirs, pictures, tmp_path):
    # 40 and 16 pixels instead of 24: the features of transformers' own interpolation; the run and the exported encoder need no flag for it
    dino = name.startswith("dinov2")
    for size in (40, 16):
        square, grid = {"height": size, "width": size}, size // 8
        sizes = dict(size={"shortest_edge": size}, crop_size=square) if dino or name.startswith("clip") else dict(size=square)
        pixels = AutoImageProcessor.from_pretrained(vision_dirs[name], **sizes)(pictures, return_tensors="pt")["pixel_values"]
        hidden_states, n_special = own_hidden_states(name, vision_dirs[name], pixels, **({} if dino else {"interpolate_pos_encoding": True}))
        model = MLLM.from_pretrained(vision_dirs[name], llm_dirs["qwen2"], image_size=size).eval()
        assert torch.equal(model.pixels(pictures), pixels) and model.grid == (grid, grid) and model.n_image == grid**2
        close(model.features(pixels), hidden_states[-2][:, n_special:])
        model.save(tmp_path / f"run{size}")
        loaded = MLLM.load(tmp_path / f"run{size}").eval()
        assert torch.equal(loaded.features(loaded.pixels(pictures)), model.features(pixels))
        exported = AutoModel.from_pretrained(tmp_path / f"run{size}/vision").eval()
        pixels = AutoImageProcessor.from_pretrained(tmp_path / f"run{size}/vision")(pictures, return_tensors="pt")["pixel_values"]
        close(exported(pixels, output_hidden_states=True).hidden_states[-2][:, n_special:], model.features(pixels))
    with pytest.raises(model_file.InputError, match="--image_size 20 is not a multiple of 8"):
        MLLM.from_pretrained(vision_dirs[name], llm_dirs["qwen2"], image_size=20)


def test_a_processor_that_does_not_fit_is_refused(vision_dirs, tmp_path):
    # pictures of another size than the encoder's: said before anything is trained, with the flag that helps
    for name in ("siglip", "clip", "vit"):
        vision, image_processor = model_file.open_vision(vision_dirs[name])
        settings = image_processor.to_dict()
        settings["crop_size" if name == "clip" else "size"] = {"height": 16, "width": 16}
        with pytest.raises(model_file.InputError, match="16x16 pixels and the vision encoder reads 24x24; for another size train_sft.py has --image_size"):
            model_file.Encoder(vision, type(image_processor)(**settings))


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_no_dropout_while_training(name, make, pictures):
    # the configs of these models ask for dropout; the policy must nevertheless start equal to its reference
    model = make(name)
    pixels = model.pixels(pictures)
    expected = model.features(pixels)
    close(model.train().features(pixels), expected)


@torch.no_grad()
def test_no_dropout_in_the_llm_while_training(make, pictures):
    # the same for the LLM
    for llm in LLM:
        model = make(llm=llm)
        expected = model.logps(pictures, QUESTIONS, ANSWERS)
        close(model.train().logps(pictures, QUESTIONS, ANSWERS), expected)


@torch.no_grad()
def test_pixels_move_the_logps(make, pictures):
    # another picture, another log-probability: the LLM looks
    model = make()
    same_question = [model.logps([picture], QUESTIONS[:1], ANSWERS[2:3]).item() for picture in pictures]
    assert min(abs(a - b) for i, a in enumerate(same_question) for b in same_question[:i]) > 1e-2


def test_every_pixel_has_a_gradient(make, pictures):
    # no patch is lost on the way from the picture to the loss
    model = make()
    pixels = model.pixels(pictures[:1]).requires_grad_(True)
    batch = pack([model.chat.trunk_ids(9)], [[(model.chat.question_ids("what?"), [model.chat.response_ids("a ring")])]], pixels, model.chat.pad_id)
    gradient, = torch.autograd.grad(model.token_logps(batch).sum(), pixels)
    assert (gradient.abs() > 0).float().mean() > .99


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (6, 4)])
def test_pool_2_folds_neighbouring_patches(grid):
    # the einops pattern against a double loop over 2x2 blocks, on square and other grids
    torch.manual_seed(0)
    connector, features = Connector(5, 7, pool=2), torch.randn(3, grid[0] * grid[1], 5)
    patches, tokens = features.view(3, *grid, 5), []
    for row in range(0, grid[0], 2):
        for column in range(0, grid[1], 2):
            block = [patches[:, row + r, column + c] for r in (0, 1) for c in (0, 1)]
            tokens.append(connector.down(F.gelu(connector.up(torch.cat(block, -1)))))
    close(connector(features, grid), torch.stack(tokens, 1), 1e-6, 1e-6)


def test_pool_1_is_two_linear_layers():
    # LLaVA's mlp2x_gelu, token by token
    connector, features = Connector(5, 7), torch.randn(3, 6, 5)
    close(connector(features, (2, 3)), connector.down(F.gelu(connector.up(features))), 1e-6, 1e-6)


def test_what_cannot_be_built_says_why(make, vision_dirs, llm_dirs, tmp_path):
    # each impossible combination is one ValueError of one line that names the number, the type or the folder
    with pytest.raises(ValueError, match=r"pool 2 .* 3x3"):
        make(pool=2)
    for layer in (0, -4, 4):
        with pytest.raises(ValueError, match=f"feature_layer {layer}.* 3 layers"):
            make(feature_layer=layer)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'llama' are not supported.*clip.*dinov2.*siglip.*vit"):
        MLLM.from_pretrained(str(tmp_path), llm_dirs["qwen2"])
    for vision, llm in ((vision_dirs["siglip"], "/no/such/llm"), ("/no/such/vision", llm_dirs["qwen2"]), ("nobody/nothing", llm_dirs["qwen2"])):
        with pytest.raises(ValueError, match=r"^\S*no\S* cannot be opened: [^\n]+$"):
            MLLM.from_pretrained(vision, llm)


@pytest.mark.parametrize("model_class, config_class, extra, reason", [
    (Qwen2ForCausalLM, Qwen2Config, dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "look back a limited way"),  # one layer
    (MistralForCausalLM, MistralConfig, dict(sliding_window=8), "look back a limited way"),  # every layer, and its config lists none
    (MptForCausalLM, MptConfig, dict(), "'mpt' cannot read trees"),  # ALiBi: counts columns itself
    (RwkvForCausalLM, RwkvConfig, dict(), "'rwkv' cannot read trees"),  # recurrent: reads all that came before
])
def test_an_llm_that_cannot_read_a_tree_is_refused(model_class, config_class, extra, reason, vision_dirs, tokenizers, tmp_path):
    # opened as a user opens it: one line with the reason, before anything is trained
    torch.manual_seed(0)
    tokenizer, heads = tokenizers["chatml"], {} if model_class is RwkvForCausalLM else dict(num_attention_heads=4)
    llm = model_class(config_class(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, **heads, **extra))
    randomise(llm, .25).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(model_file.InputError, match=f"^[^\n]*{reason}[^\n]*$"):
        MLLM.from_pretrained(vision_dirs["siglip"], str(tmp_path))


def test_a_coarse_matmul_is_no_reason_to_refuse(make, monkeypatch):
    # --matmul medium is bf16 on some chips: what is compared at opening is computed exactly, and the setting is as before
    seen, linear = [], F.linear

    def watch(*args):
        seen.append(torch.get_float32_matmul_precision())
        return linear(*args)
    monkeypatch.setattr(F, "linear", watch)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    make()
    assert seen and set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision(before)


def test_a_window_that_is_switched_off_is_no_reason_to_refuse(vision_dirs, tokenizers, tmp_path):
    # Qwen2.5's own config has a window and says not to use it; Mistral v0.3's has none
    for model_class, config_class, extra in ((Qwen2ForCausalLM, Qwen2Config, dict(use_sliding_window=False, sliding_window=8)),
                                             (MistralForCausalLM, MistralConfig, dict(sliding_window=None))):
        folder = str(tmp_path / model_class.__name__)
        model_class(config_class(vocab_size=len(tokenizers["chatml"]), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, **extra)).save_pretrained(folder)
        tokenizers["chatml"].save_pretrained(folder)
        assert MLLM.from_pretrained(vision_dirs["siglip"], folder).n_image == 9


# ---- in and out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_an_exported_encoder_is_whole(name, make, vision_dirs, pictures, tmp_path):
    # run/vision opens in transformers and gives our features at the same layer; trained weights are saved, the unused tail comes along untouched
    model = make(name)
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("vision.")}
    for parameter in model.vision.parameters():
        parameter.mul_(1.1)
    features = model.features(model.pixels(pictures))
    model.save(tmp_path / "run")

    exported = AutoModel.from_pretrained(tmp_path / "run/vision").eval()
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "run/vision")(pictures, return_tensors="pt")["pixel_values"]
    close(exported(pixels, output_hidden_states=True).hidden_states[-2][:, model.n_special:], features)
    close(model.features(pixels), features, 0, 0)  # saving changed nothing in the model at hand

    family = model_file.VISION_FAMILIES[model.vision.config.model_type][0]
    whole = family.from_pretrained(vision_dirs[name], **({"add_pooling_layer": False} if family is ViTModel else {})).state_dict()
    saved = family.from_pretrained(tmp_path / "run/vision", **({"add_pooling_layer": False} if family is ViTModel else {})).state_dict()
    assert saved.keys() == whole.keys() and len(load_file(tmp_path / "run/vision/model.safetensors")) == len(whole)
    trained = [k for k in whole if torch.equal(saved[k], whole[k] * 1.1)]
    tail = [k for k in whole if torch.equal(saved[k], whole[k])]
    assert len(trained) == len(before) and len(trained) + len(tail) == len(whole)
    assert any("layers.2." in k or "layer.2." in k for k in tail) and any("norm" in k for k in tail)


@pytest.mark.parametrize("llm", LLM)
@torch.no_grad()
def test_a_saved_run_loads_to_identical_logps(llm, make, pictures, tmp_path):
    # every weight bit for bit, and so every log-probability
    model = make("clip", llm, feature_layer=2)
    model.save(tmp_path / "run", {"note": "kept"})
    loaded = MLLM.load(tmp_path / "run").eval()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert torch.equal(model.logps(pictures, QUESTIONS, ANSWERS), loaded.logps(pictures, QUESTIONS, ANSWERS))
    assert sorted(os.listdir(tmp_path)) == ["run"] and "kept" in (tmp_path / "run/config.json").read_text()


@torch.no_grad()
def test_weights_in_pieces(make, vision_dirs, llm_dirs, pictures, tmp_path):
    # large models come as several safetensors files and an index: the same model
    whole = make("clip", "llama")
    for part, folders in (("vision", vision_dirs["clip"]), ("llm", llm_dirs["llama"])):
        shutil.copytree(folders, tmp_path / part)
        os.remove(tmp_path / part / "model.safetensors")
        loaded = (CLIPVisionModel if part == "vision" else LlamaForCausalLM).from_pretrained(folders)
        loaded.save_pretrained(tmp_path / part, max_shard_size="20KB")
        assert len([file for file in os.listdir(tmp_path / part) if file.startswith("model-")]) > 1
    torch.manual_seed(0)
    pieces = MLLM.from_pretrained(str(tmp_path / "vision"), str(tmp_path / "llm"), -2).eval()
    assert torch.equal(whole.logps(pictures, QUESTIONS, ANSWERS), pieces.logps(pictures, QUESTIONS, ANSWERS))


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(vision_dirs, llm_dirs, tokenizers, tmp_path):
    # a vocabulary larger than the tokenizer is usual (all LLMs of these tests have one); the other way round is somebody else's tokenizer
    shutil.copytree(llm_dirs["qwen2"], tmp_path / "llm")
    larger = copy.deepcopy(tokenizers["chatml"])
    larger.add_tokens([f"<extra{i}>" for i in range(8)])  # 7 rows are spare
    larger.save_pretrained(tmp_path / "llm")
    with pytest.raises(model_file.InputError, match=f"the tokenizer has {len(larger)} tokens and the LLM rows for {len(larger) - 1}"):
        MLLM.from_pretrained(vision_dirs["siglip"], str(tmp_path / "llm"))


def test_save_is_all_or_nothing(make, tmp_path, monkeypatch):
    # an existing directory is refused, and a save that fails half way leaves no trace
    model = make()
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken"):
        model.save(tmp_path / "taken")
    write = MLLM.write

    def full_disk(*args):
        write(*args)
        raise OSError("disk full")
    monkeypatch.setattr(MLLM, "write", full_disk)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "run")
    assert os.listdir(tmp_path) == ["taken"] and os.listdir(tmp_path / "taken") == []


def test_load_says_what_is_wrong(tmp_path):
    # a folder that is no run, and a run of another format
    with pytest.raises(FileNotFoundError, match="no config.json"):
        MLLM.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        MLLM.load(tmp_path)


# ---- reading ---------------------------------------------------------------------------------------------------------------


def by_hand(model, picture, question, answer):
    """Embeddings of one row put together by concatenation, its ids (placeholders as -100), and where the response starts"""
    head = model.chat._ids(model.chat.head)
    rest = model.chat._ids("\n" + question + model.chat.middle)
    response = model.chat._ids(model.chat.lead + answer + model.chat.tail)
    embed = model.llm.get_input_embeddings()
    tokens = model.connector(model.features(model.pixels([picture])), model.grid)[0]
    embeds = torch.cat([embed(torch.tensor(head)), tokens, embed(torch.tensor(rest + response))])[None]
    return embeds, head + [-100] * len(tokens) + rest + response, len(head) + len(tokens) + len(rest)


@pytest.mark.parametrize("llm", LLM)
@torch.no_grad()
def test_logps_are_a_naive_sum_and_transformers_own_loss(llm, make, pictures):
    # the slow path against a per-token loop over all logits, and against the loss that transformers computes from labels
    model = make(llm=llm)
    logps = model.logps(pictures, QUESTIONS, ANSWERS)
    for logp, picture, question, answer in zip(logps, pictures, QUESTIONS, ANSWERS):
        embeds, ids, start = by_hand(model, picture, question, answer)
        logits = model.llm(inputs_embeds=embeds).logits[0].double()
        naive = sum(float(logits[t - 1, ids[t]] - logits[t - 1].exp().sum().log()) for t in range(start, len(ids)))
        close(logp.double(), torch.tensor(naive, dtype=torch.double))
        labels = torch.tensor([[-100] * start + ids[start:]])
        close(logp, -model.llm(inputs_embeds=embeds, labels=labels).loss * (len(ids) - start))


def batch_of(model, pictures):
    """Four responses of different length: two to one question about the first picture, one to each of two questions about the second"""
    a, b, c, d = map(model.chat.response_ids, ANSWERS)
    ask = model.chat.question_ids
    trees = [[(ask(QUESTIONS[0]), [a, b])], [(ask(QUESTIONS[2]), [c]), (ask(QUESTIONS[3]), [d])]]
    return pack([model.chat.trunk_ids(model.n_image, i) for i in range(2)], trees, model.pixels(pictures[:2]), model.chat.pad_id)


def rows_of(pictures):
    """The same four as (picture, question, answer), each by itself"""
    return list(zip([pictures[0]] * 2 + [pictures[1]] * 2, [QUESTIONS[0]] * 2 + QUESTIONS[2:], ANSWERS))


@pytest.mark.parametrize("vision, llm", [("siglip", "qwen2"), ("dinov2_with_registers", "qwen3"), ("clip", "llama"), ("vit_mae", "smollm2")])
def test_the_fast_path_is_the_slow_path(vision, llm, make, pictures):
    # token_logps of packed trees = logps row by row: every token, every sum, and the gradient of every parameter
    model, weights = make(vision, llm), torch.tensor([1., -2., .5, 3.])
    batch = batch_of(model, pictures)
    assert batch.input_ids.shape[1] < sum(len(model.chat.prompt_ids(q, 9)) for _, q, _ in rows_of(pictures)) / 2  # pictures are not repeated
    tokens = model.token_logps(batch)
    naive = []
    for row in rows_of(pictures):
        embeds, ids, start = by_hand(model, *row)
        logps = model.llm(inputs_embeds=embeds).logits[0].log_softmax(-1)
        naive += [logps[t - 1, ids[t]] for t in range(start, len(ids))]
    assert tokens.dtype == torch.float32 and tokens.shape == (len(naive),)  # in the order of the responses
    close(tokens, torch.stack(naive))
    fast, slow = batch.per_response(tokens), model.logps(*zip(*rows_of(pictures)))
    close(fast, slow)

    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    fast_gradients = torch.autograd.grad((fast * weights).sum(), parameters)
    slow_gradients = torch.autograd.grad((slow * weights).sum(), parameters)
    for name, a, b in zip(names, fast_gradients, slow_gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, float(b.abs().max())), msg=lambda m: f"{name}: {m}")
        assert "k_proj.bias" in name or "key.bias" in name or b.abs().max() > 1e-4, name  # softmax ignores the key bias, all else counts


@pytest.mark.parametrize("llm", LLM)
@torch.no_grad()
def test_padding_changes_nothing(llm, make, pictures):
    # a tree alone = the same tree beside longer ones, whatever stands in the padding
    model = make(llm=llm)
    trunk, pixels, pad_id = model.chat.trunk_ids, model.pixels(pictures), model.chat.pad_id
    trees = [[(model.chat.question_ids(q), [model.chat.response_ids(a)])] for q, a in zip(QUESTIONS, ANSWERS)]
    padded = pack([trunk(9, i) for i in range(4)], trees, pixels, pad_id)
    sizes = sorted((len(trunk(9)) + len(question) + len(answer) for ((question, (answer,)),) in trees), reverse=True)  # a row each, the largest first
    assert padded.input_ids.shape == (4, sizes[0]) and len(set(sizes)) > 2
    together = model.token_logps(padded)
    for ids, n in zip(padded.input_ids, sizes):
        assert n == sizes[0] or set(ids[n:].tolist()) == {pad_id}
        ids[n:] = 5
    close(model.token_logps(padded), together, 0, 0)
    alone = [model.token_logps(pack([trunk(9)], [tree], pixels[i:i + 1], pad_id)) for i, tree in enumerate(trees)]
    close(together, torch.cat(alone))


def test_gradients_reach_given_image_tokens(make, pictures):
    # image_tokens may be handed in: same values, and a gradient for each token
    model = make()
    batch = batch_of(model, pictures)
    tokens = model.image_tokens(batch.pixels).detach().requires_grad_(True)
    logps = model.token_logps(batch, tokens)
    close(logps, model.token_logps(batch))
    gradient, = torch.autograd.grad(logps.sum(), tokens)
    assert gradient.shape == (2, 9, 32) and (gradient.norm(dim=-1) > 0).all()


def test_splice_puts_each_image_token_where_it_is_named(make):
    # against a loop over all places: any picture, any order, twice or not at all; a number beyond the last one is an error, never another token
    model = make()
    tokens, ids = torch.randn(2, 9, 32), torch.tensor([[1, -1, -2, 2, -18, 7], [-10, 3, -9, -9, 1, 4]])
    words, flat = model.llm.get_input_embeddings().weight, tokens.flatten(0, 1)
    expected = [[flat[-1 - i] if i < 0 else words[i] for i in row] for row in ids.tolist()]
    assert torch.equal(model.splice(ids, tokens), torch.stack([torch.stack(row) for row in expected]))
    with pytest.raises(IndexError):
        model.splice(torch.tensor([[1, -19]]), tokens)


def test_gradient_checkpointing_recomputes_every_layer(make, pictures):
    # each layer of both parts runs twice (forward, and again for the backward pass), and no gradient changes
    def gradients_and_calls(model):
        batch, calls = batch_of(model, pictures), {}
        for name, mlp in model.named_modules():
            if name.endswith(".mlp"):  # one in each layer
                mlp.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
        return torch.autograd.grad(model.train().token_logps(batch).sum(), [p for p in model.parameters() if p.requires_grad]), calls
    plain, calls = gradients_and_calls(make())
    assert list(calls.values()) == [1] * 4  # two of the encoder's three layers, two of the LLM
    model = make()
    model.gradient_checkpointing()
    checkpointed, calls = gradients_and_calls(model)
    assert list(calls.values()) == [2] * 4
    for a, b in zip(plain, checkpointed, strict=True):
        close(a, b)


@torch.no_grad()
def test_bf16_is_near_fp32(make, pictures):
    # autocast as on a GPU: fp32 out, every token's log-probability within bf16's own error
    model = make()
    batch = batch_of(model, pictures)
    exact = model.token_logps(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.token_logps(batch)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    close(rough, exact, rtol=.05, atol=.1)


@pytest.mark.parametrize("llm", LLM)
@torch.no_grad()
def test_generate_is_argmax_of_full_forwards(llm, make, pictures):
    # KV cache, left padding and batching change nothing; the defaults that an instruct model ships (sampling, penalties) do not apply
    model = make(llm=llm)

    def argmax_loop(picture, question, stop, n=10):
        embeds, _, start = by_hand(model, picture, question, "")
        embeds, ids = embeds[:, :start], []
        while len(ids) < n and (not ids or ids[-1] not in stop):
            ids.append(int(model.llm(inputs_embeds=embeds).logits[0, -1].argmax()))
            embeds = torch.cat([embeds, model.llm.get_input_embeddings()(torch.tensor([[ids[-1]]]))], 1)
        return ids
    decode = lambda ids: model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    slow = [argmax_loop(p, q, model.chat.stop_ids) for p, q in zip(pictures, QUESTIONS)]
    assert len({tuple(ids) for ids in slow}) > 1
    assert model.generate(pictures, QUESTIONS, max_new_tokens=10) == [decode(ids) for ids in slow]
    model.chat.stop_ids = [slow[0][2]]  # make the first row end early, the others go on
    slow = [argmax_loop(p, q, model.chat.stop_ids) for p, q in zip(pictures, QUESTIONS)]
    assert len(slow[0]) <= 3 < max(map(len, slow))
    model.chat.pad_id = model.tokenizer.convert_tokens_to_ids(LLM_PAD[llm])
    assert model.generate(pictures, QUESTIONS, max_new_tokens=10) == [decode(ids) for ids in slow]


LLM_PAD = {"qwen2": "<|endoftext|>", "qwen3": "<|endoftext|>", "llama": "<|end_of_text|>", "smollm2": "<|im_end|>"}


@torch.no_grad()
def test_sampling_follows_temperature(make, pictures):
    # near zero it is greedy, at one it varies with the seed and repeats with it
    model = make()
    greedy = model.generate(pictures, QUESTIONS, max_new_tokens=6)
    assert model.generate(pictures, QUESTIONS, max_new_tokens=6, temperature=1e-4) == greedy
    sample = lambda seed: (torch.manual_seed(seed), model.generate(pictures, QUESTIONS, max_new_tokens=6, temperature=1.0))[1]
    assert sample(0) == sample(0) != sample(1)
