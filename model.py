"""
The model: vision encoder -> connector -> LLM.

    picture (B,3,H,W) --vision--> features (B,N',D_vision) --connector--> image tokens (B,N,D_llm) --.
    text ids (B,T) ----embedding-------------------------------------> spliced at the placeholders --> LLM --> log-probs

The encoder and the LLM are transformers models, the connector between them is ours. Everything that trains, probes or
answers goes through the class `MLLM` below: `features` is the one tensor that the LLM, every probe and every gradient
map reads, `response_logps` is the fast path that the losses use, and `logps` is the plain, slow path that checks it.

Axes: B batch (rows), I pictures, N' patches, N image tokens, T sequence, M response tokens, D width, V vocabulary.
"""
import json
import os
import shutil
import sysconfig
import tempfile
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel,
                          Dinov2Model, Dinov2WithRegistersModel, SiglipVisionModel, ViTModel)

FORMAT = 1            # of a run directory; raised when an old one can no longer be read
IMAGE = -200          # placeholder id: one for each image token; negative, so it can never be a word of any tokenizer
SYSTEM = "You are a helpful assistant."  # PIVOT's own; explicit, as templates differ in what they add without one

VISION_FAMILIES = {   # config.model_type -> (class, tokens before the patches); a full SigLIP/CLIP: its vision half
    "siglip": (SiglipVisionModel, 0), "siglip_vision_model": (SiglipVisionModel, 0),  # also SigLIP2 of fixed size
    "clip": (CLIPVisionModel, 1), "clip_vision_model": (CLIPVisionModel, 1),
    "dinov2": (Dinov2Model, 1), "dinov2_with_registers": (Dinov2WithRegistersModel, 1),
    "vit": (ViTModel, 1), "vit_mae": (ViTModel, 1),  # MAE through ViTModel: ViTMAEModel would mask 75 % of the patches
}


class InputError(ValueError):
    """Something that was given cannot be used; the message says what, and what to do, in one line."""


class Connector(nn.Module):
    """Linear-GELU-Linear from the encoder's width to the LLM's (LLaVA's mlp2x_gelu).

    `pool=2` first folds each 2x2 block of neighbouring patches into one token, so the LLM reads a quarter as many."""

    def __init__(self, d_vision, d_llm, pool=1):
        super().__init__()
        self.pool = pool
        self.up = nn.Linear(d_vision * pool**2, d_llm)
        self.down = nn.Linear(d_llm, d_llm)

    def forward(self, features, grid):
        """features (B,N',D_vision) of a `grid` = (rows, columns) of patches -> image tokens (B, N' / pool^2, D_llm)"""
        rows, _ = grid
        x = rearrange(features, "b (h p w q) d -> b (h w) (p q d)", h=rows // self.pool, p=self.pool, q=self.pool)
        return self.down(F.gelu(self.up(x)))


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
        tail_ids = self._ids(self.tail)
        self.stop_ids = sorted({tail_ids[-1], tokenizer.eos_token_id} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.stop_ids[0]

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_ids(self, question, n_image):
        """ids of all that precedes the response, with `n_image` placeholders for the picture before the question"""
        question = question.replace("<image>", "").strip()  # some data sets write the tag; the place is ours
        return self._ids(self.head) + [IMAGE] * n_image + self._ids("\n" + question + self.middle)

    def response_ids(self, response):
        return self._ids(self.lead + response.strip() + self.tail)


@dataclass
class Batch:
    """What one forward pass needs. Rows may share a picture, encoded once; `image_of_row` says which is whose"""
    pixels: torch.Tensor         # (I,3,H,W)
    image_of_row: torch.Tensor   # (B,) index into pixels
    input_ids: torch.Tensor      # (B,T) right-padded; IMAGE marks the image tokens
    attention_mask: torch.Tensor  # (B,T) 1 = a real token
    response_mask: torch.Tensor  # (B,T) True = a token of the response, which is what the loss is about

    def to(self, device):
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def pad_rows(rows, pixels, image_of_row, pad_id):
    """[(prompt_ids, response_ids), ...] -> Batch, padded on the right:

        ([5, -200, 6], [7, 8])  ->  input_ids [5 -200 6 7 8]   response_mask [0 0 0 1 1]
        ([5, -200, 6], [9])                   [5 -200 6 9 .]                 [0 0 0 1 0]"""
    B, T = len(rows), max(len(p) + len(r) for p, r in rows)
    input_ids = torch.full((B, T), pad_id)
    attention_mask, response_mask = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
    for b, (prompt, response) in enumerate(rows):
        n = len(prompt) + len(response)
        input_ids[b, :n] = torch.tensor(prompt + response)
        attention_mask[b, :n] = 1
        response_mask[b, len(prompt):n] = True
    return Batch(pixels, torch.as_tensor(image_of_row), input_ids, attention_mask, response_mask)


def to_pixels(image_processor, images):
    """PIL pictures -> (B,3,H,W), with the encoder's own resizing and normalisation"""
    return image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]


def token_logps(hidden, weight, bias, targets):
    """log p(target) at each position from the last hidden states: the hot path of every loss, what --compile compiles.

    hidden (M,D), weight (V,D), bias (V,) or None, targets (M,) -> (M,) in fp32. M counts response tokens only."""
    logits = F.linear(hidden, weight, bias).float()                                 # (M,V)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)   # log_softmax makes a second (M,V)


def can_compile():
    """torch.compile needs a C++ compiler and Python's headers; a fresh machine may have neither."""
    has_compiler = any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return has_compiler and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))


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


class MLLM(nn.Module):
    """A vision encoder, a connector and an LLM. Make one with `from_pretrained` (parts) or `load` (a run directory)."""

    def __init__(self, vision, image_processor, llm, tokenizer, feature_layer=-2, pool=1):
        super().__init__()
        n_layers, n_special = vision.config.num_hidden_layers, VISION_FAMILIES[vision.config.model_type][1]
        depth = feature_layer if feature_layer >= 0 else n_layers + 1 + feature_layer  # as an index of hidden_states
        if not 1 <= depth <= n_layers:
            raise InputError(f"feature_layer {feature_layer}: the vision encoder has {n_layers} layers, so it must be "
                             f"1..{n_layers} or -{n_layers}..-1")
        for scaling in ("logits_scaling", "logit_scale", "final_logit_softcapping"):  # Granite, Cohere, Gemma 2
            if getattr(llm.config, scaling, None) not in (None, 1, 1.0):
                raise InputError(f"the LLM changes its logits by '{scaling}', which the loss hot path does not know")
        self.vision, self.llm, self.tokenizer, self.image_processor = vision, llm, tokenizer, image_processor
        self.feature_layer, self.pool, self.chat = feature_layer, pool, Chat(tokenizer)
        self.n_special = n_special + getattr(vision.config, "num_register_tokens", 0)  # CLS and registers: not patches
        self.vision_tail = take_off_tail(vision, depth)  # a plain dict: not parameters of this module
        for name, parameter in vision.named_parameters():
            if name.endswith("mask_token"):  # DINOv2's, for masked pre-training: no gradient ever reaches it
                parameter.requires_grad_(False)
        H, W = self.pixels([Image.new("RGB", (64, 64))]).shape[-2:]  # ask the processor: it may crop to another size
        patch = vision.config.patch_size
        self.grid = (H // patch, W // patch)  # rows, columns of patches
        if self.grid[0] % pool or self.grid[1] % pool:
            raise InputError(f"pool {pool} does not divide the encoder's grid "
                             f"of {self.grid[0]}x{self.grid[1]} patches; use pool 1")
        self.n_image = self.grid[0] * self.grid[1] // pool**2
        d_llm = llm.get_input_embeddings().weight.shape[1]
        self.connector = Connector(vision.config.hidden_size, d_llm, pool)
        self._token_logps = token_logps
        for module in self.modules():  # PIVOT uses none, and DPO's policy must start equal to its reference
            for name in ("dropout", "attention_dropout", "drop_prob", "p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    # ---- in and out -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, vision, llm, feature_layer=-2, pool=1):
        """Joins an encoder and an LLM (hub ids or local folders) by a fresh connector. Never runs remote code."""
        def opened(loader, name, **how):
            try:
                return loader.from_pretrained(name, **how)
            except OSError as error:
                raise InputError(f"{name} cannot be opened: {str(error).splitlines()[0]}") from error

        model_type = opened(AutoConfig, vision).model_type
        if model_type not in VISION_FAMILIES:
            raise InputError(f"{vision}: vision encoders of type '{model_type}' are not supported; "
                             f"known types: {', '.join(sorted(VISION_FAMILIES))}")
        family = VISION_FAMILIES[model_type][0]
        extra = {"add_pooling_layer": False} if family is ViTModel else {}  # MAE and most ViTs have no weights for it
        return cls(opened(family, vision, dtype=torch.float32, **extra), opened(AutoImageProcessor, vision),
                   opened(AutoModelForCausalLM, llm, dtype=torch.float32), opened(AutoTokenizer, llm),
                   feature_layer, pool)

    @classmethod
    def load(cls, run):
        """Opens a run directory that `save` wrote."""
        config_file = os.path.join(run, "config.json")
        if not os.path.isfile(config_file):
            raise FileNotFoundError(f"{run} is not a run directory: it has no config.json")
        with open(config_file) as f:
            config = json.load(f)
        if config.get("format") != FORMAT:
            raise InputError(f"{config_file}: run format {config.get('format')}, this code reads {FORMAT}")
        model = cls.from_pretrained(os.path.join(run, "vision"), os.path.join(run, "llm"),
                                    config["feature_layer"], config["pool"])
        model.connector.load_state_dict(load_file(os.path.join(run, "connector.safetensors")))
        return model

    def write(self, folder, settings):
        """Writes vision/, llm/, connector.safetensors and config.json (`settings`, and what `load` needs)."""
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
        parent = os.path.dirname(os.path.abspath(run))
        os.makedirs(parent, exist_ok=True)
        folder = tempfile.mkdtemp(dir=parent, prefix=os.path.basename(run) + ".")
        try:
            self.write(folder, settings or {})
            os.rename(folder, run)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    # ---- seeing -----------------------------------------------------------------------------------------------------

    def pixels(self, images):
        """PIL pictures -> (B,3,H,W)"""
        return to_pixels(self.image_processor, images)

    def features(self, pixels):
        """pixels (B,3,H,W) -> (B,N',D_vision): patch tokens at `feature_layer`, before any final norm

        No CLS, no registers; the encoder's tail is off, so its "last" layer is `feature_layer`."""
        return self.vision(pixel_values=pixels).last_hidden_state[:, self.n_special:]

    def image_tokens(self, pixels):
        """pixels (B,3,H,W) -> (B,N,D_llm): what the LLM reads"""
        return self.connector(self.features(pixels), self.grid)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def splice(self, input_ids, image_tokens):
        """input_ids (B,T) with IMAGE placeholders, image_tokens (B,N,D) -> input embeddings (B,T,D)"""
        is_image = input_ids == IMAGE
        per_row, N = is_image.sum(1), image_tokens.shape[1]
        if (per_row != N).any():
            b = int((per_row != N).nonzero()[0])
            raise InputError(f"row {b} of the batch has {int(per_row[b])} image placeholders for {N} image tokens")
        embeds = self.llm.get_input_embeddings()(input_ids.clamp(min=0))
        return embeds.masked_scatter(is_image[..., None], image_tokens.to(embeds.dtype))

    def response_logps(self, batch, image_tokens=None):
        """Log-probability of every response token: Batch -> (B,T-1) in fp32, 0 where there is no response token.

        Column t holds log p(token t+1 | tokens <= t). Only response positions meet the vocabulary: the (B,T,V) logits
        of prompt and picture are never made. `image_tokens` (I,N,D) may be given, to take a gradient there."""
        if image_tokens is None:
            image_tokens = self.image_tokens(batch.pixels)                              # (I,N,D), each picture once
        embeds = self.splice(batch.input_ids, image_tokens[batch.image_of_row])         # (B,T,D)
        hidden = self.llm.base_model(inputs_embeds=embeds, attention_mask=batch.attention_mask,
                                     use_cache=False).last_hidden_state
        scored = batch.response_mask[:, 1:]                                             # position t predicts token t+1
        head = self.llm.get_output_embeddings()
        logps = self._token_logps(hidden[:, :-1][scored], head.weight, head.bias,
                                  batch.input_ids[:, 1:][scored])                       # (M,)
        return torch.zeros(scored.shape, device=logps.device).masked_scatter(scored, logps)

    def compile_hot_path(self):
        """Compiles the loss hot path. `dynamic`: the number of response tokens changes with every batch."""
        self._token_logps = torch.compile(token_logps, dynamic=True)

    def gradient_checkpointing(self):
        """Keeps only each layer's input and recomputes the rest in the backward pass, in the encoder and in the LLM."""
        for part in (self.vision, self.llm):
            # the reentrant kind loses gradients behind a frozen part
            part.gradient_checkpointing_enable({"use_reentrant": False})

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

    @torch.no_grad()
    def generate(self, images, questions, max_new_tokens=64, temperature=0.0):
        """One answer a question, as text; greedy at temperature 0, else sampled.
        Batched, left-padded, with a KV cache."""
        rows = [self.chat.prompt_ids(q, self.n_image) for q in questions]
        T = max(map(len, rows))
        ids = torch.tensor([[self.chat.pad_id] * (T - len(r)) + r for r in rows], device=self.device)
        mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows], device=self.device)
        embeds = self.splice(ids, self.image_tokens(self.pixels(images).to(self.device)))
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        # the rest is spelt out because an instruct model ships defaults of its own, a repetition penalty among them
        out = self.llm.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, use_cache=True,
            eos_token_id=self.chat.stop_ids, pad_token_id=self.chat.pad_id,
            **{"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0, **sampling})
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    @property
    def device(self):
        return self.connector.up.weight.device

    def parts(self):
        """The three parts by the names that flags and logs use"""
        return {"vision": self.vision, "connector": self.connector, "llm": self.llm}

