"""
Who answers: a run of ours, or any image-text-to-text model of transformers. Both know three things:

    generate(images, questions, max_new_tokens) -> texts        greedy
    option_logps(images, questions, options, batch_size)        log-probability of each option, with the turn's end
    map(image, question, answer) -> (rows, columns) or None     where in it the gradient of log p(answer) lies
"""
import hashlib
import os

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from artefacts import answer_map
from model import MLLM, InputError, opened
from trees import pack


def identity(model, is_hub):
    """A short name of a model's contents, so that saved answers are never another model's: of a run the hash of its
    config and connector, of anything else its id"""
    if is_hub:
        return model
    contents = hashlib.sha256()
    for name in ("config.json", "connector.safetensors"):
        try:
            with open(os.path.join(model, name), "rb") as f:
                contents.update(f.read())
        except FileNotFoundError:
            raise InputError(f"{model} is not a run directory: it has no {name}" +
                             "; a model of transformers goes behind --hf" *
                             os.path.isfile(os.path.join(model, "config.json"))) from None
    return contents.hexdigest()[:16]


class Run:
    """A run directory; with `reader` (another) its vision encoder behind the reader's connector and LLM"""

    def __init__(self, run, device, reader=None):
        self.model = MLLM.load(run)
        if reader:
            other = MLLM.load(reader)
            shape = lambda m: (m.grid, m.pool, m.vision.config.hidden_size)
            if shape(self.model) != shape(other):
                raise InputError(f"--reader {reader} reads features of another shape than {run} has")
            for part in ("connector", "llm", "tokenizer", "chat"):
                setattr(self.model, part, getattr(other, part))
        self.model.to(device).eval().requires_grad_(False)
        self.generate = self.model.generate

    @torch.no_grad()
    def option_logps(self, images, questions, options, batch_size=64):
        """images, questions and options are lists of B, the last of lists of texts -> B lists of floats.

        The options of a question are branches of one sequence (trees.py), and a picture that is the same object in
        several places is encoded once."""
        model, chat, scores = self.model, self.model.chat, []
        distinct = list({id(image): image for image in images}.values())
        pixels = model.pixels(distinct)
        image_tokens, place = model.image_tokens(pixels.to(model.device)), {id(p): i for i, p in enumerate(distinct)}
        for at in range(0, len(images), batch_size):
            part = range(at, min(at + batch_size, len(images)))
            trunks = [chat.trunk_ids(model.n_image, place[id(images[b])]) for b in part]
            trees = [[(chat.question_ids(questions[b]), list(map(chat.response_ids, options[b])))] for b in part]
            batch = pack(trunks, trees, pixels, chat.pad_id).to(model.device)
            logps = iter(batch.per_response(model.response_logps(batch, image_tokens)).tolist())
            scores += [[next(logps) for _ in options[b]] for b in part]
        return scores

    def map(self, image, question, answer):
        found, processor = answer_map(self.model, image, question, answer), self.model.image_processor
        if not getattr(processor, "do_center_crop", False):
            return found
        seen = min(image.size) * processor.crop_size["height"] / processor.size["shortest_edge"]  # px of the picture
        margins = [max(0, round(n * (side / seen - 1) / 2)) for n, side in zip(found.shape, image.size[::-1])]
        return np.pad(found, [(margin, margin) for margin in margins])


class HubModel:
    """Any model that transformers' AutoModelForImageTextToText opens (LLaVA, Qwen2.5-VL, ...), through its own
    processor and chat template. Never runs remote code."""

    def __init__(self, name, device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = opened(AutoModelForImageTextToText, name, dtype=dtype).to(device).eval()
        self.processor = opened(AutoProcessor, name)
        self.tokenizer = getattr(self.processor, "tokenizer", None)
        if not getattr(self.processor, "chat_template", None):
            raise InputError(f"--hf {name} has no chat template: how it wants to be asked is not known")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        marker = "ANSWERMARKER"
        turn = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}
        text = self.processor.apply_chat_template([turn("user", "?"), turn("assistant", marker)], tokenize=False)
        self.end = text.rpartition(marker)[2].rstrip() or self.tokenizer.eos_token  # of an answer, as in model.Chat

    def inputs(self, images, questions):
        """-> what the model takes: ids (B,T) padded on the left, pictures in its own form"""
        turns = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
                 for image, question in zip(images, questions, strict=True)]
        inputs = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                    return_tensors="pt", padding=True)
        return inputs.to(self.model.device, self.model.dtype)  # numbers with a point change their dtype, ids do not

    @torch.no_grad()
    def generate(self, images, questions, max_new_tokens):
        inputs = self.inputs(images, questions)
        out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None,
                                  top_p=None, top_k=None, repetition_penalty=1.0, num_beams=1,
                                  pad_token_id=self.tokenizer.pad_token_id)
        texts = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def option_logps(self, images, questions, options, batch_size=64):
        """A question at a time, its options as rows: plain, and right for every kind of model"""
        scores = []
        for image, question, texts in zip(images, questions, options, strict=True):
            inputs = dict(self.inputs([image], [question]))
            prompt, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")            # (1,T)
            ids = [self.tokenizer(text + self.end, add_special_tokens=False)["input_ids"] for text in texts]
            longest, pad = max(map(len, ids)), self.tokenizer.pad_token_id
            tail = torch.tensor([each + [pad] * (longest - len(each)) for each in ids], device=prompt.device)
            real = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids], device=prompt.device)
            rows = lambda tensor: tensor.repeat(len(ids), *[1] * (tensor.ndim - 1))
            more = {name: rows(value) for name, value in inputs.items() if torch.is_tensor(value)}
            logits = self.model(input_ids=torch.cat([rows(prompt), tail], 1),
                                attention_mask=torch.cat([rows(mask), real], 1), **more).logits
            logps = logits[:, prompt.shape[1] - 1:-1].float().log_softmax(-1)               # (O,longest,V)
            scores.append((logps.gather(-1, tail[..., None]).squeeze(-1) * real).sum(-1).tolist())
        return scores

    def map(self, image, question, answer):
        return None  # each kind of model has its own order of image tokens
