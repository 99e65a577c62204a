"""
Direct preference optimisation: the model learns to tell the better answer from the worse,
and the vision encoder learns too.

    python train_dpo.py --init runs/stage1 --n 5000 --out runs/dpo   pairs of the drawn world
    python train_dpo.py --init runs/stage1 --data pairs.jsonl --lr 1e-6 --out runs/dpo   your own pairs

Each picture is encoded once for both answers, so the encoder's gradient is that of chosen and rejected together. The
reference is the starting checkpoint, frozen and in eval mode; log-probs are sums over response tokens (PIVOT, arXiv
2510.16333, Eq. 1; its code: beta 0.1, lr 1e-6, 3 epochs of 20,000 pairs, 256 pairs a step, all three parts trained).

    diff train_sft.py train_dpo.py

is the whole difference between the arms. Left out of the paper's method: fp16 and ZeRO over eight GPUs, sampling by
length, and its second encoding of the same picture (same gradient, twice the work).
"""
import argparse
import copy
import time

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import common
import data
from model import MLLM

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="scenes/train/foreign",
                    help="preference pairs: scenes/SPLIT/TASK, a .jsonl file, a parquet folder or a hub id")
parser.add_argument("--init", required=True, help="run directory to start from, which is also the reference")
parser.add_argument("--beta", type=float, default=0.1,
                    help="how strongly to stay near the reference (a factor on summed log-ratios)")
parser.add_argument("--label_smoothing", type=float, default=0.0,
                    help="assumed share of pairs whose preference is the wrong way round (cDPO)")
parser.add_argument("--sft_weight", type=float, default=0.0,
                    help="weight of an added SFT loss on the chosen answers (token mean)")
common.add_training_flags(parser, lr=1e-3, epochs=3, batch_size=64)


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


def main():
    args = parser.parse_args()
    common.check_out(args.out)
    device, autocast = common.setup(args.seed)

    # ---- model, reference and data
    model = MLLM.load(args.init)
    reference = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    rows = data.load(args.data, "pairs", args.n, args.seed)
    collator = data.Collator(rows, model, ("chosen", "rejected"), args.max_length)
    steps = data.order(len(rows), args.batch_size, args.epochs, args.seed, args.steps)
    model.to(device).train()
    optimizer = common.Optimizer(model, args, len(steps))  # also freezes the parts whose rate is 0
    if args.grad_checkpoint:
        model.gradient_checkpointing()
    if args.compile:
        model.compile_hot_path()
        reference.compile_hot_path()
    run, drift = (common.Run(args, model, parent=args.init, data=args.data, rows=len(rows), total_steps=len(steps)),
                  common.Drift(model))
    print(f"example     chosen, then rejected\n{data.show(model, collator)}\n")

    # ---- train
    n_dropped, bar = 0, tqdm(data.batches(collator, steps, args.micro_batch or args.batch_size, args.workers),
                             total=len(steps), desc="dpo")
    for step, micro_batches in enumerate(bar):
        began = time.time()
        for _, dropped in micro_batches:
            n_dropped = common.report_dropped(dropped, n_dropped)
        step_batches = [batch for batch, _ in micro_batches if batch is not None]
        if not step_batches:
            continue  # every row of the step was dropped, and said so
        n_pairs = sum(len(batch.input_ids) // 2 for batch in step_batches)
        n_chosen_tokens = sum(int(batch.response_mask[0::2].sum()) for batch in step_batches)
        sums = {}
        for batch in step_batches:
            batch = batch.to(device)
            with torch.no_grad(), autocast():
                reference_logps = reference.response_logps(batch).sum(1)        # (2B,)
            with autocast():
                policy_logps = model.response_logps(batch).sum(1)               # (2B,) fp32
            policy_chosen, policy_rejected = rearrange(policy_logps, "(b two) -> two b", two=2)
            reference_chosen, reference_rejected = rearrange(reference_logps, "(b two) -> two b", two=2)
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                policy_chosen, policy_rejected, reference_chosen, reference_rejected, args.beta, args.label_smoothing)
            sft = -policy_chosen.sum() / n_chosen_tokens                        # token mean of the step, as in SFT
            loss = losses.sum() / n_pairs + args.sft_weight * sft
            loss.backward()
            margins = chosen_rewards - rejected_rewards
            won = (margins > 0).float() + .5 * (margins == 0)                   # a tie is half a win: it starts at .5
            for name, value in {"chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards,
                                "margin": margins, "accuracy": won, "chosen_logp": policy_chosen.detach(),
                                "rejected_logp": policy_rejected.detach()}.items():
                sums[name] = sums.get(name, 0) + value.sum() / n_pairs          # stays on the device until it is logged
            sums["loss"] = sums.get("loss", 0) + loss.detach()
        stats = optimizer.step(step)
        run.check(step, {**sums, **stats})
        if step % args.log_every == 0 or step == len(steps) - 1:
            run.log(step, {**sums, **stats, **drift(), "pairs_per_s": n_pairs / (time.time() - began),
                           "dropped": n_dropped, "peak_mb": common.peak_memory_mb(device)})
            bar.set_postfix(loss=f"{float(sums['loss']):.3f}", accuracy=f"{float(sums['accuracy']):.2f}")
    if n_dropped == sum(map(len, steps)):
        raise SystemExit(f"--data {args.data}: not one row could be used")
    run.finish()


if __name__ == "__main__":
    common.cli(main)
