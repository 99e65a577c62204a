"""
The peer of bench.py: TRL's DPOTrainer, stepping on the very weights of one of our runs.

`llava` puts our encoder, connector and LLM into transformers' LLaVA, the model class that TRL knows; `trl_steps` lets
TRL 1.16 take a few steps with it and notes time, memory, loss and gradient norm. Nothing is copied or converted: LLaVA
gets our own modules, so tied weights, attention kernels and initial values are the same by construction.
"""
import contextlib
import copy
import tempfile
import warnings
from unittest import mock

import torch
from datasets import Dataset
from transformers import (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PrinterCallback, TrainerCallback,
                          logging)
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils

from model import MLLM, InputError

# Our Chat's four strings as a template for TRL, which hands over every turn as a list of parts, the text last. The
# strings go in as literals: as bare text, jinja would swallow a newline at their start.
TEMPLATE = ("{{% for turn in messages %}}{{% set text = turn.content[-1].text %}}{{% if turn.role == 'user' %}}"
            "{{{{ {head!r} + {image!r} + '\\n' + text + {middle!r} }}}}{{% else %}}"
            "{{{{ {lead!r} + text + {tail!r} }}}}{{% endif %}}{{% endfor %}}")


def llava(model):
    """Our MLLM (SigLIP or CLIP, connector with pool 1) in transformers' LLaVA
    -> LlavaForConditionalGeneration, LlavaProcessor

    LLaVA shares `model`'s parameters: training one trains both. The encoder's tail stays off, so LLaVA is spared the
    layers behind `feature_layer`. LLaVA wants the picture's token in the vocabulary, but a longer vocabulary is another
    softmax; so the padding token, which no text contains, becomes the picture's, and rows are padded with the end of
    turn instead (masked, so it does not matter by what)."""
    tokenizer, chat = copy.deepcopy(model.tokenizer), model.chat
    image, image_id = tokenizer.pad_token, tokenizer.pad_token_id
    if model.pool != 1 or model.n_special > 1 or image_id is None or image_id in chat.stop_ids:
        raise InputError("LLaVA needs pool 1, SigLIP or CLIP, and a padding token that is not the end of turn")
    tokenizer.pad_token = tokenizer.eos_token
    L = model.vision.config.num_hidden_layers
    depth = model.feature_layer % (L + 1)                  # -2 of L + 1 hidden states; it counts from the front here,
    strategy = ["full", "default"][model.n_special]        # as our encoder ends there. "default" drops CLIP's CLS
    with torch.device("meta"):                             # only the shell: every parameter is replaced below
        peer = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=copy.deepcopy(model.vision.config), text_config=copy.deepcopy(model.llm.config),
            image_token_index=image_id, projector_hidden_act="gelu",  # the exact one, as ours
            vision_feature_layer=depth, vision_feature_select_strategy=strategy))
    peer.model.vision_tower, peer.model.language_model = model.vision, model.llm.base_model
    peer.model.multi_modal_projector.linear_1 = model.connector.up
    peer.model.multi_modal_projector.linear_2 = model.connector.down
    peer.lm_head = model.llm.get_output_embeddings()
    template = TEMPLATE.format(head=chat.head, image=image, middle=chat.middle, lead=chat.lead, tail=chat.tail)
    processor = LlavaProcessor(model.image_processor, tokenizer, patch_size=model.vision.config.patch_size,
                               vision_feature_select_strategy=strategy, chat_template=template, image_token=image,
                               num_additional_image_tokens=model.n_special)
    return peer, processor


class Measure(TrainerCallback):
    """Measures each step from on_step_begin (its batch is already collated) to on_step_end (weights updated).

    Forward of policy and reference, backward, clipping, AdamW and the trainer's own metrics lie between; reading and
    tokenising lie before. The log, whence loss and gradient norm, comes after."""

    def __init__(self, meter):
        self.make_meter, self.steps = meter, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.meter = self.make_meter().__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.__exit__(None, None, None)
        self.steps.append({"seconds": self.meter.seconds, "held_mb": self.meter.held, "peak_mb": self.meter.peak_mb})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:                                    # the last log of a run is a summary without it
            self.steps[-1].update(loss=logs["loss"], grad_norm=logs["grad_norm"])


def trl_steps(policy_run, reference_run, records, pairs, n_steps, lr, compact, grad_checkpoint, meter):
    """TRL's DPOTrainer for `n_steps` of `pairs` pairs, read from `records` in their order
    -> [{"seconds", "peak_mb", "loss", "grad_norm"}, ...] one a step; see Measure for what is measured, by `meter()`

    policy_run and reference_run must hold different weights: at equal ones any broken loss is log 2 as well.
    compact: on a GPU, TRL's fused LM head scores response positions only; on a CPU it scores all of them, which is
    more than twice the work. True flips that one choice and nothing else (its tiles stay in torch), so that
    a CPU sees the TRL of a GPU. False is TRL as it comes."""
    cuda = torch.cuda.is_available()
    logging.set_verbosity_error()
    policy, processor = llava(MLLM.load(policy_run))
    reference, _ = llava(MLLM.load(reference_run))               # TRL refuses cached reference log-probs for pictures
    turn = lambda role, text: [{"role": role, "content": text.strip()}]
    rows = Dataset.from_list([
        {"images": [record["image"].convert("RGB")], "prompt": turn("user", record["question"].replace("<image>", "")),
         "chosen": turn("assistant", record["chosen"]), "rejected": turn("assistant", record["rejected"])}
        for record in records])
    measure = Measure(meter)
    # the kernels' module keeps a _use_triton of its own: only the choice of positions asks this one
    choose = mock.patch.object(trl_utils, "_use_triton", lambda device: True) if compact else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, choose, warnings.catch_warnings(action="ignore"):
        config = DPOConfig(
            folder, per_device_train_batch_size=pairs, max_steps=n_steps, train_sampling_strategy="sequential",
            learning_rate=lr, lr_scheduler_type="constant", optim="adamw_torch_fused", weight_decay=0.0,
            max_grad_norm=1.0, beta=0.1, max_length=None,                    # None: the default 1024 cuts answers
            bf16=cuda, use_cpu=not cuda,                                     # bf16 is TRL's default, on a CPU too
            gradient_checkpointing=grad_checkpoint,                          # TRL's default is True
            gradient_checkpointing_kwargs={"use_reentrant": False} if grad_checkpoint else None,
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
        trainer = DPOTrainer(policy, reference, config, train_dataset=rows, processing_class=processor,
                             callbacks=[measure])                            # seeds torch, NumPy and Python with 42
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return measure.steps
