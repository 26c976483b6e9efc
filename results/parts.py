"""What the gain is made of (exercise 5 of the README):  python results/parts.py runs/full-cpu-s1"""
import copy
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import eval
import model
import selfplay
from executor import Executor

if len(sys.argv) < 2:
    eval.fail("give the folder of a run")
model.tune("cpu")
config, after, before = eval.load_run(sys.argv[1])
sharper = copy.deepcopy(before)
sharper.sharpness.data = after.sharpness.data                    # the start network with one number of the end's
thought = model.encode("\n    x = ")                             # one token: how a thought of deduction begins
with Executor(unsafe="--unsafe_executor" in sys.argv) as ex:
    suite = eval.build_suite(ex, config["suite_n"], config["n_inputs"], config["large"])
    for kind in selfplay.KINDS:
        tasks = [t for depth in range(1, 6) for t in suite[kind, depth]]
        made = thought if kind == "deduction" else []            # what is put into the reply's mouth
        for what, net, first in (("before", before, []), ("made to think", before, made),
                                 ("and sharper", sharper, made), ("after", after, [])):
            prompts = [selfplay.solve_prompt(t) + first for t in tasks]
            replies, _ = model.generate(net, prompts, config["max_new"] - 1, tries=8)
            verdicts = selfplay.judge_answers(ex, [t for t in tasks for _ in range(8)],
                                              [selfplay.parse_answer(first + r) for r in replies])
            wrong = [selfplay.RIGHT in r for r, v in zip(replies, verdicts) if v == "wrong"]
            print(f"{kind} {what:13} {100 * verdicts.count('right') / len(verdicts):.1f}  "
                  f"candidates {sum(r.count(selfplay.TRY) for r in replies) / len(replies):.2f}  "
                  f"wrong ones marked right {sum(wrong) / max(1, len(wrong)):.2f}")
