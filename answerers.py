"""
Who answers: a run of ours, or any image-text-to-text model of transformers. Both know two things:

    generate(images, questions, max_new_tokens) -> texts        greedy
    option_logps(images, questions, options) -> lists           log-probability of each option, with the turn's end
                                                                (without it "red" would always beat "red ring")

and a run can say where in a picture the gradient of its answer lies.
"""
import glob
import hashlib
import os

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import common
from artefacts import answer_map
from model import MLLM, InputError, distinct, opened
from trees import pack


def identity(model, is_hub):
    """A short name of a model's contents, so that saved answers are not taken for another model's: of a run the hash of
    its config and of samples of its weights, of another folder its files' sizes and times, of a hub id the id"""
    is_run = os.path.isfile(os.path.join(model, "connector.safetensors"))
    if is_hub:
        if is_run:
            raise InputError(f"{model} is a run directory: name it without --hf")
        opened(AutoConfig, model)  # so that a wrong name is known before others have answered everything
        if not os.path.isdir(model):
            return model
        files = sorted(os.scandir(model), key=lambda file: file.name)
        return common.digest(*(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files))
    if not is_run:
        raise InputError(f"{model} is not a run directory: it has no connector.safetensors" + "; a model of "
                         "transformers goes behind --hf" * os.path.isfile(os.path.join(model, "config.json")))
    contents = hashlib.sha256()
    for path in [os.path.join(model, "config.json"),
                 *sorted(glob.glob(os.path.join(glob.escape(model), "**", "*.safetensors"), recursive=True))]:
        size, block = os.path.getsize(path), 2**16
        with open(path, "rb") as f:
            for at in np.linspace(0, max(0, size - block), 64, dtype=int).tolist():  # 4 MB of a file are enough
                f.seek(at)
                contents.update(f.read(block))
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
        self.model.to(device).eval()  # requires_grad stays on: autocast keeps bf16 copies of such weights only
        self.generate = self.model.generate

    @torch.no_grad()
    def option_logps(self, images, questions, options):
        """images, questions and options are lists of B, the last of lists of texts -> B lists of floats.

        The options of a question are branches of one sequence (trees.py), and a picture that is the same object in
        several places is encoded once."""
        model, chat = self.model, self.model.chat
        pictures, numbers = distinct(images)
        trunks = [chat.trunk_ids(model.n_image, i) for i in numbers]
        trees = [[(chat.question_ids(question), list(map(chat.response_ids, texts)))]
                 for question, texts in zip(questions, options, strict=True)]
        batch = pack(trunks, trees, model.pixels(pictures), chat.pad_id).to(model.device)
        logps = iter(batch.per_response(model.token_logps(batch)).tolist())
        return [[next(logps) for _ in texts] for texts in options]

    def map(self, image, question, answer):
        """Where in the picture would a change make this answer likelier? -> (rows, columns) over the whole picture"""
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
        if not self.tokenizer or not getattr(self.processor, "chat_template", None):
            raise InputError(f"--hf {name} has no chat template: how it wants to be asked is not known")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        marker = "ANSWERMARKER"  # what the template writes before and after an answer, as in model.Chat
        turn = lambda role, text: {"role": role, "content": [{"type": "text", "text": text}]}
        prompt = self.processor.apply_chat_template([turn("user", "?")], tokenize=False, add_generation_prompt=True)
        full = self.processor.apply_chat_template([turn("user", "?"), turn("assistant", marker)], tokenize=False)
        before, _, after = full.rpartition(marker)
        self.lead = before[len(prompt):] if before.startswith(prompt) else ""
        self.end = after.rstrip() or self.tokenizer.eos_token

    def inputs(self, images, questions):
        """-> what the model takes: ids (B,T) padded on the left, pictures in its own form"""
        texts = [question.replace("<image>", "").strip() for question in questions]  # the tag's place is the template's
        turns = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
                 for image, text in zip(images, texts, strict=True)]
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
    def option_logps(self, images, questions, options):
        """A question at a time, its options as rows: plain, and right for every kind of model"""
        scores = []
        for image, question, texts in zip(images, questions, options, strict=True):
            inputs = dict(self.inputs([image], [question]))
            prompt, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")            # (1,T)
            ids = [self.tokenizer(self.lead + text + self.end, add_special_tokens=False)["input_ids"] for text in texts]
            longest, pad = max(map(len, ids)), self.tokenizer.pad_token_id
            tail = torch.tensor([each + [pad] * (longest - len(each)) for each in ids], device=prompt.device)
            real = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids], device=prompt.device)
            rows = lambda tensor: tensor.repeat(len(ids), *[1] * (tensor.ndim - 1))
            # some models also take the type of each token: what is appended is text, type 0
            more = {name: torch.cat([rows(value), torch.zeros_like(tail)], 1) if name.endswith("token_type_ids") else
                    rows(value) for name, value in inputs.items() if torch.is_tensor(value)}
            logits = self.model(input_ids=torch.cat([rows(prompt), tail], 1),
                                attention_mask=torch.cat([rows(mask), real], 1), **more).logits
            logps = logits[:, prompt.shape[1] - 1:-1].float().log_softmax(-1)               # (O,longest,V)
            scores.append((logps.gather(-1, tail[..., None]).squeeze(-1) * real).sum(-1).tolist())
        return scores
