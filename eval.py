"""
eval.py: how we know (paper section 4): held-out tasks, pass@k, people's functions, CRUXEval files, comparison, report.

A run is judged on tasks that it could not have trained on. The suite holds the same generated tasks for every run, by
kind and depth, so a gain is paired: the same task, before and after. Greedy accuracy asks for the model's best guess,
pass@1 for what it does when it samples (what RL trains), pass@16 for what is within its reach at all. If pass@1 rises
while pass@16 stands still, self-play only sharpened what was there; if both rise, it added skill.

Where we differ from the paper and from the authors' code:
1) The paper measures on benchmarks for people (HumanEval+, LiveCodeBench, AIME), greedy, one run. A small network from
   random weights can read none of them, so the suite comes from the warm-up's generator. Far from it stand `PEOPLE`, 40
   functions as people write them, and any file in CRUXEval's format (--tasks); expect little there.
2) Gains have paired 95 % bootstrap intervals over tasks, comparisons of runs intervals over seeds.
3) Tasks of the suite are kept out of warm-up and self-play by train.py, which counts the hits. PEOPLE's are not: two of
   their programs are in the grammar.
4) A prompt with no room for a reply counts as wrong, and is counted aloud: nothing is dropped to look better.
5) All that is read here may come from a stranger (checkpoint, task file, model text in a report): it is checked,
   compared and, in a report, escaped; never executed outside the executor's wall.

Try:  python eval.py RUN                     # the held-out table of a run's folder
      python eval.py RUN --tasks FILE.jsonl  # CRUXEval's fields: code, input, output, id
      python eval.py --compare RUN RUN ...   # mean and deviation over seeds; also compare.md, .csv, curves.svg
      python eval.py --report RUN            # one page, RUN/report.html
      python eval.py --bench                 # speeds beside naive paths and this machine's limit
"""
import argparse
import copy
import csv
import gc
import html
import io
import json
import math
import os
import random
import re
import sys
import time
import timeit
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import fields, replace

import numpy as np
import torch

import executor
import model as network
from model import GPT, GPTConfig, PAD, VOCAB_SIZE, generate, generate_naive, pad_rows
from selfplay import (KINDS, MAX_DEPTH, Rollout, Task, draw_programs, judge_answers, make_tasks, parse_answer,
                      solve_prompt)

SUITE_SEED = 505_03335  # fixed: every run and every seed is measured on the same tasks
MEAN_DEPTHS = range(1, 6)  # of the figure by which runs are compared; depth 6 is reported, and part of DEEP
DEEP = range(4, 7)         # what the warm-up hardly showed solved
SMALL = 20                 # tasks a kind and depth of the evaluations along a run
METRICS = ("greedy", "pass@1", "pass@16")
ENDS = (("base", "before"), ("final", "after"))  # of self-play: the key in eval.json, and what a reader is told
BASE_FIELDS = (  # of a run's config: what a start network and its measures depend on. Runs that agree share it
    "seed", "n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "large", "hasty", "patience", "habits_from",
    "timid", "warmup_steps", "warmup_batch", "warmup_lr", "warmup_adam_lr", "references", "n_inputs",
    "max_new", "suite_n", "samples", "dtype", "device")
MEAN_CELLS = {k: [(k, str(d)) for d in MEAN_DEPTHS] for k in KINDS}  # the cells of a table, for means and gains
MEAN_CELLS["all"] = sum(MEAN_CELLS.values(), [])
MEAN_CELLS["deep"] = [(k, str(d)) for k in KINDS for d in DEEP]
COMPARED = ("greedy", "pass@1", "pass@1 deep", "pass@16", "pass@16 deep")  # gains that --compare gives an interval


def fail(message):
    """One line that says what to do, exit code 2. The message may quote a stranger's file, so line ends are folded."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def readable(what):
    """Where a run's files, which may be old, edited or a stranger's, are not as we write them, one line says so."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        fail(f"{what} cannot be read ({type(error).__name__}: {str(error)[:100]}): mend it, or leave it out")


# ---------------------------------------------------------------------------------------------------------------------
# The held-out suite


def build_suite(ex, n, n_inputs, large=False):
    """The held-out suite: {(kind, depth): [Task] * n} for 3 kinds and depths 1-6, the same for every run of a tier.

    Each cell has a random stream of its own, so a cell's tasks do not depend on the other cells. They do on n."""
    suite = {}
    for kind in KINDS:
        for depth in range(1, MAX_DEPTH + 1):
            rng = random.Random(f"{SUITE_SEED}/{kind}/{depth}")
            draws, _ = draw_programs(ex, rng, [depth] * n, n_inputs if kind == "induction" else 1, large)
            made = make_tasks(ex, [(kind, d.program, d.inputs, d.message(rng) if kind == "induction" else "")
                                   for d in draws])
            assert all(task for task, _ in made), f"a held-out task failed: {[why for _, why in made if why]}"
            suite[kind, depth] = [replace(task, depth=depth) for task, _ in made]
    return suite


def pass_at_k(right, n, k):
    """Unbiased pass@k (Chen et al. 2021) from `right` correct among n samples; right is an array."""
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in right])


def interval(cells, draws=2000):
    """[low, high], the 95 % bootstrap interval of the mean of the cells' means. cells: arrays with one figure a task;
    tasks are drawn anew within their cell, because the cells (kinds, depths) are fixed and only the tasks are a sample.
    A cell whose tasks all agree has an interval of width 0: the bootstrap cannot see what it never met."""
    rng, total = np.random.default_rng(SUITE_SEED), np.zeros(draws)
    for cell in map(np.asarray, cells):
        total += cell[rng.integers(0, len(cell), (draws, len(cell)))].mean(1) / len(cells)  # (draws, tasks) -> (draws,)
    return [round(float(v), 4) for v in np.percentile(total, (2.5, 97.5))]


def fits(model, prompt, max_new):
    return len(prompt) + max_new <= model.config.block_size


def attempt(model, ex, tasks, max_new, temperature, tries, dtype):
    """Whether sampled solutions are right, (len(tasks), tries) bool. A prompt that leaves no room for max_new tokens is
    not asked and counts as wrong."""
    prompts = [solve_prompt(t) for t in tasks]
    asked = [i for i, p in enumerate(prompts) if fits(model, p, max_new)]
    replies, _ = generate(model, [prompts[i] for i in asked], max_new, temperature, tries, SUITE_SEED, dtype=dtype)
    verdicts = judge_answers(ex, [tasks[i] for i in asked for _ in range(tries)], [parse_answer(r) for r in replies])
    right = np.zeros((len(tasks), tries), bool)
    right[asked] = np.array([v == "right" for v in verdicts], bool).reshape(len(asked), tries)
    return right


def evaluate(model, ex, suite, max_new, samples, dtype="float32"):
    """Two dicts {kind: {depth: cell}} on a suite as build_suite makes it. The table's cells have "greedy", "pass@1",
    "pass@4", "pass@16", intervals "..._ci", "n" and "too_long"; those of the counts say of each task whether the greedy
    reply was right and how many samples were, which paired intervals need: {"greedy": [0 or 1], "right": [0..samples],
    "samples": samples}. dtype: of the matrix products, best that of self-play, whose policy it is."""
    tasks, ends = [t for cell in suite.values() for t in cell], np.cumsum([len(cell) for cell in suite.values()])[:-1]
    greedy = attempt(model, ex, tasks, max_new, 0.0, 1, dtype)
    sampled = attempt(model, ex, tasks, max_new, 1.0, samples, dtype)
    table, counts = {}, {}
    for (kind, depth), g, s in zip(suite, np.split(greedy[:, 0], ends), np.split(sampled, ends)):
        table.setdefault(kind, {})[str(depth)] = {
            "greedy": float(g.mean()), "greedy_ci": interval([g]), "pass@1": float(s.mean()),
            "pass@1_ci": interval([s.mean(1)]),
            **{f"pass@{k}": float(pass_at_k(s.sum(1), samples, k).mean()) for k in (4, 16) if k <= samples},
            "too_long": sum(not fits(model, solve_prompt(t), max_new) for t in suite[kind, depth]),
            "n": len(g)}
        counts.setdefault(kind, {})[str(depth)] = {"greedy": g.astype(int).tolist(), "right": s.sum(1).tolist(),
                                                   "samples": samples}
    return table, counts


def number(record, *path):
    """The number at a path of keys in parsed JSON, None where one is missing (not every run measures everything) or is
    not finite."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return None if record is None or not math.isfinite(record) else float(record)


def mean(values):
    """None where one is missing, or all are: what was not measured is not 0."""
    values = list(values)
    return None if None in values or not values else sum(values) / len(values)


def mean_at(table, metric, *cells):
    """Mean of one metric over cells, each a tuple of keys; None when one is missing."""
    return mean([number(table, *cell, metric) for cell in cells])


def shares(cell, metric):
    """A metric's figure for each task, from a cell of counts as evaluate collects them."""
    right, n, k = (cell["greedy"], 1, 1) if metric == "greedy" else (cell["right"], cell["samples"], int(metric[5:]))
    return pass_at_k(right[:10_000], n, k)  # suite_n's most; a stranger may write more


def gain(result, metric, over="all"):
    """(final - base as a share, its 95 % interval) over MEAN_CELLS[over]; None for what the result, as eval.json holds
    it, does not give. Paired: how hard a task is cancels out."""
    before, after = (mean_at(result.get(end), metric, *MEAN_CELLS[over]) for end, _ in ENDS)
    if before is None or after is None:
        return None, None
    if "counts" not in result:
        return after - before, None
    old, new = (result["counts"][end] for end, _ in ENDS)
    return after - before, interval([shares(new[k][d], metric) - shares(old[k][d], metric)
                                     for k, d in MEAN_CELLS[over]])


def measure(model, ex, suite, people, max_new, samples, dtype):
    """All that one model is asked, as JSON, so that a base's may be kept beside its weights for every run from it."""
    table, counts = evaluate(model, ex, suite, max_new, samples, dtype)
    cells = {(k, "people"): [t for t in people if t.kind == k] for k in sorted({t.kind for t in people})}
    row, _ = evaluate(model, ex, cells, max_new, samples, dtype)
    return {"table": table, "counts": counts, "people": {k: row[k]["people"] for k in row}}


def join(base, final):
    """What eval.json holds, from measure() of the start network and of the trained one."""
    return {"base": base["table"], "final": final["table"],
            "people": {k: {**final["people"][k], "base": base["people"][k]} for k in final["people"]},
            "counts": {"base": base["counts"], "final": final["counts"]}}


# ---------------------------------------------------------------------------------------------------------------------
# The table


def percent(share, sign=""):
    """Without a minus before zero."""
    return "-" if share is None else f"{100 * share:{sign}.1f}".replace("-0.0", sign + "0.0")


def brackets(ci, sign=""):
    return f" [{percent(ci[0], sign)}, {percent(ci[1], sign)}]" if ci else ""


def table_lines(result):
    """An eval.json's before/after table, lines of at most 80 characters, in percent. What is missing shows as '-'."""
    base, final, people = map(result.get, ("base", "final", "people"))

    def row(label, before, after, *cells):
        text = f"{label:16}"
        for m in METRICS:
            old, new = mean_at(before, m, *cells), mean_at(after, m, *cells)
            text += f"{'' if old is None else percent(old) + ' ->':>14}{percent(new):>6}"
        return text
    lines = [f"{'percent right':16}" + "".join(f"{m:>20}" for m in METRICS)]
    for k in KINDS:
        lines += [row(f"{k:10} {d}", base, final, (k, str(d))) for d in range(1, MAX_DEPTH + 1)]
        lines.append(row(f"{k:10} 1-5", base, final, *MEAN_CELLS[k]))
    lines.append(row("all        1-5", base, final, *MEAN_CELLS["all"]))
    if people:
        lines.append("functions as people write them")
        before = {k: row.get("base") for k, row in people.items()}
        lines += [row(k, before, people, (k,)) for k in KINDS]
    if base:
        lines += ["", "gain in points over depths 1-5, with its paired 95 % interval over tasks"]
        for label in (*KINDS, "all"):
            gains = [gain(result, m, label) for m in METRICS]
            lines.append(f"{label:16}" + "".join(f"{percent(rise, '+') + brackets(ci).replace(', ', ','):>20}"
                                                 for rise, ci in gains))
    return lines


def say_too_long(model, max_new, cells, whose):
    """Nothing is dropped in silence."""
    missed = sum(c["too_long"] for c in cells)
    if missed:
        print(f"{missed} of {whose} {sum(c['n'] for c in cells)} prompts leave no room for {max_new} tokens within "
              f"block_size {model.config.block_size}: counted as wrong")


def print_result(result, model, max_new):
    """The table of an eval.json, and what was asked without room for an answer."""
    print("\n".join(table_lines(result)), flush=True)
    say_too_long(model, max_new, [c for t in result["final"].values() for c in t.values()], "the suite's")
    say_too_long(model, max_new, result["people"].values(), "people's")


# ---------------------------------------------------------------------------------------------------------------------
# Functions as people write them: names with a meaning, loops, early returns, dicts, several arguments. The first 10 are
# easy and half of these near the generator's own style, for a small model finds nothing to hold on to in the others.
# Behind each `def` stand its 6 inputs; deduction and abduction use the first, induction n_inputs, all if more.

PEOPLE = r"""
def f(x):  # 4 | 9 | 2 | 7 | 11 | 6
    x = x + 1
    x = x * 2
    return x
def f(x):  # [3, 1, 2] | [5] | [9, 4] | [0, 7, 7] | [8, 2, 6] | [4, 1]
    x = sorted(x)
    return x
def f(x):  # 'abc' | 'go' | 'tree' | 'cab' | 'x' | 'play'
    x = x[1:]
    x = x + 'ay'
    return x
def f(x):  # [1, 2, 3] | [4] | [0, 5] | [2, 2] | [6, 1] | [3, 0, 1]
    x = [v * v for v in x]
    return sum(x)
def f(x):  # 7 | 12 | 10 | 30 | 0 | 15
    if x > 10:
        x = x - 10
    return x
def f(nums):  # [3, 1, 2] | [5] | [9, 4] | [0, 7, 7] | [8, 2, 6] | [1, 4]
    return sorted(nums)[-1]
def f(text):  # 'abc' | 'no' | 'pen' | 'xy' | 'code' | 'tree'
    return text[::-1].upper()
def f(items):  # [5, 6, 7] | [1, 2] | [9, 8, 7, 6] | [3] | [4, 0, 2] | [2, 1]
    return items[1:] + items[:1]
def f(nums):  # [1, 2, 3] | [4, 4] | [9] | [5, 0, 1] | [2, 7] | [3, 3, 3]
    total = 0
    for n in nums:
        total += n
    return total
def f(a, b):  # 3, 4 | 10, 2 | 7, 7 | 0, 5 | 6, 3 | 9, 8
    return a * b + 1
def f(text):  # 'hello world' | 'sky' | 'banana' | 'queue' | 'ai' | 'Try it'
    count = 0
    for ch in text:
        if ch in 'aeiou':
            count += 1
    return count
def f(nums):  # [3, 1, 4] | [1, 2, 3, 4] | [5] | [10, -10, 2] | [0, 0, 7] | [2, 2]
    total, out = 0, []
    for n in nums:
        total += n
        out.append(total)
    return out
def f(words):  # ['cat', 'horse'] | ['a', 'bb'] | ['plum'] | ['red', 'blue'] | ['x', 'yz'] | ['on', 'off']
    return max(words, key=len)
def f(a, b):  # 12, 18 | 7, 3 | 100, 75 | 9, 6 | 8, 32 | 17, 51
    while b:
        a, b = b, a % b
    return a
def f(text):  # 'a b a' | 'one two' | 'x x x' | 'to be or not to be' | 'hi' | 'b a b'
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts
def f(n):  # 1234 | 9 | 505 | 77 | 1000 | 86
    total = 0
    while n > 0:
        total += n % 10
        n //= 10
    return total
def f(items):  # [1, 2, 1, 3] | [4, 4, 4] | ['a', 'b', 'a'] | [5, 6] | [0, 1, 0, 1] | [9]
    seen = []
    for item in items:
        if item not in seen:
            seen.append(item)
    return seen
def f(s):  # 'level' | 'abc' | 'noon' | 'robot' | 'x' | 'stats!'
    s = s.lower()
    return s == s[::-1]
def f(s, k):  # 'abcdef', 2 | 'hello', 1 | 'xyz', 0 | 'rotate', 4 | 'ab', 1 | 'clock', 3
    return s[k:] + s[:k]
def f(prices, limit):  # [5, 12, 8], 10 | [1, 2], 1 | [30, 20, 10], 25 | [7], 3 | [4, 4, 9], 4 | [100, 50], 60
    cheap = [p for p in prices if p <= limit]
    return sorted(cheap)
def f(n):  # 5 | 0 | 3 | 6 | 1 | 4
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result
def f(n):  # 6 | 1 | 3 | 8 | 2 | 5
    fib = [0, 1]
    while len(fib) < n:
        fib.append(fib[-1] + fib[-2])
    return fib[:n]
def f(a, b):  # [1, 2], [3, 4] | 'ab', 'cd' | [7], [8] | 'xy', [1, 2] | [0, 0], [1, 1] | 'q', 'r'
    merged = []
    for x, y in zip(a, b):
        merged += [x, y]
    return merged
def f(d):  # {'a': 1, 'b': 2} | {'x': 'y'} | {1: 2, 3: 4} | {'k': 0} | {5: 'five'} | {'m': 3, 'n': 4}
    return {v: k for k, v in d.items()}
def f(text):  # 'aabcb' | 'swiss' | 'zz' | 'total' | 'noon' | 'level'
    for ch in text:
        if text.count(ch) == 1:
            return ch
    return None
def f(n):  # 10 | 1 | 7 | 16 | 5 | 12
    bits = ''
    while n:
        bits = str(n % 2) + bits
        n = n // 2
    return bits
def f(matrix):  # [[1, 2], [3, 4]] | [[5, 6]] | [[1], [2]] | [['a', 'b'], ['c', 'd']] | [[7]] | [[0, 1], [1, 0]]
    return [[row[i] for row in matrix] for i in range(len(matrix[0]))]
def f(nums):  # [1, 4, 9] | [5, 5] | [10, 7, 3] | [2, 8] | [0, 1, 3, 6] | [6, 2]
    return [b - a for a, b in zip(nums, nums[1:])]
def f(n):  # 6 | 1 | 3 | 8 | 5 | 12
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps
def f(items, size):  # [1, 2, 3, 4, 5], 2 | [1, 2, 3], 3 | 'abcd', 2 | [9, 8], 1 | 'hello', 4 | [0], 5
    return [items[i:i + size] for i in range(0, len(items), size)]
def f(name):  # 'Ada Lovelace' | 'Grace Hopper' | 'alan turing' | 'Linus' | 'john von neumann' | 'Tim B Lee'
    return '.'.join(part[0].upper() for part in name.split()) + '.'
def f(n):  # 15 | 7 | 9 | 10 | 30 | 4
    if n % 15 == 0:
        return 'FizzBuzz'
    if n % 3 == 0:
        return 'Fizz'
    return 'Buzz' if n % 5 == 0 else str(n)
def f(a, b):  # [1, 2, 3], [2, 3, 4] | [5], [6] | [1, 1], [1] | 'cab', 'abd' | [9, 7], [7, 9] | [0, 2], [2]
    common = set(a) & set(b)
    return sorted(common)
def f(price, percent):  # 200, 10 | 99, 50 | 40, 25 | 80, 5 | 1000, 1 | 60, 0
    discount = price * percent // 100
    return price - discount
def f(code):  # '(())' | '(()' | ')(' | '' | '()()' | '((('
    depth = 0
    for ch in code:
        depth += 1 if ch == '(' else -1
        if depth < 0:
            return False
    return depth == 0
def f(nums):  # [1, 2, 3, 4] | [5] | [2, 4] | [7, 9, 11] | [0] | [6, 1, 8]
    even = sum(1 for n in nums if n % 2 == 0)
    return even, len(nums) - even
def f(n):  # 7 | 9 | 2 | 15 | 13 | 1
    if n < 2:
        return False
    return all(n % k for k in range(2, n))
def f(words):  # ['hi', 'cat', 'to'] | ['a'] | ['sun', 'sky'] | ['x', 'yy', 'z'] | ['go', 'stop'] | ['one', 'six']
    groups = {}
    for w in words:
        groups.setdefault(len(w), []).append(w)
    return groups
def f(nums, target):  # [2, 7, 11], 9 | [1, 2], 5 | [3, 3], 6 | [4, 5, 6], 11 | [0, 8], 8 | [1, 4, 5], 5
    for i, a in enumerate(nums):
        for j in range(i + 1, len(nums)):
            if a + nums[j] == target:
                return [i, j]
    return []
def f(sentence):  # 'the cat sat' | 'one' | 'go on' | 'a b c d' | 'is it so' | 'hello there'
    words = sentence.split(' ')
    words.reverse()
    return ' '.join(words)
"""


def people_suite(ex, n_inputs):
    """Tasks of all three kinds from PEOPLE, gold outputs from the executor. An induction task has no message: nobody
    wrote one in our message channel's words."""
    wanted = []
    for head, inputs, body in re.findall(r"(def f.*)  # (.*)((?:\n .*)+)", PEOPLE):
        inputs, program = inputs.split(" | "), head + body
        wanted += [("deduction", program, inputs[:1]), ("abduction", program, inputs[:1]),
                   ("induction", program, inputs[:n_inputs])]
    results = iter(ex.run([(program, i) for _, program, inputs in wanted for i in inputs]))
    tasks = []
    for kind, program, inputs in wanted:
        rs = [next(results) for _ in inputs]
        assert all(r.ok for r in rs), f"one of PEOPLE fails: {[r.error for r in rs]}: {program!r}"
        tasks.append(Task(kind, program, inputs, [r.value for r in rs], [r.key for r in rs]))
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Files: a run's folder, and a stranger's

VERSION = 5  # of checkpoints. 1 paired other channels in rotary positions, 3 had no value embeddings, 4 had `smear`
NEEDED = {"seed": (int, 0, 2**63), "n_inputs": (int, 3, 10), "large": (bool, 0, 1), "max_new": (int, 1, 65536),
          "suite_n": (int, 1, 10_000), "samples": (int, 1, 64), "block_size": (int, 8, 65536),
          "steps": (int, 1, 2**63)}  # type, least, most


def save(path, payload):
    """Write text or a checkpoint beside, sync, rename: at every moment `path` is the old file or the new one, whole."""
    tmp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(tmp, "wb") as f:
            if isinstance(payload, str):
                f.write(payload.encode("utf-8", "replace"))  # model text may hold lone surrogates
            else:
                whole = io.BytesIO()      # a full disk is then an OSError of write(), and no error of torch's own
                torch.save(payload, whole)
                f.write(whole.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)  # a full disk needs the room


def write_text(path, text):
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save(path, text)
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror}); free some space or choose another folder")


def read_json(path):
    """A JSON object, or None: missing, torn and foreign files look alike here."""
    with suppress(OSError, ValueError, RecursionError), open(path, "rb") as f:
        data = json.loads(f.read())
        return data if isinstance(data, dict) else None


def read_metrics(folder):
    """The objects of metrics.jsonl; lines that are none (the last may be torn) are left out."""
    records = []
    with suppress(OSError), open(os.path.join(folder, "metrics.jsonl"), "rb") as f:
        for line in f:
            with suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict)]


def load(path, wanted):
    """A checkpoint, read without executing anything in it (weights_only) and checked for its keys and version."""
    try:
        with zipfile.ZipFile(path) as archive:     # torch does not look at the checksums: a flipped bit would pass
            if any(i.compress_type for i in archive.infolist()) or archive.testzip():   # torch compresses nothing
                raise ValueError("a checksum does not match, or it is compressed")
        data = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path} does not exist: wait for the first checkpoint, or give another folder")
    except Exception as error:  # torch raises many kinds for a damaged or foreign file; all mean the same to the user
        fail(f"{path} is no readable checkpoint ({type(error).__name__}): give a run's folder, or delete the file")
    if not isinstance(data, dict) or not set(wanted) <= set(data) or repr(data.get("version")) != repr(VERSION):
        fail(f"{path} is not a nanoAZR checkpoint of version {VERSION}: give a run's folder, or delete the file")
    return data


def load_gpt(path, config, state):
    """A GPT with these weights; fails unless types, names and shapes are exactly those of the config and all is finite.
    It is tried without memory first, so a stranger's huge sizes are refused before they cost anything."""
    try:
        c = GPTConfig(**config)
        for f in fields(GPTConfig):     # raised, not asserted: python -O must not let a stranger's file pass
            v, most = getattr(c, f.name), 65536 if f.type is int else 1e9
            if type(v) is not f.type or not 0 <= v <= most:
                raise ValueError(f"gpt.{f.name} is out of range")
        if c.vocab_size != VOCAB_SIZE or c.n_layer > 512 or c.block_size * c.head_dim > 1 << 24:
            raise ValueError("another vocabulary or network")  # the table of rotary angles is in no checkpoint
        with torch.device("meta"):
            GPT(c).load_state_dict(state, assign=True)
        for t in state.values():        # contiguous: a few bytes expanded to a huge shape are not
            if t.layout != torch.strided or not t.is_contiguous() or t.dtype != torch.float32 or not t.isfinite().all():
                raise ValueError("a weight is strange or not finite")
        if len({t.untyped_storage().data_ptr() for t in state.values()}) < len(state):
            raise ValueError("weights share memory")
        model = GPT(c)
        model.load_state_dict(state)
        return model.eval()
    except Exception as error:  # whatever a foreign file may hold
        fail(f"{path} is no nanoAZR checkpoint of this version ({type(error).__name__}: {str(error)[:100]}); give a "
             "folder written by train.py")


def load_run(path, device="cpu"):
    """(config, model, base model) of a run's folder; anything torn, flipped or foreign ends in fail(). The config
    gets a "step": how far of its `steps` the run is."""
    config = read_json(os.path.join(path, "config.json"))
    if config is None:
        fail(f"{path} has no readable config.json; give the folder of a run (train.py prints it)")
    for name, (kind, low, high) in NEEDED.items():
        if type(config.get(name)) is not kind or not low <= config[name] <= high:
            fail(f"{path}/config.json: {name} is missing or not a {kind.__name__} from {low} to {high}; "
                 "give the folder of a run of this version")
    file = os.path.join(path, "ckpt.pt")
    data = load(file, ("gpt", "model", "base", "step"))
    config["step"] = data["step"] if type(data["step"]) is int else 0
    return config, *(load_gpt(file, data["gpt"], data[k]).to(device) for k in ("model", "base"))


def read_tasks(ex, path):
    """[Task] of a file in CRUXEval's format, two a good line (deduction, abduction), and the number of bad lines. Good
    is a JSON object with the strings code (defines f), input (what stands between the brackets of the call) and output
    (a literal); `id` is not used. A line that is none, or whose program does not give that output, is named on stderr
    by its number and left out."""
    rows, wrong, tasks = [], {}, []  # rows: (number of the line, its object); wrong: {number: what is wrong with it}
    try:
        with open(path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                    if type(row) is not dict or any(type(row.get(k)) is not str for k in ("code", "input", "output")):
                        raise ValueError("not an object with the texts code, input and output")
                    rows.append((n, row))
                except (ValueError, RecursionError) as e:
                    wrong[n] = f"no task ({e})"
    except OSError as e:
        fail(f"cannot read {path} ({e.strerror}); give a file with one JSON object a line")
    results = ex.run([(row["code"], row["input"]) for _, row in rows])
    wants = ex.literals([row["output"] for _, row in rows])
    same = ex.equal([(r.value, want.value) for r, want in zip(results, wants)])     # ==: so the file's author compared
    for (n, row), r, equal in zip(rows, results, same):
        if not r.ok:
            wrong[n] = f"the program gives no output ({r.error})"
        elif not equal:
            wrong[n] = f"the program gives {r.value[:60]}, the file says {row['output'][:60]}"
        else:
            tasks += [Task(k, row["code"], [row["input"]], [r.value], [r.key]) for k in ("deduction", "abduction")]
    for n, why in sorted(wrong.items()):
        print(f"{os.path.basename(path)} line {n}: {' '.join(why.split())[:160]}; skipped", file=sys.stderr)
    return tasks, len(wrong)


def run_tasks(model, ex, path, max_new, samples, dtype):
    """--tasks: print greedy and pass@k on a task file. Good lines run whatever stands on the others."""
    tasks, bad = read_tasks(ex, path)
    if not tasks:
        fail(f"{path} holds no task that runs; each line needs the strings code, input and output")
    cells = {(k, "file"): [t for t in tasks if t.kind == k] for k in ("deduction", "abduction")}
    table = {k: row["file"] for k, row in evaluate(model, ex, cells, max_new, samples, dtype)[0].items()}
    print(f"{os.path.basename(path)}: {len(tasks) // 2} tasks, {bad} lines skipped; percent right (types count: 1 is "
          "not True), 95 % intervals")
    for k, cell in table.items():
        print(f"{k:10}" + "".join(f"  {m} {percent(cell[m])}{brackets(cell.get(m + '_ci'))}"
                                  for m in ("greedy", "pass@1", "pass@4", "pass@16") if m in cell))
    say_too_long(model, max_new, table.values(), "the file's")


# ---------------------------------------------------------------------------------------------------------------------
# --compare: one row a setting, whatever the seed; one table a setting of the warm-up: gains over others say little

OWN = set("seed command name preset commit date machine note workers unsafe_executor eval_every save_every show_every "
          "thoughts length_gate".split())     # what is no setting of an experiment; the last two are of older records


def read_record(path):
    """What a run comes to, small enough to keep in a repository; from its folder, or a file that --keep wrote."""
    if os.path.isfile(path):
        return read_json(path) or {}
    config, result = (read_json(os.path.join(path, f)) or {} for f in ("config.json", "eval.json"))
    steps = [r for r in read_metrics(path) if r.get("phase") != "warmup"]
    return {"config": config, **{k: number(steps[-1] if steps else {}, k) for k in ("rollouts", "minutes")},
            "gain": {m: {k: gain(result, m, k) for k in MEAN_CELLS} for m in METRICS},
            "curve": {m: {k: held_out(steps, result, m, k) for k in KINDS} for m in METRICS[:2]},
            **{k: result.get(k) for k in ("base", "final", "people")}}


def read_runs(paths):
    """A dict for each finished run (its figures, its setting, its record); other paths are named on stderr."""
    runs = []
    for path in paths:
        with readable(path):
            record, folder = read_record(path), os.path.basename(os.path.abspath(path))
            config, gains = record.get("config", {}), record.get("gain")
            if not gains or None in (gains["greedy"]["all"][0], gains["pass@1"]["all"][0], gains["pass@1"]["deep"][0]):
                print(f"{path}: no finished run (eval.json with base and final); skipped", file=sys.stderr)
                continue
            run = {"name": str(config.get("name") or folder), "record": record, "file": folder,
                   "setting": {k: v for k, v in config.items() if k not in OWN and v},     # off: an old run lacks it
                   "seed": str(config.get("seed", path)),
                   "command": re.sub(r" --out[ =]('[^']*'|\S+)", "", str(config.get("command") or "")),
                   "rollouts": number(record, "rollouts"), "minutes": number(record, "minutes"),
                   "start": mean_at(record.get("base"), "pass@1", *MEAN_CELLS["all"])}  # tells start networks apart
            for m in METRICS:
                run[m] = mean_at(record.get("final"), m, *MEAN_CELLS["all"])
                for k, label in ("all", m), ("deep", m + " deep"):
                    run["gain " + label], run["ci " + label] = gains[m][k]
        if any(all(run[k] == r[k] for k in ("name", "setting", "seed")) for r in runs):
            print(f"{path}: setting and seed of a run before it; skipped. If code or machine differ, compare it apart, "
                  "or train it with a --name of its own", file=sys.stderr)
        else:
            runs.append(run)
    return runs


def spread(values):
    """(mean, standard deviation over seeds, half width of Student's 95 % interval of the mean); one seed has none."""
    n = len(values)
    if n < 2 or None in values:
        return mean(values), None, None
    std = float(np.std(values, ddof=1))
    few = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26
    t = few[n - 2] if n < 11 else 1.96 + 2.37 / (n - 1) + 2.8 / (n - 1) ** 2
    return mean(values), std, t * std / math.sqrt(n)


def group_runs(runs):
    """[[row]]: a list for each setting of the warm-up, a row for each setting. The interval of a gain (a seed's is over
    its own base) is over seeds; of a lone seed it is the bootstrap over tasks, which says nothing of other seeds. Rows
    that share a name say how they differ. The first row of a list is what the others are compared with: `full`, else a
    row of the most seeds, and among these one whose proposer learns; the one that was given first, never the best."""
    groups, starts = {}, {}
    for run in runs:
        groups.setdefault((run["name"], json.dumps(run["setting"], sort_keys=True)), []).append(run)
    for mine in groups.values():
        setting, name = mine[0]["setting"], mine[0]["name"]
        twins = [g[0]["setting"] for g in groups.values() if g[0]["name"] == name]
        apart = sorted(k for k in set().union(*twins) if any(t.get(k) != setting.get(k) for t in twins))
        row = {"name": name + (" (" + ", ".join(f"{k}={setting.get(k, 'off')}" for k in apart) + ")" if apart else ""),
               "seeds": len(mine), "command": mine[0]["command"], "runs": mine}
        row["pass@1"], row["pass@1 std"], _ = spread([r["pass@1"] for r in mine])
        for m in COMPARED:
            row["gain " + m], _, half = spread([r["gain " + m] for r in mine])
            row["ci " + m] = mine[0]["ci " + m] if half is None else (row["gain " + m] - half, row["gain " + m] + half)
        for k in ("rollouts", "minutes"):
            row[k] = mean([r[k] for r in mine])
        # (a setting holds no seed, so a row's seeds share a list)
        starts.setdefault(json.dumps([setting.get(k, False) for k in BASE_FIELDS]), []).append(row)
    for rows in starts.values():
        lead = min(rows, key=lambda r: (r["runs"][0]["name"] != "full", -r["seeds"],
                                        r["runs"][0]["setting"].get("proposer") != "train"))
        rows.sort(key=lambda r: (r is not lead, -r["gain pass@1"]))
        other = {(r["seed"], r["start"]): r for r in lead["runs"]}
        for row in rows:
            pairs = [(r, other[at]) for r in row["runs"] if (at := (r["seed"], r["start"])) in other]
            for m in COMPARED:               # pass@16 is None where --samples is below 16
                over = [(r["gain " + m], first["gain " + m]) for r, first in pairs]
                row["over " + m], _, row[f"over {m} half"] = spread([a - b for a, b in over if None not in (a, b)])
    return sorted(starts.values(), key=lambda rows: (rows[0]["runs"][0]["name"] != "full", -len(rows)))


def compare_table(tables):
    """The markdown that --compare prints."""
    def cell(text):  # a name or a command may hold anything, and | and line ends are markdown's
        return " ".join(str(text).split()).replace("|", "\\|")

    def give(share, half, sign=""):
        return percent(share, sign) + (f" \u00b1 {percent(half)}" if half is not None else "")
    lines = []
    for rows in tables:
        minus = f"minus {cell(rows[0]['name'])}'s"
        head = ["run", "seeds", "pass@1 after", "gain", minus, "greedy, gain", "depths 4-6, gain", minus,
                "pass@16, gain", "rollouts", "minutes", "command"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for r in rows:
            rise = {m: percent(r["gain " + m], "+") + brackets(r["ci " + m], "+") for m in COMPARED}
            over = {m: "" if r is rows[0] else give(r["over " + m], r[f"over {m} half"], "+") for m in COMPARED}
            cells = [cell(r["name"]), str(r["seeds"]), give(r["pass@1"], r["pass@1 std"]), rise["pass@1"],
                     over["pass@1"], rise["greedy"], rise["pass@1 deep"], over["pass@1 deep"],
                     rise["pass@16"], "-" if r["rollouts"] is None else f"{r['rollouts']:,.0f}",
                     "-" if r["minutes"] is None else f"{r['minutes']:.1f}", r["command"] and f"`{cell(r['command'])}`"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines + [
        "Percent right on the held-out suite, mean over kinds and depths 1-5, \u00b1 standard deviation over seeds.",
        "Gain: points over each run's own start network, with its 95 % interval over seeds (over tasks if one seed);",
        "depths 4-6: of pass@1. Minus: the difference to the table's first row on the same seeds, so from the same",
        "start networks, with its interval over seeds.", ""])


@readable("a record among these")
def compare(paths, out, keep=None):
    """--compare: print the tables; write them to compare.md and .csv in `out`, the first row's curves to curves.svg."""
    runs = read_runs(paths)
    if not runs:
        fail("no finished run among these; give folders that hold config.json and eval.json, or records of --keep")
    kept = {os.path.join(keep, run["file"].removesuffix(".json") + ".json"): json.dumps(run["record"])
            for run in runs} if keep else {}
    if keep and len(kept) < len(runs):
        fail("--keep names a record after its folder, and two of these have one name: rename one")
    for path, text in kept.items():
        if os.path.exists(path) and read_json(path) != json.loads(text):
            fail(f"{path} is another run's record: give another --keep, or delete it")
    for path, text in kept.items():
        write_text(path, text)
    tables, text = group_runs(runs), io.StringIO()
    rows, table = sum(tables, []), compare_table(tables)
    columns = [k for k in rows[0] if k != "runs"]
    csv.writer(text, lineterminator="\n").writerows([columns, *(
        [" ".join(f"{x:.6g}" for x in v) if isinstance(v, (list, tuple)) else f"{v:.6g}" if isinstance(v, float) else v
         for v in map(r.get, columns)] for r in rows)])
    files = {"compare.md": table, "compare.csv": text.getvalue()}
    if curves := curves_svg([r["record"] for r in rows[0]["runs"]]):
        files["curves.svg"] = curves
    for name, content in files.items():
        write_text(os.path.join(out, name), content)
    print(table + "\n".join(f"wrote {os.path.join(out, name)}" for name in files))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing: SVG by hand. c0-c3 follow Okabe and Ito's palette, which the colour-blind can tell apart, darker or lighter
# for contrast with the page; each goes with a dash pattern d0-d3 of its own, so that a grey print can be read too.

STYLE = """
:root, svg { --ink: #1b1f24; --soft: #57606a; --rule: #d5dae0; --paper: #ffffff; --card: #f5f7f9;
  --c0: #0072b2; --c1: #c04f00; --c2: #007a59; --c3: #a3487e; }
@media (prefers-color-scheme: dark) { :root, svg { --ink: #e6e9ed; --soft: #9aa4b0; --rule: #39424d; --paper: #14181d;
  --card: #1d232a; --c0: #56b4e9; --c1: #f0a33a; --c2: #2fc79b; --c3: #e39cc6; } }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); stroke: none; }
.axis { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.c0 { stroke: var(--c0); fill: var(--c0); } .c1 { stroke: var(--c1); fill: var(--c1); }
.c2 { stroke: var(--c2); fill: var(--c2); } .c3 { stroke: var(--c3); fill: var(--c3); }
.d1 { stroke-dasharray: 7 3; } .d2 { stroke-dasharray: 2 3; } .d3 { stroke-dasharray: 9 3 2 3; }
.line.c0, .line.c1, .line.c2, .line.c3 { fill: none; } .hollow { fill: var(--paper); stroke-width: 1.5; }
"""
WIDE, LEFT, TOP, LOW = 420, 52, 28, 204  # a chart's width, and where its axes stand


def visible(text):
    """Any text with its control characters spelt out: they could hide or reorder it, or command a terminal."""
    hidden = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufffe\uffff]"
    return re.sub(hidden, lambda m: f"\\u{ord(m[0]):04x}", str(text))


def esc(text):
    return html.escape(visible(text))


def ticks(low, high, n=5):
    """Round numbers within [low, high], about n of them."""
    size = 10.0 ** math.floor(math.log10(max(high - low, 1e-300) / n))
    step = next(s * size for s in (1, 2, 5, 10) if s * size * 1.0001 >= (high - low) / n)
    return [k * step for k in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def short(v):
    return f"{v / 1e6:.4g}M" if abs(v) >= 1e6 else f"{v / 1e3:.4g}k" if abs(v) >= 1e4 else f"{v:.4g}"


def chart(title, unit, lines, *how, **more):
    """A chart as plot draws it, with its title, for a page."""
    drawn, high = plot(unit, lines, *how, **more)
    svg = f'<svg viewBox="0 0 {WIDE} {high}" role="img" aria-label="{esc(title)}">{drawn}</svg>'
    return (f'<figure><figcaption>{esc(title)}</figcaption>'
            f'{svg if drawn else "<p class=soft>not recorded in this run</p>"}</figure>')


def plot(unit, lines, x_unit="step", span=None, mark="line", looks=("c0 d0", "c1 d1", "c2 d2", "c3 d3")):
    """(SVG elements, height) of a chart WIDE units wide; ("", 0) where there is nothing to draw. lines: {label: [(x, y)
    or (x, y, low, high)]}, low and high become a whisker; mark: line, both (line and dots) or bars."""
    series = [(label, look, points) for look, (label, given) in zip(looks, lines.items())
              if (points := [p[:2] if None in p else p for p in given if None not in p[:2]])]
    if not series:
        return "", 0
    bars, xs = mark == "bars", sorted({p[0] for s in series for p in s[2]})
    wide = 0.5 if bars else 0.2 if any(len(p) > 2 for s in series for p in s[2]) else 0  # room beside the outer points
    margin = wide * (xs[-1] - xs[0]) / (len(xs) - 1) if len(xs) > 1 else 1
    x0, x1 = xs[0] - margin, xs[-1] + margin
    values = [0, *(v for s in series for p in s[2] for v in p[1:])]
    y0, y1 = span or (min(values), max(values))
    y1 = y1 if y1 - y0 > 1e-9 * max(1, abs(y0), abs(y1)) else y0 + 1     # all one value: something to stand on

    def px(x):
        return LEFT + (WIDE - LEFT - 12) * (x - x0) / (x1 - x0)

    def py(y):
        return LOW - (LOW - TOP) * (min(max(y, y0), y1) - y0) / (y1 - y0)
    out = [f'<text x="4" y="12">{esc(unit)}</text>',
           f'<text x="{WIDE - 12}" y="{LOW + 31}" text-anchor="end">{esc(x_unit)}</text>']
    for v in ticks(y0, y1):
        out.append(f'<path class="axis" d="M{LEFT} {py(v):.1f}H{WIDE - 12}"/>'
                   f'<text x="{LEFT - 6}" y="{py(v) + 4:.1f}" text-anchor="end">{short(v)}</text>')
    for v in ticks(xs[0], xs[-1]) if len(xs) > 3 else xs:
        out.append(f'<text x="{px(v):.1f}" y="{LOW + 16}" text-anchor="middle">{short(v)}</text>')
    row = (3, 122) if len(series) % 2 else (2, 170)  # of the legend: entries, and the width of one
    for i, (label, look, points) in enumerate(series):
        # whiskers and bars of different series stand side by side
        width = 0.8 * (px(x1) - px(x0)) / len(xs) / len(series) if bars else 4 if any(len(p) > 2 for p in points) else 0
        shift = (i - (len(series) - 1) / 2) * width
        spots = [(px(p[0]) + shift, *(py(v) for v in p[1:])) for p in points]
        x, y = LEFT + row[1] * (i % row[0]), LOW + 50 + 17 * (i // row[0])  # of the legend
        if bars:
            out += [f'<rect class="{look}" x="{s[0] - width / 2:.1f}" y="{s[1]:.1f}" width="{width - 1:.1f}" '
                    f'height="{LOW - s[1]:.1f}"/>' for s in spots]
            out.append(f'<rect class="{look}" x="{x}" y="{y - 9}" width="22" height="10"/>')
        else:
            out.append(f'<path class="line {look}" d="M' + "L".join(f"{s[0]:.1f} {s[1]:.1f}" for s in spots) + '"/>')
            out += [f'<circle class="{look[:2]}" cx="{s[0]:.1f}" cy="{s[1]:.1f}" r="3"/>' for s in spots
                    if mark == "both" or len(spots) == 1]
            out += [f'<path class="{look[:2]}" d="M{s[0]:.1f} {s[2]:.1f}V{s[3]:.1f}"/>' for s in spots if len(s) > 2]
            out.append(f'<path class="line {look}" d="M{x} {y - 4}h22"/>')
        out.append(f'<text x="{x + 27}" y="{y}">{esc(label)}</text>')
    return "".join(out), y + 8


def curves_svg(records):
    """Held-out accuracy along self-play, mean over seeds, whiskers from lowest to highest; "" without a curve."""
    out, high = [], 0
    for i, m in enumerate(METRICS[:2]):
        lines = {}
        for k in KINDS:
            curves = [dict(r["curve"][m].get(k, []) if "curve" in r else []) for r in records]
            over = {x: [c[x] for c in curves] for x in sorted(set.intersection(*map(set, curves)))}
            lines[k] = [(x, mean(ys), min(ys), max(ys)) for x, ys in over.items()]
        drawn, size = plot(f"{m}, share right at depths 1-5", lines, "step of self-play", (0, 1))
        out.append(f'<g transform="translate({i * (WIDE + 10)})">{drawn}</g>')
        high = max(high, size)
    wide = 2 * WIDE + 10
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}">'
            f'<style>{STYLE}</style><rect width="{wide}" height="{high}" fill="var(--paper)"/>{"".join(out)}</svg>\n'
            if high else "")


# ---------------------------------------------------------------------------------------------------------------------
# --report: one page that opens from the file system, without a network and without scripts

PAGE = """
* { box-sizing: border-box; } html { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6em; margin: .2em 0; } h2 { margin: 1.6em 0 .4em; font-size: 1.2em; } p { max-width: 75ch; }
p, figcaption, summary, dd, .try { overflow-wrap: anywhere; } .soft, dt { color: var(--soft); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
figure, .card { margin: 0; padding: 10px 12px; min-width: 0; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
.big, .right, .wrong { font-weight: 650; } .big { font-size: 1.5em; white-space: nowrap; }
pre { margin: .3em 0; padding: 8px; overflow-x: auto; background: var(--paper); border: 1px solid var(--rule);
  border-radius: 6px; font: 13px/1.45 ui-monospace, monospace; }
.try { white-space: pre-wrap; } .right { color: var(--c2); } .wrong { color: var(--c1); }
.grid + details { margin-top: 10px; } article { align-self: start; }
dd { margin: 0; font-family: ui-monospace, monospace; min-width: 0; }
dl { margin: .3em 0; display: grid; font-size: 13px; grid-template-columns: max-content 1fr; gap: 2px 10px; }
"""


def by_kind(key, last="{}"):
    """A line for each kind, whose name stands for the {}."""
    return {k: (key, last.format(k)) for k in KINDS}


CHARTS = [  # (section, how to read it, [(title, unit of y, range of y, {label of a line: its path in metrics.jsonl})])
    ("Rewards of the six cells", "The solver earns 1, -0.5 or -1. The proposer earns 1 - solve rate where that is "
     "neither 0 nor 1, else 0, and -1 for what is not valid (by default). A constant cell learns nothing.",
     [("proposer", "mean reward", None, by_kind("reward", "propose/{}")),
      ("solver", "mean reward", None, by_kind("reward", "solve/{}"))]),
    ("What it proposes", "Novel: the program was not known yet (induction's is given: always 1). Learnable: solved by "
     "some tries but not by all.",
     [("valid proposals", "share", (0, 1), by_kind("valid")), ("novel proposals", "share", (0, 1), by_kind("novel")),
      ("learnable among the valid", "share", (0, 1), by_kind("learnable")),
      ("length of valid programs", "mean lines", None, by_kind("lines")),
      ("size of valid programs", "mean nodes of the syntax tree", None, by_kind("nodes")),
      ("cyclomatic complexity of valid programs", "1 + decisions", None, by_kind("cyclomatic")),
      ("distance to the references", "share of lines they lack", (0, 1), by_kind("distance")),
      ("different programs in a step", "share", (0, 1), {"distinct": ("diversity", "programs")}),
      ("variety of the outputs", "entropy, bits", None, {"outputs": ("diversity", "answers")})]),
    ("Length of the replies", "Thoughts grow where thinking pays. Length that runs away is a fault: see the tasks.",
     [("proposer", "mean tokens", None, by_kind("length", "propose/{}")),
      ("solver", "mean tokens", None, by_kind("length", "solve/{}")),
      ("wrong answers that the solver had marked right", "share", (0, 1), by_kind("overclaim"))]),
    ("The learner", "KL: how far an update, and rounding, move the policy. Rollouts with an advantage of 0 are wasted.",
     [("entropy of the policy", "nats a token", None, {"entropy": ("entropy",)}),
      ("KL", "nats a token", None, {"of the update": ("kl",), "sampler to trainer": ("mismatch",)}),
      ("gradient norm", "norm", None, {"before clipping": ("grad_norm",)}),
      ("rollouts with a gradient", "number a step", None, {"with gradient": ("with_gradient",)})]),
    ("Time and memory", "All that is not sampling or learning should be small.",
     [("where the seconds go", "seconds a step", None, {k: ("seconds", k) for k in ("sample", "execute", "learn")}),
      ("speed", "tokens a second", None, {"tokens/s": ("tokens_per_s",)}),
      ("memory", "MB", None, {"memory": ("memory_mb",)})])]


def curve(records, path):
    """[(step, value)], the means of thirty stretches of the run."""
    points = [(r["step"], y) for r in records if (y := number(r, *path)) is not None]
    return [tuple(np.mean(part, 0)) for part in np.array_split(points, min(30, len(points)))] if points else []


def held_out(records, result, metric, kind):
    """[(step, accuracy)] on the first SMALL held-out tasks a depth, depths 1-5: the small evaluations along the run,
    and at both ends the same tasks of the full suite."""
    def share(end):
        return float(mean(shares(result["counts"][end][k][d], metric)[:SMALL].mean() for k, d in MEAN_CELLS[kind]))
    points = [(r["step"] + 1, number(r, "eval", kind, metric)) for r in records]
    if "counts" in result:
        points = [(0, share("base")), *points, (points[-1][0] if points else 1, share("final"))]
    return [(x, round(y, 4)) for x, y in points if y is not None]


def rate_bars(records, kind):
    """Shares of valid tasks by solve rate, in the first and in the last third of the run."""
    rows = [row for r in records if (row := r.get("rates", {}).get(kind))]
    third, bars = -(-len(rows) // 3), {}
    for label, part in (("first third", rows[:third]), ("last third", rows[-third:])):
        sums = [sum(column) for column in zip(*part)]
        bars[label] = [(i / (len(sums) - 1), n / max(1, sum(sums))) for i, n in enumerate(sums)]
    return chart(kind, "share of tasks", bars, "solve rate of the task", mark="bars", looks=("c0 hollow", "c1"))


def before_after(result, kind):
    """By depth, with whiskers."""
    def points(end, m):
        return [(int(d), cell[m], *cell[m + "_ci"]) for d, cell in result.get(end, {}).get(kind, {}).items()]
    lines = {f"{m} {when}": points(end, m) for m in ("pass@1", "greedy") for end, when in ENDS}
    return chart(kind, "share right", lines, "depth of the task", (0, 1), "both", ("c0 d1", "c0 d0", "c1 d2", "c1 d3"))


def pass_curve(result, kind):
    """pass@1 to pass@16 before and after: skill lifts the whole curve, sharpening its left end alone."""
    lines = {when: [(k, mean_at(result.get(end), f"pass@{k}", *MEAN_CELLS[kind])) for k in (1, 4, 16)]
             for end, when in ENDS}
    return chart(kind, "share solved, depths 1-5", lines, "samples a task", (0, 1), "both", ("c0 d1", "c1 d0"))


def clip(text, limit=1500):
    """Any JSON as HTML text of a bearable length."""
    text = text if isinstance(text, str) else json.dumps(text)
    return esc(text if len(text) <= limit else text[:limit] + f" ... ({len(text) - limit:,} more characters)")


def task_card(step, task):
    """A proposed task as the model wrote it, and what its solvers made of it. Every text is a stranger's."""
    pairs, tries = list(zip(task["inputs"], task["outputs"])), ""
    if len(pairs) == 1:
        facts = [("input", clip(pairs[0][0], 300)), ("output", clip(pairs[0][1], 300))]
    else:
        facts = [("hidden pair" if i >= len(pairs) // 2 else "pair", f"{clip(a, 150)} -&gt; {clip(b, 150)}")
                 for i, (a, b) in enumerate(pairs)]
    facts += [("message", clip(task["message"], 300))] if task.get("message") else []
    facts = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts)
    for t in task["tries"]:
        tries += (f'<details><summary><span class="{"right" if t["verdict"] == "right" else "wrong"}">'
                  f'{clip(t["verdict"], 40)}</span> <code>{clip(t["answer"] or "", 80)}</code></summary>'
                  f'<pre class="try">{clip(t["reply"])}</pre></details>')
    return (f'<article class="card"><b>{clip(task["kind"], 20)}</b> <span class="soft">step {short(step)}, solve rate '
            f'{task["rate"]:.2f}</span><pre>{clip(task["program"])}</pre><dl>{facts}</dl>{tries}</article>')


def tiles(records, result):
    """The headline figures."""
    out = []
    for m in ("pass@1", "greedy"):
        before, after = (mean_at(result.get(end), m, *MEAN_CELLS["all"]) for end, _ in ENDS)
        rise, ci = gain(result, m)
        if rise is not None:
            out.append((f"{percent(before)} to {percent(after)} %", f"{m} on held-out tasks of depth 1-5: "
                        f"{percent(rise, '+')} points{brackets(ci, '+')}"))
    speeds = [v for r in records if (v := number(r, "tokens_per_s")) is not None]
    last = records[-1] if records else {}
    out += [(f"{v:{form}}", text) for v, form, text in (
        (len(records) or None, ",", "steps of self-play"), (number(last, "rollouts"), ",.0f", "rollouts"),
        (number(last, "minutes"), ".1f", "minutes of self-play"),
        (mean(speeds), ",.0f", "tokens sampled and learnt a second, mean of the steps")) if v is not None]
    return "".join(f'<div class="card"><div class="big">{esc(a)}</div>{esc(b)}</div>' for a, b in out)


@readable("the run")
def report(folder):
    """RUN/report.html from config.json, metrics.jsonl and eval.json, whatever of them there is. Returns its path."""
    everything = read_metrics(folder)
    config, result = (read_json(os.path.join(folder, f)) or {} for f in ("config.json", "eval.json"))
    if not config and not everything:
        fail(f"{folder} holds neither a config.json nor a metrics.jsonl; give the folder of a run")
    name = os.path.basename(os.path.abspath(folder))
    records = [r for r in everything if r.get("phase") != "warmup"]
    warm = [r for r in everything if r.get("phase") == "warmup"]
    body = [f"<h1>{esc(name)}: Absolute Zero self-play</h1><p>One small network sets itself tasks, solves them, and "
            "learns from what a code executor says. Deduction: find the output of a program; abduction: find an input "
            "that gives it; induction: find the program.</p>"
            f"<p><code>{clip(config.get('command') or '', 500)}</code></p>"
            f'<div class="grid">{tiles(records, result)}</div>']

    def section(title, text, figures):
        body.append(f'<h2>{esc(title)}</h2><p class="soft">{esc(text)}</p><div class="grid">{"".join(figures)}</div>')

    def lines(source, wanted):
        return {label: curve(source, path) for label, path in wanted.items()}
    section("Learning", "Its own tasks grow harder as it learns, so their solve rate may stand still while skill "
            "rises; the held-out tasks stay the same, here 20 a kind and depth at most.",
            [chart("tasks it set itself", "share right", lines(records, by_kind("solve")), span=(0, 1)),
             *(chart(f"held-out tasks, {m}", "share right, depths 1-5",
                     {k: held_out(records, result, m, k) for k in KINDS}, span=(0, 1), mark="both")
               for m in ("pass@1", "greedy"))])
    section("Before and after, by depth", "On the held-out suite. Whiskers: 95 % bootstrap intervals over tasks.",
            [before_after(result, k) for k in KINDS])
    if isinstance(result.get("final"), dict):
        text = esc("\n".join(table_lines(result)))
        body.append(f"<details><summary>the same as a table</summary><pre>{text}</pre></details>")
    section("Skill or sharpening", "Share of held-out tasks that at least one of 1, 4 or 16 samples solves.",
            [pass_curve(result, k) for k in KINDS])
    for title, text, charts in CHARTS:
        section(title, text, [chart(t, unit, lines(records, wanted), span=span) for t, unit, span, wanted in charts])
    section("How hard its tasks are", "Solve rates of valid tasks. Those at 0 and 1 earn nothing, and teach little.",
            [rate_bars(records, k) for k in KINDS])
    if shown := [r for r in records if r.get("tasks")]:      # of each kind one; a fixed set of tasks has none
        section("Tasks it proposed", "Picked evenly along the run. Open a try to read what the solver wrote.",
                [task_card(r["step"], task) for r in shown[::math.ceil(len(shown) / 4)] for task in r["tasks"]])
    if warm:
        section("Warm-up", "Before self-play: next-token learning on generated programs, the stand-in for pretraining.",
                [chart("loss", "nats a token", lines(warm, {"loss": ("loss",)}))])
    rows = "".join(f"<dt>{clip(k, 60)}</dt><dd>{clip(v, 200)}</dd>" for k, v in config.items())
    body.append(f'<h2>Settings</h2><dl>{rows}</dl><p class="soft">Made by <code>python eval.py --report '
                f"{esc(folder)}</code>. A curve's points are means over a thirtieth of the run, those of held-out "
                "tasks one evaluation each. Nothing here is loaded from elsewhere.</p>")
    path = os.path.join(folder, "report.html")
    write_text(path, '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
               'content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy" '
               f'content="default-src \'none\'; style-src \'unsafe-inline\'"><title>{esc(name)} - nanoAZR</title>'
               f"<style>{STYLE}{PAGE}</style></head><body>{''.join(body)}</body></html>\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Speeds

STEPS = 64  # tokens of a reply in the bench, where all are of one length


def plain_step(model, rows, optimizer):
    """One step as nanoGPT would write it: all rows padded to the longest, one float32 batch, logits everywhere."""
    idx = pad_rows(rows, 1)
    logits = model(idx[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), ignore_index=PAD)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def seconds(work, repeat=3, threads=1):
    """The best of some repeats, with torch on so many threads: noise on a shared machine only ever adds."""
    torch.set_num_threads(threads)
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    return min(timeit.repeat(lambda: (work(), wait()), number=1, repeat=repeat))


def weights_used(model):
    """How many weights every token meets: all but the embeddings, which are looked up."""
    return model.num_params() - sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))


def flops_per_token(model, context=80):
    """Forward FLOPs a token: 2 a weight, plus scores and values over `context`."""
    c = model.config
    return 2 * weights_used(model) + 4 * c.n_layer * c.n_head * c.head_dim * context


def made_up_rollouts(prompts, rng):
    """8 tries a prompt, of a length that self-play's have."""
    return [Rollout("solve", "deduction", p, [rng.randrange(32, 300) for _ in range(n)], [-5.0] * n)
            for p in prompts for n in rng.choices((4, 8, 20, 40, 60, 80), k=8)]


def learning_step(model, cfg, rollouts, dtype, shared=True):
    """(what computes the gradient of an update, the tokens it reads); shared: tries of a task share a row."""
    import train  # train imports this module; by now it is loaded
    batches = train.rollout_batches(rollouts, torch.ones(len(rollouts)), cfg, train.SHARED if shared else 0)
    return (lambda: train.accumulate(model, batches, lambda m, b: train.rollout_loss(m, b, cfg), dtype),
            sum(int(b[0].ne(PAD).sum()) for b in batches))


def bench_ladders(model, cfg, prompts):
    """(sampling, learning): [(rung, tokens/s)], each rung the one before and one idea; and the share of tokens that
    sharing prompts saves. Learning counts a try's tokens with its prompt, whether it shares that or not."""
    threads, cores, mixed = network.THREADS, executor.cores(), "+ products in " + cfg.dtype
    many, apart = GPT(replace(model.config, n_kv_head=cfg.n_head)), [p for p in prompts for _ in range(8)]
    naive = seconds(lambda: generate_naive(model, prompts[:4], STEPS, stop=-1), 1, cores)
    sampling = [("sampling: no cache, a row at a time", 4 * STEPS / naive)]
    traced, plain = network._trace, lambda net, dtype, heat: network._Step(net, heat)
    for name, net, asked, tries, dtype, n, step in (
            ("+ a cache, 384 rows a step", many, apart, 1, "float32", 1, plain),
            ("+ tries of a task share its prompt", many, prompts, 8, "float32", 1, plain),
            ("+ one key and value head", model, prompts, 8, "float32", 1, plain),
            (mixed, model, prompts, 8, cfg.dtype, 1, plain),
            ("+ a thread a core", model, prompts, 8, cfg.dtype, threads, plain),
            ("+ no Python within a step", model, prompts, 8, cfg.dtype, threads, traced)):
        network._trace = step
        spent = seconds(lambda: generate(net, asked, STEPS, tries=tries, stop=-1, threads=n, dtype=dtype), 2)
        sampling.append((name, len(apart) * STEPS / spent))
    rollouts = made_up_rollouts(prompts, random.Random(1))
    rows, twin = [r.prompt + r.reply for r in rollouts], copy.deepcopy(model)
    real, learning, adam = sum(map(len, rows)), [], torch.optim.AdamW(twin.parameters(), lr=1e-4)
    for name, dtype, shared, n in (
            ("+ rows of like length, reply's logits", "float32", False, 1), (mixed, cfg.dtype, False, 1),
            ("+ tries of a task share a row", cfg.dtype, True, 1), ("+ a thread a core", cfg.dtype, True, threads)):
        network.THREADS = n
        update, read = learning_step(model, cfg, rollouts, dtype, shared)
        learning.append((name, real / seconds(update, 2)))
    # last, for torch's own threads may disturb the rungs
    padded = seconds(lambda: [plain_step(twin, rows[i:i + 64], adam) for i in range(0, len(rows), 64)], 1, cores)
    return sampling, [("learning: padded batches, all logits", real / padded), *learning], 1 - read / real


def bench_device(cfg, tasks=256, size=8192):
    """Sampling and learning at the gpu preset's size on cfg.device, beside what that could do at best. A decode step
    reads at least all matrices and the cached keys and values of every row, so bytes over bandwidth is its roofline;
    for learning it is a large matrix product."""
    import train
    torch.manual_seed(0)
    rng, model = random.Random(0), train.new_model(cfg)
    c, a = model.config, torch.randn(size, size, dtype=getattr(torch, cfg.dtype), device=cfg.device)
    peak = 2 * size ** 3 / seconds(lambda: a @ a, 10)                       # FLOP/s
    b = torch.empty_like(a)                                                 # many copies: one is too short to time
    bandwidth = 40 * a.nbytes / seconds(lambda: [b.copy_(a) for _ in range(20)], 10)     # bytes/s
    more = [[rng.randrange(32, 300) for _ in range(rng.randint(20, 60))] for _ in range(2 * tasks)]
    prompts, rows = more[:tasks], tasks * 8                                 # twice as many are for learning

    def sample():                                                           # the first of 4 times captures the graph
        return rows * STEPS / seconds(lambda: generate(model, prompts, STEPS, tries=8, stop=-1, dtype=cfg.dtype), 4)
    graph = sample()
    network._twins.clear()                                                  # and with it its cache, and use of graphs
    captured, network._capture = network._capture, lambda step, z: step   # the same steps, launched one by one
    eager = sample()
    network._capture = captured
    network._twins.clear()
    gc.collect()                                                            # its step and it refer to each other
    naive = 2 * STEPS / seconds(lambda: generate_naive(model, prompts[:2], STEPS, stop=-1), 1)
    context = np.mean([len(p) for p in prompts]) + STEPS / 2
    values = 2 * c.n_layer * c.n_kv_head * c.head_dim * context             # cached for a row, on average
    step_bytes = a.element_size() * (weights_used(model) + rows * values)
    rollouts = made_up_rollouts(more, rng)
    real = sum(len(r.prompt) + len(r.reply) for r in rollouts)
    update, read = learning_step(model, cfg, rollouts, cfg.dtype)
    learnt = real / seconds(update)
    return {"weights": model.num_params(), "peak_tflops": peak / 1e12, "bandwidth_gb_s": bandwidth / 1e9,
            "sampled_tokens_per_s": graph, "eager_tokens_per_s": eager, "naive_tokens_per_s": naive,
            "share_of_roofline": step_bytes / bandwidth * graph / rows, "learnt_tokens_per_s": learnt,
            "model_flops_utilisation": 3 * learnt * read / real * flops_per_token(model) / peak}


def bench(folder, unsafe):
    """Sampling, learning and executing on this machine's CPU at the cpu preset's size, each beside its naive path and
    this machine's limit; then bench_device, on a GPU. Prints a table, writes bench.json."""
    import train
    p = executor.bench(unsafe=unsafe)
    network.tune("cpu")
    cores = executor.cores()
    cfg, _ = train.parse(["--preset", "cpu", "--device", "cpu"])
    torch.manual_seed(0)
    rng, model = random.Random(0), train.new_model(cfg)
    a = torch.randn(2048, 2048, dtype=getattr(torch, cfg.dtype))
    peak = 2 * 2048 ** 3 / seconds(lambda: a @ a, 10, cores)                # FLOP/s
    prompts = [[rng.randrange(32, 300) for _ in range(rng.randint(20, 60))] for _ in range(192)]
    sampling, learning, shared = bench_ladders(model, cfg, prompts)
    naive, fast, plain, learnt = (rungs[end][1] for rungs in (sampling, learning) for end in (0, -1))
    flops = flops_per_token(model)
    s = {"tokens_per_s": fast, "naive_tokens_per_s": naive, "ratio": fast / naive, "share_of_peak": fast * flops / peak}
    t = {"tokens_per_s": learnt, "plain_tokens_per_s": plain, "ratio": learnt / plain, "prompts_shared": shared,
         "share_of_peak": 3 * (1 - shared) * learnt * flops / peak}
    print(f"{cores} cores, {cfg.dtype}, matrix products at {peak / 1e9:,.0f} GFLOP/s, {model.num_params():,} weights\n")
    print(f"{'':22}{'fast':>12}{'naive':>12}{'ratio':>9}{'of limit':>10}")
    for name, ours, other, share in (
            ("sampled tokens/s", fast, naive, s["share_of_peak"]),
            ("  rollouts/s", fast / STEPS, naive / STEPS, None),
            ("learnt tokens/s", learnt, plain, t["share_of_peak"]),
            ("checked programs/s", p["checked_per_s"], p["fresh_process_per_s"], p["share_of_limit"])):
        print(f"{name:22}{ours:12,.0f}{other:12,.0f}{ours / other:8.1f}x" + (f"{share:10.1%}" if share else ""))
    print("\nladder, tokens/s", *(f"  {name:40}{rate:10,.0f}" for name, rate in sampling + learning), sep="\n")
    print(f"\n1,000 programs with 1 % endless ones: {p['endless_1pct_s']:.2f} s\n\n"
          "naive: sampling without a cache, one row at a time; learning in padded float32 batches with all logits;\n"
          "a fresh interpreter for each program, one at a time. limit: the matrix peak; programs run bare, twice, on\n"
          "all cores.")
    gpu = None
    if torch.cuda.is_available():
        network.tune("cuda")
        gpu = bench_device(train.parse(["--preset", "gpu"])[0])
        print(f"\n{torch.cuda.get_device_name()}", *(f"  {k:24}{v:16,.2f}" for k, v in gpu.items()), sep="\n")
        gpu["name"] = torch.cuda.get_device_name()
    path = os.path.join(folder, "bench.json")
    write_text(path, json.dumps({"command": "python eval.py --bench", **train.origin(cfg), "dtype": cfg.dtype,
                                 "peak_gflops": peak / 1e9, "sample": s, "learn": t, "execute": p,
                                 "ladder": sampling + learning, "gpu": gpu}, indent=1))
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    parser = argparse.ArgumentParser(prog="eval.py", description="Measure, compare and show runs.", allow_abbrev=False)
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("run", nargs="?", metavar="RUN", help="folder of a run: print its held-out table")
    one.add_argument("--compare", nargs="+", metavar="RUN", help="table of runs, mean and deviation over seeds")
    one.add_argument("--report", metavar="RUN", help="write RUN/report.html")
    one.add_argument("--bench", action="store_true", help="measure sampling, learning and executing")
    parser.add_argument("--tasks", metavar="FILE", help="with RUN: measure on a file in CRUXEval's format instead")
    parser.add_argument("--keep", metavar="DIR", help="with --compare: leave a small record of each run in DIR; such "
                        "records can stand in a run's place")
    parser.add_argument("--out", default="runs", help="where --compare and --bench write (default: runs)")
    parser.add_argument("--write", action="store_true", help="replace RUN/eval.json; else written only if absent")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--unsafe_executor", action="store_true", help="run programs without the kernel wall")
    parser.error = lambda message: fail(f"{message}; see --help")
    args = parser.parse_args(argv)
    mode = "--bench" if args.bench else "--compare" if args.compare else "RUN" if args.run is not None else "--report"
    for flag, modes in {"tasks": ["RUN"], "write": ["RUN"], "device": ["RUN"], "unsafe_executor": ["RUN", "--bench"],
                        "keep": ["--compare"], "out": ["--compare", "--bench"]}.items():
        if vars(args)[flag] != parser.get_default(flag) and mode not in modes:
            fail(f"--{flag} goes with {' or '.join(modes)}, not with {mode}; see --help")
    if args.tasks is not None and args.write:
        fail("--write goes with RUN alone, as --tasks writes nothing")
    if mode == "--bench":
        return bench(args.out, args.unsafe_executor)
    if mode == "--compare":
        return compare(args.compare, args.out, args.keep)
    if mode == "--report":
        return print(report(args.report))
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.device not in ("auto", device):
        fail("--device cuda: no CUDA here; leave --device out to use the CPU")
    network.tune(device)
    config, model, base = load_run(args.run, device)
    max_new, samples, n_inputs = config["max_new"], config["samples"], config["n_inputs"]
    dtype = "bfloat16" if config.get("dtype") == "bfloat16" and network.has_bfloat16(device) else "float32"
    if max_new >= model.config.block_size:
        fail(f"{args.run}/config.json: max_new {max_new} fills all {model.config.block_size} tokens")
    with executor.Executor(unsafe=args.unsafe_executor) as ex:
        if args.tasks is not None:
            return run_tasks(model, ex, args.tasks, max_new, samples, dtype)
        start = time.perf_counter()
        suite = build_suite(ex, config["suite_n"], n_inputs, config["large"])
        people = people_suite(ex, n_inputs)
        print(f"{sum(map(len, suite.values()))} held-out tasks and {len(people)} of people's, {1 + samples} "
              "replies each, two models ...", file=sys.stderr, flush=True)
        result = join(*(measure(m, ex, suite, people, max_new, samples, dtype) for m in (base, model)))
    print_result(result, model, max_new)
    path = os.path.join(args.run, "eval.json")
    if config["step"] < config["steps"]:     # an eval.json would say that the run is finished
        print(f"not written to {path}: the run is at step {config['step']} of {config['steps']}")
    elif args.write or not os.path.exists(path):
        write_text(path, json.dumps({**(read_json(path) or {}), **result}))    # its minutes and rollouts stay
        print(f"wrote {path}")
    else:
        print(f"kept the {path} that was there; --write replaces it")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


def command_line(main):
    """Run main() as a command: a terminal that lacks a character, Ctrl-C, a reader of the pipe who has seen enough, a
    system on which no program can be run are no reason for a traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)
    except executor.Unusable as error:             # no kernel wall here, say: it names the flag to add
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)                              # as a program that SIGPIPE ends


if __name__ == "__main__":
    command_line(main)
