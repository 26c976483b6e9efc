"""
train.py: the Absolute Zero loop (arXiv 2505.03335, Algorithm 1) from random weights to a finished report.

    warm up -> measure -> [ propose -> verify -> solve -> reward -> learn ] * steps -> measure -> report

A base (the README's start network) is first trained on programs drawn from a small written grammar, which stands for
the paper's pretraining. From then on nobody shows it anything: it writes tasks, the executor says what is true, it
tries to solve them, and both roles are paid by the executor's verdicts. No gold answer enters the loss any more.

Where we differ from the paper and from the authors' code (sizes: see Config):
1) The warm-up, in place of a pretrained language model; its grammar and its habits are in selfplay.py, in the open.
2) The n tries that measure a task's solve rate are also the solver's rollouts (the authors throw them away, 80 % of
   what they generate, and sample again).
3) A task whose tries all earned the same does not say which try was better: it is left out of the solver's update,
   before the cells' means are taken (`skip_flat`). Places in the solver's batch that fresh tasks do not fill go first
   to tasks of the buffer that some tries solved and some did not (`fill`; paper: any). `--ablation paper_batch`
   switches both off.
   The proposer has a tenth of an update's rollouts (paper: half).
4) One number scales all logits and has a learning rate of its own (`sharp_lr`): see model.py.
5) Tries of a task share their prompt, when sampled and when learnt (`shared_rows`).
6) The learning rate rises and falls, AdamW's beta2 is .99 and its weight decay 0, no entropy bonus (paper: constant;
   .999; .01; .001).
7) The program of an induction proposal comes from a buffer drawn evenly, then a task of it (paper: from their union).
   Seeding makes tasks of all kinds side by side, under the gates (paper: induction's afterwards, from the others').
8) All randomness is a function of (seed, step), so a resumed run is the run that was never interrupted (bit for bit
   on a CPU; on a GPU attention's backward pass adds in no fixed order). samples.txt alone shows twice what came after
   the checkpoint.

Try:  python train.py          # finds the device, picks its preset, ends with a table and a report
      python train.py --help   # every knob, with advice
"""
import argparse
import ast
import bisect
import difflib
import fcntl
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

import eval as evaluation
import model as network
import selfplay
from eval import VERSION, fail, load, mean, save
from executor import Executor, cores
from model import GPT, GPTConfig, decode, generate, logprobs, pad_rows
from selfplay import KINDS, Rollout, Task
from trr import AVERAGES, MODES, advantages, policy_loss

# ---------------------------------------------------------------------------------------------------------------------
# Every knob. This block is also the --help.


@dataclass
class Config:
    # --- run
    name: str = "full"            # the row of the ablation table this run belongs to (set by --ablation)
    seed: int = 1                 # the base and everything after it; the held-out suite has a seed of its own
    device: str = "auto"          # auto | cpu | cuda
    dtype: str = "auto"           # auto | float32 (CUDA: TF32) | bfloat16, of all matrix products
    workers: int = 2              # pairs of executor processes at work; the results do not depend on it
    unsafe_executor: bool = False # run model text without the kernel wall (macOS, some containers): at your own risk
    # --- model
    n_layer: int = 2              # 2 x 160 is as good as 3 x 128, and faster; the larger language wants more layers
    n_head: int = 5
    n_kv_head: int = 1            # fewer: a smaller cache and faster sampling
    n_embd: int = 160
    block_size: int = 368         # longest prompt + reply, tokens
    # --- warm-up: the "base model"
    large: bool = False           # the larger task language: loops, blocks, longer lists, two-digit constants
    hasty: float = 0.6            # share of deduction's demonstrations that state the output without tracing: a habit
    patience: float = 0.5         # chance that a demonstrated search goes on after a wrong try: a habit, no skill
    habits_from: float = 0.5      # share of the warm-up before both begin; until then all deduction is traced, and a
                                  # search gives up only when out of tries or room (1 in 23 do): first the skill, then
                                  # the habit. At 0 base and end are far weaker
    timid: bool = False           # True: of demonstrated proposals each depth is a tenth as frequent as the one before
    warmup_steps: int = 2000
    warmup_batch: int = 80        # demonstrations a step; many small steps beat few large ones at equal time
    warmup_lr: float = 0.011      # Muon, for the matrices of the blocks
    warmup_adam_lr: float = 0.016 # AdamW, for all the rest
    # --- self-play
    steps: int = 60               # two and a half minutes on 2 fast cores
    kinds: str = "deduction,abduction,induction"  # drop some to see what each is worth; the batch stays as large
    proposals: int = 40           # proposed tasks a kind and step
    tasks: int = 64               # B: tasks a kind and step that the solver tries; fresh ones first, then the buffer's
    tries: int = 8                # n: tries a task; with 2 a solve rate is 0, 1/2 or 1
    learn_tries: int = 0          # how many of them are learnt from; 0: all; 1: the others only measure the solve rate
    references: int = 2           # K: past tasks shown to the proposer (the paper: 6; each costs ~25 tokens of context)
    n_inputs: int = 6             # N: inputs of an induction task (the paper: 10); half are shown, half decide
    max_new: int = 192            # longest solver's reply, tokens (a proposal: 112); what is cut off is unparsable
    buffer_size: int = 16384      # tasks a kind; the oldest leave first
    seed_tasks: int = 128         # tasks a kind before the first update (the paper: 256), grown from the identity alone
    proposer: str = "train"       # train | frozen (the network of the step writes, its proposals are not learnt from) |
                                  # random (generator) | fixed (a set of tasks)
    fixed_tasks: int = 10000      # size of that set, for proposer = fixed
    depths: str = "even"          # of generated tasks: even, as in the held-out suite | rare, as in the warm-up's
    learner: str = "rl"           # rl | supervised (the fixed set's gold answers) | worked (and their thoughts)
    fill: str = "learnable"       # learnable | uniform: which buffer tasks fill the solver's batch
    novelty_gate: bool = True     # a program that was proposed before is not valid
    max_lines: int = 6            # length gate: of a proposed program, between `def` and `return`. 0: no bound on
                                  # programs and inputs (on outputs there always is: selfplay.MAX_VALUE)
    validity_gate: bool = True    # False: what fails to run enters the buffer, with the output None, and hidden outputs
                                  # may be all the same
    previous_step: bool = False   # True: solve the tasks of the step before, as the authors' code does
    # --- reward
    proposer_reward: str = "learnability"  # learnability (Eq. 4) | uncertainty | valid | none
    zero_reward: float = 0.0      # proposer's reward at solve rate 0 or 1 (the authors' code: -0.5)
    # --- learning
    advantage: str = "trr"        # trr (six baselines, Eq. 8) | group (a baseline a task) | global | none
    token_whiten: bool = False    # whiten over tokens (the authors' code) instead of over sequences (Eq. 8)
    average: str = "token"        # token (all of the update count alike) | sequence (Eq. 9)
    floor: float = 0.2            # least deviation that a cell's rewards are divided by
    skip_flat: bool = True        # leave tasks whose tries all earned the same out of the solver's update
    negative: float = 1.0         # weight of negative advantages; 0: learn only from what beat its cell's baseline
    propose_weight: float = 1.0   # weight of the proposer's advantages; at 9 it has half of an update, as in the paper
    optimizer: str = "adamw"      # adamw | muon
    lr: float = 3e-4              # AdamW; a higher one gains more of pass@1 and less of pass@16
    adam_eps: float = 1e-8        # at 1e-3, far above the gradient's entries, steps are in proportion to them
    muon_lr: float = 0.002
    sharp_lr: float = 0.007       # of model.sharpness, the one number that scales all logits; 0: leave it as it is
    lr_warmup: int = 10           # steps of linear rise: Adam's first are as long as lr, however small the gradient
    lr_decay: float = 0.5         # share of the steps, at the end, over which the rate falls (a twentieth at the least)
    minibatches: int = 1          # updates a pass; with one, and one pass, the ratio is 1, and the clip has no work
    epochs: int = 1               # passes over a step's rollouts (rl only)
    clip: float = 0.2             # of the ratio, Eq. 9
    grad_clip: float = 1.0        # longest gradient of an update; 0: any
    micro_tokens: int = 0         # tokens a micro-batch, about; 0: 3072 on a CPU (fits its cache), 32768 on CUDA
    # --- measuring
    suite_n: int = 150            # held-out tasks a kind and depth
    samples: int = 16             # samples a task for pass@k
    eval_every: int = 15          # steps between small evaluations (20 tasks a kind and depth); 0: none
    save_every: int = 10          # steps between checkpoints
    show_every: int = 10          # steps between whole rollouts on the console


PRESETS = {
    "cpu": {},
    "smoke": dict(n_layer=1, n_embd=64, n_head=2, n_kv_head=1, warmup_steps=60, warmup_batch=32, steps=3, proposals=8,
                  tasks=8, tries=4, seed_tasks=8, suite_n=6, samples=4, eval_every=2, save_every=1, show_every=1,
                  max_new=96, block_size=256),
    # not measured on a GPU yet. Reckoned: warm-up 4 minutes where there are 8 cores to draw its programs, a step of
    # 12,288 tries 5 s, memory 12 GB (4 the sampler's cache; 158 KB a token that is learnt). lr is named, though it is
    # the default: it belongs to this size, so rows that have another for the cpu preset's clash with it
    "gpu": dict(n_layer=8, n_embd=384, n_head=6, n_kv_head=2, block_size=512, large=True, warmup_steps=6000,
                warmup_batch=512, warmup_lr=0.02, warmup_adam_lr=0.01, steps=100, proposals=256, tasks=512, tries=8,
                references=4, n_inputs=6, max_new=256, lr=3e-4, seed_tasks=256, workers=8,
                max_lines=12),  # of text: a block has up to four. At 6 two thirds of those of depth 6 are refused
}

SUPERVISED = dict(optimizer="muon", muon_lr=0.005, lr=0.003, sharp_lr=0.0, minibatches=48)
TIMID = dict(timid=True, hasty=0.0, patience=1.0, propose_weight=4.0, steps=150)
ABLATIONS = {  # each differs from full by what it names; the READMEs' tables are made of these
    "full": {},
    "solver_only": dict(proposer="frozen"),
    "loud_proposer": dict(propose_weight=9.0),
    "uncertainty": dict(propose_weight=9.0, proposer_reward="uncertainty"),
    "random_tasks": dict(proposer="random"),
    "random_shallow": dict(proposer="random", depths="rare"),
    "fixed_10k_rl": dict(proposer="fixed", fixed_tasks=10000),
    # supervised updates are far less noisy than RL's: the warm-up's optimizer and many small batches serve them best
    "supervised_10k": dict(proposer="fixed", learner="supervised", fixed_tasks=10000, **SUPERVISED),
    "supervised_50k": dict(proposer="fixed", learner="supervised", fixed_tasks=50000, **SUPERVISED),
    "worked_10k": dict(proposer="fixed", learner="worked", fixed_tasks=10000, **SUPERVISED),
    "deduction_only": dict(kinds="deduction"),
    "no_induction": dict(kinds="deduction,abduction"),
    "no_references": dict(references=0),
    "global_baseline": dict(advantage="global"),
    "group_baseline": dict(advantage="group"),
    "sequence_average": dict(average="sequence"),
    "large_epsilon": dict(lr=1e-3, adam_eps=1e-3),
    "paper_batch": dict(skip_flat=False, fill="uniform"),
    "authors_code": dict(skip_flat=False, fill="uniform", zero_reward=-0.5, token_whiten=True,
                         previous_step=True, novelty_gate=False, sharp_lr=0.0, proposals=64, learn_tries=1),
    "no_novelty_gate": dict(novelty_gate=False),
    "no_length_gate": dict(max_lines=0),
    "no_validity_gate": dict(validity_gate=False),
    "early_habits": dict(habits_from=0.0),
    "timid": TIMID,
    "timid_frozen": dict(TIMID, proposer="frozen"),
}

PROPOSAL = 112  # tokens of a proposer's reply: a program of 56 and an input of 20, or N usual inputs and a message
HUGE = 10 ** 9
BOUNDS = {  # field: (least, most); one that is missing here: from 1 if int, from 0 if float
    **dict.fromkeys(("references", "proposals", "seed_tasks", "learn_tries", "lr_warmup", "micro_tokens", "eval_every",
                     "max_lines"), (0, HUGE)),
    **dict.fromkeys(("hasty", "patience", "habits_from", "lr_decay", "negative"), (0, 1)),
    "seed": (0, 2 ** 63 - 1), "zero_reward": (-HUGE, HUGE), "samples": (1, 64), "fixed_tasks": (len(KINDS), HUGE),
    "suite_n": (1, 10_000), "max_new": (1, 65_536), "block_size": (8, 65_536),
    "tries": (2, HUGE),         # one try says nothing of how hard a task is
    "n_inputs": (3, 10),        # half are shown, the others are hidden
    "adam_eps": (1e-30, HUGE)}  # less is 0 in float32: a weight without a gradient would become 0 / 0
CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16"),
           "proposer": ("train", "frozen", "random", "fixed"), "learner": ("rl", "supervised", "worked"),
           "fill": ("learnable", "uniform"), "proposer_reward": ("learnability", "uncertainty", "valid", "none"),
           "advantage": MODES, "average": AVERAGES, "depths": ("even", "rare"), "optimizer": ("adamw", "muon")}


def clashes(row, preset, args):
    """Fields that a row of ABLATIONS and this preset both set and no flag settles: the row's value was chosen for the
    cpu preset."""
    return [k for k in row if row[k] and k in PRESETS[preset] and getattr(args, k) is None]     # off is off anywhere


def true_or_false(text):
    """A flag's text as a bool; argparse's own, bool(text), takes any text for true."""
    return ("false", "0", "true", "1").index(text.lower()) > 1


@functools.cache
def comments():
    """{field: its comment} of Config's block: the --help. Read from this file, so that it stands once."""
    found = {}
    for line in inspect.getsource(Config).splitlines()[2:]:
        code, _, words = line.replace("%", "%%").partition("#")     # argparse takes a lone % for a format
        if code.strip():
            name = code.partition(":")[0].strip()
            found[name] = words
        elif not words.startswith(" ---"):
            found[name] += words
    return found


def parse(argv):
    """argv -> (Config, options). Order of precedence: a flag, the ablation, the preset, the default."""
    ap = argparse.ArgumentParser(usage="python train.py [--flag value] ...", allow_abbrev=False,
                                 description=__doc__.partition("\n\n")[0], epilog="Defaults are the cpu preset's.")
    ap.error = fail
    ap.add_argument("--preset", choices=PRESETS, help="the size; gpu if there is one, else cpu")
    ap.add_argument("--ablation", choices=[*ABLATIONS, "all"], metavar="NAME",
                    help=f"a row of the table: {', '.join(ABLATIONS)}; or all")
    ap.add_argument("--out", metavar="DIR", help="where the run is written")
    ap.add_argument("--resume", metavar="DIR", help="go on with a run that was stopped; alone")
    ap.add_argument("--seeds", metavar="N", type=int, help="a grid, in runs/grid: the rows asked for with so many "
                    "seeds, --seed the first")
    for f in fields(Config):
        how = {"nargs": "?", "const": True, "type": true_or_false} if f.type is bool else {"type": f.type}
        ap.add_argument("--" + f.name, metavar=str(f.default), help=comments()[f.name], **how)
    args, unknown = ap.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), vars(args), 1)
        fail(f"unknown flag {unknown[0]!r}" + (f", did you mean --{near[0]}?" if near else "; see --help"))
    preset = args.preset or ("gpu" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    row = ABLATIONS.get(args.ablation, {})
    values = {**PRESETS[preset], "name": args.ablation or "full", **row}
    if clash := clashes(row, preset, args):
        fail(f"--ablation {args.ablation} sets {clash[0]} to {row[clash[0]]}, which is meant for the cpu preset: with "
             f"--preset {preset} (where it is {PRESETS[preset][clash[0]]}) say --{clash[0]} as well")
    values.update({f.name: value for f in fields(Config) if (value := getattr(args, f.name)) is not None})
    cfg = Config(**values)
    check(cfg)
    args.preset = preset
    return cfg, args


def check(cfg):
    """Refuse, by name, what cannot work; resolve device and dtype."""
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            fail(f"--{name} {getattr(cfg, name)!r}: choose one of {', '.join(allowed)}")
    for f in fields(Config):
        least, most = BOUNDS.get(f.name, (1 if f.type is int else 0, HUGE))
        if f.type in (int, float) and not least <= getattr(cfg, f.name) <= most:
            fail(f"--{f.name} must be a number from {least} to {most}, not {getattr(cfg, f.name)}")
    kinds = cfg.kinds.split(",")
    if not set(kinds) <= set(KINDS) or len(set(kinds)) != len(kinds):
        fail(f"--kinds {cfg.kinds!r}: a comma-separated choice of {', '.join(KINDS)}")
    if cfg.n_embd % cfg.n_head or (cfg.n_embd // cfg.n_head) % 2 or cfg.n_head % cfg.n_kv_head:
        fail("--n_embd must be a multiple of --n_head with an even quotient, and --n_head one of --n_kv_head")
    if cfg.learn_tries > cfg.tries:
        fail(f"--learn_tries {cfg.learn_tries} is more than --tries {cfg.tries}")
    if cfg.learn_tries == 1 and cfg.advantage == "group":
        fail("--advantage group compares the tries of a task: with --learn_tries 1 there is nothing to compare")
    if kinds == ["induction"] and cfg.proposer in ("train", "frozen"):
        fail("--kinds induction: its proposer describes programs of the other kinds: add one, or --proposer random")
    if cfg.block_size % 8:
        fail(f"--block_size must be a multiple of 8, as rows are padded to one, not {cfg.block_size}")
    if max(cfg.max_new + 100, PROPOSAL + 128) > cfg.block_size:
        fail(f"--block_size {cfg.block_size}: must be at least 100 tokens more than --max_new {cfg.max_new}, for the "
             f"prompt, and at least {PROPOSAL + 128}, for a proposal")
    places = cfg.tasks * len(KINDS) // len(kinds)
    if cfg.proposals > places and cfg.proposer != "fixed":
        fail(f"--proposals {cfg.proposals} is more than the {places} tasks a kind that the solver tries in a step: "
             "lower it, or raise --tasks (a task that nobody tries has no solve rate to pay its proposer by)")
    if cfg.learner != "rl" and cfg.proposer != "fixed":
        fail(f"--learner {cfg.learner} learns from the fixed set of tasks: add --proposer fixed")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but torch sees no CUDA device: use --device cpu, or install a CUDA build of torch and a "
             "driver that is new enough for it")
    cfg.device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if network.has_bfloat16(cfg.device) else "float32"
    cfg.micro_tokens = cfg.micro_tokens or (32768 if cfg.device == "cuda" else 3072)


def origin(cfg):
    """Where and when a run was made, for config.json: a result without its commit and machine cannot be repeated."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:                                   # no git here
        commit = ""
    machine = torch.cuda.get_device_name() if cfg.device == "cuda" else \
        network.cpu_says("model name") or platform.machine()
    return {"commit": commit, "date": time.strftime("%Y-%m-%d"),
            "machine": f"{machine}, {os.cpu_count()} CPU threads, torch {torch.__version__}"}


# ---------------------------------------------------------------------------------------------------------------------
# Files: what is read is checked first, what is written is whole (eval.load, eval.save)


def read_config(out):
    """The Config of a run's config.json, each field checked for its type: the file may have been edited by hand."""
    stored = evaluation.read_json(os.path.join(out, "config.json"))
    if stored is None:
        fail(f"{out} holds no run to resume: no config.json that can be read")
    for f in fields(Config):
        if type(stored.get(f.name)) is not f.type:
            fail(f"{out}/config.json: {f.name} must be a {f.type.__name__}, not {str(stored.get(f.name))[:40]!r}")
    return Config(**{f.name: stored[f.name] for f in fields(Config)})


def lock(folder):
    """Make the folder and hold it for this process; the kernel lets go when the process ends, however it ends."""
    try:
        os.makedirs(folder, exist_ok=True)
        handle = open(os.path.join(folder, ".lock"), "w")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except BlockingIOError:
        handle.close()
        fail(f"{folder} is in use by another run: give another --out")
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}): give another --out")


STOP = {"signal": 0}


def on_signal(number, frame):
    """First signal: finish the step and save. Second: leave at once; the last checkpoint is whole."""
    if STOP["signal"]:
        os._exit(128 + number)
    STOP["signal"] = number
    print(f"\n{signal.Signals(number).name}: finishing this step, then saving (again: leave at once)", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Learning machinery shared by warm-up and self-play


def make_optimizers(model, muon, muon_lr, adam_lr, beta2=0.95, eps=1e-8, sharp_lr=None):
    """Muon for the blocks' matrices (half of AdamW's examples for the same accuracy in the warm-up), AdamW for the
    rest, with a rate of its own for the sharpness in self-play."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for n, p in model.named_parameters()
            if n != "sharpness" and (p.dim() != 2 or not n.startswith("blocks"))]
    adamw = torch.optim.AdamW(
        [{"params": rest if muon else matrices + rest},
         {"params": [model.sharpness], "lr": adam_lr if sharp_lr is None else sharp_lr, "eps": 1e-8}],
        lr=adam_lr, betas=(0.9, beta2), eps=eps, weight_decay=0.0, fused=True)
    return [torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.0), adamw] if muon else [adamw]


def set_lr(optimizers, scale):
    """The learning rates as a share of what they were set to at first."""
    for o in optimizers:
        for g in o.param_groups:
            g["lr"] = g.setdefault("peak", g["lr"]) * scale


def buckets(lengths, count):
    """Indices in at most `count` micro-batches of like length and of padded sizes as equal as can be: the longest of
    them is what a thread waits for. In order of length, each takes as many as have room in `most` padded tokens;
    bisection finds the least `most` for which `count` are enough."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])

    def cut(most):
        out = []
        for i in order:
            width = -(-lengths[i] // 8) * 8           # as pad_rows will have it
            if not out or width * (len(out[-1]) + 1) > most:
                out.append([])
            out[-1].append(i)
        return out
    sizes = range(len(order) * (max(lengths, default=0) + 8))
    return cut(bisect.bisect_left(sizes, True, key=lambda most: len(cut(most)) <= count))


def micro_batches(cfg, tokens):
    """How many micro-batches for so many tokens: each at most about cfg.micro_tokens; on a CPU the same number for each
    thread, and at least two, because in a single one every row would be padded to the longest. On CUDA at least three:
    of a warm-up's batch in two 46 % would be padding, in six 20 %; but each has a thousand kernels to launch, some
    7 ms."""
    if cfg.device == "cuda":
        return max(3, math.ceil(tokens / cfg.micro_tokens))
    return network.THREADS * max(2, math.ceil(tokens / network.THREADS / cfg.micro_tokens))


def accumulate(model, batches, loss_fn, dtype):
    """p.grad = sum of the gradients of loss_fn over micro-batches. On a CPU each thread takes its share of them: data
    parallel threads scale better than threads inside these small operations. Shares and sums have a fixed order, so
    a run repeats bit by bit. Returns what loss_fn returned beside the loss."""
    params = list(model.parameters())
    device = params[0].device.type
    threads = network.THREADS if device == "cpu" else 1

    def work(k):
        grads, outs = [torch.zeros_like(p) for p in params], []
        for batch in batches[k::threads]:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss, out = loss_fn(model, batch)
            for total, g in zip(grads, torch.autograd.grad(loss, params)):    # backward() would add to one p.grad
                total.add_(g)
            outs.append(out)
        return grads, outs

    parts = network.threaded(work, range(threads), threads)
    for i, p in enumerate(params):
        p.grad = sum(grads[i] for grads, _ in parts)
    return [out for _, outs in parts for out in outs]


# ---------------------------------------------------------------------------------------------------------------------
# Warm-up


def demo_batches(demos, cfg):
    """[(idx (B, T), weights (B, T), norm)] of demonstrations; norm makes the micro-batches' sums a weighted mean."""
    norm, batches = sum(sum(w) for _, _, w in demos), []
    lengths = [len(prompt) + len(reply) for prompt, reply, _ in demos]
    for rows in buckets(lengths, micro_batches(cfg, sum(lengths))):
        idx = pad_rows([demos[i][0] + demos[i][1] for i in rows])
        weights = pad_rows([[0] * len(demos[i][0]) + demos[i][2] for i in rows], fill=0.0)
        batches.append((idx.to(cfg.device), weights.to(cfg.device), norm))
    return batches


def demo_loss(model, batch):
    """(loss, its figure) of a micro-batch as demo_batches pads it: cross-entropy, weighted token by token."""
    idx, weights, norm = batch
    mask = weights > 0
    weights = weights[mask]
    loss = -(logprobs(model, idx, mask)[0] * weights).sum() / norm
    return loss, {"loss": loss.detach()}


def base_key(cfg):
    """Name of a base network: a hash of what it and its measures come from, settings, grammar, vocabulary and code.
    Left out are what only self-play uses, so that who changes it keeps the base, and what should change nothing but
    rounding: the executor, and of the sampler all but its specification."""
    s, e = selfplay, evaluation
    unused = "Rollout fault gold main parse_proposal plain_inputs propose_reward seed_buffers show".split()
    code = [f for k, f in sorted(vars(s).items()) if getattr(f, "__module__", "") == s.__name__ and k not in unused]
    code += (network.Block, network.GPT, network.GPTConfig, network.RMSNorm, network.RMSNormGrad, network._tokenizer,
             network.encode, network.decode, network.generate_naive, network.logprobs, network.pad_rows, network.pick,
             network.rotate, network.uniforms, accumulate, buckets, demo_batches, demo_loss, make_optimizers, new_model,
             set_lr, train_base, drawn, e.attempt, e.build_suite, e.evaluate, e.fits, e.interval, e.measure,
             e.pass_at_k, e.people_suite)
    text = repr([CHUNK, [getattr(cfg, k) for k in e.BASE_FIELDS], s.OPS, s.LARGE_OPS, s.SHARES, s.DECISIVE, s.GUESSES,
                 s.MAX_DEPTH, s.MAX_VALUE, s.MAX_PROGRAM, s.OUTPUT_KINDS, s.ASSIGN, network.PIECES,
                 network.SPECIAL, e.PEOPLE, e.SUITE_SEED,
                 [ast.dump(ast.parse(inspect.getsource(f))) for f in code]])    # without comments; docstrings count
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def warm_up(cfg, model, ex, suite, people, banned, out):
    """Fetch the base from the cache, the folder `bases` beside the run's, or train and measure it. Returns (its
    measures, minutes it took)."""
    bases, key = os.path.normpath(os.path.join(out, os.pardir, "bases")), base_key(cfg)
    path, part = os.path.join(bases, f"{key}.pt"), os.path.join(out, f"warmup-{key}.pt")
    os.makedirs(bases, exist_ok=True)
    if not os.path.exists(path):
        minutes = train_base(cfg, model, ex, banned, out, part) / 60
        measured = evaluation.measure(model, ex, suite, people, cfg.max_new, cfg.samples, cfg.dtype)
        if not os.path.exists(path):                  # another run may have made it meanwhile: then that is the base
            save(path, {"version": VERSION, "model": model.state_dict(), "measured": measured, "minutes": minutes})
    if os.path.exists(part):                          # of an interrupted warm-up, of this run or of one that came first
        os.remove(part)
    data = load(path, ("model", "measured", "minutes"))
    load_weights(model, data["model"], path)
    print(f"base network: {path} ({data['minutes']:.1f} minutes to make)")
    return data["measured"], data["minutes"]


CHUNK = 50    # steps of the warm-up whose demonstrations are drawn together; each is read twice, as drawing takes time


def drawn(cfg, banned, ex, c):
    """Chunk c of the demonstrations, a function of (seed, c): (list, how many held-out programs were thrown away)."""
    rng, habits = random.Random(f"{cfg.seed}/demo/{c}"), CHUNK * c >= cfg.habits_from * cfg.warmup_steps
    now = cfg if habits else replace(cfg, hasty=0.0, patience=1.0)
    ex = ex or own_executor(workers=1, unsafe=cfg.unsafe_executor)
    demos, refused = selfplay.demonstrations(ex, rng, CHUNK // 2 * cfg.warmup_batch, now, banned)
    return demos + rng.sample(demos, len(demos)), refused


own_executor = functools.cache(Executor)     # of a process that draws


def begin_to_draw(_):
    """First of all in such a process: it is to end with the trainer, however that ends. (By a thread, not by a timer as
    a zygote does: at its end Python takes signal handlers away, and the timer would kill what was ending well.)"""
    def watch(trainer=multiprocessing.parent_process().pid):
        while os.getppid() == trainer:
            time.sleep(1)
        os._exit(0)
    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # Ctrl-C is for the trainer


def train_base(cfg, model, ex, banned, out, part):
    """Train the base; returns seconds. An interrupted warm-up goes on at the step that the file `part` holds (in the
    run's folder: two runs may make one base)."""
    optimizers = make_optimizers(model, True, cfg.warmup_lr, cfg.warmup_adam_lr)
    first, spent, hits = 0, 0.0, 0
    if os.path.exists(part):
        data = load(part, ("model", "optimizers", "step", "seconds", "hits"))
        load_weights(model, data["model"], part)
        for o, state in zip(optimizers, data["optimizers"]):
            o.load_state_dict(state)
        first, spent, hits = data["step"], data["seconds"], data["hits"]
        print(f"warm-up resumed at step {first}")
    rewind_metrics(out, "warmup", first)
    # Processes of their own draw ahead: a GPU would wait longer than it learns, and two cores take 1.13 times as long
    # (a thread of pure Python would fight the learners for the interpreter lock). Each takes seconds to start
    drawers = min(4 if cfg.device == "cuda" else 1, cores() // 2) if cfg.warmup_steps > 10 * CHUNK else 0

    def draw(drawers):
        return iter(DataLoader(range(first // CHUNK, -(-cfg.warmup_steps // CHUNK)), batch_size=None,
                               num_workers=drawers, multiprocessing_context="spawn" if drawers else None,
                               collate_fn=functools.partial(drawn, cfg, banned, None if drawers else ex),
                               worker_init_fn=begin_to_draw, generator=torch.Generator()))
    try:
        chunks = draw(drawers)
    except (OSError, ImportError):    # no semaphores on this system: here, then
        chunks = draw(0)
    start, seconds, tokens = time.time(), spent, 0
    for step in tqdm(range(first, cfg.warmup_steps), "warm-up", cfg.warmup_steps, initial=first, mininterval=2,
                     disable=None):
        if step % CHUNK == 0 or step == first:
            demos, refused = next(chunks)
            hits += 0 if step % CHUNK else refused        # a chunk resumed halfway was counted before
        mine = [d for d in demos[step % CHUNK * cfg.warmup_batch:][:cfg.warmup_batch]
                if len(d[0]) + len(d[1]) <= cfg.block_size]
        if not mine:
            continue
        batches = demo_batches(mine, cfg)
        tokens += sum(idx.numel() for idx, _, _ in batches)
        stats = accumulate(model, batches, demo_loss, cfg.dtype)
        progress = step / cfg.warmup_steps            # short rise, plateau, then down to a twentieth
        set_lr(optimizers, min(1, (step + 1) / 30) * (1 if progress < 0.5 else max(0.05, 2 * (1 - progress))))
        for o in optimizers:
            o.step()
        seconds = spent + time.time() - start
        if step % CHUNK == CHUNK - 1 or step + 1 == cfg.warmup_steps:
            loss = float(sum(s["loss"] for s in stats))
            if not math.isfinite(loss):
                fail(f"the warm-up's loss is {loss} at step {step}: lower --warmup_lr (now {cfg.warmup_lr})")
            row = {"phase": "warmup", "step": step, "loss": loss, "seconds": round(seconds, 1),
                   "tokens_per_s": round(tokens / (time.time() - start))}
            append(out, "metrics.jsonl", json.dumps(row) + "\n")
            if step % (5 * CHUNK) == 5 * CHUNK - 1:
                tqdm.write(f"warm-up {step + 1:5d}/{cfg.warmup_steps} | loss {loss:.3f} | "
                           f"{tokens / (time.time() - start):,.0f} tokens/s | {seconds / 60:.1f} min")
        if step % (5 * CHUNK) == 5 * CHUNK - 1 or STOP["signal"]:
            save(part, {"version": VERSION, "model": model.state_dict(), "step": step + 1, "seconds": seconds,
                        "hits": hits, "optimizers": [o.state_dict() for o in optimizers]})
        if STOP["signal"]:
            leave(out)
    print(f"warm-up: {seconds / 60:.1f} minutes; {hits} generated programs were in the held-out suite and thrown away")
    return seconds


def new_model(cfg):
    return GPT(GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head, n_embd=cfg.n_embd,
                         block_size=cfg.block_size)).to(cfg.device)


def load_weights(model, weights, path):
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        fail(f"{path} does not fit this model: {str(error).splitlines()[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# One step of self-play


@dataclass
class Game:
    """What self-play carries from step to step, beside the weights."""
    buffers: dict                # kind -> deque of Task
    known: set                   # what the novelty gate refuses: the identity, and each program proposed so far, in
                                 # either kind, that got as far as being run (induction's is given: no part in this)
    rollouts: int = 0            # sampled so far, seeding aside
    held_out: int = 0            # proposals refused because the held-out suite has them
    waiting: dict = field(default_factory=dict)  # previous_step: kind -> how many of its newest the next step solves


def generated(cfg, ex, rng, kind, count, banned):
    """[(Draw, Task or None, reason)] of `count` generated tasks, what the controls have in the proposer's place."""
    depths = [rng.randint(1, selfplay.MAX_DEPTH) if cfg.depths == "even" else selfplay.solver_depth(rng)
              for _ in range(count)]
    draws, _ = selfplay.draw_programs(ex, rng, depths, cfg.n_inputs if kind == "induction" else 1, cfg.large, banned)
    wanted = [(kind, d.program, d.inputs, d.message(rng) if kind == "induction" else "") for d in draws]
    made = selfplay.make_tasks(ex, wanted, cfg.block_size - max(cfg.max_new, PROPOSAL))
    return [(d, task, why) for d, (task, why) in zip(draws, made)]


def propose(cfg, model, ex, game, banned, step, rng, count):
    """1) + 2) Sample `count` tasks a kind and verify them (proposer=random: cfg.proposals). Returns [Rollout]: the
    verdict is 'valid' or the reason why it was refused, the task None unless it is valid."""
    kinds = cfg.kinds.split(",")
    if cfg.proposer == "random":
        return [Rollout("propose", kind, [], [], [], task, verdict=why or "valid") for kind in kinds
                for _, task, why in generated(cfg, ex, rng, kind, cfg.proposals, banned)]
    asked = []                                       # (kind, references, prompt)
    for kind in [k for k in kinds for _ in range(count)]:
        if kind == "induction":                      # a program of the other two buffers, to be described by pairs
            pool = [b for k, b in game.buffers.items() if k != "induction" and k in kinds]
            references = selfplay.sample(rng.choice(pool), 1, rng)
        else:
            references = selfplay.sample(game.buffers[kind], cfg.references, rng)
        while len(prompt := selfplay.propose_prompt(kind, references)) > cfg.block_size - PROPOSAL:
            references = references[:-1]             # room for the reply; a lone task of usual length leaves it
        asked.append((kind, references, prompt))
    replies, logps = generate(model, [prompt for *_, prompt in asked], PROPOSAL, seed=sample_seed(cfg, step, 0),
                              dtype=cfg.dtype)
    proposals, wanted, runnable = [], [], []
    parsed = selfplay.plain_inputs(ex, [selfplay.parse_proposal(kind, reply, cfg.n_inputs)
                                        for (kind, *_), reply in zip(asked, replies)])
    for (kind, references, prompt), reply, logp, proposal in zip(asked, replies, logps, parsed):
        r = Rollout("propose", kind, prompt, reply, logp, verdict="unparsable")
        proposals.append(r)
        if proposal is None:
            continue
        program, inputs, message = proposal
        program = references[0].program if kind == "induction" else program
        r.known = kind != "induction" and program in game.known
        if why := selfplay.fault(kind, program, inputs, message, cfg.max_lines):
            r.verdict = why
        elif cfg.novelty_gate and r.known:
            r.verdict = "known"
        elif selfplay.is_banned(program, inputs, banned):
            r.verdict = "held out"
            game.held_out += 1
        else:                                        # make_tasks has the last word, below
            wanted.append((kind, program, inputs, message))
            runnable.append(r)
            if kind != "induction":
                game.known.add(program)              # also keeps twins inside this batch out
    made = selfplay.make_tasks(ex, wanted, cfg.block_size - max(cfg.max_new, PROPOSAL), cfg.validity_gate)
    for r, (task, why) in zip(runnable, made):
        r.task, r.verdict = task, why or "valid"
    return proposals


def sample_seed(cfg, step, phase):
    """phase: 0 for what is proposed, 1 for what is solved."""
    return (cfg.seed * 1_000_003 + step * 8 + phase) % 2 ** 31


def choose_tasks(cfg, game, fresh, rng):
    """The solver's batch: this step's valid tasks first, the rest of each kind's B places from its buffer."""
    kinds, tasks = cfg.kinds.split(","), []
    places = cfg.tasks * len(KINDS) // len(kinds)    # equal batches however many kinds play
    for kind in kinds:
        mine = [t for t in fresh if t.kind == kind][:places]
        pool = list(game.buffers[kind])
        # of the newest 1000, those that some tries solved and some did not
        good = [t for t in pool[-1000:] if 0 < t.rate < 1] if cfg.fill == "learnable" else []
        for source in (good, pool):                  # as many of these as there is room for, then any others
            taken = set(map(id, mine))               # no task twice in a batch; a Task has no hash, so by its id
            mine += selfplay.sample([t for t in source if id(t) not in taken], places - len(mine), rng)
        tasks += mine
    return tasks


def solve(cfg, model, ex, tasks, step):
    """3) + 4) n tries of each task, verified and rewarded: [Rollout]. Sets each task's rate."""
    prompts = [selfplay.solve_prompt(t) for t in tasks]
    replies, logps = generate(model, prompts, cfg.max_new, tries=cfg.tries, seed=sample_seed(cfg, step, 1),
                              dtype=cfg.dtype)
    asked = [(g, task) for g, task in enumerate(tasks) for _ in range(cfg.tries)]
    answers = [selfplay.parse_answer(reply) for reply in replies]
    verdicts = selfplay.judge_answers(ex, [task for _, task in asked], answers)
    for g, task in enumerate(tasks):
        task.rate = verdicts[g * cfg.tries:(g + 1) * cfg.tries].count("right") / cfg.tries
    return [Rollout("solve", task.kind, prompts[g], reply, logp, task, g, answer, verdict,
                    selfplay.SOLVE_REWARD[verdict])
            for (g, task), reply, logp, answer, verdict in zip(asked, replies, logps, answers, verdicts)]


SHARED = 256  # tokens of a row that tries share: without sharing an update takes 1.4 times as long, at 512 1.1 times


def shared_rows(rollouts, longest):
    """Rollouts with one prompt may share a row: prompt, reply, reply, ... The tries of a task read the same one, which
    is about as long as a reply. Rows stop at `longest` tokens: attention is quadratic. Each row is five lists: which
    rollouts, and four numbers a token (GPT.forward). For a prompt p with the replies a and b:

        id        p0 p1 p2 a0 a1 b0
        position   0  1  2  3  4  3      b begins where a began: behind the prompt
        previous   0  0  1  2  3  2      where in the row the token before it stands; b0 follows p2
        branch     0  0  0  1  1  2      a token sees the prompt (0) and its own branch"""
    rows, open_row = [], {}                                        # prompt -> its row
    for i, r in enumerate(rollouts):
        P, row = len(r.prompt), open_row.get(tuple(r.prompt))
        if row is None or len(row[1]) + len(r.reply) > longest:
            row = open_row[tuple(r.prompt)] = [], [*r.prompt], [*range(P)], [0, *range(P - 1)], [0] * P
            rows.append(row)
        mine, ids, position, previous, branch = row
        mine.append(i)
        position += range(P, P + len(r.reply))
        previous += [P - 1, *range(len(ids), len(ids) + len(r.reply) - 1)]     # its first token follows the prompt
        branch += [len(mine)] * len(r.reply)
        ids += r.reply
    return rows


def rollout_batches(rollouts, adv, cfg, longest=SHARED):
    """Micro-batches of one update: [(idx (B, T), tree, mask, old_logp, adv, norm)]. A row of idx is a prompt with some
    of its replies, tree says which token follows which (GPT.forward); mask and old_logp (R, L) and adv (R,) have a row
    a reply, in the order in which replies stand in idx."""
    norm = sum(len(r.reply) for r in rollouts) if cfg.average == "token" else len(rollouts)
    rows, batches = shared_rows(rollouts, longest), []
    lengths = [len(ids) for _, ids, *_ in rows]
    for part in buckets(lengths, micro_batches(cfg, sum(lengths))):
        which, ids, position, previous, branch = zip(*(rows[k] for k in part))     # of each a list a row
        mine = sum(which, [])                                                      # replies, in their order in idx
        tree = torch.stack([pad_rows(lists, fill=0) for lists in (position, previous, branch)])
        old = pad_sequence([torch.tensor(rollouts[i].logp) for i in mine], batch_first=True)
        mask = pad_sequence([torch.ones(len(rollouts[i].reply), dtype=torch.bool) for i in mine], batch_first=True)
        batches.append((*(z.to(cfg.device) for z in (pad_rows(ids), tree, mask, old, adv[mine])), norm))
    return batches


def rollout_loss(model, batch, cfg):
    """(loss, sums over tokens) of a micro-batch of M reply tokens in R replies, the longest of L, as rollout_batches
    packs it."""
    idx, tree, mask, old, adv, norm = batch
    logp, entropy = logprobs(model, idx, tree[2] > 0, tree=tree)                       # branch > 0: replies' tokens
    full = torch.zeros(mask.shape, device=idx.device).masked_scatter(mask, logp)       # (M,) back to (R, L)
    loss, stats = policy_loss(full, old, adv, mask, cfg.clip, cfg.average, norm)
    return loss, {**stats, "entropy": entropy.sum()}


def minibatches(cfg, items):
    """As many parts as asked for, of equal size up to one, none empty."""
    n = min(cfg.minibatches, len(items))
    return [items[len(items) * k // n:len(items) * (k + 1) // n] for k in range(n)]


def update(cfg, model, optimizers, batches, loss_fn, total):
    """One optimizer step over micro-batches; its figures are added to the Counter `total`."""
    total["padded"] += sum(b[0].numel() for b in batches)
    total["read"] += sum(int(b[0].ne(network.PAD).sum()) for b in batches)
    for stats in accumulate(model, batches, loss_fn, cfg.dtype):
        total.update({k: float(v) for k, v in stats.items()})
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf))
    total.update(updates=1, grad_norm=norm)
    if math.isfinite(norm):                           # else self_play stops
        for o in optimizers:
            o.step()


def log_probs(cfg, model, batches):
    """Of the replies' tokens (M,), computed as in training."""
    def work(batch):
        idx, tree, *_ = batch
        with torch.no_grad(), torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            return logprobs(model, idx, tree[2] > 0, tree=tree)[0]
    return torch.cat(network.threaded(work, batches, network.THREADS if cfg.device == "cpu" else 1))


def learn(cfg, model, optimizers, rollouts, adv, rng):
    """5) The update: `epochs` passes in `minibatches` optimizer steps each. Returns sums over tokens and two KLs,
    of some of the rollouts: kl_after, from the policy before the update to the one after it; and mismatch, from the
    sampler to the policy before the update, which has the same weights but other kernels and rounding."""
    total, order = Counter(), list(range(len(rollouts)))
    some = rollouts[::math.ceil(len(rollouts) / 64)]         # 64 at most, evenly spread
    probe = rollout_batches(some, torch.zeros(len(some)), cfg)
    before = log_probs(cfg, model, probe)
    total["mismatch"] = kl(torch.cat([old[mask] for _, _, mask, old, *_ in probe]), before)
    for _ in range(cfg.epochs):
        rng.shuffle(order)
        for part in minibatches(cfg, order):
            batches = rollout_batches([rollouts[i] for i in part], adv[part], cfg)
            update(cfg, model, optimizers, batches, lambda m, b: rollout_loss(m, b, cfg), total)
    total["kl_after"] = kl(before, log_probs(cfg, model, probe))
    return total


def kl(old, new):
    """Estimate of KL(old || new), nats a token, from log-probs of tokens that `old` sampled: never below 0, and of
    less variance than the mean of old - new."""
    change = (new - old).double()                 # in float32 what is below 1e-8 would be noise
    return float((change.expm1() - change).mean())


# ---------------------------------------------------------------------------------------------------------------------
# The record: metrics.jsonl, samples.txt, the step line


def rewind_metrics(out, phase, first):
    """Drop this phase's lines at or past step `first`: they are from after the checkpoint, and will be made again."""
    kept = [r for r in evaluation.read_metrics(out)
            if type(r.get("step")) is int and (r.get("phase") != phase or r["step"] < first)]
    save(os.path.join(out, "metrics.jsonl"), "".join(json.dumps(r) + "\n" for r in kept))


def append(out, name, text):
    with open(os.path.join(out, name), "a", encoding="utf-8", errors="replace") as f:
        f.write(text)


def step_figures(cfg, ex, proposals, solves, used, adv, stats):
    """Everything one step says about itself, over valid proposals only where it is about tasks. Keys as in README."""
    kinds, row = cfg.kinds.split(","), {}
    proposed, solved = ({k: [r for r in rs if r.kind == k] for k in kinds} for rs in (proposals, solves))
    cells = {f"{role}/{k}": rs[k] for role, rs in (("propose", proposed), ("solve", solved)) for k in kinds}
    valid = {k: [r.task for r in proposed[k] if r.task] for k in kinds}
    row["solve"] = {k: mean(r.verdict == "right" for r in solved[k]) for k in kinds}
    row["reward"] = {c: mean(r.reward for r in rs) for c, rs in cells.items()}
    row["length"] = {c: mean(len(r.reply) for r in rs if r.prompt) for c, rs in cells.items()}
    row["verdicts"] = {c: dict(Counter(r.verdict for r in rs)) for c, rs in cells.items()}
    row["valid"] = {k: mean(r.verdict == "valid" for r in proposed[k]) for k in kinds}
    row["novel"] = {k: mean(not r.known for r in proposed[k] if r.verdict != "unparsable") for k in kinds}
    row["learnable"] = {k: mean(0 < t.rate < 1 for t in valid[k]) for k in kinds}
    row["rates"] = {k: [sum(round(t.rate * cfg.tries) == c for t in valid[k]) for c in range(cfg.tries + 1)]
                    for k in kinds}
    row["overclaim"] = {k: mean(selfplay.RIGHT in r.reply for r in solved[k] if r.verdict == "wrong") for k in kinds}
    row["lines"] = {k: mean(t.program.count("\n") - 1 for t in valid[k]) for k in kinds}
    every = [t for k in kinds for t in valid[k]]
    size = dict(zip((t.program for t in every), ex.complexity([t.program for t in every])))
    row["nodes"], row["cyclomatic"] = ({k: mean(size[t.program][i] for t in valid[k]) for k in kinds} for i in (0, 1))
    shown = {id(r): decode(r.prompt).splitlines() for r in proposals}
    row["distance"] = {k: mean(mean(line not in shown[id(r)] for line in lines)
                               for r in proposed[k] if r.task and r.prompt
                               and (lines := r.task.program.splitlines()[1:-1])) for k in kinds}
    counts = Counter(t.outputs[0] for t in every).values()
    row["diversity"] = {"programs": len({t.program for t in every}) / max(1, len(every)),
                        "answers": sum(n / len(every) * math.log2(len(every) / n) for n in counts)}    # entropy, bits
    if stats["tokens"]:
        row.update({k: stats[k] / max(1, stats["tokens"]) for k in ("entropy", "clipped")}, kl=stats["kl_after"],
                   mismatch=stats["mismatch"])
    elif cfg.learner != "rl":                         # imitation samples nothing, and has a loss instead
        row["loss"] = stats["loss"] / max(1, stats["updates"])
    row.update(grad_norm=stats["grad_norm"] / max(1, stats["updates"]), with_gradient=int((adv != 0).sum()),
               learnt=len(used), padding=1 - stats["read"] / stats["padded"] if stats["padded"] else None)
    return row


def memory_mb(cfg):
    if cfg.device == "cuda":
        return torch.cuda.max_memory_reserved() / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 1024)


def step_line(cfg, step, row, left):
    """The step as one line; - is what this step did not measure."""
    kinds, s = cfg.kinds.split(","), row["seconds"]
    total = max(1e-9, sum(s.values()))

    def give(value, form=".2f"):
        return "-" if value is None else f"{value:{form}}"

    def each(values):
        return "/".join(give(values[k]).removeprefix("0") for k in kinds)
    return (f"step {step + 1:4d}/{cfg.steps} | solve {each(row['solve'])} valid {each(row['valid'])} "
            f"novel {each(row['novel'])} learnable {each(row['learnable'])} | "
            f"len {'/'.join(give(row['length'][f'solve/{k}'], '.0f') for k in kinds)} H {give(row.get('entropy'))} "
            f"kl {give(row.get('kl'), '.4f')} | {total:.1f}s sample {s['sample'] / total:.0%} "
            f"exec {s['execute'] / total:.0%} learn {s['learn'] / total:.0%} | {row['tokens_per_s'] / 1e3:.0f}k tok/s "
            f"{row['memory_mb'] / 1024:.1f}GB | {left:.1f} min left")


def rollout_text(r):
    rate = f", solve rate {r.task.rate:.2f}" if r.task else ""
    return evaluation.visible(f"--- {r.role} {r.kind}: {r.verdict}, reward {r.reward:+.2f}{rate}\n"
                              f"{decode(r.prompt)}\n  -> {decode(r.reply)}\n")


def shown_tasks(proposals, solves):
    """A proposal of each kind with some of its tries, for the report."""
    shown = []
    for kind in KINDS:
        mine = [r.task for r in proposals if r.task and r.kind == kind]
        for t in sorted(mine, key=lambda t: not 0 < t.rate < 1)[:1]:      # a learnable one if there is one
            shown.append({**{k: getattr(t, k) for k in ("kind", "program", "inputs", "outputs", "message", "rate")},
                          "tries": [{"reply": decode(r.reply), "answer": r.answer, "verdict": r.verdict}
                                    for r in solves if r.task is t][:4]})
    return shown


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def checkpoint(out, model, base, optimizers, game, step, minutes):
    save(os.path.join(out, "ckpt.pt"), {
        "version": VERSION, "gpt": asdict(model.config), "model": model.state_dict(), "base": base,
        "optimizers": [o.state_dict() for o in optimizers], "step": step, "minutes": minutes,
        "game": {**vars(game), "known": sorted(game.known),
                 "buffers": {k: [asdict(t) for t in b] for k, b in game.buffers.items()}}})


def restore(cfg, path, model, base, optimizers):
    """(Game, step, minutes) from a checkpoint; anything that does not fit is refused by name."""
    data = load(path, ("base", "model", "optimizers", "game", "step", "minutes"))
    load_weights(model, data["model"], path)
    try:
        same = data["base"].keys() == base.keys() and all(torch.equal(data["base"][k], v) for k, v in base.items())
        if not same or len(data["optimizers"]) != len(optimizers):
            fail(f"{path} began from another start network or with another optimizer: settings or code have changed, "
                 "or its file in bases/ is gone; start again with another --out")
        for o, state in zip(optimizers, data["optimizers"]):
            o.load_state_dict({**o.state_dict(), "state": state["state"]})  # rates: config.json's, which may be edited
        g, step, minutes = data["game"], data["step"], data["minutes"]
        if type(step) is not int or step < 0 or type(minutes) is not float:
            raise ValueError("step or minutes")
        if step > cfg.steps:
            fail(f"{path} is of step {step}: set steps, now {cfg.steps}, to {step} or more in config.json")
        buffers = {k: deque((Task(**t) for t in g["buffers"][k]), cfg.buffer_size) for k in KINDS}
        return Game(**{**g, "known": set(g["known"]), "buffers": buffers}), step, minutes
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"{path} is damaged ({type(error).__name__}: {error}): start again with another --out")


def leave(out):
    """Saved; say how to go on, and exit the way a signalled program should."""
    print(f"saved. Go on with:  python train.py --resume {out}", flush=True)
    sys.exit(128 + STOP["signal"])


def seeded(cfg, model, ex, banned):
    """Section 3.3.1: from the identity program alone, the model proposes until the buffer of each kind that is played
    holds seed_tasks tasks or more (50 rounds at the most). Nothing is learnt."""
    buffers = selfplay.seed_buffers(ex, cfg.buffer_size, cfg.n_inputs)
    game = Game(buffers, {t.program for b in buffers.values() for t in b})
    wanted = 0 if cfg.proposer == "fixed" else min(cfg.seed_tasks, cfg.buffer_size, 50 * cfg.tasks)
    played, s = [game.buffers[k] for k in cfg.kinds.split(",")], 0
    while min(map(len, played)) < wanted and s < 50:
        s += 1
        for r in propose(cfg, model, ex, game, banned, -s, random.Random(f"{cfg.seed}/seed/{s}"), cfg.tasks):
            if r.task:
                game.buffers[r.kind].append(r.task)
    print("seeded: " + ", ".join(f"{len(b)} {k}" for k, b in game.buffers.items()) + " tasks")
    if min(map(len, played)) < wanted // 2:
        print("warning: of some kind the start network proposes next to nothing that is valid, so there is little to "
              "play with: give it a longer warm-up (--warmup_steps)")
    return game


def self_play(cfg, model, ex, suite, banned, base_state, out):
    """Algorithm 1, from the last checkpoint if there is one. Returns (Game, minutes). Its local names are the story:
    proposals and solves are Rollouts, fresh the proposals' valid Tasks, tasks what is solved, used what is learnt."""
    start = time.time()
    optimizers = make_optimizers(model, cfg.optimizer == "muon", cfg.muon_lr, cfg.lr, beta2=0.99, eps=cfg.adam_eps,
                                 sharp_lr=cfg.sharp_lr)
    path, first, spent = os.path.join(out, "ckpt.pt"), 0, 0.0
    if os.path.exists(path):
        game, first, spent = restore(cfg, path, model, base_state, optimizers)
        print(f"resumed at step {first}")
    else:
        game = seeded(cfg, model, ex, banned)
    labelled = fixed_set(cfg, ex, banned) if cfg.proposer == "fixed" else []
    rewind_metrics(out, "selfplay", first)
    if first < cfg.steps and os.path.exists(os.path.join(out, "eval.json")):      # of fewer steps, if they were raised
        os.remove(os.path.join(out, "eval.json"))
    small = {key: tasks[:evaluation.SMALL] for key, tasks in suite.items()}

    for step in range(first, cfg.steps):
        rng, t0, executed = random.Random(f"{cfg.seed}/{step}"), time.time(), ex.seconds

        # 1) propose: the model writes tasks, looking at tasks of the buffers;  2) verify: run them, keep the valid
        if cfg.proposer == "fixed":
            proposals, tasks = [], selfplay.sample(labelled, cfg.tasks * len(KINDS), rng)
        else:
            proposals = propose(cfg, model, ex, game, banned, step, rng, cfg.proposals)
            fresh = [r.task for r in proposals if r.task]
            if cfg.previous_step:             # solve what the step before added to the buffers; this step's tasks wait
                new, fresh = fresh, [t for k, n in game.waiting.items() for t in list(game.buffers[k])[-n:]]
                game.waiting = dict(Counter(t.kind for t in new))
            tasks = choose_tasks(cfg, game, fresh, rng)

        # 3) solve: n tries of each task;  4) reward: the executor's verdicts, for both roles
        solves, priced = solve(cfg, model, ex, tasks, step) if cfg.learner == "rl" else [], []
        if cfg.previous_step:     # this step's proposers are paid now, by tries that nobody learns from
            priced = solve(cfg, model, ex, [r.task for r in proposals if r.task], step + 10 ** 6)   # a seed of its own
        for r in proposals:
            r.reward = selfplay.propose_reward(r.verdict, r.task.rate if r.task else -1.0, cfg.proposer_reward,
                                               cfg.zero_reward)
            if r.task:
                game.buffers[r.kind].append(r.task)
        game.rollouts += len(solves + priced) + (len(proposals) if cfg.proposer in ("train", "frozen") else 0)
        t1, executing = time.time(), ex.seconds - executed

        # 5) learn: advantages by cell, then the update over packed rollouts
        rise, fall = (step + 1) / max(1, cfg.lr_warmup), (cfg.steps - step) / max(1, cfg.steps * cfg.lr_decay)
        set_lr(optimizers, max(0.05, min(1.0, rise, fall)))
        if cfg.learner != "rl":
            used, adv, stats = [], torch.zeros(0), imitate(cfg, model, optimizers, labelled, rng)
        else:
            groups = [solves[i:i + cfg.tries] for i in range(0, len(solves), cfg.tries)]     # the tries of each task
            if cfg.skip_flat:                 # judged by all tries, even if only some are learnt from
                groups = [tries for tries in groups if len({r.reward for r in tries}) > 1]
            used = [r for tries in groups for r in tries[:cfg.learn_tries or cfg.tries]]
            used += proposals if cfg.proposer == "train" else []
            adv = advantages([r.reward for r in used], [(r.role, r.kind) for r in used], [r.group for r in used],
                             cfg.advantage, [len(r.reply) for r in used] if cfg.token_whiten else None, cfg.floor)
            adv[adv < 0] *= cfg.negative      # at 0 only what beat its cell's baseline is learnt
            adv *= torch.tensor([cfg.propose_weight if r.role == "propose" else 1.0 for r in used])
            stats = learn(cfg, model, optimizers, used, adv, rng) if used else Counter()
        if not math.isfinite(stats["grad_norm"]):
            fail(f"the gradient of step {step + 1} is not finite: lower lr (now {cfg.lr}) in {out}/config.json, then "
                 f"go on from the last checkpoint with --resume {out}")
        t2 = time.time()

        # 6) record
        row = {"phase": "selfplay", "step": step, **step_figures(cfg, ex, proposals, solves, used, adv, stats),
               "rollouts": game.rollouts, "held_out": game.held_out, "minutes": spent + (t2 - start) / 60,
               "seconds": {"sample": t1 - t0 - executing, "execute": executing, "learn": t2 - t1},
               "tokens_per_s": (sum(len(r.reply) for r in solves + priced + proposals) + stats["read"]) / (t2 - t0),
               "memory_mb": memory_mb(cfg)}
        if step % cfg.show_every == 0:
            row["tasks"] = shown_tasks(proposals, solves + priced)
            one = rng.choice(used or proposals or solves or [None])
            if one is not None:
                print(rollout_text(one), flush=True)
                append(out, "samples.txt", f"step {step}\n{rollout_text(one)}\n")
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            table, _ = evaluation.evaluate(model, ex, small, cfg.max_new, 4, cfg.dtype)
            row["eval"] = {k: {m: evaluation.mean_at(table, m, *evaluation.MEAN_CELLS[k])
                               for m in ("greedy", "pass@1")} for k in KINDS}
            print(f"held out ({evaluation.SMALL} tasks a kind and depth at most, depths 1-5): " + ", ".join(
                f"{k} greedy {v['greedy']:.2f} pass@1 {v['pass@1']:.2f}" for k, v in row["eval"].items()), flush=True)
        append(out, "metrics.jsonl", json.dumps(row) + "\n")
        done, minutes = step + 1, spent + (time.time() - start) / 60
        print(step_line(cfg, step, row, (minutes - spent) / (done - first) * (cfg.steps - done)), flush=True)
        if done % cfg.save_every == 0 or done == cfg.steps or STOP["signal"]:
            checkpoint(out, model, base_state, optimizers, game, done, minutes)
        if STOP["signal"]:
            leave(out)
    return game, spent + (time.time() - start) / 60


def fixed_set(cfg, ex, banned):
    """The labelled control: a fixed set of generated tasks, equal shares of the kinds; for supervised learning the same
    tasks with their gold answers, at once (which is what a label is) or behind a worked thought."""
    rng, kinds, labelled = random.Random(f"{cfg.seed}/fixed"), cfg.kinds.split(","), []
    for kind in kinds:
        labelled += [t if cfg.learner == "rl" else selfplay.gold(d, t, cfg.learner == "worked")
                     for d, t, _ in generated(cfg, ex, rng, kind, cfg.fixed_tasks // len(kinds), banned) if t]
    labelled = [x for x in labelled if cfg.learner == "rl" or len(x[0]) + len(x[1]) <= cfg.block_size]
    if not labelled:
        fail(f"none of {cfg.fixed_tasks} labelled tasks fits --block_size {cfg.block_size}: raise either")
    return labelled


def imitate(cfg, model, optimizers, demos, rng):
    """Supervised updates (a control), in about an RL step's time: as nothing is sampled or judged, three demonstrations
    are read for each try that RL would have made."""
    total = Counter()
    mine = selfplay.sample(demos, 3 * cfg.tasks * len(KINDS) * cfg.tries, rng)
    for part in minibatches(cfg, mine):
        update(cfg, model, optimizers, demo_batches(part, cfg), demo_loss, total)
    return total


def run(cfg, out):
    """One whole run in the folder `out`."""
    network.tune(cfg.device)
    torch.manual_seed(cfg.seed)
    started = time.time()
    with Executor(workers=cfg.workers, timeout=0.2, unsafe=cfg.unsafe_executor) as ex:
        model = new_model(cfg)
        suite = evaluation.build_suite(ex, cfg.suite_n, cfg.n_inputs, cfg.large)
        people = evaluation.people_suite(ex, cfg.n_inputs)
        banned = selfplay.ban([t for tasks in suite.values() for t in tasks])
        print(f"{cfg.device}, {cfg.dtype}, {network.THREADS if cfg.device == 'cpu' else 1} threads | "
              f"{model.num_params():,} weights, vocabulary {network.VOCAB_SIZE} | "
              f"{sum(map(len, suite.values()))} held-out tasks | {cfg.steps} steps of {len(cfg.kinds.split(','))} x "
              f"{cfg.proposals} proposals and {cfg.tasks * len(KINDS)} x {cfg.tries} tries | {out}", flush=True)
        base, warm_minutes = warm_up(cfg, model, ex, suite, people, banned, out)
        base_state = {k: v.clone().cpu() for k, v in model.state_dict().items()}
        game, minutes = self_play(cfg, model, ex, suite, banned, base_state, out)
        final = evaluation.measure(model, ex, suite, people, cfg.max_new, cfg.samples, cfg.dtype)
        record = {**evaluation.join(base, final), "minutes": {"warmup": warm_minutes, "selfplay": minutes},
                  "rollouts": game.rollouts}
        save(os.path.join(out, "eval.json"), json.dumps(record))
        evaluation.report(out)
    evaluation.print_result(record, model, cfg.max_new)
    print(f"\nwarm-up {warm_minutes:.1f} min, self-play {minutes:.1f} min and {game.rollouts:,} rollouts, "
          f"in all {(time.time() - started) / 60:.1f} min here; {game.held_out} proposals were held-out tasks, refused")
    print(f"report: {os.path.join(out, 'report.html')}")
    if STOP["signal"]:                                # it came when nothing was left to save; a grid must stop as well
        sys.exit(128 + STOP["signal"])


def grid(cfg, args):
    """--ablation all --seeds N: every row, one after the other; finished ones are skipped, so it can be stopped and
    go on."""
    if args.name:
        fail("--name: the rows of a grid have names of their own, leave it out")
    names = [args.ablation or "full"]
    if args.ablation == "all":
        names = [name for name, row in ABLATIONS.items() if not clashes(row, args.preset, args)]
        if len(names) < len(ABLATIONS):
            print(f"left out, as they set what --preset {args.preset} sets:",
                  ", ".join(name for name in ABLATIONS if name not in names))
    jobs = [(name, seed) for seed in range(cfg.seed, cfg.seed + (args.seeds or 1)) for name in names]
    rest = [text for flag, value in vars(args).items() if value is not None          # the flags that every row gets
            and flag not in ("ablation", "seed", "seeds", "out", "name") for text in ("--" + flag, str(value))]
    for name in names:                                # whom these flags do not suit is refused now, not hours later
        parse(["--ablation", name, *rest])
    for name, seed in tqdm(jobs, "grid"):
        out = os.path.join(args.out or "runs/grid", f"{name}-s{seed}")
        how, begun = ["--ablation", name, "--seed", str(seed), *rest], os.path.exists(os.path.join(out, "config.json"))
        if begun:
            was, now = read_config(out), parse(how)[0]
            other = [f.name for f in fields(Config) if getattr(was, f.name) != getattr(now, f.name)]
            if other:
                fail(f"{out} was made with another --{other[0]} than this grid: give another --out, or delete it")
        if os.path.exists(os.path.join(out, "eval.json")):
            tqdm.write(f"{out}: done before")
            continue
        how = ["--resume", out] if begun else ["--out", out, *how]
        row = subprocess.Popen([sys.executable, os.path.abspath(__file__), *how])
        signal.signal(signal.SIGTERM, lambda number, _, row=row: row.send_signal(number))
        signal.signal(signal.SIGINT, lambda *_: None)  # the terminal tells the row as well: it saves, then ends
        if code := row.wait():
            sys.exit(code)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    cfg, args = parse(argv)
    if "" in (args.out, args.resume):
        fail("--out and --resume want the name of a folder")
    if args.resume and sum(a.startswith("--") for a in argv) > 1:
        fail("--resume takes its settings from the run's config.json: give no other flag")
    if args.seeds is not None and args.seeds < 1:
        fail(f"--seeds must be at least 1, not {args.seeds}")
    if args.ablation == "all" or args.seeds:
        return grid(cfg, args)
    if args.resume:
        out = args.resume.rstrip("/")
        cfg = read_config(out)
        check(cfg)
    else:
        name = f"runs/{cfg.name}-{args.preset}-s{cfg.seed}"
        out = args.out or next(p for p in (name, *(f"{name}-{n}" for n in range(2, 10 ** 6))) if not os.path.exists(p))
        if os.path.isdir(out) and set(os.listdir(out)) - {".lock"}:
            fail(f"{out} is not empty: give another --out, or go on with --resume {out}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        with lock(out):
            if not args.resume:
                save(os.path.join(out, "config.json"), json.dumps({
                    **asdict(cfg), "preset": args.preset, "command": "python train.py " + shlex.join(argv),
                    **origin(cfg)}, indent=1))
            run(cfg, out)
    except torch.OutOfMemoryError:
        fail(f"CUDA is out of memory: lower --micro_tokens (now {cfg.micro_tokens}), or --tasks (now {cfg.tasks}) and "
             f"--proposals (now {cfg.proposals}) together, then --resume {out} with the new values in its config.json; "
             "--block_size bounds the sampler's cache, but is the base's as well")
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            fail(f"a process that draws the warm-up's programs is gone ({error}). Is memory short? Go on with --resume "
                 f"{out}")
        raise
    except OSError as error:
        if error.errno in (2, 13, 17, 20, 28, 30):  # gone, no access, no folder (twice), disk full, read-only system
            fail(f"{error.strerror} ({error.filename or out}): put that right (make room, say, or give another --out), "
                 f"then go on with --resume {out} if a run is there")
        raise


if __name__ == "__main__":
    evaluation.command_line(main)
