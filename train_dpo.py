"""
Direct preference optimisation: the model learns to tell the better answer from the worse,
and the vision encoder learns too.

    python train_dpo.py --init runs/stage1 --n 5000 --out runs/dpo   pairs of the drawn world
    python train_dpo.py --init runs/stage1 --data pairs.jsonl --lr 1e-6 --out runs/dpo   your own pairs

Picture and question are read once for both answers, so the encoder's gradient is that of chosen and rejected together.
The reference is the starting checkpoint. It never changes, so its log-probs are computed once and remembered beside it.
Log-probs are sums over response tokens (PIVOT, arXiv 2510.16333, Eq. 1; its code: beta 0.1, lr 1e-6, 3 epochs of 20,000
pairs, 256 pairs a step, all three parts trained).

    python train_dpo.py --init runs/stage1 --dpo_weight 0.8 --bco_weight 0.2 --sft_weight 1 --out runs/mpo   MPO

    diff train_sft.py train_dpo.py

shows the method; beside it only how SFT may begin (fresh parts) and stop (--max_drift), and what is logged. Left out
of the paper's: fp16 and ZeRO over eight GPUs, sampling by length, and its second encoding of the same picture (same
gradient, twice the work).
"""
import argparse
import copy
import json
import os
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import checkpoints
import common
import data
import parallel
import training
from model import MLLM, InputError

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("--data", nargs="+", default=["scenes/train/foreign"],
                    help="preference pairs: scenes/SPLIT/TASK, a .jsonl file, parquet files, a name of sources.py or a "
                         "hub id; SOURCE[:500] and SOURCE[:10%%] take the first rows of a file or set")
parser.add_argument("--init", required=True, help="run directory to start from, which is also the reference")
parser.add_argument("--beta", type=common.real(), default=0.1,
                    help="how strongly to stay near the reference (a factor on summed log-ratios)")
parser.add_argument("--label_smoothing", type=common.real(0, 1), default=0.0,
                    help="assumed share of pairs whose preference is the wrong way round (cDPO)")
parser.add_argument("--dpo_weight", type=common.real(), default=1.0, help="weight of the preference loss (MPO: 0.8)")
parser.add_argument("--bco_weight", type=common.real(), default=0.0,
                    help="weight of an added quality loss: is each answer good by itself? (MPO: 0.2)")
parser.add_argument("--sft_weight", type=common.real(), default=0.0,
                    help="weight of an added SFT loss on the chosen answers, token mean (MPO: 1.0)")
parser.add_argument("--reference", choices=("remembered", "live"), default="remembered",
                    help="remembered: the reference's log-probs are computed once, kept in INIT.reference/ and found "
                         "there by later runs; live: a second model in memory computes them at every step")
training.add_training_flags(parser, lr=3e-4, epochs=3, batch_size=64)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta, label_smoothing=0.0):
    """DPO (PIVOT Eq. 1; Rafailov et al. 2023, Eq. 7), all inputs and outputs (B,);
    log-probs are sums over response tokens.

        loss = -log sigmoid(beta * [(log pi(y_c) - log ref(y_c)) - (log pi(y_r) - log ref(y_r))])

    With label smoothing e, the loss is (1 - e) times that plus e times the loss of the swapped pair.
    -> losses, chosen_rewards, rejected_rewards; a reward is beta * (log pi - log ref), without gradient.
    Equal to log 2, 0, 0 as long as the policy equals its reference."""
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen - rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen.detach(), rejected.detach()


def bco_loss(chosen_rewards, rejected_rewards, shift):
    """The quality term of MPO (Wang et al. 2024, arXiv 2411.10442; BCO: Jung et al. 2024): is each answer by
    itself above or below the usual reward? rewards beta * (log pi - log ref) with gradient, (B,); shift: a number.

        loss = -log sigmoid(r_c - shift) - log sigmoid(-(r_r - shift))          -> losses (B,); 2 log 2 at the start

    shift is the mean of all rewards so far; here of all steps before, whatever the micro-batches are."""
    return -F.logsigmoid(chosen_rewards - shift) - F.logsigmoid(shift - rejected_rewards)


class Reference:
    """Log-probs of the starting checkpoint as numbers: computed once, with the model that is about to be trained.

    Kept in INIT.reference/NAME.safetensors; NAME is a hash of all they depend on, so an epoch, a restart or another
    learning rate finds them, and other weights or rows do not. Each pair also carries a fingerprint of the very ids and
    pixels that were read; a pair that would now be read otherwise (its picture was replaced, say) is refused."""

    def __init__(self, init, model, rows, precision, questions_per_tree):
        digest = common.digest
        chat, configs = model.chat, [part.config.to_dict() for part in (model.vision, model.llm)]
        for config in configs:
            config.update(_name_or_path=None, transformers_version=None)
        self.key = {"version": 1,                                               # raise it when our log-probs change
                    "weights": digest(*(part for named in model.state_dict().items() for part in named)),
                    "rows": rows.identity(), "precision": precision,
                    "configuration": digest(json.dumps(configs, sort_keys=True, default=str)),
                    "template": digest(chat.head, chat.middle, chat.lead, chat.tail),
                    "tokenizer": digest(json.dumps(model.tokenizer.get_vocab(), sort_keys=True)),
                    "image processing": digest(model.image_processor.to_json_string()),
                    "questions_per_tree": questions_per_tree}
        self.source = rows.source
        self.file = f"{init.rstrip('/')}.reference/{digest(json.dumps(self.key))}.safetensors"
        self.logps = {}                                                         # row -> fingerprint, log p of both
        if os.path.exists(self.file):
            try:
                with safe_open(self.file, "pt") as f:
                    found = json.loads((f.metadata() or {}).get("key", "{}"))
                    table = {name: f.get_tensor(name).tolist() for name in f.keys()}
            except (SafetensorError, ValueError) as error:
                raise InputError(f"{self.file} cannot be read ({error}); remove it") from None
            other = [name for name in self.key if self.key[name] != found.get(name)]
            if other:
                raise InputError(f"{self.file} was computed with other {', '.join(other)}; remove it")
            self.logps = {row: values for row, *values in
                          zip(table["row"], table["fingerprint"], table["chosen"], table["rejected"])}

    def save(self):
        rows, values = list(self.logps), list(zip(*self.logps.values()))
        os.makedirs(os.path.dirname(self.file), exist_ok=True)
        whole = f"{self.file}.{os.getpid()}.tmp"                                # another run may be writing the same
        save_file({"row": torch.tensor(rows), "fingerprint": torch.tensor(values[0]),
                   "chosen": torch.tensor(values[1]), "rejected": torch.tensor(values[2])},
                  whole, {"key": json.dumps(self.key)})
        os.replace(whole, self.file)

    @torch.no_grad()
    def fill(self, model, collator, steps, micro_batch, workers, autocast):
        """Computes what is not there yet, in the very micro-batches of training: so step 0 is log 2, and on a CPU the
        rewards are 0 to the last bit."""
        known, todo = set(self.logps), []
        for step in steps:
            for rank in range(parallel.WORLD):                                  # all know who computes what
                for part in data.cut(step[rank::parallel.WORLD], micro_batch):
                    part = [[row for row in tree if row not in known] for tree in part]  # may leave trees without rows
                    if any(part) and rank == parallel.RANK:
                        todo.append(part)
                    known.update(row for tree in part for row in tree)
        before, saved, n = len(self.logps), time.time(), parallel.all_max(len(todo))
        nothing = data.empty_batch(model)
        batches = (batch for ((batch, _),) in data.batches(collator, todo, micro_batch, workers, rank=0, world=1))
        for _ in tqdm(range(n), desc="reference", disable=not n or parallel.RANK > 0):
            batch = next(batches, None)
            if batch is None and parallel.WORLD == 1:                           # its rows cannot be used
                continue
            batch = batch or nothing                                            # all take part as often
            with autocast():
                logps = batch.per_response(model.token_logps(batch.to(model.device))).tolist()
            for (row, fingerprint), chosen, rejected in zip(batch.rows, logps[0::2], logps[1::2]):
                self.logps[row] = fingerprint, chosen, rejected
            if self.logps and time.time() - saved > 60 and not parallel.RANK:   # a kill loses a minute
                self.save()
                saved = time.time()
        self.logps = parallel.gather(self.logps)
        if len(self.logps) > before and not parallel.RANK:
            self.save()
        print(f"reference   {self.file}: {len(self.logps)} pairs, {len(self.logps) - before} computed now")

    def __call__(self, batch):
        """-> (R,) fp32, chosen and rejected in turn"""
        for row, fingerprint in batch.rows:
            if self.logps.get(row, [None])[0] != fingerprint:
                raise InputError(f"{self.source} row {row} is not what {self.file} was computed from: its picture, or "
                                 "the code that prepares it, changed since; remove that file")
        return torch.tensor([logp for row, _ in batch.rows for logp in self.logps[row][1:]])


def main():
    args = parser.parse_args()
    checkpoints.check_out(args)
    if args.shard and args.reference == "live":
        raise InputError("--shard: use --reference remembered, which needs no second model")
    if args.stream and args.reference == "remembered":
        raise InputError("--stream: its rows have no numbers by which to remember log-probs; add --reference live")
    device, autocast = common.setup(args.seed, args.matmul)

    # ---- model, reference and data
    model = MLLM.load(args.init)
    rows, steps = data.plan(args, "pairs")
    micro_batch = args.micro_batch or args.batch_size
    collator = data.Collator(rows, model, ("chosen", "rejected"), args.max_length)
    model.to(device).train()
    if args.compile:
        model.compile_hot_path()
    if args.grad_checkpoint:
        model.gradient_checkpointing()
    optimizer = training.Optimizer(model, args, len(steps))  # also freezes the parts whose rate is 0
    run = checkpoints.Run(args, model, optimizer, steps, parent=args.init, data=args.data, rows=rows.identity())
    drift = training.Drift(model)
    print(f"example     chosen, then rejected\n{data.show(model, collator)}\n")
    if args.reference == "remembered":
        reference = Reference(args.init, model, rows, f"{device.type} {args.matmul}",
                              min(args.questions_per_tree, micro_batch))       # no tree is larger than a micro-batch
        reference.fill(model, collator, steps, micro_batch, args.workers, autocast)
    else:
        frozen = copy.deepcopy(model).eval().requires_grad_(False)

        @torch.no_grad()
        def reference(batch):
            with autocast():
                return batch.per_response(frozen.token_logps(batch))

    # ---- train
    carried = run.restore(all_rewards=0.0, n_all=0)                            # BCO's shift is their mean so far
    n_pairs_since, since = 0, time.time()
    for step, step_batches in run.loop(data.batches(collator, steps, micro_batch, args.workers, run.first),
                                       data.empty_batch(model)):
        shift = carried.all_rewards / max(1, carried.n_all)                     # only for --bco_weight
        n_pairs = parallel.all_sum(sum(len(batch.rows) for batch in step_batches))
        n_chosen_tokens = parallel.all_sum(sum(int((batch.response_of % 2 == 0).sum()) for batch in step_batches))
        sums = defaultdict(float)
        for batch in run.count_flops(step, step_batches):
            batch = batch.to(device)
            reference_logps = reference(batch).to(device, non_blocking=True)    # (2B,) of B pairs
            with autocast():
                policy_logps = batch.per_response(model.token_logps(batch))     # (2B,) fp32
            policy_chosen, policy_rejected = rearrange(policy_logps, "(b two) -> two b", two=2)        # (B,) each
            reference_chosen, reference_rejected = rearrange(reference_logps, "(b two) -> two b", two=2)
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                policy_chosen, policy_rejected, reference_chosen, reference_rejected, args.beta, args.label_smoothing)
            quality = bco_loss(args.beta * (policy_chosen - reference_chosen),
                               args.beta * (policy_rejected - reference_rejected), shift)
            sft = -policy_chosen.sum() / n_chosen_tokens                        # token mean of the step, as in SFT
            loss = args.dpo_weight * losses.sum() / n_pairs + args.bco_weight * quality.sum() / n_pairs + \
                args.sft_weight * sft
            loss.backward()
            margins = chosen_rewards - rejected_rewards
            won = (margins > 0).float() + .5 * (margins == 0)                   # a tie is half a win: it starts at .5
            for name, value in {"chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
                                "margin": margins, "accuracy": won, "chosen_logp": policy_chosen.detach(),
                                "rejected_logp": policy_rejected.detach()}.items():
                sums[name] += value.sum() / n_pairs                             # stays on the device until it is logged
            sums["loss"] += loss.detach()
        sums = parallel.all_sum(sums)
        n_pairs_since, carried.n_all = n_pairs_since + n_pairs, carried.n_all + n_pairs
        carried.all_rewards += n_pairs * (sums["chosen_reward"] + sums["rejected_reward"]) / 2
        if run.step(step, {**sums, **optimizer.step(step)}, lambda: {
                **drift(), "pairs_per_s": n_pairs_since / (time.time() - since),
                "peak_mb": common.peak_memory_mb(device)}):
            n_pairs_since, since = 0, time.time()
            run.bar.set_postfix(loss=f"{float(sums['loss']):.3f}", accuracy=f"{float(sums['accuracy']):.2f}")
    run.finish()


if __name__ == "__main__":
    common.cli(main)
