"""Show token by token where a looped model would stop: python examples/look_at_exits.py

Without arguments it trains the model of train_tiny.py first. With ``--checkpoint runs/quickstart/gate`` it opens a
trained one. Each line is one token: the gate's probability of leaving after each loop, the mean depth that follows, and
the cross-entropy of the next token after each loop. A good gate leaves early where the loss no longer falls.
"""

import argparse

import torch
import torch.nn.functional as F
import train_tiny

from looplm import checkpoint, reference
from looplm.encoding import encode
from looplm.megatron import process_groups

TEXT = "def forward(self, x):\n    return self.norm(x)\n"


def look_at_tiny(text: str, steps: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return the characters, the gate's logits [R, S] and the losses [R, S] of a tiny model trained here."""
    model = train_tiny.train(steps, verbose=False)
    ids_S = torch.tensor(list(text.encode()))
    with torch.no_grad():
        loss_RSB, logit_RSB = train_tiny.loop_losses(model, ids_S[None, :-1], ids_S[1:, None])
    return list(text), logit_RSB[..., 0], loss_RSB[..., 0]


def look_at_checkpoint(text: str, directory: str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return the tokens, the gate's logits [R, S] and the losses [R, S] of a checkpoint."""
    opened = checkpoint.open_model(directory, process_groups.start(seed=0))
    ids_S = torch.tensor(encode(opened.tokenizer, text, opened.about.begin_id))
    if len(ids_S) < 2:
        raise SystemExit(f"error: --text: {text!r} has {len(ids_S)} tokens; give a text of at least two")
    with torch.no_grad():
        output = opened.model(ids_S[None, :-1])
        weight_VD = opened.model.head_weight()
        loss_RS = torch.stack(
            [F.cross_entropy(h_SBD[:, 0] @ weight_VD.T, ids_S[1:], reduction="none") for h_SBD in output.hidden]
        )
    process_groups.stop()
    return [opened.tokenizer.decode([i]) for i in ids_S.tolist()], output.gate_logit_RSB[..., 0], loss_RS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--checkpoint", help="a training directory; default: train a tiny model")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--steps", type=int, default=200, help="of the tiny model's training")
    args = parser.parse_args()

    if args.checkpoint:
        tokens, logit_RS, loss_RS = look_at_checkpoint(args.text, args.checkpoint)
    else:
        tokens, logit_RS, loss_RS = look_at_tiny(args.text, args.steps)
    p_RS = reference.exit_distribution(logit_RS)
    loops = len(p_RS)
    depth_S = (p_RS * torch.arange(1, loops + 1)[:, None]).sum(0)

    print(f"{'token':>12}   P(leave after loop 1..{loops})".ljust(15 + 6 * loops) + "  depth   loss after each loop")
    for position, depth in enumerate(depth_S.tolist()):
        leave = " ".join(f"{p:5.2f}" for p in p_RS[:, position].tolist())
        losses = " ".join(f"{loss:6.2f}" for loss in loss_RS[:, position].tolist())
        print(f"{tokens[position]!r:>12}   {leave}  {depth:5.2f}  {losses}")
    print(
        f"mean depth {depth_S.mean():.2f} of {loops}, loss at full depth {loss_RS[-1].mean():.3f}, "
        f"expected loss with early exit {(p_RS * loss_RS).sum(0).mean():.3f}"
    )


if __name__ == "__main__":
    main()
