"""
What does a preference step cost, and what does each saving buy?

    python bench.py                                  the drawn world and a middle size, minutes on a CPU
    python bench.py --shapes 0.5b 1.5b               SigLIP2-so400m/16-384 + Qwen2.5 in bf16, random weights, on a GPU
    pip install trl==1.16.0 && python bench.py       with TRL's DPOTrainer, the peer, in the comparison
    python bench.py --recipes --shapes middle        peak memory of the training scripts, flag by flag

The same pairs, four questions about each picture, go through variants of one DPO step (forward, backward, clipping,
AdamW). From naive on, each has the savings of the one before it:

    trl               TRL's DPOTrainer as it comes (see bench_trl.py); on a CPU it scores prompts and pictures too
    trl_compact       the same, scoring response tokens only, as it does on a GPU: the fair peer on a CPU
    naive             TRL's step by hand, less its metrics: a row a response, a picture for each, the reference live
    image_once        the picture is encoded once for both responses
    cached_reference  the reference's log-probs are numbers, as in train_dpo.py
    shared_prefix     chosen and rejected are branches of one row: picture and question are read once
    tree              all questions about a picture are branches of one row
    sft_rows          supervised fine-tuning on the chosen responses, a row a question
    sft_tree          the same, all questions about a picture in one row
    generate_each     GRPO's samples by transformers' generate, one call a response
    generate_batch    the same in one call for all (num_return_sequences)
    sample_groups     the same by sampling.py

The last three draw 8 responses to each question, as long as the shape's longest; their pairs/s are responses a second.
Each variant runs in a process of its own, in rounds, so that a busy machine is busy for all of them; a ratio is taken
within its round. Every variant must give the same losses and gradient norms: policy and reference have different
weights, as at equal weights any broken variant has the loss log 2; samplers must say the same where they are greedy.
Peak memory is measured in another run (on a CPU through /proc: Linux only), above what was held at the start of a step
(weights, Adam's moments, a live reference), which is printed as "held MB". FLOPs are those of a step, without the
reference pass where its log-probs are numbers.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import checkpoints
import common
import data
import scenes
from model import MLLM, InputError
from sampling import sample_groups
from train_dpo import dpo_loss
from trees import pack

QUESTIONS = 4  # about each picture
DPO = ["trl", "trl_compact", "naive", "image_once", "cached_reference", "shared_prefix", "tree"]
SFT = ["sft_rows", "sft_tree"]
SAMPLING = ["generate_each", "generate_batch", "sample_groups"]
GROUP = 8  # responses to a question
QWEN = dict(vocab_size=151936, num_key_value_heads=2)
SO400M = dict(image_size=384, patch_size=16, hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
              num_attention_heads=16)
SHAPES = {  # name -> encoder, LLM, tokens of a question and of a response, pairs a step, steps a run
    "drawn": (dict(), dict(), None, None, 16, 10),  # scenes.py, without pooling, which LLaVA does not have
    "middle": (dict(image_size=224, patch_size=16, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
                    num_attention_heads=4),
               dict(vocab_size=32000, hidden_size=384, intermediate_size=1408, num_hidden_layers=10,
                    num_attention_heads=6, num_key_value_heads=6), (8, 22), (36, 60), 4, 3),
    "0.5b": (SO400M, dict(QWEN, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
             (40, 40), (150, 150), 16, 8),
    "1.5b": (SO400M, dict(QWEN, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                          num_attention_heads=12), (40, 40), (150, 150), 8, 8)}
RECIPES = {  # what is trained -> script and flags
    "connector": ("train_sft.py", "--lr_vision 0 --lr_llm 0"), "SFT": ("train_sft.py", ""),
    "SFT, one picture at a time": ("train_sft.py", "--micro_batch 4"),
    "SFT, and recomputing": ("train_sft.py", "--micro_batch 4 --grad_checkpoint"),
    "SFT, LLM frozen": ("train_sft.py", "--micro_batch 4 --lr_llm 0"),
    "DPO": ("train_dpo.py", ""), "DPO, one picture at a time": ("train_dpo.py", "--micro_batch 4"),
    "DPO, and recomputing": ("train_dpo.py", "--micro_batch 4 --grad_checkpoint"),
    "DPO, live reference": ("train_dpo.py", "--micro_batch 4 --reference live"),
    "GRPO": ("train_grpo.py", "--micro_batch 4"), "GRPO, no KL": ("train_grpo.py", "--micro_batch 4 --kl 0")}
LR = 1e-5
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, from the cards' data sheets

parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=common.Help)
parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["drawn", "middle"], help="sizes of model and data")
parser.add_argument("--variants", nargs="+", choices=DPO + SFT + SAMPLING,
                    help="default: all; TRL's only where it is installed")
parser.add_argument("--recipes", action="store_true",
                    help="instead of variants: run the training scripts for two steps of 16 rows each (--pairs), and "
                         "report their peak memory")
parser.add_argument("--rounds", type=int, default=3, help="timed runs of every variant")
parser.add_argument("--steps", type=int, help="optimiser steps of a run, the first of which is not timed (default: the "
                                              "shape's own, 3 to 10)")
parser.add_argument("--pairs", type=int, help="pairs a step, a multiple of 4 (default: the shape's own, 4 to 16)")
parser.add_argument("--threads", type=int, default=1, help="CPU threads; seconds are CPU seconds where there is no GPU")
parser.add_argument("--matmul", choices=("highest", "high", "medium"), default="high",
                    help="precision of fp32 matrix products, for all variants alike; see train_dpo.py --help")
parser.add_argument("--grad_checkpoint", action="store_true", help="recompute activations, in all variants alike")
parser.add_argument("--compile", type=common.true_or_false, default=torch.cuda.is_available(),
                    help="torch.compile our loss hot path: true or false (default: true on a GPU)")
parser.add_argument("--json", help="file to write: one row a variant and shape")
parser.add_argument("--plot", help="picture to write")
parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # VARIANT SHAPE FOLDER: one run, started by the above


# ---- what is measured ------------------------------------------------------------------------------------------------


def make_models(shape, folder):
    """Saves FOLDER/reference with random weights, and FOLDER/policy, which is the same plus noise"""
    vision, llm = SHAPES[shape][:2]
    torch.manual_seed(0)
    if shape == "drawn":
        scenes.tiny_vision(folder + "/vision")
        scenes.tiny_llm(folder + "/llm", data.texts("scenes/train/foreign"))
    else:
        scenes.tiny_llm(folder + "/llm", ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 2)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder + "/llm")
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(  # the tokenizer stays, the tiny LLM is overwritten
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **llm)).save_pretrained(folder + "/llm")
        size = vision["image_size"]
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision, vision_use_head=False)) \
            .save_pretrained(folder + "/vision")
        transformers.SiglipImageProcessor(size={"height": size, "width": size}).save_pretrained(folder + "/vision")
    model = MLLM.from_pretrained(folder + "/vision", folder + "/llm")
    model.save(folder + "/reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(.1 * parameter.std() * torch.randn_like(parameter))
    model.save(folder + "/policy")


def make_records(shape, n):
    """n preference pairs, QUESTIONS about each picture in a row"""
    vision, llm, question, response = SHAPES[shape][:4]
    if shape == "drawn":
        return list(scenes.Scenes("train", n, "foreign", 0, QUESTIONS))
    rng, size = random.Random(0), vision["image_size"]
    pictures = [Image.frombytes("RGB", (size, size), rng.randbytes(3 * size**2)) for _ in range(-(-n // QUESTIONS))]
    text = lambda bounds: "".join(rng.choice("0123456789") for _ in range(rng.randint(*bounds)))  # a token a digit
    return [{"image": pictures[i // QUESTIONS], "question": text(question), "chosen": text(response),
             "rejected": text(response)} for i in range(n)]


def layout(model, records, variant):
    """The batch of a step; what is shared in it is all that tells the variants apart"""
    chat, n = model.chat, model.n_image
    fields = ("chosen",) if variant in SFT else ("chosen", "rejected")
    asked = [(chat.question_ids(r["question"]), [chat.response_ids(r[field]) for field in fields]) for r in records]
    per_tree = QUESTIONS if variant.endswith("tree") else 1
    if variant in ("naive", "image_once", "cached_reference"):                  # each response by itself
        trees = [[(question, [response])] for question, responses in asked for response in responses]
        copies = 2 if variant == "naive" else 1
        picture_of_tree = [t if variant == "naive" else t // 2 for t in range(len(trees))]
    else:
        trees, copies = [asked[at:at + per_tree] for at in range(0, len(asked), per_tree)], 1
        picture_of_tree = range(len(trees))
    pixels = model.pixels([r["image"] for r in records[::per_tree]]).repeat_interleave(copies, 0)
    return pack([chat.trunk_ids(n, i) for i in picture_of_tree], trees, pixels, chat.pad_id)


# ---- one run of one variant, in its own process ----------------------------------------------------------------------


class Meter:
    """Seconds and, if `memory`, the peak above what was held at its start, of a `with` block"""

    def __init__(self, device, memory):
        self.cuda, self.memory = device.type == "cuda", memory

    def __enter__(self):
        self.held = None
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated() / 2**20
        elif self.memory:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")                                                    # VmHWM falls to the present VmRSS
            self.held = resident_mb("VmRSS")
        self.began = time.perf_counter() if self.cuda else time.process_time()
        return self

    def __exit__(self, *_):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = (time.perf_counter() if self.cuda else time.process_time()) - self.began
        if self.cuda:
            self.peak_mb = torch.cuda.max_memory_allocated() / 2**20 - self.held
        else:
            self.peak_mb = resident_mb("VmHWM") - self.held if self.memory else None


def resident_mb(field):
    """VmRSS (resident now) or VmHWM (its peak since it was reset) of this process; Linux only"""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1024


def our_steps(variant, folder, records, pairs, args, device, autocast, memory):
    """-> {"seconds", "held_mb", "peak_mb", "loss", "grad_norm", "reference_seconds"} of each step; FLOPs of a pair by
    part, if `memory`"""
    model = MLLM.load(folder + "/policy").to(device).train()
    live = variant in ("naive", "image_once")
    frozen = MLLM.load(folder + "/reference").to(device).requires_grad_(False) if variant in DPO else None
    if args.grad_checkpoint:
        model.gradient_checkpointing()
    if args.compile:
        model.compile_hot_path()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0, fused=True)
    batches = [layout(model, records[at:at + pairs], variant).to(device) for at in range(0, len(records), pairs)]

    @torch.no_grad()
    def reference(batch):
        with autocast():
            return batch.per_response(frozen.token_logps(batch))

    def step(batch, remembered):
        with autocast():
            logps = model.token_logps(batch)                                    # (M,)
        if variant in SFT:
            loss = -logps.mean()
        else:
            chosen, rejected = batch.per_response(logps).view(-1, 2).T
            reference_chosen, reference_rejected = (reference(batch) if live else remembered).view(-1, 2).T
            loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=.1)[0].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    remembered, reference_seconds = [None] * len(batches), [0.0] * len(batches)
    if variant in DPO and not live:
        for i, batch in enumerate(batches):
            with Meter(device, False) as meter:
                remembered[i] = reference(batch)
            reference_seconds[i] = meter.seconds
        del frozen                                                              # one model in memory
    steps = []
    for i, batch in enumerate(batches):
        with Meter(device, memory) as meter:
            loss, norm = step(batch, remembered[i])
        steps.append({"seconds": meter.seconds, "held_mb": meter.held, "peak_mb": meter.peak_mb, "loss": float(loss),
                      "grad_norm": float(norm), "reference_seconds": reference_seconds[i]})
    if not memory:
        return steps, {}
    with FlopCounterMode(display=False, custom_mapping=checkpoints.COUNTED) as flops:  # a further step: it costs
        step(batch, remembered[i])
    total = flops.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=checkpoints.COUNTED) as flops:
        model.image_tokens(batch.pixels).sum().backward()
        if live:
            with torch.no_grad():
                model.image_tokens(batch.pixels)
    vision = flops.get_total_flops()
    head = (4 + live) * 2 * len(batch.targets) * model.llm.get_output_embeddings().weight.numel()   # logits made twice
    return steps, {"vision": vision / pairs, "llm": (total - vision - head) / pairs, "head": head / pairs}


@torch.no_grad()
def sampling_steps(variant, shape, folder, records, pairs, device, autocast, memory):
    """-> {"seconds", "held_mb", "peak_mb"} of drawing GROUP responses to each of the questions of a step; the greedy
    responses to the first questions"""
    model = MLLM.load(folder + "/policy").to(device).eval()
    longest = (SHAPES[shape][3] or (24, 24))[1]                                 # tokens of a response

    def draw(records, n, temperature):
        images, questions = [r["image"] for r in records], [r["question"] for r in records]
        if variant == "sample_groups":
            return sum(sample_groups(model, images, questions, n, longest, temperature)[0], [])
        how = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
        calls = [(images, questions, n)] if variant == "generate_batch" else \
            [([image], [question], 1) for image, question in zip(images, questions) for _ in range(n)]
        said = []
        for images, questions, n in calls:
            embeds, mask = model.read_prompts(images, questions)
            said += model.llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=longest, **how,
                                       num_return_sequences=n, eos_token_id=model.chat.stop_ids,
                                       pad_token_id=model.chat.pad_id).tolist()
        return said

    steps = []
    for at in range(0, len(records), pairs):
        with Meter(device, memory) as meter, autocast():
            draw(records[at:at + pairs], GROUP, 1.0)
        steps.append({"seconds": meter.seconds, "held_mb": meter.held, "peak_mb": meter.peak_mb})
    with autocast():
        greedy = draw(records[:2], 1, 0)
    return steps, [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in greedy]


def worker(args):
    """One run; prints a line of JSON"""
    variant, shape, folder = args.worker
    torch.set_num_threads(args.threads)
    device, autocast = common.setup(0, args.matmul)
    memory = os.environ.get("MALLOC_MMAP_THRESHOLD_") == "65536"                # malloc gives memory back, slowly
    pairs, n_steps = args.pairs or SHAPES[shape][4], args.steps or SHAPES[shape][5]
    if variant in SAMPLING:
        n_steps = 2                                                             # whatever --steps says: each is long
    records, flops, said = make_records(shape, pairs * n_steps), {}, None
    if variant in SAMPLING:
        steps, said = sampling_steps(variant, shape, folder, records, pairs, device, autocast, memory)
    elif variant.startswith("trl"):
        from bench_trl import trl_steps
        steps = trl_steps(folder + "/policy", folder + "/reference", records, pairs, n_steps, LR,
                          variant == "trl_compact", args.grad_checkpoint, lambda: Meter(device, memory))
    else:
        steps, flops = our_steps(variant, folder, records, pairs, args, device, autocast, memory)
    middle = lambda name: statistics.median(s.get(name) or 0 for s in steps[1:])  # the first makes Adam's moments
    print("RESULT " + json.dumps({
        "seconds": middle("seconds"), "reference_seconds": middle("reference_seconds"), "peak_mb": middle("peak_mb"),
        "held_mb": middle("held_mb"),
        "losses": [s.get("loss", 0) for s in steps], "grad_norms": [s.get("grad_norm", 0) for s in steps],
        "said": said, "flops": flops, "pairs": pairs * (GROUP if said else 1)}))


# ---- all runs of a shape ---------------------------------------------------------------------------------------------


def run(variant, shape, folder, argv, memory=False):
    """Starts `worker` in a fresh process -> its result"""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    process = subprocess.run([sys.executable, os.path.abspath(__file__), *argv, "--worker", variant, shape, folder],
                             env=environment, capture_output=True, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not lines:
        raise SystemExit(f"{variant} at {shape} failed:\n{process.stderr[-3000:]}")
    return json.loads(lines[0][len("RESULT "):])


def assert_same(results, tolerance):
    """All variants of a loss must have the losses and gradient norms of the first; all samplers its greedy responses"""
    for group in (DPO, SFT, SAMPLING):
        names = [variant for variant in group if variant in results]
        for variant in names[1:]:
            if results[variant].get("said") != results[names[0]].get("said"):
                raise SystemExit(f"{variant} differs from {names[0]}: it says {results[variant]['said']}, "
                                 f"not {results[names[0]]['said']}")
            for key in ("losses", "grad_norms"):
                for i, (a, b) in enumerate(zip(results[names[0]][key], results[variant][key], strict=True)):
                    if abs(a - b) > tolerance * abs(a):
                        raise SystemExit(f"{variant} differs from {names[0]}: {key}[{i}] is {b}, not {a}")


def measure(shape, variants, args, argv, device):
    """-> one row a variant"""
    with tempfile.TemporaryDirectory() as folder:
        make_models(shape, folder)
        rounds, bar = [], tqdm(total=(args.rounds + 1) * len(variants), desc=shape)
        for number in range(args.rounds + 1):  # the last is for memory: never from the run that is timed
            rounds.append({})
            for variant in variants[::-1] if number % 2 else variants:  # a machine that slows down favours neither end
                bar.set_postfix_str(variant)
                rounds[-1][variant] = run(variant, shape, folder, argv, memory=number == args.rounds)
                bar.update()
            assert_same(rounds[-1], 1e-5 if device.type == "cpu" else 2e-2)     # bf16 on a GPU
        bar.close()
    *rounds, memory = rounds
    rows = []
    for variant in variants:
        group = next(group for group in (DPO, SFT, SAMPLING) if variant in group)
        pass_seconds = lambda result, epoch: result["seconds"] + epoch * result["reference_seconds"]
        peer = next(v for v in ("trl_compact", "naive", *group) if v in variants and v in group)
        ratios = {name: [r[peer]["seconds"] / pass_seconds(r[variant], epoch) for r in rounds]
                  for name, epoch in (("speed", 0), ("speed_one_epoch", 1))}
        first, seconds_a_step = rounds[0][variant], statistics.median(r[variant]["seconds"] for r in rounds)
        flops = memory[variant]["flops"]
        rows.append({"variant": variant, "shape": shape, "device": device_name(device, args),
                     "pairs_per_s": first["pairs"] / seconds_a_step,
                     "peak_mb": memory[variant]["peak_mb"], "held_mb": memory[variant]["held_mb"],
                     "loss": first["losses"][-1], "grad_norm": first["grad_norms"][-1], "peer": peer,
                     **{name: [statistics.median(values), min(values), max(values)] for name, values in ratios.items()},
                     "memory_ratio": memory[peer]["peak_mb"] / memory[variant]["peak_mb"],
                     "gflop_per_pair": {part: count / 1e9 for part, count in flops.items()},
                     "mfu": mfu(sum(flops.values()) * first["pairs"] / seconds_a_step)})
    return rows


def measure_recipes(shape, args, device):
    """-> one row a recipe: what its script says of its peak memory after two steps (the second has Adam's moments),
    above that of a process that has only imported everything"""
    pairs, rows = args.pairs or 16, []
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(args.threads),
                   "MALLOC_MMAP_THRESHOLD_": "65536"}
    idle = 0.0 if device.type == "cuda" else float(subprocess.run(
        [sys.executable, "-c", "import common, data, torch; print(common.peak_memory_mb(torch.device('cpu')))"],
        cwd=os.path.dirname(os.path.abspath(__file__)), env=environment, capture_output=True, text=True).stdout)
    with tempfile.TemporaryDirectory() as folder:
        make_models(shape, folder)
        os.makedirs(f"{folder}/pictures")
        with open(f"{folder}/rows.jsonl", "w") as f:
            for i, record in enumerate(make_records(shape, 2 * pairs)):
                place = f"pictures/{i // QUESTIONS}.png"
                record["image"].save(f"{folder}/{place}")
                f.write(json.dumps({**record, "image": place, "answer": record["chosen"], "mask": None}) + "\n")
        for name, (script, flags) in tqdm(RECIPES.items(), desc=f"{shape} recipes"):
            out = f"{folder}/{len(rows)}"
            command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), script), "--out", out,
                       "--init", f"{folder}/policy", "--data", f"{folder}/rows.jsonl", "--steps", "2", "--log_every",
                       "1", "--batch_size", str(pairs), "--lr", str(LR), "--compile", str(args.compile).lower(),
                       "--workers", "0", *flags.split()]
            process = subprocess.run(command, env=environment, capture_output=True, text=True)
            if process.returncode:
                raise SystemExit(f"{name} at {shape} failed:\n{process.stderr[-3000:]}")
            with open(f"{out}/log.jsonl") as f:
                peak = json.loads(f.readlines()[-1])["peak_mb"] - idle
            counts = re.findall(r"^\w+ +([\d,]+) parameters, +([\d,]+) trained", process.stdout, re.M)
            held, trained = (sum(int(pair[k].replace(",", "")) for pair in counts) for k in (0, 1))
            held *= 2 if "reference live" in flags or script == "train_grpo.py" and "--kl 0" not in flags else 1
            rows.append({"recipe": name, "script": script, "flags": flags, "shape": shape, "rows_a_step": pairs,
                         "device": device_name(device, args), "parameters": held, "trained": trained, "peak_mb": peak,
                         "weights_mb": (4 * held + 12 * trained) / 2**20})
    return rows


def show_recipes(rows):
    common.print_table(
        f"{rows[0]['shape']}: {rows[0]['parameters'] / 1e6:.1f} M parameters, {rows[0]['rows_a_step']} rows a step, "
        f"four about each picture; {rows[0]['device']}",
        ["recipe", "script", "flags", "million trained", "peak MB", "of which weights, gradients, moments, reference"],
        [[row["recipe"], row["script"], row["flags"], f"{row['trained'] / 1e6:.1f}", f"{row['peak_mb']:.0f}",
          f"{row['weights_mb']:.0f}"] for row in rows])


def device_name(device, args):
    """"NVIDIA H200", "cpu, 1 thread(s)" """
    return torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {args.threads} thread(s)"


def mfu(flops_per_s):
    """FLOPs really done over what the card can do in bf16, or None for a device that is not listed"""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops_per_s / peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def show(rows, title):
    """The table of one shape, a line a variant"""
    ratio = lambda values: "{:.2f} [{:.2f}, {:.2f}]".format(*values)
    columns = {"peer": lambda row: row["peer"], "times as fast": lambda row: ratio(row["speed"]),
               "one epoch": lambda row: ratio(row["speed_one_epoch"]),
               "times less memory": lambda row: f"{row['memory_ratio']:.2f}",
               "MB": lambda row: f"{row['peak_mb']:.0f}", "held MB": lambda row: f"{row['held_mb']:.0f}",
               "pairs/s": lambda row: f"{row['pairs_per_s']:.2f}",
               "GFLOP/pair": lambda row: f"{sum(row['gflop_per_pair'].values()):.3g}" if row["gflop_per_pair"] else "",
               "of bf16 peak": lambda row: f"{row['mfu']:.1%}" if row["mfu"] else "",
               "loss": lambda row: f"{row['loss']:.6f}", "grad_norm": lambda row: f"{row['grad_norm']:.6f}"}
    common.print_table(title, ["variant", *(row["variant"] for row in rows)],
                       [[name, *map(column, rows)] for name, column in columns.items()])


def draw(rows, path):
    """For each shape what a pair costs in FLOPs, part by part, and how much faster than the peer each variant is"""
    from figures import plt
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(len(shapes), 2, figsize=(11, .5 + 2.6 * len(shapes)), squeeze=False)
    for (left, right), shape in zip(axes, shapes):
        lines = [row for row in rows if row["shape"] == shape and row["variant"] in DPO][::-1]
        names = [row["variant"] for row in lines]
        at = [0.0] * len(lines)
        for part, color in (("vision", "tab:orange"), ("llm", "tab:blue"), ("head", "tab:green")):
            width = [row["gflop_per_pair"].get(part, 0) for row in lines]
            left.barh(names, width, left=at, color=color, label=part)
            at = [a + w for a, w in zip(at, width)]
        left.set_title(f"{shape}: GFLOP a pair" + (" (TRL's not counted)" if "trl" in names else ""), fontsize=10)
        left.legend(fontsize=8)
        for epoch, color, offset in (("speed", "tab:gray", .2), ("speed_one_epoch", "lightgray", -.2)):
            middle, low, high = zip(*(row[epoch] for row in lines))
            right.barh([i + offset for i in range(len(lines))], middle, .4, color=color, xerr=[
                [m - l for m, l in zip(middle, low)], [h - m for m, h in zip(middle, high)]],
                label="reference at hand" if epoch == "speed" else "one epoch, reference pass included")
        right.set_yticks(range(len(lines)), names)
        right.axvline(1, color="black", lw=.8)
        right.set_title(f"{shape}: pairs a second, as a multiple of {lines[0]['peer']}", fontsize=10)
        right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.pairs is not None and args.pairs % QUESTIONS:
        raise InputError(f"--pairs {args.pairs}: must be a multiple of {QUESTIONS}, the questions about a picture")
    if min(args.steps or 2, args.rounds + 1) < 2:
        raise InputError("--steps must be at least 2, as the first is not timed, and --rounds at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_trl = importlib.util.find_spec("trl") is not None
    print(f"device {device_name(device, args)}; torch {torch.__version__}; "
          f"transformers {transformers.__version__}; "
          + (f"trl {importlib.metadata.version('trl')}" if has_trl else
             "trl is not installed: naive, its step written by hand, stands in for it"))
    skipped = [] if has_trl else ["trl", "trl_compact"]
    skipped += ["trl"] if device.type == "cuda" else []  # there TRL is trl_compact
    variants = args.variants or [variant for variant in DPO + SFT + SAMPLING if variant not in skipped]
    if args.plot and not set(variants) & set(DPO):
        raise InputError("--plot draws the variants of a DPO step: name at least one in --variants")
    for path in filter(None, (args.json, args.plot)):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)  # now, not after minutes of measuring
    argv = ["--threads", str(args.threads), "--matmul", args.matmul, "--compile", str(args.compile).lower(),
            *(["--pairs", str(args.pairs)] if args.pairs else []),
            *(["--steps", str(args.steps)] if args.steps else []),
            *(["--grad_checkpoint"] if args.grad_checkpoint else [])]
    rows = []
    if args.recipes and (args.variants or args.plot or args.steps or args.grad_checkpoint):
        raise InputError("--recipes has its own: leave --variants, --plot, --steps and --grad_checkpoint out")
    if args.recipes:
        for shape in args.shapes:
            rows += measure_recipes(shape, args, device)
            show_recipes([row for row in rows if row["shape"] == shape])
            if args.json:
                common.write_json(args.json, rows)
        return
    for shape in args.shapes:
        rows += measure(shape, variants, args, argv, device)
        show([row for row in rows if row["shape"] == shape], f"{shape}: times as fast as the peer, median [lowest, "
             f"highest] of {args.rounds} rounds; peak memory above the start of a step")
        if args.json:
            common.write_json(args.json, rows)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    common.cli(main)
