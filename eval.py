"""
eval.py: how we know. The held-out suite, pass@k with intervals, CRUXEval files, run comparison, the report, the speed bench.
"""
import random
import time

import numpy as np

from executor import Executor
from model import END, generate
from selfplay import KINDS, draw_programs, judge_answers, make_tasks, parse_answer, solve_prompt, MAX_DEPTH

SUITE_SEED = 505_03335  # fixed: every run and every seed is measured on the same tasks


def build_suite(ex, n, n_inputs, large=False):
    """The held-out suite: {(kind, depth): [Task] * n} for 3 kinds and depths 1-6, the same for every run of a tier."""
    suite = {}
    for kind in KINDS:
        for depth in range(1, MAX_DEPTH + 1):
            rng = random.Random(f"{SUITE_SEED}/{kind}/{depth}")
            draws, _ = draw_programs(ex, rng, [depth] * n, n_inputs if kind == "induction" else 1, large)
            tasks = [d.task(kind, rng) for d in draws]
            made = make_tasks(ex, [(kind, t.program, t.inputs, t.message) for t in tasks])
            for t, (checked, error) in zip(tasks, made):
                assert checked, f"a held-out task failed: {error}: {t.program!r}"
                t.outputs, t.keys = checked.outputs, checked.keys
            suite[kind, depth] = tasks
    return suite


def pass_at_k(right, n, k):
    """Unbiased pass@k (Chen et al. 2021) from `right` correct among n samples; right is an array."""
    right = np.asarray(right)
    miss = np.ones(len(right))
    for i in range(k):  # C(n - c, k) / C(n, k) as a product that cannot overflow
        miss *= np.maximum(n - right - i, 0) / (n - i)
    return 1 - miss


def attempt(model, ex, tasks, max_new, temperature, tries, seed):
    """Verdicts (len(tasks), tries) of sampled solutions, True = right; and the mean reply length."""
    replies, _ = generate(model, [solve_prompt(t) for t in tasks], max_new, temperature, tries, seed)
    verdicts = judge_answers(ex, [t for t in tasks for _ in range(tries)], [parse_answer(r) for r in replies])
    return np.array([v == "right" for v in verdicts]).reshape(len(tasks), tries), np.mean([len(r) for r in replies])


def evaluate(model, ex, suite, max_new, samples=16, seed=SUITE_SEED):
    """{kind: {depth: {"greedy", "pass@1", "pass@16", "n", ...}}} on the suite, with bootstrap 95 % intervals."""
    keys, tasks = list(suite), [t for key in suite for t in suite[key]]
    greedy, _ = attempt(model, ex, tasks, max_new, 0.0, 1, seed)
    sampled, _ = attempt(model, ex, tasks, max_new, 1.0, samples, seed)
    table, start = {}, 0
    for kind, depth in keys:
        n = len(suite[kind, depth])
        g, s = greedy[start:start + n, 0], sampled[start:start + n]
        start += n
        table.setdefault(kind, {})[str(depth)] = {
            "greedy": float(g.mean()), "pass@1": float(s.mean()),
            **{f"pass@{k}": float(pass_at_k(s.sum(1), samples, k).mean()) for k in (4, 16) if k <= samples}, "n": n}
    return table


def mean_over(table, metric, depths=range(1, 6)):
    """Mean over kinds and depths of one metric: the figure by which runs are compared."""
    return float(np.mean([table[k][str(d)][metric] for k in table for d in depths]))
