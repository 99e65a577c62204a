"""What test_parallel.py starts under torchrun and without it: several small runs, one after the other, in folder argv[1]."""
import sys

import torch

import common
import probe
import train_dpo
import train_grpo
import train_sft

folder, start, rows = sys.argv[1:4]


def run(stage, out, *flags):
    sys.argv = [f"train_{stage.__name__[6:]}.py", "--init", start, "--out", f"{folder}/{out}", "--log_every", "1", "--compile", "false",
                "--max_bad", "1", *flags]
    stage.main()


def say(model, images, questions, n, most, temperature, top_p, sample=train_grpo.sample_groups):
    """Samples that depend on question and weights alone, so that any number of processes draws the same: what is likeliest, and a bit more"""
    likeliest = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids, in sample(model, images, questions, 1, 3, 0)[0]]
    texts = [[text + question[at:at + 3 + at % 2] for at in range(n)] for text, question in zip(likeliest, questions)]
    return [[model.chat.response_ids(text) for text in each] for each in texts], torch.tensor(.5 * len(questions))


def runs():
    sft = ("--n", "22", "--batch_size", "8", "--micro_batch", "2", "--lr", "1e-4", "--data", "scenes/train/sft/4")  # last step: one tree
    dpo = ("--n", "9", "--batch_size", "4", "--epochs", "2", "--lr", "1e-4", "--bco_weight", "0.2", "--sft_weight", "0.1")
    run(train_sft, "sft", *sft)
    run(train_sft, "bad", "--data", rows, "--batch_size", "2", "--lr", "1e-4", "--epochs", "1")  # two of six rows cannot be used
    run(train_dpo, "dpo", *dpo)
    if common.parallel.WORLD > 1:
        run(train_sft, "sft_shard", *sft, "--shard", "--grad_checkpoint")
    run(train_dpo, "dpo_shard", *dpo, "--shard", "--lr_vision", "0", "--keep", "2", "--save_every", "3")  # alone there is nothing to split
    train_grpo.sample_groups = say
    train_grpo.rewards.KINDS |= dict.fromkeys(("exact", "place"), lambda said, record: sum(map(ord, said)) % 7 / 7)
    grpo = ("--n", "9", "--batch_size", "4", "--group", "3", "--lr", "1e-4", "--updates", "2", "--clip_low", "1e-4", "--clip_high", "1e-4",
            "--kl_target", "1e-6")
    run(train_grpo, "grpo", *grpo)
    if common.parallel.WORLD > 1:
        run(train_grpo, "grpo_shard", *grpo, "--shard", "--micro_batch", "1")           # one process has more micro-batches than the other
    sys.argv = ["probe.py", start, "--n", "20", "--seeds", "1", "--out", f"{folder}/probe"]
    probe.main()


common.cli(runs)
