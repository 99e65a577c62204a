"""
The model: vision encoder -> connector -> LLM.

    picture (I,3,H,W) --vision--> features (I,N',D_vision) --connector--> image tokens (I,N,D_llm) --.
    text ids (S,T) ----embedding-------------------------------------> spliced at the placeholders --> LLM --> log-probs

The encoder and the LLM are transformers models, the connector between them is ours. Everything that trains, probes or
answers goes through the classes `Encoder` and `MLLM` below: `features` is the one tensor that the LLM and every probe
reads, `token_logps` is the fast path that the losses use, and `logps` is the plain, slow path that checks it.

The fast path repeats nothing: responses that follow the same picture and question are read as branches of one sequence
(`trees.py`), and `TokenLogps` scores their tokens without ever holding all their logits.

A trained run can be asked, and handed to others as a LLaVA folder (`artefacts.py`):

    python model.py ask runs/dpo picture.png "what color is the ring?"
    python model.py export runs/dpo exported

Axes: B or I pictures, S packed rows, T row length, N' patches, N image tokens, M response tokens, R responses, D width,
V vocabulary.
"""
import copy
import glob
import json
import os
import shutil
import sysconfig
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, Dinov2Model,
                          Dinov2WithRegistersModel, SiglipVisionModel, ViTModel)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 asks for torchvision one level up

FORMAT = 1            # of a run directory; raised when an old one can no longer be read
CHUNK_LOGITS = 2**26  # how many logits exist at a time (256 MB in fp32), whatever the vocabulary and the batch
SYSTEM = "You are a helpful assistant."  # PIVOT's own; explicit, as templates differ in what they add without one

VISION_FAMILIES = {   # config.model_type -> (class, tokens before the patches); a full SigLIP/CLIP: its vision half
    "siglip": (SiglipVisionModel, 0), "siglip_vision_model": (SiglipVisionModel, 0),  # also SigLIP2 of fixed size
    "clip": (CLIPVisionModel, 1), "clip_vision_model": (CLIPVisionModel, 1),
    "dinov2": (Dinov2Model, 1), "dinov2_with_registers": (Dinov2WithRegistersModel, 1),
    "vit": (ViTModel, 1), "vit_mae": (ViTModel, 1),  # MAE through ViTModel: ViTMAEModel would mask 75 % of the patches
}


class InputError(ValueError):
    """Something that was given cannot be used; the message says what, and what to do, in one line."""

    def __init__(self, message):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message)))  # one line


class Connector(nn.Module):
    """Linear-GELU-Linear from the encoder's width to the LLM's (LLaVA's mlp2x_gelu); a single Linear if `hidden` is 0.

    `pool=2` first folds each 2x2 block of neighbouring patches into one token, so the LLM reads a quarter as many.
    `hidden` is the width between the two layers, by default that of the LLM."""

    def __init__(self, d_vision, d_llm, pool=1, hidden=None):
        super().__init__()
        hidden = d_llm if hidden is None else hidden
        self.pool = pool
        self.up = nn.Linear(d_vision * pool**2, hidden or d_llm)
        self.down = nn.Linear(hidden, d_llm) if hidden else None

    def forward(self, features, grid):
        """features (B,N',D_vision) of a `grid` = (rows, columns) of patches -> image tokens (B, N' / pool^2, D_llm)"""
        x = rearrange(features, "b (h p w q) d -> b (h w) (p q d)", h=grid[0] // self.pool, p=self.pool, q=self.pool)
        return self.down(F.gelu(self.up(x))) if self.down else self.up(x)


class Chat:
    """Turns a question and a response into ids through the tokenizer's own chat template.

    Which tokens belong to the response is found without knowing the template: a conversation whose question and answer
    are two marker words is rendered once, and what stands before, between and after the markers is the template's text.
    So prompt = head + image + question + middle is exactly what generation starts from, and response = answer + tail
    holds the answer and the template's own end of turn ("<|im_end|>", "<|eot_id|>", ...), less trailing white space
    that no model needs to learn. Prompt and response are tokenised apart, so training sees the very ids that generation
    continues."""

    def __init__(self, tokenizer, system=SYSTEM):
        self.tokenizer = tokenizer
        question, answer = "QUESTIONMARKER", "ANSWERMARKER"
        turns = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        # enable_thinking: or Qwen3 opens a <think> block; other templates ignore it
        render = lambda turns, **kw: tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False, **kw)
        try:
            prompt = render(turns, add_generation_prompt=True)
            full = render(turns + [{"role": "assistant", "content": answer}])
            self.head, self.middle = prompt.split(question)
            before, tail = full.split(answer)
        except Exception as error:
            raise InputError("the tokenizer's chat template cannot render a system, a user and an assistant turn: "
                             f"{error}")
        # Llama-2 puts a space here that its generation prompt lacks
        lead = before[len(prompt):] if before.startswith(prompt) else ""
        self.lead, self.tail = lead, tail.rstrip() or tokenizer.eos_token
        self.head_ids, tail_ids = self._ids(self.head), self._ids(self.tail)
        self.stop_ids = sorted({tail_ids[-1], tokenizer.eos_token_id} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def trunk_ids(self, n_image, image=0):
        """ids of the prefix that all questions about a picture share; -1-n stands for image token n, counted through
        all pictures of a batch, of which this is number `image`"""
        return self.head_ids + [-1 - image * n_image - n for n in range(n_image)]

    def question_ids(self, question):
        """ids of what stands between the picture and the response"""
        return self._ids("\n" + question.replace("<image>", "").strip() + self.middle)  # the tag's place is ours

    def prompt_ids(self, question, n_image, image=0):
        """ids of all that precedes the response"""
        return self.trunk_ids(n_image, image) + self.question_ids(question)

    def response_ids(self, response):
        return self._ids(self.lead + response.strip() + self.tail)


def to_pixels(image_processor, images):
    """PIL pictures -> (B,3,H,W), with the encoder's own resizing and normalisation"""
    return image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]


def distinct(images):
    """-> the different pictures among `images`, and for each of `images` its number there; the same object is one"""
    found = list({id(image): image for image in images}.values())
    number = {id(image): i for i, image in enumerate(found)}
    return found, [number[id(image)] for image in images]


def chunk_logps(hidden, weight, bias, targets):
    """hidden (m,D), weight (V,D), bias (V,) or None, targets (m,) -> log p(target), logsumexp of logits: both (m,)"""
    logits = F.linear(hidden, weight, bias)                                         # (m,V)
    total = logits.logsumexp(-1)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - total, total


def chunk_logits_gradient(hidden, weight, bias, targets, total, gradient):
    """d loss / d logits (m,V), from the gradient (m,) of the log-probs: gradient * (onehot(target) - softmax)"""
    softmax = F.linear(hidden, weight, bias).sub_(total[:, None]).exp_()            # logits again: cheaper than kept
    return softmax.mul_(-gradient[:, None]).scatter_add_(-1, targets[:, None], gradient[:, None])


class TokenLogps(torch.autograd.Function):
    """log p(target) of every response token from the last hidden states: the hot path of every loss.

    `apply(hidden (M,D), weight (V,D), bias (V,) or None, targets (M,), chunk functions) -> (M,)`, fp32 tensors. Works
    through the tokens in chunks of CHUNK_LOGITS / V, forward and backward, so that (M,V) logits, which would be the
    largest tensor of a step, never exist; backward makes each chunk's logits once more. The weight's gradient is
    summed over chunks in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, functions):
        ctx.chunk, ctx.functions = max(1, CHUNK_LOGITS // len(weight)), functions
        # detached: torch.compile makes a function anew for tensors that require a gradient and for those that do not
        logps, totals = zip(*(functions[0](h, weight.detach(), None if bias is None else bias.detach(), t)
                              for h, t in zip(hidden.detach().split(ctx.chunk), targets.split(ctx.chunk))))
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(totals))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, bias, targets, totals = ctx.saved_tensors
        gradient = gradient.contiguous()                                                # .sum() expands one number
        grad_hidden, grad_weight, grad_bias = (torch.zeros_like(t) if t is not None and needed else None for t, needed
                                               in zip((hidden, weight, bias), ctx.needs_input_grad))
        with torch.autocast(gradient.device.type, enabled=False):  # backward may be called where forward was not
            for at in range(0, len(hidden), ctx.chunk):
                part = slice(at, at + ctx.chunk)
                grad_logits = ctx.functions[1](hidden.detach()[part], weight.detach(), None if bias is None else
                                               bias.detach(), targets[part], totals[part], gradient[part])
                if grad_hidden is not None:
                    torch.mm(grad_logits, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, hidden[part])
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def compiled(function):
    """torch.compile, `dynamic` as the number of response tokens changes with every batch. Steps aside while FLOPs are
    counted: a function that is compiled and called in a dispatch mode runs uncompiled ever after."""
    fast = torch.compile(function, dynamic=True)
    return lambda *inputs: (function if is_in_torch_dispatch_mode() else fast)(*inputs)


def can_compile():
    """torch.compile needs a C++ compiler and Python's headers; a fresh machine may have neither."""
    has_compiler = any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return has_compiler and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))


def attention_mask(visible):
    """Boolean mask, True = may attend -> 0 or -inf, in attention's dtype. Made once here, or each layer would make one
    of its own and keep it for the backward pass"""
    kind = visible.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def check_branches(llm):
    """Raises InputError for an LLM that cannot read a tree: it looks back a limited way, or has its own idea of masks
    and positions. Checked by trying: a word that follows another, read with and without a masked sibling between them,
    must give the same hidden state."""
    layers = set(getattr(llm.config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or getattr(llm.config, "sliding_window", None):
        raise InputError("the LLM has layers that look back a limited way (sliding window, linear attention); "
                         "only full attention is supported")
    first, sibling, word = llm.get_input_embeddings().weight[:3].detach()
    visible, positions = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()[None, None], torch.tensor([[0, 1, 1]])
    last = lambda words, **more: llm.base_model(inputs_embeds=torch.stack(words)[None], use_cache=False,
                                                **more).last_hidden_state[0, -1]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # --matmul may ask for bf16, and this is a comparison
    with torch.no_grad():
        alone = last([first, word])
        try:
            tree = last([first, sibling, word], attention_mask=attention_mask(visible), position_ids=positions)
        except Exception:  # each family that cannot has its own way of saying so
            tree = torch.full_like(alone, torch.nan)
    torch.set_float32_matmul_precision(precision)
    if not torch.allclose(tree, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max())):
        raise InputError(f"LLMs of type '{llm.config.model_type}' cannot read trees (trees.py): their attention does "
                         "not follow the mask and the positions that it is given")


def swap(vision, modules):
    """Puts {name: module} in their places inside `vision` and returns what stood there: swapping twice undoes it."""
    previous = {name: vision.get_submodule(name) for name in modules}
    for name, module in modules.items():
        vision.set_submodule(name, module)
    return previous


def take_off_tail(vision, depth):
    """Removes from a vision encoder all that comes after layer `depth`: later layers, the final norm, the pooling head.

    Returns what `swap` needs to restore it, so that an exported encoder is again the whole model that transformers
    knows. What is removed is never run or trained; it waits on the CPU, in `MLLM.vision_tail`, for a save."""
    shorter = {}
    for name, module in vision.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == vision.config.num_hidden_layers:
            shorter[name] = module[:depth]
        elif name.rpartition(".")[2] in ("post_layernorm", "layernorm", "head"):
            shorter[name] = nn.Identity()
    return swap(vision, shorter)


class Encoder(nn.Module):
    """A vision encoder, cut off after the layer that an LLM reads: what probe.py asks, and the first part of an MLLM.

    Its `feature_layer` is an index of hidden_states, of which the first are the embeddings: -2, the default, is the
    output of the last layer but one (as in LLaVA), so the last layer is cut off. It is written into the encoder's own
    config, so that an exported encoder says itself at which layer it was read."""

    def __init__(self, vision, image_processor, feature_layer=None):
        super().__init__()
        if feature_layer is None:
            feature_layer = getattr(vision.config, "feature_layer", -2)
        n_layers, n_special = vision.config.num_hidden_layers, VISION_FAMILIES[vision.config.model_type][1]
        depth = feature_layer if feature_layer >= 0 else n_layers + 1 + feature_layer
        if not 1 <= depth <= n_layers:
            raise InputError(f"feature_layer {feature_layer}: the vision encoder has {n_layers} layers, so it must be "
                             f"1..{n_layers} or -{n_layers}..-1")
        self.vision, self.image_processor, self.feature_layer = vision, image_processor, feature_layer
        vision.config.feature_layer = feature_layer
        self.n_special = n_special + getattr(vision.config, "num_register_tokens", 0)  # CLS and registers: not patches
        self.vision_tail = take_off_tail(vision, depth)  # a plain dict: not parameters of this module
        for name, parameter in vision.named_parameters():
            if name.endswith("mask_token"):  # DINOv2's, for masked pre-training: no gradient ever reaches it
                parameter.requires_grad_(False)
        H, W = self.pixels([Image.new("RGB", (64, 64))]).shape[-2:]  # ask the processor: it may crop to another size
        patch, size = vision.config.patch_size, vision.config.image_size
        native = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if (H, W) != native and not vision.config.model_type.startswith("dinov2"):  # which interpolates as it goes
            raise InputError(f"the image processor makes pictures of {H}x{W} pixels and the vision encoder reads "
                             f"{native[0]}x{native[1]}; for another size train_sft.py has --image_size")
        self.grid = (H // patch, W // patch)  # rows, columns of patches

    @classmethod
    def from_pretrained(cls, vision, feature_layer=None):
        """Opens an encoder: hub id, or local folder such as the vision/ of a run. Never runs remote code."""
        return cls(*open_vision(vision), feature_layer)

    def pixels(self, images):
        """PIL pictures -> (B,3,H,W), with the encoder's own resizing, cropping and normalisation"""
        return to_pixels(self.image_processor, images)

    def features(self, pixels):
        """pixels (B,3,H,W) -> (B,N',D_vision): patch tokens at `feature_layer`, before any final norm

        No CLS, no registers; the encoder's tail is off, so its "last" layer is `feature_layer`."""
        return self.vision(pixel_values=pixels).last_hidden_state[:, self.n_special:]

    @property
    def device(self):
        return next(self.vision.parameters()).device


class MLLM(Encoder):
    """A vision encoder, a connector and an LLM. Make one with `from_pretrained` (parts) or `load` (a run directory)."""

    def __init__(self, vision, image_processor, llm, tokenizer, feature_layer=None, pool=1, hidden=None):
        super().__init__(vision, image_processor, feature_layer)
        for scaling in ("logits_scaling", "logit_scale", "final_logit_softcapping"):  # Granite, Cohere, Gemma 2
            if getattr(llm.config, scaling, None) not in (None, 1, 1.0):
                raise InputError(f"the LLM changes its logits by '{scaling}', which the loss hot path does not know")
        if len(tokenizer) > len(llm.get_input_embeddings().weight):
            raise InputError(f"the tokenizer has {len(tokenizer)} tokens and the LLM rows for "
                             f"{len(llm.get_input_embeddings().weight)}: they do not belong together")
        check_branches(llm)
        self.llm, self.tokenizer, self.pool, self.chat = llm, tokenizer, pool, Chat(tokenizer)
        if self.grid[0] % pool or self.grid[1] % pool:
            raise InputError(f"pool {pool} does not divide the encoder's grid "
                             f"of {self.grid[0]}x{self.grid[1]} patches; use pool 1")
        self.n_image = self.grid[0] * self.grid[1] // pool**2
        d_llm = llm.get_input_embeddings().weight.shape[1]
        self.connector = Connector(vision.config.hidden_size, d_llm, pool, hidden)
        self.chunk_functions = (chunk_logps, chunk_logits_gradient)
        for module in self.modules():  # PIVOT uses none, and DPO's policy must start equal to its reference
            for name in ("dropout", "attention_dropout", "dropout_prob", "drop_prob", "p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    # ---- in and out --------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, vision, llm, feature_layer=None, pool=1, hidden=None, image_size=None):
        """Joins an encoder and an LLM (hub ids or local folders) by a fresh connector. Never runs remote code.

        `image_size` (pixels a side) other than the encoder's own interpolates its positions."""
        return cls(*open_vision(vision, image_size), opened(AutoModelForCausalLM, llm, dtype=torch.float32),
                   opened(AutoTokenizer, llm), feature_layer, pool, hidden)

    @classmethod
    def load(cls, run):
        """Opens a run directory that `save` wrote."""
        config_file = os.path.join(run, "config.json")
        if not os.path.isfile(config_file):
            raise FileNotFoundError(f"{run} is not a run directory: it has no config.json")
        config = read_json(config_file)
        if "format" not in config:
            raise InputError(f"{run} is not a run directory, but a model in transformers' form")
        if config["format"] != FORMAT:
            raise InputError(f"{config_file}: run format {config['format']}, this code reads {FORMAT}")
        for key in ("feature_layer", "pool"):
            if type(config.get(key)) is not int or key == "pool" and config[key] < 1:
                raise InputError(f"{config_file}: '{key}' is {config.get(key)!r}, must be a whole number")
        connector_file = os.path.join(run, "connector.safetensors")
        connector = read_tensors(connector_file)
        down = connector.get("down.weight")
        hidden = down.shape[1] if down is not None and down.ndim == 2 and down.numel() else 0
        vision, llm = os.path.join(run, "vision"), os.path.join(run, "llm")
        if not os.path.isfile(os.path.join(llm, "tokenizer.json")):             # transformers would make an empty one
            raise InputError(f"{llm} has no tokenizer.json")
        parts = [*open_vision(vision, loader=opened_whole), opened_whole(AutoModelForCausalLM, llm),
                 opened(AutoTokenizer, llm)]
        try:
            model = cls(*parts, config["feature_layer"], config["pool"], hidden)
        except Exception as error:  # parts that are whole may still not fit, and say so in whatever way
            raise InputError(f"{run} cannot be opened: {first_line(error)}") from error
        own = model.connector.state_dict()
        for name in sorted(own.keys() | connector.keys()):
            found, needed = (tuple(state[name].shape) if name in state else "nothing" for state in (connector, own))
            if found != needed:
                raise InputError(f"{connector_file}: {name} is {found}, must be {needed}")
        model.connector.load_state_dict(connector)
        return model

    def write(self, folder, settings):
        """Writes vision/, llm/, connector.safetensors and config.json (`settings`, and what `load` needs).

        The encoder gets its tail back, untrained, so that transformers can open it: of an exported encoder read
        hidden_states[feature_layer], not last_hidden_state."""
        without_tail = swap(self.vision, self.vision_tail)
        try:
            self.vision.save_pretrained(os.path.join(folder, "vision"))
        finally:
            swap(self.vision, without_tail)
        self.image_processor.save_pretrained(os.path.join(folder, "vision"))  # AutoImageProcessor looks for it there
        self.llm.save_pretrained(os.path.join(folder, "llm"))
        self.tokenizer.save_pretrained(os.path.join(folder, "llm"))
        save_file({k: v.contiguous() for k, v in self.connector.state_dict().items()},
                  os.path.join(folder, "connector.safetensors"))
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump({"format": FORMAT, "feature_layer": self.feature_layer, "pool": self.pool, **settings},
                      f, indent=1)

    def save(self, run, settings=None):
        """Writes a whole run directory, or nothing: into a temporary neighbour first, then renamed."""
        if os.path.exists(run):
            raise FileExistsError(f"{run} exists already")
        folder = f"{os.path.abspath(run)}.{os.getpid()}.tmp"
        os.makedirs(folder)
        try:
            self.write(folder, settings or {})
            os.rename(folder, run)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def image_tokens(self, pixels):
        """pixels (B,3,H,W) -> (B,N,D_llm): what the LLM reads"""
        return self.connector(self.features(pixels), self.grid)

    # ---- seeing and reading ------------------------------------------------------------------------------------------

    def splice(self, input_ids, image_tokens):
        """input_ids (S,T) with -1-n for image token n, image_tokens (I,N,D) -> input embeddings (S,T,D)"""
        words = self.llm.get_input_embeddings()(input_ids.clamp(min=0)).flatten(0, 1)        # (S*T,D)
        both = torch.cat([words, image_tokens.flatten(0, 1).to(words.dtype)])
        own = torch.arange(len(words), device=words.device).view_as(input_ids)
        index = torch.where(input_ids < 0, len(words) - 1 - input_ids, own)
        return both.index_select(0, index.flatten()).unflatten(0, input_ids.shape)  # unlike a mask: no wait for the GPU

    def token_logps(self, batch, image_tokens=None):
        """Log-probability of every response token: Batch -> (M,) in fp32; `batch.per_response` sums them.

        Only response tokens meet the vocabulary, and not in bf16: log-ratios are small differences of large sums, and
        bf16 logits are rounded to 8 bits (on a GPU TF32, 11 bits, sums in fp32; --matmul highest: all fp32).
        `image_tokens` (I,N,D) may be given, to take a gradient there."""
        if image_tokens is None:
            image_tokens = self.image_tokens(batch.pixels)                              # (I,N,D), each picture once
        hidden = self.llm.base_model(inputs_embeds=self.splice(batch.input_ids, image_tokens),
                                     attention_mask=attention_mask(batch.visible()), position_ids=batch.positions,
                                     use_cache=False).last_hidden_state                 # (S,T,D)
        head = self.llm.get_output_embeddings()
        with torch.autocast(hidden.device.type, enabled=False):
            return TokenLogps.apply(hidden.flatten(0, 1).index_select(0, batch.logit_at).float(), head.weight,
                                       head.bias, batch.targets, self.chunk_functions)

    def compile_hot_path(self):
        """Compiles the loss hot path; to be called before weights are split over processes."""
        self.chunk_functions = tuple(map(compiled, (chunk_logps, chunk_logits_gradient)))
        # what is compiled depends on the sizes that come first: always these, so that a resumed run is the same to the
        # last bit; 61 is no model's width, as equal sizes would count as one
        head = self.llm.get_output_embeddings()
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        hidden = torch.zeros(61, weight.shape[1], device=self.device, requires_grad=True)
        targets = torch.zeros(61, dtype=torch.int64, device=self.device)
        logps = TokenLogps.apply(hidden, weight, bias, targets, self.chunk_functions)
        torch.autograd.grad(logps.sum(), hidden)

    def gradient_checkpointing(self):
        """Keeps only each layer's input and recomputes the rest in the backward pass, in the encoder and in the LLM."""
        for part in (self.vision, self.llm):
            part.gradient_checkpointing_enable({
                "use_reentrant": False,             # the reentrant kind loses gradients behind a frozen part
                "preserve_rng_state": False})       # nothing is random in a layer, and keeping it waits for the GPU

    def logps(self, images, questions, responses):
        """Summed log-probability of each response, (B,) fp32: row by row, all logits, no padding. The oracle."""
        sums = []
        for image, question, response in zip(images, questions, responses, strict=True):
            prompt, answer = self.chat.prompt_ids(question, self.n_image), self.chat.response_ids(response)
            ids = torch.tensor([prompt + answer], device=self.device)
            embeds = self.splice(ids, self.image_tokens(self.pixels([image]).to(self.device)))
            logps = self.llm(inputs_embeds=embeds).logits.float().log_softmax(-1)[0]    # (T,V)
            sums.append(sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(answer)))
        return torch.stack(sums)

    def read_prompts(self, images, questions):
        """-> input embeddings (B,T,D) of all that precedes the responses, padded on the left; mask (B,T), 0 = padding

        A picture that is the same object for several questions is encoded once."""
        pictures, numbers = distinct(images)
        rows = [self.chat.prompt_ids(question, self.n_image, i) for question, i in zip(questions, numbers, strict=True)]
        T = max(map(len, rows))
        ids = torch.tensor([[self.chat.pad_id] * (T - len(r)) + r for r in rows], device=self.device)
        mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows], device=self.device)
        return self.splice(ids, self.image_tokens(self.pixels(pictures).to(self.device))), mask

    @torch.no_grad()
    def generate(self, images, questions, max_new_tokens=64, temperature=0.0):
        """One answer to each question, as text; greedy at temperature 0, else sampled. Batched, with a KV cache.

        By transformers' own `generate`; for many answers to one question see sampling.py, which is checked by this."""
        embeds, mask = self.read_prompts(images, questions)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        # the rest is spelt out because an instruct model ships defaults of its own, a repetition penalty among them
        out = self.llm.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, use_cache=True,
            eos_token_id=self.chat.stop_ids, pad_token_id=self.chat.pad_id,
            **{"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0, **sampling})
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    def parts(self):
        """The three parts by the names that flags and logs use"""
        return {"vision": self.vision, "connector": self.connector, "llm": self.llm}


# ---- opening what others made, on the hub or in a run directory ------------------------------------------------------


def first_line(error):
    """What an error says, in one line; some say nothing but their type"""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def opened(loader, name, **how):
    """`loader.from_pretrained(name)`, with an error that names what cannot be opened"""
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **how)
    except Exception as error:  # a damaged file shows in whatever way
        raise InputError(f"{name} cannot be opened: {first_line(error)}") from error


def opened_whole(loader, folder, **how):
    """`opened` for a part of a run directory, which may be a stranger's: safetensors only, from files inside `folder`,
    and every tensor of the model in its shape, no more and no less"""
    index = os.path.join(folder, "model.safetensors.index.json")
    files = read_json(index).get("weight_map") if os.path.exists(index) else {}
    if not isinstance(files, dict):
        raise InputError(f"{index}: 'weight_map' is a {type(files).__name__}, must be an object")
    for name in files.values():
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names the file {name!r}, which is no safetensors file in its folder")
    shapes = []                                                                 # headers only
    for file in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        with read_tensors(file, lambda file: safe_open(file, "pt")) as opened_file:
            shapes += [opened_file.get_slice(name).get_shape() for name in opened_file.keys()]
    if shapes:                                                                  # else `opened` says what is missing
        check_sizes(os.path.join(folder, "config.json"), shapes)
    model, found = opened(loader, folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                          ignore_mismatched_sizes=True, **how)
    wrong = [f"has no tensor {name}" for name in sorted(found["missing_keys"])] + \
        [f"has a tensor {name}, which the model has not" for name in sorted(found["unexpected_keys"])] + \
        [f"has {name} in the shape {tuple(shape)}, must be {tuple(own)}" for name, shape, own in
         sorted(found["mismatched_keys"])]
    if wrong:
        raise InputError(f"{folder}/model.safetensors {wrong[0]}" + f" (and {len(wrong) - 1} more)" * (len(wrong) > 1))
    return model


def check_sizes(path, shapes):
    """Refuses a config in which one size asks for more than its tensors (their shapes) can fill, before anything is
    made of it"""
    def within(config, name, most):
        value = config.get(name)
        if isinstance(value, (int, float)) and value > most:
            raise InputError(f"{path}: {name} is {value}, and no tensor beside it is for more than {most}")

    widest = max((size for shape in shapes for size in shape), default=1)
    top = read_json(path)
    for config in [top, *(value for value in top.values() if isinstance(value, dict))]:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                     "head_dim", "num_channels", "patch_size"):
            within(config, name, widest)
        within(config, "num_hidden_layers", len(shapes))
        within(config, "image_size", 64 * widest)                               # a patch has less than 64 pixels a side


def read_tensors(path, read=load_file):
    """`read(path)` of a safetensors file, or an InputError that names it"""
    try:
        return read(path)
    except FileNotFoundError:  # which names it
        raise
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None


def read_json(path):
    """The dict in a JSON file, or an InputError that names the file"""
    try:
        with open(path) as f:
            found = json.load(f)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, must be an object")
    return found


def open_vision(name, image_size=None, loader=partial(opened, dtype=torch.float32)):
    """Hub id or folder of a vision encoder -> transformers model in fp32, image processor; for pictures of `image_size`
    pixels a side if given"""
    if os.path.isdir(name) and os.path.isdir(os.path.join(name, "vision")):
        raise InputError(f"{name} is a run directory; its vision encoder is {os.path.join(name, 'vision')}")
    model_type = opened(AutoConfig, name).model_type
    if model_type not in VISION_FAMILIES:
        raise InputError(f"{name}: vision encoders of type '{model_type}' are not supported; "
                         f"known types: {', '.join(sorted(VISION_FAMILIES))}")
    family = VISION_FAMILIES[model_type][0]
    extra = {"add_pooling_layer": False} if family is ViTModel else {}  # MAE and most ViTs have no weights for it
    vision, image_processor = loader(family, name, **extra), opened(AutoImageProcessor, name)
    sides = [side for key in ("size", "crop_size") for side in dict(getattr(image_processor, key, None) or {}).values()]
    if max((side for side in sides if isinstance(side, (int, float))), default=0) > 4096:
        raise InputError(f"{name}: its image processor makes pictures of {max(sides)} pixels a side; 4096 is the most")
    return resize(vision, image_processor, image_size, extra) if image_size else (vision, image_processor)


def resize(vision, image_processor, size, extra):
    """The same encoder for pictures of `size` x `size` pixels. Its table of positions is interpolated once, by the
    encoder's own rule (bicubic), so that what is trained, saved and exported is an ordinary encoder of that size.

    Where the processor crops, the short edge becomes `size` too, as in PIVOT: no margin is cut off."""
    patch, state = vision.config.patch_size, vision.state_dict()
    if size % patch:
        raise InputError(f"--image_size {size} is not a multiple of {patch}, the side of the encoder's patches")
    name = next(name for name in state if name.endswith(("position_embedding.weight", "position_embeddings")))
    embeddings = next(module for module in vision.modules() if hasattr(module, "interpolate_pos_encoding"))
    n_special = VISION_FAMILIES[vision.config.model_type][1]
    tokens = state[name].new_empty(1, n_special + (size // patch)**2, state[name].shape[-1])  # only their number counts
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(tokens, size, size)             # (1,N,D)
    config = copy.deepcopy(vision.config)
    config.image_size = size
    resized = type(vision)(config, **extra)
    resized.load_state_dict({**state, name: positions if state[name].ndim == 3 else positions[0]})
    settings = image_processor.to_dict()
    square = {"height": size, "width": size}
    settings["size"] = {"shortest_edge": size} if "shortest_edge" in settings["size"] else square
    if settings.get("crop_size"):
        settings["crop_size"] = square
    return resized, type(image_processor)(**settings)


if __name__ == "__main__":
    import artefacts  # not above: it imports this file
    artefacts.main()
