"""
Group-relative policy optimisation: the model samples several answers to each question, and those that earn more than
their group's mean become likelier. The vision encoder learns too.

    python train_grpo.py --init runs/stage1 --out runs/grpo                         questions of the drawn world
    python train_grpo.py --init runs/stage1 --data rows.jsonl --lr 1e-6 --out runs/grpo   rows with a "reward" field
    python train_grpo.py --init runs/sft --out runs/sft_grpo                        after SFT (VLAA-Thinker: it hurts)

For each picture and question the policy samples a group of answers (sampling.py), each gets a reward (rewards.py), and
its advantage is how far it lies above the group's mean, in standard deviations. Then, as in PPO, a clipped ratio of the
policy to the one that sampled is pushed up or down, token by token, held back by the KL divergence to the start
(Shao et al. 2024, DeepSeekMath, Eq. 3; VLAA-Thinker, arXiv 2504.11468). A group whose answers are all
equally good says nothing, and moves nothing but the KL term.

What later work changes, and which flag shows it:
  1. dividing by the standard deviation favours questions that are nearly always, or never, right (Dr. GRPO, Liu et al.
     2025): --advantage mean
  2. the mean over a response's tokens makes long wrong answers cheap (Dr. GRPO): --length constant
  3. a wider upper bound lets unlikely tokens grow (DAPO, Yu et al. 2025): --clip_high 0.28
  4. no KL, and no reference in memory (both): --kl 0
  5. several updates on the same samples, where the clipping first matters: --updates 4

    diff train_dpo.py train_grpo.py

Ratios are of the policy at temperature 1, whatever --temperature and --top_p the samples are drawn with;
with both at 1, the default, they are those of the policy that sampled.

Left out of VLAA-Thinker's method: its open-ended reward by InternLM-XComposer2.5 is any reward model of transformers
(--reward_model); its batch of 512 questions with two updates of 256 is --batch_size 512 --updates 2 with all of them.
"""
import argparse
import copy
import json
import os
import time
from collections import Counter, defaultdict
from functools import partial

import torch
from tqdm import tqdm

import checkpoints
import common
import data
import parallel
import rewards
import training
from model import MLLM, Chat, InputError
from sampling import sample_groups
from trees import pack

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("--data", nargs="+", default=["scenes/train/vqa"],
                    help="questions with answers: scenes/SPLIT/TASK, a .jsonl file, parquet files, a name of "
                         "sources.py or a hub id; a row's field 'reward' says how an answer is judged")
parser.add_argument("--init", required=True, help="run directory to start from, which is also the reference")
parser.add_argument("--reward", choices=sorted(rewards.KINDS), default="exact",
                    help="how answers to rows without such a field are judged")
parser.add_argument("--reward_model",
                    help="for rows with the reward 'open': hub id or folder of a sequence classifier of transformers")
parser.add_argument("--open_beta", type=common.real(), default=1.0,
                    help="beta in 1 - exp(-beta * (S(prediction) - S(answer))), the reward of open answers")
parser.add_argument("--think", action="store_true",
                    help="ask for <think> and <answer> tags (in training only); an answer without is worth nothing")
parser.add_argument("--group", type=common.positive, default=8, help="answers sampled for each question")
parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (VLAA-Thinker: 0.8)")
parser.add_argument("--top_p", type=float, default=1.0,
                    help="nucleus sampling: only the likeliest tokens whose probabilities reach this sum")
parser.add_argument("--max_new_tokens", type=common.positive, default=32, help="longest sampled answer in tokens")
parser.add_argument("--updates", type=common.positive, default=1, help="optimiser steps on the same samples")
parser.add_argument("--clip_low", type=common.real(0, 1), default=0.2,
                    help="PPO's clip: the ratio counts down to 1 - CLIP_LOW")
parser.add_argument("--clip_high", type=common.real(), default=0.2, help="and up to 1 + CLIP_HIGH")
parser.add_argument("--advantage", choices=("std", "mean"), default="std",
                    help="reward minus the group's mean, divided by its standard deviation or not")
parser.add_argument("--length", choices=("response", "constant"), default="response",
                    help="tokens are averaged over their response, or summed and divided by --max_new_tokens")
parser.add_argument("--kl", type=common.real(), default=1e-3,
                    help="weight of the KL divergence to the start; 0: no reference")
parser.add_argument("--kl_target", type=common.real(),
                    help="change that weight as it goes, so that the divergence comes to this many nats a token "
                         "(VLAA-Thinker: --kl 1e-3 --kl_target 5e-4)")
training.add_training_flags(parser, lr=3e-4, epochs=1, batch_size=32)


def advantages(scores, normalise=True):
    """rewards (B,G) of groups of answers -> (B,G): how far above the group's mean, in its standard deviations (those of
    a sample, plus 1e-4), or in rewards. 0 where all are equal. DeepSeekMath, section 4.1.2"""
    equal = scores.amax(1, keepdim=True) == scores.amin(1, keepdim=True)  # a mean of equal numbers may be rounded
    centred = (scores - scores.mean(1, keepdim=True)).masked_fill(equal, 0.0)
    return centred / (scores.std(1, keepdim=True) + 1e-4) if normalise else centred


def grpo_terms(logps, old_logps, reference_logps, token_advantages, clip_low, clip_high):
    """Log-probs of sampled tokens, all (M,): of the policy, of the policy that sampled them, of the reference (or None)
    -> loss (M,), KL (M,), was it clipped (M,)

        ratio = exp(logp - old),  loss = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)
        KL    = exp(ref - logp) - (ref - logp) - 1      (never negative, right on average: Schulman's k3)

    DeepSeekMath, Eq. 3 and 4. While the policy is still the one that sampled, the ratio is 1 and the gradient is that
    of -A * logp: plain policy gradient."""
    ratio = (logps - old_logps).exp()
    surrogate = ratio * token_advantages
    clipped_surrogate = ratio.clamp(1 - clip_low, 1 + clip_high) * token_advantages
    if reference_logps is None:
        kl = torch.zeros_like(logps)
    else:
        kl = (reference_logps - logps).exp() - (reference_logps - logps) - 1
    return -torch.minimum(surrogate, clipped_surrogate), kl, (clipped_surrogate < surrogate).float()


def adapted(kl_weight, kl, target, n_samples, horizon=10_000):
    """The KL weight after a step of n_samples that came to `kl` nats a token (Ziegler et al. 2019)"""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_weight * (1 + error * n_samples / horizon)


class Judge:
    """Rewards of answers, by the kind of their record"""

    def __init__(self, args, device):
        self.think, self.kinds = args.think, dict(rewards.KINDS)
        if args.reward_model:
            score = rewards.RewardModel(args.reward_model, device)
            self.kinds["open"] = partial(rewards.open_ended, score=score, beta=args.open_beta)

    def __call__(self, prediction, record):
        """-> the reward in [0, 1], or 0 for an answer that cannot be found"""
        judge, said = self.kinds[record["reward"]], rewards.final_answer(prediction) if self.think else prediction
        if judge is rewards.open_ended:
            raise InputError(f"{record['name']}: the reward 'open' wants a --reward_model")
        return 0.0 if said is None else judge(said, record)


class Reader:
    """Trees (lists of row numbers that share a picture) -> the same as records, each with its kind of reward; and the
    reasons of the rows that were left out"""

    def __init__(self, rows, model, args):
        self.rows, self.args, self.chat, self.n_image = rows, args, model.chat, model.n_image  # workers get a copy

    def __call__(self, trees):
        kept, dropped = [], []
        for tree in trees:
            records = []
            for number in tree:
                try:
                    records.append(self.checked(self.rows[number]))
                except data.BadRow as error:
                    dropped.append(str(error))
            if records:
                kept.append([{**record, "image": records[0]["image"]} for record in records])  # one object: read once
        return kept, dropped

    def checked(self, record):
        """-> the record with its kind of reward; raises BadRow"""
        kind = record.get("reward") or self.args.reward
        longest = len(self.chat.prompt_ids(record["question"], self.n_image)) + self.args.max_new_tokens
        if kind not in rewards.KINDS:
            raise data.BadRow(f"{record['name']}: no reward is named '{kind}', only {', '.join(rewards.KINDS)}")
        if kind == "place" and not record.get("box"):
            raise data.BadRow(f"{record['name']}: the reward 'place' wants a box")
        if longest > self.args.max_length:
            raise data.BadRow(f"{record['name']}: {longest} tokens, --max_length is {self.args.max_length}")
        return {**record, "reward": kind}


def as_batch(model, trees, groups):
    """Trees of records and the sampled ids of each record's group -> Batch: a group is branches of its question"""
    groups = iter(groups)
    return pack([model.chat.trunk_ids(model.n_image, i) for i in range(len(trees))],
                [[(model.chat.question_ids(record["question"]), next(groups)) for record in tree] for tree in trees],
                model.pixels([tree[0]["image"] for tree in trees]), model.chat.pad_id)


def main():
    args = parser.parse_args()
    checkpoints.check_out(args)
    if args.temperature <= 0 or not 0 < args.top_p <= 1:
        raise InputError("--temperature must be above 0, --top_p above 0 and at most 1")
    if args.kl_target and not args.kl:
        raise InputError("--kl_target adapts --kl, which is 0")
    if args.group < 2:
        raise InputError("--group must be at least 2: an answer is compared with the others of its group")
    device, autocast = common.setup(args.seed, args.matmul)

    # ---- model, reference and data
    model = MLLM.load(args.init)
    if args.think:
        model.chat = Chat(model.tokenizer, rewards.THINK)
    rows, steps = data.plan(args, "vqa")
    micro_batch = args.micro_batch or args.batch_size
    model.to(device).train()
    if args.compile:
        model.compile_hot_path()
    reference = copy.deepcopy(model).eval().requires_grad_(False) if args.kl else None      # whole in every process
    if args.grad_checkpoint:
        model.gradient_checkpointing()
    optimizer = training.Optimizer(model, args, len(steps) * args.updates)  # also freezes the parts whose rate is 0
    judge = Judge(args, device)
    run = checkpoints.Run(args, model, optimizer, steps, args.updates, parent=args.init, data=args.data,
                          rows=rows.identity())
    drift = training.Drift(model)
    example = data.show(model, data.Collator(rows, model, ("answer",), args.max_length))
    print(f"example     what is learnt from are the model's own answers; [[ ]] is for the reward\n{example}\n")

    # ---- train
    carried = run.restore(kl_weight=args.kl, judged=[])                        # judged: groups since the last line
    n_samples_since, since = 0, time.time()
    reader = Reader(rows, model, args)
    if args.shard:                                                              # FSDP wants its first call to be whole
        with torch.no_grad(), autocast():
            model.token_logps(data.empty_batch(model).to(device))
    for step, (trees,) in run.loop(data.batches(reader, steps, args.batch_size, args.workers, run.first), []):
        records = [record for tree in trees for record in tree]
        run.check()                                                             # no samples of what is no number
        # sample, judge, compare
        with autocast(), parallel.unsharded(model):
            groups, entropy = sample_groups(model, [r["image"] for r in records], [r["question"] for r in records],
                                            args.group, args.max_new_tokens, args.temperature, args.top_p)
        texts = [[text.strip() for text in model.tokenizer.batch_decode(group, skip_special_tokens=True)]
                 for group in groups]
        scores = torch.tensor([[judge(text, record) for text in group] for group, record in zip(texts, records)])
        scores = scores.view(-1, args.group)                                    # (0,G) in a process without rows
        carried.judged += parallel.gather([(record["reward"], group.tolist())
                                           for record, group in zip(records, scores)])
        n_samples = parallel.all_sum(scores.numel())
        n_samples_since += n_samples
        advantage, parts, at = advantages(scores, args.advantage == "std"), [], 0               # (B,G)
        chunks = list(data.cut(trees, micro_batch))
        chunks += [[]] * (parallel.all_max(len(chunks)) - len(chunks))          # all processes take part as often
        for micro_trees in chunks:                                              # micro-batches, with what stays fixed
            end = at + sum(map(len, micro_trees))
            part, at = slice(at, end), end
            batch = (as_batch(model, micro_trees, groups[part]) if micro_trees else data.empty_batch(model)).to(device)
            lengths = batch.per_response(torch.ones_like(batch.targets, dtype=torch.float))     # (R,)
            token_weight = 1 / (n_samples * (lengths if args.length == "response" else
                                             torch.full_like(lengths, args.max_new_tokens)))
            with torch.no_grad(), autocast():
                old_logps = model.token_logps(batch) if args.updates > 1 else None
                reference_logps = reference.token_logps(batch) if reference else None
            parts.append((batch, advantage[part].flatten().to(device)[batch.response_of],       # (M,)
                          token_weight[batch.response_of], old_logps, reference_logps))
        n_tokens = parallel.all_sum(sum(len(batch.targets) for batch, *_ in parts))
        entropy = parallel.all_sum(float(entropy)) / n_tokens
        logged = False
        for update in range(step * args.updates, (step + 1) * args.updates):
            sums = defaultdict(float)
            for batch, token_advantage, token_weight, old_logps, reference_logps in run.count_flops(update, parts):
                with autocast():
                    logps = model.token_logps(batch)                                    # (M,)
                losses, kl, clipped = grpo_terms(logps, logps.detach() if old_logps is None else old_logps,
                                                 reference_logps, token_advantage, args.clip_low, args.clip_high)
                loss = ((losses + carried.kl_weight * kl) * token_weight).sum()
                loss.backward()
                for name, value in {"loss": loss.detach(), "kl": kl.detach().sum() / n_tokens,
                                    "clipped": clipped.sum() / n_tokens}.items():
                    sums[name] += value                                         # stays on the device until it is logged
            sums = parallel.all_sum(sums)
            if run.step(update, {**sums, **optimizer.step(update)}, lambda: {
                    **drift(), **summary(carried.judged), "entropy": entropy, "kl_weight": carried.kl_weight,
                    "length": n_tokens / n_samples, "peak_mb": common.peak_memory_mb(device),
                    "samples_per_s": n_samples_since / (time.time() - since)}):
                logged = True
                run.bar.set_postfix(reward=f"{float(scores.mean()):.3f}", kl=f"{float(sums['kl']):.1e}")
                if records and not parallel.RANK:
                    note_samples(run.folder, update, records, texts, scores)
        if logged:
            carried.judged, n_samples_since, since = [], 0, time.time()
        if args.kl_target:
            carried.kl_weight = adapted(carried.kl_weight, float(sums["kl"]), args.kl_target, n_samples)
    run.finish()


def summary(judged):
    """Groups as (kind of reward, [G rewards]) -> mean and spread of the rewards, the mean of each kind, and the share
    of groups that say nothing"""
    kinds, scores = defaultdict(list), torch.tensor([group for _, group in judged])             # (all groups,G)
    for kind, group in judged:
        kinds[kind] += group
    return {"reward": scores.mean(), "reward_std": scores.std(1).mean(),
            "no_signal": (scores.amax(1) == scores.amin(1)).float().mean(),
            **{f"reward_{kind}": sum(values) / len(values) for kind, values in kinds.items()}}


def note_samples(folder, step, records, texts, scores):
    """Shows and writes to samples.jsonl the question of this step whose answers differ most in reward"""
    i = int(scores.std(1).argmax())
    said = Counter(zip(texts[i], scores[i].tolist())).most_common()
    tqdm.write(f"step {step:<6} {records[i]['question']}  " +
               " | ".join(f"{n} x {text[:60]!r} {reward:.2f}" for (text, reward), n in said[:4]))
    with open(os.path.join(folder, "samples.jsonl"), "a") as f:
        f.write(json.dumps({"step": step, "row": records[i]["name"], "question": records[i]["question"],
                            "answer": records[i]["answer"], "kind": records[i]["reward"],
                            "said": [{"text": text, "reward": reward, "n": n} for (text, reward), n in said]}) + "\n")


if __name__ == "__main__":
    common.cli(main)
