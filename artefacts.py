"""
A trained run outside of this repository, as a LLaVA folder that other programs serve, and in the terminal.

    python model.py export runs/dpo exported        for transformers' pipeline, lmms-eval and (SigLIP, CLIP) vLLM
    python model.py ask runs/sft runs/dpo ring.png "what color is the ring?" --map map.png
                                                    what each run answers, and where in the picture its gradient lies

With `--pool 1` our model is LLaVA's to the last weight, so an export is a change of names and nothing is approximated:
encoder, connector and LLM become `vision_tower`, `multi_modal_projector` and `language_model`, and a chat template
writes the very prompt of training. What LLaVA cannot hold is refused. The folder is opened once more before it gets
its name, and must read a picture as the run does.
"""
import argparse
import json
import os
import textwrap

import numpy as np
import torch
import torch.nn as nn
from einops import reduce
from PIL import Image
from transformers import (AutoProcessor, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                          ViTModel)
from transformers.models.vit.modeling_vit import ViTPooler

import common
import figures
from model import MLLM, SYSTEM, InputError, swap
from rows import open_picture
from trees import pack

parser = argparse.ArgumentParser(allow_abbrev=False, prog="model.py", description=__doc__,
                                 formatter_class=common.Help)
commands = parser.add_subparsers(required=True, metavar="export | ask")
flags = commands.add_parser("export", formatter_class=common.Help,
                            help="write a run as a folder that transformers, vLLM and lmms-eval open")
flags.set_defaults(command=lambda args: export(args.run, args.folder))
flags.add_argument("run", help="run directory")
flags.add_argument("folder", help="folder to write; must not exist")
flags = commands.add_parser("ask", formatter_class=common.Help,
                            help="ask one or several runs a question about a picture")
flags.set_defaults(command=lambda args: ask(args.runs, args.picture, args.question, args.map, args.max_new_tokens))
flags.add_argument("runs", nargs="+", metavar="run", help="run directories")
flags.add_argument("picture", help="picture file")
flags.add_argument("question", help="the question, in quotation marks")
flags.add_argument("--map", metavar="FILE.png",
                   help="draw where the gradient of the log-probability of each run's own answer lies, "
                        "brightest at the image token where it is largest; each run has a scale of its own")
flags.add_argument("--max_new_tokens", type=common.positive, default=64, help="longest answer in tokens")

# ---- export ----------------------------------------------------------------------------------------------------------

IMAGE = "<image>"
# Stands before the tokenizer's own chat template, which knows only texts, and makes of any conversation what training
# makes of a record: a system turn first, no thinking, every turn one text, in it the pictures before the words. Where a
# list of parts or a tag in the text has a picture does not matter, as in Chat.question_ids.
PRELUDE = """\
{%- set enable_thinking = false %}
{%- set turns = namespace(all=[]) %}
{%- if messages[0].role != 'system' %}
    {%- set turns.all = [{'role': 'system', 'content': SYSTEM}] %}
{%- endif %}
{%- for message in messages %}
    {%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content %}
    {%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}
    {%- set pictures = parts | rejectattr('type', 'equalto', 'text') | list | length or text.count('<image>') %}
    {%- if pictures %}
        {%- set text = '<image>' * pictures + GAP + text.replace('<image>', '').strip() %}
    {%- endif %}
    {%- set turns.all = turns.all + [dict(message, content=text)] %}
{%- endfor %}
{%- set messages = turns.all %}
"""


def export(run, out):
    """Writes `run` as a LLaVA folder, in fp32: whole, and equal to the run, or not at all."""
    if os.path.exists(out):
        raise InputError(f"{out} exists already; remove it or choose another name")
    common.setup(0, "highest")
    model = MLLM.load(run).eval()
    reason = misfit(model)
    if reason:
        raise InputError(f"{run} cannot be a LLaVA folder: {reason}")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    question = "What is in the picture?"
    with torch.no_grad(), common.whole_folder(out) as folder:
        ids = torch.tensor([model.chat.prompt_ids(question, model.n_image)])
        logits = model.llm(inputs_embeds=model.splice(ids, model.image_tokens(model.pixels([picture])))).logits
        write_llava(model, folder)  # takes the model apart
        check(folder, picture, question, ids, logits)
    vllm = is_contrastive(model.vision) and model.connector.down is not None  # no other tower, no linear connector
    print(f'wrote {out}: serve it with pipeline("image-text-to-text", model="{out}")' + f" or vllm serve {out}" * vllm)


def is_contrastive(vision):
    """SigLIP or CLIP?"""
    return vision.config.model_type.startswith(("siglip", "clip"))


def misfit(model):
    """What LLaVA has no place for in this model, and what to do; None if it fits"""
    hidden, width = len(model.connector.up.weight), model.llm.get_input_embeddings().weight.shape[1]
    if model.pool != 1:
        return f"it folds {model.pool}x{model.pool} patches into a token, LLaVA gives each its own; train with --pool 1"
    if model.n_special > 1:
        return "LLaVA would take its encoder's registers for patches; train with an encoder that has none"
    if hidden != width:
        return f"its connector is {hidden} wide inside, LLaVA's has the LLM's {width}; train without --connector_from"
    if model.llm.get_output_embeddings().bias is not None:
        return "the head of its LLM has a bias, LLaVA's has none; train with another LLM"
    return None


def add_image_token(model):
    """Gives the tokenizer its <image>, and the LLM a row for it if it has none to spare. -> the token's id"""
    model.tokenizer.add_tokens(IMAGE, special_tokens=True)
    image_id, n = model.tokenizer.convert_tokens_to_ids(IMAGE), model.llm.get_input_embeddings().num_embeddings
    if image_id >= n:
        model.llm.resize_token_embeddings(image_id + 1, mean_resizing=False)
        for table in (model.llm.get_input_embeddings(), model.llm.get_output_embeddings()):
            table.weight[n:] = table.weight[:n].mean(0)  # a mean of all logits is never the largest: nobody says it
    return image_id


def write_llava(model, folder):
    """Writes weights, configs, tokenizer, image processor and chat template. The model cannot be used any more."""
    swap(model.vision, model.vision_tail)  # whole again: LLaVA reads hidden_states[feature_layer] of the whole encoder
    if isinstance(model.vision, ViTModel):
        model.vision.pooler = ViTPooler(model.vision.config)  # ours has none, LLaVA's does; nothing reads it
    up, down, act = model.connector.up, model.connector.down, "gelu"
    if down is None:  # one layer: the second is the identity
        down, act = nn.Linear(up.out_features, up.out_features), "linear"
        nn.init.eye_(down.weight)
        nn.init.zeros_(down.bias)
    image_id = add_image_token(model)
    strategy = "default" if model.n_special else "full"  # LLaVA's words for all tokens but the first, and for all

    config = LlavaConfig(vision_config=model.vision.config, text_config=model.llm.config, image_token_index=image_id,
                         image_seq_length=model.n_image, projector_hidden_act=act, multimodal_projector_bias=True,
                         vision_feature_layer=model.feature_layer, vision_feature_select_strategy=strategy,
                         tie_word_embeddings=model.llm.config.tie_word_embeddings)
    with torch.device("meta"):  # a frame without weights, for ours
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower, llava.model.language_model = model.vision, model.llm.base_model
    llava.model.multi_modal_projector.linear_1, llava.model.multi_modal_projector.linear_2 = up, down
    llava.lm_head = model.llm.get_output_embeddings()
    llava.generation_config = GenerationConfig(eos_token_id=model.chat.stop_ids, pad_token_id=model.chat.pad_id)
    weights = llava.state_dict()
    if is_contrastive(model.vision):  # names of the hub's LLaVAs, which vLLM asks for
        weights = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
    llava.save_pretrained(folder, state_dict=weights)

    model.tokenizer.add_bos_token = False  # the template writes it, and some programs encode what it wrote
    model.tokenizer.chat_template = chat_template(model.tokenizer)
    LlavaProcessor(model.image_processor, model.tokenizer, patch_size=model.vision.config.patch_size,
                   vision_feature_select_strategy=strategy,
                   num_additional_image_tokens=model.n_special).save_pretrained(folder)


def chat_template(tokenizer):
    """PRELUDE and the tokenizer's own template.

    Training encodes what follows the picture as a text of its own, and Llama-2's tokenizer puts a space before a text.
    Here it is only the end of one, so that the space has to be written. (The tokenizer must know <image> by now.)"""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    gap = "\n" if encode(IMAGE + "\n")[1:] == encode("\n") else " \n"
    return PRELUDE.replace("SYSTEM", json.dumps(SYSTEM)).replace("GAP", json.dumps(gap)) + tokenizer.get_chat_template()


def check(folder, picture, question, ids, logits):
    """Opens the folder as anybody would, and compares with what the run made of the picture: prompt ids, logits."""
    llava, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    expected = torch.where(ids < 0, llava.config.image_token_id, ids)
    if not torch.equal(inputs["input_ids"], expected):
        raise InputError("the exported chat template does not write this run's prompt, so nothing was written; "
                         f"ours ends {processor.decode(expected[0, -20:])!r}, "
                         f"the export's {processor.decode(inputs['input_ids'][0, -20:])!r}")
    error = (llava.eval()(**inputs).logits[..., :logits.shape[-1]] - logits).abs().max() / logits.abs().max()
    if not error < 1e-4:  # so also if it is not a number
        raise InputError(f"the export's logits are not this run's (relative error {error:.0e}), so nothing was "
                         "written; LLaVA cannot hold this encoder or this LLM")


# ---- ask -------------------------------------------------------------------------------------------------------------


def ask(runs, path, question, map_path=None, max_new_tokens=64):
    """Prints each run's answer, a line a run, and draws their maps if asked."""
    if map_path and not (map_path.endswith(".png") and os.path.isdir(os.path.dirname(map_path) or ".")):
        raise InputError(f"--map {map_path}: must be a .png file in a folder that exists")
    picture = open_picture(path)
    device, autocast = common.setup(0)
    panels = []
    for name, run in zip(common.names(runs), runs):
        model = MLLM.load(run).to(device).eval().requires_grad_(False)
        with autocast():
            answer, = model.generate([picture], [question], max_new_tokens)
            text = f"{name}: {' '.join(answer.split()) or '(empty: the turn ends at once)'}"
            print(text)
            if map_path:
                panels.append((text, *seen(model, picture), answer_map(model, picture, question, answer)))
    if map_path:
        draw(map_path, question, panels)
        print(f"wrote {map_path}")


def answer_map(model, picture, question, answer):
    """Where in the picture would a change make this answer likelier? -> (rows, columns) of image tokens: the L1 norm of
    the gradient of log p(answer) at each, as in maps.py.

    The answer is scored like one of training, so with its end of turn, which is all that an empty one has."""
    chat = model.chat
    batch = pack([chat.trunk_ids(model.n_image)], [[(chat.question_ids(question), [chat.response_ids(answer)])]],
                 model.pixels([picture]), chat.pad_id).to(model.device)
    tokens = model.image_tokens(batch.pixels).requires_grad_()                              # (1,N,D)
    gradient, = torch.autograd.grad(model.token_logps(batch, tokens).sum(), tokens)
    grid = [side // model.pool for side in model.grid]
    return reduce(gradient.float().abs(), "1 n d -> n", "sum").reshape(grid).cpu().numpy()


def seen(model, picture):
    """-> the picture as the encoder sees it, (H,W,3) in [0,1]; width and height to draw it in: those of a crop, but of
    the whole picture where the encoder squashed it"""
    pixels = model.image_processor([picture], do_normalize=False, return_tensors="pt")["pixel_values"][0]
    cropped = getattr(model.image_processor, "do_center_crop", False)                       # CLIP and DINOv2
    return pixels.permute(1, 2, 0).numpy(), (pixels.shape[:0:-1] if cropped else picture.size)


def draw(path, question, panels):
    """The picture, and a panel a run: its answer, and the picture glowing where the gradient is, most where it is
    largest"""
    figure, axes = figures.canvas(1, len(panels) + 1, 3, 3.2)
    plain = ("the picture", *panels[0][1:3], np.zeros((1, 1)))
    for axis, (text, pixels, (width, height), gradient) in zip(axes[0], [plain, *panels]):
        extent, heat = (0, width, height, 0), gradient / (gradient.max() or 1)
        axis.imshow(pixels, extent=extent)
        axis.imshow(heat, extent=extent, cmap="inferno", vmin=0, alpha=.75 * heat, interpolation="nearest")
        axis.set_title(textwrap.fill(text if len(text) < 150 else text[:149] + "…", 40), fontsize=8, parse_math=False)
        figures.blank(axis)
    figure.suptitle(textwrap.fill(question, 40 * (len(panels) + 1)), fontsize=10, parse_math=False)
    figures.save(figure, path)


def main():
    args = parser.parse_args()
    common.cli(lambda: args.command(args))
