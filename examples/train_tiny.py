"""Train a tiny looped model in plain torch, in seconds on a CPU: python examples/train_tiny.py

The text is the source of looplm/reference/model.py, one token per byte. Stage 1 trains everything on the loss that the
gate's exit probabilities average over the loops. Stage 2 freezes the trunk and teaches the gate which loops still help.
"""

import argparse
from pathlib import Path

import torch

from looplm import reference
from looplm.config import GateConfig, ModelConfig
from looplm.reference import ReferenceLM

MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    ffn_hidden_size=128,
    num_layers=1,
    num_loops=4,  # one layer, run four times
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    max_sequence_length=128,
    init_std=0.1,
)
GATE = GateConfig(kind="lru", state_size=16)
BATCH, LENGTH, BETA = 8, 64, 0.05


def read_bytes() -> torch.Tensor:
    """Return the text as a vector of byte values."""
    return torch.tensor(list(Path(reference.model.__file__).read_bytes()))


def sample(text: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random pieces of the text as inputs [B, S], and the byte after each of them as labels [S, B]."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
    pieces = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return pieces[:, :-1], pieces[:, 1:].T


def loop_losses(model: ReferenceLM, ids_BS: torch.Tensor, labels_SB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of every token after every loop, and the gate's logits: both [R, S, B]."""
    params = dict(model.named_parameters())
    output = reference.forward(params, MODEL, GATE, ids_BS)
    weight_VD = reference.head_weight(params, MODEL)
    losses = [reference.token_losses(h_SBD, weight_VD, labels_SB) for h_SBD in output.hidden]
    return torch.stack(losses), output.gate_logit_RSB


def expected_loss(ce_RSB: torch.Tensor, gate_logit_RSB: torch.Tensor) -> torch.Tensor:
    """Stage 1: the expected cross-entropy under the exit probabilities, minus BETA times their entropy."""
    return reference.entropy_regularised_loss(ce_RSB, gate_logit_RSB, BETA)


def gate_loss(ce_RSB: torch.Tensor, gate_logit_RSB: torch.Tensor) -> torch.Tensor:
    """Stage 2: after loop t, the gate learns whether loop t + 1 will lower the loss."""
    return reference.adaptive_gate_loss(ce_RSB.detach(), gate_logit_RSB, target="next")


def train(steps: int = 200, gate_steps: int = 60, verbose: bool = True) -> ReferenceLM:
    """Train both stages and return the model."""
    torch.manual_seed(0)
    generator, text = torch.Generator().manual_seed(0), read_bytes()
    model = ReferenceLM(MODEL, GATE)
    with torch.no_grad():  # see "initial values" in docs/architecture.md
        model.get_parameter("embedding.word_embeddings.weight").normal_()
        for name, parameter in model.named_parameters():
            if "_bda.norm" in name:
                parameter.fill_((2 * MODEL.num_layers * MODEL.num_loops) ** -0.5)

    gate = [parameter for name, parameter in model.named_parameters() if name.startswith("gate.")]
    stages = [
        ("everything", list(model.parameters()), steps, 5e-3, expected_loss),
        ("the gate", gate, gate_steps, 2e-2, gate_loss),
    ]
    for name, parameters, count, rate, loss_of in stages:
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        for step in range(count + 1):
            ce_RSB, gate_logit_RSB = loop_losses(model, *sample(text, generator))
            loss = loss_of(ce_RSB, gate_logit_RSB)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if verbose and step % 20 == 0:
                loops = " ".join(f"{value:.3f}" for value in ce_RSB.mean((1, 2)).tolist())
                print(f"training {name}, step {step:>3}: loss {loss:.3f}, by loop {loops}", flush=True)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    train(parser.parse_args().steps)
