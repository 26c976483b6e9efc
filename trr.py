"""
trr.py: Task-Relative REINFORCE++ (arXiv 2505.03335, section 3.3.5, Eq. 8; appendix A, Eq. 9): the learning rule.

One network plays 2 roles x 3 kinds = 6 cells with rewards of different mean and spread. Each cell is its own baseline,

    A = (r - mean_cell) / std_cell                                                      (Eq. 8)

so a reply is judged against its own cell's mean, however well the other cells do. Then a plain policy gradient with a
PPO clip (Eq. 9): no critic, no KL term, no entropy bonus (the paper's is .001), no reference model.

Where we differ from the paper and from the authors' code:
1) Eq. 8 whitens over sequences, and so do we. The authors' code whitens over all TOKENS of a cell (veRL's
   masked_whiten), so long replies weigh more in mean and variance; pass lengths= for that form. `python trr.py` shows
   both.
2) Eq. 9 averages over a sequence's tokens first (average="sequence"); the authors' code over the tokens of a
   micro-batch, ours over all tokens of the update (average="token"). train.py's default is sequences for Eq. 8, tokens
   for Eq. 9.
3) A cell of one reward, or of equal ones, gets exactly 0, never NaN; and `floor` bounds the divisor from below, so
   that a cell of nearly equal rewards is not blown up.
4) mode="group" is not in the paper: the mean over the tries of one task is the baseline, as in GRPO, so how hard a
   task is no longer enters the advantage; the divisor is still the cell's. Proposals have no group and keep their
   cell's mean.

Try:  python trr.py            # a worked example to check by hand
"""
import torch

MODES, AVERAGES = ("trr", "group", "global", "none"), ("token", "sequence")


def whiten(r, w, floor):
    """(r - mean) / std, all (N,). r[i] counts w[i] times (1, or the reply's tokens); the std has Bessel's factor.
    With a spread of 0 the result is 0."""
    mean = (w * r).sum() / w.sum()
    std = ((w * (r - mean) ** 2).sum() / (w.sum() - 1).clamp(min=1)).sqrt()
    if std < 1e-6:  # all equal: to divide would only amplify rounding noise
        return torch.zeros_like(r)
    return (r - mean) / std.clamp(min=floor)


def advantages(rewards, cells, groups=None, mode="trr", lengths=None, floor=0.0):
    """Advantage of each rollout, (N,) float32.

    rewards: N numbers. cells: N hashable labels, in the game (role, kind). groups: N labels of the tries of one task,
    only for mode="group"; a negative label means no group. lengths: N token counts, to whiten by token (the authors'
    code) instead of by sequence (Eq. 8). floor: least deviation a cell is divided by.

    mode  "trr":    mean and std of the cell (Eq. 8)
          "group":  mean of the task's tries, std of what is left in the cell (a per-task baseline)
          "global": one mean and std for all (plain REINFORCE++)
          "none":   the reward itself
    """
    r = torch.as_tensor(rewards, dtype=torch.float32).clone()
    assert r.dim() == 1 and len(cells) == len(r), f"{len(cells)} cells for rewards of shape {tuple(r.shape)}"
    assert r.isfinite().all(), "a reward is not finite: one NaN would poison its whole cell"
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: choose one of {', '.join(MODES)}")
    if mode == "none":
        return r
    w = torch.ones_like(r) if lengths is None else torch.as_tensor(lengths, dtype=torch.float32)
    labels = [None] * len(r) if mode == "global" else list(cells)
    if mode == "group":
        assert groups is not None, "mode='group' needs the group of each rollout"
        ids = torch.as_tensor(groups)
        for g in ids[ids >= 0].unique():
            mine = ids == g
            r[mine] -= (w * r)[mine].sum() / w[mine].sum()
    for label in dict.fromkeys(labels):
        rows = [i for i, c in enumerate(labels) if c == label]
        r[rows] = whiten(r[rows], w[rows], floor)
    return r


def policy_loss(logp, old_logp, adv, mask, clip=0.2, average="token", norm=None):
    """PPO's clipped surrogate (Eq. 9), to be minimised. Returns (loss, stats).

    logp, old_logp (B, T): log-probs of the sampled tokens now and when they were sampled. adv (B,). mask (B, T): 1
    on the reply's tokens, its end token included. average: "token" sums over all tokens / norm, "sequence"
    sums the means over each sequence / norm. norm: tokens (or sequences) of the whole update, so that micro-batches
    add up to the update's mean; None: those of this batch.

    In the first pass over a batch the ratio is 1 and the gradient is that of -A log p: whitened REINFORCE. The clip
    acts only from the second minibatch or epoch on."""
    if average not in AVERAGES:
        raise ValueError(f"average {average!r}: choose one of {', '.join(AVERAGES)}")
    mask = mask.to(logp.dtype)
    adv = adv[:, None]
    log_ratio = (logp - old_logp) * mask                      # pads would give exp(garbage)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.min(ratio * adv, clipped * adv) * mask      # (B, T)
    if average == "token":
        loss = loss.sum() / (norm or mask.sum().clamp(min=1))
    else:
        loss = (loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / (norm or len(mask))
    with torch.no_grad():
        stats = {"clipped": ((clipped * adv < ratio * adv) * mask).sum(), "tokens": mask.sum()}
    return loss, stats


def main():
    print("Eight rollouts in two cells, by hand:\n")
    rewards = [1.0, -0.5, 1.0, 1.0, 0.75, 0.0, 0.0, -1.0]
    cells = ["solve"] * 4 + ["propose"] * 4
    groups = [0, 0, 1, 1, -1, -1, -1, -1]
    lengths = [10, 30, 10, 10, 20, 20, 20, 20]
    print("  solve:   mean (1 - .5 + 1 + 1) / 4 = .625, deviations .375 and -1.125,\n"
          "           std sqrt((3 * .1406 + 1.2656) / 3) = .75, so right answers get\n"
          "           .375 / .75 = +.5 and the wrong one -1.5")
    print("  propose: mean -.0625, std .718: the proposal that some could solve gets\n"
          "           .8125 / .718 = +1.13\n")
    print("  cell     task tokens reward |   trr  by token  group  global")
    columns = [advantages(rewards, cells), advantages(rewards, cells, lengths=lengths),
               advantages(rewards, cells, groups, "group"), advantages(rewards, cells, mode="global")]
    for i, (r, c, g, n) in enumerate(zip(rewards, cells, groups, lengths)):
        print(f"  {c:8} {g:3d} {n:6d} {r:7.2f} | " + " ".join(f"{col[i]:+7.3f}" for col in columns))
    print("\n  by token: the long wrong reply pulls the mean down, right answers look better\n"
          "            (proposals are of one length: there only Bessel's factor differs).\n"
          "  group:    both tries of task 1 were right, which teaches nothing: 0.")
    print("  global:   the proposer is measured against the solver's rewards, and its\n"
          "            invalid task gets most of the blame.\n")
    logp = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]], requires_grad=True)
    loss, stats = policy_loss(logp, logp.detach(), torch.tensor([1.0, -1.0]), torch.tensor([[1, 1], [1, 0]]))
    loss.backward()
    print("Two replies, A = +1 of two tokens and -1 of one. At ratio 1 the loss is the\n"
          f"mean of -A over tokens, -(1 + 1 - 1) / 3 = {loss.item():+.3f}; its gradient, -A / 3,\n"
          "pushes the good log-probs up and the bad one down; the padded token has none:")
    print("\n".join("  " + " ".join(f"{g:+.3f}" for g in row) for row in logp.grad.tolist()))


if __name__ == "__main__":
    main()
