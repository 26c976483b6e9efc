"""How abduction's own check fares (results/README.md, The check):  python results/checks.py runs/full-cpu-s1"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import eval
import model
import selfplay
from executor import Executor
from selfplay import INPUT, RIGHT, TRY, WRONG

if len(sys.argv) < 2:
    eval.fail("give the folder of a run")
model.tune("cpu")
config, after, before = eval.load_run(sys.argv[1])
with Executor(unsafe="--unsafe_executor" in sys.argv) as ex:
    suite = eval.build_suite(ex, config["suite_n"], config["n_inputs"], config["large"])
    tasks = [t for depth in range(1, 6) for t in suite["abduction", depth] for _ in range(8)]
    for what, net in (("before", before), ("after", after)):
        replies, _ = model.generate(net, [selfplay.solve_prompt(t) for t in tasks], config["max_new"])
        parts = [selfplay.sections(reply) for reply in replies]     # None, <|try|>, <|input|>, the mark, what follows
        marks = [[marker for marker, _ in p] + [None] for p in parts]
        whole = [m[1:3] == [TRY, INPUT] and m[3] in (RIGHT, WRONG) for m in marks]
        firsts = [model.decode(p[2][1]).partition("\n")[0] if w else None for p, w in zip(parts, whole)]
        good, ends = ([v == "right" for v in selfplay.judge_answers(ex, tasks, answers)]
                      for answers in (firsts, list(map(selfplay.parse_answer, replies))))

        def share(of, among):
            return f"{sum(map(of, among)) / max(1, len(among)):.2f}"
        right, wrong = ([i for i, w in enumerate(whole) if w and good[i] == is_right] for is_right in (True, False))
        doubted, caught = ([i for i in these if marks[i][3] == WRONG] for these in (right, wrong))
        on = [i for i in caught if marks[i][4] == TRY]
        print(f"{what}: of first candidates right {share(lambda i: good[i], right + wrong)}\n"
              f"  of the right ones doubted {share(lambda i: marks[i][3] == WRONG, right)}, "
              f"of these replies end right {share(lambda i: ends[i], doubted)}\n"
              f"  of the wrong ones caught {share(lambda i: marks[i][3] == WRONG, wrong)}, "
              f"of these replies end right {share(lambda i: ends[i], caught)} "
              f"({share(lambda i: i in on, caught)} go on, {share(lambda i: ends[i], on)} of them end right)\n"
              f"  cut off {share(lambda i: replies[i][-1] != model.END, range(len(replies)))}")
