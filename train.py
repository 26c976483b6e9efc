"""
train.py
"""
import argparse
import ctypes
import hashlib
import inspect
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace

import torch
from tqdm import tqdm

import eval as evaluation
import model as network
import selfplay
from executor import Executor
from model import END, GPT, GPTConfig, decode, encode, generate, logprobs, pad_rows
from selfplay import KINDS, Rollout
from trr import advantages, policy_loss


@dataclass
class Config:
    # --- run
    seed: int = 1
    out: str = ""
    device: str = "auto"
    dtype: str = "auto"
    # --- model
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128
    n_kv_head: int = 2
    block_size: int = 320
    # --- warm-up
    large: bool = False
    thoughts: bool = True
    warmup_steps: int = 3000
    warmup_batch: int = 64    # demos per step
    warmup_lr: float = 0.02
    warmup_adam_lr: float = 0.004
    # --- game
    steps: int = 100
    tasks: int = 64            # B: per kind
    tries: int = 8
    references: int = 2
    n_inputs: int = 6
    max_new: int = 176
    buffer_size: int = 16384
    seed_tasks: int = 128
    solver_kinds: str = "deduction,abduction,induction"
    proposer: str = "train"    # train | frozen | random
    # --- reward
    proposer_reward: str = "learnability"
    zero_reward: float = 0.0
    # --- learning
    lr: float = 3e-4
    optimizer: str = "adamw"   # adamw | muon
    muon_lr: float = 0.002
    advantage: str = "trr"
    average: str = "token"
    token_whiten: bool = False
    floor: float = 0.2
    minibatches: int = 1
    epochs: int = 1
    clip: float = 0.2
    propose_weight: float = 1.0
    skip_flat: bool = False
    grad_clip: float = 1.0
    # --- eval
    suite_n: int = 150
    samples: int = 16
    eval_every: int = 0
    eval_n: int = 40


def tune_allocator():
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1), libc.mallopt(-2, 256 << 20)


def make_optimizers(model, cfg, muon, muon_lr, adam_lr, betas=(0.9, 0.95)):
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "blocks" in n]
    rest = [p for n, p in model.named_parameters() if not (p.dim() == 2 and "blocks" in n)]
    if not muon:
        return [torch.optim.AdamW(hidden + rest, lr=adam_lr, betas=betas, weight_decay=0.0, fused=True)]
    return [torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="original"),
            torch.optim.AdamW(rest, lr=adam_lr, betas=betas, weight_decay=0.0, fused=True)]


def accumulate(model, batches, loss_fn, dtype):
    """Sum of gradients of loss_fn over micro-batches, on THREADS threads on a CPU."""
    params = list(model.parameters())
    device = params[0].device.type
    threads = network.THREADS if device == "cpu" else 1

    def work(k):
        grads, outs = None, []
        for batch in batches[k::threads]:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss, out = loss_fn(model, batch)
            g = torch.autograd.grad(loss, params)
            grads = g if grads is None else [a.add_(b) for a, b in zip(grads, g)]
            outs.append(out)
        return grads, outs
    results = [r for r in network._pool(threads).map(work, range(threads)) if r[0] is not None]
    for i, p in enumerate(params):
        p.grad = sum(r[0][i] for r in results)
    return [o for r in results for o in r[1]]


def buckets(lengths, budget, multiple=16):
    """Indices grouped into micro-batches of similar length and at most `budget` padded tokens."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    out, cur = [], []
    for i in order:
        width = -(-lengths[i] // multiple) * multiple
        if cur and width * (len(cur) + 1) > budget:
            out.append(cur)
            cur = []
        cur.append(i)
    return out + [cur] if cur else out


def demo_loss(model, batch):
    idx, mask, norm = batch
    logp, _ = logprobs(model, idx, mask)
    loss = -logp.sum() / norm
    return loss, loss.item()


def warmup(cfg, model, ex, banned, bar=True):
    opts = make_optimizers(model, cfg, True, cfg.warmup_lr, cfg.warmup_adam_lr)
    base_lrs = [g["lr"] for o in opts for g in o.param_groups]
    chunk = 32
    pool = ThreadPoolExecutor(1)
    draw = lambda c: selfplay.demonstrations(ex, random.Random(f"{cfg.seed}/demo/{c}"), chunk * cfg.warmup_batch, cfg, banned)
    future = pool.submit(draw, 0)
    ema, tokens, start = None, 0, time.time()
    for step in tqdm(range(cfg.warmup_steps), mininterval=5):
        if step % chunk == 0:
            demos, _ = future.result()
            future = pool.submit(draw, step // chunk + 1)
        mine = demos[step % chunk * cfg.warmup_batch:][:cfg.warmup_batch]
        mine = [d for d in mine if len(d[0]) + len(d[1]) <= cfg.block_size]
        norm = sum(sum(m) for _, _, m in mine)
        batches = []
        for rows in buckets([len(p) + len(r) for p, r, _ in mine], 4096):
            idx = pad_rows([mine[i][0] + mine[i][1] for i in rows])
            mask = torch.zeros_like(idx, dtype=torch.bool)
            for j, i in enumerate(rows):
                p, r, m = mine[i]
                mask[j, len(p):len(p) + len(r)] = torch.tensor(m, dtype=torch.bool)
            batches.append((idx, mask, norm))
            tokens += idx.numel()
        loss = sum(accumulate(model, batches, demo_loss, cfg.dtype))
        frac = step / cfg.warmup_steps
        scale = min(1, (step + 1) / 30) * (1 if frac < 0.5 else max(0.05, 2 * (1 - frac)))
        i = 0
        for o in opts:
            for g in o.param_groups:
                g["lr"] = base_lrs[i] * scale
                i += 1
            o.step()
        ema = loss if ema is None else 0.95 * ema + 0.05 * loss
        if step % 100 == 99:
            print(f"warmup {step+1} loss {ema:.3f} {tokens/(time.time()-start)/1e3:.1f}k tok/s {time.time()-start:.0f}s", flush=True)
    pool.shutdown()


def main():
    ap = argparse.ArgumentParser()
    for f in fields(Config):
        ap.add_argument("--" + f.name, type=(lambda s: s.lower() in ("1", "true")) if f.type is bool else f.type, default=f.default)
    cfg = Config(**vars(ap.parse_args()))
    tune_allocator()
    torch.set_num_threads(1)
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16"
    torch.manual_seed(cfg.seed)
    ex = Executor(workers=2, timeout=0.2)
    t = time.time()
    suite = evaluation.build_suite(ex, cfg.suite_n, cfg.n_inputs, cfg.large)
    banned = {t.program for ts in suite.values() for t in ts}
    print(f"suite {time.time()-t:.1f}s")
    small = {k: v[:cfg.eval_n] for k, v in suite.items()}
    model = GPT(GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, n_kv_head=cfg.n_kv_head, block_size=cfg.block_size))
    print(f"{model.num_params():,} params")
    wkeys = ("seed", "n_layer", "n_head", "n_embd", "n_kv_head", "block_size", "large", "thoughts", "warmup_steps", "warmup_batch", "warmup_lr", "warmup_adam_lr", "references", "n_inputs")
    key = hashlib.sha256(json.dumps([getattr(cfg, k) for k in wkeys] + [repr(selfplay.OPS)] + network.PIECES).encode()).hexdigest()[:12]
    path = f"/root/w/base-{key}.pt"
    if os.path.exists(path):
        d = torch.load(path, weights_only=True)
        model.load_state_dict(d["model"]); base = d["base"]
    else:
        warmup(cfg, model, ex, banned)
        t = time.time()
        base = evaluation.evaluate(model, ex, suite, cfg.max_new, cfg.samples)
        print(f"eval {time.time()-t:.1f}s")
        torch.save({"model": model.state_dict(), "base": base}, path)
    show(base)
    if cfg.steps:
        selfplay_loop(cfg, model, ex, suite, small, banned, base)
    ex.close()


def show(t):
    for m in ("greedy", "pass@1", "pass@16"):
        print(f"{m:8} mean {evaluation.mean_over(t, m):.3f} | " + " | ".join(k[:3] + " " + " ".join(f"{t[k][str(d)][m]:.2f}" for d in range(1, 7)) for k in KINDS), flush=True)


def rollout_loss(model, batch, cfg):
    idx, mask, old, adv, norm = batch
    logp, ent = logprobs(model, idx, mask)
    full = torch.zeros(idx.shape).masked_scatter(mask, logp)
    loss, stats = policy_loss(full, old, adv, mask, cfg.clip, cfg.clip, cfg.average, norm)
    stats["entropy"] = ent.sum()
    return loss, stats


def learn(cfg, model, opts, rollouts, adv, rng):
    total = Counter()
    for epoch in range(cfg.epochs):
        order = list(range(len(rollouts)))
        rng.shuffle(order)
        size = -(-len(order) // cfg.minibatches)
        for s in range(0, len(order), size):
            part = order[s:s + size]
            lens = [len(rollouts[i].prompt) + len(rollouts[i].reply) for i in part]
            norm = sum(len(rollouts[i].reply) for i in part) if cfg.average == "token" else len(part)
            batches = []
            for rows in buckets(lens, 4096):
                rows = [part[j] for j in rows]
                idx = pad_rows([rollouts[i].prompt + rollouts[i].reply for i in rows])
                mask, old = torch.zeros_like(idx, dtype=torch.bool), torch.zeros(idx.shape)
                for j, i in enumerate(rows):
                    r = rollouts[i]
                    a, b = len(r.prompt), len(r.prompt) + len(r.reply)
                    mask[j, a:b], old[j, a:b] = True, torch.tensor(r.logp)
                total["cells"] += idx.numel()
                batches.append((idx, mask, old, adv[rows], norm))
            for stats in accumulate(model, batches, lambda m, b: rollout_loss(m, b, cfg), cfg.dtype):
                for k, v in stats.items():
                    total[k] += float(v)
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            for o in opts:
                o.step()
    return total


def selfplay_loop(cfg, model, ex, suite, small, banned, base):
    opts = make_optimizers(model, cfg, cfg.optimizer == "muon", cfg.muon_lr, cfg.lr)
    buffers = selfplay.seed_buffers(ex, cfg.buffer_size, cfg.n_inputs)
    known = set()
    kinds = cfg.solver_kinds.split(",")
    start = time.time()
    n_roll = 0

    def propose(step, rng, B, tries_seed):
        """-> proposals rollouts with task set"""
        proposals = []
        if cfg.proposer == "random":
            for kind in kinds:
                draws, _ = selfplay.draw_programs(ex, rng, [rng.randint(1, 6) for _ in range(B)], cfg.n_inputs if kind == "induction" else 1, cfg.large, banned)
                wanted = [(kind, d.program, d.inputs, d.message(rng) if kind == "induction" else "") for d in draws]
                for (task, error), d in zip(selfplay.make_tasks(ex, wanted, step), draws):
                    if task:
                        task.depth = d.depth
                        r = Rollout("propose", kind, [], [], [], task, verdict="valid")
                        proposals.append(r)
            return proposals
        prompts, roles = [], []
        for kind in kinds:
            for _ in range(B):
                if kind == "induction":
                    src = buffers[rng.choice(("deduction", "abduction"))]
                    refs = src.sample(1, rng)
                else:
                    refs = buffers[kind].sample(cfg.references, rng)
                prompts.append(selfplay.propose_prompt(kind, refs)); roles.append((kind, refs[0]))
        replies, lps = generate(model, prompts, 100, 1.0, 1, tries_seed)
        wanted, slots = [], []
        fresh = set()
        for (kind, ref), p, r, lp in zip(roles, prompts, replies, lps):
            ro = Rollout("propose", kind, p, r, lp)
            proposals.append(ro)
            parsed = selfplay.parse_proposal(kind, r, cfg.n_inputs)
            if parsed is None:
                ro.verdict = "unparsable"; continue
            program, inputs, message = parsed
            program = program or ref.program
            fault = selfplay.length_fault(program, inputs)
            if kind == "induction":
                if len(set(inputs)) < len(inputs): fault = fault or "same inputs"
                if not selfplay.MESSAGE_TEXT.fullmatch(message): fault = fault or "message"
            elif program in known or program in fresh:
                fault = fault or "known"
            if program in banned and not fault and program.count("\n") > 2: fault = "held out"
            if fault:
                ro.verdict = fault; continue
            if kind != "induction": fresh.add(program)
            wanted.append((kind, program, inputs, message)); slots.append(ro)
        for ro, (task, error) in zip(slots, selfplay.make_tasks(ex, wanted, step)):
            ro.task, ro.verdict = task, error or "valid"
            if task and ro.kind != "induction": known.add(task.program)
        return proposals

    # seeding
    s = 0
    while min(len(b.tasks) for b in buffers.values()) < cfg.seed_tasks and s < 50:
        for ro in propose(-1, random.Random(f"{cfg.seed}/seed/{s}"), 64, hash((cfg.seed, s)) % 2**31):
            if ro.task: buffers[ro.kind].add(ro.task)
        s += 1
    print("seeded", {k: len(b.tasks) for k, b in buffers.items()}, f"{time.time()-start:.1f}s")
    for step in range(cfg.steps):
        rng = random.Random(f"{cfg.seed}/{step}")
        t0 = time.time()
        proposals = propose(step, rng, cfg.tasks, cfg.seed * 1000003 + step * 7)
        # 3) solve
        t1 = time.time()
        tasks = []
        for kind in kinds:
            mine = [r.task for r in proposals if r.kind == kind and r.task]
            fill = [t for t in buffers[kind].sample(2 * cfg.tasks, rng)][:max(0, cfg.tasks - len(mine))]
            tasks += mine + fill
        replies, lps = generate(model, [selfplay.solve_prompt(t) for t in tasks], cfg.max_new, 1.0, cfg.tries, cfg.seed * 1000003 + step * 7 + 1)
        t2 = time.time()
        solves = []
        for i, (r, lp) in enumerate(zip(replies, lps)):
            t = tasks[i // cfg.tries]
            solves.append(Rollout("solve", t.kind, selfplay.solve_prompt(t), r, lp, t, i // cfg.tries, selfplay.parse_answer(r)))
        for ro, v in zip(solves, selfplay.judge_answers(ex, [r.task for r in solves], [r.answer for r in solves])):
            ro.verdict, ro.reward = v, selfplay.SOLVE_REWARD[v]
        for i, t in enumerate(tasks):
            t.rate = sum(r.verdict == "right" for r in solves[i * cfg.tries:(i + 1) * cfg.tries]) / cfg.tries
        for ro in proposals:
            ro.reward = selfplay.propose_reward(ro.verdict, ro.task.rate if ro.task else -1, cfg.proposer_reward, cfg.zero_reward)
            if ro.task: buffers[ro.kind].add(ro.task)
        t3 = time.time()
        rollouts = [r for r in solves if not (cfg.skip_flat and r.task.rate in (0, 1))]
        if cfg.proposer == "train": rollouts = rollouts + proposals
        adv = advantages([r.reward for r in rollouts], [(r.role, r.kind) for r in rollouts], [r.group for r in rollouts], cfg.advantage,
                         [len(r.reply) for r in rollouts] if cfg.token_whiten else None, cfg.floor)
        w = torch.tensor([cfg.propose_weight if r.role == "propose" else 1.0 for r in rollouts])
        st = learn(cfg, model, opts, rollouts, adv * w, rng)
        n_roll += len(solves) + len(proposals)
        t4 = time.time()
        if step % 5 == 0 or step == cfg.steps - 1:
            def m(xs): xs = list(xs); return sum(xs) / max(1, len(xs))
            print(f"step {step} solve " + "/".join(f"{m(r.verdict=='right' for r in solves if r.kind==k):.2f}" for k in kinds)
                  + " unp " + "/".join(f"{m(r.verdict=='unparsable' for r in solves if r.kind==k):.2f}" for k in kinds)
                  + f" valid {m(r.verdict=='valid' for r in proposals):.2f} learnable {m(0<r.task.rate<1 for r in proposals if r.task):.2f}"
                  + " lines " + f"{m(r.task.program.count(chr(10))-1 for r in proposals if r.task):.1f}"
                  + " len " + "/".join(f"{m(len(r.reply) for r in solves if r.kind==k):.0f}" for k in kinds) + f" prop {m(len(r.reply) for r in proposals):.0f}"
                  + f" H {st['entropy']/max(1,st['tokens']):.2f} kl {st['kl']/max(1,st['tokens']):.4f} pad {1-sum(len(r.prompt)+len(r.reply) for r in rollouts)*cfg.epochs/max(1,st['cells']):.2f}"
                  + f" | prop {t1-t0:.2f} sample {t2-t1:.2f} exec {t3-t2:.2f} learn {t4-t3:.2f} roll {n_roll} {time.time()-start:.0f}s", flush=True)
        if step % 20 == 0:
            print("   ", Counter(r.verdict for r in proposals).most_common(7), flush=True)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            te = time.time()
            now = evaluation.evaluate(model, ex, small, cfg.max_new, 8)
            print(f"  -- eval step {step+1}: pass@1 {evaluation.mean_over(now,'pass@1'):.3f} greedy {evaluation.mean_over(now,'greedy'):.3f} " +
                  " ".join(f"{k[:3]} p1 {sum(now[k][str(d)]['pass@1'] for d in range(1,6))/5:.3f} g {sum(now[k][str(d)]['greedy'] for d in range(1,6))/5:.3f}" for k in kinds) + f" ({time.time()-te:.1f}s)", flush=True)
            start += time.time() - te
    final = evaluation.evaluate(model, ex, suite, cfg.max_new, cfg.samples)
    show(base); show(final)
    for mm in ("pass@1", "greedy"):
        print(f"GAIN {mm} {100*(evaluation.mean_over(final,mm)-evaluation.mean_over(base,mm)):+.1f} " + " ".join(f"{k} {100*sum(final[k][str(d)][mm]-base[k][str(d)][mm] for d in range(1,6))/5:+.1f}" for k in KINDS))


if __name__ == "__main__":
    main()
